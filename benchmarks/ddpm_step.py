"""Training step of a DDPM at 64 pixels: hfgen's against denoising-diffusion-pytorch's, in one process, alternately.

    pip install -e ".[bench]"
    python benchmarks/ddpm_step.py

The two libraries' U-Nets differ in size, so speeds are compared in floating-point operations per second: those of
forward and backward, counted by PyTorch. The peer steps as its Trainer does, in fp32 and under its own mixed precision
(bf16: fp16 does nothing on a CPU).
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.utils.flop_counter import FlopCounterMode

from hfgen.ema import averaged_copy
from hfgen.hardware import cpu_name, use_all_cores, version_of
from hfgen.losses.diffusion import diffusion_loss, prediction_target
from hfgen.schedules import noise_schedule


SIZE = 64
GOALS = {"fp32": 2.2, "amp": 1.4}


def load_script():
    """Import training_scripts/train_ddpm.py, whose network and settings are measured."""
    path = Path(__file__).resolve().parents[1] / "training_scripts" / "train_ddpm.py"
    spec = importlib.util.spec_from_file_location("train_ddpm", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_ddpm"] = module
    spec.loader.exec_module(module)
    return module


def hfgen_step(images: torch.Tensor) -> Callable[[], None]:
    """Return one update of train_ddpm.py with the library U-Net."""
    script = load_script()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    settings = script.DDPMSettings(unet="library")
    network = script.build_unet(settings, SIZE).to(memory_format=torch.channels_last)
    ema = averaged_copy(network, settings.ema_decay)
    schedule = noise_schedule("linear", 1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=8e-5, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    lr_scheduler = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=10)
    unet, optimizer = accelerator.prepare(network, optimizer)
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        noise = torch.randn(images.shape)
        timesteps = torch.randint(1000, images.shape[:1])
        noisy_images = schedule.add_noise(images, noise, timesteps)
        target = prediction_target(schedule, images, noise, timesteps)
        accelerator.backward(diffusion_loss(unet(noisy_images, timesteps).sample, target, "l2"))
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.update_parameters(network)

    return step


def peer_step(images: torch.Tensor, amp: bool) -> Callable[[], None]:
    """Return one update of denoising-diffusion-pytorch, as its Trainer's `train` does it without accumulation."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    network = Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=False)
    diffusion = GaussianDiffusion(network, image_size=SIZE, timesteps=1000, sampling_timesteps=250)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    images = (images + 1) / 2  # it normalises to [-1, 1] itself

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = diffusion(images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


def count_flops(step: Callable[[], None]) -> float:
    """Count the floating-point operations of one update's matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def matmul_rate(size: int = 4096) -> float:
    """Measure the machine's rate of bf16 matrix products, in operations per second."""
    one, other = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()
    started = time.perf_counter()
    for _ in range(3):
        one @ other
    return 3 * 2 * size**3 / (time.perf_counter() - started)


def main() -> None:
    """Measure alternately and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of batch 2, to see that it runs")
    arguments = parser.parse_args()
    batch_size, rounds = (2, 1) if arguments.quick else (arguments.batch_size, arguments.rounds)

    use_all_cores(1)
    torch.manual_seed(0)
    images = torch.rand(batch_size, 3, SIZE, SIZE) * 2 - 1
    sides = {"hfgen": hfgen_step(images), "peer fp32": peer_step(images, False), "peer amp": peer_step(images, True)}
    flops = {name: count_flops(step) for name, step in sides.items()}  # warms up as well
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    rates = []
    matmul_rate(1024)
    for _ in range(rounds):
        for name, step in sides.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
        rates.append(matmul_rate())

    speed = {name: flops[name] / statistics.median(seconds[name]) for name in sides}
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"denoising-diffusion-pytorch {version_of('denoising-diffusion-pytorch')}, batch {batch_size}, "
          f"median of {rounds}")  # fmt: skip
    print("\n| step | GFLOP per image | images/s | GFLOP/s |\n| --- | --- | --- | --- |")
    for name in sides:
        images_per_second = batch_size / statistics.median(seconds[name])
        print(f"| {name} | {flops[name] / batch_size / 1e9:.1f} | {images_per_second:.2f} | {speed[name] / 1e9:.0f} |")
    print(f"| bf16 matrix product | | | {statistics.median(rates) / 1e9:.0f} |\n")
    for mode, goal in GOALS.items():
        ratio = speed["hfgen"] / speed[f"peer {mode}"]
        print(f"hfgen / peer {mode}: {ratio:.2f} (at least {goal}: {'reached' if ratio >= goal else 'MISSED'})")
    print(f"share of the matrix-product rate: {speed['hfgen'] / statistics.median(rates):.0%}")


if __name__ == "__main__":
    main()
