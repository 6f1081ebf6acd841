"""The accelerator of a run: device, precision, processes and trackers, as the settings and the launcher say."""

import importlib.util
import os
import signal
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import ProjectConfiguration, str_to_bool

from hfgen.errors import UserError
from hfgen.hardware import choose_mixed_precision, has_accelerator, keep_freed_memory, use_all_cores, use_fast_kernels
from hfgen.texts import say
from hfgen.training.settings import RunSettings
from hfgen.training.stopping import MAX_WAIT


POLL_SECONDS = 0.5
# `accelerate launch` sets it; and the parent of a process whose own has ended.
LAUNCHED, ADOPTED_BY = "ACCELERATE_DYNAMO_BACKEND", 1
# Set to "no" where the launcher's precision is not a choice of the user's, as in a study.
HEED_LAUNCHER = "HFGEN_HEED_LAUNCHER_PRECISION"
# What a launcher can ask for by environment variable and these scripts do not do: the variable, and its option.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}


def open_accelerator(settings: RunSettings, allows_fp16: bool = False) -> Accelerator:
    """Join the other processes of this launch, on the device that the settings choose.

    Args:
        settings: the run's settings.
        allows_fp16: see `choose_precision`.

    Raises:
        UserError: if the tracker is not installed, the precision is not available, or the launcher asks for something
            that the training scripts do not do.
    """
    if settings.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--report_to wandb: wandb is not installed; pip install wandb, or use --report_to tensorboard")
    options = launcher_options()
    refuse_unsupported(os.environ, options)
    is_launched = options is not None or "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched:
        end_with_launcher()
    elif LAUNCHED in os.environ and os.getppid() == ADOPTED_BY:
        raise UserError("accelerate launch exited before training started; run the command again")
    on_cpu = settings.cpu or str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")) == 1
    precision, reason = choose_precision(settings.mixed_precision, on_cpu, os.environ, options, allows_fp16)
    folder = Path(settings.output_dir)
    # accelerate always passes it; torch deprecates it without having a replacement that does the same.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=on_cpu or not has_accelerator(),  # otherwise CPU processes would not find each other
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "logs")),
        # Broadcasting BatchNorm statistics in a forward pass would break an earlier pass of the same update.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=MAX_WAIT),
        ],
    )
    if options is not None and (options.num_processes or 1) > 1 == accelerator.num_processes:
        raise UserError(
            f"accelerate launch --num_processes {options.num_processes} has started only one process; add --multi_gpu "
            "(also without a GPU) and leave out --cpu, or give --num_processes 1"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        # Launchers set OMP_NUM_THREADS to 1; without one, and with any other number, it was the user.
        of_launchers = ("", "1") if is_launched or LAUNCHED in os.environ else ("",)
        threads_are_chosen = os.environ.get("OMP_NUM_THREADS", "") not in of_launchers
        if not threads_are_chosen and (options is None or options.num_cpu_threads_per_process is None):
            use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    if accelerator.device.type == "cuda":
        use_fast_kernels()
    if accelerator.is_main_process:
        say(f"device: {accelerator.device.type}; mixed precision: {accelerator.mixed_precision} ({reason})")
    return accelerator


def choose_precision(
    wanted: str,
    on_cpu: bool,
    environment: Mapping[str, str],
    options: Namespace | None,
    allows_fp16: bool = False,
) -> tuple[str, str]:
    """Return the mixed precision, and who chose it: the setting, else the launcher, else the hardware.

    Args:
        wanted: the setting: "no", "bf16", "fp16", or "auto" to leave the choice to the launcher or the hardware.
        on_cpu: whether the run uses the CPU even if there is an accelerator.
        environment: environment variables; `accelerate launch` sets `ACCELERATE_MIXED_PRECISION`.
        options: options of `accelerate launch`; None if the script was started in another way.
        allows_fp16: whether fp16 may be chosen where nobody has: the method bears scaled gradients.

    Raises:
        UserError: if the precision is not available.
    """
    if wanted != "auto":
        return choose_mixed_precision(wanted, on_cpu), "as set by --mixed_precision"
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "").lower()
    # The launcher says "no" also if nobody chose.
    chosen = launched and environment.get(HEED_LAUNCHER) != "no" and (launched != "no" or _chooses_precision(options))
    if not chosen:
        return choose_mixed_precision("auto", on_cpu, allows_fp16), "auto: what the hardware supports"
    if launched not in ("no", "bf16", "fp16"):
        raise UserError(f"accelerate launch --mixed_precision {launched}: not supported; give bf16, fp16 or no")
    try:
        return choose_mixed_precision(launched, on_cpu), "as set by accelerate launch or its configuration"
    except UserError as error:
        raise UserError(f"accelerate launch: {error}") from error


def refuse_unsupported(environment: Mapping[str, str], options: Namespace | None) -> None:
    """Raise a `UserError` for what the launcher asks for and the training scripts do not do.

    Args:
        environment: environment variables, as `accelerate launch` sets them.
        options: options of `accelerate launch`; None if the script was started in another way.
    """
    for variable, option in UNSUPPORTED.items():
        if str_to_bool(environment.get(variable, "false")):
            raise UserError(
                f"accelerate launch {option}: not supported, each process holds the whole network; leave it out (also "
                "in accelerate's configuration), or use --multi_gpu for several GPUs"
            )
    asked = getattr(options, "gradient_accumulation_steps", None)
    parts = str(asked or environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
    if parts != "1":
        raise UserError(
            f"accelerate launch --gradient_accumulation_steps {parts}: not used; leave it out (also in "
            "accelerate's configuration), and pass it to train_ddpm, which splits its batch"
        )


def launcher_options() -> Namespace | None:
    """Return the options of the `accelerate launch` that started this process; None if it was started otherwise."""
    try:
        commands = [process.cmdline() for process in psutil.Process().parents()]
    except psutil.Error:  # not ours to look at
        return None
    return next((options for command in commands if (options := parse_launch(command)) is not None), None)


def end_with_launcher() -> None:
    """Send this process SIGTERM, which ends a run with a checkpoint, as soon as its parent has ended.

    A launcher of one process does not pass signals on: SIGTERM would end it and leave the training running.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


def parse_launch(command: Sequence[str]) -> Namespace | None:
    """Return the options of an `accelerate launch` command; None if it is another command.

    Args:
        command: the words of the command, with the interpreter and its script.
    """
    for index, word in enumerate(command[:4]):
        name = Path(word).name.removesuffix(".exe")
        if word == "accelerate.commands.launch" or name == "accelerate-launch":
            return launch_command_parser().parse_known_args(command[index + 1 :])[0]
        if name == "accelerate" and command[index + 1 : index + 2] == ["launch"]:
            return launch_command_parser().parse_known_args(command[index + 2 :])[0]
    return None


def _chooses_precision(options: Namespace | None) -> bool:
    """Whether someone chose the precision in the environment: by an option, in the configuration, or directly."""
    if options is None or options.mixed_precision is not None:
        return True
    if options.config_file is None and (options.cpu or not Path(default_config_file).is_file()):
        return False
    return load_config_from_file(options.config_file or default_config_file).mixed_precision is not None
