"""Settings of the machine that a run makes before it trains."""

import os
import subprocess
import sys

import pytest

from hfgen.errors import UserError
from hfgen.hardware import choose_mixed_precision, keep_freed_memory


# Allocates and frees what an update of a network does, and counts the page faults that this costs.
COUNT_FAULTS = """
import resource, sys, torch
from hfgen.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for update in range(22):
    if update == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2_000_000) for _ in range(8)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments: str, **environment: str) -> int:
    command = [sys.executable, "-c", COUNT_FAULTS, *arguments]
    return int(subprocess.check_output(command, env={**os.environ, **environment}, timeout=300))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="needs glibc")
def test_memory_that_an_update_frees_serves_the_next_one():
    pages = 20 * 8 * 8_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert faults("keep") < pages / 10
    # A user's own choice, here to give everything back, stays.
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536") > pages / 10


def test_where_there_is_no_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr("hfgen.hardware.platform.libc_ver", lambda: ("musl", ""))
    monkeypatch.setattr("hfgen.hardware.ctypes.CDLL", lambda _: pytest.fail("called"))
    keep_freed_memory()


@pytest.mark.parametrize(
    ("capability", "allows_fp16", "chosen"),
    [
        ((9, 0), True, "bf16"),
        ((8, 0), False, "bf16"),
        ((7, 5), True, "fp16"),  # T4
        ((7, 0), True, "fp16"),  # V100
        ((7, 5), False, "no"),
        ((6, 1), True, "no"),
    ],
)
def test_the_precision_is_one_that_the_gpu_computes_fast_and_the_method_bears(
    monkeypatch, capability, allows_fp16, chosen
):
    monkeypatch.setattr("hfgen.hardware.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("hfgen.hardware.torch.cuda.get_device_capability", lambda: capability)
    assert choose_mixed_precision("auto", False, allows_fp16) == chosen
    assert choose_mixed_precision("fp16", False) == "fp16"
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        choose_mixed_precision("fp16", True)
    monkeypatch.setattr("hfgen.hardware.cpu_multiplies_bf16", lambda: False)
    assert choose_mixed_precision("auto", True, True) == "no"
