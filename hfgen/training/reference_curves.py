"""Reference curves: FID against training images of runs that went well, to compare a run with.

They are stored in `reference_curves.json` next to this file: for each curve the preset, the settings that identify a
run of it, the data and hardware it was measured on, and its points `[images, minutes, fid]`. `curve_of` makes one
from a run with `--evaluate_every`.
"""

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hfgen.files import read_json
from hfgen.run_files import SETTINGS_FILE


# A run is far behind above this multiple of the reference's FID: two seeds of a preset differ by less than a third.
FAR_BEHIND = 1.5


# Settings of the training script that must match for a run to be compared with a reference.
COMPARED = (
    *("sample_size", "batch_size", "loss", "learning_rate", "network", "discriminator_network", "normalization"),
    *("generator_channels", "discriminator_channels", "spectral_scale", "n_critic", "unet", "block_out_channels"),
    *("latent_dim", "upsampling", "formulation", "patch_size", "layers_per_block", "num_inference_steps"),
    *("feature_weight", "adversarial_weight", "learned_term_start", "refine_channels"),
)


class ReferenceCurve(NamedTuple):
    """The FID curve of a run that went well.

    Attributes:
        preset: preset of the training script.
        settings: by name; runs with the same values are compared with this curve.
        num_images: generated images per FID; values for other numbers are not comparable.
        about: data, number of real images, hardware, version; a sentence without its full stop.
        points: (training images seen, minutes of training, FID), in order.
    """

    preset: str
    settings: dict[str, Any]
    num_images: int
    about: str
    points: list[tuple[int, float, float]]

    @property
    def data(self) -> str:
        """What it was trained on and scored against, as a phrase."""
        return self.about.split(", ")[0]

    def fid_at(self, images: int) -> float | None:
        """Return the FID after this many training images, interpolated linearly in the logarithms of both.

        Returns:
            None before the first point; the last FID after the last point.
        """
        if images < self.points[0][0]:
            return None
        seen, _, fids = zip(*self.points, strict=True)
        return math.exp(np.interp(math.log(images), np.log(seen), np.log(fids)))


def read_reference_curves() -> list[ReferenceCurve]:
    """Read the shipped curves."""
    entries = json.loads(files("hfgen.training").joinpath("reference_curves.json").read_text())
    return [ReferenceCurve(**{**entry, "points": [tuple(point) for point in entry["points"]]}) for entry in entries]


def reference_of(settings: dict[str, Any], num_images: int) -> ReferenceCurve | None:
    """Return the curve of a run's preset, or None.

    Args:
        settings: all settings of the run.
        num_images: generated images per FID.
    """
    for curve in read_reference_curves():
        same = all(settings.get(name) == value for name, value in curve.settings.items())
        if curve.num_images == num_images and same:
            return curve
    return None


def compare_with_reference(settings: dict[str, Any], num_images: int, images: int, fid: float) -> tuple[bool, str]:
    """Compare a run with the reference curve of its preset.

    Args:
        settings: all settings of the run.
        num_images: generated images per FID.
        images: training images seen so far.
        fid: the run's FID.

    Returns:
        Whether it is far behind, and the comparison as a sentence without its full stop; "" if there is no reference.
    """
    curve = reference_of(settings, num_images)
    expected = curve.fid_at(images) if curve is not None else None
    if curve is None or expected is None:
        return False, ""
    message = f"FID {fid:.0f} after {images:,} images seen; the reference run of preset {curve.preset} had "
    return fid > FAR_BEHIND * expected, f"{message}{expected:.0f} ({curve.about})"


def minutes_of_updates(log: list[dict[str, Any]]) -> list[float]:
    """Return the cumulative minutes of updates at each log entry, without scoring and saving."""
    images, minutes, found = 0, 0.0, []
    for entry in log:
        minutes += (entry["images"] - images) / entry["images_per_second"] / 60
        images = entry["images"]
        found.append(minutes)
    return found


def curve_of(run: Path, log: list[dict[str, Any]], preset: str, about: str) -> dict[str, Any]:
    """Make an entry of `reference_curves.json` from a run.

    Args:
        run: the run's folder.
        log: the run's log, with scores; see `hfgen.training.history.read_metrics`.
        preset: preset of the run.
        about: see `ReferenceCurve`.

    Returns:
        Plain values, ready for JSON. Minutes are those of the updates only, without scoring and saving.
    """
    settings = read_json(run / SETTINGS_FILE)
    points = [
        [entry["images"], round(minutes, 1), round(entry["fid"], 1)]
        for entry, minutes in zip(log, minutes_of_updates(log), strict=True)
        if "fid" in entry
    ]
    return {
        "preset": preset,
        "settings": {name: settings[name] for name in COMPARED if name in settings},
        "num_images": settings["evaluate_num_images"],
        "about": about,
        "points": points,
    }
