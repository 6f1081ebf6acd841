"""JSON lines that a killed process left, folders of others, and disks that are full or must not be written to."""

import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hfgen.errors import UserError
from hfgen.files import append_json_line, read_json_lines, require_place_for, write_atomically


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
    with pytest.raises(UserError, match="report contains files that hfgen did not write: move or rename"):
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


def test_what_somebody_adds_deep_inside_a_folder_stays_unless_the_name_is_taken(tmp_path):
    write_atomically(tmp_path / "best", lambda folder: (folder / "pipeline").mkdir(parents=True), "pipeline")
    for name in ("pipeline/notes.txt", "pipeline/old.bin", "pipeline/taken", "drafts/mine.txt"):
        (tmp_path / "best" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "best" / name).write_text("old")
    (tmp_path / "best" / "link").symlink_to("nowhere")

    def write(folder):
        (folder / "pipeline").mkdir(parents=True)
        (folder / "pipeline" / "taken").write_text("new")

    write_atomically(tmp_path / "best", write, "pipeline", ["pipeline/old.bin"])
    found = {str(path.relative_to(tmp_path / "best")) for path in (tmp_path / "best").rglob("*")}
    assert found == {"pipeline", "pipeline/notes.txt", "pipeline/taken", "drafts", "drafts/mine.txt", "link"}
    assert (tmp_path / "best" / "pipeline" / "taken").read_text() == "new"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, kind):
    (tmp_path / "large disk").mkdir()
    real = tmp_path / "large disk" / "pipeline"
    write_atomically(real, write_version if kind == "folder" else lambda file: file.write_text("old"))
    (tmp_path / "link").symlink_to(real)
    write = write_version if kind == "folder" else lambda file: file.write_text("new")
    write_atomically(tmp_path / "link", write, "*")
    assert (tmp_path / "link").readlink() == real and [path.name for path in tmp_path.rglob(".*")] == []
    assert real.is_dir() if kind == "folder" else real.read_text() == "new"


@pytest.mark.parametrize("why", ["it is the working folder", "it is mounted"])
def test_an_empty_folder_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch, why):
    folder = tmp_path / "new"
    folder.mkdir()
    before = folder.stat().st_ino
    (folder / f".new.partial-{os.getpid() + 1}").write_text("left by a process that was killed")
    os.utime(folder / f".new.partial-{os.getpid() + 1}", (0, 0))
    if why == "it is mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == folder)
        write_atomically(folder, write_version, "index.json")
    else:
        monkeypatch.chdir(folder)
        write_atomically(Path("."), write_version, "index.json")
    assert folder.stat().st_ino == before and [path.name for path in folder.iterdir()] == ["index.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_other_empty_folders_are_replaced_at_once(tmp_path, monkeypatch):
    def write(folder):
        write_version(folder)
        assert not any((tmp_path / "new").iterdir())  # nothing is to be seen of a version that is being written

    (tmp_path / "new").mkdir()
    write_atomically(tmp_path / "new", write, None)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["index.json"]
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "empty")
    with pytest.raises(UserError, match="could not write .*empty"):
        write_atomically(tmp_path / "empty", lambda file: file.write_text("a file for a folder"))
    assert not any((tmp_path / "empty").iterdir())


@contextmanager
def small_files():
    """Let this process write no more than 2 kB into a file, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        yield
    finally:  # before pytest writes, perhaps into a file
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WAYS_TO_WRITE = {
    "text": lambda file: file.write_text("x" * 9000),
    "torch": lambda file: torch.save({"weight": torch.zeros(9000)}, file),
    "safetensors": lambda file: save_file({"weight": torch.zeros(9000)}, file),
    "picture": lambda file: Image.effect_noise((99, 99), 50).save(file, format="png"),
}


@pytest.mark.parametrize("way", WAYS_TO_WRITE)
def test_a_full_disk_is_an_error_that_names_the_file_and_the_old_one_is_kept(tmp_path, way):
    (tmp_path / "file").write_text("old")
    told = "could not write .*/file: .*; any previous version is unchanged"
    with pytest.raises(UserError, match=told) as refusal, small_files():
        write_atomically(tmp_path / "file", WAYS_TO_WRITE[way])
    assert "\n" not in str(refusal.value)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize(
    "words",
    ["can't start new thread", "DefaultCPUAllocator: can't allocate memory", "mat1 and mat2 cannot be multiplied"],
)
def test_what_is_not_about_the_disk_is_not_told_as_a_full_disk(tmp_path, words):
    def write(temporary):
        raise RuntimeError(words)

    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError, match=f"^{words}$"):
        write_atomically(tmp_path / "file", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_line_that_does_not_fit_is_an_error_that_names_the_file(tmp_path):
    told = "could not write .*metrics.jsonl: .*; free space there, or choose another"
    with pytest.raises(UserError, match=told), small_files():
        append_json_line(tmp_path / "metrics.jsonl", {"text": "x" * 9000})


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda: write_atomically(tmp_path / "file" / "new", write_version),
                  lambda: append_json_line(tmp_path / "file" / "new", {})):  # fmt: skip
        with pytest.raises(UserError, match="could not write .*/file/new: "):
            write()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "/file is not a folder"),
        ("file/new/er", "/file is not a folder"),
        ("link", "it is a link to /nowhere/at/all, which does not exist"),
        ("x" * 300, "file name too long"),
        ("locked", "/locked is not writable"),
        ("locked/new", "/locked is not writable"),
    ],
)
def test_a_place_where_nothing_can_be_created_is_refused_with_the_reason(tmp_path, monkeypatch, name, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write everywhere
    with pytest.raises(UserError, match=f"--output .*{name}: cannot be created, because .*{reason}; choose another"):
        require_place_for(tmp_path / name, "--output")
    require_place_for(tmp_path / "new" / "er", "--output")


def test_a_folder_that_may_be_written_to_is_a_place_though_those_above_may_not(tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "volume" in Path(path).parts)
    require_place_for(tmp_path / "volume", "--output_dir")


def test_what_a_killed_process_left_of_an_earlier_write_is_removed_when_it_is_old(tmp_path):
    names = [".report.partial-123", ".report.partial-124", ".report.partial-mine", ".report.old-1", ".it.partial-123"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text("half")
    for path in [*tmp_path.glob("*/*"), *tmp_path.iterdir()]:
        hours = 0.1 if "124" in str(path) and path.is_file() else 2
        os.utime(path, (path.stat().st_mtime - 3600 * hours,) * 2)
    write_atomically(tmp_path / "report", write_version)
    assert {path.name for path in tmp_path.iterdir()} == {"report", *names[1:]}  # others may still be written to
    (tmp_path / ".a[b].txt.partial-7").write_text("half")
    os.utime(tmp_path / ".a[b].txt.partial-7", (0, 0))
    write_atomically(tmp_path / "a[b].txt", lambda temporary: temporary.write_text("whole"))
    assert not (tmp_path / ".a[b].txt.partial-7").exists()
