import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hfgen.models import DCGAN256Generator, DCGANGenerator, SNGANGenerator
from hfgen.pipelines import GANPipeline


GENERATORS = {
    "dcgan": (lambda: DCGANGenerator(8, latent_dim=5, base_channels=4), "DCGANGenerator"),
    "dcgan256": (lambda: DCGAN256Generator(16, latent_dim=5, stem_channels=16), "DCGAN256Generator"),
    "sngan": (lambda: SNGANGenerator(8, latent_dim=5, base_channels=4), "SNGANGenerator"),
}
every_generator = pytest.mark.parametrize("name", GENERATORS)
# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def build(name: str = "dcgan") -> GANPipeline:
    """An untrained pipeline; BatchNorm's statistics are not the initial ones, and the images are not all grey."""
    torch.manual_seed(0)
    network = GENERATORS[name][0]().train()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(4)
        for _ in range(3):
            network(torch.randn(16, 5))
    return GANPipeline(network.eval())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline, batch_size: int | None = 2, seed: int = 3, **arguments) -> np.ndarray:
    """Images as float arrays `(batch_size, height, width, channels)` in [0, 1]."""
    return pipeline(batch_size, **{"generator": seeded(seed), "output_type": "np", **arguments}).images


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------- saving and loading


@every_generator
def test_a_reloaded_pipeline_draws_the_same_images_and_saves_the_same_bytes(name, tmp_path):
    pipeline = build(name)
    pipeline.save_pretrained(tmp_path / "one")
    reloaded = GANPipeline.from_pretrained(tmp_path / "one")
    assert np.array_equal(draw(reloaded), draw(pipeline))
    assert draw(pipeline).std() > 0.02
    reloaded.save_pretrained(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    code = f"generator/{'sngan' if name == 'sngan' else name}.py"
    assert {"pipeline_gan.py", code, "generator/diffusion_pytorch_model.safetensors"} <= contents(
        tmp_path / "one"
    ).keys()


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
"""


def test_without_hfgen_plain_diffusers_draws_the_same_images_if_the_code_is_trusted(programs, tmp_path):
    for name in GENERATORS:
        build(name).save_pretrained(tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline_gan", "GANPipeline"]
        assert index["generator"] == [name, GENERATORS[name][1]]
    (tmp_path / "clean_machine.py").write_text(CLEAN_MACHINE)
    arguments = (torch.get_num_threads(), *GENERATORS)
    process = programs.run(tmp_path / "clean_machine.py", *arguments, folder=tmp_path)
    assert process.returncode == 0, process.stderr
    for name in GENERATORS:
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), draw(build(name)))


# ------------------------------------------------------------------------------------------------------------ drawing


def test_the_component_is_the_network_and_the_argument_the_random_number_generator():
    pipeline = build()
    assert isinstance(pipeline.generator, DCGANGenerator)
    assert np.array_equal(draw(pipeline, seed=1), draw(pipeline, seed=1))
    assert not np.array_equal(draw(pipeline, seed=1), draw(pipeline, seed=2))
    torch.manual_seed(7)
    first = pipeline(2, output_type="np").images
    assert not np.array_equal(first, pipeline(2, output_type="np").images)


def test_with_a_generator_for_each_an_image_does_not_depend_on_its_batch():
    pipeline = build()
    together = draw(pipeline, 3, generator=[seeded(5), seeded(6), seeded(7)])
    np.testing.assert_allclose(together[1:2], draw(pipeline, 1, generator=[seeded(6)]), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
def test_the_images_are_the_same_however_many_are_drawn_at_once(chunk_size):
    pipeline, sizes = build(), []
    whole = draw(pipeline, 7, chunk_size=7)
    pipeline.generator.register_forward_hook(lambda network, inputs, output: sizes.append(len(output)))
    np.testing.assert_allclose(draw(pipeline, 7, chunk_size=chunk_size), whole, atol=1e-5)
    assert sum(sizes) == 7 and max(sizes) == min(chunk_size, 7)


def test_latents_take_the_place_of_those_that_the_generator_would_have_drawn():
    pipeline = build()
    latents = torch.randn(4, 5, generator=seeded(3))
    kept = latents.clone()
    given = pipeline(latents=latents, output_type="np").images
    assert np.array_equal(given, draw(pipeline, 4, seed=3)) and torch.equal(latents, kept)
    expected = (pipeline.generator(latents).detach() / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(given, expected, atol=1e-6)
    assert len(pipeline().images) == 1


def test_truncation_squeezes_the_normal_latents_below_the_limit_in_order():
    pipeline, seen = build(), []
    pipeline.generator.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
    draw(pipeline, 4000, seed=5, chunk_size=4000)
    for limit in (0.5, 1.0, 6.0):
        draw(pipeline, 4000, seed=5, chunk_size=4000, truncation=limit)
    normal, tame, usual, hardly = (latents.flatten() for latents in seen)
    assert tame.abs().max() <= 0.5 and 0.9 < usual.abs().max() <= 1.0
    assert (tame[normal.argsort()].diff() >= 0).all()
    # The variance of a normal distribution truncated to [-1, 1] is 1 - 2 * density(1) / (2 * distribution(1) - 1).
    assert usual.var().item() == pytest.approx(1 - 2 * 0.2419707 / 0.6826895, abs=0.01)
    torch.testing.assert_close(hardly, normal, atol=1e-4, rtol=1e-4)


def test_truncation_needs_no_float64_on_the_device(monkeypatch):
    """Apple's GPUs have none: latents come to the CPU first."""
    calls = []
    for name in ("cpu", "double"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda own, name=name, method=method: calls.append(name) or method(own)
        )
    draw(build(), truncation=1.0)
    assert calls[: calls.index("double") + 1] == ["cpu", "double"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"latents": torch.zeros(2, 4)}, r"latents must have shape \(2, 5\), not \(2, 4\)"),
        ({"latents": torch.zeros(2, 5), "batch_size": 3}, r"must have shape \(3, 5\), not"),
        ({"truncation": 0.0}, "truncation=0.0 must be positive"),
        ({"truncation": float("nan")}, "truncation=nan must be positive"),
        ({"truncation": 1.0, "latents": torch.zeros(1, 5)}, "cannot be combined with latents"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "generator: there are 1 for 2 images; give one, or"),
        ({"batch_size": 2, "generator": [torch.Generator()] * 3}, "generator: there are 3 for 2 images"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        build()(**arguments)


def test_the_output_types_show_the_same_images():
    pipeline = build()
    array = draw(pipeline)
    tensor = draw(pipeline, output_type="pt")
    assert tensor.shape == (2, 3, 8, 8) and np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    pictures = draw(pipeline, output_type="pil")
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), (array * 255).round().astype(int))
    (in_a_tuple,) = pipeline(2, generator=seeded(3), output_type="np", return_dict=False)
    assert np.array_equal(in_a_tuple, array)


def test_drawing_changes_neither_the_weights_nor_the_mode_and_tracks_no_gradient():
    pipeline = build()
    pipeline.generator.train()
    before = {name: weight.clone() for name, weight in pipeline.generator.named_parameters()}
    assert not draw(pipeline, output_type="pt").requires_grad
    assert pipeline.generator.training
    assert all(torch.equal(weight, before[name]) for name, weight in pipeline.generator.named_parameters())


def test_a_network_in_bfloat16_draws_nearly_the_same_images():
    full, half = build(), build()
    half.to(torch.bfloat16)
    assert np.abs(draw(full) - draw(half)).mean() < 0.02
