#!/usr/bin/env python
"""What each lever brings to a GAN's training step in small batches at 64px on the CPU: the script with and without it.

    python benchmarks/gan_small_batches.py [--quick]

The levers: keeping the memory that an update frees; matrix products in the place of coarse convolutions, in bf16 only;
seeding only the generators in use. All sides are timed in turn, step by step; medians are compared.
"""

import argparse
import statistics
import tempfile
from multiprocessing.connection import Connection

from script_steps import Worker, describe, serve_script


LEVERS = ("kept memory", "matrix products", "few seeds")
PRESETS = ("dcgan", "sngan")


def serve_without(connection: Connection, lever: str, output_dir: str, *arguments: str) -> None:
    """Run train_gan step by step without one of the levers, or with all if it is ""; for `Worker`."""
    import torch

    import hfgen.methods.matrix_convolution
    import hfgen.training.run

    if lever == "kept memory":
        hfgen.training.run.keep_freed_memory = lambda: None
    elif lever == "matrix products":
        hfgen.methods.matrix_convolution.use_matrix_products = lambda network: None
    elif lever == "few seeds":
        hfgen.training.run.Run._seed_global_generator = lambda run, seed: torch.manual_seed(seed) and None
    serve_script(connection, "train_gan", output_dir, *arguments)


def ratios(preset: str, batch_size: int, precision: str, rounds: int, threads: int) -> tuple[float, dict[str, float]]:
    """Return images/s with all levers, and by lever how many times those without it."""
    settings = ("--preset", preset, "--dataset", "toy_paintings:256", "--batch_size", str(batch_size))
    settings += (
        "--augment",
        "none",
        "--watch_every",
        "0",
        "--mixed_precision",
        precision,
        "--max_train_steps",
        "9999",
    )
    with tempfile.TemporaryDirectory() as folder:
        workers = {
            lever: Worker(serve_without, lever, f"{folder}/{lever or 'all'}", *settings, threads=threads)
            for lever in ("", *LEVERS)
        }
        seconds: dict[str, list[float]] = {lever: [] for lever in workers}
        for _ in range(3):  # not timed: first calls choose kernels and allocate the optimizers' state
            for worker in workers.values():
                worker.step()
        for _ in range(rounds):
            for lever, worker in workers.items():
                seconds[lever].append(worker.step())
        for worker in workers.values():
            worker.close()
    medians = {lever: statistics.median(values) for lever, values in seconds.items()}
    return batch_size / medians[""], {lever: medians[lever] / medians[""] for lever in LEVERS}


def main() -> None:
    """Time all sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="only test that it runs, not how fast")
    options = parser.parse_args()
    from hfgen.hardware import cpu_multiplies_bf16

    precisions = ("bf16", "no") if cpu_multiplies_bf16() else ("no",)
    print(describe(options.threads, "diffusers", "accelerate"))
    print(f"64px, median of {options.rounds} rounds; a ratio above 1 is the gain\n")
    print(f"| preset | batch | precision | images/s | {' | '.join(LEVERS)} |\n|{'---|' * (4 + len(LEVERS))}")
    for preset in PRESETS[: 1 if options.quick else None]:
        for batch_size in (4,) if options.quick else (16, 32):
            for precision in precisions:
                rounds = 2 if options.quick else options.rounds
                speed, gains = ratios(preset, batch_size, precision, rounds, options.threads)
                cells = " | ".join(f"{gains[lever]:.2f}" for lever in LEVERS)
                print(
                    f"| {preset} | {batch_size} | {precision.replace('no', 'fp32')} | {speed:.1f} | {cells} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
