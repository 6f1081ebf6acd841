import io
import math

import pytest
import torch

from hfgen.methods.collapse import CHECKS_TO_TAKE_OFF, CollapseWatch, coverage, diversity, small_features
from hfgen.methods.watch import WatchResult


PIXELS = math.sqrt(3 * 16 * 16)  # images whose values differ by 1 everywhere are so far apart


def constant_images(*values: float, size: int = 32) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def structured_images(count: int = 12, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Images of four by four large squares of random colours."""
    squares = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(squares, size=size)


def watch(boundary: float | None = 0.0) -> CollapseWatch:
    return CollapseWatch(structured_images(), boundary)


def check(watch: CollapseWatch, share: float) -> WatchResult:
    """Let the watch judge images that have this share of the data's diversity and cover all of it."""
    images = structured_images()
    return watch.check(images.mean(dim=0).lerp(images, share))


def observe(watch: CollapseWatch, real_logits: list[float], fake_logits: list[float]) -> None:
    watch.observe(torch.tensor(real_logits), torch.tensor(fake_logits))


# ---------------------------------------------------------------------------------------------------------- diversity


@pytest.mark.parametrize("size", [16, 32, 96])
def test_the_diversity_of_three_constant_images_is_the_one_worked_out_by_hand(size):
    features = small_features(constant_images(-0.8, -0.5, 0.6, size=size))
    assert diversity(features) == pytest.approx((0.3 + 1.4 + 1.1) / 3 * PIXELS, rel=1e-5)


def test_the_distance_of_two_images_is_euclidean_over_all_channels_and_pixels():
    images = torch.zeros(2, 3, 16, 16)
    images[1, 0, 3, 4], images[1, 2, 10, 0] = 0.3, -0.4
    assert diversity(small_features(images)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("count", [2, 40])
def test_images_that_are_all_the_same_have_no_diversity(count):
    images = structured_images(1).expand(count, -1, -1, -1)
    assert diversity(small_features(images)) == pytest.approx(0, abs=0.05)  # real ones: more than 5


def test_noise_of_the_same_variance_does_not_pass_for_variety():
    images = structured_images(20, size=64)
    noise = images.std() * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert noise.std().item() == pytest.approx(images.std().item(), rel=0.01)
    # Each of the 16 x 16 numbers is a mean over 4 x 4 pixels, whose noise has a quarter of the standard deviation.
    assert diversity(small_features(noise)) < 0.3 * diversity(small_features(images))


def test_diversity_is_invariant_to_the_order_of_images_and_to_a_common_colour_shift():
    images = structured_images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    expected = diversity(small_features(images))
    for others in images[order], images + 0.3:
        assert diversity(small_features(others)) == pytest.approx(expected, rel=1e-4)


def test_the_features_of_bfloat16_images_are_float32():
    images = structured_images().bfloat16()
    assert small_features(images).dtype == torch.float32
    assert torch.equal(small_features(images), small_features(images.float()))


# ----------------------------------------------------------------------------------------------------------- coverage


def test_the_coverage_of_points_on_a_line_is_the_one_worked_out_by_hand():
    real = torch.tensor([0.0, 1, 2, 4, 8, 16, 32])[:, None]
    reach = [16, 15, 14, 12, 8, 16, 31]  # to the fifth nearest other
    for fake in [[-14.5], [-14.5, 62.9], [63.1], [15.5], [7.9, 15.9]]:
        near = [any(abs(place - point) <= far for point in fake) for place, far in zip(real[:, 0], reach, strict=True)]
        assert coverage(real, torch.tensor(fake)[:, None]) == pytest.approx(sum(near) / 7)
    assert coverage(real, torch.tensor([[-14.5], [62.9]])) == pytest.approx(2 / 7)  # that of 0 and that of 32
    assert coverage(real, torch.tensor([[63.1]])) == 0


def test_images_of_the_same_distribution_cover_the_share_that_theory_expects():
    numbers = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 400, 6, generator=numbers)
    # Naeem et al., equation 13: 1 - (M - 1) ... (M - k) / ((2 M - 1) ... (2 M - k)), here 1 - 2 ** -5 nearly.
    assert coverage(real, fake) == pytest.approx(1 - 2**-5, abs=0.03)


def test_a_few_modes_cover_little_and_the_mean_image_has_no_diversity():
    images = structured_images(40)
    real = small_features(images)
    few = small_features(torch.cat([images[:2]] * 20))
    assert coverage(real, few) < 0.5 and diversity(few) > 0.4 * diversity(real)
    mean = small_features(images.mean(dim=0, keepdim=True).expand(40, -1, -1, -1))
    assert coverage(real, mean) == 1 and diversity(mean) < 0.01 * diversity(real)


def test_few_real_images_have_as_many_neighbours_as_there_are():
    assert coverage(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.5]])) == 0.5
    assert coverage(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.4]])) == 1.0


# ----------------------------------------------------------------------------------------------------------- collapse


def test_a_look_tells_diversity_against_that_of_the_training_images_and_coverage():
    result = check(watch(), 0.7)
    assert result.signals == pytest.approx({"diversity": 0.7, "coverage": 1.0}, rel=1e-4)
    assert result[1:] == (True, None, None)
    fake_images = structured_images(12, seed=3) * 2
    real, fake = small_features(structured_images()), small_features(fake_images)
    expected = {"diversity": diversity(fake) / diversity(real), "coverage": coverage(real, fake)}
    assert watch().check(fake_images).signals == pytest.approx(expected)


def test_it_wants_to_look_at_as_many_images_as_it_was_given():
    assert watch().num_images == 12
    assert CollapseWatch(structured_images(7), None).num_images == 7


@pytest.mark.parametrize(("share", "good"), [(0.1, False), (0.49, False), (0.51, True), (1.4, True)])
def test_a_checkpoint_is_worth_going_back_to_from_half_of_the_data_s_diversity_on(share, good):
    assert check(watch(), share).good == good


def test_a_generator_of_healthy_images_never_brings_trouble():
    watch_of_it = watch()
    for index in range(3 * CHECKS_TO_TAKE_OFF):
        result = check(watch_of_it, 0.55 + 0.1 * (index % 5))
        assert result.good and result.trouble is None and result.warning is None


@pytest.mark.parametrize(("share", "collapsed"), [(0.24, True), (0.26, False)])
def test_a_good_generator_has_collapsed_after_two_checks_below_a_quarter(share, collapsed):
    watch_of_it = watch()
    assert check(watch_of_it, 0.8).trouble is None
    assert check(watch_of_it, share).trouble is None
    result = check(watch_of_it, share)
    assert not result.good
    assert result.trouble == (
        "the generator has collapsed: its images have 24% of the data's diversity and cover 100% of the data"
        if collapsed
        else None
    )


@pytest.mark.parametrize("between", [0.3, 0.9])
def test_one_look_at_more_between_two_at_collapsed_images_starts_the_count_anew(between):
    watch_of_it = watch()
    troubles = [check(watch_of_it, share).trouble for share in (0.8, 0.1, between, 0.1, between, 0.1, 0.1, 0.1)]
    assert troubles[:6] == [None] * 6
    assert all("has collapsed" in trouble for trouble in troubles[6:])


def test_a_few_kinds_of_images_are_a_collapse_though_they_are_far_from_each_other():
    images = structured_images(60)
    watch_of_it, few = CollapseWatch(images, None), torch.cat([images[:2]] * 30)
    assert watch_of_it.check(images).good
    results = [watch_of_it.check(few) for _ in range(2)]
    assert results[1].signals["diversity"] > 0.4 and results[1].signals["coverage"] < 0.4
    assert results[0].trouble is None and "has collapsed: its images have" in results[1].trouble


@pytest.mark.parametrize("copies", [6, 12])
def test_repeated_images_are_covered_by_a_generator_of_each_of_them(copies):
    images = structured_images(20)
    watch_of_it = CollapseWatch(images.repeat(copies, 1, 1, 1), None)
    result = watch_of_it.check(images.repeat(copies, 1, 1, 1) + 0.01 * torch.randn(20 * copies, *images.shape[1:]))
    assert result.good and result.signals["coverage"] == 1
    few = images[:2].repeat(10 * copies, 1, 1, 1)
    covered = [one.check(few).signals["coverage"] for one in (watch_of_it, CollapseWatch(images, None))]
    assert covered[0] == covered[1] < 0.7


def test_over_a_single_image_a_generator_is_not_judged_by_its_coverage():
    watch_of_it = CollapseWatch(structured_images(1).repeat(8, 1, 1, 1), None)
    results = [watch_of_it.check(torch.randn(8, 3, 16, 16)) for _ in range(CHECKS_TO_TAKE_OFF + 1)]
    assert all(result.good and result.trouble is None for result in results)
    assert "non-finite" in watch_of_it.check(torch.full((8, 3, 16, 16), torch.nan)).trouble


@pytest.mark.parametrize(("covered", "good", "low"), [(5, False, True), (9, False, False), (13, True, False)])
def test_coverage_has_thresholds_of_its_own(covered, good, low):
    """So many of 20 images, far from each other, are generated, each often; the others have nothing near them."""
    images = torch.nn.functional.interpolate(torch.eye(20)[:, None, :, None].expand(-1, 3, -1, 1), size=(20, 20))
    pairs = torch.cat([images + 0.001 * index for index in range(6)])  # six nearly alike: the reach is short
    watch_of_it = CollapseWatch(pairs, None)
    drawn = torch.cat([images[:covered] + 0.001 * index for index in range(6)])
    result = watch_of_it.check(drawn)
    assert result.signals["coverage"] == pytest.approx(covered / 20)
    assert result.good == good
    watch_of_it.check(pairs)
    watch_of_it.check(drawn)
    assert (watch_of_it.check(drawn).trouble is not None) == low


def test_a_generator_that_never_was_good_is_trouble_from_look_40_on_and_not_before():
    watch_of_it = watch()
    troubles = [check(watch_of_it, 0.1 if index % 2 else 0.45).trouble for index in range(CHECKS_TO_TAKE_OFF + 2)]
    assert troubles[:39] == [None] * 39
    assert troubles[39:] == [
        f"the generator has not started to learn: its images have {share} of the data's diversity and cover 100% of "
        "the data"
        for share in ("10%", "45%", "10%")
    ]


def test_a_generator_that_was_good_once_may_get_worse_short_of_collapse():
    watch_of_it = watch()
    shares = [0.1, 0.1, 0.6] + [0.3] * (2 * CHECKS_TO_TAKE_OFF)
    assert [check(watch_of_it, share).trouble for share in shares] == [None] * len(shares)


# ------------------------------------------------------------------------------------------------- the discriminator


def test_the_discriminator_s_figures_are_means_over_the_updates_since_the_last_look():
    watch_of_it = watch(boundary=0.5)
    observe(watch_of_it, [0.9, 0.6, 0.2, 0.7], [0.1, 0.8, 0.1, 0.9])  # 2 of 4 pairs right; signs +1 +1 -1 +1
    observe(watch_of_it, [0.4, 0.3, 0.5, 2.0], [0.1, 0.2, 0.4, 9.0])  # 3 of 4; -1 -1 0 +1
    observe(watch_of_it, [0.4, -3.0], [0.3, -4.0])  # both; -1 -1
    signals = check(watch_of_it, 0.7).signals
    assert signals["d_right"] == pytest.approx((2 / 4 + 3 / 4 + 1) / 3)
    assert signals["overfitting"] == pytest.approx((2 / 4 - 1 / 4 - 1) / 3)
    observe(watch_of_it, [0.7, 0.1, 0.8], [0.9, 0.0, 0.3])
    signals = check(watch_of_it, 0.7).signals
    assert signals["d_right"] == pytest.approx(2 / 3)
    assert signals["overfitting"] == pytest.approx(1 / 3)
    assert check(watch_of_it, 0.7).signals.keys() == {"diversity", "coverage"}


def test_a_pair_of_equal_logits_is_not_told_apart():
    watch_of_it = watch()
    observe(watch_of_it, [1.5, 1.0], [1.5, 0.5])
    assert check(watch_of_it, 0.7).signals["d_right"] == 0.5


def test_without_a_boundary_there_is_no_overfitting_to_tell_and_no_warning():
    watch_of_it = watch(boundary=None)
    observe(watch_of_it, [3.0, 5.0], [1.0, -2.0])
    result = check(watch_of_it, 0.7)
    assert result.signals == pytest.approx({"diversity": 0.7, "coverage": 1.0, "d_right": 1.0}, rel=1e-4)
    assert result.warning is None


def test_a_discriminator_that_has_won_is_warned_of_once_until_it_has_not():
    watch_of_it, warnings = watch(), []
    for right in (1, 1, 1, 0, 1, 1):
        observe(watch_of_it, [2.0, 2.0], [1.0, 1.0 if right else 3.0])
        warnings.append(check(watch_of_it, 0.7).warning)
    assert [warning is not None for warning in warnings] == [True, False, False, False, True, False]
    assert warnings[0].startswith("the discriminator ranks 100.0% of real/generated pairs correctly, so")
    assert warnings[4] == warnings[0]


def test_a_discriminator_that_has_won_at_six_checks_in_a_row_is_trouble():
    watch_of_it, results = watch(), []
    for right in (0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1):
        observe(watch_of_it, [2.0, 2.0], [1.0, 1.0 if right else 3.0])
        results.append(check(watch_of_it, 0.7))
    assert [result.good for result in results] == [True] + [False] * 5 + [True] + [False] * 7
    troubles = [result.trouble for result in results]
    assert troubles[:12] == [None] * 12
    assert (
        troubles[12]
        == troubles[13]
        == ("the discriminator has won: it ranks 100.0% of real/generated pairs correctly in 6 checks in a row")
    )
    without_boundary = watch(boundary=None)
    for _ in range(9):
        observe(without_boundary, [2.0], [1.0])
        assert check(without_boundary, 0.7).good


@pytest.mark.parametrize(("wrong", "warned"), [(4, True), (6, False)])
def test_the_discriminator_has_won_when_it_is_right_in_more_than_995_pairs_of_1000(wrong, warned):
    watch_of_it = watch()
    fake_logits = torch.tensor([3.0] * wrong + [1.0] * (1000 - wrong))
    watch_of_it.observe(torch.full((1000,), 2.0), fake_logits)
    assert (check(watch_of_it, 0.7).warning is not None) == warned


def test_observing_keeps_no_graph_and_changes_no_logits():
    watch_of_it = watch()
    real_logits, fake_logits = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.5, 3.0])
    watch_of_it.observe(real_logits, fake_logits)
    state = watch_of_it.state_dict()
    assert not state["right"].requires_grad and not state["signs"].requires_grad
    assert real_logits.tolist() == [1.0, 2.0] and fake_logits.tolist() == [0.5, 3.0]


# ----------------------------------------------------------------------------------------------------------- resuming


def story(watch_of_it: CollapseWatch, first: int, last: int) -> list[WatchResult]:
    """The results of checks `first` to `last` of a run that takes off, saturates, recovers and collapses twice."""
    shares = [0.1, 0.2, 0.3, 0.7, 0.9, 0.2, 0.4, 0.1, 0.1, 0.6, 0.1, 0.1]
    results = []
    for index in range(first, last):
        sure = index in (2, 3, 4, 7, 8)
        observe(watch_of_it, [2.0, 1.0], [1.0, 0.5 if sure else 3.0])
        results.append(check(watch_of_it, shares[index]))
        observe(watch_of_it, [-0.5, 0.1, 0.3], [-1.0, 0.0, 0.2])
    return results


@pytest.mark.parametrize("saved_at", range(12))
def test_a_watch_that_goes_on_from_a_saved_state_comes_to_the_same_verdicts(saved_at):
    expected = story(watch(), 0, 12)
    assert len({result[1:] for result in expected}) >= 4
    saved = watch()
    story(saved, 0, saved_at)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed = watch()
    story(resumed, 3, 6)  # what it knew itself is forgotten
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert story(resumed, saved_at, 12) == expected[saved_at:]


@pytest.mark.parametrize("checks", [0, 25, CHECKS_TO_TAKE_OFF - 1])
def test_a_resumed_watch_has_not_forgotten_how_often_it_has_checked(checks):
    saved, resumed = watch(), watch()
    for _ in range(checks):
        check(saved, 0.3)
    resumed.load_state_dict(saved.state_dict())
    troubles = [check(resumed, 0.3).trouble for _ in range(CHECKS_TO_TAKE_OFF - checks)]
    assert troubles[:-1] == [None] * (len(troubles) - 1)
    assert "has not started to learn" in troubles[-1]


def test_data_of_copies_gives_no_verdict_instead_of_a_division_by_zero():
    one = torch.full((1, 3, 16, 16), 0.25)
    watch = CollapseWatch(torch.cat([one, one]), boundary=0.0)
    result = watch.check(torch.cat([one, -one]))
    assert result.signals == {"diversity": 1.0, "coverage": 1.0}
    assert result.good and result.trouble is None


def test_images_that_are_not_finite_are_trouble_at_once():
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    watch = CollapseWatch(images, boundary=0.0)
    broken = images.clone()
    broken[2, 0, 5, 5] = torch.nan
    result = watch.check(broken)
    assert not result.good and "non-finite values" in result.trouble


def test_a_state_does_not_change_with_what_is_observed_later():
    watch = CollapseWatch(torch.randn(4, 3, 16, 16), boundary=0.0)
    watch.observe(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0]))
    state = watch.state_dict()
    watch.observe(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    assert (float(state["right"]), float(state["signs"])) == (0.5, 1.0)


def test_a_resumed_watch_compares_with_the_images_of_the_beginning():
    """Those of a stream may have changed on the Hub."""
    began, resumed = watch(), CollapseWatch(structured_images(seed=5) * 0.1, 0.0)
    resumed.load_state_dict(began.state_dict())
    assert check(resumed, 1.0).signals == check(began, 1.0).signals
    earlier = began.state_dict()
    earlier.pop("real")
    CollapseWatch(structured_images(), 0.0).load_state_dict(earlier)  # of a version that did not keep them
