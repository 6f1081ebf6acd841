#!/usr/bin/env python
"""Training step of a diffusion model at 64px on the CPU: hfgen's script against denoising-diffusion-pytorch.

    python benchmarks/ddpm_step.py [--quick]

The two networks differ in size, so the sides are compared by floating-point operations per second, counted on the real
step by `torch.utils.flop_counter`. All sides are timed in turn, step by step; medians are compared.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from script_steps import Worker, describe, serve_script, serve_step, verdict


IMAGE_SIZE = 64
MATRIX_SIZES = (1024, 2048, 3072, 4096)
# At least, and the goal.
OVER_FP32, OVER_AMP, OF_MATRIX_RATE = (2.2, 2.7), (1.4, 1.8), (0.6, 0.6)


def build_peer(batch_size: int, mixed_precision: str) -> tuple[Callable[[], None], int]:
    """Return the step of `denoising_diffusion_pytorch.Trainer.train`, and the number of parameters.

    The same calls in the same order, except for its data loader: its images are already in memory, in its favour.
    """
    import torch
    from accelerate import Accelerator
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    torch.manual_seed(0)
    accelerator = Accelerator(split_batches=True, mixed_precision=mixed_precision, cpu=True)
    model = GaussianDiffusion(Unet(dim=64, dim_mults=(1, 2, 4, 8)), image_size=IMAGE_SIZE, timesteps=1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(model, beta=0.995, update_every=10)
    model, optimizer = accelerator.prepare(model, optimizer)
    images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)

    def step() -> None:
        model.train()
        with accelerator.autocast():
            loss = model(images)
            loss.item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step, sum(parameter.numel() for parameter in model.parameters())


def matrix_rate(size: int) -> float:
    """Return the bf16 operations per second of one product of square matrices."""
    import torch

    left, right, product = (torch.ones(size, size, dtype=torch.bfloat16) for _ in range(3))
    torch.mm(left, right, out=product)
    started = time.perf_counter()
    for _ in range(3):
        torch.mm(left, right, out=product)
    return 3 * 2 * size**3 / (time.perf_counter() - started)


def measure(workers: dict[str, Worker], rounds: int, sizes: tuple[int, ...]) -> tuple[dict[str, float], float]:
    """Return the median seconds of each side's step, and the bf16 rate of the best size of matrices."""
    seconds: dict[str, list[float]] = {side: [] for side in workers}
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for worker in workers.values():  # not timed: first calls choose kernels and allocate the optimizer's state
        worker.step()
    for _ in range(rounds):
        for side, worker in workers.items():
            seconds[side].append(worker.step())
        for size in sizes:
            rates[size].append(matrix_rate(size))
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return medians, max(statistics.median(values) for values in rates.values())


def report(workers: dict[str, Worker], medians: dict[str, float], matrix: float, batch_size: int) -> None:
    """Print the tables."""
    speeds = {side: worker.work.flops / medians[side] for side, worker in workers.items()}
    print("| side | parameters | GFLOP per image | s per step | images/s | GFLOP/s |\n|---|---|---|---|---|---|")
    for side, worker in workers.items():
        print(
            f"| {side} | {worker.work.parameters / 1e6:.1f}M | {worker.work.flops / batch_size / 1e9:.1f} | "
            f"{medians[side]:.3f} | {batch_size / medians[side]:.2f} | {speeds[side] / 1e9:.0f} |"
        )
    print(f"| bf16 matrix product | | | | | {matrix / 1e9:.0f} |\n")
    hfgen, fp32, amp = speeds.values()
    print("| FLOP/s of hfgen's step | measured | at least | goal | |\n|---|---|---|---|---|")
    for name, value, (least, goal) in (
        ("over the peer's, fp32", hfgen / fp32, OVER_FP32),
        ("over the peer's, amp", hfgen / amp, OVER_AMP),
        ("as a fraction of the bf16 matrix rate", hfgen / matrix, OF_MATRIX_RATE),
    ):
        print(f"| {name} | {value:.2f} | {least} | {goal} | {verdict(value, least)}, goal {verdict(value, goal)} |")


def main() -> None:
    """Time all sides in turn and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16, help="images per step (default: the peer's, 16)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="two images, two rounds: only test that it runs, not how fast"
    )
    options = parser.parse_args()
    batch_size, rounds, sizes = options.batch_size, options.rounds, MATRIX_SIZES
    if options.quick:
        batch_size, rounds, sizes = 2, 2, (1024,)

    script = ("--unet", "library", "--dataset", "toy_paintings:64", "--batch_size", str(batch_size))
    with tempfile.TemporaryDirectory() as folder:
        workers = {
            "hfgen": Worker(serve_script, "train_ddpm", f"{folder}/run", *script, threads=options.threads),
            "peer, fp32": Worker(serve_step, build_peer, batch_size, "no", threads=options.threads),
            "peer, amp (bf16)": Worker(serve_step, build_peer, batch_size, "bf16", threads=options.threads),
        }
        import torch  # after the workers' start, which sets the number of threads

        torch.set_num_threads(options.threads)
        medians, matrix = measure(workers, rounds, sizes)
        for worker in workers.values():
            worker.close()
    print(describe(options.threads, "diffusers", "accelerate", "denoising-diffusion-pytorch"))
    print(f"{IMAGE_SIZE}px, batch size {batch_size}, median of {rounds} rounds\n")
    report(workers, medians, matrix, batch_size)


if __name__ == "__main__":
    main()
