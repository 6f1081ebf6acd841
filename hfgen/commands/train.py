"""`hfgen train`: from a folder of images to a model in one line, or a training script with all of its settings."""

import argparse
import dataclasses
import importlib
import logging
import math
import os
import re
import shlex
import subprocess
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from hfgen.errors import UserError
from hfgen.ranges import COUNT
from hfgen.training.duration import WITHOUT_END, parse_duration


METHODS = ("gan", "vae", "ddpm")
# The preset with the best pictures for the time, see `hfgen presets`.
RECOMMENDED = "dcgan_nearest"
# Training images by default: after these the recommended preset has come most of its way.
IMAGES_ON_CPU, IMAGES_ON_GPU = 100_000, 300_000
# Evaluations of a run on a GPU, where they take seconds.
EVALUATIONS = 6
# Settings that end a training.
LENGTHS = ("max_train_time", "max_train_steps", "num_epochs")
# In accelerate's configuration: what the training scripts do not do.
UNSUPPORTED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP")
USAGE = """\
usage: hfgen train DATA [--time 2h | --images 100000] [--preset NAME] [--output_dir DIR] [--SETTING VALUE ...]
       hfgen train gan|vae|ddpm --dataset DATA [--preset NAME] [--output_dir DIR] [--SETTING VALUE ...]

DATA is an image folder, zip, tar, npz, parquet or TFRecord, a Hub dataset, or toy_paintings. The first form chooses a
preset and a budget, and prints them; both take every setting of the training scripts: hfgen train gan --help.
hfgen presets lists the presets and their scores.

--time T           train for this long in this launch, such as 45m or 2h
--images N         train on this many images in total; an image counts each time it is used
--num_processes N  processes, one per GPU; default: every GPU, or as `accelerate config` says. Other options of
                   `accelerate launch` for several GPUs and machines: --num_machines, --machine_rank,
                   --main_process_ip, --main_process_port, --gpu_ids, --config_file
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training to start: the method, the flags of its script, and why they were chosen, in lines for the user."""

    method: str
    flags: list[str]
    reasons: list[str]


def train(context: typer.Context) -> None:
    """Train a generator on your images: `hfgen train photos/`, or `hfgen train gan|vae|ddpm` with all settings."""
    arguments = list(context.args)
    is_help = arguments[:1] in (["--help"], ["-h"])
    if is_help or not arguments or (len(arguments) == 1 and arguments[0] in METHODS):
        typer.echo(USAGE, nl=False, err=not is_help)
        raise typer.Exit(0 if is_help else 2)
    own, flags = own_options().parse_known_args(arguments)
    for name in ("images", "num_processes", "num_machines"):
        COUNT.check(f"--{name}", getattr(own, name))
    first, *flags = flags or [""]
    if first.startswith("-") or not first:
        raise UserError(
            f"hfgen train {first}: the first argument must be the data, or gan, vae or ddpm; see hfgen train --help"
        )
    if first not in METHODS:
        method = _method_of_preset(flags)
        flags = ["--dataset", first, *flags]
        settings = _parse(method, [f"--preset={RECOMMENDED}", *flags], "hfgen train DATA")
    else:
        method, settings = first, _parse(first, flags, f"hfgen train {first}")
    processes = Processes.choose(own, settings["cpu"])
    budget = _budget(own, settings, processes.count)
    if first in METHODS:
        plan = Plan(method, [*flags, *budget], [])
    else:
        plan = _choose(first, method, flags, budget, settings, processes)
    for reason in plan.reasons:
        typer.echo(reason)
    processes.start(plan.method, plan.flags)


def own_options() -> argparse.ArgumentParser:
    """Return the parser of the options that are not the scripts': the budget, and those for `accelerate launch`."""
    parser = argparse.ArgumentParser("hfgen train", add_help=False, allow_abbrev=False)
    parser.add_argument("--time")
    parser.add_argument("--images", type=int)
    for name in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int)
    for name in ("main_process_ip", "gpu_ids", "config_file"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return parser


# ---------------------------------------- settings, before anything slow is imported


def _parse(method: str, flags: list[str], program: str) -> dict[str, Any]:
    """Return all settings of a training script for these flags, checked, by name; --help prints them and exits."""
    from hfgen.config import parse_settings, settings_to_dict
    from hfgen.data.settings import DataSettings
    from hfgen.training.settings import RunSettings

    settings_class = {"gan": "GANSettings", "vae": "VAESettings", "ddpm": "DDPMSettings"}[method]
    of_method = getattr(importlib.import_module(f"hfgen.settings.{method}"), settings_class)
    return settings_to_dict(
        *parse_settings((RunSettings, DataSettings, of_method), _presets() / method, flags, program)
    )


def _presets() -> Path:
    return Path(str(files("hfgen.training_scripts"))) / "presets"


def _method_of_preset(flags: list[str]) -> str:
    """Return the method whose script has the preset that the flags name, or the default one."""
    preset = _preset_name(flags)
    for method in METHODS:
        if (_presets() / method / f"{preset}.json").is_file():
            return method
    known = ", ".join(sorted(path.stem for path in _presets().glob("*/*.json")))
    raise UserError(
        f"--preset {preset}: one of {known}; for a settings file, name the method: hfgen train gan|vae|ddpm "
        f"--preset {preset} --dataset DATA"
    )


def _preset_name(flags: list[str]) -> str:
    """Return the preset that the flags name, or the default one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=RECOMMENDED)
    return str(parser.parse_known_args(flags)[0].preset)


# ---------------------------------------- the choice of a budget


def _budget(own: argparse.Namespace, settings: dict[str, Any], processes: int) -> list[str]:
    """Return the flags for --time and --images."""
    flags = []
    parse_duration("--time", own.time)
    if own.time is not None:
        if settings["max_train_time"] is not None:
            raise UserError("--time is the same as --max_train_time: use only one of them")
        flags += ["--max_train_time", own.time]
        if own.images is None and settings["max_train_steps"] is None and settings["num_epochs"] is None:
            flags += ["--max_train_steps", str(WITHOUT_END)]
    if own.images is not None:
        flags += ["--max_train_steps", str(_steps_for(own.images, settings, processes))]
    return flags


def _steps_for(images: int, settings: dict[str, Any], processes: int) -> int:
    return math.ceil(images / (settings["batch_size"] * settings.get("n_critic", 1) * processes))


def _choose(
    data: str,
    method: str,
    flags: list[str],
    budget: list[str],
    settings: dict[str, Any],
    processes: "Processes",
) -> Plan:
    """Look at the data and the machine, and choose what the user has left open."""
    from hfgen.data.settings import DataSettings
    from hfgen.data.store import load_images

    found = "streamed from the Hub"
    if not settings["streaming"]:
        known = {field.name for field in dataclasses.fields(DataSettings)}
        report = load_images(DataSettings(**{key: value for key, value in settings.items() if key in known})).report
        low, _, high = report.short_side
        sides = f"{low}" if low == high else f"{low} to {high}"
        found = f"{report.training_images:,} images, short side {sides} pixels, {', '.join(report.modes)}"
    size = settings["sample_size"]
    reasons = [f"data: {found}; training at {size} x {size} (--sample_size)"]
    chosen = [] if _is_given("--preset", flags) else ["--preset", RECOMMENDED]
    if not _is_given("--output_dir", flags):
        chosen += ["--output_dir", str(Path("runs") / _run_name(data))]
    if not budget and all(settings[name] is None for name in LENGTHS):
        images = IMAGES_ON_GPU if processes.on_gpu else IMAGES_ON_CPU
        steps = _steps_for(images, settings, processes.count)
        chosen += ["--max_train_steps", str(steps)]
        reasons.append(f"budget: {images:,} images, the default on {processes.machine} (--images, or --time 2h)")
        if processes.on_gpu and not settings["evaluate_every"]:
            every = max(1, steps // EVALUATIONS)
            if (lack := _lack_of_scores(settings["feature_weights"])) is None:
                chosen += ["--evaluate_every", str(every)]
                reasons.append(f"scores: FID every {every:,} steps (--evaluate_every)")
            else:
                reasons.append(f"scores: none during training; {lack}")
    else:
        by_whom = "as given" if budget or any(_is_given(f"--{name}", flags) for name in LENGTHS) else "of the preset"
        reasons.append(f"budget: {by_whom}, on {processes.machine}")
    reasons.append(_about_preset(settings, _preset_name(flags), "--preset" in chosen))
    plan = Plan(method, [*chosen, *flags, *budget], reasons)
    reasons.append(f"command: hfgen train {method} {shlex.join(plan.flags)}")
    return plan


def _lack_of_scores(weights: str | None) -> str | None:
    """Return what scoring during training lacks, and how to get it; None if it lacks nothing."""
    if find_spec("cleanfid") is None:
        return 'pip install "hfgen[eval]"'
    from hfgen.metrics.inception import find_weights

    try:
        find_weights(weights)
    except UserError as error:
        if weights is not None:  # asked for by name
            raise
        return str(error)
    return None


def _about_preset(settings: dict[str, Any], preset: str, is_default: bool) -> str:
    """Say which preset it is, and what it reached elsewhere with these settings."""
    from hfgen.training.reference_curves import reference_of  # imports numpy

    curve = reference_of(settings, settings["evaluate_num_images"])
    if curve is None:
        return f"preset: {preset}; there is no reference run with these settings (see hfgen presets)"
    images, _, fid = min(curve.points, key=lambda point: point[2])
    why = "the best images for the training time; " if is_default else ""
    return f"preset: {curve.preset}; {why}it reached FID {fid:.1f} after {images:,} images, for {curve.data}"


def _is_given(option: str, flags: list[str]) -> bool:
    names = (option, option.replace("_", "-"))
    return any(flag.split("=")[0] in names for flag in flags)


def _run_name(data: str) -> str:
    """Name the folder of a run after its data."""
    name = data.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].split(":")[0]
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"


# ---------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a training, as `accelerate launch` would start them.

    Attributes:
        count: on all machines together.
        machines: number of machines.
        on_gpu: whether they have one.
        options: options of `accelerate launch` that were given.
        precision: mixed precision of accelerate's configuration; None if it has none.
    """

    count: int
    machines: int
    on_gpu: bool
    options: dict[str, Any]
    precision: str | None

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
        from accelerate.commands.config.config_args import default_config_file, load_config_from_file

        config: Any = None
        if own.config_file is not None or Path(default_config_file).is_file():
            config = load_config_from_file(own.config_file)
            if (kind := str(getattr(config.distributed_type, "value", config.distributed_type))) in UNSUPPORTED:
                raise UserError(
                    f"accelerate's configuration asks for {kind}: not supported, each process holds the whole "
                    "network; run `accelerate config` again and choose multi-GPU or no distributed training"
                )
        if (gpu_ids := own.gpu_ids or getattr(config, "gpu_ids", None)) not in (None, "all"):
            os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu_ids)  # before CUDA is used
        if getattr(config, "use_cpu", False):
            os.environ["ACCELERATE_USE_CPU"] = "true"  # heeded by the training script
            on_cpu = True
        import torch

        gpus = 0 if on_cpu else torch.cuda.device_count()
        count = own.num_processes or (config.num_processes if config is not None else max(1, gpus))
        machines = own.num_machines or (getattr(config, "num_machines", 1) if config is not None else 1)
        options = {name: value for name, value in vars(own).items() if name not in ("time", "images", "gpu_ids")}
        precision = None if config is None else config.mixed_precision
        has_gpu = gpus > 0 or (not on_cpu and torch.backends.mps.is_available())
        return Processes(count, machines, has_gpu, options | {"num_processes": count}, precision)

    def start(self, method: str, flags: list[str]) -> None:
        """Train: in this process if it is the only one.

        Raises:
            SystemExit: with the status of a process that failed.
        """
        module = f"hfgen.training_scripts.train_{method}"
        if self.count == 1 and self.machines == 1:
            if self.precision is not None:
                os.environ["ACCELERATE_MIXED_PRECISION"] = self.precision
            importlib.import_module(module).main(flags)
            return
        from accelerate.commands.launch import launch_command, launch_command_parser

        from hfgen.training.launcher import HEED_LAUNCHER

        if self.precision is None:
            os.environ[HEED_LAUNCHER] = "no"
        given = [f"--{name}={value}" for name, value in self.options.items() if value is not None]
        launch = launch_command_parser().parse_args(["--multi_gpu", *given, "-m", module, *flags])
        _launch_quietly(launch_command, launch)


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
