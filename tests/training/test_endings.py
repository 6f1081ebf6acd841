"""How a run ends without its last step: what is recorded, what the user is told, and what the next launch finds."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from line_method import LineSettings, fit, metrics, status
from toy_runs import checkpoint, events, files_of, train

from hfgen.errors import TerminatedError, UserError, run_reporting_user_errors
from hfgen.training.trouble import RunawayError, lost_process


ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def fail_at(step, error):
    def each_step(run):
        if run.step == step:
            raise error

    return each_step


def heed_ctrl_c():
    """What a terminal does; in the background it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def launches(folder):
    return [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]


# ---------------------------------------- what is recorded


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (UserError("--dataset: gone"), "failed", "--dataset: gone"),
        (KeyboardInterrupt(), "stopped", "interrupted by Ctrl-C"),
        (TerminatedError(), "stopped", "stopped by SIGTERM"),
    ],
)
def test_whatever_ends_a_run_stands_in_its_status(tmp_path, capsys, error, kind, reason):
    with pytest.raises(type(error)):
        fit(tmp_path / "run", each_step=fail_at(3, error))
    assert status(tmp_path / "run") == {**status(tmp_path / "run"), "status": kind, "reason": reason, "step": 3}
    assert "failed during step 3; to continue, run the same command with --resume latest" in capsys.readouterr().out
    run, _ = fit(tmp_path / "run", resume="latest")
    run.finish()
    assert status(tmp_path / "run")["status"] == "complete"


def test_an_error_after_the_end_leaves_the_status_as_it_was(tmp_path):
    def finish_early(run):
        run.finish()
        raise UserError("the Hub is away")

    with pytest.raises(UserError, match="the Hub is away"):
        fit(tmp_path / "run", each_step=finish_early, max_train_steps=1)
    assert status(tmp_path / "run")["status"] == "complete"


def test_too_little_memory_stands_in_the_status_as_it_is_told(tmp_path, capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with pytest.raises(SystemExit):
        run_reporting_user_errors(lambda: fit(tmp_path / "run", each_step=fail_at(3, error)))
    reason = status(tmp_path / "run")["reason"]
    assert "out of memory" in reason and "lower --batch_size" in reason
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {reason}"


def test_the_end_of_another_process_is_one_line_and_other_errors_have_a_traceback():
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:24521")
    assert "another process of this run has ended" in str(lost_process(lost, num_processes=2))
    assert lost_process(lost, num_processes=1) is None
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), num_processes=2) is None


@pytest.mark.parametrize("value", [4e19, -4e19])
def test_a_loss_that_runs_away_ends_the_run_before_it_is_infinite(tmp_path, value):
    def each_step(run):
        if run.step >= 3:
            run.log({"loss": torch.tensor(value)})

    with pytest.raises(RunawayError, match=r"stopped at step 3: the training has diverged: loss is -?2e\+19.*Lower"):
        fit(tmp_path / "run", each_step=each_step)
    assert status(tmp_path / "run")["status"] == "diverged"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


# ---------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGTERM, "stopped by SIGTERM"),
        (signal.SIGINT, "interrupted by Ctrl-C"),
        (signal.SIGHUP, "stopped by SIGHUP"),
    ],
)
def test_a_signal_outside_the_steps_ends_at_once_with_a_word_and_a_status(tmp_path, capsys, number, line):
    """While a density is fitted or the pipeline is saved, say."""
    before = signal.getsignal(signal.SIGTERM)
    of_the_shell = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    of_a_terminal = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored with nohup
    with pytest.raises(SystemExit) as ended:
        run_reporting_user_errors(lambda: fit(tmp_path / "run", after=lambda run: os.kill(os.getpid(), number)))
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert status(tmp_path / "run")["status"] == "stopped" and status(tmp_path / "run")["reason"].startswith(line)
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGINT, of_the_shell)
    signal.signal(signal.SIGHUP, of_a_terminal)
    fit(tmp_path / "run", resume="latest")


SIGNALS = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGINT: "interrupted by Ctrl-C"}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("method", ["gan", "vae", "ddpm"])
def test_a_signal_while_the_libraries_are_imported_ends_with_a_line(tmp_path, method, number):
    (tmp_path / "torch.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n")
    ended = subprocess.run(
        [sys.executable, ROOT / "training_scripts" / f"train_{method}.py"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        preexec_fn=heed_ctrl_c,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "", f"{SIGNALS[number]}\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_a_run_is_complete_ends_with_a_line(number):
    program = """
import atexit, os, time
from hfgen.errors import end_on_signals, run_reporting_user_errors

end_on_signals()
atexit.register(lambda: (os.kill(os.getpid(), NUMBER), time.sleep(60)))
run_reporting_user_errors(lambda: print("complete"))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program.replace("NUMBER", str(int(number)))],
        capture_output=True,
        text=True,
        preexec_fn=heed_ctrl_c,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "complete\n", f"{SIGNALS[number]}\n")


# ---------------------------------------- what is refused before the work


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("gan", ("--sample_size", "60"), "sample_size=60"),
        ("vae", ("--block_out_channels", "4", "4", "4", "4", "4", "4"), "sample_size"),
        ("ddpm", ("--sample_size", "60", "--block_out_channels", "8", "8", "8", "8"), "sample_size=60"),
    ],
)
def test_what_the_settings_alone_tell_is_refused_before_the_images_are_read(tmp_path, method, settings, message):
    with pytest.raises(UserError, match=message):
        train(method, tmp_path / "run", *settings, "--dataset", "no/such/folder")
    train(method, tmp_path / "run", "--max_train_steps", "1")  # the folder is not claimed


# ---------------------------------------- what is found next time


def test_a_start_that_fails_in_its_first_step_does_not_claim_the_folder(tmp_path):
    for error in (MemoryError(), KeyboardInterrupt(), ZeroDivisionError()):
        with pytest.raises(type(error)):
            fit(tmp_path / "run", each_step=fail_at(1, error), line=LineSettings(0.3))
    with pytest.raises(UserError, match="loss is not finite"):
        fit(tmp_path / "run", each_step=lambda run: run.log({"loss": torch.tensor(float("nan"))}), log_every=50)
    run, _ = fit(tmp_path / "run")  # smaller, say
    run.finish()
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert len(launches(tmp_path / "run")) == 1 and events(tmp_path / "run") == []
    assert json.loads((tmp_path / "run" / "training_config.json").read_text())["learning_rate"] == 0.1


@pytest.mark.parametrize("resume", [None, "latest"])
@pytest.mark.parametrize(
    "left",
    [
        (".training_config.json.partial-123",),
        (".lock", ".lock-holder", ".training_config.json.partial-123"),
        ("training_config.json", ".status.json.partial-123", "checkpoints/.step-00000002.partial-123/state.pt"),
    ],
)
def test_a_run_killed_in_its_first_writes_can_be_started_again(tmp_path, resume, left):
    for name in left:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text('{"output_dir": "run"}' if name == "training_config.json" else "{")
    run, _ = fit(tmp_path / "run", resume=resume)
    run.finish()
    assert [name for name in files_of(tmp_path) if "partial" in name] == []


@pytest.mark.parametrize("resume", [None, "latest"])
@pytest.mark.parametrize("name", ["training_config.json", "logs/mine.txt", ".thesis.tex.partial-123", "status.json"])
def test_files_of_somebody_else_s_are_not_taken_for_those_of_a_failed_start(tmp_path, resume, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"learning_rate": 3}')
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="--output_dir|is damaged"):
        fit(tmp_path, resume=resume)
    assert files_of(tmp_path) == before


def test_checkpoints_after_the_one_that_a_run_goes_back_to_are_set_aside(tmp_path, capsys):
    folder, steps = tmp_path / "run", []
    _, network = fit(folder, checkpoints_total_limit=3)
    for _ in range(2):
        resume = {"resume": str(checkpoint(folder, 2)), "checkpoint_every": 1, "checkpoints_total_limit": 3}
        with pytest.raises(KeyboardInterrupt):  # with a new checkpoint, of step 3
            fit(folder, each_step=fail_at(4, KeyboardInterrupt()), **resume)
        assert "were renamed to abandoned" in capsys.readouterr().out
        _, again = fit(
            folder, resume="latest", each_step=lambda run: steps.append(run.step), checkpoints_total_limit=5
        )
        assert torch.equal(network.weight, again.weight)
    assert steps == [4, 5, 6] * 2  # from step 3, not from the branch that was left
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {
        *("step-00000002", "step-00000003", "step-00000004", "step-00000006"),
        *("abandoned-step-00000003", "abandoned-step-00000004", "abandoned-step-00000006"),
        *("abandoned1-step-00000004", "abandoned1-step-00000006"),
    }
    run, _ = fit(folder, resume=str(folder / "checkpoints" / "abandoned-step-00000004"))
    assert run.step == 6
