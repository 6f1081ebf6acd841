"""Images a second that the data path delivers from its cache, against those that a training step consumes.

The consumer is `train_ddpm.py --preset ddpm` at 64 pixels on the CPU. Larger images train slower, so the rows of 256
pixels are held to a stricter standard than need be. Delivery and training are timed in turn; medians are compared.
"""

import statistics
import time
from pathlib import Path

from script_steps import Worker, serve_script
from tables import Goal, Table


CASES = [(size, flip) for size in (64, 256) for flip in (False, True)]
AT_LEAST = 20


def compare_data_path(folder: Path, rounds: int, threads: int, images: int, batch_size: int, seconds: float):
    """Compare delivery and training.

    Args:
        folder: for the cache and the run.
        rounds: of both.
        threads: of training.
        images: in the dataset.
        batch_size: of both.
        seconds: of delivery in a round.
    """
    import torch

    from hfgen.data.batches import ImageBatches
    from hfgen.data.settings import DataSettings
    from hfgen.data.store import load_images

    dataset, cache = f"toy_paintings:{images}", f"{folder}/cache"
    sources = {}
    for size, flip in CASES:
        settings = DataSettings(dataset=dataset, sample_size=size, horizontal_flip=flip, cache_dir=cache)
        sources[size, flip] = ImageBatches(
            load_images(settings), settings, batch_size, seed=0, device=torch.device("cpu")
        )
        next(sources[size, flip])  # not timed, as the first step is not
    arguments = ["--preset", "ddpm", "--dataset", dataset, "--cache_dir", cache, "--batch_size", str(batch_size)]
    worker = Worker(serve_script, "train_ddpm", f"{folder}/data_path", *arguments, threads=threads)
    delivered: dict[tuple[int, bool], list[float]] = {case: [] for case in CASES}
    consumed = []
    for _ in range(rounds):
        for case, batches in sources.items():
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < seconds:
                count += len(next(batches))
            delivered[case].append(count / (time.perf_counter() - started))
        consumed.append(batch_size / worker.step())
    worker.close()
    need = statistics.median(consumed)
    about = f"`ddpm`'s step at 64 pixels, batch {batch_size}, consumes {need:.1f} images/s; {images} toy paintings."
    table = Table("Data path", about, ["pixels", "horizontal flip", "images/s", "over the step's"])
    goals = []
    for (size, flip), rates in delivered.items():
        rate, flips = statistics.median(rates), "yes" if flip else "no"
        table.rows.append([size, flips, rate, rate / need])
        goals.append(Goal(f"data path at {size} pixels, flip: {flips}, over the step", rate / need, AT_LEAST))
    return [table], goals
