"""Settings: the command line, presets, and what a resumed run may change."""

import json
import os
from dataclasses import dataclass
from typing import Literal

import pytest

from hfgen.config import changed_settings, parse_settings, setting, settings_to_dict
from hfgen.errors import UserError


@dataclass
class First:
    _argument_group_name = "first"

    steps: int = setting(10, "steps")
    rate: float = setting(0.5, "a rate")
    flag: bool = setting(False, "a flag")
    where: str | None = setting(None, "a place", may_change=True)


@dataclass
class Second:
    _argument_group_name = "second"

    kind: Literal["a", "b"] = setting("a", "a kind")
    widths: list[int] | None = setting(None, "widths")


@pytest.fixture
def presets(tmp_path):
    folder = tmp_path / "presets"
    folder.mkdir()
    values = {"steps": 20, "rate": -1e-05, "flag": True, "kind": "b", "widths": [1, 2], "where": None}
    (folder / "good.json").write_text(json.dumps(values))
    (folder / "misspelt.json").write_text('{"stepps": 3}')
    (folder / "unlike.json").write_text('{"qqqq": 3}')
    (folder / "wrong_type.json").write_text('{"steps": "many"}')
    (folder / "wrong_kind.json").write_text('{"kind": "c"}')
    (folder / "list.json").write_text("[1]")
    (folder / "broken.json").write_text("{")
    return folder


def parse(presets, *arguments):
    return parse_settings((First, Second), presets, list(arguments))


def test_without_arguments_the_defaults_hold(presets):
    assert parse(presets) == (First(10, 0.5, False, None), Second("a", None))


def test_a_preset_replaces_defaults_and_what_is_typed_replaces_the_preset(presets):
    first, second = parse(presets, "--rate", "0.25", "--preset", "good", "--widths", "7")
    assert first == First(20, 0.25, True, None)
    assert second == Second("b", [7])


def test_a_flag_that_a_preset_switches_on_can_be_switched_off(presets):
    first, _ = parse(presets, "--preset", "good", "--flag", "false")
    assert first.flag is False


def test_the_settings_of_a_run_serve_as_a_preset(presets, tmp_path):
    settings = parse(presets, "--preset", "good", "--where", "here")
    file = tmp_path / "training_config.json"
    file.write_text(json.dumps(settings_to_dict(*settings)))
    assert parse(presets, "--preset", str(file)) == settings


@dataclass
class Folder:
    folder: str = setting("runs/run", "of the run", belongs_to="run")
    repo: str | None = setting(None, "of the run", belongs_to="run")


def test_what_belongs_to_one_run_is_not_taken_over_with_its_settings(presets, tmp_path):
    record = json.dumps({"steps": 3, "folder": "runs/old", "repo": "me/old"})
    published = json.dumps({"steps": 3, "folder": "old"})  # without what is private
    for name, text in [("training_config", record), ("renamed", record), ("training_config", published)]:
        file = tmp_path / f"{name}.json"
        file.write_text(text)
        first, folder = parse_settings((First, Folder), presets, ["--preset", str(file)])
        assert (first.steps, folder) == (3, Folder())
    _, typed = parse_settings((First, Folder), presets, ["--preset", str(file), "--folder", "new"])
    assert typed == Folder("new")
    (presets / "own.json").write_text('{"folder": "runs/mine"}')  # written by hand: it is what is wanted
    assert parse_settings((First, Folder), presets, ["--preset", "own"])[1] == Folder("runs/mine")


@dataclass
class Whole:
    output_dir: str = setting("runs/run", "of the run", belongs_to="run")
    resume: str | None = setting(None, "of the run", belongs_to="run")
    repo: str | None = setting(None, "of the run", belongs_to="run")
    dataset: str = setting("toys", "the images")
    split: str = setting("train", "of the dataset", belongs_to="dataset")


def test_a_run_that_is_resumed_keeps_what_belongs_to_it(presets, tmp_path, monkeypatch):
    file = tmp_path / "training_config.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), "resume": None, "repo": "me/old", "split": "test"}))
    monkeypatch.chdir(tmp_path)
    for preset, folder in ((str(file), str(tmp_path)), ("training_config.json", ".")):
        arguments = ["--preset", preset, "--output-dir", folder, "--resume", "latest"]
        assert parse_settings((Whole,), presets, arguments)[0] == Whole(folder, "latest", "me/old", split="test")
    (new,) = parse_settings((Whole,), presets, ["--preset", str(file), "--output_dir", "new", "--resume", "latest"])
    assert new == Whole("new", "latest", None, split="test")
    (again,) = parse_settings((Whole,), presets, ["--preset", str(file), "--output_dir", str(tmp_path)])
    assert again.repo is None


@dataclass
class Published(Whole):
    push_to_hub: bool = setting(False, "publish", belongs_to="run")


def test_a_run_that_was_to_be_published_can_be_resumed_without_that(presets, tmp_path):
    file = tmp_path / "training_config.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), "repo": "me/old", "push_to_hub": True, "split": "test"}))
    arguments = ["--preset", str(file), "--output_dir", str(tmp_path), "--resume", "latest"]
    (published,) = parse_settings((Published,), presets, arguments)
    assert published.push_to_hub and published.repo == "me/old"
    (settings,) = parse_settings((Published,), presets, [*arguments, "--push-to-hub", "False"])
    assert not settings.push_to_hub and settings.repo is None and settings.split == "test"


def test_a_run_that_goes_on_in_another_folder_keeps_the_choices_of_its_data(presets, tmp_path):
    (tmp_path / "old").mkdir()
    file = tmp_path / "old" / "training_config.json"
    file.write_text(json.dumps({"dataset": "cats", "split": "all", "repo": "me/old"}))
    arguments = ["--preset", str(file), "--output_dir", "new", "--dataset", "moved/cats"]  # it may have moved
    checkpoint = str(tmp_path / "old" / "checkpoints" / "step-00000002")
    (settings,) = parse_settings((Whole,), presets, [*arguments, "--resume", checkpoint])
    assert (settings.split, settings.repo) == ("all", None)
    assert parse_settings((Whole,), presets, arguments)[0].split == "train"


ADDRESS = "https://huggingface.co/datasets/cats"


@pytest.mark.parametrize(
    ("given", "split"), [(None, "test"), ("cats", "test"), ("./cats", "test"), (ADDRESS, "test"), ("dogs", "train")]
)
def test_choices_of_a_dataset_are_not_those_of_another(presets, tmp_path, monkeypatch, given, split):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    file = tmp_path / "training_config.json"
    file.write_text(json.dumps({"dataset": "cats", "split": "test"}))
    arguments = ["--preset", str(file), *(["--dataset", given] if given else [])]
    assert parse_settings((Whole,), presets, arguments)[0] == Whole(dataset=given or "cats", split=split)


@pytest.mark.parametrize(
    ("preset", "told"),
    [
        ("misspelt", "misspelt.json: unknown setting 'stepps'; did you mean 'steps'?"),
        ("unlike", "unlike.json: unknown setting 'qqqq'"),
        ("list", "must contain a JSON object of settings, not a list"),
        ("broken", "not valid JSON"),
        ("absent", "absent: must be one of"),
    ],
)
def test_a_preset_that_cannot_be_used_is_named(presets, preset, told):
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        parse(presets, "--preset", preset)


@pytest.mark.parametrize("preset", ["wrong_type", "wrong_kind"])
def test_a_value_of_the_wrong_type_in_a_preset_is_refused_like_a_typed_one(presets, preset):
    with pytest.raises(SystemExit):
        parse(presets, "--preset", preset)


def test_a_misspelt_flag_is_refused_with_the_nearest_one(presets, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(presets, "--step", "3")
    assert exit_info.value.code == 2
    assert "unknown argument --step; did you mean --steps?" in capsys.readouterr().err


def test_help_lists_every_setting_and_says_which_may_change(presets, capsys):
    with pytest.raises(SystemExit):
        parse(presets, "--help")
    text = capsys.readouterr().out
    for name in ("steps", "rate", "flag", "where", "kind", "widths", "preset"):
        assert f"--{name}" in text
    assert text.count("[may change on resume]") == 1
    words = " ".join(text.split())
    assert "a kind (default: a)" in words and "steps (default: 10)" in words  # but no default of what may be unset
    assert "default: None" not in words


def test_changed_settings_are_listed_unless_they_may_change():
    saved = settings_to_dict(First(10, 0.5, False, "here"), Second("a", [1, 2]))
    now = (First(11, 0.5, False, "there"), Second("a", [1, 2]))
    assert changed_settings(saved, *now) == ["steps: 10 -> 11"]


def test_a_setting_that_came_after_a_run_counts_as_its_default():
    @dataclass
    class Later:
        steps: int = setting(3, "updates")
        scale: float = setting(1.0, "new")

    assert changed_settings({"steps": 3}, Later()) == []
    assert changed_settings({"steps": 3}, Later(scale=2.0)) == ["scale: 1.0 -> 2.0"]


def test_presets_are_regular_files_of_bounded_size_and_depth(tmp_path):
    preset = tmp_path / "preset.json"
    for text in ("[" * 100_000, " " * (2 << 20) + "{}", "\0", '{"a": ' * 100_000):
        preset.write_text(text)
        with pytest.raises(UserError, match=f"--preset {preset}: not valid JSON"):
            parse_settings([First], tmp_path, ["--preset", str(preset)])
    preset.unlink()
    os.mkfifo(preset)
    with pytest.raises(UserError, match="not a regular file"):
        parse_settings([First], tmp_path, ["--preset", str(preset)])
