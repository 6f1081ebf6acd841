"""JSON lines that a killed process left; atomic writes are tested with the checkpoints."""

import json

import pytest

from hfgen.errors import UserError
from hfgen.files import append_json_line, read_json_lines, write_atomically


def test_torn_lines_are_left_out_and_a_new_line_starts_below_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_json_lines(file) == []
    append_json_line(file, {"step": 1})
    append_json_line(file, {"step": 2, "loss": [0.5, None]})
    assert file.read_text() == '{"step": 1}\n{"step": 2, "loss": [0.5, null]}\n'
    for torn in ('{"step": 3, "lo', '{"step": {"a": 1}', "3", ""):
        file.write_text(f'{{"step": 1}}\n{torn}')
        append_json_line(file, {"step": 4})
        assert read_json_lines(file) == [{"step": 1}, {"step": 4}]
        assert json.loads(file.read_text().splitlines()[-1]) == {"step": 4}


def write_version(folder):
    folder.mkdir()
    (folder / "index.json").write_text("new")


@pytest.mark.parametrize("marker", [None, "index.json"])
def test_a_folder_of_somebody_else_s_is_never_replaced(tmp_path, marker):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "thesis.tex").write_text("three years")
    with pytest.raises(UserError, match="report holds files that hfgen did not write: move or rename"):
        write_atomically(tmp_path / "report", write_version, marker)
    assert [path.name for path in tmp_path.rglob("*")] == ["report", "thesis.tex"]


def test_what_somebody_adds_to_a_folder_stays_and_only_names_of_one_s_own_go(tmp_path):
    report, beside = tmp_path / "report", tmp_path / ".report.old"
    report.mkdir()
    beside.mkdir()
    (beside / "mine.txt").write_text("kept")
    write_atomically(report, write_version, "index.json")  # an empty folder
    for name in ("thesis.tex", "curves.png", "index.json"):
        (report / name).write_text("old")
    write_atomically(report, write_version, "index.json", {"index.json", "*.png"})
    assert {path.name: path.read_text() for path in report.iterdir()} == {"index.json": "new", "thesis.tex": "old"}
    assert (beside / "mine.txt").is_file() and len(list(tmp_path.iterdir())) == 2
