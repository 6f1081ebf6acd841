"""`hfgen sample`, `reconstruct`, `interpolate` and `curves` on VAEs and their runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from labelled_sheets import tiles
from line_method import CountedBatches
from PIL import Image

from hfgen.inference.curves import plot_curves
from hfgen.models import ConvVAE, DCGANGenerator, GaussianMixture
from hfgen.pipelines import GANPipeline, VAEPipeline
from hfgen.training.checkpoints import PIPELINE_FOLDER, list_checkpoints
from hfgen.training.state import RunState


# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
GAP = 2  # white pixels between two images of a sheet
ROUNDING = 4  # grey levels: bf16, where the hardware has it, rounds by the shape of the batch


def vae(density: bool) -> VAEPipeline:
    """An untrained VAE of 8 x 8 pixels whose latents and images differ."""
    torch.manual_seed(0)
    network = ConvVAE(8, latent_dim=5, block_out_channels=(4, 8), layers_per_block=0).train()
    with torch.no_grad():
        network.to_posterior.weight *= 30
        network.from_latents.weight *= 3
        network.conv_out.weight *= 30
        for _ in range(30):
            network(torch.randn(64, 3, 8, 8).tanh(), sample_posterior=True)
    mixture = None
    if density:
        mixture = GaussianMixture(5, 1)
        mixture.means.fill_(3.0)
        mixture.scale_trils.mul_(0.1)
    return VAEPipeline(network.eval(), mixture)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A VAE with a density, one without, and a GAN."""
    folder = tmp_path_factory.mktemp("cli_vae")
    torch.manual_seed(0)
    pipelines = {
        "density": vae(density=True),
        "plain": vae(density=False),
        "gan": GANPipeline(DCGANGenerator(8, latent_dim=5, base_channels=4).eval()),
    }
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
    return {name: folder / name for name in pipelines}


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Five pictures of 8 x 8 pixels, no two alike."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(5):
        levels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


# ------------------------------------------------------------------------------------------------------------- sample


def sample(hfgen, pipeline: Path, output: Path, *arguments) -> np.ndarray:
    """What the command draws, `(4, size, size, 3)`."""
    status, out, err = hfgen("sample", pipeline, "--output", output, "--num_images", 4, "--device", "cpu", *arguments)
    assert status == 0, err
    assert "4 images in" in out
    return np.stack([pixels(output / f"{index:06d}.png") for index in range(4)])


def test_the_two_latent_sources_give_different_images_and_the_density_is_the_default(hfgen, folders, tmp_path):
    asked = {"prior": ("--sample_from", "prior"), "ex_post": ("--sample_from", "ex_post"), "default": ()}
    drawn = {name: sample(hfgen, folders["density"], tmp_path / name, *arguments) for name, arguments in asked.items()}
    plain = sample(hfgen, folders["plain"], tmp_path / "plain")
    assert np.array_equal(drawn["default"], drawn["ex_post"])
    assert np.array_equal(plain, drawn["prior"])
    assert drawn["prior"].std(axis=0).mean() > 5 * drawn["ex_post"].std(axis=0).mean()  # which is narrow here
    assert drawn["ex_post"].std(axis=0).max() > 0


@pytest.mark.parametrize("source", ["prior", "ex_post"])
def test_the_seed_and_the_index_make_the_image(hfgen, folders, tmp_path, source):
    arguments = ("--sample_from", source)
    one = sample(hfgen, folders["density"], tmp_path / "one", "--seed", 3, *arguments)
    two = sample(hfgen, folders["density"], tmp_path / "two", "--seed", 3, "--batch_size", 3, *arguments)
    other = sample(hfgen, folders["density"], tmp_path / "other", "--seed", 4, *arguments)
    assert np.abs(one - two).max() <= ROUNDING
    assert all(np.abs(one - other).max(axis=(1, 2, 3)) > ROUNDING)


def test_a_run_that_is_not_finished_is_sampled_from_its_checkpoint(hfgen, folders, tmp_path, fresh_accelerate_state):
    pipeline = vae(density=False)
    state = RunState({"vae": pipeline.vae}, CountedBatches(), pipeline, "d", Accelerator(cpu=True))
    state.save(tmp_path / "run" / "checkpoints", {"step": 5}, 2)
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    latents = torch.randn(2, 5)
    drawn = VAEPipeline.from_pretrained(checkpoint / PIPELINE_FOLDER)(latents=latents, output_type="pt").images
    assert torch.equal(drawn, pipeline(latents=latents, output_type="pt").images)
    expected = sample(hfgen, folders["plain"], tmp_path / "plain")
    assert np.array_equal(sample(hfgen, tmp_path / "run", tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("pipeline", "arguments", "told"),
    [
        ("gan", ("--sample_from", "prior"), "--sample_from applies only to a VAE; this is a GANPipeline"),
        ("plain", ("--sample_from", "ex_post"), "--sample_from ex_post: this pipeline has no ex-post density"),
        ("density", ("--sample_from", "posterior"), "--sample_from posterior: must be prior or ex_post"),
        ("density", ("--truncation", "1"), "--truncation applies only to a GAN; this is a VAEPipeline"),
    ],
)
def test_latents_that_there_are_not_are_refused(refusal, folders, tmp_path, pipeline, arguments, told):
    line = refusal("sample", folders[pipeline], "--output", tmp_path / "out", "--device", "cpu", *arguments)
    assert told in line
    assert not list(tmp_path.rglob("*.png"))


def test_a_vae_has_nothing_to_denoise(refusal, folders, tmp_path):
    assert "is not a diffusion pipeline" in refusal("denoise", folders["plain"], "--output", tmp_path / "strips")


# -------------------------------------------------------------------------------------------------------- reconstruct


def reconstruct(hfgen, pipeline: Path, pictures: list[Path], output: Path, *arguments) -> str:
    status, out, err = hfgen("reconstruct", pipeline, *pictures, "--output", output, "--device", "cpu", *arguments)
    assert status == 0, err
    return out


def test_the_sheet_shows_the_originals_above_their_reconstructions(hfgen, folders, pictures, tmp_path):
    out = reconstruct(hfgen, folders["density"], pictures, tmp_path / "out", "--columns", 3)
    assert "5 reconstructions in" in out
    names = [f"{index:06d}-{index}.png" for index in range(5)]
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(names)
    sheet = tiles(tmp_path / "out_sheet.png", 4, 3)
    for index, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        row, column = 2 * (index // 3), index % 3
        assert np.array_equal(sheet[row, column], pixels(picture))
        assert np.array_equal(sheet[row + 1, column], pixels(tmp_path / "out" / name))
    assert (sheet[2:, 2] == 255).all()
    expected = vae(density=True).reconstruct([Image.open(picture) for picture in pictures]).images
    for name, image in zip(names, expected, strict=True):
        assert np.abs(pixels(tmp_path / "out" / name) - np.asarray(image).astype(int)).max() <= 2 * ROUNDING


def test_a_picture_of_another_size_is_shown_as_the_encoder_saw_it(hfgen, folders, tmp_path):
    levels = np.zeros((16, 40, 3), np.uint8)
    levels[:, 12:28] = (200, 90, 30)
    Image.fromarray(levels).save(tmp_path / "wide.png")
    reconstruct(hfgen, folders["plain"], [tmp_path / "wide.png"], tmp_path / "out")
    sheet = tiles(tmp_path / "out_sheet.png", 2, 1)
    assert np.abs(sheet[0, 0, :, 2:6] - [200, 90, 30]).max() <= 3


def test_what_cannot_be_reconstructed_is_named_and_nothing_is_written(refusal, folders, pictures, tmp_path):
    broken, output = tmp_path / "broken.png", tmp_path / "out"
    broken.write_bytes(pictures[0].read_bytes()[:60])
    command = ("--output", output, "--device", "cpu")
    assert f"IMAGES {broken}: " in refusal("reconstruct", folders["plain"], pictures[0], broken, *command)
    missing = tmp_path / "missing.png"
    assert f"IMAGES {missing}: " in refusal("reconstruct", folders["plain"], missing, *command)
    told = refusal("reconstruct", folders["gan"], pictures[0], *command)
    assert "only a VAE can encode images; this is a GANPipeline" in told
    assert not output.exists()


@pytest.mark.parametrize("command", ["sample", "reconstruct", "interpolate"])
def test_a_folder_with_something_in_it_is_left_alone(refusal, folders, pictures, tmp_path, command):
    output = tmp_path / "out"
    output.mkdir()
    (output / "sheet.png").write_text("mine")
    arguments = (pictures[0],) if command == "reconstruct" else ()
    line = refusal(command, folders["plain"], *arguments, "--output", output, "--device", "cpu")
    assert "exists and is not empty; choose another folder" in line
    assert (output / "sheet.png").read_text() == "mine" and len(list(output.iterdir())) == 1


# -------------------------------------------------------------------------------------------------------- interpolate


def test_a_walk_between_pictures_starts_and_ends_with_their_reconstructions(hfgen, folders, pictures, tmp_path):
    command = ("interpolate", folders["density"], "--output", tmp_path / "walk", "--device", "cpu")
    images = [part for picture in pictures[:3] for part in ("--image", picture)]
    status, out, err = hfgen(*command, *images, "--num_steps", 3, "--num_frames", 4)
    assert status == 0, err
    assert "linear above spherical, 0.png, 1.png, 2.png" in out
    reconstruct(hfgen, folders["density"], pictures[:3], tmp_path / "out")
    ends = [pixels(tmp_path / "out" / f"{index:06d}-{index}.png") for index in range(3)]
    with_originals = tiles(tmp_path / "walk" / "sheet.png", 4, 7)
    sheet = with_originals[:, 1:6]
    for row, (start, end) in enumerate([(0, 1), (0, 1), (1, 2), (1, 2)]):
        assert np.array_equal(with_originals[row, 0], pixels(pictures[start]))
        assert np.array_equal(with_originals[row, 6], pixels(pictures[end]))
        assert np.abs(sheet[row, 0] - ends[start]).max() <= ROUNDING
        assert np.abs(sheet[row, 4] - ends[end]).max() <= ROUNDING
        assert np.abs(sheet[row, 0] - sheet[row, 4]).max() > 10 * ROUNDING
    assert np.abs(sheet[0, 1:4] - sheet[1, 1:4]).max() > ROUNDING  # straight and spherical differ in between
    with Image.open(tmp_path / "walk" / "walk.gif") as gif:
        assert gif.n_frames == 3 * 4


@pytest.mark.parametrize("source", ["prior", "ex_post"])
def test_a_walk_between_seeds_starts_and_ends_with_what_they_draw(hfgen, folders, tmp_path, source):
    pipeline, arguments = folders["density"], ("--sample_from", source, "--device", "cpu")
    command = ("interpolate", pipeline, "--output", tmp_path / "walk", "--seeds", "3,1", "--num_steps", 1)
    status, out, err = hfgen(*command, *arguments)
    assert status == 0, err
    assert "seeds 3, 1" in out
    sheet = tiles(tmp_path / "walk" / "sheet.png", 2, 3)
    for seed, column in ((3, 0), (1, 2)):
        alone = sample(hfgen, pipeline, tmp_path / f"seed{seed}", "--seed", seed, *arguments)[0]
        assert all(np.abs(sheet[row, column] - alone).max() <= ROUNDING for row in range(2))


@pytest.mark.parametrize(
    ("pipeline", "arguments", "told"),
    [
        (
            "plain",
            ("--image", "{0}"),
            "--image {0}: interpolation needs at least two images; use --image twice or more",
        ),
        ("plain", ("--image", "{0}", "--image", "{1}", "--seeds", "1,2"), "leave out --seeds and --sample_from"),
        ("density", ("--image", "{0}", "--image", "{1}", "--sample_from", "prior"), "leave out --seeds and"),
        ("plain", ("--image", "{0}", "--image", "{0}.no"), "--image {0}.no: "),
        ("gan", ("--image", "{0}", "--image", "{1}"), "only a VAE can encode images; this is a GANPipeline"),
        ("gan", ("--sample_from", "prior"), "--sample_from applies only to a VAE; this is a GANPipeline"),
        ("plain", ("--sample_from", "ex_post"), "--sample_from ex_post: this pipeline has no ex-post density"),
        ("plain", ("--seeds", "1"), "--seeds 1: must be at least two numbers"),
    ],
)
def test_ends_that_make_no_walk_are_refused(refusal, folders, pictures, tmp_path, pipeline, arguments, told):
    arguments = [part.format(*pictures) for part in arguments]
    line = refusal("interpolate", folders[pipeline], "--output", tmp_path / "walk", "--device", "cpu", *arguments)
    assert told.format(*pictures) in line
    assert not (tmp_path / "walk").exists()


# ------------------------------------------------------------------------------------------------------------- curves


def test_curves_show_the_parts_of_the_loss_of_a_vae_and_nothing_else(tmp_path):
    line = '{"step": 7, "seconds": 30.0, "loss": 3, "reconstruction_loss": 2, "kl_loss": 1, "rmse": 4, "lossy": 5}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    figure = plot_curves([tmp_path])
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["kl_loss", "loss", "reconstruction_loss"]
    drawn = [list(line.get_ydata()) for axes in figure.axes[::2] for line in axes.lines if len(line.get_ydata())]
    assert drawn == [[1], [3], [2]]


def test_curves_show_the_scores_of_a_run_below_its_losses_where_there_are_some(tmp_path):
    entries = ['"loss": 3', '"loss": 2, "fid": 90, "kid": 0.1, "copies": 0, "copies_expected": 0.01', '"loss": 1']
    lines = [f'{{"step": {index}, "seconds": 60.0, {entry}}}\n' for index, entry in enumerate(entries)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    figure = plot_curves([tmp_path])
    drawn = {axes.get_ylabel(): list(axes.lines[0].get_ydata()) for axes in figure.axes[::2]}
    assert drawn == {"loss": [3, 2, 1], "fid": [90], "kid": [0.1], "copies": [0]}
    assert list(figure.axes[2].lines[0].get_xdata()) == [1]
