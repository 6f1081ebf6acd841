"""JSON lines that a killed process left; atomic writes are tested with the checkpoints."""

import json

from hfgen.files import append_json_line, read_json_lines


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
