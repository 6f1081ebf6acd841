"""ONNX files give what PyTorch gives, at any batch size, and one that does not is refused and leaves nothing."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from hfgen.errors import UserError
from hfgen.inference.opening import open_pipeline
from hfgen.methods.schedules import SAMPLERS, edm_schedule, noise_schedule, sampling_scheduler
from hfgen.models import (
    ConvVAE,
    DCGAN256Generator,
    DCGANGenerator,
    GaussianMixture,
    LatentFlow,
    SNGANConvGenerator,
    SNGANGenerator,
    UNetAttention,
    UNetBase,
    UNetCompact,
)
from hfgen.pipelines import DDPMPipeline, GANPipeline, VAEPipeline


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from hfgen.export import onnx as export  # noqa: E402 (after the packages that it needs)


# Of diffusers, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = 16
LIBRARY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
NETWORKS = {
    "dcgan": lambda: DCGANGenerator(SIZE, 6, base_channels=4),
    "dcgan256": lambda: DCGAN256Generator(32, 6, stem_channels=16),
    "sngan_conv": lambda: SNGANConvGenerator(SIZE, 6, base_channels=4, upsampling="nearest"),
    "sngan": lambda: SNGANGenerator(SIZE, 6, base_channels=4),
    "vae": lambda: ConvVAE(SIZE, latent_dim=6, block_out_channels=(4, 8), layers_per_block=0),
    "residual vae": lambda: ConvVAE(SIZE, 3, 6, (4, 8), layers_per_block=1, normalization="group"),
    "unet": lambda: UNetBase(SIZE, block_out_channels=(4, 8), time_embedding_dim=6),
    "attention": lambda: UNetAttention(SIZE, block_out_channels=(4, 8), time_embedding_dim=6),
    "library": lambda: UNet2DModel(SIZE, **LIBRARY),
    "edm": lambda: UNetCompact(SIZE, block_out_channels=(4, 8), layers_per_block=1, patch_size=2, time_scale=1000.0),
}


def pipeline_of(name: str, density: bool = False):
    """A pipeline of random weights and statistics, so that no layer does nothing."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    with torch.no_grad():
        for key, values in network.state_dict().items():
            if values.ndim > 1:
                values.normal_(0, math.sqrt(2 / values[0].numel()))
            elif values.is_floating_point():
                values.uniform_(0.5, 1.5) if key.endswith(("weight", "var")) else values.normal_(0, 0.3)
    if name == "edm":
        network.unet.conv_out.weight.data *= 0.1
        return DDPMPipeline(network.eval(), sampling_scheduler(edm_schedule(), "dpm"))
    if "unet" in name or name in ("attention", "library"):
        network.conv_out.weight.data *= 0.1  # a network that answers wildly makes rounding grow from step to step
        return DDPMPipeline(network.eval(), sampling_scheduler(noise_schedule("cosine", 100), "dpm"))
    if "vae" not in name:
        return GANPipeline(network.eval())
    mixture = GaussianMixture(6, 3)
    mixture.weights.copy_(torch.tensor([0.1, 0.6, 0.3]))
    mixture.means.normal_(0, 5)
    mixture.scale_trils.normal_().tril_()
    return VAEPipeline(network.eval(), mixture if density else None)


def run(file, *inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [part.name for part in session.get_inputs()]
    return torch.from_numpy(
        session.run(None, {name: part.numpy() for name, part in zip(names, inputs, strict=True)})[0]
    )


def ends(file) -> list[tuple]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return [(part.name, part.type, part.shape) for part in (*session.get_inputs(), *session.get_outputs())]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To rounding, of outputs that are not all the same."""
    assert expected.std() > 0.02
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# ------------------------------------------------------------------------------------------- what the files compute


@pytest.mark.parametrize("name", ["dcgan", "dcgan256", "sngan"])
def test_a_generator_maps_any_number_of_latents_to_the_images_of_the_network(name, tmp_path):
    pipeline = pipeline_of(name)
    (exported,) = export.export_onnx(pipeline, tmp_path / "onnx")
    file = tmp_path / "onnx" / "generator.onnx"
    assert sorted(path.name for path in file.parent.iterdir()) == ["export.json", "generator.onnx"]
    size = pipeline.generator.config.sample_size
    assert ends(file) == [
        ("latents", "tensor(float)", ["batch", 6]),
        ("images", "tensor(float)", ["batch", 3, size, size]),
    ]
    latents = torch.randn(7, 6)
    with torch.no_grad():
        assert_close(run(file, latents), pipeline.generator(latents))
    assert (exported.file, exported.num_bytes) == ("generator.onnx", file.stat().st_size)
    assert exported.max_difference <= exported.tolerance < 1.1e-4  # of values up to 1


def test_a_flow_and_nearest_upsampling_are_exported(tmp_path):
    torch.manual_seed(0)
    network = ConvVAE(SIZE, latent_dim=6, block_out_channels=(4, 8), upsampling="nearest").eval()
    network.conv_out.weight.data *= 10
    flow = LatentFlow(6, num_couplings=3, hidden_dim=5)
    with torch.no_grad():
        for weight in flow.parameters():
            weight += 0.2 * torch.randn_like(weight)
    export.export_onnx(VAEPipeline(network, flow.eval()), tmp_path / "onnx")
    latents, noise = torch.randn(3, 6), torch.randn(50, 7)
    with torch.no_grad():
        assert_close(run(tmp_path / "onnx" / "decoder.onnx", latents), network.decode(latents).sample)
        assert_close(run(tmp_path / "onnx" / "density.onnx", noise), flow(noise))


@pytest.mark.parametrize("name", ["vae", "residual vae"])
def test_a_vae_is_exported_as_decoder_and_encoder_and_with_its_density_if_it_has_one(name, tmp_path):
    for density in (False, True):
        pipeline = pipeline_of(name, density)
        folder = tmp_path / str(density)
        files = [exported.file for exported in export.export_onnx(pipeline, folder)]
        assert files == ["decoder.onnx", "encoder.onnx"] + ["density.onnx"] * density
    images = ["batch", 3, SIZE, SIZE]
    assert ends(folder / "decoder.onnx") == [
        ("latents", "tensor(float)", ["batch", 6]),
        ("images", "tensor(float)", images),
    ]
    assert ends(folder / "encoder.onnx") == [
        ("images", "tensor(float)", images),
        ("latents", "tensor(float)", ["batch", 6]),
    ]
    assert ends(folder / "density.onnx") == [
        ("noise", "tensor(float)", ["batch", 7]),
        ("latents", "tensor(float)", ["batch", 6]),
    ]
    latents, noise = torch.randn(3, 6), torch.randn(2000, 7)
    with torch.no_grad():
        drawn = pipeline.vae.decode(latents).sample
        assert_close(run(folder / "decoder.onnx", latents), drawn)
        assert_close(run(folder / "encoder.onnx", drawn), pipeline.vae.encode(drawn).latent_dist.mean.flatten(1))
        assert_close(run(folder / "density.onnx", noise), pipeline.density(noise))
    ends_of_range = torch.tensor([[-9.0], [9.0]]).repeat(1, 7)
    assert_close(run(folder / "density.onnx", ends_of_range), pipeline.density(ends_of_range))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_scheduler_of_every_kind_is_described_in_json_and_comes_back_from_it(kind, sampler, tmp_path):
    pipeline = pipeline_of("unet")
    pipeline.scheduler = sampling_scheduler(noise_schedule(kind, 100), sampler)
    export.export_onnx(pipeline, tmp_path / "onnx")
    config = json.loads((tmp_path / "onnx" / "export.json").read_text())["scheduler"]
    again = type(pipeline.scheduler).from_config(config)
    settings = type(again)._get_init_keys(type(again)) - {"self"}
    assert {key: again.config[key] for key in settings} == {key: pipeline.scheduler.config[key] for key in settings}


@pytest.mark.slow
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # the check is what finds a wrong trace
@pytest.mark.parametrize("name", ["unet", "attention", "library", "edm"])
def test_a_unet_in_onnx_with_the_exported_scheduler_draws_the_pipeline_s_images(name, tmp_path):
    pipeline_of(name).save_pretrained(tmp_path / "pipeline")
    pipeline = open_pipeline(str(tmp_path / "pipeline"), "cpu", plain=True)
    pipeline.scheduler.register_to_config(_name_or_path=str(tmp_path))  # as some versions of diffusers do on loading
    pipeline.register_to_config(num_inference_steps=5)
    export.export_onnx(pipeline, tmp_path / "onnx")
    file, text = tmp_path / "onnx" / "unet.onnx", (tmp_path / "onnx" / "export.json").read_text()
    images = ["batch", 3, SIZE, SIZE]
    assert ends(file) == [
        ("sample", "tensor(float)", images),
        ("timestep", "tensor(float)" if name == "edm" else "tensor(int64)", ["batch"]),
        ("model_output", "tensor(float)", images),
    ]
    assert str(tmp_path) not in text
    assert str(tmp_path).encode() not in file.read_bytes()

    config = json.loads(text)["scheduler"]
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    noise = torch.randn(3, 3, SIZE, SIZE)
    scheduler.set_timesteps(json.loads(text)["num_inference_steps"])
    sample = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_output = run(file, scheduler.scale_model_input(sample, timestep), timestep.repeat(3))
        sample = scheduler.step(model_output, timestep, sample).prev_sample
    expected = pipeline(3, latents=noise, output_type="pt").images
    assert len(scheduler.timesteps) == 5 and expected.std() > 0.02
    assert (sample.clamp(-1, 1) / 2 + 0.5 - expected).abs().max() < 1e-3


def test_each_image_of_a_batch_has_its_own_timestep(tmp_path):
    pipeline = pipeline_of("unet")
    export.export_onnx(pipeline, tmp_path / "onnx")
    samples, timesteps = torch.randn(1, 3, SIZE, SIZE).repeat(4, 1, 1, 1), torch.tensor([0, 3, 50, 99])
    found = run(tmp_path / "onnx" / "unet.onnx", samples, timesteps)
    with torch.no_grad():
        assert_close(found, pipeline.unet(samples, timesteps).sample)
    assert (found[0] - found[2]).abs().max() > 0.01


def test_convolutions_stay_convolutions_and_everything_is_in_one_file(tmp_path):
    pipeline_of("dcgan").save_pretrained(tmp_path / "pipeline")
    pipeline = open_pipeline(str(tmp_path / "pipeline"), "cpu", plain=True)
    assert not [module for module in pipeline.generator.modules() if "forward" in vars(module)]
    export.export_onnx(pipeline, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "generator.onnx")
    operations = [node.op_type for node in model.graph.node]
    expected = sum(isinstance(module, nn.ConvTranspose2d) for module in pipeline.generator.modules()) - 1
    assert operations.count("ConvTranspose") == expected == 2  # the stem is a matrix product
    assert not [part for part in model.graph.initializer if part.external_data]
    assert [part.version for part in model.opset_import] == [export.OPSET]


def test_the_pipeline_draws_after_the_export_what_it_drew_before(tmp_path):
    pipeline = pipeline_of("vae", density=True)
    before = pipeline(5, torch.Generator().manual_seed(1), output_type="np").images
    export.export_onnx(pipeline, tmp_path / "onnx")
    assert not pipeline.vae.training
    assert np.array_equal(pipeline(5, torch.Generator().manual_seed(1), output_type="np").images, before)


def test_half_precision_and_train_mode_export_what_float32_and_eval_mode_draw(tmp_path):
    pipeline = pipeline_of("sngan")
    pipeline.generator.half().train()
    export.export_onnx(pipeline, tmp_path / "onnx")
    expected = pipeline_of("sngan").generator.half().float()
    latents = torch.randn(2, 6)
    with torch.no_grad():
        assert_close(run(tmp_path / "onnx" / "generator.onnx", latents), expected(latents))


# -------------------------------------------------------------------------------------------------------- export.json


def test_export_json_says_what_a_user_of_the_files_needs(tmp_path):
    (_, _, density) = export.export_onnx(pipeline_of("vae", density=True), tmp_path / "onnx")
    told = json.loads((tmp_path / "onnx" / "export.json").read_text())
    assert (told["format"], told["pipeline"], told["opset"]) == ("onnx", "VAEPipeline", 17)
    assert (told["sample_size"], told["latent_dim"]) == (SIZE, 6)
    assert list(told["files"]) == ["decoder.onnx", "encoder.onnx", "density.onnx"]
    assert "density.onnx" in told["use"] and "scheduler" not in told
    decoder, part = told["files"]["decoder.onnx"], told["files"]["density.onnx"]
    assert decoder["network"] == "ConvVAE" and part["network"] == "GaussianMixture"
    (images,) = decoder["outputs"]
    assert (images["name"], images["dtype"], images["shape"]) == ("images", "float32", ["batch", 3, SIZE, SIZE])
    assert images["values"].startswith("from -1 to 1")
    assert (part["max_difference"], part["tolerance"]) == (density.max_difference, density.tolerance)
    assert part["checked_at_batch_sizes"] == [1, 2, 3, 5] and decoder["checked_at_batch_sizes"] == [1, 2, 5]
    assert told["versions"]["torch"] == torch.__version__ and told["versions"]["onnx"] == onnx.__version__


def test_a_unet_is_checked_at_timesteps_from_the_first_to_the_last(tmp_path):
    (graph,) = export.graphs_of(pipeline_of("unet"))
    timesteps = [inputs[1].tolist() for inputs in graph.checks]
    assert timesteps == [[0], [49], [99], [0, 99], [0, 24, 49, 74, 99]]
    assert all(inputs[1].dtype == torch.int64 and len(inputs[0]) == len(inputs[1]) for inputs in graph.checks)


def test_a_density_is_checked_in_each_of_its_components():
    pipeline = pipeline_of("vae", density=True)
    density, graph = pipeline.density, export.graphs_of(pipeline)[2]
    assert graph.reference is density  # not what was rewritten for ONNX
    noise = graph.checks[-1][0].clone()
    noise[:, 1:] = 0  # what is left are the means
    assert torch.equal(density(noise), density.means)


# ----------------------------------------------------------------------------------------------------------- refusals


def linear_file(folder, example: torch.Tensor, axes: dict, module: nn.Module | None = None):
    """A module, and the file of its graph as the exporter traces it for such an input."""
    torch.manual_seed(0)
    module = module or nn.Linear(4, 3).eval()
    file = folder / "network.onnx"
    torch.onnx.export(module, (example,), str(file), input_names=["x"], output_names=["y"], dynamic_axes=axes,
                      dynamo=False)  # fmt: skip
    return module, file


CHECKS = [(torch.ones(1, 4),), (torch.linspace(-1, 1, 8).view(2, 4),)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_check_measures_the_difference_and_refuses_altered_weights_saying_where(tmp_path):
    module, file = linear_file(tmp_path, torch.randn(2, 4), {"x": {0: "batch"}, "y": {0: "batch"}})
    largest, tolerance = export.check_parity(file, module, CHECKS)
    with torch.no_grad():
        assert largest < 1e-6 and tolerance == pytest.approx(1e-4 * min(float(module(*x).abs().max()) for x in CHECKS))
        module.bias[1] += 0.01
    expected = r"network.onnx at batch size 1 differs from PyTorch by 0\.01 \(allowed: .*\) at \(0, 1\); nothing"
    with pytest.raises(UserError, match=expected):
        export.check_parity(file, module, CHECKS)
    with pytest.raises(UserError, match="differs from PyTorch"):
        export.check_parity(file, nn.Linear(4, 3), CHECKS)
    with torch.no_grad():
        module.bias[1] -= 0.01 - 0.2 * tolerance  # rounding may do as much
    assert 0.1 * tolerance < export.check_parity(file, module, CHECKS)[0] < 0.3 * tolerance


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_check_finds_a_batch_size_that_was_baked_in(tmp_path):
    class Baked(nn.Module):
        def forward(self, x):
            return x[:1].expand(2, 4) if torch.jit.is_tracing() else x

    module, file = linear_file(tmp_path, torch.ones(1, 4), {"x": {0: "batch"}}, Baked().eval())
    with pytest.raises(UserError, match=r"at batch size 1 returns \(2, 4\) instead of \(1, 4\); nothing was written"):
        export.check_parity(file, module, CHECKS)
    module, file = linear_file(tmp_path, torch.ones(1, 4), {})
    with pytest.raises(UserError, match=r"network.onnx at batch size 2: onnxruntime fails: .*; nothing was written"):
        export.check_parity(file, module, CHECKS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_values_that_are_not_finite_are_refused_even_if_both_sides_have_them(tmp_path):
    module, file = linear_file(tmp_path, torch.randn(2, 4), {"x": {0: "batch"}, "y": {0: "batch"}})
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="the output of PyTorch contains non-finite values"):
            export.check_parity(file, module, [(torch.full((1, 4), bad),)])
    with pytest.raises(UserError, match="the output of onnxruntime contains non-finite values"):
        export.check_parity(file, lambda x: x[:, :3].nan_to_num(0), [(torch.full((1, 4), torch.nan),)])


def test_a_file_that_is_no_network_is_refused(tmp_path):
    (tmp_path / "network.onnx").write_bytes(b"something else")
    with pytest.raises(UserError, match="network.onnx: cannot be opened by onnxruntime"):
        export.check_parity(tmp_path / "network.onnx", nn.Identity(), CHECKS)


@pytest.mark.parametrize("layer", ["conv_out", "to_posterior"])
def test_a_broken_network_leaves_no_file_not_even_that_of_the_network_before_it(layer, tmp_path):
    pipeline = pipeline_of("vae")
    with torch.no_grad():
        getattr(pipeline.vae, layer).bias[0] = torch.nan
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(UserError, match="contains non-finite values"):
            export.export_onnx(pipeline, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_the_extra_to_install_is_named(package, tmp_path, monkeypatch):
    find_spec = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=rf'pip install "hfgen\[export\]" \({package} is missing\)'):
        export.export_onnx(pipeline_of("dcgan"), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
