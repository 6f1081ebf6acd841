"""Hub datasets, downloaded or streamed with the `datasets` library; images are returned as encoded bytes."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets import Dataset, DatasetDict, IterableDataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from PIL import Image

from hfgen.data.columns import find_column, images_in, named_files
from hfgen.data.location import TOY_PAINTINGS, is_missing, is_path
from hfgen.data.memory import MAX_ENCODED_BYTES
from hfgen.data.selection import ALL, NoSplitsError
from hfgen.data.settings import DataSettings
from hfgen.data.source import Source, choose_column, file_identity, lasting_error
from hfgen.errors import UserError
from hfgen.files import read_regular
from hfgen.texts import one_line


def hub_source(settings: DataSettings) -> Source:
    """Download a Hub dataset (or use the cache of `datasets`) and open its images.

    Raises:
        UserError: if the dataset or split does not exist, or the image column is not unique.
    """
    dataset, column = load_hub_dataset(settings)

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        for index, row in enumerate(dataset):
            yield from encoded_images(f"{settings.dataset}#{index}", row[column])

    identity = [settings.dataset, settings.dataset_split, column, dataset._fingerprint, len(dataset)]
    description = f"Hub dataset {settings.dataset}, split {settings.dataset_split}"
    if settings.dataset_config is not None:
        identity, description = [*identity, settings.dataset_config], f"{description}, {settings.dataset_config}"
    return Source(description, identity, read, has_columns=True)


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of a `Dataset` or `DatasetDict`."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def saved_source(folder: Path, settings: DataSettings) -> Source:
    """Open a dataset that was written by `save_to_disk`.

    Raises:
        UserError: if it cannot be read, has no such split, or the image column is not unique.
    """
    split = settings.dataset_split
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged files make the libraries raise almost anything
        raise UserError(f"--dataset {folder}: cannot be read as a saved dataset: {error}") from error
    if not isinstance(loaded, DatasetDict):
        if split not in ("train", ALL, str(loaded.split)):
            raise NoSplitsError(f"--dataset_split {split}: {folder} has no splits; leave it out to use all images")
        return _arrow_source(f"saved dataset {folder}", [loaded], folder, settings)
    wanted = list(loaded) if split == ALL else split.split("+")
    if missing := [name for name in wanted if name not in loaded]:
        choices = [*loaded, ALL]
        raise UserError(f"--dataset {folder} has no split {missing[0]}; choose one with --dataset_split: {choices}")
    return _arrow_source(f"saved dataset {folder}, split {split}", [loaded[name] for name in wanted], folder, settings)


def arrow_source(files: list[Path], root: Path, settings: DataSettings) -> Source:
    """Open Arrow files as `datasets` writes them to its cache.

    Args:
        files: of the same columns, in the order in which they are read.
        root: the folder that names in the report are relative to.
        settings: `dataset_column` is used.

    Raises:
        UserError: if a file cannot be read, or the image column is not unique.
    """
    try:
        parts = [Dataset.from_file(str(file)) for file in files]
    except Exception as error:  # damaged files make the libraries raise almost anything
        raise UserError(f"--dataset {root}: its .arrow files cannot be read: {error}") from error
    return _arrow_source(f"{len(files)} Arrow file(s) in {root}", parts, root, settings)


def _arrow_source(description: str, parts: Sequence[Dataset], root: Path, settings: DataSettings) -> Source:
    """Open datasets on this disk as one; their other columns may differ."""
    kept = [undecoded(part, settings, root) for part in parts]
    column = kept[0][1]
    try:
        dataset = datasets.concatenate_datasets([part for part, _ in kept])
    except ValueError as error:
        problem = f"its splits or files hold images in different ways ({one_line(error)})"
        raise UserError(f"--dataset {root}: {problem}; choose one --dataset_split") from error

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        for index, row in enumerate(dataset):
            yield from encoded_images(f"{root.name}#{index}", row[column], root)

    files = [Path(file["filename"]) for part in parts for file in part.cache_files]
    named = named_files(lambda: (row[column] for row in dataset), root)
    identity = [*file_identity(files, root), *file_identity(named, root), column]
    return Source(description, identity, read, files=[*files, *named], has_columns=True)


def hub_commit(settings: DataSettings) -> str:
    """Return the current commit of the dataset on the Hub.

    Raises:
        UserError: if the dataset is not on the Hub, or the Hub cannot be reached.
    """
    if is_missing(settings.dataset):
        raise UserError(f"--dataset {settings.dataset}: no such file or folder")
    if is_path(settings.dataset) or TOY_PAINTINGS.fullmatch(settings.dataset):
        raise UserError(f"--dataset {settings.dataset} is not a Hub dataset: leave out --streaming")
    try:
        return str(HfApi().dataset_info(settings.dataset).sha)
    except Exception as error:
        raise _cannot_open(settings, error) from error


def load_hub_dataset(settings: DataSettings, commit: str | None = None) -> tuple[Dataset | IterableDataset, str]:
    """Load only the image column of a split, undecoded; return it and the column's name.

    Args:
        settings: `dataset`, `dataset_config`, `dataset_split`, `dataset_column` and `streaming` are used.
        commit: commit of the dataset; the newest if None.

    Raises:
        UserError: if the dataset, commit or split does not exist, or the image column is not unique.
    """
    split, streaming = settings.dataset_split, settings.streaming
    try:
        dataset = datasets.load_dataset(
            settings.dataset, settings.dataset_config, split=split, revision=commit, streaming=streaming
        )
        if dataset.features is None:
            dataset = dataset._resolve_features()  # a stream with unknown columns: reads a few rows to find them
    except Exception as error:
        raise _cannot_open(settings, error) from error
    return undecoded(dataset, settings)


def undecoded(
    dataset: Dataset | IterableDataset, settings: DataSettings, folder: Path = Path()
) -> tuple[Dataset | IterableDataset, str]:
    """Keep only the image column, without decoding its images; return the dataset and the column's name.

    Args:
        dataset: any.
        settings: `dataset` and `dataset_column` are used.
        folder: what relative paths of image files are below.

    Raises:
        UserError: if the image column is not unique.
    """
    features = dataset.features
    schema = features.arrow_schema.remove_metadata()
    marked = [name for name, feature in features.items() if _is_marked(feature)]
    if marked:
        column = choose_column(settings.dataset, settings.dataset_column, marked, list(features))
    else:
        read_path = partial(_read_path, folder=folder)
        column = find_column(settings.dataset, settings.dataset_column, schema, dataset.select_columns, read_path)
    if isinstance(dataset, IterableDataset):
        # Streams of image files decode them in threads, which casting the column does not disable.
        dataset = dataset.decode(False)
    kept = dataset.select_columns([column])
    return kept.cast_column(column, _undecoded_feature(features[column])) if marked else kept, column


def encoded_images(name: str, value: Any, folder: Path = Path()) -> list[tuple[str, bytes | Exception]]:
    """Return `(name, encoded image)` for each image in a row of an undecoded image column.

    Args:
        name: of the row.
        value: of the row.
        folder: what relative paths of image files are below.

    Raises:
        OSError: or similar, if a file on the Hub cannot be fetched: a network problem, not a bad image.
        UserError: if the column is decoded after all.
    """
    if isinstance(value, Image.Image):  # several splits of image files, streamed as one
        raise UserError(f"{name}: the images come decoded; choose one --dataset_split, or leave out --streaming")
    return list(images_in(name, value, partial(_read_path, folder=folder)))


def _is_marked(feature: Any) -> bool:
    """Whether the type of a column says that it holds images, or lists of them."""
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, (datasets.List, datasets.LargeList)) and _is_marked(feature.feature)
    )


def _undecoded_feature(feature: Any) -> Any:
    """Return the type of a column with its images, which may be in lists, not decoded."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_undecoded_feature(feature.feature))
    return feature


def _read_path(path: str, folder: Path) -> bytes | Exception:
    """Read a local path, hf://..., or zip://name::archive with one of these as the archive."""
    protocols = {hop.partition("://")[0] for hop in path.split("::") if "://" in hop}
    if not protocols <= {"hf", "zip"}:
        return ValueError(f"the row names a file outside the dataset: {path}")
    try:
        if not protocols:
            return read_regular(folder / path, MAX_ENCODED_BYTES)
        with fsspec.open(path, "rb") as file:
            content = file.read(MAX_ENCODED_BYTES + 1)
        too_large = ValueError(f"larger than {MAX_ENCODED_BYTES >> 20} MiB")
        return content if len(content) <= MAX_ENCODED_BYTES else too_large
    except (OSError, ValueError) as error:
        if "hf" in protocols and not isinstance(error, FileNotFoundError):
            raise
        return lasting_error(path, error)


def _cannot_open(settings: DataSettings, error: Exception) -> UserError:
    """Return an error with a useful message; the libraries and the network can raise almost anything."""
    where = f"--dataset {settings.dataset}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    not_found = (datasets.exceptions.DatasetNotFoundError, RepositoryNotFoundError, HFValidationError)
    if isinstance(error, not_found) or status in (401, 403):
        detail = "" if isinstance(error, (RepositoryNotFoundError, HFValidationError)) else f": {error}"
        return UserError(
            f"{where}: neither a local file or folder nor a Hub dataset that you can read{detail}; if it is "
            "private or gated, log in with `hf auth login`, or set HF_TOKEN to a token with read access to it"
        )
    choices = re.search(
        r"(?:available configs: |Available: |Available splits: |Should be one of )(\[.*?\])", str(error)
    )
    if isinstance(error, ValueError) and choices and "plit" in str(error):
        return UserError(
            f"{where} has no split {settings.dataset_split}; choose one with --dataset_split: {choices[1]}"
        )
    if isinstance(error, ValueError) and choices:
        given = settings.dataset_config
        what = "has several configurations" if given is None else f"has no configuration {given}"
        return UserError(f"{where} {what}; choose one with --dataset_config: {choices[1]}")
    split = f"--dataset_split {settings.dataset_split}"
    again = "run the same command again to continue an interrupted download"
    return UserError(
        f"{where}, {split}: no local file or folder, and as a Hub dataset it cannot be opened "
        f"({type(error).__name__}: {one_line(error)}); {again}"
    )
