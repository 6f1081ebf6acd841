"""The settings that `hfgen train` is called with: which method they mean, and what they alone rule out."""

import argparse
import dataclasses
import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfgen.commands.options import loading
from hfgen.config import default_values, parse_settings, read_preset, settings_as_flags, shipped_presets
from hfgen.errors import UserError
from hfgen.ranges import PIXELS
from hfgen.run_files import LAUNCHES_FILE, METRICS_FILE, SETTINGS_FILE
from hfgen.settings.vae import check_length


METHODS = ("gan", "vae", "ddpm")
# The preset with the best pictures for the time, see `hfgen presets`.
RECOMMENDED = "dcgan_nearest"


def parse_flags(method: str, flags: list[str], program: str, other_options: Sequence[str] = ()) -> tuple[Any, ...]:
    """Return the run's, the data's and the method's settings for these flags; --help prints them and exits.

    Raises:
        UserError: as `parse_settings` does.
    """
    return parse_settings(settings_classes(method), shipped_presets() / method, flags, program, other_options)


def settings_classes(method: str) -> tuple[type, type, type]:
    """Return the classes of the settings of a training script: the run's, the data's and the method's."""
    from hfgen.data.settings import DataSettings
    from hfgen.training.settings import RunSettings

    name = {"gan": "GANSettings", "vae": "VAESettings", "ddpm": "DDPMSettings"}[method]
    return RunSettings, DataSettings, getattr(importlib.import_module(f"hfgen.settings.{method}"), name)


def value_of(option: str, flags: list[str]) -> str | None:
    """Return the value of an option among flags; None if it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, option.replace("_", "-"), dest="value", nargs="?")
    return parser.parse_known_args(flags)[0].value


# ---------------------------------------- the method


def method_of_preset(preset: str) -> str:
    """Return the method that a preset is for: one of hfgen's by its name, or a JSON file of settings.

    Raises:
        UserError: if there is no such preset, or the settings of the file fit no method or several.
    """
    for method in METHODS:
        if (shipped_presets() / method / f"{preset}.json").is_file():
            return method
    if not Path(preset).is_file():
        known = ", ".join(sorted(path.stem for path in shipped_presets().glob("*/*.json")))
        raise UserError(f"--preset {preset}: one of {known}, or a JSON file of settings")
    unknown = _unknown_settings(read_preset(Path(preset)))
    fitting = [method for method in METHODS if not unknown[method]]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"--preset {preset}: its settings fit {', '.join(fitting)}; name the method: hfgen train "
            f"{fitting[0]} --dataset DATA --preset {preset}"
        )
    closest = min(METHODS, key=lambda method: len(unknown[method]))
    raise UserError(
        f"--preset {preset}: no method has all of its settings; unknown to the closest, {closest}: "
        f"{', '.join(unknown[closest])}"
    )


def names_data(method: str, flags: list[str]) -> bool:
    """Whether the flags, or their preset, say what to train on; a run to resume knows it."""
    preset = value_of("--preset", flags)
    if value_of("--dataset", flags) is not None or value_of("--resume", flags) is not None:
        return True
    if preset is None:
        return False
    file = shipped_presets() / method / f"{preset}.json"
    file = file if file.is_file() else Path(preset)
    return file.is_file() and "dataset" in read_preset(file)


def refuse_a_method(data: str) -> None:
    """Raise a `UserError` if what should name the data is that of a preset, or of a method in capitals."""
    word = data.lower()
    if Path(data).exists():
        return
    if word in METHODS:
        raise UserError(f"hfgen train {data}: write {word} for the method, or give your images: hfgen train photos/")
    if any((shipped_presets() / method / f"{word}.json").is_file() for method in METHODS):
        raise UserError(f"hfgen train {data}: a preset; give your images first: hfgen train photos/ --preset {word}")


def _unknown_settings(values: dict[str, Any]) -> dict[str, list[str]]:
    """Return by method those of the settings that it does not have."""
    known = {method: default_values(settings_classes(method)).keys() for method in METHODS}
    return {method: sorted(values.keys() - names) for method, names in known.items()}


# ---------------------------------------- runs


def settings_of_start(origin: str, sample_size: str | None = None) -> tuple[str, list[str]] | None:
    """Return the method of the weights that `--init_from` names, and the flags for a network that they fit.

    These are the settings of the method, the image size and mirroring, where they are not the defaults; but not the
    length of that training, nor what belongs to it or its data.

    Args:
        origin: a run, one of its checkpoints, a pipeline or a Hub repo.
        sample_size: of the new images, if given. A compact U-Net then has its attention at the same levels as theirs,
            and EDM's noise grows in proportion.

    Returns:
        None if the settings are not beside the weights, or of no method of hfgen.

    Raises:
        UserError: if they cannot be read, or the weights fit no other image size.
    """
    from hfgen.inference.opening import settings_beside  # imports torch, which takes seconds

    values = settings_beside(origin)
    unknown = _unknown_settings(values or {})
    fitting = [method for method in METHODS if values and not unknown[method]]
    if len(fitting) != 1:
        return None
    classes = settings_classes(fitting[0])
    of_network = {field.name for field in dataclasses.fields(classes[2])} - {"learned_term_start"}  # a length, too
    defaults = default_values(classes)
    chosen = {
        name: value
        for name, value in (values or {}).items()
        if name in of_network | {"sample_size", "horizontal_flip"} and value != defaults[name]
    }
    there = defaults | (values or {})
    is_other = sample_size is not None and sample_size.isdecimal() and int(sample_size) != there["sample_size"]
    if fitting[0] != "ddpm" and is_other:
        raise UserError(
            f"--sample_size {sample_size}: {origin} was trained at {there['sample_size']} pixels, and only diffusion "
            "models can go on at another size; leave out --sample_size"
        )
    if chosen.get("unet") == "compact" and sample_size is not None:
        chosen |= _scaled_to(sample_size, there)
    return fitting[0], settings_as_flags(chosen, classes, f"--init_from {origin}")


def _scaled_to(sample_size: str, there: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that follow the image size of a compact U-Net, from those at another size.

    The noise does not go below EDM's own, which is for 64 pixels and fewer. What is no number, or out of range, is
    left to be refused with all other settings.
    """
    before, attention, noise = numbers = [there[name] for name in ("sample_size", "attention_size", "noise_scale")]
    if not sample_size.isdecimal() or not all(isinstance(number, int | float) for number in numbers):
        return {}
    if before <= 0 or attention < 0 or noise <= 0:
        return {}
    now = min(int(sample_size[:9]), int(PIXELS.maximum))
    scaled: dict[str, Any] = {"attention_size": int(attention * now // before)}
    if there["formulation"] == "edm":
        scaled["noise_scale"] = max(noise * now / before, min(noise, 1.0))
    return scaled


def settings_to_resume(flags: list[str], output_dir: str) -> Path | None:
    """Return the settings file of the run that the flags resume, to be the preset.

    Args:
        flags: of the command line.
        output_dir: the run's folder.

    Returns:
        That of the run in `output_dir`, else that of the run whose checkpoint `--resume` names; None if there is
        neither, without `--resume`, or if a preset is given.
    """
    resume = value_of("--resume", flags)
    if resume is None or value_of("--preset", flags) is not None:
        return None
    folders = [Path(output_dir)]
    if resume != "latest":  # RUN/checkpoints/step-...
        folders.append(Path(resume).absolute().parent.parent)
    return next((folder / SETTINGS_FILE for folder in folders if (folder / SETTINGS_FILE).is_file()), None)


def refuse_a_run(data: str) -> None:
    """Raise a `UserError` if data are the folder of a run, whose sample sheets would count as images."""
    folder = Path(data)
    if not (folder / SETTINGS_FILE).is_file():
        return
    from hfgen.files import read_json, read_json_lines
    from hfgen.training.folder import is_of_a_run
    from hfgen.training.page import resume_command

    if not is_of_a_run(folder / SETTINGS_FILE) and not (folder / METRICS_FILE).is_file():
        return  # another program's settings, beside images
    unknown = _unknown_settings(read_json(folder / SETTINGS_FILE))
    method = next((method for method in METHODS if not unknown[method]), None)
    how = "run its command again with --resume latest"
    if method is not None:
        how = shlex.join(resume_command(folder, method, read_json_lines(folder / LAUNCHES_FILE, ("from_step",))))
    raise UserError(f"{data} is a run, not images to train on; to resume it: {how}")


def refuse_before_reading(method: str, settings: Sequence[Any], opens_folder: bool) -> None:
    """Raise the `UserError` that the training script would raise after the images have been read.

    Args:
        method: "gan", "vae" or "ddpm".
        settings: the run's, the data's and the method's.
        opens_folder: whether this machine opens the run's folder.
    """
    run_settings, data_settings, of_method = settings
    if method == "vae" and run_settings.max_train_steps is not None:
        check_length(of_method.learned_term_start, run_settings.max_train_steps)
    if opens_folder:
        from hfgen.training.folder import check_folder

        check_folder(Path(run_settings.output_dir), run_settings.resume, settings)
    with loading():
        import torch

        script = importlib.import_module(f"hfgen.training_scripts.train_{method}")
    build = getattr(script, {"gan": "build_networks", "vae": "build_vae", "ddpm": "build_unet"}[method])
    try:
        with torch.device("meta"):  # without memory for the weights
            build(of_method, data_settings.sample_size)
        if method == "ddpm":
            script.build_schedule(of_method)
    except ValueError as error:
        raise UserError(str(error)) from error
