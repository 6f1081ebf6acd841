"""Training on a dataset that is streamed from the Hub on loopback, by the real script and launcher."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import load_file

from hfgen.data.toy_paintings import paint


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training_scripts" / "train_ddpm.py"
STREAMED = [
    *("--dataset", "tester/paintings", "--dataset_column", "imageA", "--streaming", "--shuffle_buffer_size", "6"),
    *("--sample_size", "16", "--block_out_channels", "8", "16", "--batch_size", "4", "--max_train_steps", "9"),
    *("--checkpoint_every", "2", "--checkpoints_total_limit", "9", "--log_every", "1", "--lr_warmup_steps", "2"),
    *("--num_inference_steps", "2", "--num_sample_images", "2", "--report_to", "none", "--cpu"),
]


def shards(*columns: str) -> dict[str, bytes]:
    """Four parquet files of five images, which are in each of these columns."""
    files = {}
    for shard in range(4):
        rows = [encoded(index) for index in range(shard * 5, shard * 5 + 5)]
        table = pa.table({name: [{"bytes": row, "path": None} for row in rows] for name in columns})
        info = {"info": {"features": {name: {"_type": "Image"} for name in columns}}}
        buffer = io.BytesIO()
        parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), buffer)
        files[f"data/train-{shard:05d}-of-00004.parquet"] = buffer.getvalue()
    return files


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(hub, programs, tmp_path_factory):
    """Run the script, as so many processes, beside a Hub with a dataset of two columns."""
    hub.put("tester/paintings", shards("imageA", "imageB"), type="dataset")
    environment = {**hub.environment(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}

    def run_script(*arguments, ranks=1):
        if ranks == 1:
            return [programs.run(SCRIPT, *arguments, environment=environment)]
        return programs.run_ranks(ranks, SCRIPT, *arguments, environment=environment)

    return run_script


def encoded(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(paint(index, 24)).save(buffer, "png")
    return buffer.getvalue()


def train(run, folder, *arguments, ranks=1):
    for result in run(*STREAMED, "--output_dir", folder, *arguments, ranks=ranks):
        assert result.returncode == 0, result.stderr[-3000:]
    return load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def assert_equal_weights(one, other):
    assert one.keys() == other.keys() and len(one) > 10
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_streamed_run_resumes_bit_equal(run, tmp_path):
    folder = tmp_path / "run"
    uninterrupted = train(run, folder)
    # 24 of the second epoch's images are used by then: in the middle of a block.
    resumed = train(run, folder, "--resume", str(folder / "checkpoints" / "step-00000006"))
    assert_equal_weights(uninterrupted, resumed)


def test_two_processes_stream_their_own_shards_and_resume_bit_equal(run, tmp_path):
    folder = tmp_path / "run"
    uninterrupted = train(run, folder, ranks=2)
    resumed = train(run, folder, "--resume", str(folder / "checkpoints" / "step-00000004"), ranks=2)
    assert_equal_weights(uninterrupted, resumed)
    launches = [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]
    assert [launch["num_processes"] for launch in launches] == [2, 2]
    state = torch.load(folder / "checkpoints" / "step-00000009" / "state.pt", weights_only=True)
    assert len(state["batches"]) == 2


@pytest.mark.parametrize("columns", [("picture",), ("imageA", "thumbnail")])
def test_a_streamed_run_goes_on_with_its_commit_whatever_has_become_of_the_dataset(run, hub, tmp_path, columns):
    name = f"tester/{'-'.join(columns)}"
    hub.put(name, shards("imageA"), type="dataset")
    changing = [*STREAMED, "--dataset", name, "--output_dir", tmp_path / "run"]
    place = changing.index("--dataset_column")
    del changing[place : place + 2]  # there is only one
    (ended,) = run(*changing)
    assert ended.returncode == 0, ended.stderr[-3000:]
    weights = tmp_path / "run" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    uninterrupted = load_file(weights)
    hub.put(name, shards(*columns), type="dataset")
    (ended,) = run(*changing, "--resume", tmp_path / "run" / "checkpoints" / "step-00000004")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_equal_weights(uninterrupted, load_file(weights))


def test_the_column_has_to_be_chosen(run, tmp_path):
    streamed = ["--dataset", "tester/paintings", "--streaming", "--cpu"]
    (result,) = run(*streamed, "--output_dir", tmp_path / "run")
    assert result.returncode == 2
    assert "choose one with --dataset_column" in result.stderr.splitlines()[-1]
