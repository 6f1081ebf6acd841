"""What a report says, as the `model-index` of a model card: the Hub shows it beside the model."""

import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData


# Of the scores in a report: key -> metric type of the card.
METRICS = {"fid": "fid", "kid": "kid", "precision": "precision", "recall": "recall", "mifid": "mifid"}


def model_index(report: dict[str, Any], model_name: str) -> str:
    """Write the scores as YAML for the head of a model card, each named with what is needed to read it.

    Args:
        report: from `hfgen evaluate`.
        model_name: of the card.
    """
    scores, halves = report["scores"], report["floor"]["halves"]
    path = Path(
        os.path.expanduser(report["reference"])
    ).resolve()  # "." and "~" have names, which say less of the disk
    data = path.name if path.exists() else report["reference"]
    told = {"num_images": scores["num_fake"], "num_real": scores["num_real"], "seed": report["seed"]}
    told["features"] = report["features"]
    if report["num_inference_steps"]:
        told["num_inference_steps"] = report["num_inference_steps"]
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=kind,
            metric_name=(
                f"{score_names(report['features']).get(key, key)}, {scores['num_fake']:,} images against "
                f"{scores['num_real']:,}; floor {halves[key]:.4g} ({halves['num_fake']:,} against as many)"
            ),
            metric_value=round(scores[key], 6),
            metric_args=told,
        )
        for key, kind in METRICS.items()
        if math.isfinite(scores[key])
    ]
    return ModelCardData(model_name=model_name, eval_results=results).to_yaml() + "\n"


def score_names(features: str) -> dict[str, str]:
    """Return how FID and its kin are called in these features: the names say Inception, whatever that is."""
    if features.startswith("inception"):
        return {"fid": "FID", "kid": "KID", "mifid": "MiFID"}
    family = {"dinov2": "DINOv2", "clip": "CLIP"}[features.split()[0]]
    return {"fid": f"Frechet distance ({family})", "kid": f"kernel distance ({family})", "mifid": f"MiFD ({family})"}
