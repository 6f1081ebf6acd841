"""The generators and discriminators of GANs; the U-Nets are in `test_models.py`."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, relu
from torch.nn.utils.parametrize import is_parametrized

import hfgen.models
from hfgen.models import (
    DCGAN256Discriminator,
    DCGAN256Generator,
    DCGANDiscriminator,
    DCGANGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
)
from hfgen.models.sngan import DownBlock, UpBlock


# Each network small, with options that are not the defaults, so that one that is lost on reload shows. A network that
# joins `hfgen.models` and is no U-Net joins this table.
TINY = {
    "DCGANGenerator": {"latent_dim": 6, "base_channels": 3},
    "DCGANDiscriminator": {"base_channels": 3, "normalization": "instance"},
    "DCGAN256Generator": {"latent_dim": 6, "stem_channels": 32},
    "DCGAN256Discriminator": {"base_channels": 3, "dropout": 0.2},
    "SNGANGenerator": {"latent_dim": 6, "base_channels": 3},
    "SNGANDiscriminator": {"base_channels": 3},
}
GENERATORS = [name for name in TINY if name.endswith("Generator")]
# (discriminator, its options, whether BatchNorm mixes the images of a batch)
DISCRIMINATORS = [
    ("DCGANDiscriminator", {"normalization": "batch"}, True),
    ("DCGANDiscriminator", {"normalization": "instance"}, False),
    ("DCGANDiscriminator", {"normalization": "spectral"}, False),
    ("DCGANDiscriminator", {"normalization": "none"}, False),
    ("DCGAN256Discriminator", {}, True),
    ("SNGANDiscriminator", {}, False),
]
NORMALIZATIONS = [options["normalization"] for _, options, _ in DISCRIMINATORS if options]
# How much larger than the initial ones the weights of an untrained network are here: the signal must reach its end.
GAINS = {DCGANGenerator: 5, DCGANDiscriminator: 5, DCGAN256Generator: 3, DCGAN256Discriminator: 3}
every_generator = pytest.mark.parametrize("name", GENERATORS)
every_discriminator = pytest.mark.parametrize(("name", "options", "mixes"), DISCRIMINATORS)
every_variant = pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in GENERATORS] + [(name, options) for name, options, _ in DISCRIMINATORS],
)


def tiny(name: str, sample_size: int = 32, seed: int = 0, **options) -> nn.Module:
    """An untrained network in eval mode whose biases and BatchNorm statistics are not the initial ones."""
    torch.manual_seed(seed)
    network = getattr(hfgen.models, name)(sample_size, **{**TINY[name], **options})
    with torch.no_grad():
        for key, weight in network.named_parameters():
            weight.mul_(GAINS.get(type(network), 1))
            if key.endswith("bias"):
                weight.normal_(std=0.1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, count: int = 3, size: int = 32, channels: int = 3, seed: int = 1) -> torch.Tensor:
    """Latents for a generator, images for a discriminator."""
    return draw(count, 6, seed=seed) if name in GENERATORS else draw(count, channels, size, size, seed=seed).tanh()


def smallest(name: str) -> int:
    return 16 if "256" in name else 8


def test_every_network_but_the_u_nets_has_a_tiny_configuration_here():
    assert TINY.keys() == {name for name in hfgen.models.__all__ if not name.startswith("UNet")}


def test_every_discriminator_has_a_row_with_each_normalisation():
    assert {name for name, _, _ in DISCRIMINATORS} == TINY.keys() - GENERATORS
    assert NORMALIZATIONS == ["batch", "instance", "spectral", "none"]


# ----------------------------------------------------------------------------------------------------- shapes, ranges


@every_generator
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_generator_draws_one_image_of_its_size_for_each_latent(name, factor):
    size = smallest(name) * factor
    images = tiny(name, size)(draw(3, 6))
    assert images.shape == (3, 3, size, size)
    assert images.dtype == torch.float32
    assert images.std(dim=0).mean() > 1e-3


@every_discriminator
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_discriminator_gives_one_logit_for_each_image(name, options, mixes, factor):
    size = smallest(name) * factor
    network = tiny(name, size, **options)
    logits = network(inputs(name, size=size))
    assert logits.shape == (3,)
    assert logits.dtype == torch.float32
    assert logits.std() > 1e-5
    assert network(inputs(name, count=1, size=size)).shape == (1,)


@pytest.mark.parametrize("size", [48, 80])
def test_the_networks_of_study_b_work_at_any_multiple_of_16(size):
    assert tiny("DCGAN256Generator", size)(draw(2, 6)).shape == (2, 3, size, size)
    assert tiny("DCGAN256Discriminator", size)(inputs("DCGAN256Discriminator", 2, size)).shape == (2,)


@every_variant
def test_the_networks_work_on_256_pixels(name, options):
    with torch.no_grad():
        shape = tiny(name, 256, **options)(inputs(name, 1, 256)).shape
    assert shape == ((1, 3, 256, 256) if name in GENERATORS else (1,))


@every_variant
def test_the_channels_of_the_images_are_chosen(name, options):
    if name in GENERATORS:
        assert tiny(name, out_channels=5)(draw(2, 6)).shape == (2, 5, 32, 32)
    else:
        assert tiny(name, in_channels=4, **options)(inputs(name, 2, channels=4)).shape == (2,)


@every_generator
def test_generated_images_lie_between_minus_one_and_one_and_can_come_near_to_both(name):
    network = tiny(name)
    with torch.no_grad():
        network.conv_out.weight *= 100
        images = network(draw(8, 6))
    assert images.abs().max() <= 1
    assert images.min() < -0.99 and images.max() > 0.99
    assert (images.abs() < 0.9).any()  # squeezed, not cut off


@every_generator
def test_each_latent_draws_its_own_image_in_eval_mode(name):
    network, latents = tiny(name).double(), draw(3, 6).double()
    together = network(latents)
    for index in range(3):
        torch.testing.assert_close(together[index : index + 1], network(latents[index : index + 1]))


@every_discriminator
def test_in_training_an_image_s_logit_depends_on_the_others_if_there_is_a_batch_norm_and_only_then(
    name, options, mixes
):
    off = {"dropout": 0.0} if name == "DCGAN256Discriminator" else {}
    network = tiny(name, **options, **off).train().double()
    images = inputs(name).double()
    others = torch.cat([images[:1], inputs(name, seed=2)[1:].double()])
    # A copy of the network for each batch, because in training each pass moves what spectral norm knows.
    one, other = (copy.deepcopy(network)(batch) for batch in (images, others))
    assert (one[1:] - other[1:]).abs().min() > 1e-6
    if mixes:
        assert (one[0] - other[0]).abs() > 1e-6
    else:
        torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-12)
    network.eval()
    torch.testing.assert_close(network(images)[0], network(others)[0], rtol=1e-9, atol=1e-12)


def test_dropout_drops_what_the_last_layer_sees_in_training_alone():
    network, images = tiny("DCGAN256Discriminator", dropout=1.0), inputs("DCGAN256Discriminator")
    assert torch.equal(network.train()(images), network.linear_out.bias.expand(3))
    network.eval()
    assert (network(images) - network.linear_out.bias).abs().min() > 1e-3
    assert torch.equal(network(images), network(images))


# -------------------------------------------------------------------------------------------------- what gets trained


def without_gradient(network: nn.Module, name: str) -> list[str]:
    output = network(inputs(name, count=4).to(next(network.parameters()).dtype))
    (output * draw(*output.shape, seed=2)).sum().backward()
    return [
        key for key, weight in network.named_parameters() if weight.grad is None or weight.grad.abs().max() < 1e-12
    ]


@every_variant
def test_every_parameter_gets_a_gradient(name, options):
    assert without_gradient(tiny(name, **options).double(), name) == []


@every_variant
def test_in_training_only_the_biases_that_a_batch_norm_takes_away_again_get_none(name, options):
    # BatchNorm takes away again what it is shown everywhere, even through the shortcuts of the blocks between.
    expected = {
        "SNGANGenerator": {
            f"blocks.{level}.{layer}.bias" for level in range(3) for layer in ("conv1", "conv2", "shortcut")
        },
        "DCGAN256Discriminator": {f"convs.{level}.bias" for level in range(1, 4)},
    }
    assert set(without_gradient(tiny(name, **options).double().train(), name)) == expected.get(name, set())


@every_discriminator
def test_the_gradient_with_respect_to_the_images_trains_every_weight_that_it_depends_on(name, options, mixes):
    network = tiny(name, **options).double()
    images = inputs(name).double().requires_grad_()
    (gradients,) = torch.autograd.grad(network(images).sum(), images, create_graph=True)
    gradients.square().sum().backward()
    weights = {key: weight for key, weight in network.named_parameters() if not key.endswith("bias")}
    assert all(weight.grad is not None and weight.grad.any() for weight in weights.values())


# ----------------------------------------------------------------------------------------------- saving, and settings


@every_variant
def test_a_saved_and_reloaded_network_answers_the_same_bit_for_bit(name, options, tmp_path):
    network = tiny(name, **options).train()
    for seed in range(3):
        network(inputs(name, seed=seed))  # BatchNorm and spectral norm move on
    network.eval()
    network.save_pretrained(tmp_path)
    reloaded = type(network).from_pretrained(tmp_path)
    assert not reloaded.training
    assert torch.equal(reloaded(inputs(name)), network(inputs(name)))
    state, other = network.state_dict(), reloaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@every_variant
def test_every_argument_is_in_the_config(name, options):
    network = tiny(name, 64, **options)
    arguments = inspect.signature(type(network).__init__).parameters.keys() - {"self"}
    given = {**TINY[name], **options, "sample_size": 64}
    channels = "out_channels" if name in GENERATORS else "in_channels"
    assert arguments == given.keys() | {channels}
    assert {key: network.config[key] for key in arguments} == {**given, channels: 3}


@pytest.mark.parametrize("name", [name for name in TINY if "256" not in name])
@pytest.mark.parametrize("size", [-16, -8, 0, 1, 4, 7, 9, 12, 24, 96, 100])
def test_a_size_that_is_no_power_of_two_is_refused_by_name(name, size):
    with pytest.raises(ValueError, match=f"sample_size={size} must be a power of two from 8"):
        tiny(name, size)


@pytest.mark.parametrize("name", ["DCGAN256Generator", "DCGAN256Discriminator"])
@pytest.mark.parametrize("size", [-16, 0, 1, 8, 15, 24, 40, 100])
def test_a_size_that_is_no_multiple_of_16_is_refused_by_the_networks_of_study_b(name, size):
    with pytest.raises(ValueError, match=f"sample_size={size} must be a multiple of 16"):
        tiny(name, size)


@pytest.mark.parametrize("stem_channels", [-16, 0, 8, 24, 100])
def test_a_stem_that_cannot_be_halved_four_times_is_refused_by_name(stem_channels):
    with pytest.raises(ValueError, match=f"stem_channels={stem_channels} must be a multiple of 16"):
        DCGAN256Generator(32, stem_channels=stem_channels)


@pytest.mark.parametrize("normalization", ["layer", "", "Batch"])
def test_a_normalisation_that_there_is_not_is_refused_by_name(normalization):
    with pytest.raises(ValueError, match=f"normalization='{normalization}' must be batch, instance, spectral or none"):
        DCGANDiscriminator(32, normalization=normalization)


# ------------------------------------------------------------------------------------------ widths, numbers of weights


def convolution(fine: int, coarse: int, size: int, bias: bool = True) -> int:
    return fine * coarse * size**2 + coarse * bias


def pairs(*widths: int) -> list[tuple[int, int]]:
    return list(zip(widths[:-1], widths[1:], strict=True))


def num_parameters(network_class: type, *arguments, **options) -> int:
    with torch.device("meta"):
        return network_class(*arguments, **options).num_parameters()


def test_the_default_dcgan_is_the_well_known_one_of_3_6_and_2_8_million_weights():
    generator = 100 * 512 * 16 + sum(fine * coarse * 16 for fine, coarse in pairs(512, 256, 128, 64))
    generator += convolution(64, 3, 4) + 2 * (512 + 256 + 128 + 64)
    convolutions = convolution(3, 64, 4) + convolution(512, 1, 4)
    inner = pairs(64, 128, 256, 512)
    without_bias = convolutions + sum(convolution(*widths, 4, bias=False) for widths in inner)
    with_bias = convolutions + sum(convolution(*widths, 4) for widths in inner)
    scales_and_shifts = 2 * (128 + 256 + 512)
    assert num_parameters(DCGANGenerator) == generator == pytest.approx(3.6e6, rel=0.01)
    expected = {
        "batch": without_bias + scales_and_shifts,
        "instance": without_bias + scales_and_shifts,
        "spectral": with_bias,
        "none": with_bias,
    }
    assert {key: num_parameters(DCGANDiscriminator, normalization=key) for key in NORMALIZATIONS} == expected
    assert expected["batch"] == pytest.approx(2.8e6, rel=0.02)


def test_with_128_channels_the_generator_has_the_widths_of_the_dcgan_paper():
    with torch.device("meta"):
        generator = DCGANGenerator(base_channels=128)
    convolutions = [module for module in generator.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert [(module.in_channels, module.out_channels) for module in convolutions] == pairs(100, 1024, 512, 256, 128, 3)


@pytest.mark.parametrize(
    ("sample_size", "widths"), [(8, (5,)), (16, (5, 10)), (128, (5, 10, 20, 40, 40)), (256, (5, 10, 20, 40, 40, 40))]
)
def test_a_dcgan_doubles_its_channels_up_to_eight_times(sample_size, widths):
    with torch.device("meta"):
        generator = DCGANGenerator(sample_size, base_channels=5)
        discriminator = DCGANDiscriminator(sample_size, base_channels=5)
    up = [module for module in generator.modules() if isinstance(module, nn.ConvTranspose2d)]
    down = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d)]
    assert [(module.in_channels, module.out_channels) for module in up] == pairs(100, *widths[::-1], 3)
    assert [(module.in_channels, module.out_channels) for module in down] == pairs(3, *widths, 1)


def test_study_b_s_networks_have_its_widths_and_its_kernels_of_6_pixels():
    generator = 101 * 512 * 16 * 16 + sum(convolution(*widths, 6) for widths in pairs(512, 256, 128, 64, 32, 3))
    discriminator = sum(convolution(*widths, 6) for widths in pairs(3, 32, 64, 128, 256))
    discriminator += 2 * (64 + 128 + 256) + 256 * 16 * 16 + 1
    assert num_parameters(DCGAN256Generator) == generator
    assert num_parameters(DCGAN256Discriminator) == discriminator
    with torch.device("meta"):
        networks = DCGAN256Generator(), DCGAN256Discriminator()
    kernels = {
        module.kernel_size
        for network in networks
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }
    assert kernels == {(6, 6)}
    assert [module.p for module in networks[1].modules() if isinstance(module, nn.Dropout)] == [0.3]


def residual_block(first: int, second: int) -> int:
    return convolution(first, second, 3) + convolution(second, second, 3)


@pytest.mark.parametrize(
    ("sample_size", "widths"),
    [(8, (7, 14)), (64, (7, 14, 28, 56, 112)), (128, (7, 14, 28, 56, 112, 112))],
)
def test_an_sngan_doubles_its_channels_up_to_sixteen_times(sample_size, widths):
    generator = 129 * widths[-1] * 16 + 2 * widths[0] + convolution(widths[0], 3, 3)
    for fine, coarse in pairs(*widths):
        generator += residual_block(coarse, fine) + convolution(coarse, fine, 1) + 2 * (coarse + fine)
    discriminator = residual_block(widths[-2], widths[-2]) + widths[-2] + 1
    for fine, coarse in pairs(3, *widths[:-1]):
        discriminator += residual_block(fine, coarse) + convolution(fine, coarse, 1)
    assert num_parameters(SNGANGenerator, sample_size, base_channels=7) == generator
    assert num_parameters(SNGANDiscriminator, sample_size, base_channels=7) == discriminator


def test_the_default_sngan_goes_from_64_channels_to_1024():
    with torch.device("meta"):
        generator, discriminator = SNGANGenerator(), SNGANDiscriminator()
    assert generator.config.sample_size == discriminator.config.sample_size == 64
    assert [block.conv1.in_channels for block in generator.blocks] == [1024, 512, 256, 128]
    assert [block.conv1.out_channels for block in discriminator.blocks] == [64, 128, 256, 512]
    assert (generator.conv_out.in_channels, discriminator.linear_out.in_features) == (64, 512)


# ---------------------------------------------------------------------------------------------------- initial weights


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight that is trained: with spectral norm, the one before it."""
    return module.parametrizations.weight.original if is_parametrized(module) else module.weight


def assert_moments(weights: torch.Tensor, mean: float, std: float) -> None:
    """Within five standard errors; the one of a sample's standard deviation is std / sqrt(2 n) for normal numbers."""
    count = weights.numel()
    assert weights.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(count))
    assert weights.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count))


@pytest.mark.parametrize(
    ("network_class", "options"),
    [(DCGANGenerator, {})] + [(DCGANDiscriminator, {"normalization": name}) for name in NORMALIZATIONS],
)
def test_the_initial_weights_of_a_dcgan_are_normal_with_a_standard_deviation_of_0_02(network_class, options):
    torch.manual_seed(0)
    network = network_class(32, base_channels=16, **options)
    scales = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            weight = weight_of(module)
            assert_moments(weight, 0.0, 0.02)
            # Of a normal distribution 4.55% lie beyond two standard deviations, of a uniform one none.
            assert (weight.abs() > 0.04).float().mean().item() == pytest.approx(0.0455, abs=0.02)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
            scales.append(module.weight)
            assert not module.bias.any()
    if options.get("normalization") not in ("spectral", "none"):
        assert_moments(torch.cat(scales), 1.0, 0.02)
    else:
        assert scales == []


@pytest.mark.parametrize("network_class", [SNGANGenerator, SNGANDiscriminator])
def test_the_initial_weights_of_an_sngan_are_glorot_s_with_a_gain_of_root_2_in_the_residual_branches(network_class):
    torch.manual_seed(0)
    layers = dict(network_class(32, base_channels=16).named_modules())
    layers = {key: layer for key, layer in layers.items() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert len(layers) > 10
    for key, layer in layers.items():
        weight = weight_of(layer).detach()
        fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
        gain = math.sqrt(2) if key.endswith(("conv1", "conv2")) else 1
        bound = gain * math.sqrt(6 / (fan_in + fan_out))
        assert_moments(weight, 0.0, bound / math.sqrt(3))
        assert weight.abs().max() <= bound  # uniform
        assert not layer.bias.any()


# ------------------------------------------------------------------------------------------------------ spectral norm


@pytest.mark.parametrize(
    ("name", "options"), [("DCGANDiscriminator", {"normalization": "spectral"}), ("SNGANDiscriminator", {})]
)
def test_spectral_norm_brings_the_largest_singular_value_of_every_weight_to_one(name, options):
    network = tiny(name, base_channels=4, **options).train()
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == (4 if name == "DCGANDiscriminator" else 12)
    with torch.no_grad():
        for seed, layer in enumerate(layers):  # other weights than those it was prepared for
            weight = layer.parametrizations.weight.original
            weight.copy_(draw(*weight.shape, seed=seed) * (1 + seed))
        for _ in range(300):
            network(inputs(name, count=1))
    network.eval()
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "options"), [("DCGANDiscriminator", {"normalization": "spectral"}), ("SNGANDiscriminator", {})]
)
def test_with_spectral_norm_the_scale_of_the_weights_makes_no_difference(name, options):
    network, images = tiny(name, **options), inputs(name)
    before = network(images)
    with torch.no_grad():
        for key, weight in network.named_parameters():
            if not key.endswith("bias"):
                weight *= 7
    torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- what the networks compute, written out plainly


def loaded(oracle: nn.Module, network: nn.Module) -> nn.Module:
    """The oracle in eval mode with the network's parameters and buffers, which have the same order and shapes."""
    state = zip(oracle.state_dict(), network.state_dict().values(), strict=True)
    oracle.load_state_dict(dict(state))
    return oracle.eval()


def assert_same_answers(oracle: nn.Module, network: nn.Module, name: str) -> None:
    expected = loaded(oracle, network)(inputs(name)).flatten(1).squeeze(1)
    answers = network(inputs(name))
    assert answers.std() > 1e-3
    torch.testing.assert_close(answers.flatten(1) if answers.ndim > 1 else answers, expected, rtol=1e-4, atol=1e-5)


def test_the_dcgan_generator_is_a_chain_of_transposed_convolutions_batch_norms_and_relus():
    def up(fine: int, coarse: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(fine), nn.ReLU(), nn.ConvTranspose2d(fine, coarse, 4, 2, 1, bias=False)]

    chain = [nn.Unflatten(1, (6, 1, 1)), nn.ConvTranspose2d(6, 12, 4, 1, 0, bias=False)]
    chain += [*up(12, 6), *up(6, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.ConvTranspose2d(3, 3, 4, 2, 1), nn.Tanh()]
    assert_same_answers(nn.Sequential(*chain), tiny("DCGANGenerator"), "DCGANGenerator")


@pytest.mark.parametrize("normalization", ["batch", "instance", "none"])
def test_the_dcgan_discriminator_is_a_chain_of_convolutions_normalisations_and_leaky_relus(normalization):
    def down(fine: int, coarse: int) -> list[nn.Module]:
        if normalization == "none":
            return [nn.Conv2d(fine, coarse, 4, 2, 1), nn.LeakyReLU(0.2)]
        norm = nn.BatchNorm2d(coarse) if normalization == "batch" else nn.InstanceNorm2d(coarse, affine=True)
        return [nn.Conv2d(fine, coarse, 4, 2, 1, bias=False), norm, nn.LeakyReLU(0.2)]

    chain = [nn.Conv2d(3, 3, 4, 2, 1), nn.LeakyReLU(0.2), *down(3, 6), *down(6, 12), nn.Conv2d(12, 1, 4)]
    network = tiny("DCGANDiscriminator", normalization=normalization)
    assert_same_answers(nn.Sequential(*chain), network, "DCGANDiscriminator")


def test_spectral_norm_alone_distinguishes_the_spectral_dcgan_discriminator_from_the_one_without():
    network = tiny("DCGANDiscriminator", normalization="spectral")
    plain = tiny("DCGANDiscriminator", normalization="none")
    layers = dict(network.named_modules())
    convolutions = {key: layer for key, layer in plain.named_modules() if isinstance(layer, nn.Conv2d)}
    assert list(convolutions) == ["conv_in", "blocks.0", "blocks.2", "conv_out"]
    with torch.no_grad():
        for key, layer in convolutions.items():
            assert is_parametrized(layers[key], "weight") and not is_parametrized(layer)
            layer.weight.copy_(layers[key].weight)
            layer.bias.copy_(layers[key].bias)
    torch.testing.assert_close(network(inputs("DCGANDiscriminator")), plain(inputs("DCGANDiscriminator")))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_normalisation_of_features_stands_behind_every_convolution_but_the_first_and_the_last(normalization):
    network = tiny("DCGANDiscriminator", 64, normalization=normalization)
    norms = {"batch": [nn.BatchNorm2d], "instance": [nn.InstanceNorm2d]}.get(normalization, [])
    expected = [nn.Conv2d, *norms, nn.LeakyReLU] * 3
    assert len(network.blocks) == len(expected)
    assert all(isinstance(module, kind) for module, kind in zip(network.blocks, expected, strict=True))
    assert not [module for module in (network.conv_in, network.conv_out) if not isinstance(module, nn.Conv2d)]


def test_study_b_s_generator_is_a_dense_layer_and_a_chain_of_convolutions_with_leaky_relus():
    chain = [nn.Linear(6, 32 * 4), nn.Unflatten(1, (32, 2, 2))]
    for wide, narrow in pairs(32, 16, 8, 4, 2):
        chain += [nn.ConvTranspose2d(wide, narrow, 6, 2, 2), nn.LeakyReLU(0.2)]
    chain += [nn.Conv2d(2, 3, 6, padding="same"), nn.Tanh()]
    assert_same_answers(nn.Sequential(*chain), tiny("DCGAN256Generator"), "DCGAN256Generator")


def test_study_b_s_discriminator_is_a_chain_of_convolutions_with_batch_norms_from_the_second_on():
    network, images = tiny("DCGAN256Discriminator"), inputs("DCGAN256Discriminator")
    hidden_states = nn.functional.leaky_relu(network.convs[0](images), 0.2)
    assert len(network.convs) == len(network.norms) == 4
    for conv, norm in zip(network.convs[1:], network.norms[1:], strict=True):
        assert isinstance(norm, nn.BatchNorm2d)
        hidden_states = nn.functional.leaky_relu(norm(conv(hidden_states)), 0.2)
    assert hidden_states.shape == (3, 24, 2, 2)
    expected = hidden_states.flatten(1) @ network.linear_out.weight[0] + network.linear_out.bias
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def double(images: torch.Tensor) -> torch.Tensor:
    return interpolate(images, scale_factor=2, mode="nearest")


def up_block_as_in_the_paper(block: UpBlock, hidden_states: torch.Tensor) -> torch.Tensor:
    """Figure 8: the shortcut, too, is enlarged first and then convolved."""
    residual = block.conv1(double(relu(block.norm1(hidden_states))))
    return block.conv2(relu(block.norm2(residual))) + block.shortcut(double(hidden_states))


def down_block_as_in_the_paper(block: DownBlock, hidden_states: torch.Tensor) -> torch.Tensor:
    """The shortcut is convolved first and then shrunk."""
    residual = block.conv2(relu(block.conv1(hidden_states if block.first else relu(hidden_states))))
    shortcut = hidden_states if block.shortcut is None else block.shortcut(hidden_states)
    return avg_pool2d(residual, 2) + avg_pool2d(shortcut, 2) if block.halve else residual + shortcut


def test_the_blocks_of_the_sngan_generator_are_the_paper_s_though_they_convolve_before_they_enlarge():
    network, latents = tiny("SNGANGenerator").double(), draw(3, 6).double()
    hidden_states = network.stem(latents).reshape(3, 24, 4, 4)
    assert len(network.blocks) == 3
    for block in network.blocks:
        expected = up_block_as_in_the_paper(block, hidden_states)
        torch.testing.assert_close(block(hidden_states), expected)
        hidden_states = expected
    assert hidden_states.shape == (3, 3, 32, 32)
    expected = network.conv_out(relu(network.norm_out(hidden_states))).tanh()
    torch.testing.assert_close(network(latents), expected)


def test_the_blocks_of_the_sngan_discriminator_are_the_paper_s_though_they_shrink_before_they_convolve():
    network, hidden_states = tiny("SNGANDiscriminator").double(), inputs("SNGANDiscriminator").double()
    images = hidden_states
    blocks = [*network.blocks, network.last_block]
    assert [block.first for block in blocks] == [True, False, False, False]
    assert [block.halve for block in blocks] == [True, True, True, False]
    assert [block.shortcut is None for block in blocks] == [False, False, False, True]
    for block in blocks:
        expected = down_block_as_in_the_paper(block, hidden_states)
        torch.testing.assert_close(block(hidden_states), expected)
        hidden_states = expected
    assert hidden_states.shape == (3, 12, 4, 4)
    pixels = relu(hidden_states).flatten(2).sum(dim=2)
    expected = pixels @ network.linear_out.weight[0] + network.linear_out.bias
    torch.testing.assert_close(network(images), expected)


@pytest.mark.parametrize(("in_channels", "halve", "convolved"), [(4, True, True), (5, False, True), (4, False, False)])
def test_a_down_block_has_a_shortcut_of_its_own_where_the_shape_changes(in_channels, halve, convolved):
    torch.manual_seed(0)
    block = DownBlock(in_channels, 4, first=False, halve=halve).double().eval()
    hidden_states = draw(2, in_channels, 6, 6).double()
    assert (block.shortcut is not None) == convolved
    torch.testing.assert_close(block(hidden_states), down_block_as_in_the_paper(block, hidden_states))
