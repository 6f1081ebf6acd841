"""Runs the steps of a real training script, or of somebody else's loop, one at a time in a process of its own.

What is timed is the script's `main` itself: batches, random numbers, networks, losses, backward, optimizers, average,
log.
"""

import importlib
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from typing import Any, NamedTuple


# Of a script: nothing is written on the way.
QUIET = ("--report_to", "none", "--sample_every", "0", "--checkpoint_every", "0", "--cpu")


class Work(NamedTuple):
    """Size and cost of a worker's first step.

    Attributes:
        flops: floating-point operations of a step, as PyTorch counts them; 0 if they were not counted.
        parameters: of all trained networks.
        seconds: of the first step.
    """

    flops: int
    parameters: int
    seconds: float = 0.0


class Worker:
    """A process that does one step whenever it is asked to, so that several can be timed in turn.

    Processes and not functions, because a process-wide setting of one side (precision, threads, memory allocation)
    must not reach the other.

    Args:
        serve: runs in the new process with a connection and `arguments`: sends a `Work` after its first step, then
            for every True that it receives the seconds of one more step; at False it sends its peak memory in bytes
            and ends.
        arguments: of `serve`, behind the connection.
        threads: of PyTorch and its libraries.
    """

    def __init__(self, serve: Callable[..., None], *arguments: object, threads: int):
        os.environ["OMP_NUM_THREADS"] = str(threads)  # the new process inherits it
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.work: Work = self._connection.recv()

    def step(self) -> float:
        """Let it do one step and return the seconds that it took."""
        self._connection.send(True)
        return self._connection.recv()

    def close(self) -> int:
        """End the process and return its peak memory in bytes."""
        self._connection.send(False)
        peak = self._connection.recv()
        self._process.join()
        return peak


class Timing(NamedTuple):
    """Seconds of the steps of one side, and the peak memory of its process in bytes."""

    seconds: list[float]
    peak_memory: int

    @property
    def median(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median."""
        lower, _, upper = statistics.quantiles(self.seconds, n=4)
        return (upper - lower) / self.median


def time_in_turn(workers: dict[str, Worker], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time the steps of all workers, the sides in turn and every other round in reverse order; end the workers.

    Args:
        workers: by the name of the side.
        rounds: timed steps of each, two at least.
        warmup: steps that are not timed: the first calls choose kernels and allocate the optimizers' state.
    """
    seconds: dict[str, list[float]] = {side: [] for side in workers}
    for index in range(warmup + rounds):
        for side in list(workers)[:: 1 if index % 2 else -1]:
            taken = workers[side].step()
            if index >= warmup:
                seconds[side].append(taken)
    return {side: Timing(seconds[side], worker.close()) for side, worker in workers.items()}


def ratio_of(slow: Timing, fast: Timing) -> float:
    """Return the median of the ratios of steps that were timed one after the other."""
    return statistics.median(one / other for one, other in zip(slow.seconds, fast.seconds, strict=True))


def serve_script(
    connection: Connection, name: str, output_dir: str, *arguments: str, compiled: bool = False, count: bool = True
) -> None:
    """Run a script, such as train_ddpm, with the given command line, step by step; for `Worker`.

    Args:
        connection: to the worker.
        name: of the script.
        output_dir: new folder.
        arguments: of the script.
        compiled: compile its networks by `torch.compile`.
        count: count the floating-point operations of the first step.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def steps_of(run: Any, steps: Iterator[int]) -> Iterator[int]:
        if compiled:
            for network in run.networks:
                network.compile()
        started, flops = time.perf_counter(), 0
        if count and not compiled:
            with FlopCounterMode(display=False) as counter:
                yield next(steps)
            flops = counter.get_total_flops()
        else:
            yield next(steps)
        parameters = sum(weight.numel() for network in run.networks for weight in network.parameters())
        connection.send(Work(flops, parameters, time.perf_counter() - started))
        while connection.recv():
            started = time.perf_counter()
            yield next(steps)
            connection.send(time.perf_counter() - started)
        connection.send(peak_memory())

    run_script(name, ["--output_dir", output_dir, *QUIET, *arguments], steps_of)


def run_script(name: str, arguments: list[str], steps_of: Callable[[Any, Iterator[int]], Iterator[int]]) -> None:
    """Run a training script in this process whose steps are yielded by another generator; write nothing at the end.

    Args:
        name: of the script, such as train_ddpm.
        arguments: of the script.
        steps_of: given the run, whose `networks` are those that are trained, and its own steps, yields steps.
    """
    import torch

    script: Any = importlib.import_module(f"hfgen.training_scripts.{name}")

    class PacedRun(script.Run):
        def restore(self, stateful: dict, *others: Any, **named: Any) -> None:
            super().restore(stateful, *others, **named)
            self.networks = [
                part for name, part in stateful.items() if isinstance(part, torch.nn.Module) and name != "ema"
            ]

        def steps(self) -> Iterator[int]:
            yield from steps_of(self, super().steps())
            raise SystemExit  # and let nothing be written

    script.Run = PacedRun
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # report and bar
        script.main(arguments)


def serve_step(
    connection: Connection, build: Callable[..., tuple[Callable[[], None], int]], *arguments: object
) -> None:
    """Do somebody else's step on request; for `Worker`.

    Args:
        connection: to the worker.
        build: given `arguments`, returns one step and the number of parameters.
        arguments: of `build`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    step, parameters = build(*arguments)
    started = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        step()
    connection.send(Work(counter.get_total_flops(), parameters, time.perf_counter() - started))
    while connection.recv():
        started = time.perf_counter()
        step()
        connection.send(time.perf_counter() - started)
    connection.send(peak_memory())


def call_in_process(function: Callable[..., Any], *arguments: object, threads: int) -> Any:
    """Return what a function returns that is called in a new process, with so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_send_result, args=(theirs, function, *arguments))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def _send_result(connection: Connection, function: Callable[..., Any], *arguments: object) -> None:
    connection.send(function(*arguments))


def peak_memory() -> int:
    """Return the largest resident memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(threads: int, *packages: str) -> str:
    """Return one line on the machine and the versions that the numbers depend on."""
    import torch

    from hfgen.hardware import cpu_name, version_of

    kernels = torch.backends.cpu.get_cpu_capability()
    found = {package: version_of(package) for package in ("torch", *packages)}
    versions = ", ".join(f"{package} {number}" for package, number in found.items() if number)
    return (
        f"{cpu_name()} ({kernels}), {os.cpu_count()} cores, {threads} threads; Python {platform.python_version()}, "
        f"{versions}"
    )
