"""Pictures of a dataset: its images as a network sees them, and each augmentation at work."""

from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from PIL import Image

from hfgen.data.augment import horizontal_flip, random_erasing, random_rotation
from hfgen.data.batches import random_crop
from hfgen.data.decode import DecodedImage, UnreadableImageError, decode_image
from hfgen.data.opening import open_source
from hfgen.data.settings import DataSettings
from hfgen.data.store import ImageStore
from hfgen.errors import UserError
from hfgen.inference.figures import labelled_sheet, to_image
from hfgen.methods.augmentation import diff_augment


NUM_IMAGES, NUM_AUGMENTED = 64, 8
# How strong the augmentations are that have a strength: typical values, not defaults.
DEGREES, ADA_PROBABILITY = 15.0, 0.3
MAX_TRIED = 1000  # images that may be unreadable before the readable ones


def data_sheet(images: ImageStore) -> Image.Image:
    """Show up to 64 evenly spaced images of a dataset, at their training size, with their numbers."""
    indices = np.unique(np.linspace(0, len(images) - 1, NUM_IMAGES).round().astype(int)).tolist()
    shown = [Image.fromarray(np.array(images[index])) for index in indices]
    title = f"{len(shown)} of {len(images):,} images at {shown[0].width} pixels; image numbers below, from 0"
    return labelled_sheet(shown, title=title, captions=[str(index) for index in indices])


def augmentation_sheet(settings: DataSettings, bits: int | None = None) -> Image.Image:
    """Show the first images of a dataset as they are and after each augmentation: one row for each option.

    Args:
        settings: the dataset and the training size.
        bits: of its 16- and 32-bit grey images, as its intake report says; by default each one has its own white.

    Raises:
        UserError: if none of the first images can be read.
    """
    plain, cropped = _first_images(settings, bits)
    images = torch.from_numpy(np.stack([one.pixels[0] for one in plain])).permute(0, 3, 1, 2) / 127.5 - 1
    positions, size = np.random.default_rng(0), settings.sample_size
    crops = [random_crop(one.pixels[0], size, positions) for one in cropped]
    parts = [one.pixels[1 + index % 5] for index, one in enumerate(cropped)]
    rows = {
        "--horizontal_flip\nhalf of them mirrored": horizontal_flip(images, _seeded()),
        f"--random_rotation {DEGREES:g}": random_rotation(images, DEGREES, _seeded()),
        "--random_erasing 1\n0.1: one in ten": random_erasing(images, 1.0, _seeded()),
        "--augment diffaugment\nof a GAN: all images": diff_augment(images, 1.0, _seeded()),
        f"--augment ada\nof a GAN, at p = {ADA_PROBABILITY}": diff_augment(images, ADA_PROBABILITY, _seeded()),
    }
    pictures = {
        "as they are": [Image.fromarray(one.pixels[0]) for one in plain],
        "--crop random\nof what is not square": [Image.fromarray(one) for one in crops],
        "--five_crop\nfive more of each image": [Image.fromarray(one) for one in parts],
        **{name: [to_image(one) for one in row] for name, row in rows.items()},
    }
    return labelled_sheet([one for row in pictures.values() for one in row], len(plain), names=list(pictures))


def _first_images(settings: DataSettings, bits: int | None) -> tuple[list[DecodedImage], list[DecodedImage]]:
    """Decode the first readable images: cropped at the centre, and whole with five crops."""
    plain: list[DecodedImage] = []
    cropped: list[DecodedImage] = []
    for name, content in islice(open_source(settings).images(), MAX_TRIED):
        if len(plain) == NUM_AUGMENTED:
            break
        if isinstance(content, Exception):
            continue
        try:
            centred = decode_image(name, content, settings, bits)
            cropped.append(decode_image(name, content, replace(settings, crop="random", five_crop=True), bits))
        except UnreadableImageError:
            continue
        plain.append(centred)
    if not plain:
        raise UserError(f"--dataset {settings.dataset}: none of the first {MAX_TRIED:,} images can be read")
    return plain, cropped


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
