import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """Three pictures, one of them a copy, one broken file and one text."""
    monkeypatch.setenv("HFGEN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, seed in (("a.png", 0), ("b.png", 1), ("c.png", 0)):
        noise = np.random.default_rng(seed).integers(0, 256, (12, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "b.png").read_bytes()[:100])
    (folder / "readme.txt").write_text("no picture")
    return folder


def test_data_inspect_counts_the_images_and_lists_the_broken_one(hfgen, pictures):
    status, out, _ = hfgen("data", "inspect", pictures, "--sample_size", 8)
    assert status == 0
    assert f"folder {pictures}: 3 images" in out
    assert "sizes 20 x 12 3" in out
    assert "unreadable: 1; exact duplicates: 1" in out
    assert "skipped broken.png: " in out
    assert "identical: a.png, c.png" in out


def test_data_inspect_writes_the_whole_report_as_json(hfgen, pictures, tmp_path):
    status, _, _ = hfgen("data", "inspect", pictures, "--sample_size", 8, "--json", tmp_path / "new" / "report.json")
    assert status == 0
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert (report["images"], report["sample_size"], report["not_read"]) == (3, 8, 1)
    assert [name for name, _ in report["unreadable"]] == ["broken.png"]
    assert report["exact_duplicates"] == [["a.png", "c.png"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./nowhere",), "error: PATH ./nowhere: no such file or folder"),
        (("PICTURES", "--sample_size", 4), "error: --sample_size 4: must be from 8 to 1024 pixels"),
    ],
)
def test_data_inspect_refuses_what_cannot_be_inspected(arguments, message, refusal, pictures):
    assert refusal("data", "inspect", *(pictures if word == "PICTURES" else word for word in arguments)) == message


@pytest.mark.parametrize("command", ["inspect", "floor"])
def test_a_report_does_not_replace_a_file(refusal, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("thesis.json").write_text("three years")
    line = refusal("data", command, "toy_paintings:12", "--json", "thesis.json")
    assert "--json thesis.json exists; choose another name" in line
    assert Path("thesis.json").read_text() == "three years"
