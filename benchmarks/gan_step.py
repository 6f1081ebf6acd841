#!/usr/bin/env python
"""Training step and sampling of DCGAN at 64px on the CPU: hfgen's script against a plain PyTorch loop.

    python benchmarks/gan_step.py [--quick]

The plain loop is what the well-known tutorials do: NCHW, float32, Adam, real and generated batch one after the other,
the generator's update through the whole discriminator; and the same under bf16 autocast. The networks have the same
layers. All sides are timed in turn, step by step; medians are compared.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from ddpm_step import MATRIX_SIZES, matrix_rate
from script_steps import Work, Worker, describe, serve_script, serve_step, verdict


LATENT_DIM, WIDTH, IMAGE_SIZE = 100, 64, 64
# At least, and the goal.
OVER_FP32, OVER_AMP, OF_MATRIX_RATE, SAMPLING = (5.0, 5.0), (1.3, 1.3), (0.75, 0.75), (3.0, 3.0)


def plain_generator():
    """Build the generator, as a sequence of layers."""
    from torch import nn

    widths = [8 * WIDTH, 4 * WIDTH, 2 * WIDTH, WIDTH]
    layers = [nn.ConvTranspose2d(LATENT_DIM, widths[0], 4, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(True)]
    for wide, narrow in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(WIDTH, 3, 4, 2, 1, bias=False), nn.Tanh())


def plain_discriminator():
    """Build the discriminator, as a sequence of layers."""
    from torch import nn

    widths = [WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH]
    layers = [nn.Conv2d(3, WIDTH, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, bias=False))


def build_plain_step(batch_size: int, bf16: bool) -> tuple[Callable[[], None], int]:
    """Return one step of the plain loop and the number of parameters; the images are already in memory."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    generator, discriminator = plain_generator(), plain_discriminator()
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    ones, zeros = torch.ones(batch_size), torch.zeros(batch_size)

    def loss_of(batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return criterion(discriminator(batch).view(-1), labels)

    def step() -> None:
        discriminator.zero_grad()
        real_loss = loss_of(images, ones)
        real_loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            fake_images = generator(torch.randn(batch_size, LATENT_DIM, 1, 1))
        fake_loss = loss_of(fake_images.detach(), zeros)
        fake_loss.backward()
        optimizer_d.step()
        generator.zero_grad()
        generator_loss = loss_of(fake_images, ones)
        generator_loss.backward()
        optimizer_g.step()
        (real_loss + fake_loss).item(), generator_loss.item()

    networks = (generator, discriminator)
    return step, sum(weight.numel() for network in networks for weight in network.parameters())


def serve_plain_sampling(connection: Connection, count: int, batch_size: int) -> None:
    """Draw `count` images by the plain generator on request, as arrays of uint8; for `Worker`."""
    import torch

    torch.manual_seed(0)
    generator = plain_generator().eval()

    def generate() -> None:
        with torch.no_grad():
            for start in range(0, count, batch_size):
                images = generator(torch.randn(min(batch_size, count - start), LATENT_DIM, 1, 1))
                ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    connection.send(Work(0, sum(weight.numel() for weight in generator.parameters())))
    while connection.recv():
        started = time.perf_counter()
        generate()
        connection.send(time.perf_counter() - started)


def serve_sampling(connection: Connection, folder: str, count: int, batch_size: int) -> None:
    """Draw `count` images as `hfgen sample` does, each by its own generator, on request; for `Worker`."""
    import numpy as np
    import torch

    from hfgen.inference.opening import open_pipeline
    from hfgen.inference.sampling import SamplingOptions, generate_images
    from hfgen.models import DCGANGenerator
    from hfgen.pipelines import GANPipeline

    torch.manual_seed(0)
    GANPipeline(DCGANGenerator(IMAGE_SIZE, LATENT_DIM, base_channels=WIDTH).eval()).save_pretrained(folder)
    pipeline = open_pipeline(folder, "cpu")
    connection.send(Work(0, pipeline.generator.num_parameters()))
    while connection.recv():
        started = time.perf_counter()
        for image in generate_images(pipeline, SamplingOptions(count, 0, 1, batch_size)):
            np.asarray(image)
        connection.send(time.perf_counter() - started)


def medians_of(workers: dict[str, Worker], rounds: int) -> dict[str, float]:
    """Return the median seconds of each side, all sides timed in turn."""
    seconds: dict[str, list[float]] = {side: [] for side in workers}
    for worker in workers.values():  # not timed: first calls choose kernels and allocate the optimizers' state
        worker.step()
    for _ in range(rounds):
        for side, worker in workers.items():
            seconds[side].append(worker.step())
    for worker in workers.values():
        worker.close()
    return {side: statistics.median(values) for side, values in seconds.items()}


def main() -> None:
    """Time all sides in turn and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_images", type=int, default=10_000, help="of the sampling")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only test that it runs, not how fast")
    options = parser.parse_args()
    batch_size, rounds, count, sizes = options.batch_size, options.rounds, options.num_images, MATRIX_SIZES
    if options.quick:
        batch_size, rounds, count, sizes = 4, 2, 32, (1024,)

    settings = ("--preset", "dcgan", "--dataset", "toy_paintings:256", "--batch_size", str(batch_size))
    settings += ("--augment", "none", "--num_epochs", "1000", "--watch_every", "250")
    with tempfile.TemporaryDirectory() as folder:
        workers = {
            "hfgen": Worker(serve_script, "train_gan", f"{folder}/run", *settings, threads=options.threads),
            "plain, fp32": Worker(serve_step, build_plain_step, batch_size, False, threads=options.threads),
            "plain, bf16 autocast": Worker(serve_step, build_plain_step, batch_size, True, threads=options.threads),
        }
        works = {side: worker.work for side, worker in workers.items()}
        steps = medians_of(workers, rounds)
        drawers = {
            "hfgen": Worker(serve_sampling, f"{folder}/pipeline", count, 64, threads=options.threads),
            "plain": Worker(serve_plain_sampling, count, 64, threads=options.threads),
        }
        drawing = medians_of(drawers, 1 if options.quick else 3)
    import torch

    torch.set_num_threads(options.threads)
    matrix = max(statistics.median(matrix_rate(size) for _ in range(3)) for size in sizes)

    print(describe(options.threads, "diffusers", "accelerate"))
    print(f"{IMAGE_SIZE}px, batch size {batch_size}, median of {rounds} rounds\n")
    print("| side | parameters | GFLOP per image | s per step | images/s |\n|---|---|---|---|---|")
    for side, work in works.items():
        print(
            f"| {side} | {work.parameters / 1e6:.2f}M | {work.flops / batch_size / 1e9:.2f} | {steps[side]:.3f} | "
            f"{batch_size / steps[side]:.1f} |"
        )
    print(f"\n| generating {count} images | s | images/s |\n|---|---|---|")
    for side, seconds in drawing.items():
        print(f"| {side} | {seconds:.2f} | {count / seconds:.0f} |")
    # The work that the step needs, as the plain loop counts it less what it does for nothing: hfgen's own count.
    rate = works["hfgen"].flops / steps["hfgen"]
    print("\n| hfgen | measured | at least | goal | |\n|---|---|---|---|---|")
    for name, value, (least, goal) in (
        ("images/s over the plain loop's, fp32", steps["plain, fp32"] / steps["hfgen"], OVER_FP32),
        ("images/s over the plain loop's, bf16 autocast", steps["plain, bf16 autocast"] / steps["hfgen"], OVER_AMP),
        (f"fraction of the bf16 matrix rate, {matrix / 1e9:.0f} GFLOP/s", rate / matrix, OF_MATRIX_RATE),
        (f"generating {count} images, over the plain loop's, fp32", drawing["plain"] / drawing["hfgen"], SAMPLING),
    ):
        print(f"| {name} | {value:.2f} | {least} | {goal} | {verdict(value, least)}, goal {verdict(value, goal)} |")


if __name__ == "__main__":
    main()
