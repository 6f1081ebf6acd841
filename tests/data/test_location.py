"""What a name means: a path on this machine, or an id on the Hub."""

import pytest

from hfgen.data.location import hub_id_of_address, is_hub_id, is_missing, is_path
from hfgen.data.settings import DataSettings
from hfgen.errors import UserError


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


ADDRESSES = {
    "https://huggingface.co/datasets/huggan/monet2photo": "huggan/monet2photo",
    "https://huggingface.co/datasets/huggan/monet2photo/tree/main": "huggan/monet2photo",
    "https://huggingface.co/datasets/huggan/monet2photo/viewer/default/train?row=3": "huggan/monet2photo",
    "huggingface.co/datasets/mnist/": "mnist",
    "https://hf.co/datasets/mnist/tree/main": "mnist",
    "hf://datasets/huggan/monet2photo": "huggan/monet2photo",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_the_address_of_a_data_set_of_the_hub_means_its_id(address):
    assert DataSettings(dataset=address).dataset == ADDRESSES[address]


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://huggingface.co/huggan/dcgan", "not in the datasets of the Hub"),
        ("https://huggingface.co/spaces/huggan/demo", "not in the datasets of the Hub"),
        (
            "https://huggingface.co/datasets/huggan/monet2photo/tree/v1.0",
            "only whole repositories .* use huggan/monet2photo",
        ),
        ("https://www.kaggle.com/datasets/a/b", "URLs are not supported; download it and give its path"),
        ("s3://bucket/cats.zip", "URLs are not supported; download it"),
    ],
)
def test_another_address_is_refused_with_what_to_do(address, told):
    with pytest.raises(UserError, match=told):
        DataSettings(dataset=address)


def test_the_address_of_a_model_means_its_id():
    assert hub_id_of_address("https://huggingface.co/huggan/dcgan/tree/main", "models", "DIR") == "huggan/dcgan"
    with pytest.raises(UserError, match="DIR .* not in the models of the Hub"):
        hub_id_of_address("https://huggingface.co/datasets/mnist", "models", "DIR")


def test_a_folder_in_an_archive_is_a_path_that_is_there(empty_folder):
    for name in ("set.zip", "set.tar.gz"):
        assert not is_path(f"{name}/cats")  # might be on the Hub
        (empty_folder / name).write_bytes(b"")
        assert is_path(f"{name}/cats") and not is_missing(f"{name}/cats") and not is_hub_id(f"{name}/cats")


def test_a_path_below_the_home_folder_is_found(empty_folder):
    (empty_folder / "cats").mkdir()
    for name in ("~", "~/cats"):
        assert is_path(name) and not is_missing(name)


@pytest.mark.parametrize("name", ["toy_paintings", "toy_paintings:12"])
def test_the_built_in_data_set_is_no_path_even_if_there_is_one(name, empty_folder):
    (empty_folder / name).mkdir()
    assert not is_path(name) and not is_missing(name)
