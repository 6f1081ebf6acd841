"""Values that are empty and options that act only beside another are refused; messages name what the user wrote."""

import sys
from pathlib import Path

import pytest
from stand_in_features import Colours
from toy_runs import train

from hfgen import cli
from hfgen.arguments import refuse_empty_values, with_home
from hfgen.commands.evaluate import held_out_of
from hfgen.data.settings import DataSettings
from hfgen.errors import UserError
from hfgen.metrics import feature_spaces


EMPTY = {
    "--storage": ["study", "run", "gan_loss", "--storage", "", "--dataset", "x"],
    "--dataset": ["study", "run", "gan_loss", "--dataset="],
    "--output": ["sample", "run", "--output", ""],
    "--scores": ["publish", "run", "me/x", "--scores", ""],
    "an argument": ["publish", "", "me/x"],
}
ALONE = {
    "--held_out_split test: applies only with --held_out": ["evaluate", "run", "--held_out_split", "test"],
    "--held_out_split a: applies only with --held_out": [
        *("evaluate-images", "images", "--sample_size", "16", "--held_out_split", "a"),
    ],
    "--feature_weights w.pt: applies only with --reference": ["kaggle-zip", "run", "--feature_weights", "w.pt"],
}


def message_of(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["hfgen", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("named", EMPTY)
def test_a_value_that_is_empty_is_refused_by_name(monkeypatch, capsys, tmp_path, named):
    monkeypatch.chdir(tmp_path)
    said = message_of(monkeypatch, capsys, EMPTY[named])
    assert said == f"error: {named}: its value is empty; give a value, or leave it out"
    assert not list(Path().iterdir())


@pytest.mark.parametrize("option", ["--resume", "--preset", "--cache_dir", "--hub_model_id", "--max_train_time"])
def test_a_setting_that_is_empty_is_refused_by_name(tmp_path, option):
    with pytest.raises(UserError, match=f"{option}: its value is empty"):
        train("gan", tmp_path / "run", option, "")
    assert not (tmp_path / "run").exists()


def test_other_values_pass():
    refuse_empty_values(["sample", "run", "--output", " ", "--a=b=", "--", "-", "0"])


@pytest.mark.parametrize("message", ALONE)
def test_an_option_without_the_one_that_it_belongs_to_is_refused(monkeypatch, capsys, tmp_path, message):
    monkeypatch.chdir(tmp_path)
    needed = ["--output", "new.zip"] if "kaggle-zip" in ALONE[message] else ["--output", "new", "--reference", "x"]
    assert f"error: {message}; add that" in message_of(monkeypatch, capsys, [*ALONE[message], *needed])


ELSEWHERE = {
    "PATH": ["data", "inspect", "nothing/is/there"],
    "PATH ": ["data", "floor", "nothing/is/there", "--device", "cpu"],
    "IMAGES": [
        *("evaluate-images", "nothing/is/there", "--sample_size", "16", "--output", "new"),
        *("--reference", "toy_paintings:12"),
    ],
}


@pytest.mark.parametrize("argument", ELSEWHERE)
def test_messages_name_the_argument_by_which_a_command_takes_a_data_set(monkeypatch, capsys, argument):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    said = message_of(monkeypatch, capsys, ELSEWHERE[argument])
    assert said == f"error: {argument.strip()} nothing/is/there: no such file or folder"


def test_messages_name_the_option_of_held_out_images(tmp_path):
    data = DataSettings("toy_paintings:12", sample_size=16, cache_dir=str(tmp_path))
    for held_out, split in ("nothing/is/there", None), ("toy_paintings:12", "other"):
        with pytest.raises(UserError, match=rf"^--held_out{'_split other' if split else ' nothing/is/there'}: "):
            held_out_of(held_out, split, data)


def test_a_home_folder_that_the_shell_has_left_is_expanded(monkeypatch, tmp_path, hfgen):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = [
        "sample",
        "~/run",
        "--output=~/images",
        "--seed",
        "3",
        "--name=a~b",
        "a/~",
        "--equal==~",
        "~no-such-user/x",
    ]
    home = str(tmp_path)
    assert with_home(given) == ["sample", f"{home}/run", f"--output={home}/images", *given[3:]]
    status, _, err = hfgen("sample", "~/nothing", "--output=~/images")
    assert status == 2 and f"{home}/nothing" in err


def test_an_address_is_called_by_the_argument_that_it_was_given_for(hfgen, tmp_path):
    status, _, err = hfgen("data", "inspect", "https://example.com/x.zip")
    assert status == 2 and err.startswith("error: PATH https://example.com/x.zip"), err
