"""Where the time of a training step goes: share of the matrix rate, a bound by memory traffic, top operations.

The bound is a roofline: an operation takes at least its floating-point operations over the rate of a matrix product,
and at least the bytes of its inputs and outputs over the rate at which memory is copied. The larger of the two, summed
over all operations, is what a step takes if nothing is fused and nothing stays in the caches.
"""

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from script_steps import QUIET, call_in_process, run_script
from tables import Goal, Table
from training_steps import FAMILIES, Size, script_of


MATRIX_SIZES = (1024, 2048, 4096)
COPIED_BYTES = 256 * 2**20
OF_MATRIX_RATE = 0.6
TOP = 8
# The profiler names kernels, the count of operations those that choose them.
CHOSEN_BY = dict.fromkeys(("aten::mkldnn_convolution", "aten::_convolution", "aten::conv2d"), "aten::convolution")


class Operations(NamedTuple):
    """One kind of operation in a step: how often, floating-point operations, bytes, and the bound in seconds."""

    calls: int
    flops: int
    bytes: int
    bound: float


def matrix_rate(precision: str, size: int) -> float:
    """Return the operations per second of a product of square matrices, in "no" (fp32) or "bf16"."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right, product = (torch.ones(size, size, dtype=dtype) for _ in range(3))
    torch.mm(left, right, out=product)
    started = time.perf_counter()
    torch.mm(left, right, out=product)
    return 2 * size**3 / (time.perf_counter() - started)


def copy_rate() -> float:
    """Return the bytes per second that are read and written when memory is copied."""
    import torch

    source = torch.zeros(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    started = time.perf_counter()
    target.copy_(source)
    return 2 * COPIED_BYTES / (time.perf_counter() - started)


def counted_step(steps: Iterator[int], rate: float, bandwidth: float) -> Generator[int, None, dict[str, Operations]]:
    """Yield the next step and return its operations by their names, except for views.

    Args:
        steps: of a run; the work of one is done before the next is asked for.
        rate: floating-point operations per second of matrix products.
        bandwidth: bytes per second.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    found: dict[str, list[Any]] = defaultdict(lambda: [0, 0, 0, 0.0])

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            options = options or {}
            result = function(*arguments, **options)
            packet = function._overloadpacket
            count = flop_registry[packet] if packet in flop_registry else None
            flops = count(*arguments, **options, out_val=result) if count else 0
            inputs = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            memory = {tensor.untyped_storage().data_ptr() for tensor in inputs}
            in_place = function._schema.is_mutable
            is_view = all(tensor.untyped_storage().data_ptr() in memory for tensor in outputs) and not in_place
            if not is_view:
                size = sum(tensor.numel() * tensor.element_size() for tensor in inputs + outputs)
                bound = max(flops / rate, size / bandwidth)
                for index, value in enumerate((1, flops, size, bound)):
                    found[packet.__name__][index] += value
            return result

    with Counter():
        yield next(steps)
    return {name: Operations(*values) for name, values in found.items()}


def costs_of(method: str, arguments: list[str], rounds: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Measure the steps of one script in this process."""
    import torch

    found: dict[str, Any] = {}

    def steps_of(run: Any, steps: Iterator[int]) -> Iterator[int]:
        precision = run.accelerator.mixed_precision
        for _ in range(2):
            yield next(steps)
        seconds, rates, copies, faults = [], [], [], 0
        for _ in range(rounds):  # in turn, as the speed of a machine drifts
            rates.append(max(matrix_rate(precision, size) for size in sizes))
            copies.append(copy_rate())
            before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            yield next(steps)
            seconds.append(time.perf_counter() - started)
            faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        found.update(
            precision={"no": "fp32"}.get(precision, precision),
            seconds=statistics.median(seconds),
            rate=statistics.median(rates),
            bandwidth=statistics.median(copies),
            faults=faults / rounds,
        )
        operations = yield from counted_step(steps, found["rate"], found["bandwidth"])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            yield next(steps)
        found["operations"] = {name: one._asdict() for name, one in operations.items()}
        found["flops"] = sum(one.flops for one in operations.values())
        events = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
        times: dict[str, float] = defaultdict(float)
        for event in events:
            times[CHOSEN_BY.get(event.key, event.key).removeprefix("aten::")] += event.self_cpu_time_total
        total = sum(times.values())
        found["profile"] = {
            name: taken / total for name, taken in sorted(times.items(), key=lambda item: -item[1])[:TOP]
        }

    try:
        run_script(f"train_{method}", arguments, steps_of)
    except SystemExit:
        pass
    return found


def measure_costs(folder: Path, size: Size) -> tuple[list[Table], list[Goal]]:
    """Measure where the time of each family's step goes."""
    about = (
        "Matrix rate: of the best size of square matrices, in the precision of the step, measured between the steps. "
        "Share: of that rate. Bound: the step's time if every operation ran at the matrix rate or at the rate of "
        "copies, whichever is slower for it, and nothing were fused; of which memory: operations without products. "
        "Page faults: memory that is handed back to the system and fetched again."
    )
    columns = ["preset", "batch", "precision", "s per step", "images/s", "GFLOP per image", "matrix GFLOP/s", "share"]
    columns += ["copy GB/s", "bound, s", "of which memory, s", "bound over measured", "page faults per step"]
    table, tables, goals = Table("Share of the machine's rate", about, columns), [], []
    sizes = MATRIX_SIZES if size.divisor == 1 else MATRIX_SIZES[:1]
    for preset, (method, batch_size) in FAMILIES.items():
        batch_size //= size.divisor
        arguments = ["--output_dir", f"{folder}/{preset}_costs", *QUIET, *script_of(preset, batch_size)]
        one = call_in_process(costs_of, method, arguments, size.rounds, sizes, threads=size.threads)
        operations = one["operations"].values()
        share = one["flops"] / one["seconds"] / one["rate"]
        bound = sum(operation["bound"] for operation in operations)
        memory = sum(operation["bound"] for operation in operations if operation["flops"] == 0)
        table.rows.append(
            [preset, batch_size, one["precision"], one["seconds"], batch_size / one["seconds"]]
            + [one["flops"] / batch_size / 1e9, one["rate"] / 1e9, share, one["bandwidth"] / 1e9]
            + [bound, memory, bound / one["seconds"], one["faults"]]
        )
        goals.append(Goal(f"{preset}: share of the matrix rate", share, OF_MATRIX_RATE))
        tables.append(_table_of_operations(preset, one))
    return [table, *tables], goals


def _table_of_operations(preset: str, one: dict[str, Any]) -> Table:
    """Return the operations that take longest, beside their bounds."""
    total = sum(operation["bound"] for operation in one["operations"].values())
    about = f"Of a step of `{preset}`, by PyTorch's profiler; bounds as above."
    table = Table(
        f"Top operations: {preset}", about, ["operation", "share of the time", "calls", "share of the bound"]
    )
    for name, share in one["profile"].items():
        operation = one["operations"].get(name)
        found = [operation["calls"], operation["bound"] / total] if operation else [None, None]
        table.rows.append([name, share, *found])
    return table
