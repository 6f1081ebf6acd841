"""What a report says, as the `model-index` of a model card: the Hub shows it beside the model."""

import math
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hfgen.metrics.report import score_names


# Of the scores in a report: key -> metric type of the card.
METRICS = {"fid": "fid", "kid": "kid", "precision": "precision", "recall": "recall", "mifid": "mifid"}
TASK = "unconditional-image-generation"


def model_index(report: dict[str, Any], model_name: str) -> str:
    """Write the scores as YAML for the head of a model card, each named with what is needed to read it.

    Args:
        report: from `hfgen evaluate`.
        model_name: of the card.
    """
    return ModelCardData(model_name=model_name, eval_results=eval_results(report)).to_yaml() + "\n"


def eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """Return the finite scores of a report from `hfgen evaluate`, each with its n, seed and floor."""
    scores, halves, data = report["scores"], report["floor"]["halves"], reference_name(report["reference"])
    told = {"num_images": scores["num_fake"], "num_real": scores["num_real"], "seed": report["seed"]}
    told["features"] = report["features"]
    if report["num_inference_steps"]:
        told["num_inference_steps"] = report["num_inference_steps"]
    names = score_names(report["features"])
    return [
        _result(
            data,
            kind,
            scores[key],
            f"{names.get(key, key)}, {scores['num_fake']:,} images against {scores['num_real']:,}; "
            f"floor {halves[key]:.4g} ({halves['num_fake']:,} against as many)",
            told,
        )
        for key, kind in METRICS.items()
        if math.isfinite(scores[key])
    ]


def eval_results_of_run(scores: dict[str, Any], data: str, num_real: int | None) -> list[EvalResult]:
    """Return FID and KID of one evaluation in the course of a training, for which no floor was measured.

    Args:
        scores: a line of `evaluations.jsonl`.
        data: name of the training images.
        num_real: how many there are; None if that is not known.
    """
    told = {"num_images": scores["num_images"], "step": scores["step"], "features": "inception-2015 clean"}
    against = f"{num_real:,} training images" if num_real else "the training images"
    return [
        _result(
            data,
            key,
            scores[key],
            f"{key.upper()}, {scores['num_images']:,} images against {against}; floor unmeasured",
            told,
        )
        for key in ("fid", "kid")
    ]


def reference_name(reference: str) -> str:
    """Return what to call a reference in public: a path by its last part, which says less of the disk."""
    path = Path(os.path.expanduser(reference)).resolve()  # "." and "~" have names
    # Told from the id of a Hub data set even where the path does not lead anywhere.
    is_name = re.fullmatch(r"toy_paintings(:\d+)?|[\w-][\w.-]*(/[\w-][\w.-]*)?", reference)
    return path.name if path.exists() or not is_name else reference


def _result(data: str, kind: str, value: float, name: str, told: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type=TASK,
        dataset_type=data,
        dataset_name=data,
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 6),
        metric_args=told,
    )
