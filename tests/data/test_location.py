"""What a name means: a path on this machine, or an id on the Hub."""

import pytest

from hfgen.data.location import is_hub_id, is_missing, is_path


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["mnist", "someone/cats", "some-one/cats_2.0", "_a/-b", "cats.tar.gz"])
def test_names_of_the_form_of_a_hub_id_are_one_unless_they_exist_here(name, empty_folder):
    assert is_hub_id(name) and not is_path(name) and not is_missing(name)
    (empty_folder / name).mkdir(parents=True)
    assert is_path(name) and not is_hub_id(name) and not is_missing(name)


@pytest.mark.parametrize(
    "name",
    ["./cats", "../cats", "/data/cats", "~/cats", "~nobody/cats", "data/cats/train", "cats/", "C:\\cats", "two words",
     "cats.zip", "someone/CATS.PARQUET", "cats.tfrecord-00000-of-00002", "cats.tfrec.gz", "a/b.png", "", ".hidden",
     "nul\0byte", "toy_paintings:", "toy_paintings:-1"],
)  # fmt: skip
def test_anything_else_is_a_path_that_is_missing(name):
    assert is_path(name) and is_missing(name) and not is_hub_id(name)


def test_a_path_below_the_home_folder_is_found(empty_folder):
    (empty_folder / "cats").mkdir()
    for name in ("~", "~/cats"):
        assert is_path(name) and not is_missing(name)


@pytest.mark.parametrize("name", ["toy_paintings", "toy_paintings:12"])
def test_the_built_in_data_set_is_no_path_even_if_there_is_one(name, empty_folder):
    (empty_folder / name).mkdir()
    assert not is_path(name) and not is_missing(name)
