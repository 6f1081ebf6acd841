"""Run a command for as long as the process that asked for it lives: `python -m hfgen.studies.supervised PID COMMAND`.

A worker that is killed with SIGKILL cannot end its training, which would go on in a folder that another worker takes
over meanwhile. So this stands between the two: it starts the command in a process group of its own, passes SIGTERM on,
and sends it itself when its parent is gone.
"""

import os
import signal
import subprocess
import sys
import time

import psutil


LOOK_EVERY = 0.5  # seconds
GRACE = 60.0  # seconds to write a checkpoint in, after which the group is killed


def main(parent: int, command: list[str]) -> int:
    """Return the exit status of the command when nothing of its group is left; see the module."""
    asked: list[float] = []
    told = False
    # Both before the command starts, so that no signal is missed; as functions, which the command does not inherit.
    signal.signal(signal.SIGTERM, lambda *_: asked.append(time.monotonic()))
    signal.signal(signal.SIGINT, lambda *_: None)  # the worker has it too, and decides
    process = subprocess.Popen(command, start_new_session=True)
    # The launcher dies of SIGTERM at once, while the script that it has launched still writes its checkpoint.
    while process.poll() is None or (asked and lives(process.pid)):
        if os.getppid() != parent:
            asked.append(time.monotonic())
        if asked and not told:
            send(process, signal.SIGTERM)
            told = True
        if asked and time.monotonic() - asked[0] > GRACE:
            send(process, signal.SIGKILL)
        time.sleep(LOOK_EVERY)
    send(process, signal.SIGKILL)  # what the command has left running in its group
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def lives(group: int) -> bool:
    """Whether a process of the group is still at work; one that only waits to be reaped is not."""
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (psutil.Error, ProcessLookupError, PermissionError):
            pass  # gone meanwhile, or none of ours
    return False


def send(process: subprocess.Popen, number: int) -> None:
    """Send a signal to the group of a process, if there is anything left of it."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
