"""Formatting the report of `hfgen evaluate` as a table, sentences or JSON, and reading it."""

import json
import math
from pathlib import Path
from typing import Any


# key of the scores -> key of its standard error
TABLE = {
    "fid": "fid_standard_error",
    "kid": "kid_standard_error",
    "precision": None,
    "recall": None,
    "density": None,
    "coverage": None,
    "mifid": None,
}


# What a report, a table or a card says of a reference that is not the model's training data. Digests are of all images
# in order, so that a reference with one image more or less is other data, too.
OTHER_DATA = (
    "this reference is not exactly the data that the model was trained on, although it may share images with it: "
    "scores and copies are against this reference"
)


def finite(value: Any) -> Any:
    """Replace non-finite numbers, such as the infinite MiFID of a generator that only copies, by null for JSON."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(report: dict[str, Any]) -> str:
    """Format a report as JSON; what is not finite becomes null (see `read_report`)."""
    return json.dumps(finite(report), indent=2, allow_nan=False) + "\n"


def markdown(report: dict[str, Any]) -> str:
    """Format a report as a table, with the floor in its own column, and the statements on copies."""
    paragraphs = [score_table(report)]
    paragraphs.append(
        f"Memorisation: {report['memorisation']['statement']}; {report['memorisation_by_pixels']['statement']}."
    )
    if "held_out" in report:
        part, fid = report["held_out"], score_names(report["features"])["fid"]
        paragraphs.append(
            f"Held out: {fid} {part['fid']:.4g} against {part['num_held_out']:,} images; {part['statement']}."
        )
    return "\n\n".join(paragraphs) + "\n"


def score_table(report: dict[str, Any]) -> str:
    """Format the scores of a report as a table, with what is needed to interpret them."""
    scores, floor, spread = report["scores"], report["floor"], report.get("repeats")
    real, names = floor["split"], score_names(report["features"])
    head = ["score", "generated"]
    if spread:
        head.append(f"mean ± standard deviation over {len(spread['seeds'])} seeds")
    head.append(floor_name(real))
    lines = [
        f"{scores['num_fake']:,} images of {report['sample_size']} pixels against {scores['num_real']:,} real ones, "
        f"seed {report['seed']}; features: {report['features']}.",
        "",
        f"| {' | '.join(head)} |",
        "| --- " * len(head) + "|",
    ]
    for key, error in TABLE.items():
        cells = [f"{part[key]:.4g}" + (f" ± {part[error]:.2g}" if error else "") for part in (scores, real)]
        if spread:
            cells.insert(1, f"{spread['mean'][key]:.4g} ± {spread['standard_deviation'][key]:.2g}")
        lines.append(f"| {names.get(key, key)} | {' | '.join(cells)} |")
    fid = names["fid"]
    paragraphs = [f"**Warning: {OTHER_DATA}.**"] if report.get("trained_on_reference") is False else []
    if report.get("trained_on_reference", True) is None and "images" not in report:  # of another program
        paragraphs.append("It is not known whether the model was trained on these real images.")
    at_n = ""
    if real["num_fake"] < scores["num_fake"]:  # too few real images for a floor of as many as were generated
        at_n = (
            f"{fid} of {scores['num_fake']:,} real images, sampled with replacement, against all: "
            f"{floor['fid_at_n']:.4g}. "
        )
    paragraphs += [
        f"{at_n}± is the standard error, which excludes the bias of {fid}: compare only equal numbers of images."
    ]
    if subset := of_a_subset(report):
        paragraphs.append(subset)
    if scores["mifid"] < real["mifid"] and real["mifid"] > real["fid"]:
        paragraphs.append(
            f"The floor of {names['mifid']} exceeds the score because the real images themselves incur the penalty "
            "for being close to one another; it is not a lower limit here."
        )
    if "reconstructions" in report:
        part = report["reconstructions"]
        paragraphs.append(
            f"{fid} of {part['num_images']:,} real images after encoding and decoding: {part['fid']:.4g}."
        )
    if "fid_at_infinity" in report:
        rough = report.get("is_rough_at_infinity", False)
        caveat = " (a rough estimate, with fewer images than it needs)" if rough else ""
        at_infinity = f"{report['fid_at_infinity']:.4g}{caveat}"
        paragraphs.append(f"{fid} extrapolated to infinitely many generated images: {at_infinity}.")
    if "likelihood" in report:
        paragraphs.append(f"Likelihood: {report['likelihood']['statement']}.")
    return "\n".join(lines) + "\n\n" + "\n\n".join(paragraphs)


def of_a_subset(report: dict[str, Any]) -> str | None:
    """Say which scores are of some of the images only, if any are: they compare all pairs."""
    from hfgen.metrics.kernel import MAX_IMAGES  # imports torch, which takes seconds

    if max(report["scores"]["num_real"], report["scores"]["num_fake"]) <= MAX_IMAGES:
        return None
    names = f"{score_names(report['features'])['kid']}, precision, recall, density and coverage"
    return f"{names} are of {MAX_IMAGES:,} random images, where there are more."


def floor_name(split: dict[str, Any]) -> str:
    """Name the floor, with the numbers of images: `split` of `score_floor`."""
    return f"floor: {split['num_fake']:,} real images against {split['num_real']:,} others"


def read_report(file: Path) -> dict[str, Any]:
    """Read `evaluation.json`; scores stored as null become infinite again."""
    report = json.loads(file.read_text())
    if "halves" in report["floor"]:  # of an earlier version, whose floor was always that of two halves
        report["floor"]["split"] = report["floor"].pop("halves")
    spread = report.get("repeats", {})
    parts = [spread[key] for key in ("mean", "standard_deviation") if key in spread]
    for scores in (report["scores"], report["floor"]["split"], *parts):
        scores |= {key: math.inf for key in TABLE if scores[key] is None}
    return report


def score_names(features: str) -> dict[str, str]:
    """Return the names of FID and related scores in these features: FID, KID and MiFID imply Inception."""
    if features.startswith("inception"):
        return {"fid": "FID", "kid": "KID", "mifid": "MiFID"}
    family = {"dinov2": "DINOv2", "clip": "CLIP"}[features.split()[0]]
    return {"fid": f"Frechet distance ({family})", "kid": f"kernel distance ({family})", "mifid": f"MiFD ({family})"}
