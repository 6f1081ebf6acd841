"""The generators and discriminators of GANs: widths, numbers of weights, initial weights, spectral norm."""

import math

import pytest
import torch
from tiny_gans import NORMALIZATIONS, draw, inputs, tiny
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from hfgen.models import (
    DCGAN256Discriminator,
    DCGAN256Generator,
    DCGANDiscriminator,
    DCGANGenerator,
    SNGANConvDiscriminator,
    SNGANConvGenerator,
    SNGANDiscriminator,
    SNGANGenerator,
)


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


def test_the_convolutional_sngan_has_the_widths_of_table_3_at_32_pixels():
    with torch.device("meta"):
        generator, discriminator = SNGANConvGenerator(32), SNGANConvDiscriminator(32)
    shape = [
        (module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0])
        for module in discriminator.modules()
        if isinstance(module, nn.Conv2d)
    ]
    assert shape == [
        *[(3, 64, 3, 1), (64, 64, 4, 2), (64, 128, 3, 1), (128, 128, 4, 2)],
        *[(128, 256, 3, 1), (256, 256, 4, 2), (256, 512, 3, 1)],
    ]
    up = [module for module in generator.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert (generator.stem.in_features, generator.stem.out_features) == (128, 512 * 16)
    assert [(module.in_channels, module.out_channels) for module in up] == pairs(512, 256, 128, 64)


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
            # 4.55% of a normal distribution lie beyond two standard deviations, and nothing of a uniform one.
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
def test_sngan_weights_start_as_glorot_s_with_gain_root_2_in_residual_branches(network_class):
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
    ("name", "options"),
    [
        ("DCGANDiscriminator", {"normalization": "spectral", "spectral_scale": 1.0}),
        ("DCGANDiscriminator", {"normalization": "spectral"}),
        ("SNGANConvDiscriminator", {"normalization": "spectral", "spectral_scale": 1.0}),
        ("SNGANConvDiscriminator", {"normalization": "spectral"}),
        ("SNGANDiscriminator", {}),
    ],
)
def test_spectral_norm_sets_the_largest_singular_value_of_every_weight(name, options):
    network = tiny(name, base_channels=4, **options).train()
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == {"DCGANDiscriminator": 4, "SNGANConvDiscriminator": 8, "SNGANDiscriminator": 12}[name]
    expected = network.config.get("spectral_scale", 1)
    with torch.no_grad():
        for seed, layer in enumerate(layers):  # other weights than those it was prepared for
            weight = layer.parametrizations.weight.original
            weight.copy_(draw(*weight.shape, seed=seed) * (1 + seed))
        for _ in range(300):
            network(inputs(name, count=1))
    network.eval()
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert norm == pytest.approx(expected, abs=1e-3 * expected)


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
