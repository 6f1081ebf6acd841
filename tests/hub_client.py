"""A client of the Hub on loopback in a process of its own, which runs one piece of code after the other.

It imports hfgen once:

    with Client(programs, hub, tmp_path / "home") as client:
        assert client.run("answer = HfApi().whoami()['name']").answer == "tester"
"""

import contextlib
import hashlib
import io
import json
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Said(NamedTuple):
    """What a piece of code came to: its variable `answer`, or its error; the exit status; what it printed."""

    answer: Any
    error: str | None
    status: int | None
    out: str
    err: str


class Client:
    """The process, while the `with` block lasts.

    Args:
        programs: what starts it, so that it need not import torch and diffusers.
        hub: the Hub on loopback.
        home: folder of its caches; `temporary` in it is its folder for temporary files.
        token: it is logged in with; None for none.
        with_hfgen: False for a process in which hfgen cannot be imported.
    """

    def __init__(self, programs, hub, home: Path, token: str | None = "hf_test", with_hfgen: bool = True):
        self.temporary = home / "temporary"
        self.temporary.mkdir(parents=True)
        environment = hub.environment(home, token) | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        environment |= {"HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHON_EXEC": str(programs.python)}
        kind = "with" if with_hfgen else "without"
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.settimeout(300)
            port = listening.getsockname()[1]
            self.process = programs.start(__file__, kind, port, environment=environment, folder=home)
            connection, _ = listening.accept()
        with connection:
            connection.settimeout(None)
            self._lines = connection.makefile("rw")
        self.ask("import hfgen.publishing.publish" if with_hfgen else "")
        self._of_imports = set(self.temporary.iterdir())  # torch 2.5 leaves a folder

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._lines.close()
        self.process.wait()

    def run(self, code: str, **given: Any) -> Said:
        """Run code with names that are given, as JSON has them; names that it sets stay for the next piece."""
        self._lines.write(json.dumps([code, given], default=str) + "\n")
        self._lines.flush()
        answer = self._lines.readline()
        assert answer, self.process.errors.read_text()
        return Said(*json.loads(answer))

    def ask(self, code: str, **given: Any) -> Any:
        """Run code that is expected to end well; return its `answer`."""
        said = self.run(code, **given)
        assert said.error is None and said.status is None, (said.error, said.status, said.err)
        return said.answer

    def leftovers(self) -> set[Path]:
        """Return the temporary folders that are still there."""
        return {path for path in self.temporary.iterdir() if path.is_dir()} - self._of_imports

    def command(self, *arguments: Any, token: str | None = "hf_test") -> Said:
        """Run `hfgen` with arguments."""
        return self.run(COMMAND, arguments=list(map(str, arguments)), token=token)

    def draw(self, where: str | Path, **arguments: Any) -> str:
        """Load a pipeline by diffusers alone; return the digest of what it draws."""
        code = "answer = digest_of(DiffusionPipeline.from_pretrained(where, **arguments))"
        return self.ask(code, where=where, arguments=arguments)


COMMAND = """
import os, sys
from hfgen.cli import main
os.environ.pop("HF_TOKEN", None)
if token:
    os.environ["HF_TOKEN"] = token
sys.argv = ["hfgen", *arguments]
try:
    main()
finally:
    os.environ["HF_TOKEN"] = "hf_test"
"""


def digest_of(pipeline) -> str:
    """Draw on one thread; return the SHA-256 of the floats."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = {"num_inference_steps": 3} if hasattr(pipeline, "unet") else {}
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=3, generator=torch.Generator().manual_seed(5), output_type="np", **steps).images
    torch.set_num_threads(threads)
    assert images.std() > 0
    return hashlib.sha256(images.tobytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, by path, but for what a run adds to its pipeline."""
    added = ("digests.json", "progress.json")
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in added)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def serve(port: int) -> None:
    """Answer the process that listens at a port, a line each, until it hangs up."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import HfApi

    names = {"DiffusionPipeline": DiffusionPipeline, "HfApi": HfApi, "digest_of": digest_of}
    with socket.create_connection(("127.0.0.1", port)) as connection:
        lines = connection.makefile("rw")
    for line in lines:
        code, given = json.loads(line)
        names.pop("answer", None)
        error = status = None
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                names.update(given)
                exec(code, names)
            except SystemExit as end:
                status = end.code or 0
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
        said = [names.get("answer"), error, status, out.getvalue(), err.getvalue()]
        lines.write(json.dumps(said, default=str) + "\n")
        lines.flush()


if __name__ == "__main__":
    if sys.argv[1] == "without":
        sys.modules["hfgen"] = None  # type: ignore[assignment]  # any import of it fails, as where it is missing
    serve(int(sys.argv[2]))
