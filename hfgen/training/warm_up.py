"""Warm-ups that a run is too short for."""

from hfgen.texts import counted
from hfgen.training.run import Run


def warn_if_unfinished(run: Run, option: str, warmup_steps: int, steps: int, what: str) -> None:
    """Warn at the start of a new run whose warm-up is longer than its training.

    Args:
        run: restored; without a checkpoint it is at step 0.
        option: the option's name, without dashes.
        warmup_steps: updates of the warm-up.
        steps: updates in which it should be over.
        what: what rises, such as "the learning rate".
    """
    if run.is_main and run.step == 0 and warmup_steps > steps:
        run.warn(
            f"the warm-up of {counted(warmup_steps, 'update')} (--{option}) is longer than the training of "
            f"{counted(steps, 'update')}: {what} never rises to its full value"
        )
