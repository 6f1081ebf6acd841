"""Endless batches of training images streamed from the Hub, in a shuffled order that resumes exactly.

The order is a *block shuffle*: a process reads its shards in a new random order each epoch, in blocks of
`shuffle_buffer_size` encoded images, and permutes each block. A sliding buffer shuffles slightly better, but its
content depends on the whole history of the stream, so it cannot be resumed. A block depends only on its start: a
checkpoint stores a few numbers, and a resumed run rereads one block and skips its used images.

`IterableDataset.shuffle` is not even used for the shards: with a buffer of 1, a resume still loses an image (datasets
before 5.1), or each epoch ends with a sleep of 5 seconds and a resume restarts ten shards (5.2).
"""

import hashlib
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from hfgen.data.augment import prepare_batch
from hfgen.data.batches import random_crop
from hfgen.data.decode import UnreadableImageError, decode_image, memory_needed, out_of_memory
from hfgen.data.hub_datasets import encoded_images, hub_commit, load_hub_dataset
from hfgen.data.memory import map_in_bounded_memory
from hfgen.data.rgb import GREY_BITS
from hfgen.data.settings import DataSettings
from hfgen.errors import UserError
from hfgen.randomness import keyed_seed
from hfgen.texts import say


NAMED_UNREADABLE = 5  # all unreadable images are counted, this many are named
NARROW_GREY_BITS = 13  # 16-bit files whose values use fewer bits come out nearly black
FETCHING_THREADS = 8  # for images that are separate files, each a network round trip


class _Position(NamedTuple):
    """Start of a block: epoch, block number in it, shards already read, rows already read of the next shard."""

    epoch: int = 0
    block: int = 0
    shard: int = 0
    row: int = 0


# The images in order of use, each a name and its encoded bytes or an error; and the start of the next block.
_Block = tuple[list[tuple[str, bytes | Exception]], _Position]


class _BlockReader:
    """Reads the blocks of one process, one at a time; a block depends only on its position."""

    def __init__(self, settings: DataSettings, commit: str, seed: int, process_index: int, num_processes: int):
        self._dataset, self.column = load_hub_dataset(settings, commit)
        self._name, self._size = settings.dataset, settings.shuffle_buffer_size
        self._seed, self._process_index, self._num_processes = seed, process_index, num_processes
        self._rows: Iterator[tuple[str, _Position, Any]] = iter(())
        self._rows_start: _Position | None = None  # start of the block that `_rows` would continue with
        self.stop = threading.Event()
        if self._dataset.num_shards < num_processes and process_index == 0:
            say(
                f"warning: {self._name} has {self._dataset.num_shards} shard(s) for {num_processes} processes: each "
                "reads all rows and downloads all packed images but uses only its share; store them in "
                f"{num_processes} or more parquet files, or leave out --streaming"
            )

    def read(self, start: _Position) -> _Block:
        """Return the block at `start`; a short block ends the epoch. Raise `UserError` if the stream breaks."""
        rows = self._rows if self._rows_start == start else self._rows_from(start)
        self._rows_start = None
        try:
            taken = list(islice(rows, self._size))
            with ThreadPoolExecutor(FETCHING_THREADS) as fetchers:
                images = [
                    image for row in fetchers.map(lambda row: encoded_images(row[0], row[2]), taken) for image in row
                ]
        except UserError:
            raise
        except Exception as error:  # the libraries and the network can raise almost anything
            raise UserError(
                f"--dataset {self._name}: the stream was interrupted ({type(error).__name__}: {error}); once the Hub "
                "is reachable, continue from the last checkpoint with --resume latest"
            ) from error
        end = _Position(epoch=start.epoch + 1)
        if len(taken) == self._size:
            end = taken[-1][1]._replace(block=start.block + 1)
            self._rows, self._rows_start = rows, end
        generator = np.random.default_rng(keyed_seed(self._seed, *start, self._process_index, "block"))
        return [images[index] for index in generator.permutation(len(images))], end

    def _rows_from(self, start: _Position) -> Iterator[tuple[str, _Position, Any]]:
        """Yield name, next position and undecoded value of each of this process's remaining rows in the epoch."""
        count, step = self._dataset.num_shards, self._num_processes
        shards = np.random.default_rng(keyed_seed(self._seed, start.epoch, "shards")).permutation(count).tolist()
        whole = count >= step  # whole shards per process, otherwise every `step`-th row of all shards
        shards = shards[self._process_index :: step] if whole else shards
        for position in range(start.shard, len(shards)):
            shard = self._dataset.shard(num_shards=count, index=shards[position])
            read = start.row if position == start.shard else 0
            for row, example in enumerate(shard.skip(read) if read else shard, start=read):
                if self.stop.is_set():
                    return
                if whole or row % step == self._process_index:
                    name = f"{self._name}, shard {shards[position]}, row {row}"
                    yield name, start._replace(shard=position, row=row + 1), example[self.column]


class StreamBatches:
    """Yields the batches of one process from a streamed Hub dataset.

    The epochs form one endless sequence of images; a batch may span two blocks or epochs, and no image is left out.
    Each process has its own epochs, so that unequal shares do not make processes wait. Two blocks of encoded images
    are in memory: the current one and the next, which a thread prefetches.

    Args:
        settings: dataset, augmentations and crop.
        batch_size: images per batch on this process.
        seed: seeds the order, the crops and the augmentations.
        device: device of the batches.
        process_index: index of this process.
        num_processes: number of training processes.
        commit: of the dataset; None for the newest.

    Attributes:
        digest: digest of dataset, split and column. The commit is part of the state instead: a resumed run continues
            with its original commit even if the dataset has newer ones.
        unreadable: how often an unreadable image was skipped.

    Raises:
        UserError: if the dataset or split does not exist, or the image column is not unique.
    """

    def __init__(
        self,
        settings: DataSettings,
        batch_size: int,
        seed: int,
        device: torch.device,
        process_index: int = 0,
        num_processes: int = 1,
        commit: str | None = None,
    ):
        self._settings, self._batch_size, self._device = settings, batch_size, device
        self._share = (seed, process_index, num_processes)
        self._position, self._used = _Position(), 0  # the current block, and the number of its images used
        self._block: _Block | None = None
        self._ahead: Future[_Block] | None = None
        self._last_readable = -1  # the last epoch that had a readable image
        self.unreadable, self._named = 0, set[str]()
        self._warned_of_grey = False
        self._reading_thread = ThreadPoolExecutor(1)
        self._decoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._open(commit or hub_commit(settings))
        identity = [settings.dataset, settings.dataset_split, self._reader.column]
        identity += [settings.dataset_config] if settings.dataset_config is not None else []
        self.digest = hashlib.sha256(repr(identity).encode()).hexdigest()

    def _open(self, commit: str) -> None:
        self._commit = commit
        self._reader = _BlockReader(self._settings, commit, *self._share)
        weakref.finalize(self, self._reader.stop.set)  # otherwise the program could exit only after the prefetch

    def __iter__(self) -> "StreamBatches":
        return self

    def __next__(self) -> torch.Tensor:
        """Return the next batch, float32 `(batch_size, 3, sample_size, sample_size)` in [-1, 1], channels_last.

        Raises:
            UserError: if the stream breaks, or an epoch has no readable image.
        """
        generator = torch.Generator().manual_seed(keyed_seed(*self._share, *self._position, self._used, "augment"))
        images: list[np.ndarray] = []
        while len(images) < self._batch_size:
            images += self._next_images(self._batch_size - len(images))
        return prepare_batch(torch.from_numpy(np.stack(images)).to(self._device), self._settings, generator)

    def rewind(self) -> None:
        """Go back to the first image, of the same commit."""
        self.load_state_dict({"commit": self._commit, **_Position()._asdict(), "used": 0})

    def state_dict(self) -> dict[str, Any]:
        """Return the commit, the current block and the number of its images used; prefetched images do not count."""
        return {"commit": self._commit, **self._position._asdict(), "used": self._used}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned; raise `UserError` if its commit is no longer on the Hub."""
        self._block = self._ahead = None
        self._position, self._used = _Position(*(state_dict[field] for field in _Position._fields)), state_dict["used"]
        self._last_readable = self._position.epoch  # unknown: assume that there was one
        if state_dict["commit"] != self._commit:
            self._open(state_dict["commit"])

    def _next_images(self, count: int) -> list[np.ndarray]:
        """Use up to `count` images of the current block; return the readable ones, uint8 `(size, size, 3)` each."""
        if self._block is None:
            reading = self._ahead or self._reading_thread.submit(self._reader.read, self._position)
            self._block = reading.result()
            self._ahead = self._reading_thread.submit(self._reader.read, self._block[1])
        (encoded, end), position, start = self._block, self._position, self._used
        self._used = min(start + count, len(encoded))
        tasks = [(position, index, *encoded[index]) for index in range(start, self._used)]
        if self._used == len(encoded):
            self._position, self._used, self._block = end, 0, None
        decoded = list(map_in_bounded_memory(self._decoders, self._decode, tasks, self._needed_by, ahead=len(tasks)))
        images = [pixels for pixels in decoded if not isinstance(pixels, str)]
        for reason in [reason for reason in decoded if isinstance(reason, str)]:
            self.unreadable += 1
            if reason not in self._named and len(self._named) < NAMED_UNREADABLE:
                self._named.add(reason)
                say(f"skipped an unreadable image: {reason}")
        self._last_readable = position.epoch if images else self._last_readable
        if self._last_readable < position.epoch < self._position.epoch:
            raise UserError(
                f"--dataset {self._settings.dataset}: no readable image in a whole epoch; check --dataset_column, or "
                "leave out --streaming to get a report"
            )
        return images

    def _needed_by(self, task: tuple[_Position, int, str, bytes | Exception]) -> int:
        return memory_needed(task[3], self._settings)

    def _decode(self, task: tuple[_Position, int, str, bytes | Exception]) -> np.ndarray | str:
        """Return the pixels of an image, uint8 `(size, size, 3)`, or the reason why it cannot be read."""
        position, index, name, content = task
        if isinstance(content, MemoryError):
            raise out_of_memory(name)
        if isinstance(content, Exception):
            return f"{name}: {type(content).__name__}: {content}"
        try:
            decoded = decode_image(name, content, self._settings, GREY_BITS[-1])
        except UnreadableImageError as error:
            return f"{name}: {error}"
        generator = np.random.default_rng(keyed_seed(*self._share, *position, index, "crop"))
        if decoded.grey_bits is not None and decoded.grey_bits < NARROW_GREY_BITS and not self._warned_of_grey:
            self._warned_of_grey = True
            say(
                f"warning: {name}: a 16-bit file with values of {decoded.grey_bits} bits is nearly black; without "
                "--streaming the values are scaled to those of all images",
            )
        return random_crop(decoded.pixels[0], self._settings.sample_size, generator)
