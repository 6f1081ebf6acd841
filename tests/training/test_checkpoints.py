"""Checkpoints: whole or not there, whatever happens while one is written."""

import json

import pytest
import torch

from hfgen.errors import UserError
from hfgen.files import remove_leftovers, write_atomically, write_text_atomically
from hfgen.integrity import record_digests
from hfgen.training.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    load_progress,
    load_state,
    save_checkpoint,
)


def save(folder, step, total_limit=9, save_pipeline=lambda target: target.mkdir()):
    state = {"weights": torch.full((3,), float(step))}
    return save_checkpoint(folder, {"step": step}, state, save_pipeline, total_limit)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    checkpoint = save(tmp_path, 7)
    assert load_progress(checkpoint) == {"step": 7}
    assert torch.equal(load_state(checkpoint)["weights"], torch.full((3,), 7.0))
    assert (checkpoint / "pipeline").is_dir()


def test_latest_is_the_highest_step_and_not_the_last_in_the_alphabet(tmp_path):
    for step in (5, 100, 30):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path, "latest").name == "step-00000100"
    assert find_checkpoint(tmp_path / "nothing", "latest") is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_failure_while_saving_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path):
    save(tmp_path, 1, total_limit=1)

    def fail(target):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device.*any previous version is unchanged"):
        save(tmp_path, 2, total_limit=1, save_pipeline=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert torch.equal(load_state(list_checkpoints(tmp_path)[0])["weights"], torch.ones(3))


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_earlier_checkpoint(programs, tmp_path_factory, tmp_path):
    save(tmp_path, 1)
    program = tmp_path_factory.mktemp("program") / "saves.py"
    program.write_text(
        "import os, sys, pathlib, torch\n"
        "from hfgen.training.checkpoints import save_checkpoint\n"
        "state = {'weights': torch.zeros(3)}\n"
        "save_checkpoint(pathlib.Path(sys.argv[1]), {'step': 2}, state, lambda target: os.kill(os.getpid(), 9), 1)\n"
    )
    assert programs.run(program, tmp_path).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2  # the leftover is there, and is no checkpoint
    assert find_checkpoint(tmp_path, "latest").name == "step-00000001"
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_replacing_a_folder_keeps_no_file_of_the_old_one(tmp_path):
    target = tmp_path / "pipeline"

    def write(name):
        return lambda folder: (folder.mkdir(), (folder / name).write_text(name))

    write_atomically(target, write("old"))
    write_atomically(target, write("new"), marker="old")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_failure_while_replacing_a_text_file_leaves_the_old_text(tmp_path):
    file = tmp_path / "status.json"
    write_text_atomically(file, "old")

    def fail(temporary):
        temporary.write_text("ne")
        raise OSError("cut off")

    with pytest.raises(UserError):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_path_that_is_no_checkpoint_is_refused_with_those_that_are(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(UserError, match="--resume .*nowhere: not a checkpoint .*step-00000003"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"))
    assert find_checkpoint(tmp_path, str(tmp_path / "step-00000003")).name == "step-00000003"


def test_a_damaged_state_is_named(tmp_path):
    checkpoint = save(tmp_path, 3)
    content = (checkpoint / "state.pt").read_bytes()
    (checkpoint / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="state.pt cannot be read.*resume from an earlier checkpoint"):
        load_state(checkpoint)


def test_no_code_in_a_state_is_run(tmp_path):
    checkpoint, witness = save(tmp_path, 3), tmp_path / "witness"

    class Poison:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    torch.save({"weights": Poison()}, checkpoint / "state.pt")
    record_digests(checkpoint, ["state.pt"])  # as somebody else would, who knows of them
    with pytest.raises(UserError, match="Weights only load failed"):
        load_state(checkpoint)
    assert not witness.exists()


def test_progress_is_plain_json(tmp_path):
    assert json.loads((save(tmp_path, 3) / "progress.json").read_text()) == {"step": 3}
