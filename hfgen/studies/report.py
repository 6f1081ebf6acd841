"""The report of a study: a folder with the table in three formats, curves, sheets and an HTML page."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from hfgen.data.location import is_path
from hfgen.files import write_atomically
from hfgen.studies.cells import Cell, Study
from hfgen.studies.commands import command_of, dataset_to_give, script_of, settings_outside
from hfgen.studies.outcomes import BROKEN, DIVERGED, TRAINED, Outcome
from hfgen.studies.page import render_page
from hfgen.studies.pictures import plot_loss_curves, plot_score_curves, sample_rows, strip_rows
from hfgen.studies.study_file import METRICS
from hfgen.studies.table import (
    NAN,
    Outcomes,
    Row,
    agreements,
    csv_cells,
    csv_course,
    latex,
    markdown_matrix,
    markdown_rows,
    ranked,
    rows_of,
    winner,
)
from hfgen.texts import counted, markdown_text


FILES = {
    "report.md": "the tables and the pictures",
    "cells.csv": "one line per cell, with all scores",
    "table.tex": "the table for a paper",
    "index.html": "a self-contained page to view",
    "study.json": "the study with all settings of every cell",
    "commands.sh": "a command to retrain each cell",
}
# All that a report may contain, and by which of it an earlier one is recognised.
WINNER_FILE = "winner.json"
OWN_FILES = {*FILES, WINNER_FILE, "course.csv", "curves.png", "scores.png", "samples.jpg", "denoising.jpg"}
MARKER = "study.json"
MAX_REASON = 300
MAX_NAMED = 6
# A path in quotes, or without spaces; of URLs only those of files and databases.
PATHS = re.compile(
    r"""(?P<quote>['"`])(?P<quoted>(?:/|[A-Za-z]:[\\/])[^'"`\n]*)(?P=quote)"""
    r"""|(?:(?<=:)/{3,}|(?<![\w./\\~<])(?:~?/(?!/)|[A-Za-z]:[\\/]))(?P<plain>[^\s'"`,;:()<>|]+)"""
)


def write_report(study: Study, outcomes: Outcomes, folder: Path) -> None:
    """Write a study's report with the results so far, replacing an earlier one.

    Args:
        study: the stored study.
        outcomes: outcome of each cell, by name.
        folder: report folder; an earlier report is replaced atomically, anything else there is kept.

    Raises:
        UserError: if the folder cannot be written, or holds something else.
    """
    dataset = dataset_to_give(study)
    study, outcomes = for_others(study, outcomes)
    rows = rows_of(study, outcomes)
    commands = {name: command_of(cell, study, dataset) for name, cell in study.cells.items()}

    def write(target: Path) -> None:
        target.mkdir()
        pictures = {}
        if (figure := plot_loss_curves(rows)) is not None:
            figure.savefig(target / "curves.png", dpi=80)
            pictures["curves.png"] = "Losses of every cell, one line per seed"
        if (figure := plot_score_curves(rows)) is not None:
            figure.savefig(target / "scores.png", dpi=80)
            of_vaes = study.evaluation.sample_from != "prior" and any(
                cell.method == "vae" and cell.settings["density_components"] for cell in study.cells.values()
            )
            density = (
                "; VAEs sample from a single Gaussian, at the last point from the fitted density" if of_vaes else ""
            )
            pictures["scores.png"] = f"FID against training images seen, one point per seed{density}"
        if (sheet := sample_rows(rows)) is not None:
            sheet.save(target / "samples.jpg", quality=88)
            pictures["samples.jpg"] = "Samples of each cell, from its first finished seed"
        if (strip := strip_rows(study, rows)) is not None:
            strip.save(target / "denoising.jpg", quality=88)
            pictures["denoising.jpg"] = "Denoising, from noise (left) to images, after the step nearest to timestep t"
        texts = {
            "report.md": markdown(study, rows, pictures, dataset),
            "cells.csv": csv_cells(study, rows),
            "course.csv": csv_course(study, rows),
            "table.tex": latex(study, rows),
            "study.json": json.dumps(_nan_as_text(study.to_dict()), indent=1, allow_nan=False) + "\n",
            WINNER_FILE: json.dumps(settings_outside(best), indent=1) + "\n"
            if (best := winning_cell(study, rows))
            else "",
            "commands.sh": script_of(commands),
            "index.html": render_page(study, rows, statements(study, rows, dataset), endings(study, rows), commands),
        }
        for name, text in texts.items():
            if text:  # course.csv only if the study scores during training, winner.json only if there is one
                (target / name).write_text(text, encoding="utf-8")

    write_atomically(folder, write, MARKER, OWN_FILES)


def for_others(study: Study, outcomes: Outcomes) -> tuple[Study, Outcomes]:
    """Prepare a study for sharing: reduce local paths to their last part, and shorten long reasons."""
    cells = {name: replace(cell, settings=_without_paths(cell.settings, study)) for name, cell in study.cells.items()}
    shortened: dict[str, Outcome | None] = {}
    for name, outcome in outcomes.items():
        if outcome is not None:
            reason = _without_paths(outcome.reason, study)
            reason = reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 2].rstrip() + " …"
            result = outcome.result
            if result is not None:
                result = replace(result, summary=_without_paths(result.summary, study))
            outcome = replace(outcome, reason=reason, result=result)
        shortened[name] = outcome
    return replace(study, dataset=dataset_name(study), cells=cells), shortened


def _without_paths(value: Any, study: Study) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(part, study) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(part, study) for part in value]
    if not isinstance(value, str):
        return value
    name = dataset_name(study)
    text = value.replace(study.dataset, name) if 0 < len(name) < len(study.dataset) else value  # it may contain spaces
    return PATHS.sub(_last_part, text)


def _last_part(found: re.Match[str]) -> str:
    name = PureWindowsPath(found["quoted"] or found["plain"]).name
    return f"{found['quote']}{name}{found['quote']}" if found["quote"] else name


def dataset_name(study: Study) -> str:
    """Return the name of the dataset, without its local path."""
    return PureWindowsPath(study.dataset).name if is_path(study.dataset) else study.dataset


def _nan_as_text(value: Any) -> Any:
    """Replace non-finite numbers, such as a published NaN, by text for JSON."""
    if isinstance(value, dict):
        return {key: _nan_as_text(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_nan_as_text(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return NAN if math.isnan(value) else str(value)
    return value


def markdown(study: Study, rows: list[Row], pictures: dict[str, str], dataset: str) -> str:
    """Build the text of `report.md`."""
    parts = [f"# {markdown_text(study.title)}", *map(markdown_text, statements(study, rows, dataset))]
    if matrix := markdown_matrix(study, rows):
        parts.append(matrix.strip())
    parts.append(markdown_rows(study, rows).strip())
    if lost := endings(study, rows):
        parts.append("\n".join(f"- {markdown_text(line)}" for line in lost))
    parts += [f"![{caption}]({name})\n\n{caption}." for name, caption in pictures.items()]
    files = ", ".join(
        f"[{name}]({name}) ({what})" for name, what in files_of(study, rows).items() if name != "report.md"
    )
    return "\n\n".join([*parts, f"Also here: {files}."]) + "\n"


def files_of(study: Study, rows: list[Row]) -> dict[str, str]:
    """Return the names of a report's text files, and what is in them."""
    course = {"course.csv": "FID over the course of training"} if any(row.course() for row in rows) else {}
    return FILES | course | ({WINNER_FILE: "the settings of the best cell"} if winner(study, rows) else {})


def winning_cell(study: Study, rows: list[Row]) -> Cell | None:
    """Return the cell with the first seed of the best row; None if there is nothing to compare."""
    return study.cells[ranked(study, rows)[0].place.cells[0]] if winner(study, rows) else None


def statements(study: Study, rows: list[Row], dataset: str) -> list[str]:
    """Describe what was done and how it compares, one paragraph each; `dataset` is for the command to repeat it."""
    paragraphs = [study.question] if study.question else []
    if (best := winning_cell(study, rows)) is not None:
        again = command_of(best, study, dataset, WINNER_FILE)
        paragraphs.append(f"{winner(study, rows)} To train it again, in the folder of this report: {again}")
    paragraphs += [conditions(study, rows), *hardware(rows)]
    if floor := floors(study, rows):
        paragraphs.append(floor)
    published = any(row.published for row in rows)
    if published:
        paragraphs.append(f"Published: {study.source}." if study.source else "The table also shows published scores.")
    if agreed := agreements(study, rows):
        paragraphs.append("Comparison with the published order: " + " ".join(agreed))
    return paragraphs


def conditions(study: Study, rows: list[Row]) -> str:
    """Describe data, budget, seeds and number of images, and what was reduced."""
    finished = sum(outcome is not None for outcome in _unique(rows).values())
    seeds = ", ".join(map(str, study.seeds))
    evaluation = study.evaluation
    of_seeds = f"seeds {seeds}; ± is the standard deviation over them" if len(study.seeds) > 1 else f"seed {seeds}"
    diffusion = ""
    if any(cell.method == "ddpm" for cell in study.cells.values()):
        sampler = f" of {evaluation.sampler}" if evaluation.sampler else ""
        # A cell with fewer timesteps was scored in so many steps.
        taken = sorted({int(steps) for row in rows for steps in row.numbers(("num_inference_steps",))})
        taken = [taken[0], taken[-1]] if taken else [evaluation.num_inference_steps]
        diffusion = f", diffusion in {' to '.join(dict.fromkeys(map(str, taken)))} steps{sampler}"
    ended = "" if finished == len(study.cells) else f" ({finished} ended)"
    cells = f"{counted(len(study.cells), 'cell')}{ended}"
    text = (
        f"{METRICS[study.metric]} of {cells}, each trained for {study.budget}; {of_seeds}. "
        f"{evaluation.num_images:,} images of each are scored (generated with seed {evaluation.seed}"
        f"{diffusion})"
    )
    size = _common(rows, ("sample_size",), "{} pixels")
    count = _common(rows, ("scores", "num_real"), "{:,} real images")
    real = count or (["real images"] if size else ["the real images"])
    text += f" against {' of '.join([*real, *size, study.dataset])}."
    if evaluation.features != "inception":
        text += (
            f" In features of {evaluation.features}, not of Inception: what is called FID and KID here is the Frechet "
            "and the kernel distance in these, and cannot be compared with FID and KID."
        )
    elif evaluation.mode != "clean":
        text += f" Images were resized for Inception in {evaluation.mode} mode, not as by clean-fid."
    if study.asked is not None:
        parts = [f"each cell trained for {study.full_budget}"]
        if study.full_evaluation != study.evaluation and study.full_evaluation is not None:
            parts.append(f"{study.full_evaluation.num_images:,} images scored")
        if study.full_seeds != study.seeds and study.full_seeds is not None:
            parts.append(f"seeds {', '.join(map(str, study.full_seeds))}")
        text += f" Scaled down to {study.asked} of work in total; the full study asks for: {', '.join(parts)}."
    return text


def hardware(rows: list[Row]) -> list[str]:
    """Describe the hardware that the cells were trained on."""
    found: Counter[str] = Counter()
    for row in rows:
        for outcome in row.outcomes:
            if outcome is not None and outcome.result is not None:
                one = outcome.result.summary["environment"]
                precision = one["mixed_precision"] if one["mixed_precision"] != "no" else "fp32"
                threads = f", {one['threads']} thread{'s' if one['threads'] > 1 else ''}"
                found[f"{one['device']}{threads}, {precision}, torch {one['torch']}, hfgen {one['hfgen']}"] += 1
    return [f"Trained on: {'; '.join(found)}."] if found else []


def floors(study: Study, rows: list[Row]) -> str:
    """Describe the score of real images by the same metric, for the same number of images."""
    if study.metric != "fid":
        return ""
    parts = [("num_fake", "{:,}"), ("num_real", "{:,}"), ("fid", "{:.4g}")]
    found = [_common(rows, ("floor", "split", name), form) for name, form in parts]
    if not all(found):
        return ""
    (count,), (others,), (fid,) = found
    return f"The floor: {count} real images score FID {fid} against {others} others."


def endings(study: Study, rows: list[Row]) -> list[str]:
    """List cells without a figure, with the reason, and cells that rolled back or had warnings."""
    lines, waiting = [], []
    for name, outcome in _unique(rows).items():
        if outcome is None:
            waiting.append(name)
        elif outcome.kind in (DIVERGED, BROKEN):
            at = f" at step {outcome.step:,}" if outcome.step is not None else ""
            lines.append(f"{name}: {'NaN' if outcome.kind == DIVERGED else 'no score'}{at}: {outcome.reason}")
        elif outcome.kind == TRAINED and outcome.result is not None:
            training = outcome.result.summary["training"]
            if back := training["rollbacks"]:
                times = "once" if back == 1 else f"{back} times"
                lines.append(f"{name}: rolled back {times}, with half the learning rate each time")
            lines += [f"{name}: {warning}" for warning in training["warnings"]]
    if waiting:
        more = f" and {len(waiting) - MAX_NAMED} more" if len(waiting) > MAX_NAMED else ""
        lines.append(f"not run yet: {', '.join(waiting[:MAX_NAMED])}{more}")
    return lines


def _unique(rows: list[Row]) -> dict[str, Outcome | None]:
    return {name: outcome for row in rows for name, outcome in zip(row.place.cells, row.outcomes, strict=True)}


def _common(rows: list[Row], keys: tuple[str, ...], form: str) -> list[str]:
    """Return a figure that is the same in all cells, as a list of one; else an empty list."""
    found: set[Any] = {int(value) if value == int(value) else value for row in rows for value in row.numbers(keys)}
    return [form.format(found.pop())] if len(found) == 1 else []
