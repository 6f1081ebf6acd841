"""`hfgen train` up to the start of the training, which is only noted."""

import argparse
import sys

import pytest

from hfgen.cli import main
from hfgen.commands.processes import Processes
from hfgen.commands.train_settings import parse_flags
from hfgen.config import settings_to_dict


ONE = Processes(1, 1, False, {}, None)


def note_starts(monkeypatch):
    """Return what will be started, as (method, flags); on a CPU, or as a test sets `machine`."""
    found = argparse.Namespace(machine=ONE, method=None, flags=None)

    def start(self, method, flags, started):
        found.method, found.flags, found.started = method, flags, started

    monkeypatch.setattr(Processes, "choose", staticmethod(lambda own, on_cpu: found.machine))
    monkeypatch.setattr(Processes, "start", start)
    return found


def call(monkeypatch, *arguments):
    """Run `hfgen train` with arguments; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["hfgen", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


def settings_of(started):
    """All settings of what was started, by name."""
    return settings_to_dict(*parse_flags(started.method, started.flags, "hfgen train"))
