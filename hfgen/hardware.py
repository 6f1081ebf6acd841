"""What the machine supports, and what a run records about it."""

import ctypes
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from hfgen.errors import UserError


# From glibc's malloc.h; MAX_MMAP_THRESHOLD is the largest mmap threshold that it accepts.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_MMAP_THRESHOLD, KEPT_BYTES = 32 * 2**20, 2**30


def choose_mixed_precision(wanted: str, cpu: bool, allows_fp16: bool = False) -> str:
    """Return the mixed precision for accelerate: "no", "bf16" or "fp16".

    Args:
        wanted: one of these, or "auto": bf16 if the hardware supports it natively, else fp16 on a GPU with tensor
            cores for it (Volta and Turing: V100, T4, RTX 20) if that is allowed, else no.
        cpu: whether the run uses the CPU even if there is an accelerator.
        allows_fp16: whether the method can be trained with scaled gradients.

    Raises:
        UserError: for fp16 without CUDA, where it would silently have no effect.
    """
    on_cuda = torch.cuda.is_available() and not cpu
    if wanted == "fp16" and not on_cuda:
        raise UserError("--mixed_precision fp16 needs a CUDA device; use bf16 or no on this one")
    if wanted != "auto":
        return wanted
    if on_cuda:
        capability = torch.cuda.get_device_capability()
        return "bf16" if capability >= (8, 0) else "fp16" if allows_fp16 and capability >= (7, 0) else "no"
    return "bf16" if cpu_multiplies_bf16() else "no"


def has_accelerator() -> bool:
    """Whether there is a device other than the CPU to train on."""
    if hasattr(torch, "accelerator"):  # torch >= 2.6
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


def use_fast_kernels() -> None:
    """Let CUDA choose its fastest convolutions by trying them, and multiply what stays in fp32 in TF32.

    TF32, of Ampere and later, keeps the range of fp32 and 10 bits of its mantissa. Another choice of convolution
    rounds differently, so two launches of one run are not bit-identical.
    """
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


def use_all_cores(local_processes: int) -> None:
    """Let PyTorch use all physical cores of this machine, split among its training processes.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 by default, which halves training speed on a two-core
    CPU.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    torch.set_num_threads(max(1, cores // local_processes))


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system; no effect with other C libraries.

    Each update of a network allocates and frees the same tensors. By default glibc returns those above a threshold
    (128 KiB to 32 MiB, adaptive) to the system at once, so the next update causes page faults. If the user has set
    `MALLOC_MMAP_THRESHOLD_` or `MALLOC_TRIM_THRESHOLD_`, nothing is changed.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys() or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def give_freed_memory_back() -> None:
    """Return to the system what Python and PyTorch have freed, on the CPU and on an accelerator."""
    clear_device_cache(garbage_collection=True)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 products in hardware (avx512_bf16 or amx_bf16); emulation is slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return what affects a run's speed and exact numbers: versions, device, precision, processes."""
    device = accelerator.device
    return {
        "hfgen": version_of("hfgen"),
        **{package: version_of(package) for package in ("torch", "diffusers", "accelerate", "datasets")},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {cpu_name()}",
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
    }


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's model name, if the system provides it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def seed_global_generator(seed: int, device: torch.device) -> None:
    """Like `torch.manual_seed`, for the device in use only: seeding all possible devices takes 0.5 ms."""
    if device.type not in ("cpu", "cuda", "mps"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
