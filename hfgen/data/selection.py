"""Which of the local files are used: those of a split, and a note if images of several folders are mixed."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import NamedTuple

from hfgen.data.source import counts
from hfgen.errors import UserError


ALL = "all"
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
LISTED_FOLDERS = 5
SHARD_NAME = re.compile(r"(.+?)(?:\.(?:parquet|arrow|tfrec|tar)|-\d+-of-\d+$)", re.IGNORECASE)


class NoSplitsError(UserError):
    """A split was asked for of local data without splits."""


class Selection(NamedTuple):
    """What is used of a list of names.

    Attributes:
        indices: of the names that are used, in order.
        notes: what the user should know about the choice.
        suffix: what the description of the source says about it.
    """

    indices: list[int]
    notes: list[str] = []
    suffix: str = ""


def select(where: str, names: Sequence[str], split: str) -> Selection:
    """Choose the files of a split; without splits, all of them, with a note if they lie in several folders.

    Args:
        where: the dataset, as the user may write it, for messages.
        names: paths below the dataset, with "/".
        split: `--dataset_split`: names joined by "+", or "all".

    Raises:
        UserError: if there is no such split.
    """
    everything = Selection(list(range(len(names))))
    if split == ALL:
        return everything
    shared, folders = top_folders(names)
    labels = [split_of(folder) or split_of_shard(name) for folder, name in zip(folders, names, strict=True)]
    if len({*labels} - {None}) < 2:  # the words may be below the folders of classes
        labels = _deeper_splits([PurePosixPath(name.removeprefix(shared)).parts[:-1] for name in names]) or labels
    found = list(dict.fromkeys(label for label in labels if label))
    wanted = {split_of(word) or word for word in split.split("+")}
    in_splits = len(found) > 1  # what else lies there, a preview say, is in none of them
    if not in_splits and (split == "train" or not wanted & set(found)):
        if split != "train":
            raise NoSplitsError(f"--dataset_split {split}: {where} has no such split; leave it out to use all images")
        return everything._replace(notes=_notes_on_folders(f"{where}/{shared}", folders))
    if missing := wanted - set(found):
        raise UserError(
            f"--dataset_split {split}: {where} has no split {sorted(missing)[0]}; choose {', '.join(found)} or {ALL}"
        )
    indices = [index for index, label in enumerate(labels) if label in wanted]
    places = [folder or PurePosixPath(name).name for folder, name in zip(folders, names, strict=True)]
    unused = counts(
        Counter(place for place, label in zip(places, labels, strict=True) if label is None), LISTED_FOLDERS
    )
    others = f", also what is in no split: {unused}" if None in labels else ""
    notes = [f"split {split}: {len(indices)} of {len(names)} files; --dataset_split {ALL} takes all of them{others}"]
    if len(wanted) == 1:  # else several folders are what was asked for
        shared, folders = top_folders([names[index] for index in indices])
        notes += _notes_on_folders(f"{where}/{shared}", folders)
    return Selection(indices, notes, f", split {split}")


def top_folders(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the folder that all paths share, with "/" at its end, and for each its first folder below, or ""."""
    parents = [PurePosixPath(name).parts[:-1] for name in names]
    shared = 0
    while all(len(parts) > shared for parts in parents) and len({parts[shared] for parts in parents}) == 1:
        shared += 1
    above = "".join(f"{part}/" for part in parents[0][:shared]) if parents else ""
    return above, [parts[shared] if len(parts) > shared else "" for parts in parents]


def _deeper_splits(folders: Sequence[tuple[str, ...]]) -> list[str | None] | None:
    """Return the split of each file by a folder below the first, as in cats/train/ and cats/test/.

    Args:
        folders: of each file.

    Returns:
        Those by the first depth at which every folder names a split, train and another one; None if there is none:
        a single folder called "val" may mean anything.
    """
    for depth in range(1, max(map(len, folders), default=0)):
        labels = [split_of(parts[depth]) if len(parts) > depth else None for parts in folders]
        found = {label for label, parts in zip(labels, folders, strict=True) if len(parts) > depth}
        if "train" in found and None not in found and len(found) > 1:
            return labels
    return None


def split_of_shard(name: str) -> str | None:
    """Return the split of a parquet, Arrow, TFRecord or tar file by the last word of its name that means one.

    `train-00000-of-00002.parquet`, `cats_train.parquet`, `train00-2071.tfrec` and `cats-train.tfrecord-00000-of-00002`
    are of the split train; None for other names and files.
    """
    match = SHARD_NAME.match(PurePosixPath(name).name)
    words = re.split(r"[\W_]+", match[1]) if match else []
    return next((split for word in reversed(words) if (split := split_of(word))), None)


@lru_cache(1000)  # the same few folders for all files
def split_of(word: str) -> str | None:
    """Return the split that a word such as "val" or "train2017" means: train, validation or test; None for others."""
    word = word.lower().rstrip("0123456789_-")
    return next((split for split, words in SPLIT_WORDS.items() if word in words), None)


def _notes_on_folders(where: str, folders: list[str]) -> list[str]:
    numbers = Counter(folders)
    if len(numbers) < 2:
        return []
    listed = counts({folder or "(no folder)": count for folder, count in numbers.items()}, LISTED_FOLDERS)
    one = next(folder for folder in folders if folder)
    return [f"the images of {len(numbers)} folders are used together: {listed}; for one alone: --dataset {where}{one}"]
