"""Pictures of pictures: sheets of samples."""

import math
from collections.abc import Sequence

from PIL import Image


def image_sheet(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Lay images of one size out on a white sheet, row by row.

    Args:
        images: at least one; all as large as the first.
        columns: images a row; as square as possible if None.
        gap: white pixels between two images.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet
