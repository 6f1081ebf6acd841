"""The generators and discriminators of GANs against what they compute, written out plainly."""

import itertools

import pytest
import torch
from tiny_gans import NORMALIZATIONS, draw, inputs, tiny
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate, relu
from torch.nn.utils.parametrize import is_parametrized

from hfgen.models.sngan import DownBlock, UpBlock


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


def test_the_dcgan_generator_chains_transposed_convolutions_batch_norms_and_relus():
    def up(fine: int, coarse: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(fine), nn.ReLU(), nn.ConvTranspose2d(fine, coarse, 4, 2, 1, bias=False)]

    chain = [nn.Unflatten(1, (6, 1, 1)), nn.ConvTranspose2d(6, 12, 4, 1, 0, bias=False)]
    chain += [*up(12, 6), *up(6, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.ConvTranspose2d(3, 3, 4, 2, 1), nn.Tanh()]
    assert_same_answers(nn.Sequential(*chain), tiny("DCGANGenerator"), "DCGANGenerator")


@pytest.mark.parametrize("normalization", ["batch", "instance", "none"])
def test_the_dcgan_discriminator_chains_convolutions_norms_and_leaky_relus(normalization):
    def down(fine: int, coarse: int) -> list[nn.Module]:
        if normalization == "none":
            return [nn.Conv2d(fine, coarse, 4, 2, 1), nn.LeakyReLU(0.2)]
        norm = nn.BatchNorm2d(coarse) if normalization == "batch" else nn.InstanceNorm2d(coarse, affine=True)
        return [nn.Conv2d(fine, coarse, 4, 2, 1, bias=False), norm, nn.LeakyReLU(0.2)]

    chain = [nn.Conv2d(3, 3, 4, 2, 1), nn.LeakyReLU(0.2), *down(3, 6), *down(6, 12), nn.Conv2d(12, 1, 4)]
    network = tiny("DCGANDiscriminator", normalization=normalization)
    assert_same_answers(nn.Sequential(*chain), network, "DCGANDiscriminator")


def test_the_spectral_dcgan_discriminator_differs_by_its_spectral_norm_alone():
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
def test_every_convolution_but_the_first_and_the_last_is_followed_by_a_normalisation(normalization):
    network = tiny("DCGANDiscriminator", 64, normalization=normalization)
    norms = {"batch": [nn.BatchNorm2d], "instance": [nn.InstanceNorm2d]}.get(normalization, [])
    expected = [nn.Conv2d, *norms, nn.LeakyReLU] * 3
    assert len(network.blocks) == len(expected)
    assert all(isinstance(module, kind) for module, kind in zip(network.blocks, expected, strict=True))
    assert not [module for module in (network.conv_in, network.conv_out) if not isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("upsampling", ["transposed", "nearest"])
def test_the_sngan_generator_ends_with_a_convolution_at_full_resolution(upsampling):
    def up(coarse: int, fine: int) -> list[nn.Module]:
        if upsampling == "transposed":
            doubling = [nn.ConvTranspose2d(coarse, fine, 4, 2, 1, bias=False)]
        else:
            doubling = [nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(coarse, fine, 3, 1, 1, bias=False)]
        return [*doubling, nn.BatchNorm2d(fine), nn.ReLU()]

    class ChannelsFirst(nn.Module):  # the dense layer's numbers are pixel by pixel
        def forward(self, stem: torch.Tensor) -> torch.Tensor:
            return stem.unflatten(1, (16, 24)).transpose(1, 2).unflatten(2, (4, 4))

    chain = [nn.Linear(6, 24 * 16), ChannelsFirst(), *up(24, 12), *up(12, 6), *up(6, 3), nn.Conv2d(3, 3, 3, 1, 1)]
    network = tiny("SNGANConvGenerator", upsampling=upsampling)
    assert_same_answers(nn.Sequential(*chain, nn.Tanh()), network, "SNGANConvGenerator")


@pytest.mark.parametrize("normalization", ["batch", "instance", "none"])
def test_the_sngan_discriminator_halves_by_kernels_of_4_pixels_between_kernels_of_3(normalization):
    def convolution(fine: int, coarse: int, *shape: int) -> list[nn.Module]:
        if normalization == "none":
            return [nn.Conv2d(fine, coarse, *shape), nn.LeakyReLU(0.1)]
        norm = nn.BatchNorm2d(coarse) if normalization == "batch" else nn.InstanceNorm2d(coarse, affine=True)
        return [nn.Conv2d(fine, coarse, *shape, bias=False), norm, nn.LeakyReLU(0.1)]

    chain = [nn.Conv2d(3, 3, 3, 1, 1), nn.LeakyReLU(0.1)]
    for fine, coarse in ((3, 6), (6, 12), (12, 24)):
        chain += [*convolution(fine, fine, 4, 2, 1), *convolution(fine, coarse, 3, 1, 1)]
    chain += [nn.Flatten(), nn.Linear(24 * 16, 1)]
    network = tiny("SNGANConvDiscriminator", normalization=normalization)
    assert_same_answers(nn.Sequential(*chain), network, "SNGANConvDiscriminator")


def test_study_b_s_generator_is_a_dense_layer_and_convolutions_with_leaky_relus():
    chain = [nn.Linear(6, 32 * 4), nn.Unflatten(1, (32, 2, 2))]
    for wide, narrow in itertools.pairwise((32, 16, 8, 4, 2)):
        chain += [nn.ConvTranspose2d(wide, narrow, 6, 2, 2), nn.LeakyReLU(0.2)]
    chain += [nn.Conv2d(2, 3, 6, padding="same"), nn.Tanh()]
    assert_same_answers(nn.Sequential(*chain), tiny("DCGAN256Generator"), "DCGAN256Generator")


def test_study_b_s_discriminator_has_batch_norm_from_its_second_convolution_on():
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


def test_sngan_generator_blocks_equal_the_paper_s_though_they_convolve_first():
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


def test_sngan_discriminator_blocks_equal_the_paper_s_though_they_pool_first():
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
