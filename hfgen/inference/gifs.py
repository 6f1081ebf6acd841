"""GIFs: of a run, from its sample sheets, and of other images. Nothing here imports torch."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from hfgen.data.memory import MAX_ENCODED_BYTES
from hfgen.errors import UserError
from hfgen.files import read_regular


SHOWN_PIXELS = 768  # of a frame, at most


def write_gif(frames: Sequence[Image.Image], target: Path, frame_seconds: float) -> None:
    """Write a looping GIF of images of one size."""
    milliseconds = round(1000 * frame_seconds)
    frames[0].save(target, format="gif", save_all=True, append_images=list(frames[1:]), duration=milliseconds, loop=0)


def progress_frames(run: Path, most: int | None = None) -> list[Image.Image]:
    """Read a run's sample sheets, all of the same latents, and write the step below each.

    Args:
        run: its folder.
        most: the number of sheets, from the first to the last, if there are more.

    Raises:
        UserError: if there are none, or their sizes differ.
    """
    files = sorted((run / "samples").glob("step-*.png"))
    if not files:
        raise UserError(f"{run}: contains no sample sheets (samples/step-*.png); train with --sample_every")
    if most is not None and len(files) > most:
        files = [files[round(index * (len(files) - 1) / (most - 1))] for index in range(most)]
    sheets = [_open_sheet(file) for file in files]
    if len({sheet.size for sheet in sheets}) > 1:
        raise UserError(f"{run}: its sample sheets differ in size, because --num_sample_images was changed on resume")
    frames = []
    for file, sheet in zip(files, sheets, strict=True):
        frame = Image.new("RGB", (sheet.width, sheet.height + 14), "white")
        frame.paste(sheet)
        step = int(re.sub(r"\D", "", file.stem))
        ImageDraw.Draw(frame).text((2, sheet.height + 1), f"step {step}", fill="black")
        frames.append(frame)
    return frames


def _open_sheet(file: Path) -> Image.Image:
    try:
        with Image.open(io.BytesIO(read_regular(file, MAX_ENCODED_BYTES)), formats=["PNG"]) as sheet:
            shown = sheet.convert("RGB")
            shown.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))  # GIFs are large files
            return shown
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise UserError(f"{file} cannot be read: {error}; remove it") from error
