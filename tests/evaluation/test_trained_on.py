"""Scores against other images than a pipeline was trained on are called so, in reports, tables and cards."""

import json
import shutil

import pytest
from line_method import fit
from stand_in_features import Colours

from hfgen.commands import kaggle
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.evaluation.trained_on import was_trained_on
from hfgen.metrics import feature_spaces
from hfgen.metrics.report import OTHER_DATA, read_report, score_table
from hfgen.models import DCGANGenerator
from hfgen.pipelines import GANPipeline


MINE, OTHER = "toy_paintings:14", "toy_paintings:15"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run that was trained on the first 14 toy paintings."""
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    GANPipeline(DCGANGenerator(16, 4, base_channels=4).eval()).save_pretrained(tmp_path / "run" / "pipeline")
    record(tmp_path / "run")
    return tmp_path / "run"


def record(run, **settings):
    data = DataSettings(MINE, sample_size=16, **settings)
    (run / "training_config.json").write_text(json.dumps(vars(data) | {"seed": 0}))
    launch = {"from_step": 0, "data_digest": load_images(data).digest}
    (run / "launches.jsonl").write_text(json.dumps(launch) + "\n")


def known(source, reference):
    data = DataSettings(reference, sample_size=16)
    return was_trained_on(str(source), data, load_images(data))


def test_the_images_of_a_run_are_known_by_its_digest_however_it_cropped_them(run, tmp_path):
    for settings in ({}, {"crop": "random"}, {"five_crop": True}, {"drop_duplicates": True}):
        record(run, **settings)
        for source in (run, run / "pipeline"):
            assert (known(source, MINE), known(source, OTHER)) == (True, False)
    published = (run / "pipeline").rename(tmp_path / "published")
    assert known(published, OTHER) is None and known("owner/model", OTHER) is None
    launches = [json.loads((run / "launches.jsonl").read_text())]
    (published / "training.json").write_text(json.dumps({"launches": launches}))
    (run / "training_config.json").rename(published / "training_config.json")
    assert (known(published, MINE), known(published, OTHER)) == (True, False)


def test_a_run_of_an_earlier_version_is_known_by_its_checkpoint_and_a_stream_is_not(run):
    digest = json.loads((run / "launches.jsonl").read_text())["data_digest"]
    (run / "launches.jsonl").write_text('{"from_step": 0}\n')
    assert known(run, OTHER) is None
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "checkpoints" / "step-00000001" / "progress.json").write_text(f'{{"step": 1, "data_digest": "{digest}"}}')
    assert (known(run, MINE), known(run, OTHER)) == (True, False)
    settings = json.loads((run / "training_config.json").read_text())
    (run / "training_config.json").write_text(json.dumps(settings | {"streaming": True}))
    assert known(run, OTHER) is None


@pytest.mark.parametrize(("reference", "is_other"), [(MINE, False), (OTHER, True)])
def test_the_report_and_the_tables_name_other_data(reference, is_other, run, hfgen, tmp_path):
    arguments = ("--reference", reference, "--device", "cpu", "--num_images", "10")
    status, out, err = hfgen("evaluate", run, *arguments, "--output", tmp_path / "scores")
    assert status == 0
    report = read_report(tmp_path / "scores" / "evaluation.json")
    assert report["trained_on_reference"] is not is_other
    for text in (out, err, (tmp_path / "scores" / "evaluation.md").read_text(), score_table(report)):  # as on a card
        assert (OTHER_DATA in text) == is_other
    called = "reference" if is_other else "training"
    assert f"samples are nearer to a {called} image" in out and f"near to one {called} image" in out
    status, out, err = hfgen("compare", run, *arguments, "--output", tmp_path / "compared")
    assert status == 0 and (out + err).count(OTHER_DATA) == is_other  # once, before the work
    table = (tmp_path / "compared" / "comparison.md").read_text()
    assert (f"{run}: {OTHER_DATA}" in table) == (f"{run}: {OTHER_DATA}" in err) == is_other
    other = shutil.copytree(run, tmp_path / "other")
    status, out, err = hfgen("compare", run, other, *arguments, "--output", tmp_path / "both")
    assert status == 0 and (out + err).count(OTHER_DATA) == is_other
    assert (f"{run}, {other}: {OTHER_DATA}" in err) == is_other


def test_a_run_keeps_the_digest_of_its_images(tmp_path, fresh_accelerate_state):
    fit(tmp_path, digest="that of the images")
    assert json.loads((tmp_path / "launches.jsonl").read_text())["data_digest"] == "that of the images"


@pytest.mark.parametrize(("reference", "is_other"), [(MINE, False), (OTHER, True)])
def test_a_submission_to_kaggle_is_scored_with_the_same_warning(
    reference, is_other, run, hfgen, tmp_path, monkeypatch
):
    monkeypatch.setattr(kaggle, "MIN_IMAGES", 10)
    arguments = ("--reference", reference, "--device", "cpu", "--num_images", "10")
    status, _, err = hfgen("kaggle-zip", run, *arguments, "--output", tmp_path / "images.zip")
    assert status == 0 and (f"{run}: {OTHER_DATA}" in err) == is_other
