"""Errors that the user can fix: printed as one message, without a traceback."""

import sys
from collections.abc import Callable
from typing import TypeVar


Result = TypeVar("Result")


class UserError(ValueError):
    """Invalid user input; the message names it and says how to fix it."""


class StopRequestedError(Exception):
    """Long work, such as generating many images, was abandoned because the run was asked to stop."""


def run_reporting_user_errors(main: Callable[[], Result]) -> Result:
    """Call `main`; on a `UserError` print its message to stderr and exit with status 2, as argparse does."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
