"""Results of a trained cell: scores, curve and pictures, as plain values that fit into a database."""

import base64
import io
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.errors import UserError
from hfgen.evaluation.reference import ReferenceImages, load_reference
from hfgen.evaluation.scoring import generated_images, score_pipeline
from hfgen.files import read_json, read_json_lines
from hfgen.inference.figures import denoising_states, image_sheet
from hfgen.inference.opening import choose_device, open_pipeline
from hfgen.inference.sampling import SamplingOptions, generate_images, image_size
from hfgen.metrics.extraction import Extractor
from hfgen.metrics.feature_spaces import build_extractor
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.report import finite
from hfgen.run_files import EVENTS_FILE, STATUS_FILE
from hfgen.studies.cells import Cell, num_scored_checkpoints
from hfgen.studies.launch import Workspace
from hfgen.studies.outcomes import Result
from hfgen.studies.study_file import Evaluation
from hfgen.training.checkpoints import PIPELINE_FOLDER, final_progress, list_checkpoints, load_progress
from hfgen.training.folder import STATUS_KEYS, read_launches
from hfgen.training.history import read_metrics


SHEET_IMAGES, SHEET_COLUMNS = 32, 8
STRIP_IMAGES, STRIP_COLUMNS = 2, 8
# A sheet or a curve is stored in a text column; MySQL's hold 65,535 bytes.
MAX_PICTURE_BYTES, MAX_CURVE_BYTES = 45_000, 60_000
# Maximum widths of an image on a sheet and of a strip; larger ones are downscaled.
MAX_SHOWN_PIXELS, MAX_STRIP_PIXELS = 96, 800
MAX_CURVE_POINTS = 200
# Warnings of a training, which are stored with its scores in one text column, and characters of each.
MAX_WARNINGS, MAX_WARNING = 12, 400
NUMBER = re.compile(r"-?\d[\d.,]*(?:e[+-]?\d+)?")
ABOUT_DATA = ("from_step", "data_digest")  # not about the environment of a launch


class Scorer:
    """Scores trained cells with one feature network, which is loaded once.

    Args:
        evaluation: how to score.
        workspace: this worker's folders.

    Raises:
        UserError: if the feature weights are not available on this machine.
    """

    def __init__(self, evaluation: Evaluation, workspace: Workspace):
        self._evaluation, self._workspace = evaluation, workspace
        self._extractor: Extractor = build_extractor(
            evaluation.features, evaluation.mode, workspace.feature_weights, choose_device("auto")
        )
        self._references: dict[str, ReferenceImages] = {}

    def score(self, cell: Cell) -> Result:
        """Generate images with a trained cell and score them against its training images.

        Raises:
            UserError: if the pipeline cannot be opened or does not support the evaluation's settings.
        """
        wanted, folder = self._evaluation, self._workspace.run_folder(cell)
        pipeline = self._open(cell, folder)
        source = wanted.sample_from if cell.method == "vae" else None
        steps = None
        if cell.method == "ddpm":
            steps = min(wanted.num_inference_steps, pipeline.scheduler.config.num_train_timesteps)
        sampling = SamplingOptions(wanted.num_images, wanted.seed, steps, sample_from=source)
        reference = self._reference(cell, image_size(pipeline))
        report = finite(score_pipeline(pipeline, reference, sampling).report)
        shown = list(generate_images(pipeline, replace(sampling, num_images=SHEET_IMAGES)))
        strip = ""
        if cell.method == "ddpm":
            shown_steps = strip_timesteps(pipeline.scheduler.config.num_train_timesteps)
            states, _, _ = denoising_states(pipeline, shown_steps, STRIP_IMAGES, wanted.seed, steps)
            strip = encode_picture(reduced(image_sheet(states, STRIP_COLUMNS), MAX_STRIP_PIXELS))
        curve = read_metrics(folder)
        summary = {**training_summary(folder, curve), **report, "data_digest": reference.images.digest}
        if wanted.every_images is not None:
            last = {"images": summary["training"]["images"], "fid": report["scores"]["fid"]}
            if source == "ex_post":  # checkpoints of earlier versions have no density
                sampling = replace(sampling, sample_from=None)
            course = self._course(cell, sampling, reference, last["images"])
            summary["course"] = finite([*course, last])
            summary["training"]["warnings"] += gone_checkpoints(cell, len(course))
        return Result(summary, curve_entries(curve), encode_sheet(shown), strip)

    def _open(self, cell: Cell, folder: Path) -> DiffusionPipeline:
        pipeline = open_pipeline(str(folder), sampler=self._evaluation.sampler if cell.method == "ddpm" else None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _course(
        self, cell: Cell, sampling: SamplingOptions, reference: ReferenceImages, last: int
    ) -> list[dict[str, Any]]:
        """Score the pipeline of each checkpoint before the last training image: FID by images seen."""
        course = []
        for checkpoint in list_checkpoints(self._workspace.run_folder(cell) / "checkpoints"):
            progress = load_progress(checkpoint)
            # Skip checkpoints of interrupted launches, which are at other steps.
            if progress["step"] % cell.settings["checkpoint_every"] or progress["images"] >= last:
                continue
            fid = self._fid(self._open(cell, checkpoint), sampling, reference)
            course.append({"images": progress["images"], "fid": fid})
        return course

    def _fid(self, pipeline: DiffusionPipeline, sampling: SamplingOptions, reference: ReferenceImages) -> float:
        with generated_images(pipeline, sampling, reference.extractor) as generated:
            return float(frechet_distance(reference.features, generated.features))

    def _reference(self, cell: Cell, size: int) -> ReferenceImages:
        settings = data_settings(cell, self._workspace)
        key = repr(settings)
        if key not in self._references:
            if settings.sample_size != size:
                raise UserError(
                    f"{cell.name}: generates {size}-pixel images, but was to be trained at {settings.sample_size}"
                )
            self._references[key] = load_reference(settings, self._extractor, "--dataset")
        return self._references[key]


def data_settings(cell: Cell, workspace: Workspace) -> DataSettings:
    """Return how to read the real images that a cell is scored against: centre crops without augmentation."""
    names = ("dataset_config", "dataset_split", "dataset_column", "sample_size", "drop_duplicates", "cache_dir")
    return DataSettings(
        workspace.dataset,
        **{name: cell.settings[name] for name in (*names, "max_image_pixels") if name in cell.settings},
    )


def reference_digest(cell: Cell, workspace: Workspace) -> str:
    """Return the digest of the images that a cell is scored against: by it workers know that they have the same."""
    return load_images(data_settings(cell, workspace)).digest


def training_summary(folder: Path, log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a summary of the training from a run's folder."""
    status, launches = read_json(folder / STATUS_FILE, STATUS_KEYS), read_launches(folder)
    events = read_json_lines(folder / EVENTS_FILE, ("event", "step", "what"))
    rollbacks = sum(event["event"] == "rollback" for event in events)  # killed and resumed, a run may repeat one
    return {
        "training": {
            "steps": status["step"],
            "images": log[-1]["images"],
            "minutes": status["seconds"] / 60,
            "images_per_second": statistics.median(entry["images_per_second"] for entry in log),
            "launches": len(launches),
            "rollbacks": final_progress(folder / PIPELINE_FOLDER).get("rollbacks", rollbacks),
            "warnings": merged_warnings([event for event in events if event["event"] == "warning"]),
        },
        "environment": {key: value for key, value in launches[-1].items() if key not in ABOUT_DATA},
    }


def gone_checkpoints(cell: Cell, num_scored: int) -> list[str]:
    """Return a warning if fewer checkpoints of a cell could be scored than it has had: a scored cell keeps none."""
    every = num_scored_checkpoints(cell)
    if num_scored >= every:
        return []
    return [
        f"checkpoints to score: {every - num_scored} of {every} are gone, so the course of FID lacks their points; a "
        "folder keeps none of a cell that has been scored: use another --output to have them"
    ]


def merged_warnings(events: list[dict[str, Any]]) -> list[str]:
    """Return the warnings of a run, one for all that differ only in their numbers: a check repeats its own each time.

    Args:
        events: entries of the run's `events.jsonl`, each with "step" and "what".
    """
    kinds: dict[str, dict[int, str]] = {}
    for event in events:  # a run that was killed and resumed may repeat a step
        kinds.setdefault(NUMBER.sub("#", event["what"]), {})[event["step"]] = event["what"]
    warnings = []
    for by_step in kinds.values():
        first, last = min(by_step), max(by_step)
        when = f"step {first}: "
        if len(by_step) > 1:
            when = f"steps {first:,} to {last:,}, {len(by_step)} times, at last: "
        what = by_step[last]
        warnings.append(when + (what if len(what) <= MAX_WARNING else what[: MAX_WARNING - 2].rstrip() + " …"))
    if len(warnings) > MAX_WARNINGS:
        warnings[MAX_WARNINGS - 1 :] = [f"{len(warnings) - MAX_WARNINGS + 1} more kinds of warnings, in {EVENTS_FILE}"]
    return warnings


def curve_entries(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the step and the losses of evenly spaced entries of a log, including the last; fewer of many losses."""
    names, points = ["step", *losses_of(log)], MAX_CURVE_POINTS
    while _stored_bytes(curve := _thinned(log, names, points)) > MAX_CURVE_BYTES and points > 1:
        points //= 2
    return curve


def losses_of(curve: list[dict[str, Any]]) -> list[str]:
    """Return the names of the losses in a log: those of a GAN's two networks, or the total loss."""
    names = list(curve[-1]) if curve else []
    return [name for name in names if name == "loss" or name.startswith("loss_")]


def _thinned(log: list[dict[str, Any]], names: list[str], points: int) -> list[dict[str, float]]:
    stride = math.ceil(len(log) / points)
    kept = log[::-1][::stride][::-1]
    return [{name: float(f"{entry[name]:.5g}") for name in names if name in entry} for entry in kept]


def _stored_bytes(curve: list[dict[str, float]]) -> int:
    return len(json.dumps(json.dumps(curve)))  # encoded by the study's store and again by Optuna


def strip_timesteps(trained_steps: int) -> list[int]:
    """Return the timesteps of a strip's columns, noisiest first, for a model of this many timesteps."""
    return [round((trained_steps - 1) * (1 - index / (STRIP_COLUMNS - 1))) for index in range(STRIP_COLUMNS)]


def encode_sheet(images: list[Image.Image]) -> str:
    """Encode a sheet of images as `encode_picture` does; noise, which JPEG compresses badly, gets fewer images."""
    small = [reduced(image, MAX_SHOWN_PIXELS) for image in images]
    for count in (len(small), len(small) // 2, SHEET_COLUMNS):
        picture = _jpeg(image_sheet(small[:count], SHEET_COLUMNS))
        if picture is not None:
            return base64.b64encode(picture).decode()
    return ""


def encode_picture(image: Image.Image) -> str:
    """Encode a JPEG in base64, at the best quality that is small enough; downscale if none is."""
    while (picture := _jpeg(image)) is None:
        image = reduced(image, image.width // 2)
    return base64.b64encode(picture).decode()


def reduced(image: Image.Image, width: int) -> Image.Image:
    """Downscale an image to at most this width in pixels."""
    if image.width <= width:
        return image
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)


def _jpeg(image: Image.Image) -> bytes | None:
    for quality in (85, 75, 60, 40, 20):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "jpeg", quality=quality, subsampling=0)  # keeps the colours of small images
        if buffer.tell() <= MAX_PICTURE_BYTES:
            return buffer.getvalue()
    return None


def decode_picture(text: str) -> Image.Image:
    """Decode the output of `encode_picture`."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
