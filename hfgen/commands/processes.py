"""The processes of a training that `hfgen train` starts: this one, or those of `accelerate launch`."""

import argparse
import dataclasses
import importlib
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

from hfgen.commands.options import loading
from hfgen.errors import UserError
from hfgen.training.duration import STARTED_AT


# In accelerate's configuration: what the training scripts do not do.
UNSUPPORTED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a training, as `accelerate launch` would start them.

    Attributes:
        count: on all machines together.
        machines: number of machines.
        on_gpu: whether they have one.
        options: options of `accelerate launch` that were given.
        precision: mixed precision of accelerate's configuration; None if it has none.
        rank: number of this machine, from 0; the first one opens the run's folder.
    """

    count: int
    machines: int
    on_gpu: bool
    options: dict[str, Any]
    precision: str | None
    rank: int = 0

    @property
    def machine(self) -> str:
        """What they compute on, in words."""
        return f"{self.count} GPUs" if self.on_gpu and self.count > 1 else "a GPU" if self.on_gpu else "a CPU"

    @staticmethod
    def choose(own: argparse.Namespace, on_cpu: bool) -> "Processes":
        """Count them: as asked, else as accelerate's configuration says, else one for each GPU.

        Raises:
            UserError: if the configuration asks for something that the training scripts do not do.
        """
        with loading():
            import torch
            from accelerate.commands.config.config_args import default_config_file, load_config_from_file

        config: Any = None
        if own.config_file is not None or Path(default_config_file).is_file():
            try:
                config = load_config_from_file(own.config_file)
            except Exception as error:  # whatever a YAML file of another kind makes of accelerate's classes
                file = f"--config_file {own.config_file}" if own.config_file is not None else str(default_config_file)
                what = " ".join(f"{type(error).__name__}: {error}".split())  # the error of a parser has several lines
                raise UserError(
                    f"{file}: not a configuration of accelerate ({what}); run `accelerate config` to write a new one"
                ) from error
            if (kind := str(getattr(config.distributed_type, "value", config.distributed_type))) in UNSUPPORTED:
                raise UserError(
                    f"accelerate's configuration asks for {kind}: not supported, each process holds the whole "
                    "network; run `accelerate config` again and choose multi-GPU or no distributed training"
                )
        if (gpu_ids := own.gpu_ids or getattr(config, "gpu_ids", None)) not in (None, "all"):
            os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu_ids)  # before CUDA is used
        # The launcher would put the configuration's in their place.
        visible = {"gpu_ids": "all"} if gpu_ids is not None else {}
        if getattr(config, "use_cpu", False):
            os.environ["ACCELERATE_USE_CPU"] = "true"  # heeded by the training script
            on_cpu = True

        gpus = 0 if on_cpu else torch.cuda.device_count()
        if own.gpu_ids is not None and not (gpus or on_cpu):
            raise UserError(f"--gpu_ids {own.gpu_ids}: no such GPU is visible; leave it out")
        machines = own.num_machines or (getattr(config, "num_machines", 1) if config is not None else 1)
        configured = config.num_processes if config is not None and own.gpu_ids is None else max(1, gpus) * machines
        count = own.num_processes or configured
        options = {name: value for name, value in vars(own).items() if name not in ("time", "images", "gpu_ids")}
        precision = None if config is None else config.mixed_precision
        has_gpu = gpus > 0 or (not on_cpu and torch.backends.mps.is_available())
        rank = own.machine_rank if own.machine_rank is not None else getattr(config, "machine_rank", 0)
        if machines > 1:
            _check_machines(own, config, count, machines)
        return Processes(count, machines, has_gpu, options | visible | {"num_processes": count}, precision, rank)

    def start(self, method: str, flags: list[str], started: float) -> None:
        """Train: in this process if it is the only one.

        Args:
            method: "gan", "vae" or "ddpm".
            flags: those of its script.
            started: when the command began, in seconds since the epoch; a time limit counts from there.

        Raises:
            SystemExit: with the status of a process that failed.
        """
        os.environ[STARTED_AT] = str(started)
        try:
            self._start(f"hfgen.training_scripts.train_{method}", flags)
        finally:
            os.environ.pop(STARTED_AT, None)

    def _start(self, module: str, flags: list[str]) -> None:
        if self.count == 1 and self.machines == 1:
            if self.precision is not None:
                os.environ["ACCELERATE_MIXED_PRECISION"] = self.precision
            with loading():
                script = importlib.import_module(module)
            script.main(flags)
            return
        from accelerate.commands.launch import launch_command, launch_command_parser

        from hfgen.training.launcher import HEED_LAUNCHER

        if self.precision is None:
            os.environ[HEED_LAUNCHER] = "no"
        given = [f"--{name}={value}" for name, value in self.options.items() if value is not None]
        launch = launch_command_parser().parse_args(["--multi_gpu", *given, "-m", module, *flags])
        _launch_quietly(launch_command, launch)


def _check_machines(own: argparse.Namespace, config: Any, count: int, machines: int) -> None:
    """Raise a `UserError` if machines could not find each other: the launcher would wait for a quarter of an hour."""
    if count < machines or count % machines:
        given = "--num_processes" if own.num_processes is not None else "accelerate's configuration, num_processes"
        raise UserError(
            f"{given} {count}: this is the total over {machines} machines, each with the same number of processes; "
            f"give a multiple of {machines}"
        )
    for name in ("machine_rank", "main_process_ip"):  # the port has a default
        if getattr(own, name) is None and getattr(config, name, None) is None:
            raise UserError(
                f"--num_machines {machines}: give --{name}, too, or run `accelerate config` on each machine"
            )


def _launch_quietly(launch_command: Any, launch: argparse.Namespace) -> None:
    """Run a launcher; the message of a process that fails is its own, and its status is this program's."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # lists what was left at its default
    try:
        launch_command(launch)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise SystemExit(failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode) from None
    except SignalException as error:
        raise SystemExit(128 + int(error.sigval)) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode if error.returncode >= 0 else 128 - error.returncode) from None
