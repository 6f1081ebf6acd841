"""The commands that train the cells of a study again."""

import shlex

import pytest

from hfgen.commands.train import _parse
from hfgen.studies.cells import expand
from hfgen.studies.commands import command_of, commands
from hfgen.studies.scripts import find_scripts
from hfgen.studies.study_file import find_study_file, read_study_file


def shipped(name):
    file = read_study_file(find_study_file(name))
    return expand(file, find_scripts(), "my cats/")


@pytest.mark.parametrize("name", sorted(file.stem for file in (find_scripts() / "studies").glob("*.yaml")))
def test_the_command_of_a_cell_is_read_as_the_settings_of_the_cell(name):
    study = shipped(name)
    for cell in study.cells.values():
        words = shlex.split(command_of(study, cell))
        assert words[:3] == ["hfgen", "train", cell.method]
        read = _parse(cell.method, words[3:], "hfgen train")
        assert read["dataset"] == "my cats/" and read["output_dir"] == f"runs/{cell.folder_name}"
        assert {key: read[key] for key in cell.settings} == cell.settings


def test_there_is_a_command_for_every_cell_and_the_rest_are_comments():
    study = shipped("latent_dim")
    lines = commands(study).splitlines()
    assert [line for line in lines if not line.startswith("#") and line] == [
        command_of(study, cell) for cell in study.cells.values()
    ]
    assert [f"# {name}" for name in study.cells] == [line for line in lines if line.startswith("# ")][1:]
