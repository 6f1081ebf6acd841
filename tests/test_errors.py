"""What is printed never ends a program, whatever the console can show and whether anybody reads it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hfgen import cli


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
    assert not end.value.code and rb"\u65e5\u672c: 1 images" in printed.getvalue()


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
