"""Processes that need not import torch: one process imports the large libraries, and forks for each program.

    with Preloaded() as programs:
        result = programs.run("train.py", "--cpu")
        assert result.returncode == 0, result.stderr
        program = programs.start("train.py", "--cpu")
        program.send_signal(signal.SIGKILL)

A program runs as by `python train.py --cpu`, and imports hfgen itself. Where a test is about a launcher, or about what
is imported, use subprocess.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


LIBRARIES = (
    *("accelerate", "datasets", "diffusers.optimization", "diffusers.pipelines.ddpm.pipeline_ddpm"),
    *("diffusers.schedulers.scheduling_unipc_multistep", "matplotlib.pyplot", "sklearn.mixture"),
    *("torch._dynamo", "torch.distributed.nn", "transformers.hf_argparser"),
)


class Program:
    """A program that was started; `output` and `errors` are files of what it has printed."""

    def __init__(self, server: "Preloaded", pid: int, command: list[str], output: Path, errors: Path):
        self.pid, self.command, self.output, self.errors = pid, command, output, errors
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"{self.command} did not end in {timeout} s: {self.errors.read_text()}"
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # only then its number is surely its own
            os.kill(self.pid, number)

    def ended(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for it; return its exit status and what it printed."""
        status = self.wait(timeout)
        return subprocess.CompletedProcess(self.command, status, self.output.read_text(), self.errors.read_text())


class Preloaded:
    """The process that has imported the libraries, while the `with` block lasts.

    Args:
        environment: of the imports, which for example fix the address of the Hub; this process's unless given.
    """

    def __init__(self, environment: dict[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Preloaded":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._server:
            self._server.stdin.close()
        self._folder.cleanup()

    def ask(self, **request):
        self._server.stdin.write(json.dumps(request, default=str) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, program, *arguments, environment: dict[str, str] | None = None, folder=None) -> Program:
        """Start a file of Python, by default in this process's environment and directory."""
        self._count += 1
        output, errors = (Path(self._folder.name) / f"{self._count}.{name}" for name in ("output", "errors"))
        command = [str(Path(program).resolve()), *map(str, arguments)]
        given = {"command": command, "environment": environment or dict(os.environ), "folder": folder or Path.cwd()}
        pid = self.ask(**given, output=output, errors=errors)
        return Program(self, pid, command, output, errors)

    def run(self, program, *arguments, environment: dict[str, str] | None = None, folder=None):
        """Run a file of Python to its end; return what `subprocess.run` does."""
        return self.start(program, *arguments, environment=environment, folder=folder).ended()

    def run_ranks(self, count: int, program, *arguments, environment: dict[str, str] | None = None):
        """Run so many processes of a distributed training, as torchrun does; return how each of them ended."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = (environment or dict(os.environ)) | {"OMP_NUM_THREADS": "1"}
        environment |= {name: str(value) for name, value in group.items()}
        ranks = [
            self.start(program, *arguments, environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        return [rank.ended() for rank in ranks]


def serve() -> dict:
    """Fork for each request, until stdin ends; return only in a child, with what it is to run."""
    children = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            children.discard(pid)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif answer := os.fork():
            children.add(answer)
        else:
            return request
        print(json.dumps(answer), flush=True)
    for child in children:  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
    sys.exit()


def become(program: dict) -> None:
    """Run the program in this process, which was forked for it."""
    files = (os.devnull, os.O_RDONLY), (program["output"], os.O_WRONLY | os.O_CREAT), (program["errors"], None)
    for descriptor, (name, flags) in enumerate(files):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT if flags is None else flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["folder"])
    tempfile.tempdir = None  # so that TMPDIR is heeded
    if threads := os.environ.get("OMP_NUM_THREADS"):
        importlib.import_module("torch").set_num_threads(int(threads))
    sys.argv = program["command"]
    sys.path[:1] = [os.path.dirname(sys.argv[0]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # or the collector of each child would go through all of the libraries, and copy their pages
    become(serve())
