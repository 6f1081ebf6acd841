"""Damaged files of a run: the checkpoint before is taken, or the file is named; never other numbers without a word."""

import json
import re
import shutil

import pytest
import torch
from damages import DAMAGES, flip_a_byte
from line_method import LineSettings, fit, metrics
from toy_runs import files_of

from hfgen.errors import UserError
from hfgen.training.checkpoints import list_checkpoints, newest_good_checkpoint
from hfgen.training.folder import claim_folder
from hfgen.training.settings import RunSettings


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """The weight of a run of 6 steps that nothing has happened to."""
    return fit(tmp_path_factory.mktemp("undamaged") / "run")[1].weight


@pytest.mark.parametrize("file", ["state.pt", "progress.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_latest_is_the_checkpoint_before_a_damaged_one(damage, file, undamaged, tmp_path, capsys):
    fit(tmp_path, max_train_steps=4)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    DAMAGES[damage](newest / file)
    run, network = fit(tmp_path, resume="latest")
    said = capsys.readouterr().out
    assert re.search(rf"warning: {newest} is damaged and was skipped: .*{file}", said) and "at step 2\n" in said
    assert torch.equal(network.weight, undamaged)


@pytest.mark.parametrize("file", ["state.pt", "progress.json"])
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(file, tmp_path):
    fit(tmp_path / "old")
    newest = list_checkpoints(tmp_path / "old" / "checkpoints")[-1]
    flip_a_byte(newest / file)
    with pytest.raises(UserError, match=f"--resume {newest}: damaged: .*{file}.* choose another .*step-00000004"):
        fit(tmp_path / "new", resume=str(newest))


def test_a_run_all_of_whose_checkpoints_are_damaged_does_not_start_anew(tmp_path):
    fit(tmp_path)
    for checkpoint in list_checkpoints(tmp_path / "checkpoints"):
        flip_a_byte(checkpoint / "state.pt")
    with pytest.raises(UserError, match="all checkpoints in .* are damaged"):
        fit(tmp_path, resume="latest")


def test_a_run_does_not_go_back_to_a_damaged_checkpoint(tmp_path):
    def damage_and_collapse(run):
        if run.step == 5 and not run.rollbacks:
            flip_a_byte(tmp_path / "checkpoints" / "step-00000004" / "state.pt")
            assert newest_good_checkpoint(tmp_path / "checkpoints").name == "step-00000002"
            run.report(good=False, trouble="all images are green")

    run, _ = fit(tmp_path, each_step=damage_and_collapse, on_collapse="rollback")
    assert run.rollbacks == 1 and run.step == 6


@pytest.mark.parametrize("damage", ["zeroed", "truncated", "empty"])
@pytest.mark.parametrize("file", ["training_config.json", "best/scores.json"])
def test_a_damaged_record_of_a_run_is_named(file, damage, tmp_path):
    fit(tmp_path, max_train_steps=4)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "scores.json").write_text(json.dumps({"step": 2}))
    DAMAGES[damage](tmp_path / file)
    before = (tmp_path / file).read_bytes()
    with pytest.raises(UserError, match=f"{file} is damaged"):
        fit(tmp_path, resume="latest")
    assert (tmp_path / file).read_bytes() == before


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": 4, "\xc3', bytes(9), b'{"stop": 4}', b"[" * 10**5])
def test_torn_lines_of_every_log_are_left_out(torn, undamaged, tmp_path):
    fit(tmp_path, max_train_steps=4)
    for name in ("metrics.jsonl", "launches.jsonl", "events.jsonl", "evaluations.jsonl"):
        with (tmp_path / name).open("ab") as log:
            log.write(torn)
    _, network = fit(tmp_path, resume="latest")
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(network.weight, undamaged)


def test_what_a_killed_process_left_is_removed_and_what_it_was_replacing_comes_back(tmp_path):
    fit(tmp_path, max_train_steps=4)[0].finish()
    before = files_of(tmp_path)
    places = ("pipeline", "best", "status.json", "samples/step-00000004.png", "checkpoints/step-00000006")
    for name in (tmp_path / name for name in places):
        name.parent.mkdir(exist_ok=True)
        for left in (f".{name.name}.partial-123", f".{name.name}.old-123"):
            name.with_name(left).mkdir()
            (name.with_name(left) / "weights").write_text("half")
    for name in ("best", "checkpoints/step-00000006", "samples/step-00000004.png"):
        folder = (tmp_path / name).parent
        shutil.rmtree(folder / f".{(tmp_path / name).name}.old-123")  # there was none before
    (tmp_path / "pipeline").rename(tmp_path / ".pipeline.old-123x")
    shutil.rmtree(tmp_path / ".pipeline.old-123")
    (tmp_path / ".pipeline.old-123x").rename(tmp_path / ".pipeline.old-123")
    (tmp_path / ".mine.partial").write_text("of somebody else")
    lock, _ = claim_folder(tmp_path, "latest", [RunSettings(**saved_settings(tmp_path)), LineSettings()])
    lock.release()
    after = files_of(tmp_path)
    assert after.pop(".mine.partial") == b"of somebody else"
    assert {name for name in after if not name.startswith(".lock")} == {n for n in before if not n.startswith(".lock")}
    assert list((tmp_path / "samples").iterdir()) == [] and not (tmp_path / ".pipeline.old-123").exists()


def saved_settings(folder):
    saved = json.loads((folder / "training_config.json").read_text())
    return {key: value for key, value in saved.items() if key != "learning_rate"}
