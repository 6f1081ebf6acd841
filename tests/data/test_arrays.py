"""Images in numpy's .npy and .npz files."""

import numpy as np
import pytest
from picture_files import noise

from hfgen.data.opening import open_source
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.errors import UserError


IMAGES = np.stack([noise(16, 16, seed) for seed in range(3)])
GREY = IMAGES[..., 0]


def pixels_of(path, **settings) -> np.ndarray:
    return load_images(DataSettings(dataset=str(path), sample_size=16, **settings)).as_array()


@pytest.mark.parametrize("suffix", ["npy", "npz", "packed"])
@pytest.mark.parametrize("kind", ["colour", "grey", "grey with channel", "12 bits"])
def test_an_array_of_images_is_read(tmp_path, suffix, kind):
    twelve_bits = GREY.astype(np.uint16) * 16 + 15
    array = {"colour": IMAGES, "grey": GREY, "grey with channel": GREY[..., None], "12 bits": twelve_bits}[kind]
    path = tmp_path / f"set.{'npy' if suffix == 'npy' else 'npz'}"
    save = {"npy": lambda file, array: np.save(file, array), "npz": lambda file, array: np.savez(file, images=array)}
    save.get(suffix, lambda file, array: np.savez_compressed(file, images=array, labels=np.arange(3)))(path, array)
    wanted = IMAGES if kind == "colour" else np.repeat(GREY[..., None], 3, axis=3)
    assert np.abs(pixels_of(path).astype(int) - wanted).max() <= (1 if kind == "12 bits" else 0)


@pytest.mark.parametrize("names", [("train_images", "test_images"), ("x_train", "x_test"), ("train-x", "test.x")])
def test_of_arrays_named_by_split_that_of_the_split_is_taken(tmp_path, names):
    np.savez(
        tmp_path / "set.npz", **dict(zip(names, (IMAGES[:2], IMAGES[2:]), strict=True)), train_labels=np.arange(2)
    )
    assert np.array_equal(pixels_of(tmp_path / "set.npz"), IMAGES[:2])
    assert np.array_equal(pixels_of(tmp_path / "set.npz", dataset_split="test"), IMAGES[2:])
    assert np.array_equal(pixels_of(tmp_path / "set.npz", dataset_column=names[1]), IMAGES[2:])
    with pytest.raises(UserError, match="--dataset_split nonsense: there is no array of that name"):
        pixels_of(tmp_path / "set.npz", dataset_split="nonsense")
    with pytest.raises(UserError, match=f"--dataset_column {names[0]}, --dataset_split test: each selects an array"):
        pixels_of(tmp_path / "set.npz", dataset_column=names[0], dataset_split="test")


def test_of_several_arrays_one_must_be_chosen(tmp_path):
    np.savez(tmp_path / "set.npz", left=IMAGES, right=IMAGES[:1])
    with pytest.raises(
        UserError, match=r"several image columns: \['left', 'right'\]; choose one with --dataset_column"
    ):
        pixels_of(tmp_path / "set.npz")
    assert len(pixels_of(tmp_path / "set.npz", dataset_column="right")) == 1


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (IMAGES / 255, "has type float64"),
        (IMAGES[0], r"has shape \(16, 16, 3\), as one picture in colour has \(save it as .png\)"),
        (np.zeros((3, 5, 16, 16), np.uint8), r"has shape \(3, 5, 16, 16\)"),
        (np.asfortranarray(IMAGES), "is in Fortran order"),
        (np.array([{"a": 1}], dtype=object), "has shape"),
        (np.zeros((0, 16, 16, 3), np.uint8), "has shape"),
    ],
)
def test_an_array_of_something_else_is_refused_with_the_reason_and_never_unpickled(tmp_path, array, reason):
    np.save(tmp_path / "set.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=f"set.npy has no images .*{reason}"):
        pixels_of(tmp_path / "set.npy")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_damaged_or_truncated_file_is_an_error_that_names_it(tmp_path, suffix):
    path = tmp_path / f"set.{suffix}"
    np.save(path, IMAGES) if suffix == "npy" else np.savez(path, images=IMAGES)
    whole = path.read_bytes()
    unclosed = whole.replace(b"), }", b"(, }")  # which Python's parser refuses with an error of its own
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:20], whole[:200], unclosed):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"set.{suffix}"):
            list(open_source(DataSettings(dataset=str(path))).images())


def test_damage_anywhere_in_packed_arrays_is_read_or_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, images=np.repeat(IMAGES, 2, axis=1))
    whole, errors = path.read_bytes(), 0
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + b"\xff\x7f\x80" + whole[place + 3 :])
        try:
            list(open_source(DataSettings(dataset=str(path))).images())
        except UserError as error:
            errors += "set.npz" in str(error)
    assert errors > len(whole) / 10
