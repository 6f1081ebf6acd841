"""Scores during a run: which step is best, and when the samples start to copy training images."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline

from hfgen.data.settings import DataSettings
from hfgen.errors import NotFiniteError, StopRequestedError, UserError, message_for_user
from hfgen.evaluation.reference import open_reference
from hfgen.evaluation.scores import MAX_AMONG_REAL, memorisation_report, pixel_report
from hfgen.evaluation.scoring import generated_images
from hfgen.files import json_lines, read_json_lines, write_atomically, write_text_atomically
from hfgen.inference.sampling import SamplingOptions, network_digest
from hfgen.integrity import recorded_names, save_with_digests
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.kernel import kernel_distance
from hfgen.metrics.memorisation import thumbnails
from hfgen.run_files import EVALUATIONS_FILE, SCORES_FILE
from hfgen.texts import say
from hfgen.training.checkpoints import PIPELINE_FOLDER
from hfgen.training.folder import BEST_FOLDER, best_scores
from hfgen.training.reference_curves import compare_with_reference
from hfgen.training.run import Run
from hfgen.training.settings import RunSettings


# What must be the same in two evaluations if their scores are to be compared.
MEASURED_WITH = ("num_images", "num_inference_steps", "features")
# A fraction of copies is significant if it exceeds the expected one by this many standard errors. Three would be too
# few: the expected fraction of a few hundred real images is that of their two or three nearest pairs.
STANDARD_ERRORS = 4


class RunEvaluation:
    """Samples from the averaged network at intervals and scores the images against the training images.

    Writes `evaluations.jsonl`, and under `best/` the pipeline with the best score so far and its `scores.json`. A
    pipeline that copies training images never replaces one that does not. Evaluation adds nothing to checkpoints and
    does not affect training's random numbers.

    Args:
        run: its settings say how often, with how many images and by which score.
        data: the training images. Their features are computed once, when training starts, and kept.
        num_inference_steps: for diffusion.

    Raises:
        UserError: if evaluations are enabled and the feature weights are missing, there are too few images, or the
            data is a stream.
    """

    def __init__(self, run: Run, data: DataSettings, num_inference_steps: int | None = None):
        self._run, self._settings = run, run.settings
        self._sampling = SamplingOptions(run.settings.evaluate_num_images, run.settings.seed, num_inference_steps)
        self._was_behind = False
        if not run.settings.evaluate_every:
            if run.is_main and (unused := _unused_settings(run.settings)):
                say(f"note: without --evaluate_every nothing is scored, so {unused} is not used")
            return
        if data.streaming:
            raise UserError("--evaluate_every: cannot compare with streamed images; leave out --streaming")
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
        # Centre crops, comparable with generated images: --crop random applies only during training.
        squares = replace(data, crop="center")
        weights, argument = self._settings.feature_weights, "--evaluate_every: --dataset"
        self._real = open_reference(squares, self._run.device, feature_weights=weights, argument=argument)
        self._real_small = self._real.thumbnails()
        self._among_real = self._real.distances_among(self._sampling.seed)
        self._num_among_real = min(len(self._real.features), MAX_AMONG_REAL)

    def evaluate(self, pipeline: DiffusionPipeline) -> None:
        """Score the pipeline as it is now; all processes must call this, only the main one works.

        Ends without a score on a request to stop, at the time limit, and for images that are not finite, which count
        as a NaN loss. If the score cannot be measured, because memory runs out, say, the run warns and goes on.
        """
        if self._run.is_main:
            # What is computed from the images may be NaN in between.
            with self._run.generating(), np.errstate(invalid="warn"):
                try:
                    scores = self._score(pipeline)
                    self._record(scores, pipeline)
                    self._run.note(scores, 0.0)
                except StopRequestedError:
                    if self._run.is_time_up:
                        self._run.warn("not scored: the time is up")
                except Exception as error:
                    message = message_for_user(error)
                    if message is None or isinstance(error, NotFiniteError):
                        raise
                    self._run.warn(f"not scored: {message}")
        with self._run.generating():  # nor does the others' waiting count as training time
            self._run.accelerator.wait_for_everyone()

    def _score(self, pipeline: DiffusionPipeline) -> dict[str, float]:
        """Generate images and score them; fractions of copies are of all generated images."""

        def give_up_if_asked() -> None:
            if self._run.stop_requested or self._run.is_time_up:
                raise StopRequestedError

        pipeline.set_progress_bar_config(disable=True)
        # In the precision of `hfgen sample`, not in that of the training.
        with generated_images(pipeline, self._sampling, self._real.extractor, give_up_if_asked) as generated:
            features, small = generated.features, thumbnails(generated.images)
        count, seed = self._sampling.num_images, self._sampling.seed
        nearest = memorisation_report(self._real.features, features, self._among_real)
        by_pixels = pixel_report(self._real_small, small, seed)
        return {
            "fid": frechet_distance(self._real.features, features),
            "kid": kernel_distance(self._real.features, features, seed).value,
            "copies": nearest["num_copies"] / count,
            "copies_expected": nearest["share_among_real"],
            "copies_by_pixels": by_pixels["num_copies"] / count,
            "copies_by_pixels_expected": by_pixels["share_among_real"],
            "nearest_distance_ratio": nearest["median_distance"] / max(self._among_real["median"], 1e-12),
        }

    def _record(self, scores: dict[str, float], pipeline: DiffusionPipeline) -> None:
        """Add a line, keep the pipeline if it is the best so far, and warn when it starts to copy."""
        run, folder = self._run, self._run.output_dir
        recorded = read_evaluations(folder)  # a resumed run repeats some steps
        earlier = [line for line in recorded if line["step"] < run.step]
        count, copying = self._sampling.num_images, is_copying(scores, self._sampling.num_images, self._num_among_real)
        line: dict[str, Any] = {"step": run.step, "num_images": count, **scores, "copying": copying}
        line |= {
            "network_sha256": network_digest(pipeline),
            "num_inference_steps": self._sampling.num_inference_steps,
            "features": self._real.extractor.identity,
        }
        write_text_atomically(folder / EVALUATIONS_FILE, json_lines([*earlier, line]))
        best = best_scores(folder)
        if best is None or self._is_better(line, best):
            target = folder / BEST_FOLDER
            own = [f"{PIPELINE_FOLDER}/{name}" for name in recorded_names(target / PIPELINE_FOLDER)]
            write_atomically(
                target,
                lambda temporary: _save_best(temporary, pipeline, line | {"rollbacks": run.rollbacks}),
                SCORES_FILE,
                [SCORES_FILE, *own],
            )
        self._warn_if_behind(scores["fid"])
        if line["copying"] and not any(one["copying"] for one in recorded):
            run.warn(
                f"the samples have started to copy training images: {scores['copies']:.1%} of them are nearer to a "
                f"training image than {1 - scores['copies_expected']:.0%} of the training images are to their nearest "
                f"neighbour, {scores['copies_by_pixels']:.1%} are copies by their pixels. Use more images or stronger "
                "augmentation, or stop earlier"
            )

    def _is_better(self, scores: dict[str, Any], best: dict[str, Any]) -> bool:
        """Whether a pipeline should replace the best one so far; one that copies never replaces one that does not.

        Scores that were measured in another way, which a resumed run can change, are not comparable; then the newer
        pipeline is kept. With few images, copies get the best FID.
        """
        if scores["copying"] != best["copying"]:
            return best["copying"]
        comparable = all(scores[name] == best.get(name, scores[name]) for name in MEASURED_WITH)
        return not comparable or scores[self._settings.best_by] < best[self._settings.best_by]

    def _warn_if_behind(self, fid: float) -> None:
        """Warn, once per launch, if a run of a preset is far behind the preset's reference curve.

        Not with fewer real than generated images: the distance to a few hundred images is large for any model.
        """
        run, count = self._run, self._sampling.num_images
        if len(self._real.features) < count:
            return
        images = run.step * run.images_per_step + run.images_before
        behind, message = compare_with_reference(run.all_settings, count, images, fid)
        if behind and not self._was_behind:
            run.warn(
                f"{message}. Other data gives other scores; unless yours is harder, check the samples, the chosen "
                "augmentation (--augment) and --learning_rate_d"
            )
        self._was_behind = self._was_behind or behind


def is_copying(scores: dict[str, float], num_images: int, num_real: int) -> bool:
    """Whether there are more copies, in features or pixels, than chance and the data's own duplicates explain.

    Args:
        scores: fractions of copies, and those expected.
        num_images: generated images.
        num_real: real images among which the expected fractions were measured. These are uncertain, too: two images
            that are each other's nearest count as one observation, so there are at least half as many.
    """
    for name in ("copies", "copies_by_pixels"):
        expected = scores[f"{name}_expected"]
        variance = max(expected * (1 - expected), 1 / num_images)
        if scores[name] > expected + STANDARD_ERRORS * math.sqrt(variance * (1 / num_images + 2 / num_real)):
            return True
    return False


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of the run in `folder`, oldest first."""
    return read_json_lines(folder / EVALUATIONS_FILE, ("step", "copying"))


def _unused_settings(settings: RunSettings) -> str:
    """Return the options that a run without evaluations was given for them."""
    defaults = RunSettings(settings.output_dir)
    names = ("evaluate_num_images", "best_by", "feature_weights")
    changed = [name for name in names if getattr(settings, name) != getattr(defaults, name)]
    return ", ".join(f"--{name} {getattr(settings, name)}" for name in changed)


def _save_best(folder: Path, pipeline: DiffusionPipeline, line: dict[str, Any]) -> None:
    save_with_digests(pipeline.save_pretrained, folder / PIPELINE_FOLDER)
    (folder / SCORES_FILE).write_text(json.dumps(line, indent=2) + "\n")
