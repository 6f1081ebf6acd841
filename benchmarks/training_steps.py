"""Training steps at 64 pixels on the CPU: hfgen's scripts against the loops of others, and with torch.compile.

Networks of different sizes are compared by floating-point operations per second, counted by PyTorch on the real step.
"""

from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from peers import (
    DATASET,
    build_denoising_diffusion,
    build_diffusers_example,
    build_plain_dcgan,
    build_pythae,
)
from script_steps import Worker, ratio_of, serve_script, serve_step, time_in_turn
from tables import Goal, Table


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        rounds: timed steps of each side.
        threads: of each side.
        divisor: of the batch sizes.
        large_divisor: of the batch sizes of the largest networks, in `compare_steps`.
    """

    rounds: int
    threads: int
    divisor: int = 1
    large_divisor: int = 1


SPEED_COLUMNS = ["side", "parameters", "GFLOP per image", "s per step", "spread", "images/s", "GFLOP/s", "peak MiB"]
SPREAD = "Spread: distance between the quartiles over the median."
# Families of which the step is looked at closely: preset, script, batch size.
FAMILIES = {
    "dcgan": ("gan", 64),
    "sngan": ("gan", 16),
    "wgan_gp": ("gan", 16),
    "vae": ("vae", 64),
    "ddpm": ("ddpm", 16),
}


def script_of(preset: str, batch_size: int) -> list[str]:
    """Return the arguments of a preset's script that trains on toy paintings and is never at its end."""
    arguments = ["--preset", preset, "--dataset", DATASET, "--batch_size", str(batch_size)]
    if FAMILIES.get(preset, ("",))[0] == "gan":
        arguments += ["--augment", "none", "--watch_every", "0"]
    return [*arguments, "--max_train_steps", "100000"]


def compare_steps(folder: Path, size: Size, bf16: bool) -> tuple[list[Table], list[Goal]]:
    """Compare a step of each family with its peers.

    Args:
        folder: for what the scripts write; new.
        size: how much is measured.
        bf16: whether the CPU multiplies it, so that the peers are timed in mixed precision as well.
    """
    tables, goals = [], []
    for name, measure in (("DDPM", _ddpm), ("DCGAN", _dcgan), ("VAE", _vae)):
        sides, batch_size, about = measure(folder / name, size, bf16)
        workers = {side: start() for side, start in sides.items()}
        works = {side: worker.work for side, worker in workers.items()}
        timings = time_in_turn(workers, size.rounds)
        table = Table(f"Training step: {name}, batches of {batch_size}", f"{about} {SPREAD}", SPEED_COLUMNS)
        for side, timing in timings.items():
            work = works[side]
            table.rows.append(
                [side, work.parameters, work.flops / batch_size / 1e9, timing.median, timing.spread]
                + [batch_size / timing.median, work.flops / timing.median / 1e9, timing.peak_memory / 2**20]
            )
        tables.append(table)
        ours = timings["hfgen"]
        for side, timing in timings.items():
            if side != "hfgen":
                by_flops = name == "DDPM"
                ratio = ratio_of(timing, ours) * (works["hfgen"].flops / works[side].flops if by_flops else 1)
                unit = "FLOP/s" if by_flops else "images/s"
                goals.append(Goal(f"{name}: {unit} over {side}", ratio, AT_LEAST[side]))
    return tables, goals


# Of the peers, by their names in the tables.
AT_LEAST = {
    "denoising-diffusion-pytorch, fp32": 1.0,
    "denoising-diffusion-pytorch, bf16": 1.4,
    "diffusers' example, fp32": 1.0,
    "diffusers' example, bf16": 1.0,
    "plain loop, fp32": 1.3,
    "plain loop, bf16": 1.3,
    "pythae": 1.0,
}


def _ddpm(folder: Path, size: Size, bf16: bool):
    batch_size = 16 // size.large_divisor
    arguments = ("--unet", "library", "--dataset", DATASET, "--batch_size", str(batch_size))
    sides = {"hfgen": partial(Worker, serve_script, "train_ddpm", f"{folder}/run", *arguments, threads=size.threads)}
    for precision, name in (("no", "fp32"), ("bf16", "bf16"))[: 1 + bf16]:
        for peer, build in (
            ("denoising-diffusion-pytorch", build_denoising_diffusion),
            ("diffusers' example", build_diffusers_example),
        ):
            start = partial(Worker, serve_step, build, batch_size, precision, threads=size.threads)
            sides[f"{peer}, {name}"] = start
    about = (
        "hfgen: `train_ddpm.py --unet library`. Peers: the loop of denoising-diffusion-pytorch's Trainer with its "
        "U-Net, and a loop as in diffusers' example for unconditional images, with that example's U-Net. The networks "
        "differ in size: compare GFLOP/s."
    )
    return sides, batch_size, about


def _dcgan(folder: Path, size: Size, bf16: bool):
    batch_size = 64 // size.divisor
    arguments = script_of("dcgan", batch_size)
    sides = {"hfgen": partial(Worker, serve_script, "train_gan", f"{folder}/run", *arguments, threads=size.threads)}
    for in_bf16, name in ((False, "fp32"), (True, "bf16"))[: 1 + bf16]:
        start = partial(Worker, serve_step, build_plain_dcgan, batch_size, in_bf16, threads=size.threads)
        sides[f"plain loop, {name}"] = start
    about = (
        "hfgen: `train_gan.py --preset dcgan --augment none`. Plain loop: the same layers as the well-known tutorials "
        "train them, with everything written out."
    )
    return sides, batch_size, about


def _vae(folder: Path, size: Size, bf16: bool):
    batch_size = 64 // size.divisor
    arguments = [*script_of("vae", batch_size), "--layers_per_block", "0"]
    sides = {
        "hfgen": partial(Worker, serve_script, "train_vae", f"{folder}/run", *arguments, threads=size.threads),
        "pythae": partial(Worker, serve_step, build_pythae, batch_size, 0, f"{folder}/peer", threads=size.threads),
    }
    about = (
        "hfgen: `train_vae.py --preset vae --layers_per_block 0`. pythae: the body of its trainer's loop, its data "
        "loader included, with an encoder and a decoder of the same layers."
    )
    return sides, batch_size, about


def compare_compiled(folder: Path, size: Size) -> list[Table]:
    """Time a step of each family with and without `torch.compile` of its networks."""
    about = "All networks of the step compiled with the default settings. First step: compilation included. " + SPREAD
    columns = ["preset", "batch", "s per step", "s per compiled step", "spread", "times faster", "first step, s"]
    columns += ["first compiled step, s"]
    table = Table("torch.compile on the CPU", about, columns)
    for preset, (method, batch_size) in FAMILIES.items():
        batch_size //= size.divisor
        arguments = (f"train_{method}", f"{folder}/{preset}", *script_of(preset, batch_size))
        plain = Worker(partial(serve_script, count=False), *arguments, threads=size.threads)
        try:
            others = (arguments[0], arguments[1] + "_compiled", *arguments[2:])
            compiled = Worker(partial(serve_script, compiled=True), *others, threads=size.threads)
        except EOFError:  # the script has failed, as double gradients do
            plain.close()
            table.rows.append([preset, batch_size, None, "fails", None, None, None, None])
            continue
        works = plain.work, compiled.work
        one, other = time_in_turn({"plain": plain, "compiled": compiled}, size.rounds).values()
        table.rows.append(
            [preset, batch_size, one.median, other.median, max(one.spread, other.spread), ratio_of(one, other)]
            + [work.seconds for work in works]
        )
    return [table]


LEVERS = ("kept memory", "matrix products")


def serve_without(connection: Connection, lever: str, name: str, output_dir: str, *arguments: str) -> None:
    """Run a script step by step without one of the levers, or with all if it is ""; for `Worker`."""
    import hfgen.methods.matrix_convolution
    import hfgen.training.launcher

    if lever == "kept memory":
        hfgen.training.launcher.keep_freed_memory = lambda: None
    elif lever == "matrix products":
        hfgen.methods.matrix_convolution.use_matrix_products = lambda network: None
    serve_script(connection, name, output_dir, *arguments, count=False)


def compare_levers(folder: Path, size: Size) -> list[Table]:
    """Time a step of DCGAN and of the VAE with and without each lever of hfgen."""
    about = (
        "How many times longer a step takes without: keeping the memory that an update frees; matrix products in the "
        "place of coarse convolutions (in fp32: of their weight gradients). " + SPREAD
    )
    columns = ["preset", "batch", "s per step", "spread", *(f"without {lever}" for lever in LEVERS)]
    table = Table("What hfgen's levers bring", about, columns)
    for preset, batch_size in (("dcgan", 64), ("dcgan", 16), ("vae", 64), ("vae", 16)):
        batch_size //= size.divisor
        method = FAMILIES[preset][0]
        arguments = script_of(preset, batch_size)
        workers = {}
        for lever in ("", *LEVERS):
            place = f"{folder}/{preset}_{batch_size}_{lever.replace(' ', '_')}"
            workers[lever] = Worker(serve_without, lever, f"train_{method}", place, *arguments, threads=size.threads)
        timings = time_in_turn(workers, size.rounds, warmup=2)
        ratios = [ratio_of(timings[lever], timings[""]) for lever in LEVERS]
        table.rows.append([preset, batch_size, timings[""].median, timings[""].spread, *ratios])
    return [table]
