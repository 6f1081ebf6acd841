"""The wheel: what a user installs, tried from outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory):
    """Build the wheel from a copy of the checkout and unpack it, as pip does for a package of pure Python."""
    folder = tmp_path_factory.mktemp("wheel")
    source, unpacked = folder / "source", folder / "site"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, files):
        if name.startswith(("hfgen/", "pipelines/", "model_cards/")) or name in (
            "pyproject.toml",
            "README.md",
            "LICENSE",
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_the_wheel_holds_the_library_and_nothing_else(installed_wheel):
    top = {path.name for path in installed_wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"hfgen"}
    files = {path.relative_to(ROOT / "pipelines").as_posix() for path in (ROOT / "pipelines").glob("*.py")}
    assert {path.name for path in (installed_wheel / "hfgen" / "pipelines").glob("*.py")} == files
    assert (installed_wheel / "hfgen" / "py.typed").is_file()
    cards = {path.name for path in (installed_wheel / "hfgen" / "model_cards").iterdir()}
    assert cards == {"__init__.py", "TEMPLATE.md"}  # and none of the cards of what was trained here
    assert list(installed_wheel.glob("*.dist-info/licenses/LICENSE"))


def test_every_module_of_the_wheel_imports_outside_the_checkout(installed_wheel, tmp_path):
    modules = [
        ".".join(path.relative_to(installed_wheel).with_suffix("").parts).removesuffix(".__init__")
        for path in (installed_wheel / "hfgen").rglob("*.py")
    ]
    assert len(modules) > 25
    code = "import hfgen, sys, importlib; print(hfgen.__file__); [importlib.import_module(m) for m in sys.argv[1:]]"
    environment = {**os.environ, "PYTHONPATH": str(installed_wheel)}
    result = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(installed_wheel))
