"""Which of the local files are used: splits, and folders inside archives."""

import io
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from picture_files import encoded, noise
from tfrecord_writer import bytes_feature, example, record

from hfgen.commands.evaluate import held_out_of
from hfgen.data.opening import open_source
from hfgen.data.selection import NoSplitsError, select
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.errors import UserError


def write(folder: Path, kind: str, *names: str) -> Path:
    """Write a dataset that holds a picture of each name, whose content is the name; return its path."""
    if kind == "zip":
        with zipfile.ZipFile(path := folder / "set.zip", "w") as archive:
            for name in names:
                archive.writestr(name, name)
        return path
    if kind == "tar":
        with tarfile.open(path := folder / "set.tar.gz", "w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(name)
                archive.addfile(member, io.BytesIO(name.encode()))
        return path
    for name in names:
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).write_text(name)
    return folder / "set"


def images_of(path: Path | str, split: str = "train") -> list[str]:
    source = open_source(DataSettings(dataset=str(path), dataset_split=split))
    return [content.decode() for _, content in source.images()]


KINDS = ["folder", "zip", "tar"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("root", ["", "cats/images/"])
def test_of_a_train_and_a_test_folder_the_split_is_used_and_named(tmp_path, kind, root):
    train, test = [f"{root}train/a.png", f"{root}train/b.png"], [f"{root}test/a.png"]
    path = write(tmp_path, kind, *train, *test)
    assert images_of(path) == train and images_of(path, "test") == test
    assert sorted(images_of(path, "all")) == sorted(images_of(path, "train+test")) == sorted(train + test)
    source = open_source(DataSettings(dataset=str(path)))
    assert source.description.endswith(", split train")
    assert source.notes == ["split train: 2 of 3 files; --dataset_split all takes all of them"]
    assert source.identity != open_source(DataSettings(dataset=str(path), dataset_split="test")).identity
    with pytest.raises(
        UserError, match=r"--dataset_split nonsense: .* has no split nonsense; choose .*train.* or all"
    ):
        images_of(path, "nonsense")


@pytest.mark.parametrize("kind", [*KINDS, "toy_paintings:3", "file"])
@pytest.mark.parametrize("split", ["test", "nonsense"])
def test_a_split_of_data_without_splits_is_refused(tmp_path, kind, split):
    path = write(tmp_path, kind, "a.png", "more/train/b.png") if kind in KINDS else kind
    if kind == "file":
        pyarrow.parquet.write_table(pyarrow.table({"image": [b"a"]}), path := tmp_path / "set.parquet")
    with pytest.raises(NoSplitsError, match=f"--dataset_split {split}: .* has no such split; leave it out"):
        images_of(path, split)
    assert len(list(open_source(DataSettings(dataset=str(path), dataset_split="all", sample_size=8)).images())) > 0


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["train/a.png", "valid/b.png", "test/c.png"], ["valid/b.png"]),
        (["Training/a.png", "dev/b.png"], ["dev/b.png"]),
        (["train2017/a.png", "val2017/b.png"], ["val2017/b.png"]),
        (["train/a.png", "bus/b.png", "val/c.png"], ["val/c.png"]),
        (["train_0.parquet", "validation_0.parquet"], ["validation_0.parquet"]),
        (["train00-2071.tfrec", "valid00-687.tfrec"], ["valid00-687.tfrec"]),
        (["ld_train00-1.tfrec", "ld_val00-2.tfrec", "ld_test00-3.tfrec"], ["ld_val00-2.tfrec"]),
        (["train2017.parquet", "val2017.parquet"], ["val2017.parquet"]),
        (["train-00000-of-01024", "validation-00000-of-00128"], ["validation-00000-of-00128"]),
        (["data/train/cats/a.png", "data/valid/cats/b.png", "preview.png"], ["data/valid/cats/b.png"]),
        (["cats/train/a.png", "cats/val/b.png", "dogs/val/c.png"], ["cats/val/b.png", "dogs/val/c.png"]),
        (["cats-train-part1.tar", "cats-train-part2.tar", "cats-dev-part1.tar"], ["cats-dev-part1.tar"]),
    ],
)
def test_other_words_for_a_split_are_understood(names, wanted):
    assert [names[index] for index in select("set", names, "validation").indices] == wanted


@pytest.mark.parametrize(
    "names",
    [
        *(["train/a.png", "bus/b.png"], ["train/a.png", "b.png"], ["train/a.png"], ["test/a.png"]),
        *(["rail/train/a.jpg", "a/eval/b.jpg", "a/b/c.jpg"], ["2020/test/a.jpg", "2021/dev/b.jpg", "2022/trip/c.jpg"]),
        ["cats/a.jpg", "exp/test/b.jpg", "exp/val/c.jpg"],
    ],
)
def test_a_folder_called_train_among_others_is_no_split(names):
    assert select("set", names, "train").indices == list(range(len(names)))


@pytest.mark.parametrize(
    "names", [["preview.png", "train/a.png", "test/b.png"], ["extra/a.png", "train/b.png", "val/c.png"]]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beside_the_folders_of_splits_is_in_none_of_them(tmp_path, kind, names):
    path = write(tmp_path, kind, *names)
    assert images_of(path) == [name for name in names if name.startswith("train/")]
    note = "split train: 1 of 3 files; --dataset_split all takes all of them, also what is in no split: "
    note += f"{names[0].split('/')[0]} 1"
    assert open_source(DataSettings(dataset=str(path))).notes == [note]
    assert sorted(images_of(path, "all")) == sorted(names)
    with pytest.raises(UserError, match="has no split train; choose validation, test or all"):
        select("set", ["a.png", "val/a.png", "test/b.png"], "train")


def test_pictures_named_after_a_split_are_in_none():
    names = ["train_1.png", "test_1.png", "train.png"]
    assert select("set", names, "train").indices == [0, 1, 2]


def test_shards_are_named_by_their_split(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "tensorflow").mkdir(exist_ok=True)
        file = tmp_path / "tensorflow" / f"cats-{split}.tfrecord-00000-of-00001"
        file.write_bytes(record(example(image=bytes_feature(split.encode()))))
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"image": [split.encode()]})
        pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
    assert images_of(tmp_path / "tensorflow", "test") == images_of(tmp_path / "hub", "test") == ["test"]
    assert images_of(tmp_path / "tensorflow") == images_of(tmp_path / "hub") == ["train"]


def test_held_out_images_are_those_of_the_test_split_or_all_without_splits(tmp_path, monkeypatch):
    opened = []

    def load(settings, argument, fewest):
        opened.append(images_of(settings.dataset, settings.dataset_split))

    monkeypatch.setattr("hfgen.evaluation.reference.open_images", load)
    data = DataSettings(dataset="toy_paintings:3")
    held_out_of(str(write(tmp_path, "folder", "a.png", "b.png")), None, data)
    held_out_of(str(write(tmp_path, "zip", "train/a.png", "test/b.png")), None, data)
    assert opened == [["a.png", "b.png"], ["test/b.png"]]
    with pytest.raises(NoSplitsError):
        held_out_of(str(tmp_path / "set"), "test", data)


# Folders


@pytest.mark.parametrize("kind", KINDS)
def test_several_folders_are_used_together_with_a_note_and_one_can_be_chosen(tmp_path, kind):
    monet, photo = ["gan/monet_jpg/a.png", "gan/monet_jpg/deep/b.png"], ["gan/photo_jpg/c.png"]
    path = write(tmp_path, kind, *monet, *photo)
    assert images_of(path) == monet + photo
    (note,) = open_source(DataSettings(dataset=str(path))).notes
    assert note.startswith(
        "the images of 2 folders are used together: monet_jpg 2, photo_jpg 1; for one alone: --dataset "
    )
    chosen = note.rpartition("--dataset ")[2]
    assert chosen == f"{path}/gan/monet_jpg" and images_of(chosen) == monet
    assert images_of(f"{path}/gan/photo_jpg/") == photo
    if kind != "folder":
        with pytest.raises(UserError, match=r"gan/cezanne: no such folder in the archive; it has gan/monet_jpg, gan/"):
            images_of(f"{path}/gan/cezanne")


def test_the_note_on_folders_is_printed_and_not_published(tmp_path):
    for name in ("monet/a.png", "photo/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded(noise(16, 16)))
    report = load_images(DataSettings(dataset=str(tmp_path), sample_size=16)).report
    assert "note: the images of 2 folders are used together: monet 1, photo 1" in str(report)
    assert not any(str(tmp_path) in warning for warning in report.warnings)  # a card repeats them


def test_a_tar_that_a_folder_chose_for_its_split_is_not_searched_for_one(tmp_path, monkeypatch):
    for split, name in (("train", "a.png"), ("test", "b.png")):
        (tmp_path / "wds").mkdir(exist_ok=True)
        write(tmp_path, "tar", name).rename(tmp_path / "wds" / f"{split}.tar")
    assert images_of(tmp_path / "wds") == ["a.png"] and images_of(tmp_path / "wds", "test") == ["b.png"]
    assert images_of(tmp_path / "wds", "all") == ["b.png", "a.png"]
    # Nor is it taken for data without splits, all of which would be held out.
    opened = []

    def load(settings, argument, fewest):
        opened.append(images_of(settings.dataset, settings.dataset_split))

    monkeypatch.setattr("hfgen.evaluation.reference.open_images", load)
    held_out_of(str(tmp_path / "wds"), None, DataSettings(dataset=str(tmp_path / "wds")))
    assert opened == [["b.png"]]


@pytest.mark.parametrize(
    ("names", "chosen", "note"),
    [
        (["train/images/a.png", "train/masks/b.png", "test/images/c.png"], "train/images", "images 1, masks 1"),
        (["left/train/a.png", "left/val/c.png", "fine/train/b.png", "fine/val/d.png"], "fine", "fine 1, left 1"),
    ],
)
def test_several_folders_of_a_split_are_noted_too(tmp_path, names, chosen, note):
    path = write(tmp_path, "folder", *names)
    of_split, of_folders = open_source(DataSettings(dataset=str(path))).notes
    assert of_split.startswith("split train: 2 of ")
    assert of_folders.startswith(f"the images of 2 folders are used together: {note}; for one alone: --dataset {path}")
    assert of_folders.endswith(f"/{chosen}") and len(images_of(f"{path}/{chosen}")) == 1
    both = open_source(DataSettings(dataset=str(path), dataset_split="all")).notes
    assert both == []
