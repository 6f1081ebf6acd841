"""The `model-index` of a model card, from a report made by hand."""

import copy

import pytest
from huggingface_hub import ModelCard, ModelCardData

from hfgen.hub.model_index import METRICS, model_index
from hfgen.metrics.report import finite, score_names


SCORES = {"fid": 31.41592653, "kid": 0.0271828, "precision": 0.5, "recall": 0.25, "mifid": 62.8, "coverage": 0.75}
REPORT = {
    "reference": "huggan/few-shot-dog",
    "seed": 3,
    "num_inference_steps": None,
    "features": "inception-2015 clean 7ff4",
    "scores": {"num_real": 2000, "num_fake": 5000, **SCORES},
    "floor": {"split": {"num_real": 1000, "num_fake": 1000, **{name: value / 10 for name, value in SCORES.items()}}},
}


def card(**changes):
    """The card whose head the text is."""
    text = model_index({**copy.deepcopy(REPORT), **changes}, "my-gan")
    return ModelCard(f"---\n{text}---\n\n# My GAN\n", ignore_metadata_errors=False)


def test_a_card_with_it_as_head_gives_the_scores_back():
    data = card().data
    assert data.model_name == "my-gan"
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"fid": 31.415927, "kid": 0.027183, "precision": 0.5, "recall": 0.25, "mifid": 62.8}
    for result in data.eval_results:
        assert result.task_type == "unconditional-image-generation"
        assert result.dataset_type == result.dataset_name == "huggan/few-shot-dog"
        told = {"num_images": 5000, "num_real": 2000, "seed": 3, "features": "inception-2015 clean 7ff4"}
        assert result.metric_args == told
    # It goes round unchanged, as the text of a card that is edited and saved.
    again = ModelCardData(model_name=data.model_name, eval_results=data.eval_results)
    assert ModelCard(f"---\n{again.to_yaml()}\n---\n").data.to_dict() == data.to_dict()


def test_each_score_is_named_with_numbers_of_images_and_its_floor():
    names = {result.metric_type: result.metric_name for result in card().data.eval_results}
    assert names["fid"] == "FID, 5,000 images against 2,000; floor 3.142 (1,000 against 1,000)"
    assert names["recall"] == "recall, 5,000 images against 2,000; floor 0.025 (1,000 against 1,000)"


def test_of_diffusion_the_steps_are_told():
    assert {
        result.metric_args["num_inference_steps"] for result in card(num_inference_steps=25).data.eval_results
    } == {25}


def test_an_infinite_score_is_left_out_of_the_card_and_null_in_json():
    scores = {**REPORT["scores"], "mifid": float("inf")}
    kinds = [result.metric_type for result in card(scores=scores).data.eval_results]
    assert "mifid" not in kinds and kinds == [kind for kind in METRICS.values() if kind != "mifid"]
    told = finite({"scores": scores, "spread": [float("nan"), 1.5], "name": "x", "n": 3})
    assert told == {"scores": {**scores, "mifid": None}, "spread": [None, 1.5], "name": "x", "n": 3}


@pytest.mark.parametrize(
    ("where", "name"),
    [("{folder}/photos", "photos"), ("{folder}/photos/", "photos"), (".", "photos"), ("~", "photos")],
)
def test_a_folder_is_named_without_where_it_lies(tmp_path, monkeypatch, where, name):
    folder = tmp_path / "photos"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    changed = card(reference=where.format(folder=tmp_path))
    assert {result.dataset_name for result in changed.data.eval_results} == {name}
    assert str(tmp_path) not in str(changed)


@pytest.mark.parametrize(
    ("features", "fid", "kid", "mifid"),
    [
        ("inception-2015 clean 7ff4", "FID", "KID", "MiFID"),
        ("dinov2 224 pixels 0a", "Frechet distance (DINOv2)", "kernel distance (DINOv2)", "MiFD (DINOv2)"),
        ("clip 224 pixels 0a", "Frechet distance (CLIP)", "kernel distance (CLIP)", "MiFD (CLIP)"),
    ],
)
def test_only_inception_s_distance_is_called_fid(features, fid, kid, mifid):
    assert score_names(features) == {"fid": fid, "kid": kid, "mifid": mifid}
    names = [result.metric_name.split(",")[0] for result in card(features=features).data.eval_results]
    assert names == [fid, kid, "precision", "recall", mifid]
