"""The U-Nets; the networks of GANs are in `test_gan_models.py`, all others in `test_vae_model.py`."""

import ast
import inspect
import re
from collections import defaultdict
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

import hfgen.models
from hfgen.models.unet_attention import AttentionBlock, UNetAttention
from hfgen.models.unet_base import UNetBase


# Each U-Net as small as it gets with five levels, as its default has: the smallest side is 16. A U-Net that joins
# `hfgen.models` joins this table. The options are not the defaults, so that one that is lost on reload shows.
TINY = {
    "UNetBase": {"block_out_channels": (2, 4, 4, 6, 8), "time_embedding_dim": 10},
    "UNetAttention": {
        "block_out_channels": (2, 4, 4, 6, 8),
        "time_embedding_dim": 10,
        "num_attention_heads": 2,
        "max_attention_size": 8,
    },
    "UNetCompact": {
        "block_out_channels": (4, 4, 8, 8),
        "layers_per_block": 1,
        "patch_size": 2,
        "attention_size": 8,
        "dropout": 0.2,
        "time_scale": 2.0,
    },
}
UNETS = [name for name in hfgen.models.__all__ if name.startswith("UNet")]
every_network = pytest.mark.parametrize("name", UNETS)
every_plain_network = pytest.mark.parametrize("name", ["UNetBase", "UNetAttention"])


def tiny(name: str, sample_size: int = 32, seed: int = 0, **options) -> nn.Module:
    """An untrained network in eval mode whose BatchNorm statistics are not the initial ones."""
    torch.manual_seed(seed)
    network = getattr(hfgen.models, name)(sample_size, **{**TINY[name], **options})
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.02, 0.1)
    for weight in network.parameters():
        if name == "UNetCompact" and not weight.any():  # its last layers, which would hide all others
            nn.init.normal_(weight, std=0.1)
    return network.eval()


def noisy_images(batch_size: int = 2, size: int = 32, channels: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, channels, size, size, generator=torch.Generator().manual_seed(seed))


def attention_channels(network: nn.Module) -> list[int]:
    """The width of each attention block: it tells the level."""
    return sorted(block.to_out.in_features for block in network.modules() if isinstance(block, AttentionBlock))


def test_every_network_has_a_tiny_configuration_here():
    assert TINY.keys() == set(UNETS)


# ----------------------------------------------------------------------------------------------- shapes and timesteps


@every_network
@pytest.mark.parametrize("size", [16, 32, 64, 96])
def test_the_prediction_has_the_shape_of_the_images_at_every_size(name, size):
    images = noisy_images(size=size)
    output = tiny(name, size)(images, torch.tensor([3, 900])).sample
    assert output.shape == images.shape
    assert output.dtype == torch.float32


@every_network
def test_a_network_works_on_256_pixels(name):
    with torch.no_grad():
        assert tiny(name, 256)(noisy_images(1, 256), 5).sample.shape == (1, 3, 256, 256)


@every_network
def test_input_and_output_channels_are_chosen_separately(name):
    network = tiny(name, in_channels=4, out_channels=5)
    assert network(noisy_images(channels=4), 7).sample.shape == (2, 5, 32, 32)


@every_network
def test_one_timestep_for_all_agrees_with_a_batch_of_it_whatever_its_type(name):
    network, images = tiny(name), noisy_images(3)
    expected = network(images, torch.tensor([417, 417, 417])).sample
    for timestep in (417, 417.0, torch.tensor(417), torch.tensor([417])):
        assert torch.equal(network(images, timestep).sample, expected), repr(timestep)


@every_network
def test_each_image_of_a_batch_has_its_own_timestep(name):
    network, images = tiny(name).double(), noisy_images(3).double()
    timesteps = torch.tensor([2, 700, 31])
    together = network(images, timesteps).sample
    for index in range(3):
        alone = network(images[index : index + 1], timesteps[index]).sample
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-6, atol=1e-6)


@every_network
@pytest.mark.parametrize(("one", "other"), [(0, 1), (100, 900), (998, 999)])
def test_the_prediction_depends_on_the_timestep(name, one, other):
    network, images = tiny(name), noisy_images()
    assert (network(images, one).sample - network(images, other).sample).abs().max() > 1e-3


@every_plain_network
def test_the_timestep_reaches_every_block(name):
    network, images = tiny(name), noisy_images()
    blocks = [module for module in network.modules() if hasattr(module, "time_emb_proj")]
    assert len(blocks) == 9  # four levels down, the middle, four levels up
    before = network(images, 300).sample
    for block in blocks:
        bias = block.time_emb_proj.bias.detach().clone()
        with torch.no_grad():
            block.time_emb_proj.bias += 1
            assert not torch.equal(network(images, 300).sample, before)
            block.time_emb_proj.bias.copy_(bias)


@every_network
def test_without_return_dict_the_same_prediction_comes_as_a_tuple(name):
    network, images = tiny(name), noisy_images()
    output = network(images, 9, return_dict=False)
    assert isinstance(output, tuple)
    assert len(output) == 1
    assert torch.equal(output[0], network(images, 9).sample)


# -------------------------------------------------------------------------------------------------- what gets trained


@every_network
def test_every_parameter_gets_a_gradient(name):
    network = tiny(name).train()
    output = network(noisy_images(4), torch.tensor([5, 250, 600, 990])).sample
    (output * noisy_images(4, seed=2)).mean().backward()
    dead = [key for key, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert dead == []


@every_plain_network
def test_the_skip_connection_of_every_level_matters(name):
    network, images = tiny(name), noisy_images()
    before = network(images, 50).sample
    assert len(network.up_blocks) == 4
    for block in network.up_blocks:
        weight = block.conv1.weight.detach().clone()
        with torch.no_grad():
            block.conv1.weight[:, weight.shape[1] // 2 :] = 0  # the second half of the channels: those from the left
            assert (network(images, 50).sample - before).abs().max() > 1e-4
            block.conv1.weight.copy_(weight)


@every_plain_network
def test_the_finest_skip_connection_alone_still_shows_the_image(name):
    network = tiny(name)
    images, other_images = noisy_images(seed=1), noisy_images(seed=2)
    with torch.no_grad():
        network.upsamplers[-1].weight.zero_()  # nothing of the coarser levels arrives
        assert (network(images, 50).sample - network(other_images, 50).sample).abs().max() > 1e-2


@every_plain_network
def test_every_batch_norm_follows_a_relu_and_ends_its_block(name):
    network, shown = tiny(name).train(), []
    blocks = [module for module in network.modules() if hasattr(module, "time_emb_proj")]
    for block in blocks:
        for norm in block.norm1, block.norm2:
            norm.register_forward_pre_hook(lambda norm, inputs: shown.append(inputs[0].min().item()))
        block.register_forward_hook(lambda block, inputs, output: means.append(output.mean(dim=(0, 2, 3))))
    means = []
    network(noisy_images(4), torch.tensor([5, 250, 600, 990]))
    assert shown == [0.0] * 2 * len(blocks)
    assert torch.cat(means).abs().max() < 1e-4


def convolution(fine: int, coarse: int, size: int) -> int:
    return fine * coarse * size**2 + coarse


def block(fine: int, coarse: int) -> int:
    norms = 2 * 2 * coarse
    return convolution(fine, coarse, 3) + convolution(coarse, coarse, 3) + norms + (32 + 1) * coarse


def attention(width: int) -> int:
    norms, linear = 2 * 2 * width, width**2 + width
    return norms + 3 * linear + linear + 2 * linear


def test_the_default_networks_have_the_documented_widths_and_numbers_of_weights():
    widths = (64, 128, 256, 512, 1024)
    base = (32 + 1) * 32 + convolution(3, 64, 3) + block(1024, 1024) + convolution(64, 3, 1)
    for fine, coarse in zip(widths[:-1], widths[1:], strict=True):
        base += block(fine, fine) + block(2 * fine, fine) + 2 * convolution(fine, coarse, 4) - coarse + fine
    # 64 pixels a side: no attention at the finest level, then on the way down and up at 32, 16 and 8, once at 4.
    with_attention = base + attention(1024) + 2 * sum(attention(width) for width in (128, 256, 512))
    with torch.device("meta"):
        counts = {name: getattr(hfgen.models, name)().num_parameters() for name in ("UNetBase", "UNetAttention")}
    assert counts == {"UNetBase": base, "UNetAttention": with_attention}


# ----------------------------------------------------------------------------------------------- saving, and settings


@every_network
def test_a_saved_and_reloaded_network_predicts_the_same_bit_for_bit(name, tmp_path):
    network, images = tiny(name), noisy_images()
    network.save_pretrained(tmp_path)
    reloaded = type(network).from_pretrained(tmp_path)
    assert not reloaded.training
    assert torch.equal(reloaded(images, 123).sample, network(images, 123).sample)


@every_network
def test_every_argument_is_in_the_config(name):
    arguments = inspect.signature(type(tiny(name)).__init__).parameters.keys() - {"self"}
    config = tiny(name).config
    assert arguments <= config.keys()
    assert all(list(config[key]) == list(value) for key, value in TINY[name].items() if isinstance(value, tuple))
    assert all(config[key] == value for key, value in TINY[name].items() if not isinstance(value, tuple))


@every_network
@pytest.mark.parametrize("size", [-16, 0, 1, 8, 15, 24, 40, 100])
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(name, size):
    with pytest.raises(ValueError, match=f"sample_size={size} does not fit .*multiple of 16") as refusal:
        tiny(name, size)
    (suggestion,) = re.findall(r"for example (\d+)", str(refusal.value))
    assert tiny(name, int(suggestion)).config.sample_size == int(suggestion)
    assert size < 16 or abs(int(suggestion) - size) <= 8


@every_network
def test_fewer_levels_allow_more_sizes(name):
    network = tiny(name, 24, block_out_channels=(2, 4, 4))
    assert network(noisy_images(size=24), 1).sample.shape == (2, 3, 24, 24)


@every_network
def test_a_network_runs_in_the_ddpm_pipeline_of_diffusers_itself(name):
    pipeline = diffusers.DDPMPipeline(tiny(name, 16), diffusers.DDPMScheduler(num_train_timesteps=10))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np"
    ).images
    assert images.shape == (2, 16, 16, 3)
    assert 0 <= images.min() < images.max() <= 1


# ---------------------------------------------------------------------------------------------------------- attention


def attention_block(channels: int = 8, heads: int = 2) -> AttentionBlock:
    torch.manual_seed(3)
    return AttentionBlock(channels, heads).eval()


def test_attention_is_the_prenorm_encoder_layer_of_torch():
    block = attention_block(12, 3)
    layer = nn.TransformerEncoderLayer(
        12, 3, dim_feedforward=12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    with torch.no_grad():
        for norm in block.norm1, block.norm2:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": block.to_qkv.weight,
            "self_attn.in_proj_bias": block.to_qkv.bias,
            "self_attn.out_proj.weight": block.to_out.weight,
            "self_attn.out_proj.bias": block.to_out.bias,
            "norm1.weight": block.norm1.weight,
            "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight,
            "norm2.bias": block.norm2.bias,
            "linear1.weight": block.feed_forward[0].weight,
            "linear1.bias": block.feed_forward[0].bias,
            "linear2.weight": block.feed_forward[2].weight,
            "linear2.bias": block.feed_forward[2].bias,
        }
    )
    images = 3 * noisy_images(2, 5, channels=12)
    pixels = images.flatten(2).transpose(1, 2)
    expected = layer(pixels).transpose(1, 2).unflatten(2, (5, 5))
    torch.testing.assert_close(block(images), expected, rtol=1e-4, atol=1e-5)


def test_attention_knows_no_places_permuted_pixels_give_permuted_answers():
    block, images = attention_block(), noisy_images(2, 6, channels=8)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    permuted = images.flatten(2)[:, :, order].unflatten(2, (6, 6))
    expected = block(images).flatten(2)[:, :, order].unflatten(2, (6, 6))
    torch.testing.assert_close(block(permuted), expected, rtol=1e-4, atol=1e-5)


def test_attention_reaches_every_pixel_of_its_own_image_and_no_other_image():
    block, images = attention_block(), noisy_images(2, 4, channels=8)
    changed = images.clone()
    changed[0, 3, 1, 2] += 5
    moved = (block(changed) - block(images)).abs().amax(dim=1)
    assert moved[0].min() > 1e-4
    assert moved[1].max() == 0


@pytest.mark.parametrize(
    ("max_attention_size", "channels"),
    [(15, []), (16, [16]), (32, [8, 8, 16]), (63, [8, 8, 16]), (64, [4, 4, 8, 8, 16])],
)
def test_levels_above_max_attention_size_have_no_attention(max_attention_size, channels):
    network = UNetAttention(64, block_out_channels=(4, 8, 16), max_attention_size=max_attention_size)
    assert attention_channels(network) == channels
    assert network(noisy_images(1, 64), 4).sample.shape == (1, 3, 64, 64)


def test_attention_joins_corners_that_are_too_far_apart_for_the_convolutions():
    images = noisy_images(1).double()
    changed = images.clone()
    changed[..., :4, :4] *= -1
    torch.manual_seed(0)
    moved = {}
    for network_class in UNetBase, UNetAttention:
        network = network_class(32, block_out_channels=(4, 8)).double().eval()
        with torch.no_grad():
            corners = (network(changed, 4).sample - network(images, 4).sample)[..., -1, -1]
        moved[network_class] = corners.abs().amin().item()
    assert moved[UNetBase] == 0
    assert moved[UNetAttention] > 1e-8


def test_without_what_its_attention_adds_the_attention_network_is_the_base_network():
    widths = {"block_out_channels": (4, 8, 12), "time_embedding_dim": 6}
    torch.manual_seed(0)
    base = UNetBase(32, **widths).eval()
    network = UNetAttention(32, **widths, max_attention_size=32).eval()
    loaded = network.load_state_dict(base.state_dict(), strict=False)
    assert loaded.unexpected_keys == []
    assert all("attention" in key for key in loaded.missing_keys)
    images = noisy_images()
    expected = base(images, 77).sample
    assert (network(images, 77).sample - expected).abs().max() > 1e-3
    for attention in network.modules():
        if isinstance(attention, AttentionBlock):
            for last in attention.to_out, attention.feed_forward[-1]:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
    assert torch.equal(network(images, 77).sample, expected)


def test_the_number_of_heads_makes_a_difference_with_the_same_weights():
    images, predictions = noisy_images(), []
    for heads in 1, 2, 4:
        torch.manual_seed(0)
        network = UNetAttention(32, block_out_channels=(4, 8), num_attention_heads=heads).eval()
        predictions.append(network(images, 30).sample)
    assert all((other - predictions[0]).abs().max() > 1e-5 for other in predictions[1:])
    assert (predictions[1] - predictions[2]).abs().max() > 1e-5


@pytest.mark.parametrize(("widths", "heads"), [((6, 8), 4), ((8, 12), 8), ((3, 6, 9), 2)])
def test_heads_that_do_not_divide_the_channels_are_refused_by_name(widths, heads):
    message = re.escape(f"block_out_channels={widths} must all be multiples of num_attention_heads={heads}")
    with pytest.raises(ValueError, match=message):
        UNetAttention(32, block_out_channels=widths, num_attention_heads=heads)


# ------------------------------------------------------------------------------------------------------------ sources


def test_a_class_in_two_model_files_has_the_same_source_in_both():
    sources = defaultdict(set)
    found = defaultdict(list)
    for file in Path(hfgen.models.__file__).parent.glob("*.py"):
        text = file.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                sources[node.name].add(ast.get_source_segment(text, node))
                found[node.name].append(file.name)
    assert len(found["ConvBlock"]) > 1
    assert {name: found[name] for name, texts in sources.items() if len(texts) > 1} == {}


@pytest.mark.parametrize("network", [UNetBase, UNetAttention])
@pytest.mark.parametrize("dim", [0, 2, 3, 7])
def test_an_embedding_of_the_timestep_that_cannot_be_computed_is_refused(network, dim):
    with pytest.raises(ValueError, match=f"time_embedding_dim={dim} must be an even number, at least 4"):
        network(8, block_out_channels=(4, 8), time_embedding_dim=dim)
