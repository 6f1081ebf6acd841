"""Fonts for names in other scripts, with a font of all characters in the place of one for Chinese or Japanese."""

import io
import logging
import shutil
import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from hfgen.inference import fonts
from hfgen.inference.figures import labelled_rows
from hfgen.inference.fonts import DEJAVU, font_for, with_fonts


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Add fonts to those that are installed, by their files; nothing but matplotlib's own is there before."""
    own = [font for font in fontManager.ttflist if Path(font.fname).parent == DEJAVU.parent]
    monkeypatch.setattr(fontManager, "ttflist", own)
    font_for.cache_clear()

    def add(name: str) -> Path:
        file = Path(shutil.copy(DEJAVU.with_name(name), tmp_path))
        fontManager.addfont(file)
        font_for.cache_clear()
        return file

    yield add
    font_for.cache_clear()


def titled(title: str) -> Figure:
    figure = Figure()
    figure.subplots().set_title(title)
    return with_fonts(figure)


def test_a_font_is_chosen_that_has_what_dejavu_lacks(installed):
    assert font_for("猫") == DEJAVU  # none has it
    installed("cmr10.ttf")
    assert font_for("猫") == font_for("é ✓\n") == DEJAVU
    everything = installed("LastResortHE-Regular.ttf")
    assert font_for("猫の顔A") == everything and font_for("é ✓\n") == DEJAVU
    families = [titled(title).axes[0].title.get_fontfamily() for title in ("猫の顔A", "é")]
    assert families == [["DejaVu Sans", "Last Resort High-Efficiency"], ["sans-serif"]]


def test_of_one_font_for_a_whole_text_most_characters_are_asked(installed, tmp_path, monkeypatch):
    """An installed font of another script may have no Latin letters, which DejaVu Sans would show."""
    own = installed("LastResortHE-Regular.ttf")
    everything = fonts._characters
    monkeypatch.setattr(
        fonts, "_characters", lambda file: everything(file) - ({*range(128)} if file == own else set())
    )
    assert font_for("cats 猫") == DEJAVU and font_for("猫の顔") == own
    assert titled("cats 猫").axes[0].title.get_fontfamily() == ["DejaVu Sans", "Last Resort High-Efficiency"]


def test_names_that_no_font_has_are_boxes_without_a_word(installed, caplog):
    with warnings.catch_warnings(action="error"), caplog.at_level(logging.WARNING):
        titled("猫の顔A").savefig(io.BytesIO())
        assert labelled_rows([("猫の顔", Image.new("RGB", (9, 9)))])
    assert caplog.text == ""


def test_a_damaged_font_is_left_alone(installed, tmp_path):
    file = installed("cmr10.ttf")
    file.write_bytes(b"no font")
    fonts._characters.cache_clear()
    assert font_for("猫") == DEJAVU
