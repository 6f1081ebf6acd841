"""`hfgen train`: from a folder of images to a model in one line, or a training script with all of its settings."""

import argparse
import dataclasses
import re
import shlex
import time
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from hfgen.commands.processes import Processes
from hfgen.commands.train_settings import (
    METHODS,
    RECOMMENDED,
    method_of_preset,
    names_data,
    parse_flags,
    refuse_a_method,
    refuse_a_run,
    refuse_before_reading,
    settings_of_start,
    settings_to_resume,
    value_of,
)
from hfgen.config import settings_to_dict
from hfgen.errors import UserError
from hfgen.ranges import COUNT
from hfgen.settings.vae import default_learned_term_start
from hfgen.texts import counted, say, say_lines
from hfgen.training.duration import WITHOUT_END, parse_duration
from hfgen.training.settings import RunSettings, rates_follow_length, steps_for_images


# Training images by default: after these the recommended preset has come most of its way.
IMAGES_ON_CPU, IMAGES_ON_GPU = 100_000, 300_000
# Evaluations of a run on a GPU, where they take seconds.
EVALUATIONS = 6
EVALUATED = RunSettings.evaluate_num_images  # if nobody has chosen another number
# Settings that end a training.
LENGTHS = ("max_train_time", "max_train_steps", "num_epochs")
USAGE = """\
usage: hfgen train DATA [--time 2h | --images 100000] [--preset NAME] [--output_dir DIR] [--SETTING VALUE ...]
       hfgen train gan|vae|ddpm --dataset DATA [--preset NAME] [--output_dir DIR] [--SETTING VALUE ...]

DATA is an image folder, zip, tar, npz, parquet or TFRecord, a Hub dataset, or toy_paintings. The first form chooses a
preset, a budget and a folder, runs/NAME_OF_DATA, and prints them; with --resume latest it continues the run in that
folder with the settings of that run. Both take every setting of the training scripts: hfgen train gan --help.
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
    started, arguments = time.time(), list(context.args)
    is_help = arguments[:1] in (["--help"], ["-h"])
    if is_help or not arguments or (len(arguments) == 1 and arguments[0] in METHODS):
        say_lines(USAGE.rstrip(), err=not is_help)
        raise typer.Exit(0 if is_help else 2)
    own, flags = own_options().parse_known_args(arguments)
    for name in ("images", "num_processes", "num_machines"):
        COUNT.check(f"--{name}", getattr(own, name))
    first, *flags = flags or [""]
    if first.startswith("-") or not first:
        raise UserError(
            f"hfgen train {first}: the first argument must be the data, or gan, vae or ddpm; see hfgen train --help"
        )
    choice = Choice(first, flags) if first in METHODS else Choice.for_data(first, flags)
    if any(flag in ("--help", "-h") for flag in flags):  # the settings follow
        say_lines(USAGE)
    settings = settings_to_dict(*choice.parse(choice.flags))
    if choice.data is None and not names_data(choice.method, flags):
        raise UserError(
            f"hfgen train {first}: which images? give --dataset DATA (--dataset toy_paintings: procedural landscapes)"
        )
    refuse_a_run(settings["dataset"])
    processes = Processes.choose(own, settings["cpu"])
    budget = _budget(own, choice.flags, settings, processes.count)
    if choice.data is None:
        plan = Plan(choice.method, [*choice.flags, *budget], [])
    else:
        plan = _plan(choice, own, budget, settings, processes)
    for reason in plan.reasons:
        say(reason)
    processes.start(plan.method, plan.flags, started)


def own_options() -> argparse.ArgumentParser:
    """Return the parser of the options that are not the scripts': the budget, and those for `accelerate launch`."""
    usage = "hfgen train DATA [--time 2h | --images 100000] [--SETTING VALUE ...]   (--help explains them)"
    parser = argparse.ArgumentParser("hfgen train", usage, add_help=False, allow_abbrev=False)
    parser.add_argument("--time")
    parser.add_argument("--images", type=int)
    for name in ("num_processes", "num_machines", "machine_rank", "main_process_port"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int)
    for name in ("main_process_ip", "gpu_ids", "config_file"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return parser


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the command line asks for.

    Attributes:
        method: "gan", "vae" or "ddpm".
        flags: those of the script, without what is chosen later.
        data: from which the rest is chosen; None if the method was named, and nothing is.
        resumed: the folder of the run that is resumed with its own settings, if any.
        origin: `--init_from` if the flags begin with the settings of those weights, in the place of a preset.
    """

    method: str
    flags: list[str]
    data: str | None = None
    resumed: Path | None = None
    origin: str | None = None

    @staticmethod
    def for_data(data: str, flags: list[str]) -> "Choice":
        """Return the choice for `hfgen train DATA`, with the preset given, that of a run to resume, or the default."""
        refuse_a_method(data)
        if value_of("--dataset", flags) is not None:
            raise UserError(f"hfgen train {data}: this and --dataset both name the data; give only one of them")
        flags, resumed = ["--dataset", data, *flags], None
        if value_of("--output_dir", flags) is None:
            flags = ["--output_dir", str(Path("runs") / _run_name(data)), *flags]
        if (file := settings_to_resume(flags, str(value_of("--output_dir", flags)))) is not None:
            flags, resumed = ["--preset", str(file), *flags], file.parent
        elif value_of("--preset", flags) is None:
            origin = value_of("--init_from", flags)
            size = value_of("--sample_size", flags)
            if origin is not None and (found := settings_of_start(origin, size)) is not None:
                return Choice(found[0], [*found[1], *flags], data, None, origin)
            flags = ["--preset", RECOMMENDED, *flags]
        # Without its value, --preset is refused when the flags are read.
        return Choice(method_of_preset(value_of("--preset", flags) or RECOMMENDED), flags, data, resumed)

    def parse(self, flags: list[str]) -> tuple[Any, ...]:
        """Return the settings of the run, the data and the method for these flags; --help prints them and exits."""
        program = f"hfgen train {self.method if self.data is None else 'DATA'}"
        return parse_flags(self.method, flags, program, [*vars(own_options().parse_args([]))])


# ---------------------------------------- the choice of a budget


def _budget(own: argparse.Namespace, flags: list[str], settings: dict[str, Any], processes: int) -> list[str]:
    """Return the flags for --time, which is also called --max_train_time, and --images."""
    budget = []
    parse_duration("--time", own.time)
    if own.time is not None:
        if value_of("--max_train_time", flags) is not None:
            raise UserError("--time is the same as --max_train_time: use only one of them")
        budget += ["--max_train_time", own.time]
    # That of a run which is resumed has an end already.
    from_preset = settings["max_train_time"] if value_of("--resume", flags) is None else None
    if (limit := own.time or value_of("--max_train_time", flags) or from_preset) is not None:
        if own.images is None and settings["max_train_steps"] is None and settings["num_epochs"] is None:
            if rates_follow_length(settings):
                option = "--max_train_time" if own.time is None else "--time"
                raise UserError(
                    f"{option} {limit}: --lr_scheduler {settings['lr_scheduler']} needs to know the last step; give "
                    "--images or --max_train_steps, too"
                )
            budget += ["--max_train_steps", str(WITHOUT_END)]
    if own.images is not None:
        if value_of("--max_train_steps", flags) is not None:
            raise UserError("--images sets --max_train_steps: use only one of them")
        origin = _resumed_from(flags, settings)
        steps = steps_for_images(own.images, _images_per_step(settings, processes), origin)
        _require_more(own.images, steps, origin)
        budget += ["--max_train_steps", str(steps)]
    return budget


def _require_more(images: int, steps: int, origin: Path | None) -> None:
    """Raise a `UserError` if a run that is resumed has already seen more images than --images gives it."""
    if origin is None:
        return
    from hfgen.training.checkpoints import load_progress  # imports torch, which takes seconds

    progress = load_progress(origin)
    if steps < progress["step"]:
        had = f"{progress['images']:,}" if "images" in progress else "more"
        raise UserError(
            f"--images {images}: this is the total of the run, which has already seen {had}; give a larger number"
        )


def _resumed_from(flags: list[str], settings: dict[str, Any]) -> Path | None:
    """Return the checkpoint that a run continues from, whose batches may have had another size; None if it is new."""
    if (resume := value_of("--resume", flags)) is None:
        return None
    from hfgen.training.folder import find_start  # imports torch, which takes seconds

    return find_start(Path(settings["output_dir"]), resume)


def _images_per_step(settings: dict[str, Any], processes: int) -> int:
    return settings["batch_size"] * settings.get("n_critic", 1) * processes


def _plan(
    choice: Choice, own: argparse.Namespace, budget: list[str], settings: dict[str, Any], processes: Processes
) -> Plan:
    """Look at the machine and the data, and choose what the user has left open."""
    chosen, scores, reasons = [], [], []
    if not budget and all(settings[name] is None for name in LENGTHS):
        images = IMAGES_ON_GPU if processes.on_gpu else IMAGES_ON_CPU
        origin = _resumed_from(choice.flags, settings)
        steps = steps_for_images(images, _images_per_step(settings, processes.count), origin)
        chosen += ["--max_train_steps", str(steps)]
        reasons.append(f"budget: {images:,} images, the default on {processes.machine} (--images, or --time 2h)")
        if processes.on_gpu and value_of("--evaluate_every", choice.flags) is None and not settings["evaluate_every"]:
            every = max(1, steps // EVALUATIONS)
            if (lack := _lack_of_scores(settings)) is None:
                scores += ["--evaluate_every", str(every)]
                reasons.append(f"scores: FID every {every:,} steps (--evaluate_every)")
            else:
                reasons.append(f"scores: none during training; {lack}")
    flags = [*choice.flags, *chosen, *budget]
    parsed = choice.parse(flags)
    if not chosen:
        given = {name for name in LENGTHS if value_of(f"--{name}", flags) is not None}
        others = "of the run" if choice.resumed else "of the preset"
        length = _length(own.images, settings_to_dict(*parsed), processes.count, given, others)
        reasons.append(f"budget: {length}, on {processes.machine}")
    reasons.append(_about_preset(choice, settings))
    if (start := _earlier_learned_term(choice, settings_to_dict(*parsed))) is not None:
        flags += ["--learned_term_start", str(start)]
        reasons.append(f"learned term: from update {start + 1:,} on, to fit this budget (--learned_term_start)")
        parsed = choice.parse(flags)
    elif choice.resumed is None and parsed[0].max_train_time is not None and (start := _learned_term_start(parsed)):
        option = "--max_train_time" if own.time is None else "--time"
        reasons.append(
            f"learned term: from update {start + 1:,} on; if the time ends before, this is a plain VAE: give "
            f"--images instead of {option}, or an earlier --learned_term_start"
        )
    refuse_before_reading(choice.method, parsed, processes.rank == 0)
    about, count = _about_data(parsed)
    reasons.insert(0, about)
    reasons += _about_start(choice, settings, count)
    if scores and count < _fewest_to_score():
        scores = []
        reasons.append(f"scores: none during training after all; {count} images are too few to compare with")
    elif scores and settings_to_dict(*parsed)["evaluate_num_images"] == EVALUATED > count:
        scores += ["--evaluate_num_images", str(count)]  # as many as `hfgen evaluate` generates
        reasons.append(f"scored: {count} images each time, as many as there are real ones (--evaluate_num_images)")
    flags += scores
    reasons.append(f"command: hfgen train {choice.method} {shlex.join(flags)}")
    return Plan(choice.method, flags, reasons)


def _about_start(choice: Choice, settings: dict[str, Any], count: int) -> list[str]:
    """Advise to start from trained weights if a GAN is to learn from few images; their number is 0 if unknown."""
    from hfgen.methods.augmentation import FEW_IMAGES  # imports torch

    is_new = choice.resumed is None and settings["init_from"] is None
    if choice.method != "gan" or not is_new or not 0 < count < FEW_IMAGES:
        return []
    better = "with so few images a trained model is the better start (--init_from; 10,000 images seen are enough)"
    return [f"start: untrained weights; {better}"]


def _fewest_to_score() -> int:
    from hfgen.evaluation.reference import MIN_IMAGES  # imports torch

    return MIN_IMAGES


def _learned_term_start(settings: Sequence[Any]) -> int:
    return settings_to_dict(*settings).get("learned_term_start", 0)


def _earlier_learned_term(choice: Choice, settings: dict[str, Any]) -> int | None:
    """Return `--learned_term_start` for a training that would end before that of its preset; None for others."""
    steps, start = settings["max_train_steps"], settings.get("learned_term_start", 0)
    if choice.resumed is not None or steps is None or value_of("--learned_term_start", choice.flags) is not None:
        return None
    return default_learned_term_start(steps) if start >= steps > 0 else None


def _length(images: int | None, settings: dict[str, Any], processes: int, given: Collection[str], others: str) -> str:
    """Say how long a training is: in images, passes over the data and time, and who says so.

    Args:
        images: the value of --images.
        settings: of the run.
        processes: their number.
        given: those of the settings of length that the user gave.
        others: whose the rest is: "of the preset", or "of the run" that is resumed.
    """
    limits, steps, epochs = {}, settings["max_train_steps"], settings["num_epochs"]
    if images is not None:
        limits["max_train_steps"] = counted(images, "image")
    elif steps is not None and steps < WITHOUT_END:
        limits["max_train_steps"] = (
            f"{counted(steps * _images_per_step(settings, processes), 'image')} ({counted(steps, 'step')})"
        )
    if epochs is not None:
        limits["num_epochs"] = "1 epoch" if epochs == 1 else f"{epochs:g} epochs"
    if settings["max_train_time"] is not None:
        limits["max_train_time"] = settings["max_train_time"]
    if not limits:
        return "no limit"
    by_owner = {
        owner: " or ".join(limit for name, limit in limits.items() if (name in given) == (owner == "as given"))
        for owner in (others, "as given")
    }
    which = " (whichever comes first)" if len(limits) > 1 else ""
    return " or ".join(f"{text} {owner}" for owner, text in by_owner.items() if text) + which


def _about_data(settings: Sequence[Any]) -> tuple[str, int]:
    """Read the images, and return what they are and how many; 0 for a stream, which is not counted."""
    from hfgen.data.store import load_images

    _, data_settings, _ = settings
    found, count = "streamed from the Hub", 0
    if not data_settings.streaming:
        report = load_images(data_settings).report
        low, _, high = report.short_side
        sides = f"{low}" if low == high else f"{low} to {high}"
        count = report.training_images
        found = f"{counted(count, 'image')}, short side {sides} pixels, {', '.join(report.modes)}"
    size = data_settings.sample_size
    return f"data: {found}; training at {size} x {size} (--sample_size)", count


def _lack_of_scores(settings: dict[str, Any]) -> str | None:
    """Return what scoring during training lacks, and how to get it; None if it lacks nothing."""
    weights = settings["feature_weights"]
    if settings["streaming"]:
        return "streamed images cannot be scored against (leave out --streaming)"
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


def _about_preset(choice: Choice, settings: dict[str, Any]) -> str:
    """Say which preset it is, and what it reached elsewhere with these settings."""
    if choice.resumed is not None:
        return f"settings: those of the run in {choice.resumed}, which is resumed"
    if choice.origin is not None:
        size = value_of("--sample_size", choice.flags)  # as given, or that of the weights
        scaled = [f"--{name} {settings[name]:g}" for name in ("attention_size", "noise_scale") if name in settings]
        is_scaled = settings.get("unet") == "compact" and size is not None
        of_size = f", for {size} pixels ({', '.join(scaled)})" if is_scaled else ""
        return f"settings: {choice.method}, as in {choice.origin}{of_size}; training starts from its weights"
    from hfgen.training.reference_curves import reference_of  # imports numpy

    preset = value_of("--preset", choice.flags)
    curve = reference_of(settings, settings["evaluate_num_images"])
    if curve is None:
        return f"preset: {preset}; there is no reference run with these settings (see hfgen presets)"
    images, _, fid = min(curve.points, key=lambda point: point[2])
    why = "the best images for the training time; " if preset == RECOMMENDED else ""
    return f"preset: {curve.preset}; {why}it reached FID {fid:.1f} after {images:,} images, for {curve.data}"


def _run_name(data: str) -> str:
    """Name the folder of a run after its data."""
    name = data.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].split(":")[0]
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"
