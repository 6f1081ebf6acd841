"""Monitors GAN training: are the generated images still diverse, is the discriminator too strong?

It costs next to nothing: one sheet of images now and then, and the logits that training computes anyway.
"""

import math
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from hfgen.methods.watch import WatchResult


# Diversity relative to the data, and share of the data covered. If either is below its first number at two checks in a
# row, the generator has collapsed; a checkpoint with both above their second numbers is good to roll back to. In runs
# with recognisable images diversity was at least 0.6 and coverage at least 0.8; in collapsed ones coverage was at most
# 0.3.
COLLAPSED_DIVERSITY, GOOD_DIVERSITY = 0.25, 0.5
COLLAPSED_COVERAGE, GOOD_COVERAGE = 0.4, 0.6
CHECKS_TO_COLLAPSE = 2
# Number of nearest neighbours that defines the neighbourhood of a training image.
NEIGHBOURS = 5
# A generator that has not been good once within this many checks will not become good.
CHECKS_TO_TAKE_OFF = 40
# Images on the sheet that is judged, or the size of the dataset if that is smaller.
SHEET_SIZE = 256
# If the discriminator separates more than this share of real/generated pairs, its gradient is nearly useless to the
# generator. After CHECKS_TO_WIN such checks in a row it has won: images may be diverse but do not resemble the data.
SATURATED = 0.995
CHECKS_TO_WIN = 6


def small_features(images: torch.Tensor) -> torch.Tensor:
    """Downsample images to 16 x 16 pixels, so that noise is not counted as diversity.

    Args:
        images: `(count, channels, height, width)`, in [-1, 1].

    Returns:
        `(count, 256 * channels)`, float32.
    """
    return adaptive_avg_pool2d(images.float(), 16).flatten(1)


def diversity(features: torch.Tensor) -> float:
    """Return the mean pairwise distance of at least two features, `(count, size)`: 0 if all are equal."""
    count = len(features)
    distances = torch.cdist(features, features).fill_diagonal_(0)  # not exactly 0 because of rounding
    return float(distances.sum() / (count * (count - 1)))


def coverage(real_features: torch.Tensor, fake_features: torch.Tensor) -> float:
    """Return the share of real images that have a generated image in their neighbourhood.

    Naeem et al. 2020 (arXiv:2002.09797), equation 9: the neighbourhood extends to the fifth nearest other real image.
    Coverage is 0.97 for equally many images from the same distribution, and small if there are only a few kinds of
    images or none resembles the data. It is also 1 if all images equal the data's mean; diversity detects that case.
    Identical real images count once: among them no neighbour is at a distance. A single one says nothing: 1.

    Args:
        real_features: `(count, size)`.
        fake_features: `(count, size)`.
    """
    real_features = real_features.unique(dim=0)
    if len(real_features) < 2:
        return 1.0
    neighbours = min(NEIGHBOURS, len(real_features) - 1)
    distances = torch.cdist(real_features, real_features).fill_diagonal_(torch.inf)
    reach = distances.kthvalue(neighbours, dim=1).values
    return float((torch.cdist(real_features, fake_features).min(dim=1).values <= reach).float().mean())


class CollapseWatch:
    """Judges a generator by its diversity and its coverage of the data, and reports how sure the discriminator is.

    Args:
        real_images: training images, `(count, channels, height, width)`, in [-1, 1]: the same number as generated
            images at each check; on the device where the logits will be.
        boundary: the logit at which the discriminator is undecided; None if it has none.
    """

    def __init__(self, real_images: torch.Tensor, boundary: float | None):
        self.num_images = len(real_images)
        # On the CPU, like the sheet of samples; logits are summed on their own device.
        self._real_features, self._device = small_features(real_images).cpu(), real_images.device
        self._real_diversity = diversity(self._real_features)
        self._boundary = boundary
        self._checks, self._low_checks, self._sure_checks, self._was_good = 0, 0, 0, False
        self._forget()

    @torch.no_grad()
    def observe(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> None:
        """Record the logits of one discriminator update, both `(batch_size,)`, without a device sync."""
        self._right += (real_logits > fake_logits).float().mean()
        if self._boundary is not None:
            self._signs += (real_logits - self._boundary).sign().mean()
        self._updates += 1

    def check(self, fake_images: torch.Tensor) -> WatchResult:
        """Judge the generator by its images, which come from the same latents at every check.

        Args:
            fake_images: `(num_images, channels, height, width)`, in [-1, 1].
        """
        features = small_features(fake_images).cpu()
        own = diversity(features)
        # Data of identical images has no diversity to compare with.
        part = own / self._real_diversity if self._real_diversity else 1.0
        covered = coverage(self._real_features, features)
        signals = {"diversity": part, "coverage": covered, **self._discriminator_signals()}
        sure = self._boundary is not None and signals.get("d_right", 0.0) > SATURATED
        good = part >= GOOD_DIVERSITY and covered >= GOOD_COVERAGE and not sure
        low = part < COLLAPSED_DIVERSITY or covered < COLLAPSED_COVERAGE
        self._checks += 1
        self._was_good = self._was_good or good
        self._low_checks = self._low_checks + 1 if low else 0
        self._sure_checks = self._sure_checks + 1 if sure else 0

        trouble, warning = None, None
        found = f"its images have {part:.0%} of the data's diversity and cover {covered:.0%} of the data"
        ranks = f"ranks {signals.get('d_right', 0.0):.1%} of real/generated pairs correctly"
        if math.isnan(own):
            trouble = "the generator's images contain non-finite values"
        elif self._was_good and self._low_checks >= CHECKS_TO_COLLAPSE:
            trouble = f"the generator has collapsed: {found}"
        elif self._sure_checks >= CHECKS_TO_WIN:
            trouble = f"the discriminator has won: it {ranks} in {CHECKS_TO_WIN} checks in a row"
        elif not self._was_good and self._checks >= CHECKS_TO_TAKE_OFF:
            trouble = f"the generator has not started to learn: {found}"
        if self._sure_checks == 1:
            warning = (
                f"the discriminator {ranks}, so its gradients teach the generator little; try --augment diffaugment "
                "or a lower --learning_rate_d"
            )
        self._forget()
        return WatchResult(signals, good, trouble, warning)

    def _discriminator_signals(self) -> dict[str, float]:
        """Return the observations since the last check: share of pairs ranked correctly, and ADA's heuristic."""
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
        """Return the state that a resumed run needs to reach the same results."""
        counts = (self._checks, self._low_checks, self._sure_checks, self._was_good, self._updates)
        # The real images of a stream, which may have changed on the Hub, stay those of the run's beginning.
        real = self._real_features.clone()
        return {"counts": counts, "right": self._right.clone(), "signs": self._signs.clone(), "real": real}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._checks, self._low_checks, self._sure_checks, self._was_good, self._updates = state_dict["counts"]
        self._right = state_dict["right"].to(self._device, copy=True)
        self._signs = state_dict["signs"].to(self._device, copy=True)
        if "real" in state_dict:  # not in checkpoints of earlier versions
            self._real_features = state_dict["real"].clone()
            self._real_diversity = diversity(self._real_features)
