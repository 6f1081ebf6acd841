"""What a watch over the training finds; see `collapse.py` for GANs and `posterior.py` for VAEs."""

from typing import NamedTuple


class WatchResult(NamedTuple):
    """Result of one check.

    Attributes:
        signals: numbers for the log, by name.
        good: whether a checkpoint saved now is a good one to roll back to.
        trouble: what is wrong, as a clause; None if nothing is.
        warning: what the user may want to change, as a sentence; None if nothing, or if already reported.
    """

    signals: dict[str, float]
    good: bool
    trouble: str | None
    warning: str | None
