"""What ends a run early."""

import os
import signal
import time
from datetime import timedelta

import pytest

from hfgen.errors import UserError
from hfgen.training import stopping
from hfgen.training.duration import STARTED_AT, parse_duration, time_left
from hfgen.training.stopping import GO_ON, HUNG_UP, INTERRUPTED, TERMINATED, TIME_IS_UP, StopRequests


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("45m", 2700), ("8h50m", 31800), ("1.5h", 5400), ("1h2m3s", 3723), (" 2m ", 120), (None, None)],
)
def test_durations_are_read(text, seconds):
    assert parse_duration("--max_train_time", text) == seconds


@pytest.mark.parametrize("text", ["", "5", "m", "-5m", "5m8h", "0s", "8 hours"])
def test_what_is_no_duration_is_refused_by_name(text):
    with pytest.raises(UserError, match="--max_train_time"):
        parse_duration("--max_train_time", text)


@pytest.mark.parametrize(
    ("number", "request_"),
    [(signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED), (signal.SIGHUP, HUNG_UP)],
)
def test_a_signal_is_a_request_and_not_an_end(number, request_):
    requests = StopRequests()
    of_the_shell = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored with nohup
    before = signal.getsignal(number)
    with requests.caught():
        os.kill(os.getpid(), number)
        assert requests.agree() == request_
    assert signal.getsignal(number) is before
    signal.signal(signal.SIGHUP, of_the_shell)
    assert requests.exit_status == 128 + number


def test_a_closed_terminal_stops_nothing_that_was_started_with_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (requests := StopRequests()).caught():
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.agree() == GO_ON
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_stops_at_once():
    requests = StopRequests()
    with pytest.raises(KeyboardInterrupt), requests.caught():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_strongest_request_wins_whatever_their_order():
    requests = StopRequests()
    for request in (TERMINATED, TIME_IS_UP):
        requests.raise_to(request)
    assert requests.agree() == TERMINATED


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_sigterm_of_a_launcher_after_ctrl_c_does_not_hide_it(elsewhere):
    requests = StopRequests()
    with requests.caught():
        if elsewhere:  # another process got it
            requests.raise_to(INTERRUPTED)
        else:
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.agree() == INTERRUPTED
    assert requests.exit_status == 128 + signal.SIGINT


def test_ctrl_c_after_sigterm_leaves_it_a_sigterm():
    requests = StopRequests()
    with requests.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.agree() == TERMINATED
    assert requests.exit_status == 128 + signal.SIGTERM


@pytest.mark.parametrize("not_finite", [False, True])
def test_a_signal_during_the_exchange_with_other_processes_counts_at_the_next_one(monkeypatch, not_finite):
    """It was overwritten by their answer, and the launcher killed the run after half a minute."""

    def exchange(tensor, operation, group):
        if exchanged.append(tensor.tolist()) is None and len(exchanged) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            tensor[1] = not_finite  # the answer of another process

    exchanged = []
    for name, value in {"is_initialized": True, "get_world_size": 2, "new_group": None}.items():
        monkeypatch.setattr(stopping.dist, name, lambda value=value, **_: value)
    monkeypatch.setattr(stopping.dist, "all_reduce", exchange)
    requests = StopRequests()
    with requests.caught():
        assert requests.agree() == GO_ON
        assert requests.not_finite == not_finite
        requests.not_finite = False  # the run goes back to a checkpoint, and on
        assert requests.agree() == TERMINATED
    assert exchanged == [[GO_ON, 0], [TERMINATED, 0]]


def test_time_being_up_is_no_failure():
    requests = StopRequests()
    requests.raise_to(TIME_IS_UP)
    assert requests.exit_status == 0


def test_processes_wait_for_the_main_one_as_long_here_as_for_gradients(monkeypatch):
    groups = []
    monkeypatch.setattr(stopping.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(stopping.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(stopping.dist, "new_group", lambda **options: groups.append(options) or "group")
    monkeypatch.setattr(stopping.dist, "all_reduce", lambda *_, **options: None)
    requests = StopRequests()
    requests.raise_to(TIME_IS_UP)
    assert requests.agree() == requests.agree() == TIME_IS_UP
    assert groups == [{"backend": "gloo", "timeout": timedelta(hours=3)}]


def test_what_was_agreed_does_not_change_with_a_later_request():
    requests = StopRequests()
    requests.agree()
    requests.raise_to(TERMINATED)
    assert requests.agreed == GO_ON and requests.agree() == requests.agreed == TERMINATED


def test_a_time_limit_counts_from_the_start_of_the_command(monkeypatch):
    assert time_left(100.0) == 100.0 and time_left(None) is None
    monkeypatch.setenv(STARTED_AT, str(time.time() - 40))
    assert 50 < time_left(100.0) <= 60 and time_left(100.0) == 100.0  # for one run alone
    monkeypatch.setenv(STARTED_AT, str(time.time() - 400))
    assert time_left(100.0) == 1.0
    monkeypatch.setenv(STARTED_AT, str(time.time() - 400))
    assert time_left(None) is None and STARTED_AT not in os.environ
