"""Settings: defined once as dataclasses, which give the command line, the presets and a run's settings file.

A value is looked up in this order: the command line, the preset (`--preset`), the dataclass's default.
"""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from hfgen.arguments import refuse_empty_values, with_home
from hfgen.errors import UserError
from hfgen.files import read_written_text
from hfgen.ranges import Range
from hfgen.run_files import SETTINGS_FILE


# Two ways to give the length of a run: one of them on the command line replaces the other of a preset.
LENGTHS = ("max_train_steps", "num_epochs")


class HelpText(str):
    """The help of a setting, as shown by `--help`.

    Attributes:
        may_change: whether a resumed run may change the setting. It is an attribute of the text because
            HfArgumentParser passes a field's metadata to argparse, which accepts no keys of ours.
        belongs_to: "run" or "dataset" if the setting is of one alone, so that the settings of a run used as a preset
            for another lack it; "" for all others.
        allowed: the range of a number, or of each of several; None for what is no number.
    """

    may_change: bool
    belongs_to: str
    allowed: Range | None

    def __new__(cls, text: str, may_change: bool, belongs_to: str = "", allowed: Range | None = None) -> "HelpText":
        """Build the text; a setting that may change says so at the end."""
        help_text = super().__new__(cls, f"{text} [may change on resume]" if may_change else text)
        help_text.may_change, help_text.belongs_to, help_text.allowed = may_change, belongs_to, allowed
        return help_text


def setting(
    default: Any,
    help_text: str,
    allowed: Range | None = None,
    *,
    may_change: bool = False,
    belongs_to: Literal["", "run", "dataset"] = "",
    alias: str | None = None,
) -> Any:
    """Declare a field of a settings dataclass.

    The default of a newly added setting must keep hfgen's earlier behaviour, unless `may_change` is set: otherwise
    older runs cannot be resumed.

    Args:
        default: value if neither the command line nor a preset sets one.
        help_text: shown by `--help`, with the unit.
        allowed: the range of a number, or of each number of a list; checked by `check_ranges`. Every setting that is
            a number must have one.
        may_change: whether a resumed run may change it, because it does not affect the trained weights.
        belongs_to: "run" if it is of one run alone, such as its folder: not taken over if the run's
            `training_config.json` is the preset of another; "dataset" if of one dataset: not if another is given.
        alias: another name of the option, such as "--ngf".
    """
    metadata: dict[str, Any] = {"help": HelpText(help_text, may_change, belongs_to, allowed)}
    if alias is not None:
        metadata["aliases"] = [alias]
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(settings: Any) -> None:
    """Raise a `UserError` if a number of the settings is outside its range; first thing in each `__post_init__`."""
    for name, text in _help_texts([settings]).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, list) else [value]:
            if text.allowed is not None:
                text.allowed.check(f"--{name}", number)


def parse_settings(
    settings_classes: Sequence[type],
    presets_folder: Path,
    arguments: Sequence[str] | None = None,
    program: str | None = None,
    other_options: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Parse the command line into one instance of each settings class.

    Args:
        settings_classes: dataclasses whose fields are made by `setting`; field names must be unique across them.
        presets_folder: where `--preset NAME` finds `NAME.json`; `--preset` also takes the path of a JSON file,
            such as the `training_config.json` of an earlier run. Unless that run is resumed, it is then without
            what belongs to it alone (its folder, `resume`, its repo on the Hub), and with another `--dataset` without
            the choices of its own (configuration, split, column, streaming).
        arguments: the command line without the program's name; `sys.argv[1:]` if None.
        program: the program's name in messages; that of `sys.argv[0]` if None.
        other_options: options that the caller has taken from the command line; suggested for a misspelt one.

    Raises:
        UserError: if the preset cannot be read or has an unknown key, a value is empty, or settings contradict each
            other.
        SystemExit: on a misspelt flag or a value of the wrong type, as argparse does.
    """
    from transformers import HfArgumentParser  # slow to import; other users of this file do not need it

    parser = HfArgumentParser(settings_classes, prog=program, allow_abbrev=False, formatter_class=_Help)
    parser.usage = "%(prog)s [--preset NAME] [--setting VALUE ...]   (--help lists them all)"
    presets_folder = _find_presets(presets_folder)
    presets = sorted(path.stem for path in presets_folder.glob("*.json"))
    of_presets = argparse.ArgumentParser(parser.prog, parser.usage, add_help=False, allow_abbrev=False)
    for one in (parser, of_presets):
        one.add_argument("--preset", help=f"one of {', '.join(presets)}, or a JSON file of settings")
    of_lengths = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in LENGTHS:
        of_lengths.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="?")

    typed = with_home(sys.argv[1:] if arguments is None else arguments)
    refuse_empty_values(typed)
    if arguments is None and not typed:
        parser.error("give at least --dataset or --preset")
    if preset := of_presets.parse_known_args(typed)[0].preset:
        # A preset is parsed as flags, so that its values are checked like typed ones, and shown by --help.
        of_preset = vars(parser.parse_args(_preset_as_flags(preset, presets_folder, settings_classes, typed)))
        if vars(of_lengths.parse_known_args(typed)[0]):
            of_preset |= dict.fromkeys(LENGTHS)
        parser.set_defaults(**of_preset | {"preset": preset})
    namespace, unknown = parser.parse_known_args(typed)
    if unknown:
        known = [*(action.dest for action in parser._actions), *other_options]
        parser.error(_unknown_flag_message(unknown, known))
    return tuple(
        cls(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(cls)})
        for cls in settings_classes
    )


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except None, for which the help text says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _find_presets(folder: Path) -> Path:
    """Return a script's folder of presets, or hfgen's of that name: a copied script may have none beside it."""
    return folder if folder.is_dir() else shipped_presets() / folder.name


def shipped_presets() -> Path:
    """Return the folder of hfgen's own presets, by method."""
    return Path(str(files("hfgen.training_scripts"))) / "presets"


def _unknown_flag_message(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Name the first unknown argument and the closest known setting."""
    flag = next((argument for argument in unknown if argument.startswith("--")), unknown[0])
    near = difflib.get_close_matches(flag.lstrip("-").split("=")[0], known, n=1)
    if near or flag.startswith("-"):
        return f"unknown argument {flag}" + (f"; did you mean --{near[0]}?" if near else "")
    return f"unknown argument {flag}; put what has spaces in quotes"


def _preset_as_flags(
    preset: str, presets_folder: Path, settings_classes: Sequence[type], typed: Sequence[str]
) -> list[str]:
    """Read a preset and convert it to command-line flags; `typed` are those that are given besides it."""
    path = presets_folder / f"{preset}.json"
    if not path.is_file():
        path = Path(preset)
    if not path.exists() or path.is_dir():
        names = ", ".join(sorted(path.stem for path in presets_folder.glob("*.json")))
        raise UserError(f"--preset {preset}: must be one of {names}, or a JSON file")
    values = read_preset(path)
    texts = _help_texts(settings_classes)
    of_one_run = {name for name, text in texts.items() if text.belongs_to == "run"}
    # The record of a run, perhaps renamed: a new run must not resume or overwrite the old one, or its repo. A preset
    # written by hand may have some of these settings, but not all.
    if path.name == SETTINGS_FILE or of_one_run <= values.keys():
        foreign = _foreign(path, values, typed)
        values = {
            key: value for key, value in values.items() if key not in texts or texts[key].belongs_to not in foreign
        }
    return settings_as_flags(values, settings_classes, f"--preset {path}")


def _foreign(path: Path, values: dict[str, Any], typed: Sequence[str]) -> set[str]:
    """Say which settings in the record of a run do not apply to the run that is started with it: `belongs_to` them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("output_dir", "resume", "dataset", "push_to_hub"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="?", const="true")
    given, run = parser.parse_known_args(typed)[0], path.resolve().parent
    if given.resume and given.output_dir and Path(given.output_dir).resolve() == run:
        is_unpublished = (given.push_to_hub or "true").lower() in ("false", "f", "no", "n", "0")
        return {"run"} if is_unpublished else set()  # the run itself goes on
    if given.resume and Path(given.resume).resolve().parents[1:2] == (run,):
        return {"run"}  # it goes on in another folder; its data may have moved
    is_own = given.dataset is None or _is_same(given.dataset, str(values.get("dataset")))
    return {"run"} if is_own else {"run", "dataset"}


def _is_same(dataset: str, other: str) -> bool:
    """Whether two names are of the same dataset: the same path, or the same one on the Hub, also by its address."""
    is_address = "://" in dataset or dataset.startswith(("huggingface.co/", "hf.co/", "www."))
    return (
        is_address
        and dataset.rstrip("/").endswith(f"/{other}")
        or os.path.realpath(dataset) == os.path.realpath(other)
    )


def read_preset(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings.

    Raises:
        UserError: if it cannot be read or holds something else.
    """
    try:
        values = json.loads(read_written_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--preset {path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"--preset {path}: must contain a JSON object of settings, not a {type(values).__name__}")
    return values


def _help_texts(settings_classes: Iterable[Any]) -> dict[str, HelpText]:
    """Return the help text of every setting by name, for settings classes or their instances."""
    return {field.name: field.metadata["help"] for part in settings_classes for field in dataclasses.fields(part)}


def default_values(settings_classes: Iterable[Any]) -> dict[str, Any]:
    """Return the default of every setting by name, for settings classes or their instances."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for part in settings_classes
        for field in dataclasses.fields(part)
    }


def settings_as_flags(values: dict[str, Any], settings_classes: Sequence[type], where: str) -> list[str]:
    """Convert settings to command-line flags, so that their values are checked like typed ones.

    Args:
        values: by setting name; None is skipped: it is the default of every setting that can be None.
        settings_classes: dataclasses whose fields are made by `setting`.
        where: source of the settings, for error messages.

    Raises:
        UserError: if a setting is unknown.
    """
    known = default_values(settings_classes)
    flags = []
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{where}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if value is None:
            continue
        flags += as_flags(key, value)
    return flags


def as_flags(name: str, value: Any) -> list[str]:
    """Return the words that set a setting on the command line."""
    # With "=", because argparse takes a bare -1e-05 for a flag.
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


def settings_to_dict(*settings: Any) -> dict[str, Any]:
    """Merge settings into one flat dictionary, usable as JSON and for `--preset`."""
    return {key: value for part in settings for key, value in dataclasses.asdict(part).items()}


def changed_settings(saved: dict[str, Any], *settings: Any) -> list[str]:
    """List the settings that differ between a saved run and its resumption, except those that may change.

    Args:
        saved: result of `settings_to_dict` for the earlier run.
        settings: the current settings.

    Returns:
        One line per difference: `name: saved value -> current value`.
    """
    now = settings_to_dict(*settings)
    may_change = {name for name, text in _help_texts(settings).items() if text.may_change}
    # A setting added after the run was made counts as its default, which keeps the earlier behaviour (see `setting`).
    saved = {**default_values(settings), **saved}
    # Round trip through JSON, which turns tuples into lists.
    now = json.loads(json.dumps(now))
    return [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if key not in may_change and saved.get(key) != now.get(key)
    ]
