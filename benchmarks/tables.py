"""Tables of measurements, for JSON and for a page."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple


Cell = str | float | int | None


@dataclass
class Table:
    """Figures of one comparison.

    Attributes:
        title: heading on the page.
        about: what was compared, and how; a paragraph.
        columns: names, the units included.
        rows: as many cells as columns each.
    """

    title: str
    about: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the table for JSON, with unrounded numbers, which JSON lacks for infinities (then None)."""
        rows = [dict(zip(self.columns, map(_finite, row), strict=True)) for row in self.rows]
        return {"title": self.title, "about": self.about, "rows": rows}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Table":
        """Return the table that `as_dict` has written."""
        rows = [list(row.values()) for row in found["rows"]]
        return cls(found["title"], found["about"], list(found["rows"][0]), rows)

    def as_markdown(self) -> str:
        """Return the table for a page, with three significant digits."""
        lines = [f"## {self.title}", "", self.about, "", _line(self.columns), _line(["---"] * len(self.columns))]
        return "\n".join([*lines, *(_line(map(shown, row)) for row in self.rows)]) + "\n"


class Goal(NamedTuple):
    """A ratio that is to be reached."""

    name: str
    value: float
    at_least: float

    @property
    def verdict(self) -> str:
        """Whether it is."""
        return "pass" if self.value >= self.at_least else "MISS"


def table_of(goals: list[Goal]) -> Table:
    """Return all goals as one table."""
    table = Table("Goals", "Ratios from the tables below.", ["ratio", "measured", "at least", ""])
    table.rows = [[goal.name, goal.value, goal.at_least, goal.verdict] for goal in goals]
    return table


def shown(value: Cell) -> str:
    """Return a cell for readers: 1,234 or 12.3 or 0.0123; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value))) if value and math.isfinite(value) else 1
    return f"{value:.{max(0, digits)}f}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _finite(value: Cell) -> Cell:
    return None if isinstance(value, float) and not math.isfinite(value) else value
