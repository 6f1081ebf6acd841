import copy

import pytest
import torch
from torch import nn

from hfgen.methods.ema import FreshStatistics, averaged_copy, recomputed_statistics
from hfgen.models import DCGANGenerator, UNetBase
from hfgen.pipelines import GANPipeline


class Scale(nn.Module):
    """One weight, and BatchNorm's running statistics and count of batches."""

    def __init__(self, weight: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))
        self.norm = nn.BatchNorm1d(1)

    def become(self, weight: float, mean: float, variance: float, batches: int) -> None:
        with torch.no_grad():
            self.weight.fill_(weight)
            self.norm.running_mean.fill_(mean)
            self.norm.running_var.fill_(variance)
            self.norm.num_batches_tracked.fill_(batches)


def averages(ema) -> tuple[float, float, float, int]:
    network = ema.module
    norm = network.norm
    return float(network.weight), float(norm.running_mean), float(norm.running_var), int(norm.num_batches_tracked)


# What the network is after each update: (weight, running mean, running variance, batches).
COURSE = [(2.0, 10.0, 1.0, 7), (5.0, -2.0, 4.0, 9), (-1.0, 3.0, 0.5, 20), (0.5, 8.0, 6.0, 21), (3.0, 1.0, 2.0, 30)]


def by_hand(values: list[float], decays: list[float]) -> list[float]:
    average, course = values[0], [values[0]]  # the first update takes the weights as they are
    for value, decay in zip(values[1:], decays, strict=True):
        average = decay * average + (1 - decay) * value
        course.append(average)
    return course


@pytest.mark.parametrize(
    ("decay", "decays"),
    [
        (0.9999, [2 / 11, 3 / 12, 4 / 13, 5 / 14]),  # the warm-up is below the decay all along
        (0.28, [2 / 11, 3 / 12, 0.28, 0.28]),  # it reaches the decay with the third average
        (0.0, [0.0, 0.0, 0.0, 0.0]),  # no averaging
    ],
)
def test_the_averages_of_weights_and_statistics_are_those_worked_out_by_hand(decay, decays):
    network = Scale()
    ema = averaged_copy(network, decay)
    expected = list(zip(*(by_hand([state[part] for state in COURSE], decays) for part in range(3)), strict=True))
    for state, expectation in zip(COURSE, expected, strict=True):
        network.become(*state)
        ema.update_parameters(network)
        *floats, batches = averages(ema)
        assert floats == pytest.approx(expectation, rel=1e-6)
        assert batches == state[3]  # a count is copied, not averaged


def test_the_third_average_written_out():
    network = Scale()
    ema = averaged_copy(network, 0.9999)
    for weight in 2.0, 5.0, -1.0:
        network.become(weight, 0.0, 1.0, 1)
        ema.update_parameters(network)
    second = 2 / 11 * 2.0 + 9 / 11 * 5.0
    assert averages(ema)[0] == pytest.approx(0.25 * second + 0.75 * -1.0, rel=1e-6)


def test_a_decay_of_0_9_is_reached_after_eighty_updates():
    network = Scale()
    ema = averaged_copy(network, 0.9)
    for _ in range(100):
        network.become(1.0, 0.0, 1.0, 1)
        ema.update_parameters(network)
    network.become(0.0, 0.0, 1.0, 1)
    ema.update_parameters(network)
    assert averages(ema)[0] == pytest.approx(0.9, rel=1e-6)


def test_the_average_is_a_copy_in_eval_mode_without_gradients():
    network = Scale(1.5).train()
    ema = averaged_copy(network, 0.5)
    assert not any(module.training for module in ema.modules())
    assert not any(weight.requires_grad for weight in ema.parameters())
    assert network.training
    assert all(weight.requires_grad for weight in network.parameters())
    network.become(9.0, 9.0, 9.0, 9)
    assert averages(ema) == (1.5, 0.0, 1.0, 0)
    ema.update_parameters(network)
    assert not any(module.training for module in ema.modules())
    network.become(1.0, 1.0, 1.0, 1)
    assert averages(ema)[0] == 9.0


def test_a_network_can_be_trained_between_updates_and_its_gradients_are_its_own():
    network = UNetBase(8, block_out_channels=(4, 8), time_embedding_dim=4)
    ema = averaged_copy(network, 0.9)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(3):
        network(torch.randn(2, 3, 8, 8), step).sample.square().mean().backward()
        optimizer.step()
        ema.update_parameters(network)
    assert all(weight.grad is None for weight in ema.parameters())
    means = [module.running_mean for module in ema.module.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(means) == 6
    assert all(mean.any() for mean in means)


def test_an_average_restored_from_its_state_goes_on_exactly_as_the_original():
    network = Scale()
    original = averaged_copy(network, 0.3)
    for state in COURSE[:3]:
        network.become(*state)
        original.update_parameters(network)
    restored = averaged_copy(Scale(77.0), 0.3)
    restored.load_state_dict(copy.deepcopy(original.state_dict()))
    assert averages(restored) == averages(original)
    for state in COURSE[3:]:
        network.become(*state)
        original.update_parameters(network)
        restored.update_parameters(network)
        assert averages(restored) == averages(original)


def test_averages_of_several_precisions_and_many_weights_are_all_updated():
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4).double())
    ema = averaged_copy(network, 0.9)
    ema.update_parameters(network)
    start = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for weight in network.parameters():
            weight += 1
    ema.update_parameters(network)
    for key, average in ema.module.state_dict().items():
        torch.testing.assert_close(average, start[key] + 9 / 11)
        assert average.dtype == start[key].dtype


# --------------------------------------------------------------------------------------------- BatchNorm's statistics


def generator_with_statistics() -> DCGANGenerator:
    torch.manual_seed(0)
    network = DCGANGenerator(16, 5, base_channels=4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(0.25)
            module.running_var.fill_(3.0)
    return network.eval()


def test_recomputed_statistics_are_those_of_the_activations_and_are_removed_again():
    network = generator_with_statistics()
    before = copy.deepcopy(network.state_dict())
    batches = list(torch.randn(12, 5, generator=torch.Generator().manual_seed(1)).split(4))
    expected = []
    with torch.no_grad():
        for batch in batches:  # the first normalisation's input depends on nothing that is recomputed
            stem = network.stem(batch)
            expected.append((stem.mean((0, 2, 3)), stem.var((0, 2, 3))))
    with recomputed_statistics(network, batches):
        first = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
        torch.testing.assert_close(first.running_mean, torch.stack([mean for mean, _ in expected]).mean(0))
        torch.testing.assert_close(first.running_var, torch.stack([variance for _, variance in expected]).mean(0))
        # What follows each normalisation is as in training with the whole: about mean 0 and variance 1.
        with torch.no_grad():
            normalised = network.blocks[0][0](network.stem(torch.cat(batches)))
        assert normalised.mean().abs() < 0.1 and (normalised.std() - 1).abs() < 0.1
        assert not network.training and first.momentum == 0.1
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_without_batches_or_without_a_batch_norm_nothing_is_recomputed():
    network = generator_with_statistics()
    before = copy.deepcopy(network.state_dict())
    with recomputed_statistics(network, []):
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    plain = nn.Linear(3, 2)
    with recomputed_statistics(plain, [torch.zeros(4, 3)]):
        assert plain.training


def test_statistics_come_back_when_what_uses_them_fails():
    network = generator_with_statistics()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError), recomputed_statistics(network, [torch.randn(4, 5)]):
        raise RuntimeError
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_pipeline_is_saved_with_fresh_statistics_as_it_draws_with_them(tmp_path):
    network, latents = generator_with_statistics(), torch.randn(3, 5)
    fresh = FreshStatistics(GANPipeline(network), network, [torch.randn(8, 5)])
    stale = GANPipeline(network)(latents=latents, output_type="np").images
    with fresh.use() as pipeline:
        drawn = pipeline(latents=latents, output_type="np").images
    fresh.save_pretrained(tmp_path)
    saved = GANPipeline.from_pretrained(tmp_path)(latents=latents, output_type="np").images
    assert (saved == drawn).all() and abs(drawn - stale).mean() > 0.01


def test_statistics_are_recomputed_only_when_the_weights_have_changed():
    network, latents = generator_with_statistics(), torch.randn(3, 5)
    fresh = FreshStatistics(GANPipeline(network), network, [torch.randn(8, 5), torch.randn(8, 5)])
    batches = []
    network.stem.register_forward_pre_hook(lambda module, _: batches.append(1) if module.training else None)

    def draw() -> torch.Tensor:
        with fresh.use() as pipeline:
            return pipeline(latents=latents, output_type="pt").images

    first = draw()
    assert torch.equal(draw(), first) and len(batches) == 2
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        next(network.parameters()).add_(0.1)  # as the next update does
    moved = draw()
    assert len(batches) == 4 and not torch.equal(moved, first)
    network.load_state_dict(before)  # as a rollback does
    assert torch.equal(draw(), first) and len(batches) == 6
