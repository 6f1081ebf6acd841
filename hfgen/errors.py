"""Errors that the user can fix: printed as one message, without a traceback; and printing that never fails."""

import io
import sys
from collections.abc import Callable
from typing import TypeVar


Result = TypeVar("Result")


class UserError(ValueError):
    """Invalid user input; the message names it and says how to fix it."""


class StopRequestedError(Exception):
    """Long work, such as generating many images, was abandoned because the run was asked to stop."""


def run_reporting_user_errors(main: Callable[[], Result]) -> Result:
    """Call `main`; on a `UserError` print its message to stderr and exit with status 2, as argparse does.

    What is printed never ends the program: see `make_printing_safe`.
    """
    make_printing_safe()
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def make_printing_safe() -> None:
    """Let no print fail: characters that the console lacks are escaped, and a closed pipe or full disk is ignored."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):  # a notebook, or none at all
            continue
        stream.reconfigure(errors="backslashreplace")
        if stream is getattr(sys, f"__{name}__"):  # not replaced, by this function or by others
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
