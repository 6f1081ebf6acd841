"""The accelerator of a run: device, precision, processes and trackers, as the settings and the launcher say."""

import importlib.util
import os
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration

from hfgen.errors import UserError
from hfgen.hardware import choose_mixed_precision, has_accelerator, keep_freed_memory, use_all_cores
from hfgen.training.settings import RunSettings


def open_accelerator(settings: RunSettings) -> Accelerator:
    """Join the other processes of this launch, on the device that the settings choose.

    Raises:
        UserError: if the tracker is not installed, or the precision is not available.
    """
    if settings.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--report_to wandb: wandb is not installed; pip install wandb, or use --report_to tensorboard")
    folder = Path(settings.output_dir)
    accelerator = Accelerator(
        mixed_precision=choose_mixed_precision(settings.mixed_precision, settings.cpu),
        cpu=settings.cpu or not has_accelerator(),  # otherwise CPU processes would not find each other
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "logs")),
        # Broadcasting BatchNorm statistics in a forward pass would break an earlier pass of the same update.
        # The other processes wait while the main one generates and scores images: longer than the default.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
        ],
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    return accelerator
