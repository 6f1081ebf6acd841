import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hfgen.data.decode import decode_image
from hfgen.data.settings import DataSettings
from hfgen.models import ConvVAE, GaussianMixture, LatentFlow
from hfgen.pipelines import VAEPipeline


# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
with_and_without_density = pytest.mark.parametrize("density", [True, False], ids=["density", "plain"])


def build(density: bool = True, **options) -> VAEPipeline:
    """An untrained pipeline of 8 x 8 pixels whose latents tell images apart; no tensor is as it was at the start."""
    torch.manual_seed(0)
    network = ConvVAE(8, **{"latent_dim": 5, "block_out_channels": (4, 8), **options}).train()
    with torch.no_grad():
        network.to_posterior.weight *= 30
        network.conv_out.weight *= 10
        for name, weight in network.named_parameters():
            if name.endswith(("bias", "conv2.weight")):
                weight.normal_(std=0.1)
        for _ in range(3):
            network(torch.randn(16, network.config.in_channels, 8, 8), sample_posterior=True)
    return VAEPipeline(network.eval(), mixture() if density else None)


def mixture() -> GaussianMixture:
    """Two narrow components."""
    network = GaussianMixture(5, 2).eval()
    network.weights.copy_(torch.tensor([0.3, 0.7]))
    network.means.copy_(torch.tensor([[2.0, -3.0, 1.0, 0.0, 4.0], [-2.0, 5.0, 0.0, 3.0, -1.0]]))
    network.scale_trils.copy_(0.1 * torch.randn(2, 5, 5, generator=seeded(0)).tril())
    return network


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline, batch_size: int | None = 2, seed: int = 3, **arguments) -> np.ndarray:
    """Images as float arrays `(batch_size, height, width, channels)` in [0, 1]."""
    return pipeline(batch_size, **{"generator": seeded(seed), "output_type": "np", **arguments}).images


def draw_images(count: int = 3, channels: int = 3, seed: int = 7) -> torch.Tensor:
    return torch.rand(count, channels, 8, 8, generator=seeded(seed))


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image) for image in (images * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------- saving and loading


@with_and_without_density
def test_a_reloaded_pipeline_draws_the_same_images_and_saves_the_same_bytes(density, tmp_path):
    pipeline = build(density)
    pipeline.save_pretrained(tmp_path / "one")
    reloaded = VAEPipeline.from_pretrained(tmp_path / "one")
    assert type(reloaded) is VAEPipeline and (reloaded.density is not None) == density
    assert np.array_equal(draw(reloaded), draw(pipeline)) and draw(pipeline).std() > 0.02
    assert torch.equal(reloaded.encode(draw_images()), pipeline.encode(draw_images()))
    reloaded.save_pretrained(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    weights = "diffusion_pytorch_model.safetensors"
    expected = {"model_index.json", "pipeline_vae.py", "vae/config.json", "vae/vae.py", f"vae/{weights}"}
    if density:
        expected |= {"density/config.json", "density/gaussian_mixture.py", f"density/{weights}"}
    assert contents(tmp_path / "one").keys() == expected


def test_a_flow_is_saved_with_its_code_and_draws_the_same_by_remote_code(tmp_path):
    torch.manual_seed(0)
    flow = LatentFlow(5, num_couplings=2, hidden_dim=5)
    with torch.no_grad():
        for weight in flow.parameters():
            weight += 0.2 * torch.randn_like(weight)
    pipeline = build(density=False)
    pipeline.register_modules(density=flow.eval())
    pipeline.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "density" / "latent_flow.py").is_file()
    for kind, options in ((VAEPipeline, {}), (diffusers.DiffusionPipeline, {"trust_remote_code": True})):
        loaded = kind.from_pretrained(tmp_path / "one", **options)
        assert type(loaded.density).__name__ == "LatentFlow"
        one, other = (
            two.draw_latents(5, torch.Generator().manual_seed(1)) for two in (loaded, pipeline)
        )  # fmt: skip
        assert torch.equal(one, other)


def test_a_pipeline_saved_without_a_density_may_get_one_later(tmp_path):
    build(density=False).save_pretrained(tmp_path / "one")
    pipeline = VAEPipeline.from_pretrained(tmp_path / "one")
    pipeline.register_modules(density=mixture())
    pipeline.save_pretrained(tmp_path / "two")
    build().save_pretrained(tmp_path / "three")
    assert contents(tmp_path / "two") == contents(tmp_path / "three")


def test_pickled_weights_are_not_read_unless_asked_for(tmp_path):
    pipeline = build()
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        VAEPipeline.from_pretrained(tmp_path)
    asked_for = VAEPipeline.from_pretrained(tmp_path, use_safetensors=False)
    assert np.array_equal(draw(asked_for), draw(pipeline))


CLEAN_MACHINE = """
import sys
sys.modules["hfgen"] = None  # any import of it fails, as where it is not installed
import numpy, torch
from diffusers import DiffusionPipeline

torch.set_num_threads(int(sys.argv[1]))
for name in sys.argv[2:]:
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    images = pipeline(2, generator=torch.Generator().manual_seed(3), output_type="np").images
    numpy.save(name + ".npy", images)
    latents = pipeline.encode(torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(7)))
    numpy.save(name + "_latents.npy", latents.numpy())
"""


def test_without_hfgen_plain_diffusers_draws_and_encodes_the_same_if_trusted(programs, tmp_path):
    names = {"with_density": True, "plain": False}
    for name, density in names.items():
        build(density).save_pretrained(tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline_vae", "VAEPipeline"]
        assert index["vae"] == ["vae", "ConvVAE"]
        assert index["density"] == (["gaussian_mixture", "GaussianMixture"] if density else [None, None])
    (tmp_path / "clean_machine.py").write_text(CLEAN_MACHINE)
    arguments = (torch.get_num_threads(), *names)
    process = programs.run(tmp_path / "clean_machine.py", *arguments, folder=tmp_path)
    assert process.returncode == 0, process.stderr
    for name, density in names.items():
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), draw(build(density)))
        assert np.array_equal(np.load(tmp_path / f"{name}_latents.npy"), build(density).encode(draw_images()).numpy())


# ------------------------------------------------------------------------------------------------------------ drawing


def test_latents_come_from_the_density_by_default_or_from_the_prior():
    pipeline = build()
    expected = {
        "prior": torch.randn(4, 5, generator=seeded(2)),
        "ex_post": pipeline.density(torch.randn(4, 6, generator=seeded(2))),
    }
    expected[None] = expected["ex_post"]
    for sample_from, latents in expected.items():
        drawn = pipeline.draw_latents(4, seeded(2), sample_from)
        assert drawn.dtype == torch.float32 and not drawn.requires_grad
        assert torch.equal(drawn, latents)
        images = draw(pipeline, 4, seed=2, sample_from=sample_from)
        assert np.array_equal(images, draw(pipeline, 4, latents=latents))
    plain = build(density=False)
    assert torch.equal(plain.draw_latents(4, seeded(2)), expected["prior"])


def test_latents_are_decoded_as_they_are():
    pipeline, latents = build(), torch.randn(4, 5, generator=seeded(3))
    kept = latents.clone()
    expected = (pipeline.vae.decode(latents).sample.detach() / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(draw(pipeline, None, latents=latents), expected, atol=1e-6)
    assert torch.equal(latents, kept)
    assert len(pipeline().images) == 1


@pytest.mark.parametrize("sample_from", ["prior", "ex_post"])
def test_with_a_generator_for_each_an_image_does_not_depend_on_its_batch(sample_from):
    pipeline = build()
    generators = [seeded(5), seeded(6), seeded(7)]
    together = draw(pipeline, 3, generator=generators, sample_from=sample_from)
    alone = draw(pipeline, 1, generator=[seeded(6)], sample_from=sample_from)
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
def test_the_images_are_the_same_however_many_are_drawn_at_once(chunk_size):
    pipeline, sizes = build(), []
    whole = draw(pipeline, 7, chunk_size=7)
    pipeline.vae.up_blocks[0].register_forward_hook(lambda network, inputs, output: sizes.append(len(output)))
    np.testing.assert_allclose(draw(pipeline, 7, chunk_size=chunk_size), whole, atol=1e-5)
    assert sum(sizes) == 7 and max(sizes) == min(chunk_size, 7)


def test_without_a_generator_the_images_differ_from_call_to_call():
    pipeline = build()
    assert not np.array_equal(draw(pipeline, generator=None), draw(pipeline, generator=None))


@pytest.mark.parametrize(
    ("density", "arguments", "told"),
    [
        (True, {"latents": torch.zeros(2, 4)}, r"latents must have shape \(2, 5\), not \(2, 4\)"),
        (True, {"latents": torch.zeros(2, 5), "batch_size": 3}, r"must have shape \(3, 5\), not"),
        (True, {"sample_from": "posterior"}, "sample_from='posterior' must be 'prior' or 'ex_post'"),
        (False, {"sample_from": "ex_post"}, "sample_from='ex_post': this pipeline has no ex-post density"),
        (
            True,
            {"latents": torch.zeros(2, 5), "sample_from": "prior"},
            "'prior' is about sampled latents; use",
        ),
        (True, {"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        (
            True,
            {"batch_size": 2, "generator": [torch.Generator()]},
            "generator: there are 1 for 2 images; give one, or",
        ),
        (False, {"batch_size": 2, "generator": [torch.Generator()] * 3}, "generator: there are 3 for 2 images"),
    ],
)
def test_what_cannot_be_drawn_is_refused(density, arguments, told):
    with pytest.raises(ValueError, match=told):
        build(density)(**arguments)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_output_types_show_the_same_images(channels):
    pipeline, images = build(in_channels=channels), draw_images(2, channels)
    for ask in (
        lambda output_type: draw(pipeline, output_type=output_type),
        lambda output_type: pipeline.reconstruct(images, output_type=output_type).images,
    ):
        array, tensor, pictures = ask("np"), ask("pt"), ask("pil")
        assert array.shape == (2, 8, 8, channels) and 0 <= array.min() < array.max() <= 1
        assert tensor.shape == (2, channels, 8, 8) and np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
        levels = np.stack([np.asarray(picture).reshape(8, 8, channels) for picture in pictures])
        assert np.array_equal(levels, (array * 255).round().astype(int))
    (in_a_tuple,) = pipeline(2, generator=seeded(3), output_type="np", return_dict=False)
    assert np.array_equal(in_a_tuple, draw(pipeline))
    (in_a_tuple,) = pipeline.reconstruct(images, output_type="np", return_dict=False)
    assert np.array_equal(in_a_tuple, pipeline.reconstruct(images, output_type="np").images)


def test_a_pipeline_in_bfloat16_draws_and_encodes_nearly_the_same():
    full, half = build(), build()
    half.to(torch.bfloat16)
    assert np.abs(draw(full, sample_from="prior") - draw(half, sample_from="prior")).mean() < 0.02
    assert np.abs(draw(full) - draw(half)).mean() < 0.05
    assert half.draw_latents(2).dtype == torch.float32
    latents = half.encode(draw_images())
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, full.encode(draw_images()), atol=0.2, rtol=0.05)


# ----------------------------------------------------------------------------------------------------------- encoding


def test_images_are_encoded_to_the_mean_of_the_posterior_or_to_a_draw_from_it():
    pipeline, images = build(), draw_images()
    posterior = pipeline.vae.encode(images * 2 - 1).latent_dist
    latents = pipeline.encode(images)
    assert latents.shape == (3, 5) and latents.dtype == torch.float32 and not latents.requires_grad
    torch.testing.assert_close(latents, posterior.mean.detach().flatten(1))
    drawn = pipeline.encode(images, seeded(4), sample_posterior=True)
    noise = torch.randn(3, 5, generator=seeded(4))
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise[:, :, None, None]).detach().flatten(1))


def test_a_reconstruction_is_the_image_of_the_latents():
    pipeline, images = build(), draw_images()
    expected = draw(pipeline, None, latents=pipeline.encode(images))
    assert np.array_equal(pipeline.reconstruct(images, output_type="np").images, expected)
    drawn = {"generator": seeded(1), "sample_posterior": True}
    expected = draw(pipeline, None, latents=pipeline.encode(images, **drawn))
    drawn["generator"] = seeded(1)
    assert np.array_equal(pipeline.reconstruct(images, **drawn, output_type="np").images, expected)
    assert not np.allclose(expected, pipeline.reconstruct(images, output_type="np").images, atol=1e-3)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 64])
def test_latents_are_the_same_however_many_images_are_encoded_at_once(chunk_size):
    pipeline, images, sizes = build(), draw_images(5), []
    whole = pipeline.encode(images, chunk_size=5)
    drawn = pipeline.encode(images, [seeded(index) for index in range(5)], sample_posterior=True, chunk_size=5)
    pipeline.vae.down_blocks[0].register_forward_hook(lambda network, inputs, output: sizes.append(len(output)))
    torch.testing.assert_close(pipeline.encode(images, chunk_size=chunk_size), whole, atol=1e-4, rtol=1e-4)
    assert sum(sizes) == 5 and max(sizes) == min(chunk_size, 5)
    generators = [seeded(index) for index in range(5)]
    in_chunks = pipeline.encode(images, generators, sample_posterior=True, chunk_size=chunk_size)
    torch.testing.assert_close(in_chunks, drawn, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_draws_by_one_generator_are_the_same_however_many_images_are_encoded_at_once(chunk_size):
    pipeline, images = build(), draw_images(5)
    whole, in_chunks = (
        pipeline.encode(images, seeded(1), sample_posterior=True, chunk_size=size) for size in (5, chunk_size)
    )
    torch.testing.assert_close(in_chunks, whole, atol=1e-4, rtol=1e-4)


def test_pictures_and_tensors_of_the_same_levels_have_the_same_latents():
    pipeline = build()
    images = (draw_images() * 255).round() / 255
    expected = pipeline.encode(images)
    torch.testing.assert_close(pipeline.encode(to_pictures(images)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pipeline.encode(to_pictures(images)[1]), expected[1:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (40, 8), (8, 40), (71, 50), (1, 1), (90, 33), (30, 200)])
def test_of_a_picture_of_any_size_the_largest_square_in_the_middle_is_seen(width, height):
    pipeline, side = build(), min(width, height)
    levels = np.zeros((height, width, 3), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    levels[top : top + side, left : left + side] = (200, 90, 30)
    flat = torch.tensor([200.0, 90.0, 30.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8) / 255
    seen = pipeline._to_pixels(Image.fromarray(levels))
    assert seen.shape == (1, 3, 8, 8)
    # Where the square ends between two pixels, its rim is mixed with what lies beside it.
    torch.testing.assert_close(seen[..., 2:6, 2:6], flat[..., 2:6, 2:6] * 2 - 1, atol=0.1, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_a_picture_of_any_mode_of_8_bits_is_seen_as_it_looks(mode):
    grey = Image.new("L", (12, 12), 255 if mode == "1" else 200)
    picture = (grey.convert("RGB") if mode == "CMYK" else grey).convert(mode)
    assert picture.mode == mode
    seen = build()._to_pixels(picture)
    level = 1.0 if mode == "1" else 200 / 127.5 - 1
    torch.testing.assert_close(seen, torch.full((1, 3, 8, 8), level), atol=0.02, rtol=0)


def test_a_file_is_seen_as_the_training_reads_it(tmp_path):
    """Upright, with white where it is transparent, and resized in the same way."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 31, 4), np.uint8)
    noise[:10, ..., 3] = 0
    Image.fromarray(noise).save(tmp_path / "transparent.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise[..., :3]).save(tmp_path / "turned.jpg", exif=turned)
    for name in ("transparent.png", "turned.jpg"):
        (trained_on,) = decode_image(name, (tmp_path / name).read_bytes(), DataSettings("x", sample_size=8)).pixels
        seen = build()._to_pixels(Image.open(tmp_path / name))
        assert ((seen[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy().tolist() == trained_on.tolist()


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_generators_than_of_images_is_refused(count):
    generators = [seeded(seed) for seed in range(count)]
    with pytest.raises(ValueError, match=f"generator: there are {count} for 2 images"):
        build().encode(draw_images(2), generator=generators, sample_posterior=True)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_network_of_grey_images_encodes_pictures_too(mode):
    pipeline, images = build(in_channels=1), (draw_images(2, channels=1) * 255).round() / 255
    pictures = [Image.fromarray((image[0] * 255).round().byte().numpy()).convert(mode) for image in images]
    torch.testing.assert_close(pipeline.encode(pictures), pipeline.encode(images), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(3, 8, 8), r"images must have shape \('batch_size', 3, 8, 8\), not \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 9), "images must have shape"),
        (torch.zeros(1, 1, 8, 8), "images must have shape"),
        (torch.full((1, 3, 8, 8), -0.01), r"with values in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), 1.01), r"with values in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), torch.nan), r"with values in \[0, 1\]"),
        (torch.zeros(0, 3, 8, 8), "at least one image"),
        ([], "at least one image, with 8 bits"),
        (np.zeros((1, 8, 8, 3), np.float32), "images must be a PIL image, a list of them, or a tensor"),
        (Image.fromarray(np.full((12, 12), 200 * 257, np.uint16)), "with 8 bits per channel; convert others first"),
        (Image.fromarray(np.full((12, 12), 0.5, np.float32)), "with 8 bits per channel"),
        (torch.zeros(1, 3, 8, 8), "chunk_size=0 must be at least 1"),
    ],
)
def test_what_are_no_images_is_refused(images, told):
    with pytest.raises(ValueError, match=told):
        build().reconstruct(images, chunk_size=0 if "chunk" in told else 64)


def test_a_picture_for_a_vae_of_four_channels_is_refused_and_a_tensor_is_encoded():
    pipeline = build(in_channels=4)
    with pytest.raises(ValueError, match="this VAE has 4; give a tensor"):
        pipeline.encode(Image.new("RGBA", (8, 8)))
    assert pipeline.encode(torch.zeros(2, 4, 8, 8)).shape == (2, 5)


def test_a_tensor_becomes_pictures_of_its_levels():
    images = (draw_images() * 255).round() / 255
    pictures = build().to_pil(images)
    assert [np.asarray(picture).tolist() for picture in pictures] == [
        np.asarray(picture).tolist() for picture in to_pictures(images)
    ]
