"""Sheets of samples, strips of the diffusion process, and labelled rows."""

import math
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from hfgen.inference.fonts import font_for
from hfgen.inference.sampling import finite_images, image_generators
from hfgen.methods.schedules import is_edm, noise_schedule, scaled_for_display
from hfgen.texts import printable


LABEL_WIDTH, LABEL_SIZE, LABEL_LINE = 200, 12, 15
LABEL_MARGIN = 8
GAP = 2  # between two images of a sheet
ROW_GAP = 6
# Small images are enlarged for looking at: at most to this many pixels, and at most this many times.
VISIBLE_PIXELS, MAX_ENLARGEMENT = 160, 4
MAX_STEPS_SHOWN = 10  # of a denoising


def image_sheet(images: Sequence[Image.Image], columns: int | None = None, gap: int = GAP) -> Image.Image:
    """Arrange images of one size on a white sheet, row by row.

    Args:
        images: at least one; all of the same size.
        columns: images per row; if None, the sheet is as square as possible.
        gap: white pixels between two images.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def batch_sheet(images: torch.Tensor, most: int = 16) -> Image.Image:
    """Arrange the first images of a training batch on a sheet.

    Args:
        images: `(batch_size, channels, height, width)`, on any device; clipped to [-1, 1].
        most: images on the sheet, at most.
    """
    return image_sheet([to_image(one) for one in images[:most].detach().float().cpu()])


def reconstruction_sheet(
    originals: Sequence[Image.Image], reconstructions: Sequence[Image.Image], columns: int = 8
) -> Image.Image:
    """Arrange originals above their reconstructions, in pairs of rows.

    Args:
        originals: at least one; all of the same size.
        reconstructions: one per original, of the same size.
        columns: pairs per row.
    """
    return image_sheet(_in_pairs(originals, reconstructions, columns), min(columns, len(originals)))


def labelled_pairs(
    above: Sequence[Image.Image], below: Sequence[Image.Image], names: tuple[str, str], columns: int = 8
) -> Image.Image:
    """Arrange pairs of images as `reconstruction_sheet` does, enlarged, with the names of both rows on the left."""
    cells, columns = _in_pairs(above, below, columns), min(columns, len(above))
    return labelled_sheet(cells, columns, names=names * (len(cells) // (2 * columns)))


def _in_pairs(above: Sequence[Image.Image], below: Sequence[Image.Image], columns: int) -> list[Image.Image]:
    """Order pairs of images for a sheet, one above the other; the last rows are filled with white."""
    columns = min(columns, len(above))
    blank = Image.new("RGB", above[0].size, "white")
    cells: list[Image.Image] = []
    for start in range(0, len(above), columns):
        for images in (above, below):
            row = list(images[start : start + columns])
            cells += row + [blank] * (columns - len(row))
    return cells


def enlarged(image: Image.Image) -> Image.Image:
    """Enlarge a small image up to four times, for looking at: each pixel becomes a square."""
    factor = max(1, min(MAX_ENLARGEMENT, VISIBLE_PIXELS // max(image.size)))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def labelled_sheet(
    images: Sequence[Image.Image],
    columns: int | None = None,
    title: str = "",
    heads: Sequence[str] = (),
    names: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> Image.Image:
    """Arrange images on a sheet with labels, the small ones enlarged; labels that do not fit are cut short.

    The last image ends at the right edge of the sheet, and its caption, if it has one, at the lower edge.

    Args:
        images: at least one; all of the same size.
        columns: images per row; if None, the sheet is as square as possible.
        title: line above everything.
        heads: labels above the columns, one each.
        names: labels on the left of the rows, one each, of one or more lines.
        captions: labels below the images, one each.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    shown = [enlarged(image) for image in images]
    width, height = shown[0].size
    cells = [_captioned(*pair) for pair in zip(shown, captions, strict=True)] if captions else shown
    sheet = image_sheet(cells, columns)
    lines = [_wrapped(name)[: max(1, height // LABEL_LINE)] for name in names]
    left = LABEL_MARGIN + math.ceil(max(_length(line) for name in lines for line in name)) if lines else 0
    top = LABEL_LINE * (bool(title) + bool(heads))
    whole = Image.new("RGB", (left + sheet.width, top + sheet.height), "white")
    whole.paste(sheet, (left, top))
    pen = ImageDraw.Draw(whole)
    _write(pen, (2, 0), _cut(title, whole.width - 2))
    for column, head in enumerate(heads):
        middle = left + column * (width + GAP) + width / 2
        _write(pen, (middle, top - LABEL_LINE), _cut(head, width), anchor="ma")
    for row, name in enumerate(lines):
        for index, line in enumerate(name):
            _write(pen, (2, top + row * (cells[0].height + GAP) + LABEL_LINE * index), line)
    return whole


def _captioned(image: Image.Image, caption: str) -> Image.Image:
    """Return an image with a line of text below it."""
    cell = Image.new("RGB", (image.width, image.height + LABEL_LINE), "white")
    cell.paste(image)
    _write(ImageDraw.Draw(cell), (image.width / 2, image.height), _cut(caption, image.width), anchor="ma")
    return cell


def _font(text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, or for accents and other scripts one that does not show them as boxes."""
    if text.replace("…", "").isascii():
        return ImageFont.load_default(LABEL_SIZE)
    return ImageFont.truetype(str(font_for(text)), LABEL_SIZE)


def _length(text: str) -> float:
    return _font(text).getlength(text)


def _write(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str = "la") -> None:
    pen.text(place, text, fill="black", font=_font(text), anchor=anchor)


def _cut(text: str, width: int) -> str:
    """Return a text as it can be shown in one line of so many pixels."""
    text = printable(text)
    if _length(text) <= width:
        return text
    fitting = (text[:count] + "…" for count in range(len(text) - 1, 0, -1))
    return next((short for short in fitting if _length(short) <= width), "")


def labelled_rows(rows: list[tuple[str, Image.Image]]) -> Image.Image:
    """Stack pictures vertically, each with its name on the left.

    Args:
        rows: at least one pair of a name, which may have several lines, and a picture of any size.
    """
    labels = [_wrapped(name) for name, _ in rows]
    heights = [
        max(picture.height, LABEL_LINE * len(label)) + ROW_GAP
        for label, (_, picture) in zip(labels, rows, strict=True)
    ]
    sheet = Image.new("RGB", (LABEL_WIDTH + max(picture.width for _, picture in rows), sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for label, height, (_, picture) in zip(labels, heights, rows, strict=True):
        sheet.paste(picture, (LABEL_WIDTH, top))
        for index, part in enumerate(label):
            _write(pen, (4, top + LABEL_LINE * index), part)
        top += height
    return sheet


def _wrapped(name: str) -> list[str]:
    """Break a name into lines that fit next to the pictures."""
    lines = []
    for part in map(printable, name.split("\n")):
        characters = max(1, len(part))
        while any(_length(line) > LABEL_WIDTH - 8 for line in textwrap.wrap(part, characters)):
            characters -= 1
        lines += textwrap.wrap(part, characters)
    return lines


def denoising_steps(
    pipeline: DiffusionPipeline, num_images: int, seed: int, num_inference_steps: int | None
) -> tuple[list[Image.Image], list[str], Image.Image]:
    """Generate images and show their denoising: one row per image, one column per step, ten of them at most.

    Args:
        pipeline: of diffusion.
        num_images: rows.
        seed: seed of the noise; the images are those of `generate_images` with this seed.
        num_inference_steps: denoising steps; the pipeline's default if None.

    Returns:
        The states after these steps, row by row; a head for each column, such as "step 1 of 10"; and the last of the
        finished images.
    """
    kept: list[tuple[str, torch.Tensor]] = []

    def keep(pipeline: DiffusionPipeline, index: int, timestep: int, tensors: dict[str, torch.Tensor]) -> None:
        timesteps = pipeline.scheduler.timesteps
        count = len(timesteps) if is_edm(pipeline.scheduler) else int((timesteps >= 0).sum())  # as in the pipeline
        if index in np.linspace(0, count - 1, min(count, MAX_STEPS_SHOWN)).round():
            state = scaled_for_display(pipeline.scheduler, index, tensors["latents"]).float().cpu()
            kept.append((f"step {index + 1} of {count}", state))

    finished = _generate(pipeline, num_images, seed, num_inference_steps, keep)
    states = [to_image(state[row]) for row in range(num_images) for _, state in kept]
    return states, [head for head, _ in kept], finished[-1]


def denoising_states(
    pipeline: DiffusionPipeline, timesteps: Sequence[int], num_images: int, seed: int, num_inference_steps: int | None
) -> tuple[list[Image.Image], list[int], Image.Image]:
    """Generate images and show their denoising: one row per image, one column per timestep.

    Args:
        pipeline: of diffusion.
        timesteps: timesteps to show, noisiest first; the state after the sampler's nearest step is shown.
        num_images: rows.
        seed: seed of the noise; the images are those of `generate_images` with this seed.
        num_inference_steps: denoising steps; the pipeline's default if None.

    Returns:
        The states, row by row; the timestep at which the step before each column began; and the last of the finished
        images.
    """
    # For each timestep to show: the nearest of the sampler's so far, and the state after its step.
    nearest: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(pipeline: DiffusionPipeline, index: int, timestep: int, tensors: dict[str, torch.Tensor]) -> None:
        state = None
        for shown in timesteps:
            if shown in nearest and abs(shown - nearest[shown][0]) <= abs(shown - timestep):
                continue
            if state is None:
                state = scaled_for_display(pipeline.scheduler, index, tensors["latents"]).float().cpu()
            nearest[shown] = (timestep, state)

    finished = _generate(pipeline, num_images, seed, num_inference_steps, keep)
    columns = [nearest[timestep] for timestep in timesteps]
    states = [to_image(state[row]) for row in range(num_images) for _, state in columns]
    return states, [timestep for timestep, _ in columns], finished[-1]


def _generate(
    pipeline: DiffusionPipeline, num_images: int, seed: int, num_inference_steps: int | None, after_each_step: Callable
) -> list[Image.Image]:
    with finite_images():
        return pipeline(
            num_images,
            generator=image_generators(seed, 0, num_images),
            num_inference_steps=num_inference_steps,
            callback_on_step_end=after_each_step,
        ).images


def labelled_denoising(states: Sequence[Image.Image], reached: Sequence[int], title: str = "") -> Image.Image:
    """Arrange the results of `denoising_states` on a sheet, each of the sampler's steps once."""
    distinct = [column for column, timestep in enumerate(reached) if timestep not in reached[:column]]
    rows = range(0, len(states), len(reached))
    cells = [states[row + column] for row in rows for column in distinct]
    return labelled_sheet(cells, len(distinct), title, heads=[f"t = {reached[column]}" for column in distinct])


def noised_states(image: Image.Image, timesteps: Sequence[int], trained_steps: int, seed: int) -> list[Image.Image]:
    """Show an image turning into noise: first by a linear schedule, then by a cosine one, one state per timestep.

    Args:
        image: the clean image.
        timesteps: timesteps to show, cleanest first.
        trained_steps: diffusion steps of both schedules.
        seed: seed of the noise, which is the same in all cells.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    cells = []
    for kind in ("linear", "cosine"):
        schedule = noise_schedule(kind, trained_steps)
        cells += [to_image(schedule.add_noise(pixels, noise, torch.tensor([step]))[0]) for step in timesteps]
    return cells


def to_image(pixels: torch.Tensor) -> Image.Image:
    """Convert pixels `(channels, height, width)`, clipped to [-1, 1], to an image; one channel is grey."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)
