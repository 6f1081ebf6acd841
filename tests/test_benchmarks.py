"""The benchmarks run to the end; how fast is not tested."""

import json
import multiprocessing
import sys
import threading
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """The benchmarks' modules can be imported, as from a script among them."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_figures_are_whole_in_json_and_rounded_on_the_page(modules):
    from tables import Goal, Table, table_of

    table = Table("Speed", "How fast.", ["side", "images", "s"], [["ours", 12345, 0.012345], ["theirs", None, 1234.5]])
    assert table.as_dict()["rows"][0] == {"side": "ours", "images": 12345, "s": 0.012345}
    lines = table.as_markdown().splitlines()
    assert Table.from_dict(json.loads(json.dumps(table.as_dict()))) == table
    assert lines[:3] == ["## Speed", "", "How fast."]
    assert lines[-2:] == ["| ours | 12,345 | 0.0123 |", "| theirs |  | 1,234 |"]
    goals = table_of([Goal("twice", 1.9, 2), Goal("half", 0.5, 0.5)])
    assert [row[-1] for row in goals.rows] == ["MISS", "pass"]
    assert json.loads(json.dumps(Table("", "", ["a"], [[float("inf")]]).as_dict()))["rows"] == [{"a": None}]


def test_ratios_are_of_steps_timed_one_after_the_other(modules):
    from script_steps import Timing, ratio_of, time_in_turn

    class Clock:
        def __init__(self, name: str, seconds: list[float]):
            self.name, self.seconds = name, seconds

        def step(self) -> float:
            order.append(self.name)
            return self.seconds.pop(0)

        def close(self) -> int:
            return 2**20

    order: list[str] = []
    # A machine that becomes ten times slower on the way.
    timings = time_in_turn({"a": Clock("a", [9.0, 2, 2, 20]), "b": Clock("b", [9.0, 1, 1, 10])}, rounds=3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert timings["a"] == Timing([2, 2, 20], 2**20)
    assert ratio_of(timings["a"], timings["b"]) == 2


def test_operations_of_a_step_are_counted_with_their_bytes(modules):
    from step_costs import counted_step

    def step(steps):
        found.update((yield from counted_step(steps, rate=1e9, bandwidth=1e6)))

    found: dict = {}
    left, right = torch.ones(10, 20), torch.ones(20, 30)
    for _ in step(iter(range(1))):
        (left @ right).view(-1).add_(1)
    assert set(found) == {"mm", "add_"}
    assert found["mm"].flops == 2 * 10 * 20 * 30
    assert found["mm"].bytes == 4 * (10 * 20 + 20 * 30 + 10 * 30)
    assert found["mm"].bound == max(12e3 / 1e9, 4400 / 1e6)
    assert found["add_"].calls == 1 and found["add_"].flops == 0


def use_threads_for_processes(monkeypatch) -> None:
    """Let workers be threads, as a new process spends most of a test's time on imports."""

    class Context:
        @staticmethod
        def Process(target, args, daemon):
            return threading.Thread(target=target, args=args, daemon=daemon)

    class End:
        """An end of a pipe that is left open, for the thread."""

        def __init__(self, end):
            self.send, self.recv = end.send, end.recv

        def close(self):
            pass

    pipe = multiprocessing.Pipe
    monkeypatch.setattr("multiprocessing.Pipe", lambda: tuple(map(End, pipe())))
    monkeypatch.setattr("multiprocessing.get_context", lambda method: Context)


@pytest.mark.slow
def test_all_that_is_measured_lands_in_a_file_and_on_a_page(modules, tmp_path, monkeypatch):
    import run

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the workers set it
    command = ["run.py", "--smoke", "--threads", "1", "--output", str(tmp_path / "figures"), "--only"]
    monkeypatch.setattr(sys, "argv", [*command, "data"])
    run.main()  # its worker is a process: a script needs a main thread, for signals
    use_threads_for_processes(monkeypatch)
    monkeypatch.setattr(sys, "argv", [*command, "sampling"])
    run.main()  # keeps what the first has found
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["kind"] == "smoke" and [len(part["goals"]) for part in figures["parts"].values()] == [4, 1]
    (path,), (images,) = (part["tables"] for part in figures["parts"].values())
    assert (path["title"], images["title"]) == ("Data path", "DCGAN: 32 images generated")
    assert all(row["images/s"] > 0 for row in path["rows"] + images["rows"])
    page = (tmp_path / "figures.md").read_text()
    assert page.index("## Goals") < page.index("## DCGAN: 32 images generated") < page.index("## Data path")


def test_a_pipeline_is_scored_only_against_a_reference(modules, monkeypatch, capsys):
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "sampling", "--pipeline", "run"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--pipeline and --reference go together" in capsys.readouterr().err
