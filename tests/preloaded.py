"""Processes that need not import torch: one process imports the large libraries, and forks for each program.

    with Preloaded() as programs:
        result = programs.run("train.py", "--cpu")
        assert result.returncode == 0, result.stderr
        program = programs.start("train.py", "--cpu")
        program.send_signal(signal.SIGKILL)

A program runs as by `python train.py --cpu`, and imports hfgen itself; what the libraries read of the environment when
they are imported, such as the address of the Hub, they read again. Where a test is about a launcher, or about what is
imported, use subprocess.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


LIBRARIES = (
    *("accelerate", "datasets", "diffusers.optimization", "diffusers.pipelines.ddpm.pipeline_ddpm"),
    *("diffusers.schedulers.scheduling_unipc_multistep", "huggingface_hub.hf_api", "matplotlib.pyplot"),
    *("sklearn.mixture", "torch._dynamo", "torch.distributed.nn", "transformers.hf_argparser"),
)
# Their constants come from the environment, the later ones also from the earlier; other modules hold copies.
READ_FROM_THE_ENVIRONMENT = ("huggingface_hub.constants", "diffusers.utils.constants", "datasets.config")
HOLD_COPIES = ("huggingface_hub.", "diffusers.", "datasets.", "transformers.")


STAND_IN = """\
#!{} -S
import sys
sys.path.insert(0, {!r})
from preloaded import stand_in_for_python
stand_in_for_python({!r})
"""


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
            time.sleep(0.01)
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

    Attributes:
        hfgen: file of the command, whether or not it is installed.
        python: stands in for Python where a program starts others, which are then started here: set its environment's
            PYTHON_EXEC, which the launcher of torch heeds, and sys.executable of the programs of this class.
    """

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        self.hfgen = Path(self._folder.name) / "hfgen"
        self.hfgen.write_text("from hfgen.cli import main\n\nmain()\n")
        self.python = Path(self._folder.name) / "python"
        self._address = f"{self._folder.name}/server"
        self.python.write_text(STAND_IN.format(sys.executable, os.path.dirname(__file__), self._address))
        self.python.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self._address)
            listening.listen(64)
            listening.set_inheritable(True)
            descriptor = listening.fileno()
            command = [sys.executable, __file__, str(descriptor)]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(descriptor,))

    def __enter__(self) -> "Preloaded":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._server:
            self._server.stdin.close()
        self._folder.cleanup()

    def ask(self, **request):
        return ask(self._address, request)

    def start(self, program, *arguments, environment: dict[str, str] | None = None, folder=None) -> Program:
        """Start a file of Python, by default in this directory, and in this process's environment.

        Modules of remote code are then in a folder of these programs.
        """
        self._count += 1
        output, errors = (Path(self._folder.name) / f"{self._count}.{name}" for name in ("output", "errors"))
        command = [str(Path(program).resolve()), *map(str, arguments)]
        environment = environment or {**os.environ, "HF_MODULES_CACHE": f"{self._folder.name}/modules"}
        given = {"command": command, "environment": environment, "folder": folder or Path.cwd()}
        output.touch()
        errors.touch()
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
        modules = {"HF_MODULES_CACHE": f"{self._folder.name}/modules"}
        environment = (environment or {**os.environ, **modules}) | {"OMP_NUM_THREADS": "1"}
        environment |= {name: str(value) for name, value in group.items()}
        ranks = [
            self.start(program, *arguments, environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]
        return [rank.ended() for rank in ranks]


def ask(address: str, request: dict, descriptors: Sequence[int] = ()):
    """Ask the process that has imported the libraries; return its answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b" "], descriptors)
        connection.sendall(json.dumps(request, default=str).encode() + b"\n")
        return json.loads(connection.makefile().readline())


def stand_in_for_python(address: str) -> None:
    """Let the other process run what Python is to run here, with these files; pass signals on, and end as it does."""
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    environment = {**os.environ, "PYTHON_EXEC": sys.argv[0]}
    pid = ask(address, {"command": sys.argv[1:], "environment": environment, "folder": os.getcwd()}, (0, 1, 2))

    def pass_on(number, _):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in signals:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    while (status := ask(address, {"poll": pid})) is None:
        time.sleep(0.02)
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def serve(listening: socket.socket) -> dict:
    """Fork for each request, until stdin ends; return only in a child, with what it is to run."""
    children = set()
    while select.select([sys.stdin, listening], [], [])[0] == [listening]:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(ConnectionError):
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
            request = json.loads(connection.makefile().readline())
            if "poll" in request:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                children.discard(pid)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            elif answer := os.fork():
                children.add(answer)
                for descriptor in descriptors:
                    os.close(descriptor)
            else:
                listening.close()
                return request | {"descriptors": descriptors}
            connection.sendall(json.dumps(answer).encode() + b"\n")
    for child in children:  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
    sys.exit()


def heed_the_environment() -> None:
    """Let the libraries read again what they have read of the environment."""
    for name in READ_FROM_THE_ENVIRONMENT:
        module = sys.modules[name]
        before = dict(vars(module))
        after = vars(importlib.reload(module))
        changed = {key: after[key] for key in before if key.isupper() and before[key] != after[key]}
        for held in [vars(sys.modules[name]) for name in sys.modules if name.startswith(HOLD_COPIES)]:
            for key in changed.keys() & held.keys():
                held[key] = changed[key] if held[key] == before[key] else held[key]
    hub = sys.modules["huggingface_hub.hf_api"]
    hub.api.endpoint = hub.constants.ENDPOINT


def become(program: dict) -> None:
    """Run the program in this process, which was forked for it."""
    created = os.O_WRONLY | os.O_CREAT
    descriptors = program["descriptors"] or [
        os.open(os.devnull, os.O_RDONLY),
        os.open(program["output"], created),
        os.open(program["errors"], created),
    ]
    for descriptor, opened in enumerate(descriptors):
        os.dup2(opened, descriptor)
        os.close(opened)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):  # the old ones may hold that they are files
        old = getattr(sys, name)
        new = open(descriptor, "w", buffering=1, encoding=old.encoding, errors=old.errors, closefd=False)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["folder"])
    tempfile.tempdir = None  # so that TMPDIR is heeded
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    heed_the_environment()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        importlib.import_module("torch").set_num_threads(int(threads))
    sys.executable = os.environ.get("PYTHON_EXEC", sys.executable)
    sys.argv = program["command"]
    if sys.argv[0] == "-u":
        del sys.argv[0]
    kind = sys.argv[0] if sys.argv[0] in ("-c", "-m") else "file"
    if kind != "file":
        del sys.argv[0]
    what = sys.argv[0]
    first = os.path.dirname(os.path.abspath(what)) if kind == "file" else program["folder"]
    sys.path[:1] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if kind == "-c":
        sys.argv[0] = kind
        exec(what, {"__name__": "__main__"})
    elif kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # or the collector of each child would go through all of the libraries, and copy their pages
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
