"""Whether a pipeline was trained on the images that it is scored against, by the digest that its run kept of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hfgen.data.location import hub_id_of_address
from hfgen.data.settings import DataSettings
from hfgen.data.store import CACHED_SETTINGS, ImageStore, load_images
from hfgen.files import read_json, read_json_lines
from hfgen.inference.opening import find_pipeline
from hfgen.run_files import LAUNCHES_FILE, SETTINGS_FILE, TRAINING_FILE
from hfgen.training.checkpoints import list_checkpoints, load_progress
from hfgen.training.folder import run_of


def was_trained_on(source: str, data: DataSettings, images: ImageStore) -> bool | None:
    """Compare the images of a reference with those that a pipeline was trained on.

    Args:
        source: a run, its `best/`, one of its checkpoints, a pipeline folder, perhaps published, or a Hub repo.
        data: how the reference was read.
        images: the reference.

    Returns:
        None if it is unknown: the pipeline has no record of its run, or the run streamed its images.
    """
    folder = _pipeline_folder(source)
    found = None if folder is None else _what_was_trained_on(folder)
    if found is None:
        return None
    digest, settings = found
    # The same images have other pixels with crops at random, for example.
    as_trained = replace(data, **{name: settings[name] for name in CACHED_SETTINGS if name in settings})
    return (images if as_trained == data else load_images(as_trained)).digest == digest


def _pipeline_folder(source: str) -> Path | None:
    """Return the folder of a pipeline that has been opened: of a Hub repo, what was downloaded of it."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return find_pipeline(folder)
    try:
        return Path(snapshot_download(hub_id_of_address(source, "models", "DIR"), local_files_only=True))
    except (OSError, ValueError):  # it is not in the cache, or no name of a repo
        return None


def _what_was_trained_on(pipeline: Path) -> tuple[str, dict[str, Any]] | None:
    """Return the digest of the training images of a pipeline, and the settings of its run; None if unknown."""
    run = run_of(pipeline)
    if run is not None:
        folder, launches = run, read_json_lines(run / LAUNCHES_FILE)
    elif (pipeline / TRAINING_FILE).is_file():
        folder, launches = pipeline, read_json(pipeline / TRAINING_FILE, ("launches",))["launches"]
    else:
        return None
    digest = launches[-1].get("data_digest") if launches else None
    if digest is None and run is not None:  # of an earlier version
        digest = next((load_progress(path).get("data_digest") for path in list_checkpoints(run / "checkpoints")), None)
    if digest is None or not (folder / SETTINGS_FILE).is_file():
        return None
    settings = read_json(folder / SETTINGS_FILE)
    return None if settings.get("streaming") else (digest, settings)
