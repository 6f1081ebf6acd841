"""The learned term of a VAE; its losses have tests of their own, and so has the training with it."""

import pytest
import torch
from accelerate import Accelerator

from hfgen.methods.learned_term import LearnedTerm, choose_trained_parts, decoder_parameters, mixed_latents
from hfgen.models import ConvVAE


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def small_vae(**options) -> ConvVAE:
    torch.manual_seed(0)
    return ConvVAE(16, latent_dim=6, block_out_channels=(4, 8), **options)


@pytest.mark.parametrize("weights", [(0.7, 0.0), (0.0, 0.3)])
def test_a_learned_term_pulls_as_hard_as_its_weights_say(weights):
    """By the gradient of what is added to the objective, compared with that of the likelihood."""
    vae = small_vae()
    term = LearnedTerm(vae, weights, 4, 2e-4, Accelerator(cpu=True))
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    reconstruction = (torch.rand(4, 3, 16, 16) * 2 - 1).requires_grad_()
    likelihood = (reconstruction - images).square().mean()
    addition, losses = term.learn(images, reconstruction, likelihood, torch.randn(4, 6))
    (pull,) = torch.autograd.grad(addition, reconstruction, retain_graph=True)
    (beside,) = torch.autograd.grad(likelihood, reconstruction)
    assert pull.norm().item() == pytest.approx(sum(weights) * beside.norm().item(), rel=1e-4)
    assert all(value.isfinite() for value in losses.values())
    # The images from mixed latents get an adversarial gradient only.
    (of_decoder,) = torch.autograd.grad(addition, vae.conv_out.weight, allow_unused=True)
    assert (of_decoder is None) == (weights[1] == 0)


def test_mixed_latents_have_the_covariance_of_the_latents_and_are_no_images():
    torch.manual_seed(0)
    latents = torch.randn(50_000, 3) @ torch.tensor([[1.0, 0, 0], [0.5, 2, 0], [0, -1, 0.1]])
    mixed = mixed_latents(latents)
    torch.testing.assert_close(torch.cov(mixed.T), torch.cov(latents.T), rtol=0.03, atol=0.03)
    assert (mixed[:, None] - latents[None, :2]).norm(dim=2).min() > 0


@pytest.mark.parametrize("skip_gradients", [True, False])
@pytest.mark.parametrize("refine_channels", [0, 4])
def test_encoder_and_decoder_are_all_of_a_vae_and_a_kept_encoder_does_not_change(skip_gradients, refine_channels):
    vae = small_vae(refine_channels=refine_channels)
    choose_trained_parts(vae, True, skip_gradients)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    decoder = decoder_parameters(vae)
    torch.optim.SGD(decoder, lr=1.0).zero_grad()
    vae(torch.rand(4, 3, 16, 16), sample_posterior=True).sample.square().mean().backward()
    encoder = [weight for part in (vae.down_blocks, vae.to_posterior) for weight in part.parameters()]
    assert len(encoder) + len(decoder) == len([*vae.parameters()])
    assert all((weight.grad is None) == skip_gradients for weight in encoder)
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith(("down_blocks", "to_posterior")) for name in changed)  # BatchNorm's
    choose_trained_parts(vae, False, skip_gradients)  # after a rollback
    assert all(weight.requires_grad for weight in vae.parameters()) and all(part.training for part in vae.modules())
