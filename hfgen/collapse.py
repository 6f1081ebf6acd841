"""A watch over the training of a GAN: is the generator still drawing different images, is the discriminator too good?

What it looks at costs next to nothing: one sheet of images now and then, and the logits that training computes anyway.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import adaptive_avg_pool2d


# Diversity is measured against that of as many training images, which is 1. Below COLLAPSED at two looks in a row the
# generator has collapsed; a checkpoint made above GOOD is worth going back to.
COLLAPSED, GOOD = 0.25, 0.5
LOOKS_TO_COLLAPSE = 2
# A generator that has not been good once after so many looks is not going to be.
LOOKS_TO_TAKE_OFF = 40
# Images on the sheet that is looked at, if the data set has as many.
SHEET_SIZE = 256
# Above this share of pairs told apart the discriminator's gradient tells the generator next to nothing; after so many
# such looks in a row it has won, and what the generator draws by then may be diverse, but is no picture of the data.
SATURATED = 0.995
LOOKS_TO_WIN = 6


class Verdict(NamedTuple):
    """What the watch saw.

    Attributes:
        signals: numbers for the log, by name.
        good: whether a checkpoint of this moment is worth going back to.
        trouble: what is wrong with the generator, as a clause; None if nothing is.
        warning: what the user may want to change, as a sentence; None if nothing, or if it was said before.
    """

    signals: dict[str, float]
    good: bool
    trouble: str | None
    warning: str | None


def diversity(images: torch.Tensor) -> tuple[float, float]:
    """Return how far images are from each other: the mean distance of two, and the mean distance to the nearest other.

    Distances are between images shrunk to 16 x 16 pixels, so that noise does not pass for variety. The first falls
    when all images become alike, the second already when there are a few kinds of them.

    Args:
        images: at least two, `(count, channels, height, width)`, in [-1, 1].
    """
    features = adaptive_avg_pool2d(images.float(), 16).flatten(1)
    distances = torch.cdist(features, features)
    count = len(images)
    distances.fill_diagonal_(torch.inf)
    nearest = distances.min(dim=1).values.mean()
    distances.fill_diagonal_(0)
    return float(distances.sum() / (count * (count - 1))), float(nearest)


class CollapseWatch:
    """Judges a generator by its diversity and tells how sure the discriminator is.

    Args:
        real_images: training images, `(count, channels, height, width)`, in [-1, 1]: as many as will be looked at.
        boundary: the logit at which the discriminator is undecided; None if it has none.
    """

    def __init__(self, real_images: torch.Tensor, boundary: float | None):
        self.num_images = len(real_images)
        self._real_spread, self._real_nearest = diversity(real_images)
        self._boundary = boundary
        self._looks, self._low_looks, self._sure_looks, self._was_good = 0, 0, 0, False
        self._forget(real_images.device)

    @torch.no_grad()
    def observe(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> None:
        """Note the logits of one update of the discriminator, both `(batch_size,)`. Nothing is read off the device."""
        self._right += (real_logits > fake_logits).float().mean()
        if self._boundary is not None:
            self._signs += (real_logits - self._boundary).sign().mean()
        self._updates += 1

    def look(self, fake_images: torch.Tensor) -> Verdict:
        """Judge the generator by images that it drew from the same latents as at every other look.

        Args:
            fake_images: `(num_images, channels, height, width)`, in [-1, 1].
        """
        spread, nearest = diversity(fake_images)
        ratios = {
            "diversity": _part_of(spread, self._real_spread),
            "diversity_nearest": _part_of(nearest, self._real_nearest),
        }
        lowest = min(ratios.values(), key=lambda ratio: -math.inf if math.isnan(ratio) else ratio)
        self._looks += 1
        self._was_good = self._was_good or lowest >= GOOD
        self._low_looks = self._low_looks + 1 if lowest < COLLAPSED else 0

        trouble = None
        if math.isnan(lowest):
            trouble = "the generator draws numbers that are not finite"
        elif self._was_good and self._low_looks >= LOOKS_TO_COLLAPSE:
            trouble = f"the generator has collapsed: its images have {lowest:.0%} of the data's diversity"
        elif not self._was_good and self._looks >= LOOKS_TO_TAKE_OFF:
            trouble = f"the generator has not taken off: its images have {lowest:.0%} of the data's diversity"

        warning = None
        signals = dict(ratios)
        if self._updates:
            signals["d_right"] = float(self._right) / self._updates
        if self._updates and self._boundary is not None:
            signals["overfitting"] = float(self._signs) / self._updates
            self._sure_looks = self._sure_looks + 1 if signals["d_right"] > SATURATED else 0
            told_apart = f"tells real from generated in {signals['d_right']:.1%} of pairs"
            if self._sure_looks == 1:
                warning = (
                    f"the discriminator {told_apart}, so the generator learns little from it; spectral norm, "
                    "--augment diffaugment or a lower --learning_rate_d help"
                )
            elif self._sure_looks >= LOOKS_TO_WIN:
                won = f"the discriminator has won: it {told_apart}, at {LOOKS_TO_WIN} looks in a row"
                trouble = trouble or won
        self._forget(fake_images.device)
        return Verdict(signals, lowest >= GOOD and not self._sure_looks, trouble, warning)

    def _forget(self, device: torch.device) -> None:
        """Start a new window of observations."""
        self._right, self._signs = torch.zeros((), device=device), torch.zeros((), device=device)
        self._updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to come to the same verdicts."""
        counts = (self._looks, self._low_looks, self._sure_looks, self._was_good, self._updates)
        return {"counts": counts, "right": self._right.clone(), "signs": self._signs.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._looks, self._low_looks, self._sure_looks, self._was_good, self._updates = state_dict["counts"]
        self._right = state_dict["right"].to(self._right.device, copy=True)
        self._signs = state_dict["signs"].to(self._signs.device, copy=True)


def _part_of(distance: float, real_distance: float) -> float:
    """Return a distance as a part of the data's; 1 if the data's is 0, as of copies, which tells nothing."""
    return distance / real_distance if real_distance else 1.0
