"""`hfgen export`: the files draw what `hfgen sample` draws, where neither hfgen nor PyTorch is at hand."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hfgen.hardware import choose_mixed_precision
from hfgen.inference.sampling import image_generators
from hfgen.models import ConvVAE, DCGANGenerator
from hfgen.pipelines import GANPipeline, VAEPipeline


pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
WEIGHTS = Path("generator", "diffusion_pytorch_model.safetensors")
# What someone writes who has the folder and no other part of hfgen: latents.npy -> images.npy, uint8.
DRAW = """
import json, sys
import numpy as np
import onnxruntime

folder, latents, images = sys.argv[1:]
description = json.load(open(f"{folder}/export.json"))
((file, part),) = description["files"].items()
session = onnxruntime.InferenceSession(f"{folder}/{file}", providers=["CPUExecutionProvider"])
(drawn,) = session.run([part["outputs"][0]["name"]], {part["inputs"][0]["name"]: np.load(latents)})
np.save(images, np.round((drawn + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1))
assert not {"torch", "diffusers", "hfgen"} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def gan(tmp_path_factory) -> Path:
    """An untrained generator of 16 pixels whose images differ."""
    torch.manual_seed(0)
    network = DCGANGenerator(16, 6, base_channels=4).eval()
    with torch.no_grad():
        for values in network.parameters():
            if values.ndim > 1:
                values.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("cli_export") / "pipeline"
    GANPipeline(network).save_pretrained(folder)
    return folder


def test_onnxruntime_alone_draws_the_images_of_hfgen_sample(hfgen, gan, tmp_path):
    status, out, err = hfgen("export", gan, "--format", "onnx", "--output", tmp_path / "onnx")
    assert status == 0, err
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["export.json", "generator.onnx"]
    first, last = out.strip().split("\n")
    size = (tmp_path / "onnx" / "generator.onnx").stat().st_size / 1e6
    assert (
        first.startswith(f"generator.onnx: {size:.3g} MB, differs from PyTorch by ") and "with plain PyTorch" in first
    )
    assert last.endswith(f"in {tmp_path / 'onnx'}")

    latents = torch.stack([torch.randn(6, generator=own) for own in image_generators(3, 0, 9)])
    np.save(tmp_path / "latents.npy", latents.numpy())
    arguments = [tmp_path / "onnx", tmp_path / "latents.npy", tmp_path / "images.npy"]
    subprocess.run([sys.executable, "-c", DRAW, *map(str, arguments)], check=True)
    images = np.load(tmp_path / "images.npy").astype(int)
    assert images.std() > 20

    settings = ("--seed", 3, "--num_images", 9, "--device", "cpu")
    assert hfgen("sample", gan, "--output", tmp_path / "sampled", *settings)[0] == 0
    sampled = [np.asarray(Image.open(tmp_path / "sampled" / f"{index:06d}.png")) for index in range(9)]
    in_bf16 = choose_mixed_precision("auto", cpu=True) == "bf16"  # on a CPU that has it, `hfgen sample` draws so
    assert np.abs(images - np.stack(sampled)).max() <= (6 if in_bf16 else 1)
    in_float32 = GANPipeline.from_pretrained(gan)(latents=latents).images
    assert np.abs(images - np.stack([np.asarray(image) for image in in_float32])).max() <= 1


def test_onnx_is_the_format_unless_told_otherwise_and_each_file_has_its_line(hfgen, tmp_path):
    torch.manual_seed(0)
    network = ConvVAE(16, latent_dim=4, block_out_channels=(4, 8), layers_per_block=1).eval()
    VAEPipeline(network).save_pretrained(tmp_path / "pipeline")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of the exporter's chatter is left
        warnings.filterwarnings("ignore", "__array__ implementation")  # of diffusers, with numpy 2
        status, out, err = hfgen("export", tmp_path / "pipeline", "--output", tmp_path / "onnx")
    assert status == 0, err
    assert [line.split(":")[0] for line in out.split("\n")[:2]] == ["decoder.onnx", "encoder.onnx"]
    assert [line for line in err.split("\n") if line and not line.startswith("\rLoading")] == []


def test_another_format_is_refused_with_what_there_is(refusal, gan, tmp_path):
    line = refusal("export", gan, "--format", "tflite", "--output", tmp_path / "out")
    assert line == "error: --format tflite: must be onnx"
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_refused_and_left_alone(refusal, gan, tmp_path):
    (tmp_path / "generator.onnx").write_bytes(b"mine")
    assert "is not empty" in refusal("export", gan, "--output", tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_a_folder_without_a_pipeline_is_refused(refusal, tmp_path):
    line = refusal("export", tmp_path, "--output", tmp_path / "out")
    assert line.startswith(f"error: {tmp_path}: contains no pipeline")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_whose_weights_are_not_finite_is_refused_and_leaves_nothing(refusal, gan, tmp_path):
    pipeline = tmp_path / "pipeline"
    GANPipeline.from_pretrained(gan).save_pretrained(pipeline)
    weights = load_file(pipeline / WEIGHTS)
    weights["conv_out.bias"][0] = torch.nan
    save_file(weights, pipeline / WEIGHTS)
    line = refusal("export", pipeline, "--output", tmp_path / "out")
    assert line == (
        "error: generator.onnx at batch size 1: the output of PyTorch contains non-finite values; nothing was written"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
