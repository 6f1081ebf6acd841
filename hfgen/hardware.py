"""What the machine can do, and what a run should record of it."""

import ctypes
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

from hfgen.errors import UserError


# Of glibc's malloc.h; it takes no larger threshold for blocks that are mapped one by one.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_MMAP_THRESHOLD, KEPT_BYTES = 32 * 2**20, 2**30


def choose_mixed_precision(wanted: str, cpu: bool) -> str:
    """Return the mixed precision for accelerate: "no", "bf16" or "fp16".

    Args:
        wanted: one of these, or "auto": bf16 where the hardware multiplies it natively, else no.
        cpu: whether the run stays on the CPU although there is an accelerator.

    Raises:
        UserError: for fp16 without CUDA, where it would silently do nothing.
    """
    on_cuda = torch.cuda.is_available() and not cpu
    if wanted == "fp16" and not on_cuda:
        raise UserError("--mixed_precision fp16 needs a CUDA device; on this one use bf16 or no")
    if wanted != "auto":
        return wanted
    if on_cuda:
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "no"
    return "bf16" if cpu_multiplies_bf16() else "no"


def has_accelerator() -> bool:
    """Whether there is anything to train on but the CPU."""
    if hasattr(torch, "accelerator"):  # from torch 2.6 on
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()


def use_all_cores(local_processes: int) -> None:
    """Let PyTorch use this machine's physical cores, shared among the processes that train on it.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS=1 unless told otherwise, which halves the speed of training
    on a two-core CPU. A value other than 1 was chosen by somebody and is kept.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
        torch.set_num_threads(max(1, cores // local_processes))


def keep_freed_memory() -> None:
    """Let the C library keep memory that was freed instead of returning it to the system, where it is glibc's.

    Each update of a network allocates and frees the same tensors. By default glibc gives those above 128 KiB to 32 MiB
    (it adapts) back to the system at once, and the next update pays for them with page faults. A user who has set
    `MALLOC_MMAP_THRESHOLD_` or `MALLOC_TRIM_THRESHOLD_` has chosen, and is not overruled.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys() or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 products in hardware (avx512_bf16 or amx_bf16); emulated ones are slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return what the speed and the exact numbers of a run depend on: versions, device, precision, processes."""
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
    """Return the processor's model name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
