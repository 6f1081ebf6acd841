"""Every number that a user may give has a range, and NaN and infinity are in none."""

import dataclasses
import math
import typing
from types import SimpleNamespace

import pytest
import typer
from conftest import load_script

from hfgen.cli import app
from hfgen.config import parse_settings
from hfgen.errors import UserError
from hfgen.ranges import CHANNELS, COUNT, COUNT_OR_NONE, DECAY, NOT_NEGATIVE, PIXELS, POSITIVE, SEED, Range


HUGE = 10**400
SCRIPTS = ("train_ddpm", "train_gan", "train_vae")
WRONG = ("-1e400", "-1", "nan", "inf", "-inf", "1e400")
WRONG_WHOLE = (str(-HUGE), "-1", str(HUGE))
NUMBERS = (int, float, int | None, float | None, list[int] | None)


@pytest.mark.parametrize(
    ("allowed", "value", "problem"),
    [
        (COUNT, 0, "must be positive"),
        (COUNT, HUGE, "must be at most 1000000000"),
        (COUNT_OR_NONE, -1, "must not be negative"),
        (CHANNELS, 65_537, "must be from 1 to 65536"),
        (PIXELS, 7, "must be from 8 to 1024 pixels"),
        (SEED, 2**64, "must be at most 9223372036854775807"),
        (DECAY, 1.0, "must be from 0 to below 1"),
        (POSITIVE, 0.0, "must be positive"),
        (POSITIVE, math.inf, "must be a finite number"),
        (POSITIVE, 1e39, "must be at most 3.4e+38"),
        (Range(1), HUGE, "must be at most 3.4e+38"),
        (NOT_NEGATIVE, math.nan, "must be a finite number"),
        (DECAY, -math.inf, "must be a finite number"),
        (Range(10, 10**9), 9, "must be at least 10"),
    ],
)
def test_a_number_out_of_its_range_is_refused(allowed, value, problem):
    with pytest.raises(UserError) as refusal:
        allowed.check("--option", value)
    assert str(refusal.value) == f"--option {value}: {problem}"


@pytest.mark.parametrize(
    ("allowed", "value"),
    [(COUNT, 1), (COUNT_OR_NONE, 0), (SEED, 2**63 - 1), (DECAY, 0), (POSITIVE, 1e-300), (PIXELS, 1024), (COUNT, None)],
)
def test_a_number_in_its_range_is_accepted(allowed, value):
    allowed.check("--option", value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_of_the_scripts_and_their_presets_is_in_a_range(script, tmp_path):
    module, preset = load_script(script), tmp_path / "own.json"
    fields = [field for part in module.SETTINGS for field in dataclasses.fields(part) if field.type in NUMBERS]
    assert len(fields) > 20
    for field in fields:
        is_whole = float not in (field.type, *typing.get_args(field.type))
        typed = [f"--{field.name}={value}" for value in (WRONG_WHOLE if is_whole else WRONG)]
        preset.write_text(f'{{"{field.name}": {-HUGE if is_whole else "NaN"}}}')
        for argument in [*typed, f"--preset={preset}"]:
            with pytest.raises(UserError, match=f"^--{field.name} "):
                parse_settings(module.SETTINGS, module.PRESETS, [argument])


def numbers_of_commands(commands: typer.Typer) -> list[tuple[str, bool, typing.Any]]:
    """The name of each option that is a number, whether it is a whole one, and its callback."""
    found = [one for group in commands.registered_groups for one in numbers_of_commands(group.typer_instance)]
    for command in commands.registered_commands:
        for hint in typing.get_type_hints(command.callback, include_extras=True).values():
            kind, *extras = typing.get_args(hint) or [hint]
            if typing.get_origin(hint) is typing.Annotated and {int, float} & {kind, *typing.get_args(kind)}:
                (option,) = extras  # typer takes the first text, in `default`, for the name
                name = next(text for text in (option.default, *option.param_decls) if isinstance(text, str))
                found.append((name, float not in (kind, *typing.get_args(kind)), option.callback))
    return found


def test_every_number_of_the_commands_is_in_a_range():
    options = numbers_of_commands(app)
    assert len(options) > 30
    for name, is_whole, callback in options:
        assert callback is not None, name
        for value in map(int if is_whole else float, WRONG_WHOLE if is_whole else WRONG):
            with pytest.raises(UserError, match=f"^{name} "):
                callback(SimpleNamespace(opts=[name]), value)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("sample", "X", "--output", "new", "--seed", 2**64), "--seed 18446744073709551616: must be at most"),
        (("sample", "X", "--output", "new", "--truncation", "nan"), "--truncation nan: must be a finite number"),
        (("progress", "X", "--frame_seconds", "1e9"), "--frame_seconds 1000000000.0: must be from 0.02 to 160"),
        (("interpolate", "X", "--output", "new", "--seeds", f"1,{2**64}"), "--seeds 18446744073709551616: must be at"),
        (
            ("compare", "X", "--reference", "toy_paintings", "--output", "new", "--steps", f"1,{2**64}"),
            "--steps 18446744073709551616: must be at most 1000000000",
        ),
    ],
)
def test_a_command_refuses_a_number_out_of_its_range(refusal, arguments, problem):
    assert refusal(*arguments).startswith(f"error: {problem}")
