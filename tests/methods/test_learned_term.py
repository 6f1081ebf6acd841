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
    assert term.decoder_optimizer.param_groups[0]["betas"] == (0.5, 0.999)  # as GANs are trained
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


def test_with_scaled_gradients_a_learned_term_pulls_as_without():
    """In fp16 the scale keeps the gradients of single pixels from being rounded to 0; here it must cancel."""
    additions, scaled = [], []
    for scale in (None, 2.0**16):
        accelerator = Accelerator(cpu=True)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scale_by = accelerator.scaler.scale
            accelerator.scaler.scale = lambda loss, scale_by=scale_by: scaled.append(scale_by(loss)) or scaled[-1]
        vae = small_vae()
        torch.manual_seed(1)
        term = LearnedTerm(vae, (0.7, 0.3), 4, 0.0, accelerator)  # a discriminator that stays as it is
        images = torch.rand(4, 3, 16, 16) * 2 - 1
        reconstruction = (torch.rand(4, 3, 16, 16) * 2 - 1).requires_grad_()
        likelihood = (reconstruction - images).square().mean()
        addition, losses = term.learn(images, reconstruction, likelihood, torch.randn(4, 6))
        additions.append(torch.autograd.grad(addition, reconstruction)[0])
    assert [float(one.detach()) for one in scaled[-2:]] == pytest.approx(
        [2.0**16 * float(losses[name].detach()) for name in ("feature_distance", "loss_g")], rel=1e-5
    )
    torch.testing.assert_close(*additions)


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
