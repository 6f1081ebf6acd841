"""Errors that the user can fix: printed as one message, without a traceback; and printing that never fails."""

import contextlib
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from hfgen.texts import one_line, say


Result = TypeVar("Result")
SECONDS_TO_SPEAK = 2.0
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|STATUS_ALLOC_FAILED")
OUT_OF_THREADS = re.compile("can't start new thread")  # Python's own words


class UserError(ValueError):
    """Invalid user input; the message names it and says how to fix it."""


class NotFiniteError(UserError):
    """Generated images, or latents, are NaN or infinite: a network has diverged."""


class TerminatedError(SystemExit):
    """SIGTERM, SIGHUP of a closed terminal, or Ctrl-C ended the program, with the status that a shell gives to it.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(128 + number)
        self.number = number


class StopRequestedError(Exception):
    """Long work, such as generating many images, was abandoned because the run was asked to stop."""


def run_reporting_user_errors(main: Callable[[], Result]) -> Result:
    """Call `main`; if it fails by what the user can change, print one message to stderr and exit.

    The status is 2, as of argparse, and that of a shell after SIGTERM and Ctrl-C, which end the program with what
    `finally` and `with` have to do. What is printed never ends the program: see `make_printing_safe`.
    """
    make_printing_safe()
    threading.excepthook = _report_from_thread
    try:
        with _signals_as_errors():
            return main()
    except TerminatedError as error:
        say(_reason(error.number), err=True)
        raise
    except KeyboardInterrupt:
        say(_reason(signal.SIGINT), err=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if (message := message_for_user(error)) is None:
            raise
        _let_main_process_speak_first()
        say(f"error: {message}", err=True)
        raise SystemExit(2) from None


def _let_main_process_speak_first() -> None:
    """Wait in the other processes of a training: most often all fail alike, and then the launcher ends them."""
    if os.environ.get("RANK", "0") != "0" and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_TO_SPEAK)


def end_on_signals() -> None:
    """Let SIGTERM and Ctrl-C end this program at once, with a line and the status that a shell gives to them.

    For programs only, before their other imports, so that loading the libraries can be interrupted without a
    traceback: `run_reporting_user_errors` handles the signals while it runs, and after it this holds again.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have told it to ignore Ctrl-C
        signal.signal(signal.SIGINT, _end_now)
    signal.signal(signal.SIGTERM, _end_now)


def _reason(number: int) -> str:
    """Say in words why a signal ended the program."""
    return "interrupted by Ctrl-C" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


def _end_now(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        say(_reason(number), err=True)
    os._exit(128 + number)


def _stop(number: int, frame: FrameType | None) -> None:
    raise TerminatedError(number)


@contextlib.contextmanager
def _signals_as_errors() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise a `TerminatedError`, and Ctrl-C a `KeyboardInterrupt`; but not what is ignored.

    Only in the main thread, the only one that gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminated, interrupted = signal.signal(signal.SIGTERM, _stop), signal.getsignal(signal.SIGINT)
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    hung_up = None if hang_up is None else signal.getsignal(hang_up)
    if hang_up is not None and hung_up != signal.SIG_IGN:  # as with nohup
        signal.signal(hang_up, _stop)
    if interrupted is _end_now:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminated)
        signal.signal(signal.SIGINT, interrupted)
        if hang_up is not None:
            signal.signal(hang_up, hung_up)


def message_for_user(error: Exception) -> str | None:
    """Return what to print for an error that the user can do something about; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}"
    # torch reports the memory of a GPU by a class of its own, and that of a CPU by a RuntimeError of its allocator.
    is_of_torch = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    if isinstance(error, MemoryError) or is_of_torch:
        return f"out of memory ({one_line(error)[:200]}); lower --batch_size or the requested sizes"
    if isinstance(error, RuntimeError) and OUT_OF_THREADS.search(str(error)):
        return (
            "the system allows no further thread; end other programs, or raise the limit (`ulimit -u`, or that of the "
            "container on processes)"
        )
    return None


def _report_from_thread(arguments: threading.ExceptHookArgs) -> None:
    """Report an error of a thread, such as that of TensorBoard when the disk is full; the main thread sees it too."""
    error = arguments.exc_value
    if isinstance(error, Exception) and (message := message_for_user(error)) is not None:
        say(f"error: {message}", err=True)
    else:
        threading.__excepthook__(arguments)


def make_printing_safe() -> None:
    """Let no print fail: characters that the console lacks are escaped, and a closed pipe or full disk is ignored."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # a notebook, or none at all
            continue
        stream.reconfigure(errors="backslashreplace")
        # A console of Windows is no file: it has a class of its own, which translates.
        is_file = isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO)
        if is_file and stream is getattr(sys, f"__{name}__"):  # not replaced, by this function or by others
            stream.flush()
            setattr(sys, name, _forgiving(stream))


class _ForgivingFile(io.FileIO):
    """A console or file whose writes cannot fail, because nobody may be reading any more."""

    def write(self, content) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


def _forgiving(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    file = _ForgivingFile(stream.fileno(), "w", closefd=False)
    is_unbuffered = isinstance(stream.buffer, io.RawIOBase)  # as PYTHONUNBUFFERED asks for
    return io.TextIOWrapper(
        file if is_unbuffered else io.BufferedWriter(file),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
