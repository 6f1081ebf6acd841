"""Arguments of any command: empty ones, the home folder, those that act only beside another, and their names."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from hfgen.errors import UserError


def refuse_empty_values(arguments: Sequence[str]) -> None:
    """Raise a `UserError` if a value is empty, as a variable of a shell that was not set leaves it.

    It would count as not given, or as the folder in which the command runs.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument == "":
            named = before if before.startswith("--") else "an argument"
            raise UserError(f"{named}: its value is empty; give a value, or leave it out")
        if argument.startswith("--") and argument.endswith("=") and argument.count("=") == 1:
            raise UserError(f"{argument[:-1]}: its value is empty; give a value, or leave it out")


def with_home(arguments: Sequence[str]) -> list[str]:
    """Expand a "~" at the beginning of each value, which many shells leave as it is in `--output=~/images`."""
    expanded = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        expanded.append(option + equals + (os.path.expanduser(value) if value.startswith("~") else value))
    return expanded


def require_beside(option: str, value: object, needed: str, given: object) -> None:
    """Raise a `UserError` if an option is given without the one that it belongs to, as it would be ignored.

    Args:
        option: such as "--held_out_split".
        value: of this option; None if it was not given.
        needed: the option that it belongs to.
        given: the value of that one; None if it was not given.
    """
    if value is not None and given is None:
        raise UserError(f"{option} {value}: applies only with {needed}; add that, or leave it out")


@contextlib.contextmanager
def errors_name_dataset_as(argument: str) -> Iterator[None]:
    """Let a `UserError` about `--dataset`, the setting of a training, name the argument of this command instead.

    Args:
        argument: such as "--reference".
    """
    try:
        yield
    except UserError as error:
        message = str(error).replace("--dataset ", f"{argument} ")
        if argument == "--held_out":  # has a split of its own
            message = message.replace("--dataset_split", "--held_out_split")
        error.args = (message,)
        raise
