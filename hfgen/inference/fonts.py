"""Fonts for names in any script: DejaVu Sans, which matplotlib has, or an installed font with what it lacks."""

import functools
import logging
import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text


DEJAVU = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@functools.cache
def font_for(text: str) -> Path:
    """Return the file of DejaVu Sans, or of an installed font that has more of the characters of a text.

    Where there is none, for Chinese, Japanese or Korean say, DejaVu Sans shows boxes.
    """
    characters = {ord(character) for character in text if not character.isspace()}
    if characters <= _characters(DEJAVU):
        return DEJAVU
    # Another font of matplotlib's has all characters, as boxes with their numbers.
    others = {font.fname: font.weight for font in fontManager.ttflist if Path(font.fname).parent != DEJAVU.parent}
    found = {file: len(characters & _characters(Path(file))) for file in sorted(others)}
    best = max(found, key=lambda file: (found[file], others[file] in (400, 500, "normal")), default=None)
    return Path(best) if best is not None and found[best] > len(characters & _characters(DEJAVU)) else DEJAVU


def with_fonts(figure: Figure) -> Figure:
    """Give each text of a figure the fonts that its characters need; return the figure."""
    for text in figure.findobj(Text):
        # Only for what DejaVu Sans lacks: matplotlib takes each character from the first font that has it.
        lacking = "".join(one for one in text.get_text() if ord(one) not in _characters(DEJAVU))
        if (font := font_for(lacking)) != DEJAVU:
            names = [entry.name for entry in fontManager.ttflist if Path(entry.fname) == font]
            text.set_fontfamily(["DejaVu Sans", *names[:1]])
    # Boxes show what no font has; matplotlib would also warn of each character, and of other weights of the fonts.
    warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    return figure


@functools.cache
def _characters(font: Path) -> frozenset[int]:
    """Return the characters of a font; none if it cannot be read, or not at every size."""
    try:
        opened = FT2Font(str(font))
        return frozenset(opened.get_charmap()) if opened.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()
