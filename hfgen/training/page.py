"""The page of a run, `index.html` in its folder: pictures, curves, status and settings, complete in itself."""

import base64
import io
import re
import shlex
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from hfgen.config import default_values
from hfgen.errors import UserError
from hfgen.files import read_json, read_json_lines, write_text_atomically
from hfgen.metrics.report import finite
from hfgen.pages import page_template
from hfgen.run_files import (
    EVALUATIONS_FILE,
    EVENTS_FILE,
    INTAKE_FILE,
    LAUNCHES_FILE,
    METRICS_FILE,
    SCORES_FILE,
    SETTINGS_FILE,
    STATUS_FILE,
)
from hfgen.texts import one_message, printable
from hfgen.training.charts import charts_of, score_charts
from hfgen.training.duration import WITHOUT_END, parse_duration
from hfgen.training.history import NEEDED, images_at
from hfgen.training.reference_curves import compare_with_reference, reference_of
from hfgen.training.settings import rates_follow_length


PAGE_FILE = "index.html"
# Sheets on a slider, the longer side of a picture in pixels, and events in the list, at most.
SHOWN_SHEETS, SHOWN_PIXELS, SHOWN_EVENTS = 24, 768, 50
RECENT = 10  # log entries from which the time left is estimated
# Sheets with a slider, and their titles; `hfgen sample` draws from a VAE's ex-post density by default.
KINDS = {"samples": "samples", "ex_post": "samples from the ex-post density", "reconstructions": "reconstructions"}
TRAINING_IMAGES = "training_images"  # sheets of which the newest is shown
# A page that sheets ask for is written if at least this many times the seconds of the last writing have passed.
PAUSE = 20


class RunPage:
    """Keeps the page of a run up to date; if that fails, it only warns.

    Args:
        folder: the run's folder.
        settings: all settings of the run, as instances of their dataclasses.
        is_main: whether this process writes it; others do nothing.
    """

    def __init__(self, folder: Path, settings: Sequence[Any], is_main: bool):
        self._folder, self._classes, self._is_main = folder, [type(one) for one in settings], is_main
        self._pause_until = 0.0

    def refresh(self, step: int) -> float:
        """Write the page unless it was written just now; return the seconds that it took."""
        return self.write(step) if time.monotonic() >= self._pause_until else 0.0

    def write(self, step: int) -> float:
        """Write the page and return the seconds that it took."""
        started = time.monotonic()
        if not self._is_main:
            return 0.0
        try:
            write_page(self._folder, self._classes, step)
            if not self._pause_until:
                tqdm.write(one_message(f"page of this run: {self._folder / PAGE_FILE}"))  # above the progress bar
        except Exception as error:  # whatever is wrong with a page must not end a training
            tqdm.write(one_message(f"warning: {self._folder / PAGE_FILE} was not written: {error}"))
        seconds = time.monotonic() - started
        self._pause_until = time.monotonic() + PAUSE * seconds
        return seconds


def write_page(folder: Path, classes: Sequence[type], step: int | None = None, is_alive: bool = True) -> Path:
    """Write a run's page anew and return its path.

    Args:
        folder: the run's folder.
        classes: the dataclasses of its settings, for their defaults and the name of the method.
        step: updates so far, if known: newer sheets are left over from before a rollback or a resume.
        is_alive: whether the run may still be running, if its status says so.

    Raises:
        UserError: if a file of the run is damaged, or the page cannot be written.
    """
    settings = read_json(folder / SETTINGS_FILE)
    log = read_json_lines(folder / METRICS_FILE, (*NEEDED, "images"))
    launches = read_json_lines(folder / LAUNCHES_FILE, ("from_step",))
    evaluations = [line for line in _evaluations(folder, log) if step is None or line["step"] <= step]
    best = folder / "best" / SCORES_FILE
    best_step = read_json(best).get("step") if best.is_file() else None
    status = read_json(folder / STATUS_FILE) if (folder / STATUS_FILE).is_file() else {}
    if status.get("status") == "running" and not is_alive:
        status |= {"status": "interrupted", "reason": "its process is gone"}
    total = launches[-1].get("max_train_steps", settings.get("max_train_steps")) if launches else None
    text = page_template("training/page.html").render(
        title=printable(folder.resolve().name),
        written=time.strftime("%Y-%m-%d %H:%M"),
        state=_state(status, log, settings, total, step),
        events=_events(folder),
        sliders=_sliders(folder, step, log, evaluations, best_step),
        training_images=_picture(max((folder / TRAINING_IMAGES).glob("step-*.png"), default=folder)),
        data=_data(folder, settings, launches),
        comparison=_comparison(settings, log, evaluations, best_step),
        charts=finite(score_charts(log, evaluations, settings) + charts_of(log)),
        settings=_settings(settings, classes),
        launches=[{key: shown(value) for key, value in launch.items()} for launch in launches],
        commands=_commands(folder, settings, classes, launches, status, total),
        is_final=_is_final(folder, status),
    )
    write_text_atomically(folder / PAGE_FILE, text)
    return folder / PAGE_FILE


def _evaluations(folder: Path, log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores by step: of `evaluations.jsonl`, which has each at its own step, else of the log."""
    found = read_json_lines(folder / EVALUATIONS_FILE, ("step", "fid"))
    return found or [entry for entry in log if "fid" in entry]


# ---------------------------------------- pictures


def _sliders(
    folder: Path, step: int | None, log: list[dict[str, Any]], evaluations: list[dict[str, Any]], best: int | None
) -> list[dict[str, Any]]:
    """Return the sheets to show, oldest first, for each kind that the run has."""
    sliders = []
    fids = {line["step"]: f"FID {line['fid']:.4g}" for line in evaluations}
    for kind, title in KINDS.items():
        steps = {int(re.sub(r"\D", "", path.stem) or 0): path for path in (folder / kind).glob("step-*.png")}
        sheets = []
        for at in steps_to_show(sorted(at for at in steps if step is None or at <= step)):
            if picture := _picture(steps[at]):
                parts = [f"step {at:,}", f"{images_at(log, at):,} images" if log and at else "", fids.get(at, "")]
                caption = " · ".join(filter(None, parts)) + (" (best)" if at == best else "")
                sheets.append({"caption": caption, "picture": picture})
        if sheets:
            sliders.append({"kind": kind, "title": title, "newest": sheets.pop(), "earlier": sheets})
    return sliders


def steps_to_show(steps: list[int]) -> list[int]:
    """Return at most `SHOWN_SHEETS` of the steps, among them the first and the last.

    Every 2nd, 4th, 8th, ...: what a longer run shows, a shorter one has shown, so that little is encoded anew.
    """
    stride = 1
    while len(steps[::stride]) >= SHOWN_SHEETS:
        stride *= 2
    kept = steps[::stride]
    return kept if not steps or kept[-1] == steps[-1] else [*kept, steps[-1]]


def _picture(file: Path) -> str:
    """Return a picture of the run as base64 of a JPEG; "" if it is missing or damaged."""
    try:
        status = file.stat()
        return _encoded(file, status.st_mtime_ns, status.st_size)
    except Exception:  # damaged files make Pillow's decoders raise almost anything
        return ""


@lru_cache(maxsize=4 * SHOWN_SHEETS)
def _encoded(file: Path, _time: int, _size: int) -> str:
    """Encode a picture once, as long as the file does not change."""
    with Image.open(file, formats=["PNG"]) as opened:
        image = opened.convert("RGB")
    if max(image.size) > SHOWN_PIXELS:
        image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "jpeg", quality=88, subsampling=0)  # hard edges between small tiles
    return base64.b64encode(encoded.getvalue()).decode()


# ---------------------------------------- in words


def _state(
    status: dict[str, Any], log: list[dict[str, Any]], settings: dict[str, Any], total: int | None, step: int | None
) -> dict[str, Any]:
    """Return the status, the progress in words, and the part of the run that is done, from 0 to 1 or None."""
    name, reason = str(status.get("status", "not started")), str(status.get("reason", ""))
    is_running = name == "running"
    entry: dict[str, Any] = log[-1] if log else {"step": 0, "images": 0, "seconds": 0.0}
    at: int = max(step or 0, entry["step"], status.get("step") or 0)
    left = _seconds_left(at, status, log, settings, total) if is_running else None
    seconds = max(entry["seconds"], status.get("seconds") or 0)
    parts = [f"step {at:,}" + (f" of {total:,}" if total and total < WITHOUT_END else "")]
    if log:
        parts += [f"{images_at(log, at):,} images", f"{entry.get('images_per_second', 0):.3g} images/s"]
    parts.append(f"{in_words(seconds)} of training")
    if left is not None:
        parts.append(f"about {in_words(left)} left")
    done = min(1.0, at / total) if total else None
    if left is not None:
        done = seconds / max(seconds + left, 1e-9)
    about = "" if reason == name else printable(reason)
    return {"name": printable(name), "reason": about, "is_running": is_running, "parts": parts, "done": done}


def _seconds_left(
    step: int, status: dict[str, Any], log: list[dict[str, Any]], settings: dict[str, Any], total: int | None
) -> float | None:
    """Estimate the time to the last step or the time limit of this launch; None if nothing is known yet."""
    found = []
    recent = log[-RECENT:]
    if total is not None and len(recent) > 1 and recent[-1]["step"] > recent[0]["step"]:
        pace = (recent[-1]["seconds"] - recent[0]["seconds"]) / (recent[-1]["step"] - recent[0]["step"])
        found.append((total - step) * pace)
    if limit := parse_duration("--max_train_time", settings.get("max_train_time")):
        now = log[-1]["seconds"] if log else 0.0
        found.append(limit - max(0.0, now - status.get("seconds", 0.0)))  # the status is of the launch's beginning
    return max(0.0, min(found)) if found else None


def in_words(seconds: float) -> str:
    """Return a duration such as "2 h 5 min", "12 min" or "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _events(folder: Path) -> list[str]:
    """Return the warnings of the watch, rollbacks and other events, newest first."""
    events = read_json_lines(folder / EVENTS_FILE, ("step", "event", "what"))
    return [
        printable(f"step {one['step']:,}: {one['event']}: {one['what']}") for one in events[: -SHOWN_EVENTS - 1 : -1]
    ]


def _data(folder: Path, settings: dict[str, Any], launches: list[dict[str, Any]]) -> list[str]:
    """Describe the training images, one paragraph each."""
    size = settings.get("sample_size")
    text = f"{settings.get('dataset')}, trained at {size} x {size}"
    intake, warnings = folder / INTAKE_FILE, []
    if intake.is_file():
        report = read_json(intake)
        low, *_, high = report.get("short_side") or [0, 0]
        sides = f"{low}" if low == high else f"{low} to {high}"
        text = f"{report.get('training_images', 0):,} images, short side {sides} pixels; {text}"
        warnings = report.get("warnings", [])
    changes = [f"{name} {settings[name]}" for name in ("random_rotation", "random_erasing") if settings.get(name)]
    if settings.get("crop") == "random":
        changes.append("random crops")
    if settings.get("horizontal_flip"):
        changes.append("mirrored with probability 0.5")
    if settings.get("augment"):
        choices = [one["choices"] for one in launches if isinstance(one.get("choices"), dict)]
        augment = choices[0].get("augment", settings["augment"]) if choices else settings["augment"]
        changes.append(f"augmentation of the discriminator's input: {augment}")
    return [printable(line) for line in ("; ".join([text, *changes]), *warnings)]


def _comparison(
    settings: dict[str, Any], log: list[dict[str, Any]], evaluations: list[dict[str, Any]], best: int | None
) -> list[str]:
    """Compare the scores with those of the preset's reference run, in sentences without their full stops."""
    count = settings.get("evaluate_num_images", 0)
    curve = reference_of(settings, count)
    of_reference = f"the reference run of preset {curve.preset} ({curve.about})" if curve else ""
    if not evaluations:
        return [f"Not scored; with --evaluate_every N it could be compared with {of_reference}"] if curve else []
    newest = evaluations[-1]
    if (images := images_at(log, newest["step"])) is None:
        return []
    _, message = compare_with_reference(settings, count, images, newest["fid"])
    if not message:
        message = (
            f"{of_reference[0].upper()}{of_reference[1:]} has no score after so few images"
            if curve
            else "No preset with a reference run has these settings and this number of scored images"
        )
    return [message, *([f"The pipeline in best/ is that of step {best:,}"] if best is not None else [])]


# ---------------------------------------- settings


def shown(value: Any) -> str:
    """Return a value of a setting or a launch as text."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {shown(part)}" for key, part in value.items())
    return "unset" if value is None else printable(str(value))


def _settings(settings: dict[str, Any], classes: Sequence[type]) -> dict[str, list[dict[str, str]]]:
    """Return the settings that differ from their defaults, and the others."""
    defaults = default_values(classes)
    found: dict[str, list[dict[str, str]]] = {"changed": [], "default": []}
    for name, value in settings.items():
        known = name in defaults
        line = {"name": name, "value": value, "default": defaults[name] if known else ""}
        texts = {key: shown(part) for key, part in line.items()}
        found["default" if known and value == defaults[name] else "changed"].append(texts)
    return found


def method_of(classes: Sequence[type]) -> str | None:
    """Return "gan", "vae" or "ddpm", by the settings of hfgen's own scripts; None for those of another script."""
    modules = [one.__module__ for one in classes]
    return next((name.rsplit(".", 1)[1] for name in modules if name.startswith("hfgen.settings.")), None)


def _commands(
    folder: Path,
    settings: dict[str, Any],
    classes: Sequence[type],
    launches: list[dict[str, Any]],
    status: dict[str, Any],
    total: int | None,
) -> list[dict[str, str]]:
    """Return what one may do next: the purpose and the command."""
    found, method = [], method_of(classes)
    is_complete = status.get("status") == "complete"
    purpose = {"complete": "train longer", "running": "resume, if it stops"}.get(status.get("status", ""), "resume")
    can_go_on = not (is_complete and rates_follow_length(settings) or _is_final(folder, status))
    if method is not None and can_go_on:
        longer = ["--max_train_steps", str(2 * total)] if is_complete and total else []  # also replaces --num_epochs
        found.append((purpose, [*resume_command(folder, method, launches), *longer]))
    if (folder / "pipeline").is_dir() or (folder / "best").is_dir():
        pipeline = folder / "best/pipeline" if (folder / "best").is_dir() else folder
        output = f"{folder.resolve().name}_samples"
        found.append(("generate images", ["hfgen", "sample", str(pipeline), "--output", output]))
    return [{"purpose": purpose, "command": printable(shlex.join(map(str, words)))} for purpose, words in found]


def _is_final(folder: Path, status: dict[str, Any]) -> bool:
    """Whether a complete run has no checkpoint left to continue from, as a trained cell of a study."""
    return status.get("status") == "complete" and not any((folder / "checkpoints").glob("step-*"))


def resume_command(folder: Path, method: str, launches: list[dict[str, Any]]) -> list[str]:
    """Return the words of the command that resumes a run: with its settings, on as many processes as last time."""
    processes = launches[-1].get("num_processes", 1) if launches else 1
    words = ["hfgen", "train", method, "--preset", str(folder / SETTINGS_FILE), "--output_dir", str(folder)]
    return [*words, "--resume", "latest", *(["--num_processes", str(processes)] if processes > 1 else [])]


def best_fitting_classes(folder: Path, candidates: Sequence[Sequence[type]]) -> Sequence[type]:
    """Return those of the candidates that have most of a run's settings.

    Raises:
        UserError: if the folder is not that of a run.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise UserError(f"{folder}: not the folder of a run: {SETTINGS_FILE} is missing")
    saved = read_json(folder / SETTINGS_FILE).keys()
    return max(candidates, key=lambda classes: len(saved & default_values(classes).keys()))
