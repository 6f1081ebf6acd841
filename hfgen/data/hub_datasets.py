"""Hub data sets, downloaded or streamed with the `datasets` library; images are returned as encoded bytes."""

from collections.abc import Iterator
from typing import Any

import datasets
import fsspec
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from hfgen.data.location import TOY_PAINTINGS, is_missing, is_path
from hfgen.data.settings import DataSettings
from hfgen.data.source import Source, choose_column
from hfgen.errors import UserError


def hub_source(settings: DataSettings) -> Source:
    """Download a Hub data set (or use the cache of `datasets`) and open its images.

    Raises:
        UserError: if the data set or split does not exist, or the image column is not unique.
    """
    dataset, column = load_hub_dataset(settings)

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        for index, row in enumerate(dataset):
            yield encoded_image(f"{settings.dataset}#{index}", row[column])

    identity = [settings.dataset, settings.dataset_split, column, dataset._fingerprint, len(dataset)]
    return Source(f"Hub data set {settings.dataset}, split {settings.dataset_split}", identity, read)


def hub_commit(settings: DataSettings) -> str:
    """Return the current commit of the data set on the Hub.

    Raises:
        UserError: if the data set is not on the Hub, or the Hub cannot be reached.
    """
    if is_missing(settings.dataset):
        raise UserError(f"--dataset {settings.dataset}: no such file or folder")
    if is_path(settings.dataset) or TOY_PAINTINGS.fullmatch(settings.dataset):
        raise UserError(f"--dataset {settings.dataset} is not a Hub data set: leave out --streaming")
    try:
        return str(HfApi().dataset_info(settings.dataset).sha)
    except Exception as error:
        raise _cannot_open(settings, error) from error


def load_hub_dataset(settings: DataSettings, commit: str | None = None) -> tuple[Dataset | IterableDataset, str]:
    """Load only the image column of a split, undecoded; return it and the column's name.

    Args:
        settings: `dataset`, `dataset_split`, `dataset_column` and `streaming` are used.
        commit: commit of the data set; the newest if None.

    Raises:
        UserError: if the data set, commit or split does not exist, or the image column is not unique.
    """
    split, streaming = settings.dataset_split, settings.streaming
    try:
        dataset = datasets.load_dataset(settings.dataset, split=split, revision=commit, streaming=streaming)
        if dataset.features is None:
            dataset = dataset._resolve_features()  # a stream with unknown columns: reads a few rows to find them
    except Exception as error:
        raise _cannot_open(settings, error) from error
    features = dataset.features
    candidates = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    candidates = candidates or [name for name, feature in features.items() if _holds_bytes(feature)]
    column = choose_column(settings.dataset, settings.dataset_column, candidates, list(features))
    if isinstance(dataset, IterableDataset):
        # Streams of image files decode them in threads, which casting the column does not disable.
        dataset = dataset.decode(False)
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False)), column


def encoded_image(name: str, value: dict[str, Any] | None) -> tuple[str, bytes | Exception]:
    """Return `(name, encoded image)` for a row of an undecoded image column, from its bytes or the file that it names.

    Raises:
        OSError: or similar, if a file on the Hub cannot be fetched: a network problem, not a bad image.
        UserError: if the column is decoded after all.
    """
    if value is not None and not isinstance(value, dict):  # several splits of image files, streamed as one
        raise UserError(f"{name}: the images come decoded; give one --dataset_split, or leave out --streaming")
    if value is None or (value["bytes"] is None and value["path"] is None):
        return name, ValueError("the row contains no image")
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
    """Whether a column that is not marked as images may still contain them, as in parquet files from other tools."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _cannot_open(settings: DataSettings, error: Exception) -> UserError:
    """Return an error with a useful message; the libraries and the network can raise almost anything."""
    where = f"--dataset {settings.dataset}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    not_found = (datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError, HFValidationError)
    if isinstance(error, not_found) or status in (401, 403):
        detail = "" if isinstance(error, (RepositoryNotFoundError, HFValidationError)) else f": {error}"
        return UserError(
            f"{where}: neither a local file or folder nor a Hub data set that you can read{detail}; if it is "
            "private or gated, log in with `hf auth login`, or set HF_TOKEN to a token with read access to it"
        )
    split = f"--dataset_split {settings.dataset_split}"
    again = "run the same command again to continue an interrupted download"
    return UserError(f"{where}, {split}: cannot be opened ({type(error).__name__}: {error}); {again}")
