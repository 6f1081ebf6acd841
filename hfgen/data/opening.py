"""Where encoded images come from: folder, zip, tar, npz, parquet, TFRecord, Hub dataset, toy_paintings.

A new source is one function that returns a `Source`, and one line where the others are chosen: in `_open` by name, in
`_folder` by the files of a folder, or in `_file` by the kind of a file.
"""

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path, PurePath

from PIL import Image

from hfgen.data.archives import tar_source, zip_source
from hfgen.data.arrays import array_source
from hfgen.data.location import (
    IMAGE_SUFFIXES,
    TOY_PAINTINGS,
    inside_archive,
    is_archive,
    is_hub_id,
    is_tar,
)
from hfgen.data.memory import MAX_ENCODED_BYTES
from hfgen.data.selection import ALL, Selection, select, split_of
from hfgen.data.settings import DataSettings
from hfgen.data.source import (
    Source,
    UnusedColumnError,
    count_suffixes,
    counts,
    file_identity,
    lasting_error,
    notes_on_shards,
)
from hfgen.data.tables import parquet_source
from hfgen.data.tfrecord import is_tfrecord, read_tfrecord_images
from hfgen.errors import UserError
from hfgen.files import read_regular
from hfgen.run_files import SETTINGS_FILE, STATUS_FILE


GONE = (FileNotFoundError, NotADirectoryError)
# What is in such a folder; the pictures below it are sheets of generated images.
OF_A_RUN, OF_A_PIPELINE = {SETTINGS_FILE, STATUS_FILE}, {SETTINGS_FILE, "model_index.json"}


def open_source(settings: DataSettings) -> Source:
    """Detect the kind of `--dataset` and open it.

    Raises:
        UserError: if it does not exist or contains nothing readable, or a setting has no meaning for it.
    """
    source = _open(settings)
    if settings.dataset_column is not None and not source.has_columns:
        raise UnusedColumnError(
            f"--dataset_column {settings.dataset_column}: {settings.dataset} has no columns to choose from; leave it "
            "out"
        )
    return source


def _open(settings: DataSettings) -> Source:
    name = settings.dataset
    if settings.dataset_config is not None and not is_hub_id(name):
        raise UserError(
            f"--dataset_config {settings.dataset_config}: only Hub datasets have configurations; leave it out"
        )
    if match := TOY_PAINTINGS.fullmatch(name):
        select(name, [name], settings.dataset_split)  # refuses all splits but train
        return _toy_paintings(settings, match.group(1))
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, accepts an unknown user
    if name and os.path.isdir(path):  # an empty name would mean the current folder
        return _folder(path, settings)
    if os.path.isfile(path):
        return _file(path, settings)
    if inside := inside_archive(name):
        return _archive(*inside, settings)
    if not is_hub_id(name):
        raise UserError(f"--dataset {name}: no such file or folder")
    from hfgen.data.hub_datasets import hub_source  # imports `datasets`, which is slow

    return hub_source(settings)


def _folder(path: Path, settings: DataSettings) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        from hfgen.data.hub_datasets import is_saved, saved_source  # imports `datasets`, which is slow

        if is_saved(path):
            return saved_source(path, settings)
    files, runs = _files_below(path)
    files.sort(key=attrgetter("parts"))  # as paths are sorted, but faster
    of_runs = [f"{run} is a run or a pipeline of hfgen: its pictures were not read" for run in runs]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        skipped = _skipped(files, images)
        images, selection = _selected(images, path, settings)
        names = [str(file.relative_to(path)) for file in images]
        identity = file_identity(images, path)

        def read() -> Iterator[tuple[str, bytes | Exception]]:
            for name, file in zip(names, images, strict=True):
                try:
                    yield name, read_regular(file, MAX_ENCODED_BYTES)
                except OSError as error:
                    if isinstance(error, GONE) and any(name == present for present, *_ in identity):
                        raise UserError(
                            f"{file}: disappeared while the dataset was being read; run the same command again"
                        ) from error
                    yield name, lasting_error(file, error)

        description = f"folder {path}{selection.suffix}"
        return Source(description, identity, read, skipped, images, [*of_runs, *selection.notes])
    files = [file for file in files if file.is_file() or not file.exists()]  # no pipes, no devices
    kinds = ((is_tfrecord, _tfrecords), (_is_parquet, parquet_source), (_is_arrow, _arrow), (is_tar, _tars))
    for belongs, open_files in kinds:
        all_chosen = [file for file in files if belongs(file)]
        if all_chosen:
            chosen, selection = _selected(all_chosen, path, settings)
            # A tar that was chosen for its split is not searched for one.
            source = open_files(chosen, path, replace(settings, dataset_split=ALL) if selection.suffix else settings)
            return source._replace(
                description=source.description + selection.suffix,
                skipped=dict(Counter(source.skipped) + Counter(_skipped(files, all_chosen))),
                notes=[*of_runs, *dict.fromkeys([*source.notes, *notes_on_shards(chosen)]), *selection.notes],
            )
    raise UserError(
        f"--dataset {path}: no image, TFRecord or parquet file below this folder; other files: "
        f"{counts(count_suffixes(files))}; give a folder of images such as .jpg or .png files, or one .zip or .npz"
    )


def _selected(files: list[Path], root: Path, settings: DataSettings) -> tuple[list[Path], Selection]:
    """Return the files of the split, and what is to be said about the choice."""
    selection = select(str(root), [file.relative_to(root).as_posix() for file in files], settings.dataset_split)
    return [files[index] for index in selection.indices], selection


def _file(path: Path, settings: DataSettings) -> Source:
    if is_archive(path):
        return _archive(path, "", settings)
    if path.suffix.lower() == ".npz":
        return array_source(path, settings)
    _selected([path], path.parent, settings)  # refuses a split if the file is not named as one
    if path.suffix.lower() == ".npy":
        return array_source(path, settings)
    if _is_parquet(path):
        return parquet_source([path], path.parent, settings)
    if _is_arrow(path):
        return _arrow([path], path.parent, settings)
    if is_tfrecord(path):
        return _tfrecords([path], path.parent, settings)
    raise UserError(
        f"--dataset {path}: unknown file type; give a folder of images or a .zip, .parquet or .tfrec file, or one of "
        ".tar, .npz, .npy or .arrow"
    )


def _tars(files: list[Path], root: Path, settings: DataSettings) -> Source:
    return tar_source(files, root, "", settings)


def _archive(path: Path, inner: str, settings: DataSettings) -> Source:
    return tar_source([path], path.parent, inner, settings) if is_tar(path) else zip_source(path, inner, settings)


def _arrow(files: list[Path], root: Path, settings: DataSettings) -> Source:
    from hfgen.data.hub_datasets import arrow_source  # imports `datasets`, which is slow

    return arrow_source(files, root, settings)


def _is_arrow(path: Path) -> bool:
    is_cache = path.name.startswith("cache-")  # what `datasets` keeps of a filter, say, beside the dataset
    return path.suffix.lower() == ".arrow" and not is_cache


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _files_below(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the non-hidden files below a folder, except those of runs and pipelines, and the folders of these.

    Each folder is read once: at its own place if that is below `path`, unless a link alone names its split, as train
    for versions/2; else at the first link to it.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"--dataset {path}: the folder {error.filename} cannot be read: {error.strerror}") from error

    files, runs, links, seen, to_walk = [], [], [], set(), [path]
    while to_walk:
        for folder, subfolders, names in os.walk(to_walk.pop(0), onerror=refuse):  # does not follow links
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            if OF_A_RUN <= {*names} or OF_A_PIPELINE <= {*names}:
                runs.append(Path(folder))
                subfolders.clear()
                continue
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            found = [link for name in subfolders if (link := Path(folder, name)).is_symlink()]
            links += found
            to_walk += found
            files += [Path(folder, name) for name in names if not name.startswith(".")]
    if runs == [path]:
        raise UserError(f"--dataset {path}: this is a run or a pipeline of hfgen, not images to train on")
    for link in links:
        inside = Path(os.path.relpath(os.path.realpath(link), os.path.realpath(path)))
        if _names_a_split(link.relative_to(path)) and not _names_a_split(inside):
            own = path / inside
            files = [link / file.relative_to(own) if file.is_relative_to(own) else file for file in files]
    return files, runs


def _names_a_split(folder: Path) -> bool:
    return any(split_of(part) for part in folder.parts)


def _skipped(files: Iterable[PurePath], chosen: Iterable[PurePath]) -> dict[str, int]:
    """Count the files that are not among the chosen ones, by suffix."""
    taken = set(chosen)
    return count_suffixes(file for file in files if file not in taken)


def _tfrecords(files: list[Path], root: Path, settings: DataSettings) -> Source:
    column = settings.dataset_column or "image"

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        for file in files:
            try:
                yield from read_tfrecord_images(file, column)
            except OSError as error:
                raise UserError(f"{file}: cannot be read: {error}") from error

    identity = [*file_identity(files, root), column]
    return Source(f"{len(files)} TFRecord file(s) in {root}", identity, read, files=files, has_columns=True)


def _toy_paintings(settings: DataSettings, count_text: str | None) -> Source:
    from hfgen.data.toy_paintings import TOY_PAINTINGS_COUNT, paint

    count = int(count_text) if count_text is not None else TOY_PAINTINGS_COUNT
    if not 1 <= count <= 1_000_000:
        raise UserError(f"--dataset toy_paintings:{count}: the count must be from 1 to 1000000")

    def read() -> Iterator[tuple[str, bytes | Exception]]:
        for index in range(count):
            buffer = io.BytesIO()
            Image.fromarray(paint(index, settings.sample_size)).save(buffer, "png", compress_level=1)
            yield f"toy_painting_{index:06d}", buffer.getvalue()

    return Source(f"{count} toy paintings", ["toy_paintings", count, settings.sample_size, _toy_digest()], read)


def _toy_digest() -> str:
    """Return a fingerprint of the painting code's output, so that a change to it invalidates the cache."""
    import hashlib

    from hfgen.data.toy_paintings import paint

    return hashlib.sha256(paint(0, 32).tobytes()).hexdigest()
