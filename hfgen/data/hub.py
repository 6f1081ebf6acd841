"""Data sets of the Hub, through the `datasets` library, downloaded or streamed; images come as encoded bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from hfgen.data.settings import DataSettings
from hfgen.data.sources import Source, choose_column
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


def load_hub_dataset(settings: DataSettings) -> tuple[Dataset | IterableDataset, str]:
    """Load the split with only its column of images, undecoded; return it and the column's name.

    Raises:
        UserError: if there is no such data set or split, or no single column of images.
    """
    where = f"--dataset {settings.dataset}"
    try:
        dataset = datasets.load_dataset(
            settings.dataset, split=settings.dataset_split, streaming=settings.streaming
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{where}: neither a local file or folder nor a data set on the Hub that you may read") from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{where}, --dataset_split {settings.dataset_split}: {error}") from error
    if dataset.features is None:
        dataset = dataset._resolve_features()  # a stream of unknown columns: read a few rows to know them
    candidates = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    column = choose_column(settings.dataset, settings.dataset_column, candidates, list(dataset.features))
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False)), column


def encoded_image(name: str, value: dict[str, Any] | None) -> tuple[str, bytes | Exception]:
    """Return `(name, encoded image)` of a row of an undecoded image column: its bytes, or those of its local file."""
    if value is None:
        return name, ValueError("the row holds no image")
    if value["bytes"] is not None:
        return name, value["bytes"]
    try:
        return name, Path(value["path"]).read_bytes()
    except OSError as error:
        return name, error
