"""How often the discriminator's images are altered: `Augmentation` and `choose_augmentation`."""

import io
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from hfgen.methods.augmentation import (
    ADA_IMAGES,
    ADA_INTERVAL,
    ADA_TARGET,
    FEW_IMAGES,
    FEW_UNMEASURED,
    MANY_IMAGES,
    Augmentation,
    choose_augmentation,
    diff_augment,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy_images(count: int, height: int = 16, width: int = 24, channels: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, height, width, generator=rng(seed)).tanh()


def augmentation(kind: str, boundary: float | None = 0.0, images_per_update: int = 50) -> Augmentation:
    return Augmentation(kind, boundary, images_per_update, Accelerator(cpu=True))


def adapt(augmentation: Augmentation, *logits: float) -> float:
    augmentation.adapt(torch.tensor(logits))
    return augmentation.probability.item()


def test_without_augmentation_the_very_same_images_come_back():
    images = noisy_images(3)
    assert augmentation("none").apply(images, rng()) is images


def test_diffaugment_alters_every_image_and_ada_at_first_none():
    images = noisy_images(8)
    assert torch.equal(augmentation("diffaugment").apply(images, rng(3)), diff_augment(images, 1.0, rng(3)))
    assert torch.equal(augmentation("ada").apply(images, rng(3)), images)


def test_ada_alters_images_with_the_probability_that_it_has_come_to():
    images, ada = noisy_images(50), augmentation("ada", images_per_update=50_000)
    for _ in range(4):
        adapt(ada, 1.0)
    assert ada.probability.item() == pytest.approx(0.4)
    assert torch.equal(ada.apply(images, rng(3)), diff_augment(images, 0.4, rng(3)))


@pytest.mark.parametrize("kind", ["none", "diffaugment"])
def test_only_ada_adapts(kind):
    fixed = augmentation(kind)
    before = fixed.probability.item()
    assert {adapt(fixed, sign, sign) for sign in (1.0, -1.0) for _ in range(12)} == {before}
    assert before == (1 if kind == "diffaugment" else 0)


def test_with_overfitting_the_probability_rises_by_one_step_every_fourth_update():
    ada = augmentation("ada", images_per_update=50)
    step = 4 * 50 / 500_000
    probabilities = [adapt(ada, 2.0, 0.3) for _ in range(12)]
    assert probabilities == pytest.approx(
        [0, 0, 0, step, step, step, step, 2 * step, 2 * step, 2 * step, 2 * step, 3 * step]
    )


def test_the_probability_goes_from_0_to_1_in_so_many_images_and_no_further_and_back():
    ada = augmentation("ada", images_per_update=12_500)
    rounds = ADA_IMAGES // (12_500 * ADA_INTERVAL)
    rising = [adapt(ada, 1.0) for _ in range(ADA_INTERVAL * (rounds + 3))]
    assert rising[ADA_INTERVAL * rounds - 2] < 0.95
    assert rising[ADA_INTERVAL * rounds - 1 :] == pytest.approx([1.0] * (3 * ADA_INTERVAL + 1))
    falling = [adapt(ada, -1.0) for _ in range(ADA_INTERVAL * (rounds + 3))]
    assert falling[3] == pytest.approx(0.9)
    assert max(rising) <= 1 and min(falling) == 0
    assert falling[ADA_INTERVAL * rounds - 1 :] == pytest.approx([0.0] * (3 * ADA_INTERVAL + 1), abs=1e-6)


def test_it_takes_more_than_the_target_over_four_updates_for_the_probability_to_rise():
    for positive, expected in ((15, 0.4), (17, 0.6)):  # of 20 signs: their mean is 0.5 or 0.7, the target is 0.6
        ada = augmentation("ada", images_per_update=12_500)
        for _ in range(20):
            adapt(ada, 1.0)
        assert ada.probability.item() == pytest.approx(0.5)
        logits = torch.tensor([3.0] * positive + [-0.01] * (20 - positive)).view(4, 5)
        for batch in logits:
            adapt(ada, *batch.tolist())
        assert ada.probability.item() == pytest.approx(expected)
    assert ADA_TARGET == 0.6


def test_each_of_four_updates_counts_the_same_and_the_next_four_start_anew():
    ada = augmentation("ada", images_per_update=12_500)
    step = 0.1
    assert [adapt(ada, sign) for sign in (1.0, 1.0, 1.0, 0.5)][-1] == pytest.approx(step)
    assert [adapt(ada, sign) for sign in (1.0, 1.0, 1.0, -1.0)][-1] == 0  # 0.5 is below the target
    assert [adapt(ada, sign) for sign in (-1.0, 1.0, 1.0, 1.0)][-1] == 0
    assert [adapt(ada, sign) for sign in (1.0, 1.0, 1.0, 1.0)][-1] == pytest.approx(step)


@pytest.mark.parametrize(("boundary", "logit", "rises"), [(0.5, 0.4, False), (0.5, 0.6, True), (0.0, 0.4, True)])
def test_signs_are_those_of_the_distance_from_the_boundary(boundary, logit, rises):
    ada = augmentation("ada", boundary=boundary)
    assert ([adapt(ada, logit, logit) for _ in range(4)][-1] > 0) == rises


def test_adapting_keeps_no_graph():
    ada = augmentation("ada")
    for _ in range(6):
        ada.adapt(torch.tensor([1.0, 2.0], requires_grad=True))
    assert not any(value.requires_grad for value in ada.state_dict().values() if torch.is_tensor(value))


@pytest.mark.parametrize("saved_at", range(10))
def test_augmentation_restored_from_a_state_adapts_as_if_uninterrupted(saved_at):
    logits = torch.randn(24, 5, generator=rng(11)) + 1.2
    uninterrupted, saved, resumed = (augmentation("ada", images_per_update=2_000) for _ in range(3))
    expected = [adapt(uninterrupted, *batch.tolist()) for batch in logits]
    assert len(set(expected)) > 3
    for batch in logits[:saved_at]:
        adapt(saved, *batch.tolist())
    for batch in logits[5:8]:
        adapt(resumed, *batch.tolist())  # what it knew itself is forgotten
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.probability.item() == saved.probability.item()
    assert [adapt(resumed, *batch.tolist()) for batch in logits[saved_at:]] == expected[saved_at:]


# ------------------------------------------------------------------------------------------------ choose_augmentation


@pytest.mark.parametrize(
    ("wanted", "num_images", "measures_overfitting", "kind", "reason"),
    [
        ("none", 10, True, "none", "as requested"),
        ("diffaugment", 1_000_000, True, "diffaugment", "as requested"),
        ("ada", None, True, "ada", "as requested"),
        ("auto", None, True, "none", "the number of images in a stream is unknown"),
        ("auto", 1, True, "diffaugment", "1 image, fewer than 2,000: every image is augmented"),
        ("auto", 1_999, True, "diffaugment", "1,999 images, fewer than 2,000: every image is augmented"),
        ("auto", 1_999, False, "diffaugment", "1,999 images, fewer than 2,000: every image is augmented"),
        (
            "auto",
            2_000,
            True,
            "ada",
            "2,000 images, fewer than 50,000: the more it overfits, the more images are augmented",
        ),
        (
            "auto",
            2_000,
            False,
            "diffaugment",
            "2,000 images, fewer than 5,000, and this loss cannot measure how much the discriminator overfits: every "
            "image is augmented",
        ),
        (
            "auto",
            5_000,
            False,
            "none",
            "5,000 images, at least 5,000, and this loss cannot measure how much the discriminator overfits; "
            "--augment diffaugment would augment every image, which slows learning",
        ),
        (
            "auto",
            49_999,
            True,
            "ada",
            "49,999 images, fewer than 50,000: the more it overfits, the more images are augmented",
        ),
        ("auto", 50_000, True, "none", "50,000 images, at least 50,000: enough without it"),
        ("auto", 50_000, False, "none", "50,000 images, at least 50,000: enough without it"),
    ],
)
def test_the_number_of_images_decides_unless_something_was_asked_for(
    wanted, num_images, measures_overfitting, kind, reason
):
    assert choose_augmentation(wanted, num_images, measures_overfitting) == (kind, reason)
    assert (FEW_IMAGES, FEW_UNMEASURED, MANY_IMAGES) == (2_000, 5_000, 50_000)


@pytest.mark.parametrize(
    ("num_images", "measures_overfitting", "kind"),
    [(300, True, "ada"), (300, False, "diffaugment"), (1_999, True, "ada"), (50_000, True, "none")],
)
def test_from_trained_weights_few_images_are_augmented_only_as_needed(num_images, measures_overfitting, kind):
    assert choose_augmentation("auto", num_images, measures_overfitting, is_trained=True).kind == kind
    assert choose_augmentation("diffaugment", num_images, measures_overfitting, is_trained=True).kind == "diffaugment"


def test_a_run_goes_on_with_the_augmentation_that_it_began_with():
    accelerator = Accelerator(cpu=True)
    began = Augmentation("diffaugment", None, 8, accelerator)
    state = began.state_dict()
    for saved in (state, {key: value for key, value in state.items() if key != "kind"}):  # the latter from before
        today = Augmentation("none", None, 8, accelerator)
        today.load_state_dict(saved)
        images = noisy_images(4)
        assert today.kind == "diffaugment"
        assert torch.equal(today.apply(images, rng()), began.apply(images, rng()))
    for asked_before, asked_now in (False, True), (True, False), (True, True):  # what is asked for now replaces it
        saved = Augmentation("diffaugment", None, 8, accelerator, asked_before).state_dict()
        today = Augmentation("ada", 0.0, 8, accelerator, asked_now)
        today.load_state_dict(saved)
        assert (today.kind, today.probability.item()) == ("ada", 0)
    untouched = Augmentation("none", None, 8, accelerator).state_dict()
    for saved in (untouched, {key: value for key, value in untouched.items() if key != "kind"}):
        today = Augmentation("none", None, 8, accelerator)
        today.load_state_dict(saved)
        assert today.kind == "none"


def test_a_checkpoint_between_two_changes_holds_the_signs_of_all_processes():
    ada = augmentation("ada")
    ada._accelerator = SimpleNamespace(device=torch.device("cpu"), reduce=lambda value, how: value / 2 + 0.5)
    ada.adapt(torch.tensor([-1.0, -2.0]))  # on the other process: all positive
    assert ada.state_dict()["signs"].item() == 0
