"""What the compact U-Net adds to diffusers' blocks: patches, attention by size, branches that start at zero."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from hfgen.models import UNetCompact


SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1}


def awake(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode with random last layers, which start at zero."""
    torch.manual_seed(seed)
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.1)
    return network.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_an_untrained_network_predicts_zero_and_its_blocks_are_the_identity():
    network = UNetCompact(16, **SMALL).eval()
    assert not network(noise(2, 3, 16, 16), 5).sample.any()
    blocks = [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
    same = [block for block in blocks if block.conv_shortcut is None]
    assert same
    for block in same:
        images, embedded = noise(1, block.in_channels, 8, 8), noise(1, 32)
        assert torch.equal(block(images, embedded), images)
    attentions = [module for module in network.modules() if isinstance(module, Attention)]
    assert attentions
    for attention in attentions:
        images = noise(1, attention.to_q.in_features, 4, 4)
        assert torch.equal(attention(images), images)


@pytest.mark.parametrize(
    ("sample_size", "patch_size", "attention_size", "expected"),
    # Levels of 32 and 16 pixels; of 16 and 8 patches. A level that has attention has one down and two up; one between.
    [(32, 1, 8, 0), (32, 1, 16, 4), (32, 1, 32, 7), (32, 2, 8, 4), (32, 2, 16, 7)],
)
def test_levels_of_few_pixels_have_attention(sample_size, patch_size, attention_size, expected):
    network = UNetCompact(sample_size, patch_size=patch_size, attention_size=attention_size, **SMALL)
    assert sum(isinstance(module, Attention) for module in network.modules()) == expected
    assert network(noise(1, 3, sample_size, sample_size), 3).sample.shape == (1, 3, sample_size, sample_size)


def test_a_patch_is_told_apart_from_its_neighbours_and_each_pixel_in_it():
    network = awake(UNetCompact(8, patch_size=2, block_out_channels=(4,), layers_per_block=1, attention_size=0))
    network.unet.conv_in = nn.Conv2d(12, 4, 1, bias=False)  # no pixel of a neighbouring patch
    images = noise(1, 3, 8, 8)
    shown = []
    network.unet.conv_in.register_forward_hook(lambda module, inputs, output: shown.append((inputs[0], output)))
    changed = images.clone()
    changed[0, 1, 4, 7] += 1
    network(images, 3), network(changed, 3)
    (before, seen), (after, seen_changed) = shown
    assert before.shape == (1, 12, 4, 4)
    assert (before != after).sum() == 1
    assert (seen != seen_changed).any(dim=1).nonzero().tolist() == [[0, 2, 3]]


def test_patches_of_one_pixel_are_the_network_of_diffusers():
    network, images = awake(UNetCompact(16, **SMALL)), noise(2, 3, 16, 16)
    assert torch.equal(network(images, 7).sample, network.unet(images, 7).sample)


def test_timesteps_are_scaled_before_they_are_embedded():
    slow, fast = (awake(UNetCompact(16, time_scale=scale, **SMALL)) for scale in (1.0, 1000.0))
    images = noise(2, 3, 16, 16)
    level = torch.tensor([-0.4, 0.25])  # of EDM
    torch.testing.assert_close(fast(images, level).sample, slow(images, 1000 * level).sample)
    moved = {
        network: (network(images, level).sample - network(images, level + 0.01).sample).abs().max()
        for network in (slow, fast)
    }
    assert moved[fast] > 20 * moved[slow]


def test_activations_are_dropped_in_training_alone():
    network, images = awake(UNetCompact(16, dropout=0.5, **SMALL)), noise(2, 3, 16, 16)
    assert torch.equal(network(images, 7).sample, network(images, 7).sample)
    network.train()
    assert not torch.equal(network(images, 7).sample, network(images, 7).sample)


@pytest.mark.parametrize("options", [{"patch_size": 0}, {"layers_per_block": 0}, {"block_out_channels": (8, 0)}])
def test_what_must_be_positive_is_named(options):
    with pytest.raises(ValueError, match="must be positive") as refusal:
        UNetCompact(16, **{**SMALL, **options})
    assert all(name in str(refusal.value) for name in options)


def test_no_group_is_of_one_channel():
    network = awake(UNetCompact(16, block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1))
    assert network(noise(1, 3, 16, 16), 3).sample.shape == (1, 3, 16, 16)  # the coarsest level has one pixel
    groups = {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}
    assert groups == {16}


def test_a_plain_number_is_scaled_as_a_tensor_is():
    network, images = awake(UNetCompact(16, time_scale=1000.0, **SMALL)), noise(1, 3, 16, 16)
    assert torch.equal(network(images, 0.1234).sample, network(images, torch.tensor(0.1234)).sample)
