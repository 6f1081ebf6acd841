"""Names that came from files and strangers do nothing but be read, wherever they are shown."""

import pytest

from hfgen.commands.compare import table
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.errors import UserError, run_reporting_user_errors
from hfgen.hub.card import _data
from hfgen.texts import counted, markdown_text, printable, say, say_lines


ODD = "a\n  note: b\x1b[2J\r\u202e\udcff![x](javascript:y)<img src=x>|*`"


def test_what_is_printed_is_one_line_without_codes():
    assert printable(ODD).startswith(r"a\n  note: b\x1b[2J\r\u202e\udcff!")
    assert printable("Zoë, 猫 – ok") == "Zoë, 猫 – ok" and printable("a\nb", "\n") == "a\nb"


def test_a_name_in_a_message_forges_no_line_and_does_not_act_on_the_console(capsys):
    say(f"saved: {ODD}")
    say(f"warning: {ODD}", err=True)
    printed = capsys.readouterr()
    assert printed.out.startswith("saved: a\n  note: b\\x1b[2J\\r\\u202e") and printed.out.count("\n") == 2
    assert printed.err == printed.out.replace("saved", "warning")
    say_lines("a  1\n\x1b[2J  2")
    assert capsys.readouterr().out == "a  1\n\\x1b[2J  2\n"


def test_markdown_has_no_links_images_or_html_of_a_name():
    shown = markdown_text(ODD)
    assert "\n" not in shown and "\x1b" not in shown and "<" not in shown and "|" not in shown
    assert r"![x\](javascript:y)" in shown and markdown_text("my_cats 2") == "my_cats 2"


def test_one_is_counted_without_an_s():
    assert [counted(number, "run") for number in (0, 1, 2, 2000)] == ["0 runs", "1 run", "2 runs", "2,000 runs"]


def test_a_message_cannot_act_on_the_console(capsys):
    def fail():
        raise UserError("no such file: \x1b[31mred\n  second line")

    with pytest.raises(SystemExit):
        run_reporting_user_errors(fail)
    assert capsys.readouterr().err == "error: no such file: \\x1b[31mred\n  second line\n"


def test_a_file_name_forges_no_line_of_the_intake_report(image_folder):
    (image_folder / "x\n  unreadable: 0.png").write_bytes(b"no image")
    lines = str(load_images(DataSettings(str(image_folder), sample_size=16)).report).splitlines()
    assert not [line for line in lines if line.startswith("  unreadable: 0.png")]
    assert [line for line in lines if r"x\n  unreadable: 0.png" in line]


def test_names_in_tables_and_cards_are_text():
    scores = {"num_fake": 1, "num_real": 1, "fid": 1.0, "kid": 1.0, "precision": 1.0, "recall": 1.0, "coverage": 1.0}
    scores |= {"fid_standard_error": 0.1, "kid_standard_error": 0.1}
    row = {"name": ODD, "scores": scores, "floor": {"split": scores}, "features": "inception", "seed": 0, "steps": 1}
    row |= {"sample_size": 16, "num_parameters": 1, "drawing_images_per_second": 1.0, "trained_on_reference": False}
    row |= {"memorisation": {"num_copies": 0}, "memorisation_by_pixels": {"num_copies": 0}}
    data = {"name": ODD, "on_hub": False, "images": None}
    for text in (table([row]), _data({"data": data})):
        assert markdown_text(ODD) in text and "<img" not in text and "\x1b" not in text
