"""The trained pipelines of model_cards/: they load everywhere, and generate what their cards show."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from labelled_sheets import tiles
from stand_in_features import Colours

from hfgen.inference.opening import open_pipeline
from hfgen.inference.sampling import SamplingOptions, generate_images, image_size, weights_digest
from hfgen.metrics import feature_spaces
from hfgen.publishing.load_check import check_loads_anywhere


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(file.parent for file in (ROOT / "model_cards").glob("*/model_index.json"))
MAX_MEGABYTES = 53  # of all together: a clone stays small
CARDS = "\n".join(file.read_text() for file in (ROOT / "model_cards").glob("*.md"))
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def test_there_are_some_and_together_they_are_small():
    names = {"cat_faces_ddpm", "cat_faces_gan", "cat_faces_vae", "monet_ddpm"}
    assert {folder.name for folder in FOLDERS} >= names
    total = sum(file.stat().st_size for folder in FOLDERS for file in folder.rglob("*"))
    assert total <= MAX_MEGABYTES * 1e6


@each_folder
def test_they_generate_the_images_of_their_sheets(folder):
    pipeline = open_pipeline(str(folder), "cpu", plain=True)
    steps = json.loads((folder / "evaluation.json").read_text())["num_inference_steps"]
    images = np.stack([np.asarray(image) for image in generate_images(pipeline, SamplingOptions(4, 0, steps, 4))])
    shown = tiles(folder / "samples" / "sheet.png", 4, 4, image_size(pipeline), captions=True)[0]  # the first row
    assert np.abs(shown.reshape(images.shape) - images.astype(int)).mean() < 1  # grey levels, on any CPU
    assert np.ptp(images, axis=0).mean() > 50  # they differ from each other


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cat_faces_gan", "cat_faces_vae", "monet_ddpm"])  # one of each class
def test_they_load_in_diffusers_alone(name):
    check_loads_anywhere(ROOT / "model_cards" / name)


@each_folder
def test_their_code_is_that_of_this_version(folder):
    source = {file.name: file for place in ("pipelines", "hfgen/models") for file in (ROOT / place).glob("*.py")}
    for copy in folder.rglob("*.py"):
        original = source[copy.name].relative_to(ROOT)
        assert copy.read_text() == (ROOT / original).read_text(), f"run: cp {original} {copy.relative_to(ROOT)}"


@each_folder
def test_their_cards_give_the_scores_of_these_weights(folder):
    report = json.loads((folder / "evaluation.json").read_text())
    pipeline = open_pipeline(str(folder), "cpu", plain=True)
    assert report["weights_sha256"] == weights_digest(pipeline)
    assert f"FID {report['scores']['fid']:.1f}" in CARDS and f"({folder.name}/README.md)" in CARDS
    card = (folder / "README.md").read_text()
    assert f"| FID | {report['scores']['fid']:.4g} " in card and "\nlicense: apache-2.0\n" in card
    assert "Measured before the weights were rounded" not in card


def test_they_are_compared(hfgen, monkeypatch, tmp_path):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours("inception-2015 stand-in"))
    arguments = ["--reference", "toy_paintings:14", "--num_images", "10", "--device", "cpu"]
    cats = [folder for folder in FOLDERS if folder.name.startswith("cat_faces")]  # of one image size
    status, output, _ = hfgen("compare", *cats, *arguments, "--output", str(tmp_path / "compared"))
    assert status == 0 and all(re.search(rf"{folder.name}(, 10 steps)?: FID", output) for folder in cats)
