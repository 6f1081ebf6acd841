"""The commands that train the cells of a study again."""

import shlex
from dataclasses import replace

import pytest

from hfgen.commands.train_settings import parse_flags
from hfgen.config import settings_to_dict
from hfgen.studies.cells import ALL_CHECKPOINTS, Cell, expand
from hfgen.studies.commands import command_of, dataset_to_give, script_of, settings_outside
from hfgen.studies.scripts import find_scripts
from hfgen.studies.study_file import Budget, Evaluation, Family, StudyFile, find_study_file, read_study_file


def shipped(name):
    file = read_study_file(find_study_file(name))
    return expand(file, find_scripts(), "my cats/")


@pytest.mark.parametrize("name", sorted(file.stem for file in (find_scripts() / "studies").glob("*.yaml")))
def test_the_command_of_a_cell_is_read_as_the_settings_of_the_cell(name):
    study = shipped(name)
    for cell in study.cells.values():
        words = shlex.split(command_of(cell, study, "my cats/"))
        assert words[:3] == ["hfgen", "train", cell.method]
        read = settings_to_dict(*parse_flags(cell.method, words[3:], "hfgen train"))
        assert read["dataset"] == "my cats/" and read["output_dir"] == f"runs/{cell.folder_name}"
        assert {key: read[key] for key in cell.settings} == cell.settings


def test_a_cell_of_an_own_training_script_is_trained_again_by_it():
    file = StudyFile("toy", "Toy", {"GAN": Family("gan", "dcgan")}, Budget(images=640), seeds=(0,))
    study = replace(expand(file, find_scripts(), "cats"), scripts={"gan": 64 * "a"})
    (cell,) = study.cells.values()
    command = command_of(cell, study, "cats")
    assert command.startswith("accelerate launch training_scripts/train_gan.py --dataset cats ")


def test_checkpoints_that_the_study_needed_for_its_scores_are_not_kept_outside_of_it():
    file = StudyFile("toy", "Toy", {"GAN": Family("gan", "dcgan")}, Budget(images=640), seeds=(0,),
                     evaluation=Evaluation(every_images=160))  # fmt: skip
    study = expand(file, find_scripts(), "cats")
    (cell,) = study.cells.values()
    assert cell.settings["checkpoints_total_limit"] == ALL_CHECKPOINTS and cell.settings["checkpoint_every"] == 10
    assert "checkpoint" not in command_of(cell, study, "cats")
    outside = settings_outside(cell)
    assert cell.settings.keys() - outside.keys() == {"checkpoints_total_limit", "checkpoint_every"}
    own = replace(cell, settings=cell.settings | {"checkpoints_total_limit": 7})
    assert settings_outside(own) == own.settings and "--checkpoints_total_limit=7" in command_of(own, study, "cats")


def test_the_script_has_a_command_for_every_cell_below_its_name():
    lines = script_of({"GAN seed=0": "hfgen train gan", "a\nb": "hfgen train vae"}).splitlines()
    assert lines[1:] == ["", "# GAN seed=0", "hfgen train gan", "", "# a b", "hfgen train vae"]
    assert lines[0].startswith("# ")


@pytest.mark.parametrize(
    ("dataset", "given"),
    [
        ("/home/somebody/my cats", "path/to/my cats"),
        ("C:\\photos\\cats.zip", "path/to/cats.zip"),
        ("somebody/cats", "somebody/cats"),
        ("toy_paintings:30", "toy_paintings:30"),
    ],
)
def test_a_command_does_not_tell_where_the_images_lie_on_this_machine(dataset, given):
    assert dataset_to_give(replace(shipped("latent_dim"), dataset=dataset)) == given


def test_the_time_limit_of_a_study_is_given_in_seconds_and_small_numbers_in_one_word():
    study = shipped("latent_dim")
    cell = Cell("GAN", "gan", {"learning_rate": 1e-05, "dataset_column": None, "block_out_channels": [8, 16]})
    words = shlex.split(command_of(cell, replace(study, budget=Budget(minutes=0.5)), "cats"))
    assert words == [
        *("hfgen", "train", "gan", "--dataset", "cats", "--learning_rate=1e-05", "--block_out_channels", "8", "16"),
        *("--output_dir", "runs/GAN", "--max_train_time", "30s"),
    ]
