"""Bars say what is done in words, and the time of work that cannot be counted moves on."""

import threading
import time

import pytest

from hfgen import bars
from hfgen.bars import progress_bar, working_on


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bars, "DELAY", 0.02)
    monkeypatch.setattr(bars, "update_interval", lambda: 0.01)


def test_the_time_moves_while_one_call_works_and_the_line_is_erased(capsys):
    with working_on("fitting the density") as bar:
        bar.set_description_str("fitting the density: mixture of 12 Gaussians to 20,000 latents", refresh=False)
        time.sleep(1.3)  # a single call of scikit-learn
    shown = capsys.readouterr().err.split("\r")
    for elapsed in ("00:00", "00:01"):
        assert f"fitting the density: mixture of 12 Gaussians to 20,000 latents, {elapsed}" in [
            s.strip() for s in shown
        ]
    assert shown[-2].strip() == "" and shown[-1] == ""


def test_quick_work_shows_nothing_and_no_thread_is_left_even_after_an_error(capsys, monkeypatch):
    before = threading.active_count()
    monkeypatch.setattr(bars, "DELAY", 60.0)
    with pytest.raises(KeyboardInterrupt), working_on("fitting"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "" and threading.active_count() <= before + 1  # tqdm's own monitor


@pytest.mark.parametrize(("total", "shown"), [(None, "decoding: 3 images [00:00, "), (6, "| 3/6 [00:00<")])
def test_what_is_counted_is_a_word_of_its_own_and_speed_is_per_second(capsys, total, shown):
    with progress_bar("decoding", total) as bar:
        time.sleep(0.05)
        bar.update(3)
    text = capsys.readouterr().err
    assert shown in text and " images/s]" in text
