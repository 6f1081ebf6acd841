"""Estimating a study's cost from short real trainings, and scaling it down to the available time."""

import dataclasses
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfgen.data.store import load_images
from hfgen.errors import UserError
from hfgen.evaluation.reference import features_folder
from hfgen.families import family
from hfgen.inference.opening import choose_device, open_pipeline
from hfgen.inference.sampling import SamplingOptions, generate_images
from hfgen.metrics.extraction import Extractor
from hfgen.metrics.feature_spaces import build_extractor
from hfgen.studies.cells import ALL_CHECKPOINTS, Cell, Study, expand, images_per_step, num_scored_checkpoints
from hfgen.studies.launch import Workspace, missing_device, train_cell
from hfgen.studies.outcomes import TRAINED
from hfgen.studies.results import data_settings
from hfgen.studies.study_file import Budget, Evaluation, Family, StudyFile
from hfgen.texts import counted, printable, say
from hfgen.training.duration import estimated, format_duration
from hfgen.training.history import read_metrics


PROBE_SECONDS = 20.0
# Settings that do not affect the time per update: cells that differ only in these share a probe.
IDLE_SETTINGS = {
    *("seed", "max_train_steps", "learning_rate", "learning_rate_d", "lr_scheduler", "lr_warmup_steps", "adam_beta1"),
    *("adam_beta2", "weight_decay", "max_grad_norm", "ema_decay", "label_smoothing", "latent_dim", "kl_weight"),
    *("kl_warmup_steps", "free_bits", "num_train_timesteps", "beta_schedule", "snr_gamma", "horizontal_flip"),
}
GENERATED, GENERATED_BY_DIFFUSION, DENOISING_STEPS = 32, 4, 3
# Scoring gets at most this fraction of a reduced study's time, and at least this many images.
SCORING_SHARE, MIN_SCORED = 0.3, 250
# Seeds are dropped if training gets less than the first fraction of the time; below the second the study is refused.
TRAINING_SHARE, MIN_TRAINING_SHARE = 0.5, 0.1
GIGABYTE = 1e9


@dataclass(frozen=True)
class Probe:
    """Measurements of a short training and sampling for one kind of cell.

    Attributes:
        start_seconds: time from launch to the first update.
        images_per_second: training speed.
        generate_seconds: time to generate one image; for diffusion, of each of its denoising steps.
        kept_bytes: disk space that a finished cell keeps.
        passing_bytes: disk space of its checkpoints, deleted after scoring.
    """

    start_seconds: float
    images_per_second: float
    generate_seconds: float
    kept_bytes: int
    passing_bytes: int


@dataclass(frozen=True)
class Plan:
    """The cost of a study's cells on this machine.

    Attributes:
        probes: probe by kind of cell; None if this machine does not have the device.
        kinds: kind of each cell, by its name.
        feature_seconds: time to compute the features of one image.
        real_images: number of real images whose features are not computed yet.
    """

    probes: dict[str, Probe | None]
    kinds: dict[str, str]
    feature_seconds: float
    real_images: int

    def probe(self, cell: Cell) -> Probe | None:
        """Return the measurements for a cell."""
        return self.probes[self.kinds[cell.name]]

    def train_seconds(self, cell: Cell, budget: Budget) -> float:
        """Return the time of a cell's updates, in seconds."""
        probe = self.probe(cell)
        if probe is None:
            return 0.0
        if budget.minutes is not None:
            return 60 * budget.minutes
        return cell.settings["max_train_steps"] * images_per_step(cell.settings) / probe.images_per_second

    def score_seconds(self, cell: Cell, evaluation: Evaluation, num_images: int | None = None) -> float:
        """Return the time to generate and score images of a cell, at each point that is scored.

        Args:
            cell: a cell.
            evaluation: how it is scored.
            num_images: images to score; the evaluation's number if None.
        """
        probe = self.probe(cell)
        if probe is None:
            return 0.0
        points = num_scored_checkpoints(cell) + 1
        features = 2 if cell.method == "vae" else 1  # a VAE's reconstructions are scored, too
        steps = 1
        if cell.method == "ddpm":  # as a cell is scored: it has no more steps than it was trained with
            steps = min(evaluation.num_inference_steps, cell.settings["num_train_timesteps"])
        each = steps * probe.generate_seconds + features * self.feature_seconds
        return points * (evaluation.num_images if num_images is None else num_images) * each

    def fixed_seconds(self, study: Study) -> float:
        """Return the time that does not depend on the budget: launches, and the features of the real images."""
        probes = [self.probe(cell) for cell in study.cells.values()]
        return sum(probe.start_seconds for probe in probes if probe) + self.real_images * self.feature_seconds

    def seconds(self, study: Study) -> float:
        """Return the time of the whole study with one worker on this machine."""
        cells, scored = study.cells.values(), study.evaluation
        times = [self.train_seconds(cell, study.budget) + self.score_seconds(cell, scored) for cell in cells]
        return self.fixed_seconds(study) + sum(times)


def make_plan(study: Study, workspace: Workspace) -> Plan:
    """Train every kind of cell for some seconds, generate images with it, and measure the speed.

    Args:
        study: the study to plan.
        workspace: this worker's folders; the output folder is not touched.

    Raises:
        UserError: if the dataset or the feature weights are missing, or a kind of cell cannot be trained.
    """
    evaluation = study.evaluation
    extractor = build_extractor(evaluation.features, evaluation.mode, workspace.feature_weights, choose_device("auto"))
    todo = features_to_compute(study, workspace, extractor)
    kinds = {name: _kind(cell) for name, cell in study.cells.items()}
    probes: dict[str, Probe | None] = {}
    for name, cell in study.cells.items():
        if kinds[name] not in probes:
            missing = missing_device(cell)
            say(f"{name}: left out: {missing}" if missing else f"measuring {name}")
            probes[kinds[name]] = None if missing else _measure(cell, study, workspace)
    size = max(cell.settings["sample_size"] for cell in study.cells.values())
    return Plan(probes, kinds, _feature_seconds(extractor, size), todo)


def features_to_compute(study: Study, workspace: Workspace, extractor: Extractor) -> int:
    """Return how many real images have no features yet; decodes all images now, outside the probes' time."""
    todo = 0
    for settings in {
        repr(data): data for data in (data_settings(cell, workspace) for cell in study.cells.values())
    }.values():
        images = load_images(settings)
        todo += 0 if features_folder(images, settings, extractor).is_dir() else len(images)
    return todo


def _kind(cell: Cell) -> str:
    parts = {key: value for key, value in cell.settings.items() if key not in IDLE_SETTINGS}
    return json.dumps([cell.method, cell.device, parts], sort_keys=True)


def _measure(cell: Cell, study: Study, workspace: Workspace) -> Probe:
    probe = _train_and_generate(cell, study, workspace)
    start, steps = cell.settings.get("learned_term_start", 0), cell.settings["max_train_steps"]
    if not start:
        return probe
    # A VAE whose learned term begins later is about twice as slow from then on.
    later = dataclasses.replace(cell, settings=cell.settings | {"learned_term_start": 1})
    slower = _train_and_generate(later, study, workspace)
    time_per_image = start / probe.images_per_second + (steps - start) / slower.images_per_second
    return dataclasses.replace(slower, start_seconds=probe.start_seconds, images_per_second=steps / time_per_image)


def _train_and_generate(cell: Cell, study: Study, workspace: Workspace) -> Probe:
    probing: dict[str, Any] = {"log_every": 2, "checkpoint_every": 0, "evaluate_every": 0}
    # No ex-post density: fitting one takes time, which would count as start of the next cell.
    probing |= {"density_components": 0, "density": "mixture"}
    settings = cell.settings | {key: value for key, value in probing.items() if key in cell.settings}
    budget = Budget(minutes=PROBE_SECONDS / 60)
    with tempfile.TemporaryDirectory() as folder:
        probed = dataclasses.replace(cell, settings=settings)
        there = dataclasses.replace(workspace, output=Path(folder))
        started = time.monotonic()
        ending = train_cell(probed, budget, there)
        seconds = time.monotonic() - started
        run = there.run_folder(probed)
        if ending.kind != TRAINED:
            raise UserError(f"{cell.name}: cannot be trained here: {ending.reason}")
        log = read_metrics(run)
        settled = log[len(log) // 3 :]
        speed = statistics.median(entry["images_per_second"] for entry in settled)
        start = max(0.0, seconds - log[-1]["images"] / speed)
        passing = _size(run / "checkpoints")
        generating = _generate_seconds(run)
        # While a checkpoint is written, there is one more than the limit.
        limit = cell.settings["checkpoints_total_limit"]
        kept = num_scored_checkpoints(cell) + 1 if limit == ALL_CHECKPOINTS else limit
        return Probe(start, speed, generating, _size(run) - passing, passing * (kept + 1))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _generate_seconds(run: Path) -> float:
    pipeline: Any = open_pipeline(str(run))
    pipeline.set_progress_bar_config(disable=True)
    count, steps = GENERATED, None
    if family(pipeline) == "ddpm":
        count, steps = GENERATED_BY_DIFFUSION, min(DENOISING_STEPS, pipeline.scheduler.config.num_train_timesteps)
    started = time.monotonic()
    list(generate_images(pipeline, SamplingOptions(count, 0, steps, count)))
    return (time.monotonic() - started) / count / (steps or 1)


def _feature_seconds(extractor: Extractor, size: int) -> float:
    noise = np.random.default_rng(0).integers(0, 256, (2 * GENERATED, size, size, 3), dtype=np.uint8)
    extractor(iter(noise[:8]), 8)  # the first call compiles
    started = time.monotonic()
    extractor(iter(noise), len(noise))
    return (time.monotonic() - started) / len(noise)


def describe_plan(study: Study, plan: Plan) -> str:
    """Describe the cost of a study, one line per kind of cell."""
    seeds = ", ".join(map(str, study.seeds))
    lines = [f"{study.title}: {len(study.cells)} cells, each trained for {study.budget}, seeds {seeds}"]
    left_out = 0
    for kind, probe in plan.probes.items():
        names = [name for name in study.cells if plan.kinds[name] == kind]
        if probe is None:
            left_out += len(names)
            lines.append(f"  {names[0]}{_and_others(names)}: left out, as this machine does not have the device")
            continue
        cell = study.cells[names[0]]
        training = plan.train_seconds(cell, study.budget)
        # Cells with fewer timesteps than the evaluation has steps take less time.
        scoring = sorted(plan.score_seconds(study.cells[name], study.evaluation) for name in names)
        times = " to ".join(dict.fromkeys(map(format_duration, (scoring[0], scoring[-1]))))
        lines.append(
            f"  {names[0]}{_and_others(names)}: {probe.images_per_second:.3g} images/s, {format_duration(training)} "
            f"of training, {times} for {study.evaluation.num_images:,} scored images"
        )
    probes = [probe for cell in study.cells.values() if (probe := plan.probe(cell))]
    disk = sum(probe.kept_bytes for probe in probes) + max((probe.passing_bytes for probe in probes), default=0)
    trained = sum(plan.train_seconds(cell, study.budget) for cell in study.cells.values())
    lines.append(
        f"{estimated(plan.seconds(study))} in total with one worker on this machine, {estimated(trained)} of it "
        f"training, and at most {disk / GIGABYTE:.2g} GB of disk space"
    )
    if left_out:
        lines.append(f"without {left_out} of {len(study.cells)} cells, which need a machine with CUDA")
    if plan.real_images:
        lines.append(f"this includes computing the features of the {plan.real_images:,} real images once")
    return "\n".join(map(printable, lines))


def scale_down(file: StudyFile, study: Study, plan: Plan, asked: str, seconds: float, workspace: Workspace) -> Study:
    """Reduce a study to fit into the time: fewer scored images, then fewer seeds, then shorter training.

    All cells are reduced alike; the original values are stored with the study and shown in its report.

    Args:
        file: the study file.
        study: the expanded study.
        plan: its cost.
        asked: the time, as the user wrote it.
        seconds: the time in seconds.
        workspace: this worker's folders.

    Returns:
        The reduced study, or the study unchanged if it fits.

    Raises:
        UserError: if not even one seed fits.
    """
    if plan.seconds(study) <= seconds:
        return study
    reduced = file
    while True:
        cells = expand(reduced, workspace.scripts, study.dataset)
        left = seconds - plan.fixed_seconds(cells)
        one_each = sum(plan.score_seconds(cell, file.evaluation, 1) for cell in cells.cells.values())
        fitting = int(SCORING_SHARE * max(left, 0.0) / one_each) if one_each else file.evaluation.num_images
        num_images = min(file.evaluation.num_images, max(MIN_SCORED, fitting))
        left -= num_images * one_each
        if left >= TRAINING_SHARE * seconds or len(reduced.seeds) == 1:
            break
        reduced = dataclasses.replace(reduced, seeds=reduced.seeds[:-1])
    if left < MIN_TRAINING_SHARE * seconds:
        needed = (seconds - left) / (1 - MIN_TRAINING_SHARE)
        raise UserError(
            f"--budget {asked}: too short for {len(cells.cells)} cells, whose launches and scores of {num_images} "
            f"images take {format_duration(seconds - left)}; "
            f"give at least {format_duration(needed)}, or shorten the grid"
        )
    share = min(1.0, left / sum(plan.train_seconds(cell, file.budget) for cell in cells.cells.values()))
    every = file.evaluation.every_images
    every = None if every is None else max(1, math.ceil(every * share))  # same number of scores in a shorter training
    evaluation = dataclasses.replace(file.evaluation, num_images=num_images, every_images=every)
    budget = cut_budget(file.budget, share)
    _check_terms_of_the_grid(study, budget, asked)
    reduced = with_smaller_budget(dataclasses.replace(reduced, evaluation=evaluation), study, budget)
    return with_original_values(expand(reduced, workspace.scripts, study.dataset), file, asked)


def with_smaller_budget(file: StudyFile, study: Study, budget: Budget) -> StudyFile:
    """Give a study file a smaller budget; learned terms of VAEs then begin earlier, after the same share.

    Args:
        file: the study file, with its own budget.
        study: the study that is expanded from it.
        budget: the new one.
    """
    share = (budget.images or budget.steps or 0) / (file.budget.images or file.budget.steps or 1)
    families = {name: _with_earlier_term(family, study, name, share) for name, family in file.families.items()}
    return dataclasses.replace(file, budget=budget, families=families)


def _with_earlier_term(family: Family, study: Study, name: str, share: float) -> Family:
    """Let the learned term of a VAE begin after the same share of a shorter training, unless the grid says when."""
    places = [place for place in study.places if place.family == name]
    starts = {study.cells[cell].settings.get("learned_term_start", 0) for place in places for cell in place.cells}
    if any("learned_term_start" in place.point for place in places) or starts == {0}:
        return family
    earlier = {"learned_term_start": int(share * starts.pop())}
    return dataclasses.replace(family, settings={**family.settings, **earlier})


def _check_terms_of_the_grid(study: Study, budget: Budget, asked: str) -> None:
    """Raise a `UserError` if a smaller budget ends before a learned term whose start the grid sets: it stays there."""
    cells = [study.cells[cell] for one in study.places if "learned_term_start" in one.point for cell in one.cells]
    for cell in sorted(cells, key=lambda cell: cell.settings["learned_term_start"], reverse=True):
        start = cell.settings["learned_term_start"]
        steps = budget.steps or math.ceil((budget.images or 0) / images_per_step(cell.settings))
        if start >= steps:
            raise UserError(
                f"--budget {asked}: too short for learned_term_start {start} of the grid: {cell.name} would train for "
                f"{counted(steps, 'update')}; give more time, or an earlier start"
            )


def with_original_values(study: Study, file: StudyFile, asked: str) -> Study:
    """Store the study file's original values in a reduced study."""
    return dataclasses.replace(
        study, asked=asked, full_budget=file.budget, full_evaluation=file.evaluation, full_seeds=file.seeds
    )


def cut_budget(budget: Budget, share: float) -> Budget:
    """Return a fraction of a budget: steps and images rounded down to 2 significant digits, minutes rounded to 3."""
    if budget.minutes is not None:
        return Budget(minutes=float(f"{budget.minutes * share:.3g}"))
    whole = (budget.steps or budget.images or 0) * share
    digits = 10 ** max(0, math.floor(math.log10(max(whole, 1))) - 1)
    rounded = max(1, int(whole // digits * digits))
    return Budget(steps=rounded) if budget.steps is not None else Budget(images=rounded)


def _and_others(names: list[str]) -> str:
    return f" and {len(names) - 1} more like it" if len(names) > 1 else ""
