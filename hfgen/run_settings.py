"""Settings of the rails: how long, how often, where to."""

from dataclasses import dataclass
from typing import Literal

from hfgen.config import setting
from hfgen.errors import UserError
from hfgen.stopping import parse_duration


@dataclass
class RunSettings:
    """Settings of the rails: how long, how often, where to."""

    _argument_group_name = "run"

    output_dir: str = setting("runs/run", "folder of the run: settings, checkpoints, samples, logs, pipeline")
    seed: int = setting(0, "fixes the initial weights, the data order, the noise and every other random number")
    resume: str | None = setting(
        None, "'latest' or the path of a checkpoint; 'latest' starts anew where there is none", may_change=True
    )
    max_train_steps: int | None = setting(None, "updates of the weights; 100000 if num_epochs is not given either")
    num_epochs: float | None = setting(None, "passes over the data; the run ends at whichever comes first")
    max_train_time: str | None = setting(
        None, "stop with a checkpoint after this time of this launch, for example 45m or 8h50m", may_change=True
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto", "auto: bf16 where the hardware multiplies it natively, else no"
    )
    cpu: bool = setting(False, "stay on the CPU although there is an accelerator")
    log_every: int = setting(50, "steps between two entries of the log", may_change=True)
    sample_every: int = setting(1000, "steps between two sheets of samples; 0: only at the end", may_change=True)
    num_sample_images: int = setting(16, "images on a sheet of samples", may_change=True)
    checkpoint_every: int = setting(1000, "steps between two checkpoints; 0: only at the end", may_change=True)
    checkpoints_total_limit: int = setting(2, "checkpoints to keep", may_change=True)
    report_to: Literal["tensorboard", "wandb", "none"] = setting("tensorboard", "where curves go", may_change=True)

    def __post_init__(self):
        if self.max_train_steps is not None and self.max_train_steps < 1:
            raise UserError(f"--max_train_steps {self.max_train_steps}: must be at least 1")
        for name in ("log_every", "num_sample_images", "checkpoints_total_limit"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("sample_every", "checkpoint_every", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.num_epochs is not None and self.num_epochs <= 0:
            raise UserError(f"--num_epochs {self.num_epochs}: must be positive")
        parse_duration("--max_train_time", self.max_train_time)
