"""What `accelerate launch` was asked for: honoured or refused, never ignored."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from hfgen.errors import UserError
from hfgen.training import launcher
from hfgen.training.launcher import HEED_LAUNCHER, choose_precision, open_accelerator, parse_launch, refuse_unsupported
from hfgen.training.settings import RunSettings


@pytest.fixture(autouse=True)
def hardware_has_bf16(monkeypatch, tmp_path):
    monkeypatch.setattr("hfgen.hardware.cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr("hfgen.hardware.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(launcher, "default_config_file", str(tmp_path / "none.yaml"))


def launched(words=""):
    return parse_launch(
        ["python", "/bin/accelerate", "launch", *words.split(), "train.py", "--mixed_precision", "fp16"]
    )


def precision_of(words, launched_with, wanted="auto", **environment):
    environment = {"ACCELERATE_MIXED_PRECISION": launched_with, **environment}
    return choose_precision(wanted, True, environment, launched(words))


@pytest.mark.parametrize(
    ("words", "launched_with", "wanted", "chosen", "reason"),
    [
        ("", "no", "auto", "bf16", "auto: what the hardware supports"),  # the launcher says "no" if nobody chose
        ("--mixed_precision no", "no", "auto", "no", "as set by accelerate launch or its configuration"),
        ("--mixed-precision=no", "no", "auto", "no", "as set by accelerate launch or its configuration"),
        ("--mixed_precision bf16", "bf16", "auto", "bf16", "as set by accelerate launch or its configuration"),
        ("--mixed_precision bf16", "bf16", "no", "no", "as set by --mixed_precision"),
        ("--mixed_precision no", "no", "bf16", "bf16", "as set by --mixed_precision"),
    ],
)
def test_the_precision_of_the_launcher_counts_where_the_setting_is_auto(words, launched_with, wanted, chosen, reason):
    assert precision_of(words, launched_with, wanted) == (chosen, reason)


@pytest.mark.parametrize(("content", "chosen"), [("mixed_precision: 'no'", "no"), ("num_processes: 1", "bf16")])
@pytest.mark.parametrize("is_default", [True, False])
def test_the_configuration_of_accelerate_counts_as_an_option(tmp_path, monkeypatch, content, chosen, is_default):
    file = tmp_path / "config.yaml"
    file.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: false\n{content}\n")
    if is_default:
        monkeypatch.setattr(launcher, "default_config_file", str(file))
    assert precision_of("" if is_default else f"--config_file {file}", "no")[0] == chosen


def test_a_variable_of_the_user_counts_and_the_launcher_of_a_study_does_not():
    assert choose_precision("auto", True, {"ACCELERATE_MIXED_PRECISION": "no"}, None)[0] == "no"
    assert choose_precision("auto", True, {}, None)[0] == "bf16"
    assert precision_of("--mixed_precision no", "no", **{HEED_LAUNCHER: "no"})[0] == "bf16"


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_of_the_launcher_that_is_not_to_be_had_is_refused(precision):
    with pytest.raises(UserError, match=f"accelerate launch.*--mixed_precision {precision}.*bf16.*no"):
        precision_of(f"--mixed_precision {precision}", precision)


@pytest.mark.parametrize("option", ["use_deepspeed", "use_fsdp", "use_megatron_lm", "use_parallelism_config"])
def test_ways_to_split_a_network_are_refused(option):
    refuse_unsupported({f"ACCELERATE_{option.upper()}": "false"}, None)
    with pytest.raises(UserError, match=f"accelerate launch --{option}: not supported"):
        refuse_unsupported({f"ACCELERATE_{option.upper()}": "true"}, None)


@pytest.mark.parametrize(
    ("environment", "words"),
    [({}, "--gradient_accumulation_steps 4"), ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "")],
)
def test_parts_of_a_batch_are_refused_with_the_setting_that_splits_it(environment, words):
    refuse_unsupported({}, launched("--gradient_accumulation_steps 1"))
    with pytest.raises(UserError, match="--gradient_accumulation_steps 4: not used;.* pass it to train_ddpm"):
        refuse_unsupported(environment, launched(words))


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "3", "train.py"], 3),
        (["/bin/accelerate-launch", "--num_processes", "3", "-m", "train"], 3),
        (["python", "/bin/accelerate", "launch", "train.py", "--num_processes", "3"], None),
    ],
)
def test_options_are_those_before_the_script(command, processes):
    assert parse_launch(command).num_processes == processes


@pytest.mark.parametrize("command", [[], ["bash"], ["python", "accelerate", "config"], ["torchrun", "train.py"]])
def test_other_commands_are_no_launch(command):
    assert parse_launch(command) is None


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_processes_that_were_not_started_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "launcher_options", lambda: launched("--cpu --num_processes 2"))
    with pytest.raises(UserError, match="--num_processes 2 has started only one process; add --multi_gpu"):
        open_accelerator(RunSettings(output_dir=str(tmp_path), report_to="none"))


@pytest.mark.usefixtures("fresh_accelerate_state")
@pytest.mark.parametrize("words", ["", "--num_cpu_threads_per_process 1"])
def test_threads_that_the_launcher_sets_are_left(tmp_path, monkeypatch, words):
    called = []
    monkeypatch.setattr(launcher, "launcher_options", lambda: launched(words))
    monkeypatch.setattr(launcher, "use_all_cores", called.append)
    open_accelerator(RunSettings(output_dir=str(tmp_path), report_to="none"))
    assert bool(called) == (not words)


@pytest.mark.usefixtures("fresh_accelerate_state")
@pytest.mark.parametrize(
    ("threads", "is_launched", "all_cores"),
    [(None, False, True), ("1", False, False), ("1", True, True), ("3", True, False), (None, True, True)],
)
def test_a_number_of_threads_that_the_user_has_set_is_kept(tmp_path, monkeypatch, threads, is_launched, all_cores):
    called = []
    monkeypatch.setattr(launcher, "launcher_options", lambda: launched("") if is_launched else None)
    monkeypatch.setattr(launcher, "use_all_cores", called.append)
    monkeypatch.setattr(launcher, "end_with_launcher", lambda: None)
    for name in ("OMP_NUM_THREADS", launcher.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    open_accelerator(RunSettings(output_dir=str(tmp_path), report_to="none"))
    assert bool(called) == all_cores


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_the_one_thread_of_a_launcher_that_cannot_be_seen_is_not_the_user_s(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(launcher, "launcher_options", lambda: None)  # its command line may not be read
    monkeypatch.setattr(launcher, "use_all_cores", called.append)
    monkeypatch.setattr(launcher, "ADOPTED_BY", -1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(launcher.LAUNCHED, "no")
    open_accelerator(RunSettings(output_dir=str(tmp_path), report_to="none"))
    assert called


def test_where_parents_cannot_be_seen_there_are_no_options(monkeypatch):
    def parents():
        raise launcher.psutil.AccessDenied

    monkeypatch.setattr(launcher.psutil, "Process", lambda: SimpleNamespace(parents=parents))
    assert launcher.launcher_options() is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_a_script_hears_what_its_launcher_was_told(tmp_path, precision):
    script = tmp_path / "train.py"
    script.write_text(
        "from hfgen import hardware\nhardware.cpu_multiplies_bf16 = lambda: True\n"
        "from hfgen.training.launcher import RunSettings, open_accelerator\n"
        f"open_accelerator(RunSettings(output_dir={str(tmp_path)!r}, report_to='none', cpu=True))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", precision, str(script)]
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment).stdout
    assert told == f"device: cpu; mixed precision: {precision} (as set by accelerate launch or its configuration)\n"


def test_a_training_whose_launcher_has_ended_gets_sigterm(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.01)
    told, launcher_pid = tmp_path / "told", os.fork()
    if launcher_pid == 0:  # in between: ends as soon as the training watches it
        ready, watching = os.pipe()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, lambda number, frame: (told.write_text(str(number)), os._exit(0)))
            launcher.end_with_launcher()
            os.write(watching, b"1")
            time.sleep(30)
            os._exit(1)
        os.read(ready, 1)
        os._exit(0)
    os.waitpid(launcher_pid, 0)
    deadline = time.monotonic() + 20
    while not (told.is_file() and told.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told.read_text() == str(int(signal.SIGTERM))


def test_a_training_does_not_begin_without_the_launcher_that_started_it(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "launcher_options", lambda: None)
    monkeypatch.setattr(launcher, "ADOPTED_BY", os.getppid())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    with pytest.raises(UserError, match="accelerate launch exited before training started"):
        open_accelerator(RunSettings(output_dir=str(tmp_path / "run"), report_to="none", cpu=True))
