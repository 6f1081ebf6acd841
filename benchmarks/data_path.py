#!/usr/bin/env python
"""Images a second that the data path delivers from its cache, against those that a training step consumes.

    python benchmarks/data_path.py [--quick]

The consumer is `train_ddpm.py --preset ddpm_base` at 64px on the CPU. Larger images train slower, so the 256px rows
are held to a stricter standard than need be. Delivery and training are timed in turn; medians are compared.
"""

import argparse
import statistics
import tempfile
import time

import torch
from script_steps import Worker, describe, serve_script, verdict

from hfgen.data.batches import ImageBatches
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images


CASES = [(size, flip) for size in (64, 256) for flip in (False, True)]
AT_LEAST = 20


def open_batches(size: int, flip: bool, images: int, batch_size: int, cache_dir: str) -> ImageBatches:
    """Decode the images into a cache and open it."""
    settings = DataSettings(
        dataset=f"toy_paintings:{images}", sample_size=size, horizontal_flip=flip, cache_dir=cache_dir
    )
    return ImageBatches(load_images(settings), settings, batch_size, seed=0, device=torch.device("cpu"))


def delivery_rate(batches: ImageBatches, seconds: float) -> float:
    """Return the images a second of batches drawn for at least `seconds`."""
    images, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        images += len(next(batches))
    return images / (time.perf_counter() - started)


def main() -> None:
    """Time delivery and training in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch, for delivery and training")
    parser.add_argument("--images", type=int, default=512, help="images in the dataset")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small and few images: tests that it runs, not how fast")
    options = parser.parse_args()
    if options.quick:
        options.batch_size, options.images, options.rounds = 4, 16, 2

    torch.set_num_threads(options.threads)
    delivered: dict[tuple[int, bool], list[float]] = {case: [] for case in CASES}
    consumed: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        script = ("--preset", "ddpm_base", "--dataset", f"toy_paintings:{options.images}", "--cache_dir", folder)
        script += ("--batch_size", str(options.batch_size))
        worker = Worker(serve_script, f"{folder}/run", *script, threads=options.threads)
        sources = {case: open_batches(*case, options.images, options.batch_size, folder) for case in CASES}
        for batches in sources.values():
            next(batches)  # not timed, as the first step is not
        for _ in range(options.rounds):
            for case, batches in sources.items():
                delivered[case].append(delivery_rate(batches, seconds=0.02 if options.quick else 0.3))
            consumed.append(options.batch_size / worker.step())
        worker.close()

    need = statistics.median(consumed)
    print(describe(options.threads, "accelerate", "diffusers"))
    print(f"batch size {options.batch_size}, {options.images} toy paintings, median of {options.rounds} rounds\n")
    print(f"The training step of ddpm_base at 64px consumes {need:.1f} images/s.\n")
    print("| image size | horizontal_flip | delivered images/s | over the step's | at least | |")
    print("|---|---|---|---|---|---|")
    for (size, flip), rates in delivered.items():
        rate, flips = statistics.median(rates), "yes" if flip else "no"
        times = rate / need
        print(f"| {size}px | {flips} | {rate:.0f} | {times:.0f}x | {AT_LEAST}x | {verdict(times, AT_LEAST)} |")


if __name__ == "__main__":
    main()
