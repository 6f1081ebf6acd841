"""Images per second from the cache against those that a training step consumes, alternately in one process.

python benchmarks/data_path.py
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from hfgen.data.batches import ImageBatches
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.hardware import cpu_name, use_all_cores
from hfgen.models import UNetBase


GOAL = 20


def training_step(batch_size: int, sample_size: int) -> Callable[[], None]:
    """Return forward, backward and update of `ddpm_base`'s network: the fastest consumer that hfgen has."""
    network = UNetBase(sample_size).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    images = torch.randn(batch_size, 3, sample_size, sample_size).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction = network(images, torch.randint(1000, (batch_size,))).sample
        (prediction.float() - images).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def images_per_second(action: Callable[[], object], images: int, repeats: int) -> float:
    """Time an action that handles so many images."""
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    return images * repeats / (time.perf_counter() - started)


def main() -> None:
    """Measure alternately and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of small batches, to see that it runs")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    use_all_cores(1)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {rounds}\n")
    print("| pixels | batch | augmented | training images/s | data images/s | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as cache:
        for sample_size, batch_size in ((64, 4 if arguments.quick else 32), (256, 1 if arguments.quick else 4)):
            step = training_step(batch_size, sample_size)
            step()
            for flip in (False, True):
                settings = DataSettings(f"toy_paintings:{300}", sample_size=sample_size, cache_dir=cache)
                settings.horizontal_flip = flip
                batches = ImageBatches(load_images(settings), settings, batch_size, 0, torch.device("cpu"))
                next(batches)
                trained, delivered = [], []
                for _ in range(rounds):
                    trained.append(images_per_second(step, batch_size, 1))
                    delivered.append(images_per_second(lambda source=batches: next(source), batch_size, 50))
                ratio = statistics.median(delivered) / statistics.median(trained)
                verdict = "" if ratio >= GOAL else f" (MISSED: at least {GOAL})"
                print(
                    f"| {sample_size} | {batch_size} | {'flip' if flip else 'no'} | {statistics.median(trained):.1f} "
                    f"| {statistics.median(delivered):.0f} | {ratio:.0f}{verdict} |"
                )


if __name__ == "__main__":
    main()
