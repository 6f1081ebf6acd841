"""Data sets of the Hub, through the `datasets` library, downloaded or streamed; images come as encoded bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from hfgen.data.settings import DataSettings
from hfgen.data.source import Source, choose_column
from hfgen.errors import UserError


def hub_source(settings: DataSettings) -> Source:
    """Download a Hub data set (or take it from the cache of `datasets`) and open its images.

    Raises:
        UserError: if there is no such data set or split, or no single column of images.
    """
    dataset, column = load_hub_dataset(settings)

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        for index, row in enumerate(dataset):
            yield encoded_image(f"{settings.dataset}#{index}", row[column])

    identity = [settings.dataset, settings.dataset_split, column, dataset._fingerprint, len(dataset)]
    return Source(f"Hub data set {settings.dataset}, split {settings.dataset_split}", identity, read)


def hub_commit(settings: DataSettings) -> str:
    """Ask the Hub for the commit that the data set is at now.

    Raises:
        UserError: if the Hub has no such data set or cannot be reached, or the data set is not one of the Hub.
    """
    if settings.dataset.partition(":")[0] == "toy_paintings" or Path(settings.dataset).expanduser().exists():
        raise UserError(f"--dataset {settings.dataset} does not come from the Hub: leave out --streaming")
    try:
        return str(HfApi().dataset_info(settings.dataset).sha)
    except Exception as error:
        raise _cannot_open(settings, error) from error


def load_hub_dataset(settings: DataSettings, commit: str | None = None) -> tuple[Dataset | IterableDataset, str]:
    """Load the split with only its column of images, undecoded; return it and the column's name.

    Args:
        settings: `dataset`, `dataset_split`, `dataset_column` and `streaming` are used.
        commit: of the data set; its newest if None.

    Raises:
        UserError: if there is no such data set, commit or split, or no single column of images.
    """
    split, streaming = settings.dataset_split, settings.streaming
    try:
        dataset = datasets.load_dataset(settings.dataset, split=split, revision=commit, streaming=streaming)
        if dataset.features is None:
            dataset = dataset._resolve_features()  # a stream of unknown columns: read a few rows to know them
    except Exception as error:
        raise _cannot_open(settings, error) from error
    features = dataset.features
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    candidates = candidates or [name for name, feature in features.items() if _holds_bytes(feature)]
    column = choose_column(settings.dataset, settings.dataset_column, candidates, list(features))
    if isinstance(dataset, IterableDataset):
        # Streams of image files come with threads that decode them, which a cast of the column does not call off.
        dataset = dataset.decode(False)
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False)), column


def encoded_image(name: str, value: dict[str, Any] | None) -> tuple[str, bytes | Exception]:
    """Return `(name, encoded image)` of a row of an undecoded image column: its bytes, or those of the file it names.

    Raises:
        OSError: or the like, if a file of the Hub cannot be fetched: then the network is at fault, not the image.
        UserError: if the column is decoded after all.
    """
    if value is not None and not isinstance(value, dict):  # several splits of image files, streamed as one
        raise UserError(f"{name}: comes decoded; give one split as --dataset_split, or leave out --streaming")
    if value is None or (value["bytes"] is None and value["path"] is None):
        return name, ValueError("the row holds no image")
    if value["bytes"] is not None:
        return name, value["bytes"]
    # A local path, hf://..., or zip://name::archive with one of these as the archive.
    protocols = {hop.partition("://")[0] for hop in value["path"].split("::") if "://" in hop}
    if not protocols <= {"hf", "zip"}:
        return name, ValueError(f"the row names a file outside the data set: {value['path']}")
    try:
        with fsspec.open(value["path"], "rb") as file:
            return name, file.read()
    except OSError as error:
        if "hf" in protocols and not isinstance(error, FileNotFoundError):
            raise
        return name, error


def _holds_bytes(feature: Any) -> bool:
    """Whether a column that is not marked as images may hold them all the same, as parquet of other makers does."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _cannot_open(settings: DataSettings, error: Exception) -> UserError:
    """Say what went wrong; the libraries and the network raise almost anything."""
    where = f"--dataset {settings.dataset}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    not_found = (datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError, HFValidationError)
    if isinstance(error, not_found) or status in (401, 403):
        detail = "" if isinstance(error, (RepositoryNotFoundError, HFValidationError)) else f": {error}"
        return UserError(
            f"{where}: no local file or folder, nor a data set on the Hub that you may read{detail}\n"
            "If it is private or gated, log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
        )
    split = f"--dataset_split {settings.dataset_split}"
    again = "the same command goes on where a download broke off"
    return UserError(f"{where}, {split}: cannot be opened ({type(error).__name__}: {error}); {again}")
