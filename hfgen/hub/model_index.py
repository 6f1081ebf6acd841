"""The scores of a report as the `model-index` of a model card, which the Hub shows next to the model."""

import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hfgen.data.location import is_path
from hfgen.metrics.report import score_names


# Key of a score in a report -> metric type in the card; those that imply Inception are replaced in other features.
METRICS = {"fid": "fid", "kid": "kid", "precision": "precision", "recall": "recall", "mifid": "mifid"}
TASK = "unconditional-image-generation"


def model_index(report: dict[str, Any], model_name: str) -> str:
    """Format the scores as YAML for a model card, each named with what is needed to interpret it.

    Args:
        report: from `hfgen evaluate`.
        model_name: model name in the card.
    """
    return ModelCardData(model_name=model_name, eval_results=eval_results(report)).to_yaml() + "\n"


def eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """Return the finite scores of a report from `hfgen evaluate`, each with its n, seed and floor."""
    scores, split, data = report["scores"], report["floor"]["split"], reference_name(report["reference"])
    metric_args = {"num_images": scores["num_fake"], "num_real": scores["num_real"], "seed": report["seed"]}
    metric_args["features"] = report["features"]
    if report["num_inference_steps"]:
        metric_args["num_inference_steps"] = report["num_inference_steps"]
    names = score_names(report["features"])
    return [
        _result(
            data,
            kind if key not in names else names[key].lower().replace(" ", "_"),
            scores[key],
            f"{names.get(key, key)}, {scores['num_fake']:,} images against {scores['num_real']:,}; "
            f"floor {split[key]:.4g} ({split['num_fake']:,} against {split['num_real']:,})",
            metric_args,
        )
        for key, kind in METRICS.items()
        if math.isfinite(scores[key])
    ]


def eval_results_of_run(scores: dict[str, Any], data: str, num_real: int | None) -> list[EvalResult]:
    """Return FID and KID of one evaluation during training, for which no floor was measured.

    Args:
        scores: a line of `evaluations.jsonl`.
        data: name of the training data.
        num_real: number of training images; None if unknown.
    """
    metric_args = {"num_images": scores["num_images"], "step": scores["step"], "features": "inception-2015 clean"}
    steps = scores.get("num_inference_steps")  # missing in lines of earlier versions
    if steps:
        metric_args["num_inference_steps"] = steps
    in_steps = f" in {steps} denoising steps" if steps else ""
    against = f"{num_real:,} training images" if num_real else "the training images"
    return [
        _result(
            data,
            key,
            scores[key],
            f"{key.upper()}, {scores['num_images']:,} images{in_steps} against {against}; floor unmeasured",
            metric_args,
        )
        for key in ("fid", "kid")
    ]


def reference_name(reference: str) -> str:
    """Return a reference's public name: for a path only the last part, to reveal less about the disk."""
    if not is_path(reference):
        return reference
    return Path(os.path.expanduser(reference)).resolve().name  # resolved, so that "." and "~" have names


def _result(data: str, kind: str, value: float, name: str, metric_args: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=data,
        dataset_name=data,
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 6),
        metric_args=metric_args,
    )
