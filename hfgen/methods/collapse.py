"""A watch over the training of a GAN: is the generator still drawing different images, is the discriminator too good?

What it looks at costs next to nothing: one sheet of images now and then, and the logits that training computes anyway.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import adaptive_avg_pool2d


# Of the data's diversity, and of the data's images covered: below the first number at two looks in a row the generator
# has collapsed; a checkpoint made above both second ones is worth going back to. In runs that drew recognisable images
# diversity was 0.6 or more and coverage 0.8 or more, in collapsed ones coverage was 0.3 or less.
COLLAPSED_DIVERSITY, GOOD_DIVERSITY = 0.25, 0.5
COLLAPSED_COVERAGE, GOOD_COVERAGE = 0.4, 0.6
LOOKS_TO_COLLAPSE = 2
# Nearest neighbours that span the surroundings of a training image.
NEIGHBOURS = 5
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


def small_features(images: torch.Tensor) -> torch.Tensor:
    """Shrink images to 16 x 16 pixels, so that noise does not pass for variety.

    Args:
        images: `(count, channels, height, width)`, in [-1, 1].

    Returns:
        `(count, 256 * channels)`, float32.
    """
    return adaptive_avg_pool2d(images.float(), 16).flatten(1)


def diversity(features: torch.Tensor) -> float:
    """Return the mean distance of two of at least two features, `(count, size)`: 0 if all are alike."""
    count = len(features)
    distances = torch.cdist(features, features).fill_diagonal_(0)  # which rounding errors keep from being 0
    return float(distances.sum() / (count * (count - 1)))


def coverage(real_features: torch.Tensor, fake_features: torch.Tensor) -> float:
    """Return the share of real images in whose surroundings there is a generated one.

    Naeem et al. 2020 (arXiv:2002.09797), equation 9: the surroundings reach as far as the fifth nearest other real
    image. It is 0.97 for as many images of the same distribution; small if there are a few kinds of images only, or
    none that resemble the data; but 1 if all are the mean of the data: hence the diversity beside it.

    Args:
        real_features: `(count, size)`, at least two.
        fake_features: `(count, size)`.
    """
    neighbours = min(NEIGHBOURS, len(real_features) - 1)
    distances = torch.cdist(real_features, real_features).fill_diagonal_(torch.inf)
    reach = distances.kthvalue(neighbours, dim=1).values
    return float((torch.cdist(real_features, fake_features).min(dim=1).values <= reach).float().mean())


class CollapseWatch:
    """Judges a generator by its diversity and its coverage of the data, and tells how sure the discriminator is.

    Args:
        real_images: training images, `(count, channels, height, width)`, in [-1, 1]: as many as will be looked at; on
            the device where the logits will be.
        boundary: the logit at which the discriminator is undecided; None if it has none.
    """

    def __init__(self, real_images: torch.Tensor, boundary: float | None):
        self.num_images = len(real_images)
        # On the CPU, where the sheet is drawn to; the logits are summed where they are.
        self._real_features, self._device = small_features(real_images).cpu(), real_images.device
        self._real_diversity = diversity(self._real_features)
        self._boundary = boundary
        self._looks, self._low_looks, self._sure_looks, self._was_good = 0, 0, 0, False
        self._forget()

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
        features = small_features(fake_images).cpu()
        own = diversity(features)
        # Data of copies has none, which tells nothing.
        part = own / self._real_diversity if self._real_diversity else 1.0
        covered = coverage(self._real_features, features)
        signals = {"diversity": part, "coverage": covered, **self._discriminator_signals()}
        sure = self._boundary is not None and signals.get("d_right", 0.0) > SATURATED
        good = part >= GOOD_DIVERSITY and covered >= GOOD_COVERAGE and not sure
        low = part < COLLAPSED_DIVERSITY or covered < COLLAPSED_COVERAGE
        self._looks += 1
        self._was_good = self._was_good or good
        self._low_looks = self._low_looks + 1 if low else 0
        self._sure_looks = self._sure_looks + 1 if sure else 0

        trouble, warning = None, None
        found = f"its images have {part:.0%} of the data's diversity and cover {covered:.0%} of the data"
        told_apart = f"tells real from generated in {signals.get('d_right', 0.0):.1%} of pairs"
        if math.isnan(own):
            trouble = "the generator draws numbers that are not finite"
        elif self._was_good and self._low_looks >= LOOKS_TO_COLLAPSE:
            trouble = f"the generator has collapsed: {found}"
        elif self._sure_looks >= LOOKS_TO_WIN:
            trouble = f"the discriminator has won: it {told_apart}, at {LOOKS_TO_WIN} looks in a row"
        elif not self._was_good and self._looks >= LOOKS_TO_TAKE_OFF:
            trouble = f"the generator has not taken off: {found}"
        if self._sure_looks == 1:
            warning = (
                f"the discriminator {told_apart}, so the generator learns little from it; spectral norm, "
                "--augment diffaugment or a lower --learning_rate_d help"
            )
        self._forget()
        return Verdict(signals, good, trouble, warning)

    def _discriminator_signals(self) -> dict[str, float]:
        """Return what was observed since the last look: the share of pairs told apart, and ADA's heuristic."""
        if not self._updates:
            return {}
        signals = {"d_right": float(self._right) / self._updates}
        if self._boundary is not None:
            signals["overfitting"] = float(self._signs) / self._updates
        return signals

    def _forget(self) -> None:
        """Start a new window of observations."""
        self._right, self._signs = torch.zeros((), device=self._device), torch.zeros((), device=self._device)
        self._updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to come to the same verdicts."""
        counts = (self._looks, self._low_looks, self._sure_looks, self._was_good, self._updates)
        return {"counts": counts, "right": self._right.clone(), "signs": self._signs.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._looks, self._low_looks, self._sure_looks, self._was_good, self._updates = state_dict["counts"]
        self._right = state_dict["right"].to(self._device, copy=True)
        self._signs = state_dict["signs"].to(self._device, copy=True)
