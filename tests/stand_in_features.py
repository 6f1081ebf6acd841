"""Features that cost nothing, in the place of Inception's, and drawing that is watched."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import hfgen.evaluation.scoring
from hfgen.data.toy_paintings import paint
from hfgen.metrics.extraction import Extractor


class MeanColours(torch.nn.Module):
    """Stands in for Inception's network where a file of weights is needed, as by another process."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


def save_mean_colours(file: Path) -> None:
    """Write a file for `--feature_weights`."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # as the format is deprecated
        torch.jit.script(MeanColours()).save(file)


class Colours(Extractor):
    """The mean colours of the four quarters of an image, from 0 to 1: 12 features."""

    def __init__(self, identity="inception-2015 stand-in", before_each=lambda count: None):
        self.identity, self.calls, self._before_each = identity, 0, before_each

    def batches(self, images, count=None):
        self.calls += 1
        self._before_each(self.calls)
        yield np.stack([quarters(image) for image in images]).astype(np.float32)


def quarters(image) -> np.ndarray:
    """Return the features of one image, uint8 `(height, width, 3)`."""
    pixels = np.asarray(image) / 255
    halves = [half for part in np.array_split(pixels, 2) for half in np.array_split(part, 2, axis=1)]
    return np.concatenate([half.mean(axis=(0, 1)) for half in halves])


def watch_drawing(monkeypatch, before: Callable) -> None:
    """Call `before(pipeline, index)` before each image that is drawn; what it returns takes the image's place."""
    generate_images = hfgen.evaluation.scoring.generate_images

    def watched(pipeline, *arguments, **options):
        for index, image in enumerate(generate_images(pipeline, *arguments, **options)):
            yield before(pipeline, index) or image

    monkeypatch.setattr(hfgen.evaluation.scoring, "generate_images", watched)


def paintings(indices, size=16) -> list[Image.Image]:
    """Return images of the dataset `toy_paintings`."""
    return [Image.fromarray(paint(index, size)) for index in indices]


def folder_of(images, folder: Path) -> Path:
    """Save images as PNGs."""
    folder.mkdir()
    for index, image in enumerate(images):
        image.save(folder / f"{index:03d}.png")
    return folder


def table_of(markdown: str) -> list[dict[str, str]]:
    """Read the table in a text, a dictionary a row."""
    head, _, *rows = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    return [dict(zip(map(str.strip, head), map(str.strip, row), strict=True)) for row in rows]
