"""What is printed never ends a program, whatever the console can show and whether anybody reads it."""

import errno
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hfgen import cli
from hfgen.errors import UserError, message_for_user, run_reporting_user_errors


PRINTS = """
import sys
from hfgen.errors import run_reporting_user_errors

def main():
    for _ in range(3000):  # more than a pipe holds
        print("folder /data/日本/写真: 10 images ±")
        print("写真", file=sys.stderr, flush=True)
    print("\\udce9", flush=True)  # of a file name that is not text
    open(sys.argv[1], "w").close()  # it got this far

run_reporting_user_errors(main)
"""


def run(folder: Path, stdout=subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess:
    """Run the program above; fail unless it ended well."""
    result = subprocess.run(
        [sys.executable, "-c", PRINTS, str(folder / "done")],
        env=os.environ | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    assert result.returncode == 0 and (folder / "done").exists(), result.stderr[-2000:]
    assert b"Traceback" not in result.stderr and b"Exception ignored" not in result.stderr
    return result


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp932", "utf-8"])
def test_characters_that_the_console_lacks_are_escaped(tmp_path, encoding, unbuffered):
    printed = run(tmp_path, PYTHONIOENCODING=encoding, PYTHONUNBUFFERED=unbuffered).stdout.decode(encoding)
    name = "日本/写真" if encoding in ("cp932", "utf-8") else r"\u65e5\u672c/\u5199\u771f"
    lines = printed.splitlines()
    assert len(lines) == 3001 and lines[0].startswith(f"folder /data/{name}: 10 images") and lines[-1] == r"\udce9"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_does_not_end_a_program(tmp_path, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does once it has enough
    try:
        run(tmp_path, writing, PYTHONUNBUFFERED=unbuffered)
    finally:
        os.close(writing)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_the_output_does_not_end_a_program(tmp_path, unbuffered):
    with open("/dev/full", "wb") as full:
        run(tmp_path, full, PYTHONUNBUFFERED=unbuffered)


def test_a_folder_with_a_japanese_name_is_inspected_on_a_console_of_another_encoding(tmp_path, monkeypatch):
    folder = tmp_path / "日本"
    folder.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "写真.png")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "cp1252"))
    monkeypatch.setattr(sys, "argv", ["hfgen", "data", "inspect", str(folder), "--sample_size", "16"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    sys.stdout.flush()
    assert not end.value.code and rb"\u65e5\u672c: 1 image" + b"\n" in printed.getvalue()


def test_text_is_written_as_utf_8_on_a_system_of_another_encoding(tmp_path):
    program = r"""
import sys
from pathlib import Path
from hfgen.files import read_json_lines, write_text_atomically
write_text_atomically(Path(sys.argv[1]), '{"name": "\u65e5\u672c"}')
assert read_json_lines(Path(sys.argv[1])) == [{"name": "\u65e5\u672c"}]
"""
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    file = tmp_path / "text.json"
    subprocess.run([sys.executable, "-c", program, str(file)], env=os.environ | ascii_only, check=True, timeout=60)
    assert file.read_bytes().decode("utf-8") == '{"name": "日本"}'


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("--output: no"), "--output: no"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x.png"), "/data/x.png: Permission denied"),
        (RuntimeError(CUDA), f"out of memory ({CUDA}); lower --batch_size or the requested sizes"),
        (RuntimeError(CPU), f"out of memory ({CPU}); lower --batch_size or the requested sizes"),
        (MemoryError("no 9 TB"), "out of memory (no 9 TB); lower --batch_size or the requested sizes"),
        (
            RuntimeError("can't start new thread"),
            "the system allows no further thread; end other programs, or raise the limit (`ulimit -u`, or that of the "
            "container on processes)",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None),
        (ValueError("a bug"), None),
    ],
)
def test_what_the_user_can_change_is_said_in_one_line_and_a_bug_keeps_its_traceback(capsys, error, message):
    def fail():
        raise error

    assert message_for_user(error) == message
    with pytest.raises(type(error) if message is None else SystemExit) as end:
        run_reporting_user_errors(fail)
    assert capsys.readouterr().err == ("" if message is None else f"error: {message}\n")
    assert message is None or end.value.code == 2


def test_ctrl_c_ends_in_one_line(capsys):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_reporting_user_errors(interrupt)
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted by Ctrl-C\n")


def test_a_full_disk_under_a_thread_is_said_in_one_line(capsys):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device", "events.out")

    def main():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()

    run_reporting_user_errors(main)
    assert capsys.readouterr().err == "error: events.out: No space left on device\n"


def test_a_name_with_a_line_break_forges_no_line_of_an_error(capsys):
    def fail():
        raise UserError("--output a\nerror: forged\n\x1b[2Jb: exists\n  lr: 1 -> 2")

    with pytest.raises(SystemExit):
        run_reporting_user_errors(fail)
    assert capsys.readouterr().err == "error: --output a\n  error: forged\n  \\x1b[2Jb: exists\n  lr: 1 -> 2\n"
