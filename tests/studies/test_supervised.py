import os
import signal
import subprocess
import sys

import psutil
import pytest
from toy_studies import wait_until


# Says on its first line who it is, and then does as it is told.
QUIET = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
TIDY = """
import os, signal, subprocess, sys, time
def end(*_):
    open(sys.argv[1], "w").write("tidied up")
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print(os.getpid(), flush=True)
time.sleep(600)
"""
DEAF = TIDY.replace("signal.signal(signal.SIGTERM, end)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
SLOW = TIDY.replace("    open", "    time.sleep(1.5)\n    open")  # as one that writes a checkpoint
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def supervised(parent, *command, before=""):
    code = "import sys; from hfgen.studies import supervised; "
    code += f"{before}sys.exit(supervised.main({parent}, sys.argv[1:]))"
    return [sys.executable, "-c", code, *map(str, command)]


def start(*command, before=""):
    """Start a supervised command; return the supervisor and the process that has said its number."""
    process = subprocess.Popen(supervised(os.getpid(), *command, before=before), stdout=subprocess.PIPE, text=True)
    with process.stdout:
        return process, psutil.Process(int(process.stdout.readline()))


def has_ended(process):
    """Whether a process has ended; it may not have been reaped yet by whoever took it over."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("code", "status"), [("pass", 0), ("exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + signal.SIGKILL)]
)
def test_the_exit_status_is_that_of_the_command(code, status):
    command = [sys.executable, "-m", "hfgen.studies.supervised", str(os.getpid()), sys.executable, "-c", code]
    assert subprocess.run(command).returncode == status


@pytest.mark.parametrize("direct", [True, False])
def test_sigterm_reaches_the_script_behind_the_launcher_which_is_waited_for(tmp_path, direct):
    file = tmp_path / "told"
    launcher = [] if direct else [sys.executable, "-c", LAUNCHER]
    script = [sys.executable, "-c", TIDY] if direct else [SLOW]
    process, worker = start(*launcher, *script, file)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == (3 if direct else 128 + signal.SIGTERM)
    assert file.read_text() == "tidied up"
    assert has_ended(worker)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_are_left_to_the_worker(tmp_path, number):
    process, worker = start(sys.executable, "-c", TIDY, tmp_path / "told")
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # taken after it
    assert process.wait(300) == 3
    assert (tmp_path / "told").exists()


def test_ctrl_c_can_be_heard_by_the_command():
    code = "import signal; exit(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)"
    assert subprocess.run(supervised(os.getpid(), sys.executable, "-c", code)).returncode == 0


def test_when_the_worker_is_killed_its_training_is_told_to_end(tmp_path):
    file = tmp_path / "told"
    inner = supervised("os.getpid()", sys.executable, "-c", LAUNCHER, TIDY, file)
    inner[2] = inner[2].replace("import sys;", "import os, sys;").replace("os.getpid()", "os.getppid()")
    code = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    worker = subprocess.Popen([sys.executable, "-c", code, *inner], stdout=subprocess.PIPE, text=True)
    with worker.stdout:
        training = psutil.Process(int(worker.stdout.readline()))
    supervisor = psutil.Process(worker.pid).children()[0]
    worker.kill()
    worker.wait()
    wait_until(lambda: has_ended(supervisor))
    assert has_ended(training)
    assert file.read_text() == "tidied up"


def test_what_does_not_end_in_time_is_killed(tmp_path):
    process, worker = start(sys.executable, "-c", DEAF, tmp_path / "told", before="supervised.GRACE_SECONDS = 0.3; ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGKILL
    assert has_ended(worker)


def test_what_the_command_leaves_behind_is_killed():
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {QUIET!r}]).stdin"
    process, left = start(sys.executable, "-c", code)
    assert process.wait(300) == 0
    wait_until(lambda: has_ended(left))
