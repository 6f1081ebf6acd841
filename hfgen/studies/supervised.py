"""Run a command for as long as its parent process lives: `python -m hfgen.studies.supervised PID COMMAND`.

A worker killed with SIGKILL cannot stop its training, which would go on in a folder that another worker takes over.
So this process sits between the two: it starts the command in its own process group, forwards SIGTERM, and sends
SIGTERM itself when its parent is gone.
"""

import os
import signal
import subprocess
import sys
import time

import psutil


POLL_SECONDS = 0.5
GRACE_SECONDS = 60.0  # for writing a checkpoint before the group is killed


def main(parent: int, command: list[str]) -> int:
    """Run the command until its process group is gone, and return its exit status; see the module."""
    asked: list[float] = []
    sent = False
    # Set before the command starts, so that no signal is missed; handlers are not inherited by the command.
    signal.signal(signal.SIGTERM, lambda *_: asked.append(time.monotonic()))
    for name in ("SIGINT", "SIGHUP"):  # the worker gets them too, and decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: None)
    process = subprocess.Popen(command, start_new_session=True)
    # SIGTERM ends the launcher at once, while the launched script is still writing its checkpoint.
    while process.poll() is None or (asked and lives(process.pid)):
        if os.getppid() != parent:
            asked.append(time.monotonic())
        if asked and not sent:
            send(process, signal.SIGTERM)
            sent = True
        if asked and time.monotonic() - asked[0] > GRACE_SECONDS:
            send(process, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    send(process, signal.SIGKILL)  # anything still running in the group
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def lives(group: int) -> bool:
    """Whether a process of the group is still running; zombies do not count."""
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (psutil.Error, ProcessLookupError, PermissionError):
            pass  # already gone, or not ours
    return False


def send(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process's group, if it still exists."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
