"""`hfgen sample`, `interpolate`, `progress` and `curves` on GANs and their runs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_sheets import tiles
from PIL import Image

from hfgen.inference.curves import plot_curves
from hfgen.inference.figures import image_sheet
from hfgen.inference.interpolation import interpolate_latents
from hfgen.models import DCGANGenerator
from hfgen.pipelines import GANPipeline


# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
GAP = 2  # white pixels between two images of a sheet


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """An untrained GAN of 8 x 8 pixels whose images differ."""
    torch.manual_seed(0)
    network = DCGANGenerator(8, latent_dim=5, base_channels=4).train()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(4)
        network(torch.randn(64, 5))
    folder = tmp_path_factory.mktemp("cli_gan") / "pipeline"
    GANPipeline(network.eval()).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- sample


def test_sample_draws_by_seed_and_index_whatever_the_batch_size(hfgen, pipeline, tmp_path):
    for name, batch_size in (("one", 2), ("two", 5)):
        arguments = ("--num_images", 5, "--batch_size", batch_size, "--device", "cpu", "--seed", 4)
        status, _, err = hfgen("sample", pipeline, "--output", tmp_path / name, *arguments)
        assert status == 0, err
    assert len(list((tmp_path / "one").glob("0*.png"))) == 5
    one, two = (tiles(tmp_path / f"{name}_sheet.png", 2, 3, captions=True) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 3  # bf16, where the hardware has it, rounds by the shape of the batch
    assert np.abs(one[0, 0] - one[0, 1]).max() > 30


def test_truncation_tames_the_images(hfgen, pipeline, tmp_path):
    for limit in ("0.01", "3"):
        arguments = ("--num_images", 16, "--device", "cpu", "--truncation", limit)
        assert hfgen("sample", pipeline, "--output", tmp_path / limit, *arguments)[0] == 0
    sheets = (tiles(tmp_path / f"{limit}_sheet.png", 4, 4, captions=True) for limit in ("0.01", "3"))
    tame, wild = (sheet.reshape(16, -1).std(axis=0).mean() for sheet in sheets)
    assert tame < wild / 10


@pytest.mark.parametrize(
    ("option", "value"), [("--sampler", "ddim"), ("--num_inference_steps", 5), ("--sample_from", "prior")]
)
def test_an_option_of_another_family_is_refused(refusal, pipeline, tmp_path, option, value):
    line = refusal("sample", pipeline, "--output", tmp_path / "new", option, value)
    assert f"{option} applies only to" in line and "GANPipeline" in line
    compared = ("compare", pipeline, "--reference", "toy_paintings:14", "--output", tmp_path / "new")
    if option != "--sampler":
        assert "only to" in refusal(*compared, option, value)
    assert "only to diffusion" in refusal(*compared, "--steps", "2,3")
    assert "use only one of them" in refusal(*compared, "--steps", "2,3", "--num_inference_steps", 5)


def test_a_gan_has_nothing_to_denoise(refusal, pipeline, tmp_path):
    assert "is not a diffusion pipeline" in refusal("denoise", pipeline, "--output", tmp_path / "strips")


# -------------------------------------------------------------------------------------------------------- interpolate


def test_the_straight_way_is_that_of_study_a():
    start, end = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 0.0, -1.0])
    parts = torch.arange(1, 9) / 9
    way = interpolate_latents(start, end, parts, spherical=False)
    for index, part in enumerate(parts):
        torch.testing.assert_close(way[index], (1 - part) * start + part * end)


def test_spherical_interpolation_turns_and_rescales_evenly():
    start, end = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])  # a right angle
    way = interpolate_latents(start, end, torch.tensor([0.0, 1 / 3, 0.5, 1.0]), spherical=True)
    expected = torch.tensor(
        [[2.0, 0.0, 0.0], [3.0 * 3**0.5 / 2, 0.0, 3.0 / 2], [3.5 * 0.5**0.5, 0.0, 3.5 * 0.5**0.5], [0.0, 0.0, 5.0]]
    )
    torch.testing.assert_close(way, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("end", [[2.0, 4.0], [1.0, 2.0], [-1.0, -2.0]])
def test_the_spherical_way_between_latents_in_one_line_is_straight_and_finite(end):
    start, end, parts = torch.tensor([1.0, 2.0]), torch.tensor(end), torch.tensor([0.0, 0.25, 1.0])
    way = interpolate_latents(start, end, parts, spherical=True)
    torch.testing.assert_close(way, interpolate_latents(start, end, parts, spherical=False))


@pytest.mark.parametrize(("start", "end"), [(0, 1), (1, 0), (0, 0)])
def test_a_latent_without_a_direction_is_left_and_reached_in_a_straight_line(start, end):
    ends, parts = (torch.full((4,), float(start)), torch.full((4,), float(end))), torch.tensor([0, 0.5, 1])
    way = interpolate_latents(*ends, parts, spherical=True)
    assert torch.equal(way, interpolate_latents(*ends, parts, spherical=False)) and bool(way.isfinite().all())


def test_interpolate_draws_two_rows_for_each_two_seeds_and_a_gif_that_closes(hfgen, pipeline, tmp_path):
    arguments = ("--seeds", "3,1,2", "--num_frames", 4, "--device", "cpu")
    status, out, err = hfgen("interpolate", pipeline, "--output", tmp_path / "walk", *arguments)
    assert status == 0, err
    assert "seeds 3, 1, 2" in out
    sheet = tiles(tmp_path / "walk" / "sheet.png", 4, 10)  # both ends and eight between them
    # Each row starts and ends with what the seeds draw by themselves: 3, 1, then 1, 2.
    for seed, places in {3: [(0, 0), (1, 0)], 1: [(0, 9), (1, 9), (2, 0), (3, 0)], 2: [(2, 9), (3, 9)]}.items():
        options = ("--num_images", 1, "--seed", seed, "--device", "cpu")
        assert hfgen("sample", pipeline, "--output", tmp_path / f"seed{seed}", *options)[0] == 0
        alone = np.asarray(Image.open(tmp_path / f"seed{seed}" / "000000.png")).astype(int)
        assert all(np.abs(sheet[place] - alone).max() <= 3 for place in places)
    assert np.abs(sheet[0, 1:9] - sheet[1, 1:9]).max() > 3  # straight and spherical differ in between
    with Image.open(tmp_path / "walk" / "walk.gif") as gif:
        assert gif.n_frames == 3 * 4 and gif.info["loop"] == 0


@pytest.mark.parametrize("seeds", ["1", "1,x", "", "2,-1"])
def test_seeds_that_make_no_way_are_refused(refusal, pipeline, tmp_path, seeds):
    line = refusal("interpolate", pipeline, "--output", tmp_path / "walk", "--seeds", seeds)
    assert f"--seeds {seeds}".strip() in line
    assert not (tmp_path / "walk").exists()


# ------------------------------------------------------------------------------------------------- progress and curves


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of three sheets and a log of a GAN."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    for index, step in enumerate((5, 50, 500)):
        sheet = image_sheet([Image.new("RGB", (8, 8), (100 * index, 50, 200))] * 4)
        sheet.save(folder / "samples" / f"step-{step:08d}.png")
    entries = [
        {"step": step, "seconds": 60.0 * step, "loss_d": 1 / step, "loss_g": step, "x": 0} for step in (1, 2, 4)
    ]
    lines = [json.dumps(entry) for entry in entries]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "sec')
    return folder


def test_progress_shows_every_sheet_in_order_with_its_step_below(hfgen, run, tmp_path):
    status, out, err = hfgen("progress", run, "--output", tmp_path / "film.gif", "--frame_seconds", 0.2)
    assert status == 0, err
    with Image.open(tmp_path / "film.gif") as gif:
        frames = []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append((np.asarray(gif.convert("RGB")).astype(int), gif.info["duration"]))
    colours = [frame[4, 4] for frame, _ in frames]
    assert all(abs(colours[index][0] - 100 * index) < 8 for index in range(3)) and "3 sample sheets" in out
    assert sum(duration for _, duration in frames) == 6 * 200  # the last one stays three times as long
    assert all(frame.shape[0] == 18 + 14 and frame[18:].min() < 100 for frame, _ in frames)


def test_progress_of_one_sheet_is_a_picture_and_says_so(hfgen, tmp_path):
    (tmp_path / "one" / "samples").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "samples" / "step-000000.png")
    status, out, _ = hfgen("progress", tmp_path / "one", "--output", tmp_path / "still.gif")
    assert status == 0 and "still.gif: 1 sample sheet, so a still image until the run has more (--sample_every)" in out
    with Image.open(tmp_path / "still.gif") as gif:
        assert gif.n_frames == 1


def test_progress_refuses_what_is_no_run_and_replaces_nothing(refusal, run, tmp_path):
    assert "contains no sample sheets" in refusal("progress", tmp_path, "--output", tmp_path / "film.gif")
    (tmp_path / "film.gif").write_text("mine")
    assert "exists; choose another name" in refusal("progress", run, "--output", tmp_path / "film.gif")
    assert (tmp_path / "film.gif").read_text() == "mine"
    Image.new("RGB", (3, 3)).save(run / "samples" / "step-00000600.png")
    assert "differ in size" in refusal("progress", run, "--output", tmp_path / "other.gif")


def test_curves_show_each_loss_of_each_run_against_steps_and_against_minutes(run, tmp_path):
    other = tmp_path / "ddpm"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 7, "seconds": 30.0, "loss": 0.5, "grad_norm": 1}\n')
    figure = plot_curves([run, other])
    rows = {
        by_step.get_ylabel(): (by_step, by_time) for by_step, by_time in zip(*[iter(figure.axes)] * 2, strict=True)
    }
    assert list(rows) == ["loss", "loss_d", "loss_g"]
    by_step, by_time = rows["loss_d"]
    (line,) = [line for line in by_step.lines if line.get_label() == "run" and len(line.get_xdata())]
    assert list(line.get_xdata()) == [1, 2, 4] and list(line.get_ydata()) == [1, 0.5, 0.25]
    (line,) = [line for line in by_time.lines if len(line.get_xdata())]
    assert list(line.get_xdata()) == [1.0, 2.0, 4.0]
    assert [list(line.get_xdata()) for line in rows["loss"][0].lines if len(line.get_xdata())] == [[7]]


def test_losses_of_different_families_never_share_axes_and_those_of_one_family_do(tmp_path):
    logs = {
        "dcgan": {"loss_d": 1.4, "loss_g": 0.7},
        "sngan": {"loss_d": 2.0, "loss_g": 0.1},
        "vae": {"loss": 2000.0, "kl_loss": 20.0, "loss_d": 0.7},
        "ddpm": {"loss": 0.03},
    }
    for name, losses in logs.items():
        (tmp_path / name).mkdir()
        entry = {"step": 1, "seconds": 60.0, **losses, "fid": 90.0}
        (tmp_path / name / "metrics.jsonl").write_text(f"{json.dumps(entry)}\n")
    panels = [
        (axes.get_title(), axes.get_ylabel(), [line.get_label() for line in axes.lines])
        for axes in plot_curves([tmp_path / name for name in logs]).axes[::2]
    ]
    assert panels == [
        ("diffusion", "loss", ["ddpm"]),
        ("GAN", "loss_d", ["dcgan", "sngan"]),
        ("GAN", "loss_g", ["dcgan", "sngan"]),
        ("VAE", "kl_loss", ["vae"]),
        ("VAE", "loss", ["vae"]),
        ("VAE", "loss_d", ["vae"]),
        ("", "fid", list(logs)),  # scores can be compared
    ]


def test_a_single_point_of_a_curve_is_visible(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds": 30.0, "loss": 0.5}\n')
    (line,) = plot_curves([tmp_path]).axes[0].lines
    assert line.get_marker() == "."


@pytest.mark.parametrize("name", ["$x_{", "_run", os.fsdecode(b"caf\xe9")])
def test_a_run_of_any_name_is_in_the_legend(run, tmp_path, name):
    run.rename(tmp_path / name)
    figure = plot_curves([tmp_path / name])
    figure.savefig(tmp_path / "curves.png")
    (label,) = figure.axes[0].get_legend_handles_labels()[1]
    assert label.replace("\\$", "$").strip() == name.encode("utf-8", "backslashreplace").decode()


def test_curves_are_written_as_a_picture_and_mistakes_are_named(hfgen, refusal, run, tmp_path):
    status, _, err = hfgen("curves", run, run, "--output", tmp_path / "curves.png")
    assert status == 0, err
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5
    assert "must end in .png" in refusal("curves", run, "--output", tmp_path / "curves.doc")
    assert "not the folder of a run" in refusal("curves", tmp_path, "--output", tmp_path / "none.png")
    assert "exists" in refusal("curves", run, "--output", tmp_path / "curves.png")
