"""What is kept of a trained cell: scores, curve, pictures."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stand_in_features import Colours

import hfgen.studies.results
from hfgen.errors import UserError
from hfgen.evaluation.reference import load_reference
from hfgen.evaluation.scoring import score_pipeline
from hfgen.inference.figures import image_sheet
from hfgen.inference.opening import open_pipeline
from hfgen.inference.sampling import SamplingOptions, generate_images
from hfgen.studies.cells import ALL_CHECKPOINTS, Cell
from hfgen.studies.launch import Workspace
from hfgen.studies.results import (
    MAX_CURVE_POINTS,
    MAX_PICTURE_BYTES,
    MAX_SHOWN_PIXELS,
    MAX_WARNINGS,
    Result,
    Scorer,
    curve_entries,
    data_settings,
    decode_picture,
    encode_picture,
    encode_sheet,
    merged_warnings,
    training_summary,
)
from hfgen.studies.study_file import Evaluation
from hfgen.training.checkpoints import list_checkpoints, load_progress


METHODS = {"gan": "GAN", "vae": "VAE", "ddpm": "DDPM"}


@pytest.fixture(scope="module")
def workspace(runs, tmp_path_factory):
    """A worker's workspace in which each toy run is the cell of that name."""
    output = tmp_path_factory.mktemp("study")
    (output / "cells").mkdir()
    for method, folder in runs.items():
        (output / "cells" / method).symlink_to(folder)
    config = json.loads((runs["gan"] / "training_config.json").read_text())
    return Workspace(output, output, config["dataset"])


@pytest.fixture
def scorer(workspace, monkeypatch):
    monkeypatch.setattr(hfgen.studies.results, "build_extractor", lambda *_: Colours())
    return Scorer(Evaluation(num_images=12, seed=3, num_inference_steps=4), workspace)


def cell(workspace, method):
    settings = json.loads((workspace.output / "cells" / method / "training_config.json").read_text())
    return Cell(method, method, settings)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_cell_is_scored_as_hfgen_evaluate_does_it(method, workspace, scorer):
    result = scorer.score(cell(workspace, method))
    pipeline = open_pipeline(str(workspace.output / "cells" / method))
    steps = min(4, pipeline.scheduler.config.num_train_timesteps) if method == "ddpm" else None
    real = load_reference(data_settings(cell(workspace, method), workspace), Colours(), "--dataset")
    evaluated = score_pipeline(pipeline, real, SamplingOptions(12, 3, steps)).report
    assert result.summary["scores"] == evaluated["scores"] and result.is_finite
    assert result.summary["floor"] == evaluated["floor"]
    assert result.summary["weights_sha256"] == evaluated["weights_sha256"]
    assert result.summary["data_digest"] == real.images.digest
    # The pictures are the first ones of the evaluation, but for what JPEG does to them.
    expected = np.asarray(
        image_sheet(list(generate_images(pipeline, SamplingOptions(32, 3, steps, 32))), 8), np.float32
    )
    assert np.abs(np.asarray(decode_picture(result.sheet), np.float32) - expected).mean() < 12
    assert bool(result.strip) == (method == "ddpm")
    assert json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False)) == dataclasses.asdict(result)


@pytest.mark.parametrize("method", METHODS)
def test_each_checkpoint_on_the_way_is_scored_as_the_end_is(method, workspace, monkeypatch):
    monkeypatch.setattr(hfgen.studies.results, "build_extractor", lambda *_: Colours())
    evaluation = Evaluation(num_images=12, seed=3, num_inference_steps=4, every_images=1)
    of_cell = cell(workspace, method)
    of_cell.settings["checkpoint_every"] = 1
    summary = Scorer(evaluation, workspace).score(of_cell).summary
    folder = workspace.output / "cells" / method
    checkpoints = list_checkpoints(folder / "checkpoints")
    real = load_reference(data_settings(cell(workspace, method), workspace), Colours(), "--dataset")
    expected = []
    for checkpoint in [*checkpoints[:-1], workspace.output / "cells" / method]:
        pipeline = open_pipeline(str(checkpoint))
        progress = load_progress(checkpoint if checkpoint in checkpoints else checkpoints[-1])
        steps = min(4, pipeline.scheduler.config.num_train_timesteps) if method == "ddpm" else None
        options = SamplingOptions(12, 3, steps)
        scores = score_pipeline(pipeline, real, options).report["scores"]
        expected.append({"images": progress["images"], "fid": scores["fid"]})
    assert len(expected) > 1
    assert [point["images"] for point in summary["course"]] == [point["images"] for point in expected]
    assert [point["fid"] for point in summary["course"]] == pytest.approx([point["fid"] for point in expected])


@pytest.mark.parametrize(("gone", "told"), [([], []), ([2], ["1 of 2"]), ([2, 4, 6], ["2 of 2"])])
def test_checkpoints_that_are_gone_before_they_are_scored_are_told(runs, tmp_path, monkeypatch, gone, told):
    """As after a first score, in the same folder but with another database."""
    monkeypatch.setattr(hfgen.studies.results, "build_extractor", lambda *_: Colours())
    (tmp_path / "cells").mkdir()
    folder = shutil.copytree(runs["gan"], tmp_path / "cells" / "gan")
    for step in gone:
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    here = Workspace(tmp_path, tmp_path, json.loads((folder / "training_config.json").read_text())["dataset"])
    of_cell = cell(here, "gan")
    of_cell.settings.update(checkpoint_every=2, max_train_steps=6, checkpoints_total_limit=ALL_CHECKPOINTS)
    summary = Scorer(Evaluation(num_images=12, every_images=1), here).score(of_cell).summary
    warnings = [one.partition(" are gone, so")[0] for one in summary["training"]["warnings"] if "checkpoints" in one]
    assert warnings == [f"checkpoints to score: {part}" for part in told]
    assert len(summary["course"]) == 3 - len({2, 4} & {*gone})


def test_a_vae_is_sampled_from_where_the_study_says(workspace, monkeypatch):
    monkeypatch.setattr(hfgen.studies.results, "build_extractor", lambda *_: Colours())
    scored = {
        source: Scorer(Evaluation(num_images=12, sample_from=source), workspace).score(cell(workspace, "vae"))
        for source in ("prior", "ex_post", None)
    }
    fids = {source: result.summary["scores"]["fid"] for source, result in scored.items()}
    assert fids["ex_post"] == fids[None] != fids["prior"]
    assert scored["ex_post"].sheet == scored[None].sheet != scored["prior"].sheet


def test_the_training_is_summed_up_from_what_the_run_wrote(tmp_path):
    (tmp_path / "status.json").write_text('{"status": "complete", "reason": "", "step": 30, "seconds": 90.0}')
    launches = [{"from_step": 0, "device": "cpu", "torch": "2"}, {"from_step": 10, "device": "cuda", "torch": "2"}]
    (tmp_path / "launches.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in launches))
    events = [(5, "rollback", "worse"), (8, "warning", "copies"), (9, "rollback", "again")]
    lines = [json.dumps({"step": step, "event": event, "what": what}) + "\n" for step, event, what in events]
    (tmp_path / "events.jsonl").write_text("".join(lines))
    log = [
        {"step": 10 * index, "images": 40 * index, "images_per_second": speed} for index, speed in enumerate((1, 9, 5))
    ]
    summary = training_summary(tmp_path, log)
    assert summary["environment"] == {"device": "cuda", "torch": "2"}  # of the last launch
    training = summary["training"]
    assert (training["steps"], training["images"], training["minutes"]) == (30, 80, 1.5)
    assert (training["images_per_second"], training["launches"], training["rollbacks"]) == (5, 2, 2)
    assert training["warnings"] == ["step 8: copies"]


def test_warnings_that_differ_only_in_their_numbers_are_told_once():
    collapsed = "the generator has collapsed: its images have {}% of the data's diversity and cover {:.1f}% of it"
    events = [{"step": step, "what": collapsed.format(step // 250, 5e5 / step)} for step in range(1500, 25_001, 250)]
    events.insert(1, {"step": 1600, "what": "the discriminator ranks 99.8% of real/generated pairs correctly"})
    events.insert(2, {"step": 1600, "what": "copies"})
    assert merged_warnings([*events, *events[-2:]]) == [  # killed and resumed, it has repeated two checks
        "steps 1,500 to 25,000, 95 times, at last: " + collapsed.format(100, 20.0),
        "step 1600: the discriminator ranks 99.8% of real/generated pairs correctly",
        "step 1600: copies",
    ]


def test_so_many_warnings_that_a_database_would_refuse_them_are_cut():
    kinds = [f"{letter * 30_000} was {letter}" for letter in "abcdefghijklmnopqrstuvwxyzäöü"]
    warnings = merged_warnings([{"step": step, "what": what} for step, what in enumerate(kinds)])
    assert len(warnings) == MAX_WARNINGS and warnings[0].startswith("step 0: aaa") and warnings[0].endswith("a …")
    assert warnings[-1] == f"{len(kinds) - MAX_WARNINGS + 1} more kinds of warnings, in events.jsonl"
    assert len(json.dumps(warnings)) < 65_535 / 4


def test_a_curve_is_thinned_evenly_and_keeps_its_end():
    log = [{"step": step, "images": 64 * step, "loss": 1 / step, "seconds": float(step)} for step in range(1, 1002)]
    curve = curve_entries(log)
    assert len(curve) <= MAX_CURVE_POINTS and curve[-1]["step"] == 1001
    assert len({after["step"] - before["step"] for before, after in zip(curve[:-1], curve[1:], strict=True)}) == 1
    assert curve[-1]["loss"] == pytest.approx(1 / 1001, rel=1e-4) and "images" not in curve[0]
    assert [entry["step"] for entry in curve_entries(log[:150])] == list(range(1, 151))


LONG_VAE = Path(__file__).resolve().parents[2] / "model_cards" / "cat_faces_vae" / "metrics.jsonl"


def test_the_curve_of_a_long_training_fits_into_a_field_of_mysql():
    lines = [json.loads(line) for line in LONG_VAE.read_text().splitlines()]
    log = [{**line, "step": 50 * index, "loss_d": 1.06623, "loss_g": 1.71364} for index, line in enumerate(lines * 5)]
    curve = curve_entries(log)
    assert {"loss", "loss_d", "loss_g", "kl_loss"} <= log[-1].keys()
    assert all(entry.keys() == {"step", "loss", "loss_d", "loss_g"} for entry in curve)
    assert len(curve) > MAX_CURVE_POINTS / 2 and bytes_in_a_database(curve) < 65_535 / 2
    many = [{"step": line["step"], **{f"loss_of_term_{index}": line["loss"] for index in range(30)}} for line in log]
    thinned = curve_entries(many)
    assert bytes_in_a_database(thinned) < 65_535 and len(thinned) > 20 and thinned[-1]["step"] == log[-1]["step"]


def bytes_in_a_database(curve):
    """`storage` makes a text of a curve, and Optuna a JSON text of that."""
    return len(json.dumps(json.dumps(curve)))


def test_a_picture_is_made_small_enough_for_a_database_and_not_worse_than_that():
    smooth = Image.linear_gradient("L").resize((500, 300)).convert("RGB")
    assert decode_picture(encode_picture(smooth)).size == (500, 300)
    noise = noisy(600)
    text = encode_picture(noise)
    assert len(text) < 65_535  # a column of text in MySQL
    assert len(text) * 3 / 4 <= MAX_PICTURE_BYTES < 2 * len(text) and 75 <= decode_picture(text).width < 600


def test_a_sheet_of_large_images_is_reduced_and_one_of_noise_shows_fewer():
    smooth = [Image.new("RGB", (256, 256), (8 * index, 100, 200)) for index in range(32)]
    sheet = decode_picture(encode_sheet(smooth))
    assert sheet.size == (8 * (MAX_SHOWN_PIXELS + 2) - 2, 4 * (MAX_SHOWN_PIXELS + 2) - 2)
    text = encode_sheet([noisy(MAX_SHOWN_PIXELS)] * 32)
    assert len(text) < 65_535 and decode_picture(text).width == sheet.width
    assert decode_picture(text).height < sheet.height


def test_the_colours_of_small_images_stay():
    # One pixel red, the next blue: colours at half the resolution would make violet of it.
    pattern = np.zeros((32, 32, 3), np.uint8)
    pattern[:, ::2, 0], pattern[:, 1::2, 2] = 200, 200
    kept = np.asarray(decode_picture(encode_sheet([Image.fromarray(pattern)] * 8)), np.float32)[:32, :32]
    assert np.abs(kept - pattern).mean() < 10


def noisy(size):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def test_a_generator_whose_images_cannot_be_scored_is_not_finite(workspace, scorer):
    result = scorer.score(cell(workspace, "gan"))
    lost = dataclasses.replace(result, summary={**result.summary, "scores": {**result.summary["scores"], "fid": None}})
    assert result.is_finite and not lost.is_finite


def test_a_cell_whose_run_is_of_another_size_than_its_settings_say_is_refused(workspace, scorer):
    other = cell(workspace, "gan")
    other.settings["sample_size"] *= 2
    with pytest.raises(UserError, match="gan: generates 16-pixel images, but was to be trained at 32"):
        scorer.score(other)


@pytest.mark.parametrize(("fid", "is_finite"), [(0.0, True), (12.5, True), (None, False), (float("inf"), False)])
def test_a_fid_of_zero_is_a_score_and_a_missing_one_is_not(fid, is_finite):
    assert Result({"scores": {"fid": fid}}, [], "", "").is_finite is is_finite
