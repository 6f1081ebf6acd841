"""Opens the training data for one process: the only data function that a training script calls."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hfgen.data.batches import ImageBatches
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.files import write_text_atomically
from hfgen.run_files import INTAKE_FILE, LAUNCHES_FILE
from hfgen.texts import say_lines


class Batches(Protocol):
    """Endless batches, float32 `(batch_size, 3, sample_size, sample_size)` in [-1, 1], that resume exactly."""

    def __next__(self) -> torch.Tensor: ...  # noqa: D105

    def rewind(self) -> None: ...  # noqa: D102

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...  # noqa: D102


class TrainingData(NamedTuple):
    """The training data, as a script uses it.

    Attributes:
        batches: batches of this process.
        images_per_epoch: over all processes; None for a stream, whose length is unknown.
        digest: changes when the training images change.
    """

    batches: Batches
    images_per_epoch: int | None
    digest: str

    @contextmanager
    def from_the_start(self) -> Iterator[Batches]:
        """Give the batches at their first images; afterwards they are where they were."""
        position = self.batches.state_dict()
        self.batches.rewind()
        yield self.batches
        self.batches.load_state_dict(position)


def load_training_data(
    settings: DataSettings,
    batch_size: int,
    seed: int,
    accelerator: Accelerator,
    output_dir: Path,
    commit: str | None = None,
) -> TrainingData:
    """Open the dataset, print its intake report and save it as `intake.json` in the run's folder.

    Args:
        settings: data settings.
        batch_size: images per batch on each process.
        seed: seeds the order, the crops and the augmentations.
        accelerator: gives the process index and the device.
        output_dir: the run's folder.
        commit: of a dataset that is streamed: the one to read; None for the newest.

    Raises:
        UserError: if the dataset cannot be opened, is refused, or has no readable image.
    """
    process = (accelerator.device, accelerator.process_index, accelerator.num_processes)
    if settings.streaming:
        from hfgen.data.streaming import StreamBatches, hub_commit

        newest = hub_commit(settings)  # refuses what is not on the Hub
        # That of the main process: another might come while the others start.
        (commit,) = broadcast_object_list([commit or newest])
        stream = StreamBatches(settings, batch_size, seed, *process, commit)
        return TrainingData(stream, None, stream.digest)
    store = load_images(settings)
    if accelerator.is_main_process:
        say_lines(store.report)
        if not (output_dir / LAUNCHES_FILE).exists():  # a resumed run has the same images, or is refused later
            name = Path(os.path.abspath(os.path.expanduser(settings.dataset))).name
            intake = store.report.to_dict() | {"name": name}
            write_text_atomically(output_dir / INTAKE_FILE, json.dumps(intake, indent=1) + "\n")
    batches = ImageBatches(store, settings, batch_size, seed, *process)
    return TrainingData(batches, len(store), store.digest)
