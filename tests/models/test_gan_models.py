"""The generators and discriminators of GANs: what goes in and out, gradients, saving."""

import copy
import inspect

import pytest
import torch
from accelerate import cpu_offload
from tiny_gans import (
    DISCRIMINATORS,
    GENERATORS,
    NORMALIZATIONS,
    TINY,
    draw,
    every_discriminator,
    every_generator,
    every_variant,
    inputs,
    smallest,
    tiny,
)
from torch import nn

import hfgen.models
from hfgen.models import (
    DCGAN256Generator,
    DCGANDiscriminator,
    SNGANConvDiscriminator,
    SNGANConvGenerator,
)


def test_every_generator_and_discriminator_has_a_tiny_configuration_here():
    assert TINY.keys() == {name for name in hfgen.models.__all__ if name.endswith(("Generator", "Discriminator"))}


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
def test_in_training_logits_depend_on_the_batch_only_with_batch_norm(name, options, mixes):
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
def test_the_gradient_with_respect_to_the_images_trains_every_weight_in_it(name, options, mixes):
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
    # Where safetensors maps them to, some CPUs' matrix products would end in other last bits.
    assert all(weight.data_ptr() % 64 == 0 for weight in (*reloaded.parameters(), *reloaded.buffers()))
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
    with pytest.raises(ValueError, match=f"sample_size={size} must be a power of two, at least 8, such as 64:"):
        tiny(name, size)


@pytest.mark.parametrize("name", ["DCGAN256Generator", "DCGAN256Discriminator"])
@pytest.mark.parametrize("size", [-16, 0, 1, 8, 15, 24, 40, 100])
def test_a_size_that_is_no_multiple_of_16_is_refused_by_the_networks_of_study_b(name, size):
    with pytest.raises(ValueError, match=f"sample_size={size} must be a multiple of 16"):
        tiny(name, size)


@every_generator
def test_a_generator_whose_weights_are_moved_in_for_each_layer_draws_the_same(name):
    """As `enable_sequential_cpu_offload` does; the hooks are those of the layers."""
    generator = tiny(name).eval()
    latents = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = generator(latents)
        cpu_offload(generator, torch.device("cpu"))
        assert torch.equal(generator(latents), expected)


@pytest.mark.parametrize("stem_channels", [-16, 0, 8, 24, 100])
def test_a_stem_that_cannot_be_halved_four_times_is_refused_by_name(stem_channels):
    with pytest.raises(ValueError, match=f"stem_channels={stem_channels} must be a multiple of 16"):
        DCGAN256Generator(32, stem_channels=stem_channels)


@pytest.mark.parametrize("normalization", ["layer", "", "Batch"])
@pytest.mark.parametrize("network", [DCGANDiscriminator, SNGANConvDiscriminator])
def test_a_normalisation_that_there_is_not_is_refused_by_name(network, normalization):
    with pytest.raises(ValueError, match=f"normalization='{normalization}' must be batch, instance, spectral or none"):
        network(32, normalization=normalization)


def test_an_upsampling_that_there_is_not_is_refused_by_name():
    with pytest.raises(ValueError, match="upsampling='bilinear' must be transposed or nearest"):
        SNGANConvGenerator(32, upsampling="bilinear")
