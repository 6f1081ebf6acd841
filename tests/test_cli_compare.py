"""`hfgen compare` on tiny pipelines of several families, with the real Inception weights where they are installed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hfgen.compare_command import parse_steps
from hfgen.errors import UserError
from hfgen.models import ConvVAE, DCGANGenerator, UNetBase
from hfgen.pipelines import DDPMPipeline, GANPipeline, VAEPipeline
from hfgen.schedules import noise_schedule, sampling_scheduler


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Untrained pipelines of 16 pixels, one of each family, and a GAN of 8."""
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    GANPipeline(DCGANGenerator(16, 4, base_channels=4).eval()).save_pretrained(root / "gan")
    GANPipeline(DCGANGenerator(8, 4, base_channels=4).eval()).save_pretrained(root / "small")
    VAEPipeline(ConvVAE(16, latent_dim=4, block_out_channels=(4, 8)).eval()).save_pretrained(root / "vae")
    unet = UNetBase(16, block_out_channels=(4, 8), time_embedding_dim=6).eval()
    DDPMPipeline(unet, sampling_scheduler(noise_schedule("linear", 20), "ddim")).save_pretrained(root / "ddpm")
    return root


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_families_stand_side_by_side_and_diffusion_has_a_row_for_each_number_of_steps(
    inception_weights, hfgen, folders, tmp_path
):
    arguments = ("--reference", "toy_paintings:14", "--num_images", "12", "--device", "cpu", "--steps", "2,4")
    families = [folders / name for name in ("gan", "vae", "ddpm")]
    status, out, _ = hfgen("compare", *families, *arguments, "--output", tmp_path / "compared")
    assert status == 0
    rows = json.loads((tmp_path / "compared" / "comparison.json").read_text())["rows"]
    assert [(row["pipeline"], row["steps"]) for row in rows] == [
        ("GANPipeline", None), ("VAEPipeline", None), ("DDPMPipeline", 2), ("DDPMPipeline", 4)
    ]  # fmt: skip
    assert rows[2]["scores"]["fid"] != rows[3]["scores"]["fid"]
    assert all(row["scores"]["num_fake"] == 12 and row["floor"] == rows[0]["floor"] for row in rows)
    parameters = [sum(w.numel() for w in network.parameters()) for network in (
        DCGANGenerator(16, 4, base_channels=4), ConvVAE(16, latent_dim=4, block_out_channels=(4, 8)),
        UNetBase(16, block_out_channels=(4, 8), time_embedding_dim=6),
    )]  # fmt: skip
    assert [row["num_parameters"] for row in rows] == [*parameters, parameters[-1]]
    table = (tmp_path / "compared" / "comparison.md").read_text()
    assert table in out and table.count("\n| ") == 2 + 4 + 1
    for row in rows:
        line = next(line for line in table.splitlines() if f"| {row['steps'] or 1} |" in line and row["name"] in line)
        assert f"| {row['scores']['fid']:.4g} ± " in line
    # One row of ten images of 16 pixels for each row of the table, beside its name.
    sheet = np.asarray(Image.open(tmp_path / "compared" / "sheet.png"))
    assert sheet.shape == (4 * 20, 150 + 10 * 18 - 2, 3)
    assert (
        hfgen("sample", folders / "gan", "--num_images", "1", "--output", tmp_path / "one", "--device", "cpu")[0] == 0
    )
    assert np.array_equal(sheet[:16, 150:166], np.asarray(Image.open(tmp_path / "one" / "000000.png")))
    assert (sheet[:16, :150] < 128).any()  # the name


def test_pipelines_of_several_sizes_are_refused_before_anything_is_scored(refusal, folders, tmp_path):
    both = (folders / "gan", folders / "small")
    line = refusal("compare", *both, "--reference", "toy_paintings:14", "--output", tmp_path / "out")
    assert f"{both[0]} 16, {both[1]} 8 pixels" in line and not (tmp_path / "out").exists()


def test_a_misspelt_pipeline_is_refused_before_anything_is_scored(refusal, folders, tmp_path):
    both = (folders / "gan", folders / "gone")
    line = refusal("compare", *both, "--reference", "toy_paintings:14", "--output", tmp_path / "out")
    assert f"{both[1]}: no such folder" in line and "features" not in line


@pytest.mark.parametrize("text", ["10,", "ten", "0,5", ""])
def test_steps_that_are_no_numbers_are_refused(text):
    with pytest.raises(UserError, match=f"--steps {text}"):
        parse_steps(text)
    assert parse_steps("10,25") == [10, 25]
