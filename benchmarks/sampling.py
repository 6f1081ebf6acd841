"""Sampling: DCGAN's generator against a plain loop, and the quality of diffusion samples beside their time."""

import time
from multiprocessing.connection import Connection
from pathlib import Path

from peers import IMAGE_SIZE, LATENT_DIM, WIDTH, plain_generator
from script_steps import Work, Worker, peak_memory, ratio_of, time_in_turn
from tables import Goal, Table


BATCH_SIZE, SAMPLING = 64, 2.0
# Of a pipeline trained with EDM and of one trained as a DDPM: sampler and steps; the pipeline's own come first.
EDM_SAMPLERS = (("ddim", 250), ("ddim", 1000))
DDPM_SAMPLERS = (("ddim", 250), ("ddpm", 1000))


def serve_plain_sampling(connection: Connection, count: int) -> None:
    """Sample `count` images by the plain generator on request, as arrays of uint8; for `Worker`."""
    import torch

    torch.manual_seed(0)
    generator = plain_generator().eval()
    connection.send(Work(0, sum(weight.numel() for weight in generator.parameters())))
    while connection.recv():
        started = time.perf_counter()
        with torch.no_grad():
            for start in range(0, count, BATCH_SIZE):
                images = generator(torch.randn(min(BATCH_SIZE, count - start), LATENT_DIM, 1, 1))
                ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        connection.send(time.perf_counter() - started)
    connection.send(peak_memory())


def serve_sampling(connection: Connection, folder: str, count: int) -> None:
    """Sample `count` images as `hfgen sample` does, each by its own random numbers, on request; for `Worker`."""
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
        for image in generate_images(pipeline, SamplingOptions(count, seed=0, batch_size=BATCH_SIZE)):
            np.asarray(image)
        connection.send(time.perf_counter() - started)
    connection.send(peak_memory())


def compare_gan_sampling(folder: Path, count: int, rounds: int, threads: int) -> tuple[list[Table], list[Goal]]:
    """Compare the sampling of `count` images by DCGAN's generator with that of a plain loop."""
    workers = {
        "hfgen": Worker(serve_sampling, f"{folder}/generator", count, threads=threads),
        "plain loop": Worker(serve_plain_sampling, count, threads=threads),
    }
    timings = time_in_turn(workers, rounds)
    about = "hfgen: as `hfgen sample` generates them, each image from a random number generator of its own."
    table = Table(f"DCGAN: {count:,} images generated", about, ["side", "s", "images/s", "peak MiB"])
    for side, timing in timings.items():
        table.rows.append([side, timing.median, count / timing.median, timing.peak_memory / 2**20])
    ratio = ratio_of(timings["plain loop"], timings["hfgen"])
    return [table], [Goal("DCGAN: images generated per second over the plain loop", ratio, SAMPLING)]


def compare_quality(pipeline: str, reference: str, num_images: int, divisor: int, device: str) -> list[Table]:
    """Score the images of one diffusion pipeline by sampler and steps, beside the time that they take.

    Args:
        pipeline: run or pipeline folder.
        reference: dataset to compare with.
        num_images: generated; the FID of few images is far above that of many.
        divisor: of the steps; 1 for all.
        device: to sample on.
    """
    import numpy as np

    from hfgen.data.settings import DataSettings
    from hfgen.evaluation.reference import open_reference
    from hfgen.families import family
    from hfgen.inference.opening import open_pipeline
    from hfgen.inference.sampling import SamplingOptions, generate_images, image_size
    from hfgen.methods.schedules import default_num_inference_steps, is_edm
    from hfgen.metrics.frechet import frechet_distance

    saved = open_pipeline(pipeline, device)
    if family(saved) != "ddpm":
        raise SystemExit(f"--pipeline {pipeline}: only diffusion has samplers and steps to compare")
    data = DataSettings(dataset=reference, sample_size=image_size(saved))
    real = open_reference(data, saved.device, "inception", "clean", None)
    about = f"FID of {num_images} images against all {len(real.features):,} of the reference, seed 0, on {device}."
    table = Table("Diffusion: quality beside time", about, ["sampler", "steps", "s per image", "FID"])
    samplers = EDM_SAMPLERS if is_edm(saved.scheduler) else DDPM_SAMPLERS
    for sampler, steps in ((None, default_num_inference_steps(saved) * divisor), *samplers):
        opened = open_pipeline(pipeline, device, sampler)
        started = time.perf_counter()
        images = list(generate_images(opened, SamplingOptions(num_images, 0, steps // divisor, BATCH_SIZE)))
        seconds = (time.perf_counter() - started) / num_images
        features = real.extractor((np.asarray(image) for image in images), num_images)
        name = sampler or "the pipeline's own"
        table.rows.append([name, steps // divisor, seconds, frechet_distance(features, real.features)])
    return [table]
