"""Datasets of the Hub as a user meets them: inspected, decoded, streamed, private, and over a bad connection.

Each client is a process of its own, whose caches are all below one folder, which is empty when a test begins: hfgen's
is `hfgen` in it.
"""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from loopback_hub import LoopbackHub
from PIL import Image


COUNT = 8
CACHED = {"digest.txt", "digests.json", "pixels.bin", "report.json", "shapes.npy"}
CLIENT = """
import json, sys, time
import torch
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.data.streaming import StreamBatches
from hfgen.errors import run_reporting_user_errors

time.sleep = lambda seconds: None  # in which huggingface_hub waits before it tries again

def main(how, name, config=None, split="train"):
    chosen = {"dataset_config": config, "dataset_split": split}
    chosen |= {"streaming": True, "shuffle_buffer_size": 8} if how == "streamed" else {}
    settings = DataSettings(name, sample_size=16, **chosen)
    if how == "streamed":
        images = (next(StreamBatches(settings, 8, 0, torch.device("cpu"))) + 1) * 127.5
    else:
        images = torch.from_numpy(load_images(settings).as_array().copy()).permute(0, 3, 1, 2)
    print("GREEN", json.dumps(sorted(images[:, 1].float().mean(dim=(1, 2)).round().int().tolist())))

run_reporting_user_errors(lambda: main(*sys.argv[1:]))
"""
HFGEN = "from hfgen.cli import main; main()"
DOWNLOADS = "/resolve/.*(3.png|parquet)$"  # of the fourth image, or of all


def encoded(index: int) -> bytes:
    """A PNG whose green tells its index, with noise in red so that it does not get too small to be cut."""
    pixels = np.zeros((24, 24, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.random.default_rng(index).integers(0, 256, (24, 24))
    pixels[:, :, 1] = 10 * index
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def parquet_file() -> bytes:
    table = pa.table({"image": [{"bytes": encoded(index), "path": None} for index in range(COUNT)]})
    info = {"info": {"features": {"image": {"_type": "Image"}}}}
    buffer = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), buffer)
    return buffer.getvalue()


def pairs_file() -> bytes:
    """Two images in each row, and an image as base64 text, which is not looked at."""
    rows = [[encoded(index), encoded(index + 1)] for index in range(0, COUNT, 2)]
    buffer = io.BytesIO()
    parquet.write_table(pa.table({"images": rows, "caption": ["a cat"] * len(rows)}), buffer)
    return buffer.getvalue()


CONFIGURATIONS = b"""---
configs:
- {config_name: cats, data_files: cats/*.parquet}
- {config_name: pairs, data_files: pairs/*.parquet}
---
"""


@pytest.fixture(scope="module")
def filled_hub():
    with LoopbackHub() as hub:
        hub.put("tester/files", {f"train/{index}.png": encoded(index) for index in range(COUNT)}, type="dataset")
        hub.put("tester/parquet", {"data/train-00000-of-00001.parquet": parquet_file()}, type="dataset")
        files = {
            "cats/train.parquet": parquet_file(),
            "pairs/train.parquet": pairs_file(),
            "README.md": CONFIGURATIONS,
        }
        hub.put("tester/configs", files, type="dataset")
        hub.put("tester/secret", {"data/train-00000-of-00001.parquet": parquet_file()}, type="dataset", private=True)
        yield hub


@pytest.fixture
def hub(filled_hub):
    yield filled_hub
    filled_hub.mend()


@pytest.fixture
def home(tmp_path):
    """The folder of a user's caches."""
    return tmp_path / "home"


@pytest.fixture
def client(hub, programs, home, tmp_path):
    """Run code as a user of the Hub; return its status and what it printed."""

    def run(code: str, *arguments: str, token: str | None = "hf_test") -> tuple[int, str, str]:
        program = tmp_path / "client.py"
        program.write_text(code)
        result = programs.run(program, *arguments, environment=hub.environment(home, token))
        return result.returncode, result.stdout, result.stderr

    return run


def greens(printed: str) -> list[int]:
    return json.loads(printed.rpartition("GREEN ")[2])


def refusal(stderr: str) -> str:
    """The last line of errors, and what follows it; no traceback."""
    assert "Traceback" not in stderr
    return stderr[stderr.index("error: ") :]


def cached(home) -> set[str]:
    """What is in hfgen's cache; locks apart, which are empty."""
    return {path.name for path in (home / "hfgen").rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("name", ["tester/files", "tester/parquet", "tester/secret"])
def test_a_data_set_of_the_hub_gives_the_same_images_decoded_or_streamed(client, name, home):
    for how in ("streamed", "decoded"):
        status, out, err = client(CLIENT, how, name)
        assert status == 0, err
        assert greens(out) == [10 * index for index in range(COUNT)]
        assert cached(home) == (CACHED if how == "decoded" else set())


@pytest.mark.parametrize("how", ["streamed", "decoded"])
def test_one_of_several_configurations_can_be_chosen(client, how):
    for config in ("cats", "pairs"):
        status, out, err = client(CLIENT, how, "tester/configs", config)
        assert status == 0, err
        assert greens(out) == [10 * index for index in range(COUNT)]


@pytest.mark.parametrize("how", ["streamed", "decoded"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "has several configurations; choose one with --dataset_config: ['cats', 'pairs']"),
        (["dogs"], "has no configuration dogs; choose one with --dataset_config: ['cats', 'pairs']"),
        (["cats", "test"], "has no split test; choose one with --dataset_split: ['train']"),
    ],
)
def test_without_the_right_configuration_or_split_the_choices_are_listed(client, how, arguments, told):
    status, out, err = client(CLIENT, how, "tester/configs", *arguments)
    assert (status, out) == (2, "")
    assert refusal(err) == f"error: --dataset tester/configs {told}\n"


@pytest.mark.parametrize("name", ["tester/files", "tester/parquet"])
def test_a_data_set_of_the_hub_can_be_inspected(client, name, home, tmp_path):
    inspect = ("data", "inspect", name, "--sample_size", "16", "--json", str(tmp_path / "report.json"))
    status, out, err = client(HFGEN, *inspect)
    assert status == 0, err
    assert f"Hub dataset {name}" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["formats"], report["sizes"]) == (8, {"PNG": 8}, {"24 x 24": 8})
    assert cached(home) == CACHED


@pytest.mark.parametrize("how", ["streamed", "decoded"])
@pytest.mark.parametrize("token", [None, "hf_stranger", "hf_expired"])
def test_a_private_data_set_without_the_right_token_is_refused_with_the_remedy(client, how, token, home):
    status, out, err = client(CLIENT, how, "tester/secret", token=token)
    assert (status, out) == (2, "")
    assert all(part in refusal(err) for part in ("--dataset tester/secret", "hf auth login", "HF_TOKEN"))
    assert cached(home) == set()


@pytest.mark.parametrize("how", ["streamed", "decoded"])
@pytest.mark.parametrize("name", ["tester/files", "tester/parquet"])
def test_a_connection_that_is_cut_once_loses_nothing(hub, client, how, name, home):
    hub.cut("GET", DOWNLOADS)
    status, out, err = client(CLIENT, how, name)
    assert status == 0, err
    assert greens(out) == [10 * index for index in range(COUNT)]
    assert hub.troubles[0].times == 0  # it was cut


@pytest.mark.parametrize("how", ["streamed", "decoded"])
def test_a_download_that_breaks_off_leaves_no_half_data_set_and_goes_on_later(hub, client, how, home):
    hub.cut("GET", DOWNLOADS, times=None)
    status, out, err = client(CLIENT, how, "tester/files")
    assert (status, out) == (2, "")
    assert "--dataset tester/files" in refusal(err)
    assert ("--resume latest" if how == "streamed" else "run the same command again to continue") in refusal(err)
    assert cached(home) == set()
    hub.mend()
    status, out, err = client(CLIENT, how, "tester/files")
    assert status == 0, err
    assert greens(out) == [10 * index for index in range(COUNT)]


@pytest.mark.parametrize("how", ["streamed", "decoded"])
def test_a_hub_that_fails_while_images_are_read_is_named(hub, client, how, home):
    hub.fail("GET", DOWNLOADS, status=400, times=None)
    status, out, err = client(CLIENT, how, "tester/parquet")
    assert (status, out) == (2, "")
    assert "--dataset tester/parquet" in refusal(err) and "a failure that a test asked for" in refusal(err)
    assert cached(home) == set()
