"""The wheel: what a user installs, tried from outside the checkout."""

import json
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
        if name.startswith(
            ("hfgen/", "pipelines/", "training_scripts/", "model_cards/", "pyproject.toml", "README.md", "LICENSE")
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


@pytest.fixture
def run_python(installed_wheel, programs, tmp_path):
    """Run Python with the unpacked wheel, outside the checkout; return what it prints."""

    def run(*arguments) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed_wheel), "PYTHON_EXEC": str(programs.python)}
        result = subprocess.run(
            [programs.python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_the_wheel_holds_the_library_and_nothing_else(installed_wheel):
    top = {path.name for path in installed_wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"hfgen"}
    files = {path.relative_to(ROOT / "pipelines").as_posix() for path in (ROOT / "pipelines").glob("*.py")}
    assert {path.name for path in (installed_wheel / "hfgen" / "pipelines").glob("*.py")} == files
    assert (installed_wheel / "hfgen" / "py.typed").is_file()
    cards = {path.name for path in (installed_wheel / "hfgen" / "model_cards").iterdir()}
    assert cards == {"__init__.py", "TEMPLATE.md"}  # and none of the cards of what was trained here
    assert list(installed_wheel.glob("*.dist-info/licenses/LICENSE"))


def test_every_module_of_the_wheel_imports_outside_the_checkout(installed_wheel, run_python):
    modules = [
        ".".join(path.relative_to(installed_wheel).with_suffix("").parts).removesuffix(".__init__")
        for path in (installed_wheel / "hfgen").rglob("*.py")
    ]
    assert len(modules) > 25
    code = "import hfgen, sys, importlib; print(hfgen.__file__); [importlib.import_module(m) for m in sys.argv[1:]]"
    assert run_python("-c", code, *modules).startswith(str(installed_wheel))


def test_the_wheel_holds_the_training_scripts_with_their_presets_and_studies(installed_wheel):
    def content(folder):
        files = (file for file in folder.rglob("*") if file.suffix in (".py", ".json", ".yaml"))
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}

    held = content(installed_wheel / "hfgen" / "training_scripts")
    assert held == content(ROOT / "training_scripts")
    assert {"train_ddpm.py", "presets/ddpm/quickstart.json", "studies/gan_loss.yaml"} <= held.keys()


def test_a_training_script_of_the_wheel_trains_as_a_module_with_its_presets(run_python, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hfgen.training_scripts.train_gan"]
    toy_size = ["--sample_size", "16", "--batch_size", "4", "--max_train_steps", "2", "--num_sample_images", "2"]
    toy_size += ["--generator_channels", "4", "--discriminator_channels", "4", "--statistics_images", "0", "--cpu"]
    run_python(*launcher, "--preset", "lsgan", "--dataset", "toy_paintings:16", "--output_dir", "run", *toy_size)
    settings = json.loads((tmp_path / "run" / "training_config.json").read_text())
    assert (settings["loss"], settings["upsampling"]) == ("least_squares", "nearest")  # of the preset
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    assert (tmp_path / "run" / "index.html").is_file()  # its templates are in the wheel


def test_a_study_of_the_wheel_is_found_expanded_and_launched_outside_the_checkout(installed_wheel, run_python):
    code = (
        "from pathlib import Path\n"
        "from hfgen.studies.cells import expand\n"
        "from hfgen.studies.launch import Workspace, launch_command\n"
        "from hfgen.studies.scripts import find_scripts\n"
        "from hfgen.studies.study_file import find_study_file, read_study_file\n"
        "file = find_study_file('gan_loss')\n"
        "study = expand(read_study_file(file), find_scripts(), 'photos')\n"
        "place, cell = Workspace(Path('study'), find_scripts(), 'photos'), next(iter(study.cells.values()))\n"
        "print(file, len(study.cells), *launch_command(cell, study.budget, place), sep='\\n')"
    )
    file, count, *command = run_python("-c", code).splitlines()
    assert Path(file) == installed_wheel / "hfgen" / "training_scripts" / "studies" / "gan_loss.yaml"
    assert int(count) == 12
    assert command[command.index("--preset") - 2 : command.index("--preset")] == [
        "-m",
        "hfgen.training_scripts.train_gan",
    ]
