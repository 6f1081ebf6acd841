"""How a cell ended, and its results, as plain values: reading a study needs none of the slow imports of training."""

import math
from dataclasses import dataclass
from typing import Any


TRAINED, DIVERGED, BROKEN, LOST, IN_USE = "trained", "diverged", "broken", "lost", "in use"


@dataclass(frozen=True)
class Ending:
    """How the training of a cell ended.

    Attributes:
        kind: "trained"; "diverged" if the training itself failed; "broken" if something else failed; "lost" if
            another worker has the cell now; "in use" if another process is still training in the folder.
        reason: reason of a failure.
        step: last step, if known.
    """

    kind: str
    reason: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Result:
    """The stored results of a trained cell.

    Attributes:
        summary: summary of training and scores; "course" is FID during training, if requested.
        curve: step and losses of at most two hundred entries of the run's log.
        sheet: the first images of the evaluation, JPEG in base64.
        strip: for diffusion: a denoising strip, likewise; else "".
    """

    summary: dict[str, Any]
    curve: list[dict[str, float]]
    sheet: str
    strip: str

    @property
    def is_finite(self) -> bool:
        """Whether the generated images could be scored."""
        fid = self.summary["scores"]["fid"]
        return fid is not None and math.isfinite(fid)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell.

    Attributes:
        kind: "trained", "diverged" or "broken".
        value: the metric that the study compares; NaN unless trained.
        reason: why there is no value.
        step: last step of the training, if known.
        result: scores, curve and pictures.
    """

    kind: str
    value: float = math.nan
    reason: str = ""
    step: int | None = None
    result: Result | None = None
