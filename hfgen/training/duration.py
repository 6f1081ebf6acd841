"""Durations as users write and read them."""

import math
import os
import re
import time

from hfgen.errors import UserError


# When `hfgen train` began, in seconds since the epoch, for the run that it starts.
STARTED_AT = "HFGEN_STARTED_AT"
# More steps than fit into any duration.
WITHOUT_END = 10**8


def parse_duration(flag: str, text: str | None) -> float | None:
    """Parse a duration such as "90s", "45m", "8h50m" or "1.5h".

    Args:
        flag: name of the option, for error messages.
        text: the duration; None is returned as None.

    Returns:
        Seconds, more than 0.

    Raises:
        UserError: if the text is not such a duration.
    """
    if text is None:
        return None
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if not 0 < total < math.inf:
        raise UserError(f"{flag} {text}: write a duration such as 90s, 45m or 8h50m")
    return total


def time_left(limit: float | None) -> float | None:
    """Return the seconds left of a launch's time limit: `hfgen train` has looked at the data before the run begins."""
    started = os.environ.pop(STARTED_AT, None)  # for one run alone
    return limit if limit is None or started is None else max(1.0, limit - (time.time() - float(started)))


def format_duration(seconds: float) -> str:
    """Format a time: "35 s", "12 min", "3.4 h", "2.1 days"."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"


def estimated(seconds: float) -> str:
    """Format an estimated time: "about 64 s", "about 3.7 h"."""
    number, unit = format_duration(seconds).split()
    value = float(number)
    return f"about {value:.0f} {unit}" if value >= 10 else f"about {value:.2g} {unit}"
