"""Augmentation of the discriminator's input in GAN training.

DiffAugment (Zhao et al. 2020, arXiv:2006.10738) applies differentiable augmentations to real and generated images, in
both updates. A discriminator with few real images then cannot memorise them, and the generator does not learn to
reproduce the augmentations. ADA (Karras et al. 2020, arXiv:2006.06676) adapts the augmentation probability to how much
the discriminator overfits.
"""

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from hfgen.texts import counted


# Maximum shift and side of the cutout, as fractions of the image's side.
TRANSLATION, CUTOUT = 1 / 8, 1 / 2

# Below the first number of training images all are augmented, from the second on none; see `choose_augmentation`.
FEW_IMAGES, MANY_IMAGES = 2_000, 50_000
# The limit if overfitting cannot be measured. On a set of 8,000 images, WGAN-GP has FID 34 after training on 100,000
# images without augmentation, and 159 with all of them augmented.
FEW_UNMEASURED = 5_000

# ADA: target of the overfitting heuristic r_t, updates between adjustments, and real images within which the
# probability can go from 0 to 1.
ADA_TARGET, ADA_INTERVAL, ADA_IMAGES = 0.6, 4, 500_000


class AugmentationChoice(NamedTuple):
    """Choice of `choose_augmentation`: "none", "diffaugment" or "ada", and the reason."""

    kind: str
    reason: str


def choose_augmentation(
    wanted: str, num_images: int | None, measures_overfitting: bool, is_trained: bool = False
) -> AugmentationChoice:
    """Choose the augmentation by the number of training images, unless one was requested.

    Args:
        wanted: "auto", "none", "diffaugment" or "ada".
        num_images: None for a stream, whose length is unknown.
        measures_overfitting: whether the loss's logits have a decision boundary, which ADA's heuristic needs.
        is_trained: whether the discriminator starts from trained weights: then few updates are needed, and augmenting
            all images costs more than it helps. With 300 paintings FID after 200 updates is 227 then, 163 with ADA.
    """
    if wanted != "auto":
        return AugmentationChoice(wanted, "as requested")
    if num_images is None:
        return AugmentationChoice("none", "the number of images in a stream is unknown")
    if num_images >= MANY_IMAGES:
        return AugmentationChoice("none", f"{num_images:,} images, at least {MANY_IMAGES:,}: enough without it")
    if num_images < FEW_IMAGES and not (is_trained and measures_overfitting):
        few = f"{counted(num_images, 'image')}, fewer than {FEW_IMAGES:,}"
        return AugmentationChoice("diffaugment", f"{few}: every image is augmented")
    if not measures_overfitting:
        unknown = "and this loss cannot measure how much the discriminator overfits"
        if num_images < FEW_UNMEASURED:
            few = f"{num_images:,} images, fewer than {FEW_UNMEASURED:,}"
            return AugmentationChoice("diffaugment", f"{few}, {unknown}: every image is augmented")
        enough = f"{num_images:,} images, at least {FEW_UNMEASURED:,}"
        return AugmentationChoice(
            "none", f"{enough}, {unknown}; --augment diffaugment would augment every image, which slows learning"
        )
    start = ", a trained discriminator" if num_images < FEW_IMAGES else ""
    few = f"{num_images:,} images, fewer than {MANY_IMAGES:,}{start}"
    return AugmentationChoice("ada", f"{few}: the more it overfits, the more images are augmented")


def diff_augment(images: torch.Tensor, probability: torch.Tensor | float, generator: torch.Generator) -> torch.Tensor:
    """Apply colour changes, translation and cutout to images, differentiably.

    Args:
        images: `(batch_size, channels, height, width)`, in [-1, 1].
        probability: of each of the three operations, independently for each image; a number, or a scalar tensor on
            the images' device.
        generator: the random number generator, on the images' device.

    Returns:
        Same shape; values may leave [-1, 1]; shifted-in and cut-out pixels are 0 (grey).
    """
    batch_size, _, height, width = images.shape
    device = images.device
    applied = (torch.rand(3, batch_size, generator=generator, device=device) < probability).float()
    colour, shift, cut = (flag.view(-1, 1, 1, 1) for flag in applied)
    brightness, saturation, contrast = torch.rand(3, batch_size, 1, 1, 1, generator=generator, device=device)
    places = torch.rand(4, batch_size, generator=generator, device=device)

    # 1. Colour: brightness + [-1/2, 1/2], then saturation x [0, 2], then contrast x [1/2, 3/2].
    images = images + colour * (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(images, grey, colour * (1 - 2 * saturation))
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(images, mean, colour * (0.5 - contrast))

    # 2. Translation by up to 1/8 of the side in each direction, in whole pixels.
    furthest = (round(height * TRANSLATION), round(width * TRANSLATION))
    down = ((places[0] * (2 * furthest[0] + 1)).floor() - furthest[0]) * shift.flatten()
    right = ((places[1] * (2 * furthest[1] + 1)).floor() - furthest[1]) * shift.flatten()
    images = _translate(images, down.long(), right.long(), furthest)

    # 3. Cutout of a square with half the image's side, centred anywhere.
    rows = torch.arange(height, device=device)[None]
    columns = torch.arange(width, device=device)[None]
    row, column = (places[2] * height).floor()[:, None], (places[3] * width).floor()[:, None]
    half_height, half_width = height * CUTOUT / 2, width * CUTOUT / 2
    in_rows = (rows >= row - half_height) & (rows < row + half_height)  # (B, H)
    in_columns = (columns >= column - half_width) & (columns < column + half_width)  # (B, W)
    kept = 1 - cut * (in_rows[:, None, :, None] & in_columns[:, None, None, :]).float()  # (B, 1, H, W)
    return images * kept


def _translate(
    images: torch.Tensor, down: torch.Tensor, right: torch.Tensor, furthest: tuple[int, int]
) -> torch.Tensor:
    """Shift each image by its own number of pixels, padding with zeros.

    Args:
        images: `(batch_size, channels, height, width)`.
        down: int64 `(batch_size,)`, from -furthest[0] to furthest[0].
        right: int64 `(batch_size,)`, likewise.
        furthest: maximum shift in rows and in columns.
    """
    batch_size, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device)[None] + furthest[0] - down[:, None]  # (B, H), in the padded image
    columns = torch.arange(width, device=device)[None] + furthest[1] - right[:, None]  # (B, W)
    padded = torch.nn.functional.pad(images, (furthest[1], furthest[1], furthest[0], furthest[0]))
    flat = padded.permute(0, 2, 3, 1).flatten(1, 2)  # (B, (H + 2 f)(W + 2 f), C)
    index = (rows[:, :, None] * (width + 2 * furthest[1]) + columns[:, None, :]).view(batch_size, -1, 1)
    shifted = flat.gather(1, index.expand(-1, -1, flat.shape[2]))
    return shifted.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # channels_last, as the networks expect


class Augmentation:
    """Augments the discriminator's input with a probability that is fixed, or adapted as in ADA.

    Section 3.1 of Karras et al. 2020: `r_t`, the mean sign of the discriminator's logits on real images, is 0 without
    overfitting and 1 with complete overfitting. Every 4 updates the probability rises by a fixed amount if `r_t` is
    above its target, and falls if it is below. There is no device sync.

    Args:
        kind: "none", "diffaugment" or "ada".
        boundary: the logit at which the discriminator is undecided; only "ada" needs it.
        images_per_update: real images per discriminator update, over all processes.
        accelerator: averages over the processes.
        requested: whether the user asked for this kind; a checkpoint with another kind then does not replace it.

    Attributes:
        kind: as given, or as loaded from a checkpoint.
    """

    def __init__(
        self,
        kind: str,
        boundary: float | None,
        images_per_update: int,
        accelerator: Accelerator,
        requested: bool = False,
    ):
        self.kind, self._boundary, self._accelerator = kind, boundary or 0.0, accelerator
        self._requested = requested
        self._step_size = ADA_INTERVAL * images_per_update / ADA_IMAGES
        self.probability = torch.tensor(1.0 if kind == "diffaugment" else 0.0, device=accelerator.device)
        self._signs = torch.zeros((), device=accelerator.device)
        self._updates = 0

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the images as the discriminator should see them.

        Args:
            images: `(batch_size, channels, height, width)`, in [-1, 1].
            generator: the random number generator, on the images' device.
        """
        return images if self.kind == "none" else diff_augment(images, self.probability, generator)

    @torch.no_grad()
    def adapt(self, real_logits: torch.Tensor) -> None:
        """Update the ADA statistics with the logits of an update's real images, `(batch_size,)`."""
        if self.kind != "ada":
            return
        # Averaged at each update: a checkpoint may come between two changes, and stores the sum of one process.
        self._signs += self._accelerator.reduce((real_logits - self._boundary).sign().mean(), "mean")
        self._updates += 1
        if self._updates == ADA_INTERVAL:
            overfitting = self._signs / ADA_INTERVAL
            self.probability = (self.probability + self._step_size * (overfitting - ADA_TARGET).sign()).clamp(0, 1)
            self._signs, self._updates = torch.zeros_like(self._signs), 0

    def described(self, choice: AugmentationChoice) -> str:
        """Return the kind and its reason: that of the choice, unless a checkpoint has brought another kind."""
        return f"{self.kind} ({choice.reason if self.kind == choice.kind else 'as at the start of this training'})"

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint."""
        return {
            "kind": self.kind,
            "requested": self._requested,
            "probability": self.probability,
            "signs": self._signs.clone(),
            "updates": self._updates,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned, if it is of the kind that is used now."""
        # An automatic choice is kept, and a requested kind replaces it. Checkpoints from before kinds were saved
        # either augment all images or follow their probability.
        always = self.kind == "none" and bool(state_dict["probability"] == 1)
        kind = state_dict.get("kind", "diffaugment" if always else self.kind)
        if kind != self.kind and (self._requested or state_dict.get("requested", False)):
            return
        self.kind = kind
        self.probability = state_dict["probability"].to(self.probability.device)
        self._signs = state_dict["signs"].to(self._signs.device, copy=True)
        self._updates = state_dict["updates"]
