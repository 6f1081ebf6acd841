"""Texts that leave hfgen, for a console, a report or a card: names in them came from files, settings and strangers."""

import html
import re
import sys


def printable(text: str, kept: str = "") -> str:
    """Escape what cannot be seen, or would act on a console or forge a line: line breaks, ANSI codes, bidi marks.

    Args:
        text: any text; a file's name may not even be valid.
        kept: characters that stay as they are.
    """
    return "".join(
        character if character.isprintable() or character in kept else character.encode("unicode_escape").decode()
        for character in text.encode("utf-8", "backslashreplace").decode()
    )


def one_message(text: object) -> str:
    """Return a message as it is printed: further lines are indented, so that a name with a line break forges none."""
    first, *further = printable(str(text), "\n\t").split("\n")
    return "\n  ".join([first, *map(str.strip, further)])


def one_line(error: object) -> str:
    """Return an error's message on one line; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def say(text: object, err: bool = False) -> None:
    """Print a message at once; names in it may come from files, settings and strangers."""
    # In one piece: several processes may print.
    print(f"{one_message(text)}\n", end="", file=sys.stderr if err else sys.stdout, flush=True)


def say_lines(text: object, err: bool = False) -> None:
    """Print a report at once, line by line as it is, such as a table; what is in one line must be `printable`."""
    lines = printable(str(text), "\n\t")
    print(f"{lines}\n", end="", file=sys.stderr if err else sys.stdout, flush=True)


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts, such as "1 image" and "2,000 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def markdown_text(text: str) -> str:
    """Escape text for Markdown, on one line, also within a table: no HTML, links, images or emphasis of its own."""
    line = printable(" ".join(text.split()))
    escaped = re.sub(r"([\\`*]|\](?=[\[(:])|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)
    return html.escape(escaped, quote=False).replace("|", "&#124;")
