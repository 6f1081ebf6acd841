"""`hfgen kaggle-zip`: what Kaggle would refuse is refused here, and the rest is as it asks for."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in_features import Colours, paintings, quarters

from hfgen.commands import kaggle as kaggle_command
from hfgen.inference import sampling as inference
from hfgen.metrics import feature_spaces
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.memorisation import memorisation_informed_fid
from hfgen.models import DCGANGenerator
from hfgen.pipelines import GANPipeline


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Two tiny generators, of 8 and of 256 pixels."""
    folders = {}
    for size in (8, 256):
        torch.manual_seed(0)
        folders[size] = tmp_path_factory.mktemp(f"pixels{size}")
        GANPipeline(DCGANGenerator(size, 4, base_channels=1).eval()).save_pretrained(folders[size])
    return folders


def test_the_zip_holds_so_many_jpegs_of_256_pixels_with_names_of_their_own(hfgen, pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle_command, "MIN_IMAGES", 12)
    target = tmp_path / "images.zip"
    arguments = ("kaggle-zip", pipelines[8], "--device", "cpu", "--batch_size", "5", "--seed", "3")
    arguments += ("--num_images", "13")
    status, out, _ = hfgen(*arguments, "--output", target)
    assert status == 0
    assert "this pipeline generates 8-pixel images; they are resized to 256" in out and "13 JPEGs" in out
    with zipfile.ZipFile(target) as archive:
        names = archive.namelist()
        assert len(set(names)) == len(names) == 13 and names[0] == "00000.jpg"
        pictures = [Image.open(io.BytesIO(archive.read(name))) for name in (names[0], names[12])]
    for picture in pictures:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (256, 256))
    assert np.asarray(pictures[0]).tobytes() != np.asarray(pictures[1]).tobytes()
    # The first is what `hfgen sample` draws first.
    assert hfgen("sample", pipelines[8], "--device", "cpu", "--num_images", "1", "--seed", "3",
                 "--output", tmp_path / "one")[0] == 0  # fmt: skip
    drawn = Image.open(tmp_path / "one" / "000000.png").resize((256, 256), Image.Resampling.BICUBIC)
    difference = np.asarray(pictures[0], dtype=np.float64) - np.asarray(drawn, dtype=np.float64)
    assert np.abs(difference).mean() < 3
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--num_images", "6999"), "--num_images 6999: the competition accepts 7,000 to 10,000"),
        (("--num_images", "10001"), "--num_images 10001: the competition accepts"),
        (("--size", "128"), "--size 128: the competition accepts only images of 256 pixels"),
        (("--output", "images.tar"), "--output images.tar: must end in .zip"),
    ],
)
def test_what_kaggle_would_refuse_is_refused(refusal, pipelines, arguments, told, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert told in refusal("kaggle-zip", pipelines[256], *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_zip_that_is_there_is_left_alone(refusal, pipelines, tmp_path):
    (tmp_path / "images.zip").write_bytes(b"mine")
    line = refusal("kaggle-zip", pipelines[256], "--output", tmp_path / "images.zip")
    assert "exists; choose another name" in line and (tmp_path / "images.zip").read_bytes() == b"mine"


@pytest.fixture
def few(monkeypatch):
    """Let twelve images be enough."""
    monkeypatch.setattr(kaggle_command, "MIN_IMAGES", 12)
    return "--device", "cpu", "--num_images", "12", "--batch_size", "5"


def test_what_is_scored_are_the_jpegs_that_are_packed(hfgen, pipelines, tmp_path, monkeypatch, few):
    asked_for = []
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *given: asked_for.append(given[:3]) or Colours())
    monkeypatch.setattr(kaggle_command, "JPEG_QUALITY", 5)  # so that it makes a difference
    target = tmp_path / "images.zip"
    scored = ("--reference", "toy_paintings:13", "--feature_weights", "some/file")
    status, out, _ = hfgen("kaggle-zip", pipelines[8], *few, *scored, "--output", target)
    assert status == 0 and asked_for == [("inception", "clean", "some/file")]
    with zipfile.ZipFile(target) as archive:
        packed = [Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    assert (
        hfgen("sample", pipelines[8], "--device", "cpu", "--num_images", "12", "--output", tmp_path / "drawn")[0] == 0
    )
    drawn = [Image.open(file).resize((256, 256), Image.Resampling.BICUBIC)
             for file in sorted((tmp_path / "drawn").glob("0*.png"))]  # fmt: skip
    real = features_of(paintings(range(13), 256))
    told = []
    for images in (packed, drawn):
        assert len(images) == 12
        fake = features_of(images)
        mifid, fid = memorisation_informed_fid(real, fake), frechet_distance(real, fake)
        told.append(f"local MiFID {mifid:.4g} (FID {fid:.4g}) against the 13 images of toy_paintings:13")
    assert told[0] in out and told[1] not in out and told[0] != told[1]
    assert mifid > fid and memorisation_informed_fid(fake, real) != mifid
    assert "Kaggle's own score will differ, because its real images are hidden" in out


def features_of(images):
    return np.stack([quarters(image) for image in images]).astype(np.float32)


def test_a_misspelt_reference_is_refused_before_anything_is_drawn(refusal, pipelines, tmp_path, monkeypatch, few):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    monkeypatch.setattr(inference, "generate_images", lambda *_, **options: pytest.fail("drawn"))
    target = tmp_path / "images.zip"
    line = refusal("kaggle-zip", pipelines[256], *few, "--reference", "no/such/folder", "--output", target)
    assert "no/such/folder" in line and list(tmp_path.iterdir()) == []


def test_what_a_pipeline_cannot_do_is_refused_before_the_features_of_the_reference(
    refusal, pipelines, tmp_path, monkeypatch, few
):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: pytest.fail("loaded"))
    target, reference = tmp_path / "images.zip", ("--reference", "toy_paintings:14", "--num_inference_steps", 10)
    line = refusal("kaggle-zip", pipelines[256], *few, *reference, "--output", target)
    assert "--num_inference_steps applies only to diffusion" in line


def test_without_a_reference_no_features_are_needed(hfgen, pipelines, tmp_path, monkeypatch, few):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: pytest.fail("loaded"))
    status, out, _ = hfgen("kaggle-zip", pipelines[8], *few, "--output", tmp_path / "images.zip")
    assert (
        status == 0
        and "give --reference to compute the MiFID against images of your own" in out
        and "local MiFID" not in out
    )
