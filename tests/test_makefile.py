"""What `make quickstart` installs, with stand-ins for Python and nvidia-smi that write down how they are called."""

import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest


MAKEFILE = Path(__file__).parents[1] / "Makefile"
PYTHON = """\
#!/bin/sh
[ -z "$PYTHONDONTWRITEBYTECODE" ] || echo "will not keep what it compiles" >> calls
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") echo "$*" >> calls; case "$*" in *{fails}*) exit 1 ;; esac ;;
"-c "*) exec {python} "$@" ;;
*) echo "$*" >> calls ;;
esac
"""
CPU_BUILD = "-m pip install --no-compile --disable-pip-version-check --index-url {} torch torchvision"
HFGEN = "-m pip install --no-compile --disable-pip-version-check -e .[eval]"
TRAINING = "training_scripts/train_ddpm.py --preset quickstart --resume latest"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


class Index(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def index():
    server = HTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/cpu"
    server.shutdown()


def quickstart(folder, index, has_gpu=False, fails="nothing"):
    """What the stand-ins were called with, and what was said."""
    shutil.copy(MAKEFILE, folder)
    if not (folder / "pyproject.toml").exists():  # a newer one asks for a new installation
        (folder / "pyproject.toml").touch()
    for name, text in (
        ("python3", PYTHON.format(python=sys.executable, fails=fails)),
        ("nvidia-smi", f"#!/bin/sh\nexit {0 if has_gpu else 9}\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    command = ["make", "quickstart", f"PYTHON={folder}/python3", f"CPU_TORCH={index}"]
    environment = {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=120)
    calls = folder / "calls"
    return process.returncode, calls.read_text().splitlines() if calls.is_file() else [], process.stdout


def test_without_a_gpu_the_cpu_build_of_pytorch_is_installed_and_once_only(tmp_path, index):
    status, calls, said = quickstart(tmp_path, index)
    assert (status, calls) == (0, [CPU_BUILD.format(index), HFGEN, TRAINING])
    assert "No NVIDIA GPU found: installing PyTorch for CPUs into .venv" in said
    assert quickstart(tmp_path, index)[1] == [*calls, TRAINING]


def test_with_a_gpu_the_default_build_is_installed(tmp_path, index):
    status, calls, said = quickstart(tmp_path, index, has_gpu=True)
    assert (status, calls) == (0, [HFGEN, TRAINING])
    assert "Installing PyTorch with CUDA and hfgen into .venv" in said


@pytest.mark.parametrize("why", ["no server", "no such index"])
def test_where_the_cpu_builds_are_out_of_reach_the_default_build_is_installed(tmp_path, index, why):
    away = "http://127.0.0.1:9/cpu" if why == "no server" else f"{index}/old"
    status, calls, said = quickstart(tmp_path, away)
    assert (status, calls) == (0, [HFGEN, TRAINING])
    assert f"No NVIDIA GPU found, but {away} cannot be reached:" in said


def test_where_there_is_no_cpu_build_for_this_python_the_default_build_is_installed(tmp_path, index):
    status, calls, said = quickstart(tmp_path, index, fails="torchvision")
    assert (status, calls) == (0, [CPU_BUILD.format(index), HFGEN, TRAINING])
    assert "That failed: installing the default PyTorch." in said


def test_where_hfgen_cannot_be_installed_the_next_call_tries_again(tmp_path, index):
    for _ in range(2):
        status, calls, _ = quickstart(tmp_path, index, fails="eval")
        assert status and calls[-1] == HFGEN
    assert calls.count(HFGEN) == 2
