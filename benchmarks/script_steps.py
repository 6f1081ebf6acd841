"""Runs the steps of a real training script one at a time, in a separate process.

What is timed is the script's `main` itself: batches, random numbers, networks, losses, backward, optimizers, average,
log.
"""

import importlib
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import NamedTuple


class Work(NamedTuple):
    """Size and cost of a worker's first step."""

    flops: int
    parameters: int


class Worker:
    """A process that does one step whenever it is asked to, so that several can be timed in turn.

    Processes and not functions, because a process-wide setting of one side (precision, threads, memory allocation)
    must not reach the other.

    Args:
        serve: runs in the new process with a connection and `arguments`: sends a `Work` after its first step, then
            for every True that it receives the seconds of one more step; ends when it receives False.
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

    def close(self) -> None:
        """End the process."""
        self._connection.send(False)
        self._process.join()
        self._process.join()


def serve_script(connection: Connection, name: str, output_dir: str, *arguments: str) -> None:
    """Run a script, such as train_ddpm, with the given command line, step by step; for `Worker`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    sys.stdout = sys.stderr = open(os.devnull, "w")  # its report and its progress bar
    script = importlib.import_module(f"hfgen.training_scripts.{name}")

    class PacedRun(script.Run):
        def restore(self, stateful: dict, *others: object) -> None:
            super().restore(stateful, *others)
            networks = [part for name, part in stateful.items() if isinstance(part, torch.nn.Module) and name != "ema"]
            self.parameters = sum(weight.numel() for network in networks for weight in network.parameters())

        def steps(self) -> Iterator[int]:
            steps = super().steps()
            with FlopCounterMode(display=False) as counter:
                yield next(steps)
            connection.send(Work(counter.get_total_flops(), self.parameters))
            while connection.recv():
                started = time.perf_counter()
                yield next(steps)
                connection.send(time.perf_counter() - started)
            raise SystemExit  # and let nothing be written

    script.Run = PacedRun
    quiet = ("--report_to", "none", "--sample_every", "0", "--checkpoint_every", "0", "--cpu")
    script.main(["--output_dir", output_dir, *quiet, *arguments])


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
    with FlopCounterMode(display=False) as counter:
        step()
    connection.send(Work(counter.get_total_flops(), parameters))
    while connection.recv():
        started = time.perf_counter()
        step()
        connection.send(time.perf_counter() - started)


def describe(threads: int, *packages: str) -> str:
    """Return one line on the machine and the versions that the numbers depend on."""
    from hfgen.hardware import cpu_name

    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    return f"{cpu_name()}, {os.cpu_count()} cores, {threads} threads; Python {platform.python_version()}, {versions}"


def verdict(value: float, threshold: float) -> str:
    """Say whether a value reaches its threshold."""
    return "pass" if value >= threshold else "MISS"
