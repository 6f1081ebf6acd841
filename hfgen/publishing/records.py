"""The records of a training that are published with its pipeline: settings, log and scores; nothing private."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hfgen.data.location import TOY_PAINTINGS, is_hub_id
from hfgen.errors import UserError
from hfgen.files import json_lines, read_json, read_json_lines
from hfgen.hub.card import EARLIER, WHILE_TRAINING
from hfgen.run_files import (
    EVALUATIONS_FILE,
    EVENTS_FILE,
    INTAKE_FILE,
    LAUNCHES_FILE,
    METRICS_FILE,
    SCORES_FILE,
    SETTINGS_FILE,
    STATUS_FILE,
    TRAINING_FILE,
)
from hfgen.training.checkpoints import PROGRESS_FILE, final_progress
from hfgen.training.folder import BEST_FOLDER, STATUS_KEYS, read_launches
from hfgen.training.history import NEEDED, images_at
from hfgen.training.lock import holder_of


# Settings about local paths and upload targets, not about the training.
PRIVATE_SETTINGS = (
    "resume",
    "init_from",
    "cache_dir",
    "feature_weights",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "max_train_time",
    "report_to",
)
INDEX_FILE = "model_index.json"
PICTURES_OF_RUN = ("progress.gif", "curves.png")


class Moment(NamedTuple):
    """When during training a pipeline was saved.

    Attributes:
        step: number of updates.
        seconds: of training; None if not in the log.
        rollbacks: before it.
    """

    step: int
    seconds: float | None
    rollbacks: int


def add_records_of_run(run: Path, pipeline_folder: Path, target: Path, digest: str, published_digest: str) -> None:
    """Write the settings, log and scores of the training, without private information.

    Args:
        run: folder of the run.
        pipeline_folder: what is published of it.
        target: where to write.
        digest: `network_digest` of it; a checkpoint of a VAE has another density than what was scored at its step.
        published_digest: the same, of the weights that may have been rounded.
    """
    settings = read_json(run / SETTINGS_FILE, ("output_dir", "dataset", "streaming"))
    name, on_hub, intake = data_of(run, settings)
    public = _public(settings) | {"output_dir": Path(settings["output_dir"]).resolve().name, "dataset": name}
    if (start := settings.get("init_from")) is not None:
        public["init_from"] = name_of_start(start, run)
    _write_json(target / SETTINGS_FILE, public)

    log = read_json_lines(run / METRICS_FILE, (*NEEDED, "images"))
    moment = moment_of(run, pipeline_folder, log)
    launches, status = read_launches(run), read_json(run / STATUS_FILE, STATUS_KEYS)
    training = {
        "end": end_of(status, moment.step, holder_of(run) is not None),
        "step": moment.step,
        "seconds": moment.seconds,
        "images": images_at(log, moment.step),
        # A launch that started at this step came after it, unless it was the first.
        "launches": [public_launch(launch) for launch in launches if launch["from_step"] < max(moment.step, 1)]
        or [public_launch(launch) for launch in launches[:1]],
        "rollbacks": moment.rollbacks,
        "data": {"name": name, "on_hub": on_hub, **summary_of_intake(intake)},
        "network_sha256": published_digest,
    }
    _write_json(target / TRAINING_FILE, training)
    if log:
        _write_json_lines(target / METRICS_FILE, log)
    evaluations = read_json_lines(run / EVALUATIONS_FILE, ("step",))
    if evaluations:
        _write_json_lines(target / EVALUATIONS_FILE, evaluations)
    kept = pipeline_folder.resolve().parent / SCORES_FILE  # of the best pipeline: a rollback may repeat its step
    scored = [read_json(kept, ("step",))] if kept.is_file() else evaluations
    # Earlier versions did not note the network.
    own = [one for one in scored if one["step"] == moment.step and one.get("network_sha256", digest) == digest]
    if own:
        _write_json(target / SCORES_FILE, own[-1])


def copy_records(published: Path, target: Path, digest: str, published_digest: str) -> None:
    """Write the records and the pictures of the training that came with a published pipeline, if there are any.

    Args:
        published: folder of the pipeline. Other weights, put in the place of the published ones, have no records.
        target: where to write.
        digest: `network_digest` of the weights there.
        published_digest: the same, of the weights that may have been rounded now.
    """
    training = _own_file(published / TRAINING_FILE, ("end", "step", "launches", "data"))
    if training is None or training.get("network_sha256", digest) != digest:  # earlier versions did not note it
        return
    _write_json(target / TRAINING_FILE, {**training, "network_sha256": published_digest})
    if (settings := _own_file(published / SETTINGS_FILE, ("output_dir", "dataset"))) is not None:
        start = {"init_from": settings["init_from"]} if "init_from" in settings else {}  # is public already
        _write_json(target / SETTINGS_FILE, _public(settings) | start)
    if (scores := _own_file(published / SCORES_FILE, ("step", "num_images", "fid", "kid"))) is not None:
        _write_json(target / SCORES_FILE, scores)
    for name in (METRICS_FILE, EVALUATIONS_FILE, *(f"samples/{name}" for name in PICTURES_OF_RUN)):
        if (published / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(published / name, target / name)


def was_published(folder: Path, digest: str) -> bool:
    """Whether the pipeline in a folder, by its `network_digest`, is one that was published there."""
    return (_own_file(folder / TRAINING_FILE) or {}).get("network_sha256") == digest


def _own_file(file: Path, needed: Sequence[str] = ()) -> dict[str, Any] | None:
    """Read a record that hfgen has published; None if it is missing, or another program's file of that name."""
    try:
        return read_json(file, needed)
    except UserError:
        return None


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in PRIVATE_SETTINGS}


def public_launch(launch: dict[str, Any]) -> dict[str, Any]:
    """Return what is noted of a launch, of changed settings that hold paths only the names."""
    if "changed_settings" not in launch:
        return launch
    changes = [
        text.split(":")[0] if text.split(":")[0] in PRIVATE_SETTINGS else text for text in launch["changed_settings"]
    ]
    return {**launch, "changed_settings": changes}


def end_of(status: dict[str, Any], step: int, is_running: bool) -> str:
    """Describe how training ended for a pipeline of this step, from the run's `status.json`, in public words."""
    if step < status["step"]:
        return f"{EARLIER} of a run that continued to step {status['step']:,}"
    if status["status"] == "failed":  # whose message may name files of this machine
        return f"an error after step {step:,}"
    if status["status"] != "running":
        return status["reason"]
    return WHILE_TRAINING if is_running else f"killed after step {step:,}"


def name_of_start(start: str, run: Path) -> str:
    """Return the public name of what a run was initialised from: the id on the Hub, or the name of a folder.

    Args:
        start: value of `--init_from`, perhaps relative to another working folder than this one.
        run: folder of the run; that working folder is probably above it.
    """
    places = [place / start for place in (Path.cwd(), *run.resolve().parents)]
    if is_hub_id(start):  # a folder of this name may be anything
        places = [place for place in places if any((place / name).is_file() for name in (LAUNCHES_FILE, INDEX_FILE))]
    local = next((place for place in places if place.exists()), None)
    if local is None and is_hub_id(start):
        return start
    path = (local or Path(start)).resolve()
    if (
        origin := next((one for one in (path, *path.parents[:3]) if (one / LAUNCHES_FILE).is_file()), None)
    ) is not None:
        return origin.name
    # The run may be gone.
    above = re.sub(rf"(/{BEST_FOLDER}|/checkpoints/step-\d+)?/pipeline$|/checkpoints/step-\d+$", "", path.as_posix())
    return Path(above).name or path.name


def data_of(run: Path, settings: dict[str, Any]) -> tuple[str, bool, dict[str, Any] | None]:
    """Return the public name of the training data, whether it is a Hub dataset, and its intake report."""
    file = run / INTAKE_FILE
    remedy = f"delete it: {SETTINGS_FILE} says what the data are, and the card calls the rest unknown"
    intake = read_json(file, ("source",), remedy) if file.is_file() else None
    dataset = settings["dataset"]
    on_hub = settings["streaming"] or (intake is not None and intake["source"].startswith("Hub dataset"))
    # Not by `is_path`: the data may have moved since the training.
    is_local = not on_hub and not TOY_PAINTINGS.fullmatch(dataset)
    if not is_local:
        return dataset, on_hub, intake
    # As it was called when the training began: "." may be another folder now. Earlier versions did not note it.
    return (intake or {}).get("name") or Path(dataset).expanduser().resolve().name, on_hub, intake


def moment_of(run: Path, pipeline_folder: Path, log: Sequence[dict[str, Any]]) -> Moment:
    """Determine when a pipeline was saved: at the end, at the best score, or with a checkpoint."""
    above, status = pipeline_folder.resolve().parent, read_json(run / STATUS_FILE, STATUS_KEYS)
    # Of runs that began with an earlier version, some files lack the rollbacks.
    events = read_json_lines(run / EVENTS_FILE)
    saved = {"step": status["step"], "rollbacks": sum(event.get("event") == "rollback" for event in events)}
    if (above / PROGRESS_FILE).is_file():
        saved |= read_json(above / PROGRESS_FILE, ("step", "seconds"))
    elif above.name == BEST_FOLDER and above != run.resolve():
        saved |= read_json(above / SCORES_FILE, ("step",))
    else:
        saved |= final_progress(pipeline_folder)
    step = saved["step"]
    logged = next((entry["seconds"] for entry in log if entry["step"] >= step), None)
    at_the_end = status["seconds"] if step == status["step"] else logged
    return Moment(step, saved.get("seconds", at_the_end), saved["rollbacks"])


def summary_of_intake(intake: dict[str, Any] | None) -> dict[str, Any]:
    """Return the counts of an intake report, without file names; empty without a report."""
    if intake is None:
        return {"images": None, "training_images": None, "sample_size": None, "intake": {}, "warnings": []}
    near = intake["near_duplicates"]
    low, median, high = intake["short_side"]
    counts = {
        key: ", ".join(f"{name}: {count:,}" for name, count in intake[key].items())
        for key in ("formats", "modes", "sizes")
    }
    return {
        "images": intake["images"],
        "training_images": intake["training_images"],
        "sample_size": intake["sample_size"],
        "intake": counts
        | {
            "short side": f"{low} to {high}, median {median} pixels",
            "enlarged": intake["upsampled"],
            "unreadable": len(intake["unreadable"]),
            "exact duplicates": sum(len(group) - 1 for group in intake["exact_duplicates"]),
            "of these removed": intake["dropped"],
            "near duplicates": "not searched" if near is None else sum(len(group) - 1 for group in near),
        },
        "warnings": intake["warnings"],
    }


def _write_json_lines(file: Path, entries: Sequence[dict[str, Any]]) -> None:
    file.write_text(json_lines(entries))


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
