"""Errors for training that has failed in a way that more steps will not fix."""

from pathlib import Path
from typing import Any

from hfgen.errors import UserError


# Settings that the final message names, besides the learning rates.
RELEVANT_SETTINGS = ("mixed_precision", "max_grad_norm", "batch_size", "lr_warmup_steps")


class TrainingTroubleError(UserError):
    """Trouble that makes a run roll back or stop.

    Attributes:
        status: written to `status.json` if the run stops for it.
        remedy: what the user can try.
    """

    status = "diverged"
    remedy = "Lower --learning_rate or --max_grad_norm, or try --mixed_precision no"

    def explained(
        self, step: int, rollbacks: int, settings: dict[str, Any], checkpoint: Path | None
    ) -> "TrainingTroubleError":
        """Return the error that ends the run: what happened, when, with which settings, and what to try.

        Args:
            step: when it happened.
            rollbacks: number of earlier rollbacks.
            settings: all settings of the run.
            checkpoint: the last good checkpoint.
        """
        names = [name for name in settings if "learning_rate" in name or name in RELEVANT_SETTINGS]
        relevant = ", ".join(f"{name}={settings[name]}" for name in names)
        tried = f" after {rollbacks} rollbacks" if rollbacks else ""
        left = f"Last good checkpoint: {checkpoint or 'none'}"
        return type(self)(f"stopped at step {step}{tried}: {self} ({relevant}). {left}. {self.remedy}")


class NonFiniteError(TrainingTroubleError):
    """A loss or a weight is not finite; no checkpoint was written since the last good one."""


class CollapseError(TrainingTroubleError):
    """A watch over the training has reported trouble."""

    status = "collapsed"
    remedy = "Lower --learning_rate, or try another preset; for a GAN on few images try --augment diffaugment"
