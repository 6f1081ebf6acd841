"""Scores in the course of a run: which moment was the best, and from when on the samples copy the training images."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline

from hfgen.data.settings import DataSettings
from hfgen.errors import UserError
from hfgen.evaluation.reference import load_reference
from hfgen.evaluation.scores import COPY_QUANTILE, distances_among, memorisation_report, pixel_report
from hfgen.evaluation.scoring import Drawing, drawn_from
from hfgen.files import read_json_lines, write_atomically, write_text_atomically
from hfgen.inference.reference_curves import compare_with_reference
from hfgen.metrics.feature_spaces import build_extractor
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.kernel import kernel_distance
from hfgen.metrics.memorisation import thumbnails
from hfgen.training.checkpoints import PIPELINE_FOLDER
from hfgen.training.folder import BEST_FOLDER, EVALUATIONS_FILE, SCORES_FILE, best_scores
from hfgen.training.run import Run


# A share of copies is told from chance if it is so many of its standard errors above what is expected.
STANDARD_ERRORS = 3


class RunEvaluation:
    """Draws from the averaged network every so often and scores it against the training images.

    Writes `evaluations.jsonl`, and under `best/` the pipeline of the best score so far and its `scores.json`. One that
    copies training images never takes the place of one that does not. Nothing of it enters a checkpoint or draws
    random numbers that training would see.

    Args:
        run: whose settings say how often, with how many images, and by which score.
        data: the training images. Their features are computed at the first evaluation of all, and kept.
        num_inference_steps: of a diffusion pipeline.

    Raises:
        UserError: if evaluations are asked for and there are no weights for them, too few images, or a stream.
    """

    def __init__(self, run: Run, data: DataSettings, num_inference_steps: int | None = None):
        self._run, self._settings = run, run.settings
        self._drawing = Drawing(run.settings.evaluate_num_images, run.settings.seed, num_inference_steps)
        self._was_behind = False
        if not run.settings.evaluate_every:
            return
        if data.streaming:
            raise UserError("--evaluate_every: the images of a stream cannot be compared with; download the data set")
        problem = None
        if run.is_main:
            try:
                self._open(data)
            except UserError as error:
                problem = str(error)
        (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise UserError(problem)

    def _open(self, data: DataSettings) -> None:
        self._extractor = build_extractor("inception", "clean", self._settings.feature_weights, self._run.device)
        # Squares, as they are generated: those of --crop random are cut out during training only.
        squares = replace(data, crop="center")
        self._real = load_reference(squares, self._extractor, "--evaluate_every: --dataset")
        self._real_small = self._real.thumbnails()
        self._among_real = distances_among(self._real.features, self._drawing.seed)

    def look(self, pipeline: DiffusionPipeline) -> None:
        """Score the pipeline as it is now; all processes must call this, the main one works.

        Gives up without a score if the run is asked to stop meanwhile.
        """
        if self._run.is_main:
            started = time.monotonic()
            try:
                scores = self._score(pipeline)
            except InterruptedError:
                scores = None
            if scores is not None:
                self._record(scores, pipeline)
            self._run.note(scores or {}, time.monotonic() - started)
        self._run.accelerator.wait_for_everyone()

    def _score(self, pipeline: DiffusionPipeline) -> dict[str, float]:
        """Draw and score; the shares of copies are of all that were drawn."""

        def give_up_if_asked() -> None:
            if self._run.stop_requested:
                raise InterruptedError

        pipeline.set_progress_bar_config(disable=True)
        with (
            self._run.accelerator.autocast(),
            drawn_from(pipeline, self._drawing, self._extractor, give_up_if_asked) as drawn,
        ):
            features, small = drawn.features, thumbnails(drawn.images)
        count, seed = self._drawing.num_images, self._drawing.seed
        nearest = memorisation_report(self._real.features, features, self._among_real)
        by_pixels = pixel_report(self._real_small, small, seed)
        return {
            "fid": frechet_distance(self._real.features, features),
            "kid": kernel_distance(self._real.features, features, seed).value,
            "copies": nearest["num_copies"] / count,
            "copies_expected": COPY_QUANTILE,
            "copies_by_pixels": by_pixels["num_copies"] / count,
            "copies_by_pixels_expected": by_pixels["share_among_real"],
            "nearest_distance_ratio": nearest["median_distance"] / max(self._among_real["median"], 1e-12),
        }

    def _record(self, scores: dict[str, float], pipeline: DiffusionPipeline) -> None:
        """Add a line, keep the pipeline if it is the best one, and say so if it has begun to copy."""
        run, folder = self._run, self._run.output_dir
        recorded = read_evaluations(folder)  # a resumed run comes by some of its steps again
        earlier = [line for line in recorded if line["step"] < run.step]
        count = self._drawing.num_images
        line = {"step": run.step, "num_images": count, **scores, "copying": is_copying(scores, count)}
        write_text_atomically(folder / EVALUATIONS_FILE, "".join(f"{json.dumps(one)}\n" for one in (*earlier, line)))
        by, best = self._settings.best_by, best_scores(folder)
        # Scores of other numbers of images are no measure; and on few images the best FID is that of copies.
        if best is None or best["num_images"] != count or (line["copying"], scores[by]) < (best["copying"], best[by]):
            write_atomically(folder / BEST_FOLDER, lambda temporary: _save_best(temporary, pipeline, line))
        self._warn_if_behind(scores["fid"])
        if line["copying"] and not any(one["copying"] for one in recorded):
            run.warn(
                f"the samples have begun to copy: {scores['copies']:.1%} of them are nearer to a training image than "
                f"{1 - COPY_QUANTILE:.0%} of the training images are to each other, {scores['copies_by_pixels']:.1%} "
                "are copies by their pixels. More images, stronger augmentation or an earlier end help"
            )

    def _warn_if_behind(self, fid: float) -> None:
        """Say so, once a launch, if a run of one of the presets is far behind what that preset reaches."""
        run, count = self._run, self._drawing.num_images
        behind, told = compare_with_reference(run.all_settings, count, run.step * run.images_per_step, fid)
        if behind and not self._was_behind:
            run.warn(
                f"{told}. Other data have other figures; if yours are no harder, look at the samples, at what "
                "--augment chose and at --learning_rate_d"
            )
        self._was_behind = self._was_behind or behind


def is_copying(scores: dict[str, float], num_images: int) -> bool:
    """Whether there are more copies, in features or by pixels, than chance and the data's own twins explain."""
    for name in ("copies", "copies_by_pixels"):
        expected = scores[f"{name}_expected"]
        error = math.sqrt(max(expected * (1 - expected), 1 / num_images) / num_images)
        if scores[name] > expected + STANDARD_ERRORS * error:
            return True
    return False


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of the run in `folder`, oldest first."""
    return read_json_lines(folder / EVALUATIONS_FILE)


def _save_best(folder: Path, pipeline: DiffusionPipeline, line: dict[str, Any]) -> None:
    pipeline.save_pretrained(folder / PIPELINE_FOLDER)
    (folder / SCORES_FILE).write_text(json.dumps(line, indent=2) + "\n")
