"""The variational autoencoder and the mixture of Gaussians over its latents."""

import inspect

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tiny_gans import TINY as TINY_GANS
from torch import nn

import hfgen.models
from hfgen.losses.vae import kl_loss, kl_per_dimension, reconstruction_loss
from hfgen.models import ConvVAE, GaussianMixture, LatentFlow


# Each network small, with options that are not the defaults, so that one that is lost on reload shows. A network that
# joins `hfgen.models`, is no U-Net and of no GAN joins this table.
TINY = {
    "ConvVAE": {
        "sample_size": 24,
        "in_channels": 2,
        "latent_dim": 6,
        "block_out_channels": (4, 16),
        "layers_per_block": 2,
        "normalization": "group",
        "upsampling": "nearest",
        "refine_channels": 5,
    },
    "LatentFlow": {"latent_dim": 6, "num_couplings": 3, "hidden_dim": 5},
    "GaussianMixture": {"latent_dim": 6, "num_components": 3},
}
every_network = pytest.mark.parametrize("name", TINY)
every_normalization = pytest.mark.parametrize("normalization", ["batch", "group"])


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_images(batch_size: int = 3, channels: int = 3, size: int = 32, seed: int = 1) -> torch.Tensor:
    return draw(batch_size, channels, size, size, seed=seed).tanh()


def untrained(sample_size: int = 32, **options) -> ConvVAE:
    torch.manual_seed(0)
    return ConvVAE(sample_size, **{"latent_dim": 6, "block_out_channels": (4, 8), **options})


def awake(sample_size: int = 32, **options) -> ConvVAE:
    """An untrained network in eval mode none of whose layers is silent, biases and BatchNorm statistics included."""
    network = untrained(sample_size, **options)
    with torch.no_grad():
        for key, weight in network.named_parameters():
            if key.endswith("bias") or "conv2" in key or key.startswith("refine"):
                weight.normal_(std=0.1)
        network.to_posterior.weight *= 10
        network.conv_out.weight *= 10
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def shaken_flow(**options) -> LatentFlow:
    """A flow none of whose layers is as it was at the start."""
    torch.manual_seed(0)
    flow = LatentFlow(**options)
    with torch.no_grad():
        for weight in flow.parameters():
            weight += 0.2 * torch.randn_like(weight)
        flow.scale_tril.copy_(flow.scale_tril.tril())
    return flow.eval()


def residual_blocks(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, "conv2")]


def build(name: str) -> nn.Module:
    """The network of the table, with no tensor as it was at the start."""
    if name == "ConvVAE":
        return awake(**TINY[name])
    if name == "LatentFlow":
        return shaken_flow(**TINY[name])
    return mixture([0.2, 0.5, 0.3], draw(3, 6).tolist(), (draw(3, 6, 6, seed=2).tril() + 2 * torch.eye(6)).tolist())


def answer(network: nn.Module) -> torch.Tensor:
    if isinstance(network, GaussianMixture | LatentFlow):
        return network(draw(20, 7))
    output = network(draw_images(3, 2, 24))
    return torch.cat([output.sample.flatten(1), output.latent_dist.parameters.flatten(1)], dim=1)


def test_every_network_that_is_no_u_net_and_of_no_gan_has_a_tiny_configuration_here():
    assert TINY.keys() == {name for name in hfgen.models.__all__ if not name.startswith("UNet")} - TINY_GANS.keys()


# ----------------------------------------------------------------------------------------------- saving, and settings


@every_network
def test_a_saved_and_reloaded_network_answers_the_same_bit_for_bit(name, tmp_path):
    network = build(name)
    network.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    reloaded = type(network).from_pretrained(tmp_path, use_safetensors=True)
    assert not reloaded.training
    assert answer(network).std(dim=0).min() > 1e-4
    assert torch.equal(answer(reloaded), answer(network))
    state, other = network.state_dict(), reloaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@every_network
def test_every_argument_is_in_the_config(name):
    network = build(name)
    assert inspect.signature(type(network).__init__).parameters.keys() - {"self"} == TINY[name].keys()
    assert {key: network.config[key] for key in TINY[name]} == TINY[name]


# ------------------------------------------------------------------------------------------ the VAE: shapes and ranges


@pytest.mark.parametrize("layers_per_block", [0, 1])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("size", [32, 64, 96, 128, 256])
def test_images_of_every_size_become_latent_vectors_and_images_again(size, in_channels, layers_per_block):
    options = {"block_out_channels": (4, 4, 8), "layers_per_block": layers_per_block, "in_channels": in_channels}
    network, images = awake(size, **options), draw_images(2, in_channels, size)
    with torch.no_grad():
        posterior = network.encode(images).latent_dist
        reconstruction = network.decode(posterior.mean).sample
    assert posterior.mean.shape == posterior.logvar.shape == (2, 6, 1, 1)
    assert posterior.mean.dtype == reconstruction.dtype == torch.float32
    assert reconstruction.shape == images.shape
    assert posterior.mean.std(dim=0).max() > 1e-4 and reconstruction.std(dim=0).max() > 1e-4


def test_images_lie_between_minus_one_and_one_and_can_come_near_to_both():
    with torch.no_grad():
        images = awake().decode(draw(8, 6) * 100).sample
    assert images.abs().max() <= 1
    assert images.min() < -0.99 and images.max() > 0.99
    assert (images.abs() < 0.9).any()  # squeezed, not cut off


def test_every_number_of_a_latent_matters_and_its_sign_too():
    network, latents = awake(), torch.cat([torch.eye(6), -torch.eye(6)])
    with torch.no_grad():
        images = network.decode(latents).sample.flatten(1)
    assert (torch.cdist(images, images) + torch.eye(12)).min() > 0.01


@pytest.mark.parametrize("layers_per_block", [0, 1, 3])
def test_each_level_has_so_many_residual_blocks_in_the_encoder_and_in_the_decoder(layers_per_block):
    network = untrained(layers_per_block=layers_per_block, block_out_channels=(4, 6, 8))
    widths = [block.conv2.out_channels for block in residual_blocks(network)]
    assert widths == [width for width in (4, 6, 8, 8, 6, 4) for _ in range(layers_per_block)]


@every_normalization
def test_a_residual_block_starts_as_the_identity_and_does_not_stay_it(normalization):
    network = untrained(normalization=normalization, layers_per_block=1)
    for block in residual_blocks(network):
        hidden_states = draw(3, block.conv2.out_channels, 5, 5)
        assert torch.equal(block(hidden_states.clone()), hidden_states)
        nn.init.normal_(block.conv2.weight)
        assert (block(hidden_states.clone()) - hidden_states).abs().max() > 0.1


@pytest.mark.parametrize(
    ("width", "groups"), [(4, 1), (8, 1), (12, 1), (16, 2), (64, 8), (80, 10), (256, 32), (512, 32), (264, 24)]
)
def test_a_group_has_at_least_8_channels_and_there_are_at_most_32_groups(width, groups):
    network = untrained(4, block_out_channels=(width,), layers_per_block=0, normalization="group")
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [groups, groups]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@every_normalization
def test_in_training_posteriors_depend_on_the_batch_only_with_batch_norm(normalization):
    network = awake(normalization=normalization).train().double()
    images, others = draw_images(3).double(), draw_images(3, seed=2).double()
    others[0] = images[0]
    one, other = network(images), network(others)
    means, samples = (one.latent_dist.mean - other.latent_dist.mean).abs(), (one.sample - other.sample).abs()
    assert means[1:].max() > 1e-4 and samples[1:].max() > 1e-4
    mixed = means[0].max() > 1e-6, samples[0].max() > 1e-6
    assert mixed == ((True, True) if normalization == "batch" else (False, False))


def test_the_decoder_s_first_feature_map_has_the_memory_format_of_its_convolutions():
    network, seen = awake(), []
    network.up_blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    network.decode(draw(2, 6))
    assert seen[0].shape == (2, 8, 8, 8)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [-32, 0, 2, 30, 33, 100])
def test_a_size_that_cannot_be_halved_so_often_is_refused_by_name(size):
    with pytest.raises(ValueError, match=f"sample_size={size} must be a multiple of 8: each of the 3 levels"):
        untrained(size, block_out_channels=(4, 4, 8))


def test_a_network_without_levels_is_refused():
    with pytest.raises(ValueError, match=r"block_out_channels=\(\)"):
        untrained(block_out_channels=())


@pytest.mark.parametrize("normalization", ["layer", "", "Batch"])
def test_a_normalisation_that_there_is_not_is_refused_by_name(normalization):
    with pytest.raises(ValueError, match=f"normalization='{normalization}' must be batch or group"):
        untrained(normalization=normalization)


# --------------------------------------------------------------------------------------------- the VAE: its interface


def test_encode_and_decode_answer_as_those_of_diffusers_do():
    network, images = awake(), draw_images()
    posterior = network.encode(images).latent_dist
    assert isinstance(posterior, DiagonalGaussianDistribution)
    (in_a_tuple,) = network.encode(images, return_dict=False)
    assert torch.equal(in_a_tuple.parameters, posterior.parameters)
    decoded = network.decode(posterior.mean).sample
    assert torch.equal(network.decode(posterior.mean.flatten(1)).sample, decoded)
    (in_a_tuple,) = network.decode(posterior.mean, return_dict=False)
    assert torch.equal(in_a_tuple, decoded)


def test_a_pass_decodes_the_mean_of_the_posterior_unless_told_to_draw():
    network, images = awake(), draw_images()
    posterior = network.encode(images).latent_dist
    output = network(images)
    assert torch.equal(output.sample, network.decode(posterior.mean).sample)
    assert torch.equal(output.latent_dist.parameters, posterior.parameters)
    generator = torch.Generator().manual_seed(5)
    sample, of_sample = network(images, sample_posterior=True, return_dict=False, generator=generator)
    latents = posterior.mean + (posterior.logvar / 2).exp() * draw(3, 6, 1, 1, seed=5)
    torch.testing.assert_close(sample, network.decode(latents).sample)
    assert torch.equal(of_sample.parameters, posterior.parameters)
    assert (sample - output.sample).abs().max() > 0.01


def test_under_bfloat16_autocast_the_posterior_is_computed_in_float32():
    network, images, features = awake(), draw_images(), []
    network.down_blocks[-1].register_forward_hook(lambda block, inputs, output: features.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images)
    assert features[0].dtype == torch.bfloat16
    parameters = output.latent_dist.parameters
    assert parameters.dtype == output.sample.dtype == torch.float32
    assert torch.equal(parameters.flatten(1), network.to_posterior(features[0].float().flatten(1)))
    assert (output.sample - network(images).sample).abs().max() < 0.1


def test_a_network_in_bfloat16_answers_in_it_and_nearly_the_same():
    network, images = awake(), draw_images()
    expected = network(images)
    output = network.bfloat16()(images.bfloat16())
    assert output.sample.dtype == output.latent_dist.mean.dtype == torch.bfloat16
    assert (output.sample - expected.sample).abs().mean() < 0.02


# -------------------------------------------------------------------------------------------------- the VAE: training


@every_normalization
def test_the_posterior_starts_near_the_prior_and_the_image_near_grey(normalization):
    network = untrained(64, block_out_channels=(8, 16, 32), normalization=normalization, latent_dim=50)
    with torch.no_grad():
        posterior = network.encode(draw_images(16, size=64)).latent_dist
        images = network.decode(draw(16, 50)).sample
    for values in posterior.mean, posterior.logvar, images:
        assert 1e-3 < values.abs().mean() < 0.12


@every_normalization
def test_every_parameter_gets_a_gradient(normalization):
    network, images = awake(normalization=normalization).double(), draw_images().double()
    output = network(images, sample_posterior=True, generator=torch.Generator().manual_seed(0))
    ((output.sample * draw(*images.shape, seed=2)).sum() + output.latent_dist.kl().sum()).backward()
    dead = [key for key, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert dead == []


def test_it_learns_four_images():
    squares = draw(4, 3, 4, 4).tanh()
    images = nn.functional.interpolate(squares, size=16)
    network = untrained(16, block_out_channels=(16, 32), normalization="group")
    optimizer, errors = torch.optim.Adam(network.parameters(), lr=3e-3), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        output = network(images, sample_posterior=True, generator=generator)
        kl_dimensions = kl_per_dimension(output.latent_dist.mean, output.latent_dist.logvar)
        optimizer.zero_grad()
        (reconstruction_loss(output.sample, images) + kl_loss(kl_dimensions)).backward()
        optimizer.step()
        errors.append((output.sample - images).square().mean().item())
    assert errors[-1] < errors[0] / 10
    assert kl_dimensions.sum() > 1  # the latents tell which image it is


# ------------------------------------------------------------------------------------------------------- the mixture


def mixture(weights: list, means: list, scale_trils: list) -> GaussianMixture:
    network = GaussianMixture(len(means[0]), len(weights)).eval()
    network.weights.copy_(torch.tensor(weights))
    network.means.copy_(torch.tensor(means))
    network.scale_trils.copy_(torch.tensor(scale_trils))
    return network


def two_components() -> GaussianMixture:
    return mixture([0.3, 0.7], [[1.0, -2.0], [-3.0, 0.5]], [[[0.5, 0.0], [0.3, 0.8]], [[1.2, 0.0], [-0.4, 0.2]]])


def test_draws_have_the_mean_and_the_covariance_of_the_mixture():
    latents = two_components()(draw(40_000, 3))
    assert latents.shape == (40_000, 2)
    # The components have means (1, -2) and (-3, 0.5), covariances L L^T; weights 0.3 and 0.7.
    covariances = torch.tensor([[[0.25, 0.15], [0.15, 0.73]], [[1.44, -0.48], [-0.48, 0.2]]])
    # The second reaches beyond -0.65 by 1.958 of its standard deviations, the first below it by 3.3.
    share = (latents[:, 0] > -0.65).float().mean().item()
    assert share == pytest.approx(0.3 * 0.9995 + 0.7 * 0.0251, abs=0.01)
    mean = 0.3 * torch.tensor([1.0, -2.0]) + 0.7 * torch.tensor([-3.0, 0.5])
    between = 0.3 * 0.7 * torch.outer(torch.tensor([4.0, -2.5]), torch.tensor([4.0, -2.5]))
    torch.testing.assert_close(latents.mean(dim=0), mean, atol=0.03, rtol=0)
    within = 0.3 * covariances[0] + 0.7 * covariances[1]
    torch.testing.assert_close(latents.T.cov(), within + between, atol=0.05, rtol=0)


def test_the_first_number_chooses_the_component_and_the_others_the_place_in_it():
    # The normal distribution function is 0.3 at -0.5244.
    noise = torch.tensor([[-40.0, 0, 0], [-0.525, 1, 0], [-0.524, 0, 0], [0.0, 1, -2], [40.0, 0, 1]])
    expected = [[1.0, -2.0], [1.5, -1.7], [-3.0, 0.5], [-1.8, -0.3], [-3.0, 0.7]]
    torch.testing.assert_close(two_components()(noise), torch.tensor(expected))


def test_weights_need_not_add_up_to_one_for_the_last_component_to_get_its_share():
    network = mixture([0.25, 0.5], [[1.0], [2.0]], [[[1.0]], [[1.0]]])
    # A third, and the normal distribution function is 1/3 at -0.4307.
    noise = torch.tensor([[-0.431, 0.0], [-0.430, 0.0], [9.0, 0.0]])
    assert network(noise).flatten().tolist() == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("num_components", [1, 4])
def test_a_new_mixture_is_the_standard_normal_distribution_and_has_nothing_to_train(num_components):
    network, noise = GaussianMixture(5, num_components), draw(20, 6)
    torch.testing.assert_close(network(noise), noise[:, 1:], rtol=0, atol=0)
    assert network.weights.tolist() == pytest.approx([1 / num_components] * num_components)
    assert not any(weight.requires_grad for weight in network.parameters())


def test_a_mixture_in_bfloat16_draws_nearly_the_same_in_it():
    expected, latents = two_components()(draw(50, 3)), two_components().bfloat16()(draw(50, 3))
    assert latents.dtype == torch.bfloat16
    assert (latents.float() - expected).abs().median() < 0.02


# ------------------------------------------------------------------------------------------------------------ the flow


def test_a_new_flow_is_the_identity_but_for_the_gaussian_behind_it():
    flow = LatentFlow(5)
    noise = draw(7, 6)
    torch.testing.assert_close(flow(noise).sort().values, noise[:, 1:].sort().values)
    flow.location.fill_(3.0)
    flow.scale_tril.copy_(2 * torch.eye(5))
    torch.testing.assert_close(flow(noise).sort().values, (3 + 2 * noise[:, 1:]).sort().values)
    normal = torch.distributions.Normal(3.0, 2.0)
    latents = draw(7, 5, seed=2)
    torch.testing.assert_close(flow.log_density(latents), normal.log_prob(latents).sum(dim=1))


@pytest.mark.parametrize("latent_dim", [2, 5, 6])
def test_the_density_of_a_flow_is_that_of_the_change_of_variables(latent_dim):
    flow = shaken_flow(latent_dim=latent_dim, num_couplings=5, hidden_dim=7).double()
    for noise in draw(4, 1 + latent_dim).double():
        jacobian = torch.autograd.functional.jacobian(lambda one: flow(one[None])[0], noise)[:, 1:]
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise[1:]).sum()
        expected = normal - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(flow.log_density(flow(noise[None])), expected[None])
        assert (jacobian.abs() > 1e-9).any(dim=0).all()


def test_a_flow_in_autocast_draws_the_same_and_one_number_is_too_few():
    flow, noise = shaken_flow(latent_dim=6), draw(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow(noise), flow(noise)) and flow(noise).dtype == torch.float32
        inside = flow(noise)
    assert torch.equal(flow(noise), inside)
    with pytest.raises(ValueError, match="latent_dim=1"):
        LatentFlow(1)


# ------------------------------------------------------------------------------------------------- nearest upsampling


def test_nearest_upsampling_has_no_transposed_convolution_and_others_are_refused():
    network = awake(upsampling="nearest")
    kinds = [type(module).__name__ for module in network.modules()]
    assert "ConvTranspose2d" not in kinds and kinds.count("Upsample") == 2
    assert network(draw_images()).sample.shape == (3, 3, 32, 32)
    with pytest.raises(ValueError, match="upsampling='bilinear' must be transposed or nearest"):
        ConvVAE(32, block_out_channels=(4, 8), upsampling="bilinear")


@pytest.mark.parametrize("upsampling", ["nearest", "transposed"])
def test_a_refinement_starts_at_zero_and_every_weight_of_it_learns(upsampling):
    plain = untrained(upsampling=upsampling).eval()
    refined = untrained(upsampling=upsampling, refine_channels=5).eval()
    missing, unexpected = refined.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("refine.") for name in missing)
    images = draw_images()
    assert torch.equal(plain(images).sample, refined(images).sample)
    assert "refine" not in "".join(plain.state_dict())
    optimizer = torch.optim.SGD(refined.parameters(), lr=1.0)
    for _ in range(2):  # the layers before the last one get no gradient at first
        optimizer.zero_grad()
        (refined(images).sample - images).square().mean().backward()
        optimizer.step()
    assert all(weight.grad.abs().max() > 0 for weight in refined.refine.parameters())
