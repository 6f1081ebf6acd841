"""Settings that every training run has: length, intervals, output."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hfgen.config import check_ranges, setting
from hfgen.errors import UserError
from hfgen.ranges import COUNT, COUNT_OR_NONE, POSITIVE, SCORED_IMAGES, SEED, Range
from hfgen.training.duration import parse_duration


DEFAULT_TRAIN_STEPS = 100_000
PLANNED_SCHEDULES = ("cosine", "linear")  # of the learning rate, planned for a run's length
# Intervals of long runs, and the number of log entries and sheets that a short run has at least. A sheet costs
# seconds, so those of a very short run are MIN_SAMPLE_EVERY steps apart.
LOG_EVERY, SAMPLE_EVERY = 50, 1000
MIN_LOGGED, MIN_SHEETS, MIN_SAMPLE_EVERY = 40, 10, 10


@dataclass
class RunSettings:
    """Settings that every training run has: length, intervals, output."""

    _argument_group_name = "run"

    output_dir: str = setting(
        "runs/run",
        "folder of the run: settings, checkpoints, samples, logs, pipeline",
        may_change=True,
        belongs_to="run",
    )
    seed: int = setting(0, "seed of the initial weights, data order, noise and every other random number", SEED)
    resume: str | None = setting(
        None,
        "'latest' or the path of a checkpoint; 'latest' starts a new run if there is none; a checkpoint with another "
        "--output_dir continues with the settings given now",
        may_change=True,
        belongs_to="run",
    )
    init_from: str | None = setting(
        None,
        "start from the weights of a run, a checkpoint, a pipeline or a Hub repo of the same architecture; the "
        "optimizers are reset",
    )
    max_train_steps: int | None = setting(
        None, "weight updates in total; 100000 if num_epochs is not given either", COUNT, may_change=True
    )
    num_epochs: float | None = setting(
        None,
        "passes over the data; with max_train_steps, the shorter limit applies; each replaces the other of a preset",
        POSITIVE,
        may_change=True,
    )
    max_train_time: str | None = setting(
        None,
        "time limit of this launch, such as 45m or 8h50m; the run then saves a checkpoint and stops; a VAE still fits "
        "its density",
        may_change=True,
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto",
        "auto: the precision given to accelerate launch, else bf16 if the hardware supports it natively, else fp16 on "
        "an older GPU with tensor cores (not with gradient penalties), else no; try no if training diverges",
    )
    cpu: bool = setting(False, "train on the CPU even if there is an accelerator")
    log_every: int | None = setting(
        None, "steps between log entries; unset: 50, fewer in a short run", COUNT, may_change=True
    )
    sample_every: int | None = setting(
        None,
        "steps between sample sheets; unset: 1000, fewer in a short run, but at least 10; 0: only at the end",
        COUNT_OR_NONE,
        may_change=True,
    )
    num_sample_images: int = setting(16, "images on each sample sheet", Range(1, 10_000), may_change=True)
    checkpoint_every: int = setting(
        1000, "steps between checkpoints; 0: only at the end", COUNT_OR_NONE, may_change=True
    )
    checkpoints_total_limit: int = setting(2, "checkpoints to keep; older ones are deleted", COUNT, may_change=True)
    evaluate_every: int = setting(
        0,
        "steps between evaluations against the training images (FID, KID, copies); 0: off",
        COUNT_OR_NONE,
        may_change=True,
    )
    evaluate_num_images: int = setting(
        1000, "images per evaluation; more make scores more reliable", SCORED_IMAGES, may_change=True
    )
    best_by: Literal["fid", "kid"] = setting("fid", "score that selects the pipeline kept in best/", may_change=True)
    feature_weights: str | None = setting(
        None, "TorchScript file of the Inception network; found automatically if installed", may_change=True
    )
    push_to_hub: bool = setting(
        False, "upload the pipeline to the Hub when the run ends", may_change=True, belongs_to="run"
    )
    hub_model_id: str | None = setting(
        None,
        "repo to upload to, as owner/name; unset: your own, named after output_dir",
        may_change=True,
        belongs_to="run",
    )
    hub_private_repo: bool = setting(
        False, "create the repo as private; fail if it exists and is public", may_change=True, belongs_to="run"
    )
    report_to: Literal["tensorboard", "wandb", "none"] = setting("tensorboard", "where to log curves", may_change=True)

    def __post_init__(self):
        check_ranges(self)
        parse_duration("--max_train_time", self.max_train_time)
        if (self.hub_model_id or self.hub_private_repo) and not self.push_to_hub:
            given = "hub_model_id" if self.hub_model_id else "hub_private_repo"
            raise UserError(f"--{given} does nothing without --push_to_hub")

    def log_interval(self, steps: int) -> int:
        """Return the steps between log entries of a run of so many steps."""
        return self.log_every or max(1, min(LOG_EVERY, steps // MIN_LOGGED))

    def sample_interval(self, steps: int) -> int:
        """Return the steps between sample sheets of a run of so many steps; 0: only at the end."""
        if self.sample_every is not None:
            return self.sample_every
        return max(MIN_SAMPLE_EVERY, min(SAMPLE_EVERY, steps // MIN_SHEETS))

    @property
    def hub_repo_id(self) -> str:
        """Where `--push_to_hub` publishes: "owner/name", or "name" for a repo of the user's own."""
        return self.hub_model_id or Path(self.output_dir).resolve().name


def planned_steps(
    settings: RunSettings, images_per_step: int, images_per_epoch: int | None, checkpoint: Path | None
) -> int:
    """Return the number of updates, from `--max_train_steps` or `--num_epochs`.

    Args:
        settings: the run's settings.
        images_per_step: images per update, over all processes.
        images_per_epoch: images in the dataset; None for a stream, whose length is unknown.
        checkpoint: where a resumed run continues; its images so far may have come in batches of another size.

    Raises:
        UserError: if `--num_epochs` is given and the dataset is a stream, or the checkpoint is damaged.
    """
    limits = [] if settings.max_train_steps is None else [settings.max_train_steps]
    if settings.num_epochs is not None and images_per_epoch is not None:
        limits.append(steps_for_images(settings.num_epochs * images_per_epoch, images_per_step, checkpoint))
    elif settings.num_epochs is not None:
        raise UserError(
            f"--num_epochs {settings.num_epochs:g}: a stream has no length; give --max_train_steps instead"
        )
    return min(limits, default=DEFAULT_TRAIN_STEPS)


def steps_for_images(images: float, images_per_step: int, checkpoint: Path | None) -> int:
    """Return the last step of a run of so many training images, those up to a checkpoint included.

    It is before that of the checkpoint if that has had more.
    """
    progress = {"step": 0}
    if checkpoint is not None:
        from hfgen.training.checkpoints import load_progress  # imports torch, which takes seconds

        progress = load_progress(checkpoint)
    done = progress.get("images", progress["step"] * images_per_step)
    return max(0, progress["step"] + math.ceil((images - done) / images_per_step))


def rates_follow_length(settings: dict[str, Any]) -> bool:
    """Whether the schedule of the learning rates depends on the run's length, given all settings by name.

    That of a VAE with a later learned term ends where this term starts.
    """
    return settings.get("lr_scheduler") in PLANNED_SCHEDULES and not settings.get("learned_term_start")
