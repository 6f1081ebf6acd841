"""What ends a run before its last step: training that more steps will not mend, and errors of any kind."""

import math
import re
import signal
import textwrap
from pathlib import Path
from typing import Any

from hfgen.errors import TerminatedError, UserError, message_for_user
from hfgen.training.stopping import HUNG_UP, INTERRUPTED, REASONS, TERMINATED


# Settings that the final message names, besides the learning rates.
RELEVANT_SETTINGS = ("mixed_precision", "max_grad_norm", "batch_size", "lr_warmup_steps")
# Far above every loss that a training recovers from; float32 would go on to 3e38.
MAX_LOSS = 1e12
# Below this, gradients overflow in fp16 although the scaler makes them smaller.
MIN_SCALE = 1.0
FOR_A_GAN = "; on few images try --augment diffaugment"  # without it so far
# What PyTorch says, by gloo or NCCL, when another process is gone.
LOST_PROCESS = re.compile(r"connection (closed|reset|refused)|broken pipe|socket|gloo|nccl|timed? ?out", re.IGNORECASE)


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
        remedy = self.remedy if "max_grad_norm" in settings else self.remedy.replace(" or --max_grad_norm", "")
        remedy = remedy if settings.get("augment", "diffaugment") != "diffaugment" else remedy.replace(FOR_A_GAN, "")
        return type(self)(f"stopped at step {step}{tried}: {self} ({relevant}). {left}. {remedy}")


class NonFiniteError(TrainingTroubleError):
    """A loss or a weight is not finite; no checkpoint was written since the last good one."""


class CollapseError(TrainingTroubleError):
    """A watch over the training has reported trouble."""

    status = "collapsed"
    remedy = f"Lower --learning_rate, or try another preset{FOR_A_GAN}"


class RunawayError(TrainingTroubleError):
    """A loss has grown beyond `MAX_LOSS`; the latest checkpoints may be useless, too."""


def check_losses(losses: dict[str, float], scaler: Any = None) -> None:
    """Raise a `TrainingTroubleError` for mean losses that no training recovers from.

    Args:
        losses: by name.
        scaler: PyTorch's gradient scaler, with fp16.
    """
    if scaler is not None and scaler.get_scale() < MIN_SCALE:
        raise NonFiniteError("gradients overflow in fp16, however small the scale of the loss")
    if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
        raise NonFiniteError(f"{', '.join(bad)} is not finite")
    if bad := [f"{name} is {value:.2g}" for name, value in losses.items() if abs(value) > MAX_LOSS]:
        raise RunawayError(f"the training has diverged: {', '.join(bad)}")


def ending_of(error: BaseException) -> tuple[str, str]:
    """Return the status and the reason for `status.json` of a run that an error has ended."""
    if isinstance(error, TerminatedError):
        return "stopped", REASONS[TERMINATED if error.number == signal.SIGTERM else HUNG_UP]
    if isinstance(error, KeyboardInterrupt):
        return "stopped", REASONS[INTERRUPTED]
    message = message_for_user(error) if isinstance(error, Exception) else None
    return "failed", textwrap.shorten(message or f"{type(error).__name__}: {error}", 300)


def lost_process(error: BaseException | None, num_processes: int) -> UserError | None:
    """Return what to say in place of an error of PyTorch's that only means that another process is gone; else None."""
    if num_processes == 1 or not isinstance(error, RuntimeError) or not LOST_PROCESS.search(str(error)):
        return None
    return UserError(
        "another process of this run has ended; its reason, if it gave one, is printed above or below "
        f"({textwrap.shorten(str(error), 200)})"
    )
