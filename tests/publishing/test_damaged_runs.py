"""Publishing a run of which a file is damaged: it is named, or what is lost is left out."""

import json

import pytest
from damages import DAMAGES

from hfgen.errors import UserError
from hfgen.publishing.records import add_records_of_run


RECORDS = {
    "training_config.json": {"output_dir": "run", "dataset": "toy_paintings", "streaming": False},
    "status.json": {"status": "complete", "reason": "complete", "step": 4, "seconds": 1.5},
    "intake.json": {
        **{"source": "toys", "images": 9, "training_images": 9, "sample_size": 16, "formats": {}, "modes": {}},
        **{"sizes": {}, "short_side": [16, 16, 16], "upsampled": 0, "unreadable": [], "exact_duplicates": []},
        **{"near_duplicates": [], "dropped": 0, "warnings": []},
    },
    "checkpoints/step-00000004/progress.json": {"step": 4, "seconds": 1.5},
}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for name, content in RECORDS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    entry = {"step": 4, "images": 16, "seconds": 1.5, "images_per_second": 9.0}
    (folder / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    (folder / "launches.jsonl").write_text(json.dumps({"from_step": 0}) + "\n")
    (tmp_path / "target").mkdir()
    return folder


def publish(run):
    target = run.parent / "target"
    add_records_of_run(run, run / "checkpoints" / "step-00000004" / "pipeline", target, "digest", "published digest")
    return target


@pytest.mark.parametrize("damage", ["zeroed", "truncated", "empty"])
@pytest.mark.parametrize("file", [*RECORDS, "launches.jsonl"])
def test_a_damaged_file_is_named(file, damage, run):
    DAMAGES[damage](run / file)
    with pytest.raises(UserError, match=f"{file} is .*damaged"):
        publish(run)


def test_torn_lines_are_not_published(run):
    lines = (run / "metrics.jsonl").read_text()
    for name in ("metrics.jsonl", "evaluations.jsonl", "launches.jsonl", "events.jsonl"):
        with (run / name).open("ab") as log:
            log.write(lines.encode() if name == "evaluations.jsonl" else b"")
            log.write(b'{"step": 5, "lo\xc3')
    target = publish(run)
    assert (target / "metrics.jsonl").read_text() == (target / "evaluations.jsonl").read_text() == lines
