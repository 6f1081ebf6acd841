"""The images on a sheet with labels."""

from pathlib import Path

import numpy as np
from PIL import Image

from hfgen.inference.figures import GAP, LABEL_LINE, MAX_ENLARGEMENT, VISIBLE_PIXELS


def tiles(file: Path | Image.Image, rows: int, columns: int, size: int = 8, captions: bool = False) -> np.ndarray:
    """Read the images of a sheet, whose labels are above, on the left, and below each if there are captions.

    Args:
        file: the sheet, or its file.
        rows: rows of images, counted from below.
        columns: columns of images, counted from the right.
        size: height and width of the images before they were enlarged.
        captions: whether there is a line of text below each image.

    Returns:
        int `(rows, columns, size, size, 3)`; every pixel of an image is the same all over its square.
    """
    sheet = np.asarray((file if isinstance(file, Image.Image) else Image.open(file)).convert("RGB")).astype(int)
    factor = max(1, min(MAX_ENLARGEMENT, VISIBLE_PIXELS // size))
    side, below = factor * size, LABEL_LINE * captions
    found = np.empty((rows, columns, size, size, 3), int)
    for row in range(rows):
        for column in range(columns):
            bottom = sheet.shape[0] - below - (rows - 1 - row) * (side + below + GAP)
            right = sheet.shape[1] - (columns - 1 - column) * (side + GAP)
            tile = sheet[bottom - side : bottom, right - side : right]
            found[row, column] = tile[::factor, ::factor]
            assert np.array_equal(tile, found[row, column].repeat(factor, 0).repeat(factor, 1))
    return found
