"""The ranges of the numbers that a user may give, in settings, command-line options and study files."""

import math
from typing import NamedTuple

from hfgen.errors import UserError


MAX_FLOAT = 3.4e38  # above this, a float32 is infinite


class Range(NamedTuple):
    """A range of numbers. NaN and infinity are in none, nor what is infinite as float32.

    Attributes:
        minimum: lowest number allowed.
        maximum: highest number allowed.
        above: whether `minimum` itself is excluded.
        below: whether `maximum` itself is excluded.
        unit: of the numbers, for messages.
    """

    minimum: float
    maximum: float = MAX_FLOAT
    above: bool = False
    below: bool = False
    unit: str = ""

    def check(self, name: str, value: float | None) -> None:
        """Raise a `UserError` if a number is outside the range; None, for an unset option, is accepted.

        Args:
            name: of the setting, as the user writes it.
            value: the number.
        """
        if value is not None and (problem := self._problem(value)):
            raise UserError(f"{name} {value}: must {problem}{self.unit and ' '}{self.unit}")

    def _problem(self, value: float) -> str | None:
        # Comparisons, which are false for NaN, rather than math.isfinite, which fails for whole numbers above 1e308.
        if not -math.inf < value < math.inf:
            return "be a finite number"
        is_too_low = value <= self.minimum if self.above else value < self.minimum
        is_too_high = value >= self.maximum if self.below else value > self.maximum
        if not is_too_low and not is_too_high:
            return None
        if self.maximum <= MAX_SHOWN:
            return f"be from {self.minimum:g} to {'below ' * self.below}{self.maximum:g}"
        if is_too_high:
            return f"be at most {self.maximum}"
        if self.minimum == 0 and not self.above:
            return "not be negative"
        return "be positive" if self.minimum in (0, 1) else f"be at least {self.minimum:g}"


# Bounds up to this are part of what a setting means; higher ones only refuse what must be a slip.
MAX_SHOWN = 100_000
MAX_COUNT = 10**9
MAX_CHANNELS = 65_536  # above this, a single convolution needs more memory than a GPU has

COUNT = Range(1, MAX_COUNT)
COUNT_OR_NONE = Range(0, MAX_COUNT)
CHANNELS = Range(1, MAX_CHANNELS)
PIXELS = Range(8, 1024, unit="pixels")  # the sides of images that are trained on or scored
SCORED_IMAGES = Range(10, MAX_COUNT)
SEED = Range(0, 2**63 - 1)  # what torch takes
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
FRACTION = Range(0, 1)
DECAY = Range(0, 1, below=True)
