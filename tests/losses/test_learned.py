"""The learned term of a VAE, against plain formulas."""

import pytest
import torch

from hfgen.losses.learned import feature_distance, logits_and_features, scaled_to_norm_of
from hfgen.models import DCGANDiscriminator


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def discriminator():
    torch.manual_seed(0)
    return DCGANDiscriminator(32, 3, 4)


def test_logits_and_features_are_those_of_the_discriminator(discriminator):
    images = draw(5, 3, 32, 32).tanh()
    logits, features = logits_and_features(discriminator.eval(), images)
    assert torch.equal(logits, discriminator(images))
    assert [tuple(level.shape) for level in features] == [(5, 4, 16, 16), (5, 8, 8, 8), (5, 16, 4, 4)]
    by_hand = torch.nn.functional.leaky_relu(discriminator.conv_in(images), 0.2)
    assert torch.equal(features[0], by_hand) and (by_hand < 0).any()
    for block in discriminator.blocks[:3]:
        by_hand = block(by_hand)
    assert torch.equal(features[1], by_hand)
    assert not any(module._forward_hooks for module in discriminator.modules())


def test_the_smallest_discriminator_has_features_too():
    _, features = logits_and_features(DCGANDiscriminator(8, 3, 4).eval(), draw(2, 3, 8, 8))
    assert [tuple(level.shape) for level in features] == [(2, 4, 4, 4)]


def test_a_discriminator_that_fails_leaves_no_hook_behind(discriminator):
    with pytest.raises(RuntimeError):
        logits_and_features(discriminator, draw(5, 4, 32, 32))
    assert not any(module._forward_hooks for module in discriminator.modules())


def test_the_distance_is_each_levels_own_share_of_its_square():
    real = [draw(4, 2, 8, 8, seed=1), 100 * draw(4, 3, 4, 4, seed=2)]
    fake = [2 * real[0], torch.zeros_like(real[1])]  # off by as much as there is, at both levels
    assert feature_distance(fake, real).item() == pytest.approx(1)
    assert feature_distance([fake[0], real[1]], real).item() == pytest.approx(0.5)
    assert feature_distance(real, real).item() == 0
    assert feature_distance([torch.ones(1, 1, 2, 2)], [torch.zeros(1, 1, 2, 2)]).isfinite()


def test_the_real_features_are_an_aim_and_get_no_gradient():
    fake, real = draw(2, 2, 2, 2).requires_grad_(), draw(2, 2, 2, 2, seed=1).requires_grad_()
    feature_distance([fake], [real]).backward()
    assert real.grad is None
    expected = 2 * (fake - real) / fake.numel() / real.square().mean()
    torch.testing.assert_close(fake.grad, expected.detach())


def test_a_scaled_gradient_has_the_others_norm_and_its_own_direction():
    gradient, other = 1e-5 * draw(4, 3, 8, 8), draw(4, 3, 8, 8, seed=1)
    scaled = scaled_to_norm_of(gradient, other, 0.5)
    assert scaled.norm().item() == pytest.approx(0.5 * other.norm().item())
    torch.testing.assert_close(scaled / scaled.norm(), gradient / gradient.norm())
    assert not scaled_to_norm_of(torch.zeros(2, 2), other, 1.0).any()  # no direction, no pull
