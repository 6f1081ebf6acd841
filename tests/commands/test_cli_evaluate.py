"""`hfgen evaluate` on a tiny generator, in part with the real Inception weights where they are installed."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_sheets import tiles
from PIL import Image
from stand_in_features import Colours

from hfgen.evaluation.reference import ReferenceImages
from hfgen.evaluation.scoring import closest_sheet, score_pipeline
from hfgen.metrics.memorisation import nearest_images
from hfgen.models import DCGANGenerator
from hfgen.pipelines import GANPipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    GANPipeline(DCGANGenerator(16, 4, base_channels=4).eval()).save_pretrained(folder)
    return folder


def test_a_pipeline_is_scored_with_the_floor_of_the_data(inception_weights, hfgen, pipeline, tmp_path):
    arguments = ("evaluate", pipeline, "--reference", "toy_paintings:14", "--device", "cpu", "--num_images", "10")
    status, out, _ = hfgen(*arguments, "--output", tmp_path / "scores")
    assert status == 0
    report = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    scores, floor = report["scores"], report["floor"]
    assert (scores["num_real"], scores["num_fake"], report["sample_size"]) == (14, 10, 16)
    assert (floor["split"]["num_real"], floor["split"]["num_fake"]) == (7, 7)
    # An untrained generator draws grey noise.
    assert scores["fid"] > 1.5 * floor["split"]["fid"] > 0 and scores["kid"] > 0
    assert scores["precision"] == scores["coverage"] == 0
    table = (tmp_path / "scores" / "evaluation.md").read_text()
    assert table in out
    assert (
        f"| FID | {scores['fid']:.4g} ± {scores['fid_standard_error']:.2g} | {floor['split']['fid']:.4g} ± " in table
    )
    assert "0 of 10 samples are nearer to a reference image" in table
    assert "It is not known whether the model was trained on these real images." in table
    # Samples above the nearest real images, in two rows of eight and two of two.
    sheet = tiles(tmp_path / "scores" / "closest.png", 4, 8, 16)
    assert (sheet[:2] < 255).any(axis=(2, 3, 4)).all() and (sheet[2:, 2:] == 255).all()
    assert "fid_at_infinity" not in report
    again = hfgen(*arguments, "--output", tmp_path / "again")
    assert again[0] == 0
    second = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert second["scores"] == scores and second["floor"] == floor


def test_scores_that_cannot_be_written_are_printed_and_kept_as_far_as_possible(
    colours, hfgen, pipeline, tmp_path, monkeypatch
):
    def save(image, file, *arguments, **options):
        if str(file).endswith("closest.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(image, file, *arguments, **options)

    original = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", save)
    output = tmp_path / "scores"
    status, out, err = hfgen("evaluate", pipeline, "--reference", "toy_paintings:14", "--output", output)
    assert status == 2 and f"error: could not write {output}: [Errno 28]" in err
    assert "| FID | " in out and json.loads((output / "evaluation.json").read_text())["scores"]["fid"] > 0


def test_scores_are_printed_though_another_command_has_taken_their_folder(
    colours, hfgen, pipeline, tmp_path, monkeypatch
):
    def score(*arguments, **options):
        output.mkdir()
        (output / "note.txt").write_text("of another command")
        return score_pipeline(*arguments, **options)

    output = tmp_path / "scores"
    monkeypatch.setattr("hfgen.evaluation.scoring.score_pipeline", score)
    status, out, err = hfgen("evaluate", pipeline, "--reference", "toy_paintings:14", "--output", output)
    assert status == 2 and f"--output {output}: another command has written there meanwhile; choose another" in err
    assert "| FID | " in out and [file.name for file in output.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("what", ["folder", "report"])
def test_scores_are_printed_though_they_cannot_be_written(colours, hfgen, pipeline, tmp_path, monkeypatch, what):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def score(*arguments, **options):
        scored = score_pipeline(*arguments, **options)
        monkeypatch.setattr(Path, {"folder": "mkdir", "report": "write_text"}[what], fail)
        return scored

    monkeypatch.setattr("hfgen.evaluation.scoring.score_pipeline", score)
    output = tmp_path / "scores"
    arguments = ("evaluate", pipeline, "--reference", "toy_paintings:14", "--repeats", "2", "--output", output)
    status, out, err = hfgen(*arguments)
    assert status == 2 and f"error: could not write {output}: [Errno 28]" in err and "| FID | " in out


def test_the_closest_pairs_are_shown_nearest_first_the_generated_image_above():
    """Grey levels for images; their features point away from the real ones by an angle that grows with the index."""
    real_images = [np.full((4, 4, 3), level, np.uint8) for level in (10, 20, 30)]
    drawn = np.stack([np.full((4, 4, 3), 100 + level, np.uint8) for level in range(4)])
    angles = np.array([0.4, 0.1, 0.3, 0.2])
    features = np.stack([np.cos(angles), np.sin(angles), np.zeros(4)], axis=1)
    features[2] = features[2][[2, 1, 0]]  # near the third real image instead of the first
    real = ReferenceImages(real_images, np.eye(3), Path(), Colours())
    sheet = tiles(closest_sheet(real, drawn, *nearest_images(features, real.features)[:2]), 2, 4, 4)
    assert sheet[0, :, 0, 0, 0].tolist() == [101, 103, 102, 100]
    assert sheet[1, :, 0, 0, 0].tolist() == [10, 10, 30, 10]


def test_fid_is_extrapolated_if_asked_for(inception_weights, hfgen, pipeline, tmp_path):
    arguments = ("evaluate", pipeline, "--reference", "toy_paintings:12", "--device", "cpu", "--num_images", "20")
    assert hfgen(*arguments, "--extrapolate", "--output", tmp_path / "scores")[0] == 0
    report = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert 0 < report["fid_at_infinity"] < report["scores"]["fid"]
    estimate = f"{report['fid_at_infinity']:.4g} (a rough estimate, with fewer images than it needs)"
    told = f"FID extrapolated to infinitely many generated images: {estimate}."
    assert told in (tmp_path / "scores" / "evaluation.md").read_text()
    few = (*arguments[:-1], "19", "--extrapolate", "--output", tmp_path / "few")
    status, _, error = hfgen(*few)
    assert status == 2 and "--extrapolate needs at least 20 images, not 19" in error
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--mode", "dirty"), "--mode dirty: must be clean or legacy"),
        (("--feature_weights", "gone.pt"), "--feature_weights gone.pt: no such file"),
        (("--reference", "no/such/folder"), "no/such/folder"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(inception_weights, refusal, pipeline, tmp_path, arguments, told):
    line = refusal("evaluate", pipeline, "--reference", "toy_paintings:14", "--output", tmp_path / "out", *arguments)
    assert told in line and not (tmp_path / "out").exists()


def test_too_few_real_images_are_refused(inception_weights, refusal, pipeline, tmp_path):
    line = refusal("evaluate", pipeline, "--reference", "toy_paintings:11", "--output", tmp_path / "out")
    assert "--reference toy_paintings:11: 11 images are too few" in line


def test_a_folder_with_something_in_it_is_left_alone(refusal, pipeline, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    line = refusal("evaluate", pipeline, "--reference", "toy_paintings:14", "--output", tmp_path)
    assert f"--output {tmp_path} exists and is not empty" in line


def test_images_that_something_else_drew_are_scored_on_the_same_terms(colours, hfgen, refusal, pipeline, tmp_path):
    terms = ("--reference", "toy_paintings:14", "--device", "cpu")
    assert hfgen("evaluate", pipeline, *terms, "--num_images", "12", "--output", tmp_path / "drawn")[0] == 0
    assert hfgen("sample", pipeline, "--device", "cpu", "--num_images", "12", "--output", tmp_path / "samples")[0] == 0
    arguments = ("evaluate-images", tmp_path / "samples", *terms, "--sample_size", "16")
    assert hfgen(*arguments, "--output", tmp_path / "scored")[0] == 0
    drawn, scored = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("drawn", "scored"))
    for key in ("scores", "floor", "memorisation", "memorisation_by_pixels", "sample_size", "features"):
        assert scored[key] == drawn[key]
    assert (tmp_path / "scored" / "closest.png").read_bytes() == (tmp_path / "drawn" / "closest.png").read_bytes()
    assert "name: samples" in (tmp_path / "scored" / "model-index.yml").read_text()
    (tmp_path / "few").mkdir()
    (tmp_path / "samples" / "000000.png").rename(tmp_path / "few" / "0.png")
    arguments = ("evaluate-images", tmp_path / "few", *terms, "--sample_size", "16", "--output", tmp_path / "none")
    assert f"IMAGES {tmp_path / 'few'}: 1 image, but 10 are needed" in refusal(*arguments)


def test_a_collapsed_generator_is_scored_wherever_its_images_come_from(colours, hfgen, tmp_path):
    (tmp_path / "same").mkdir()
    for index in range(10):
        Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / "same" / f"{index}.png")
    terms = ("--reference", "toy_paintings:14", "--device", "cpu", "--sample_size", "16")
    assert hfgen("evaluate-images", tmp_path / "same", *terms, "--output", tmp_path / "scored")[0] == 0
    report = json.loads((tmp_path / "scored" / "evaluation.json").read_text())
    assert report["scores"]["num_fake"] == 10 and report["scores"]["recall"] == 0
    # Nobody knows what another program was trained on.
    assert "nearer to a reference image" in report["memorisation"]["statement"]
    assert "It is not known whether" not in (tmp_path / "scored" / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--num_inference_steps", "5"), "--num_inference_steps applies only to diffusion"),
        (("--sample_from", "prior"), "--sample_from applies only to a VAE"),
        (("--held_out", "no/such/folder"), "--held_out no/such/folder"),
        (("--held_out", "toy_paintings:1"), "--held_out toy_paintings:1: 1 image, but 2 are needed"),
        (("--extrapolate", "--num_images", "19"), "--extrapolate needs at least 20 images, not 19"),
    ],
)
def test_what_cannot_be_is_refused_before_the_features_of_the_real_images(
    refusal, pipeline, tmp_path, monkeypatch, arguments, told
):
    monkeypatch.setattr("hfgen.metrics.feature_spaces.build_extractor", lambda *_: pytest.fail("the work has begun"))
    common = ("--reference", "toy_paintings:14", "--output", tmp_path / "out", "--device", "cpu")
    assert told in refusal("evaluate", pipeline, *common, *arguments)
