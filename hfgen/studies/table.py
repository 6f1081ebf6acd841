"""The table of a study: means and spreads over seeds, with published figures; as Markdown, CSV and LaTeX."""

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from hfgen.studies.cells import Place, Study
from hfgen.studies.outcomes import DIVERGED, TRAINED, Outcome
from hfgen.studies.study_file import METRICS
from hfgen.texts import markdown_text


Outcomes = Mapping[str, Outcome | None]
NOT_RUN, NAN = "–", "NaN"
HIGHER_IS_BETTER = ("images_per_second",)
MIN_TO_RANK = 3
IN_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[]*"},  # otherwise parsed as arguments of \\
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "–": "--",
}
# Columns of the long table: heading -> keys in a result's summary, and number format.
COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "FID": (("scores", "fid"), "{:.4g}"),
    "KID": (("scores", "kid"), "{:.3g}"),
    "precision": (("scores", "precision"), "{:.2f}"),
    "recall": (("scores", "recall"), "{:.2f}"),
    "coverage": (("scores", "coverage"), "{:.2f}"),
    "FID of reconstructions": (("reconstructions", "fid"), "{:.4g}"),
    "copies by pixels": (("memorisation_by_pixels", "num_copies"), "{:.3g}"),
    "images/s": (("training", "images_per_second"), "{:.3g}"),
    "minutes": (("training", "minutes"), "{:.3g}"),
}


@dataclass(frozen=True)
class Row:
    """A place of the table with its outcomes.

    Attributes:
        place: family and grid point.
        outcomes: one per seed.
    """

    place: Place
    outcomes: tuple[Outcome | None, ...]

    @property
    def label(self) -> str:
        """The grid point as text, such as "learning_rate 1e-4"; "" if there is no grid."""
        return ", ".join(f"{key} {value}" for key, value in self.place.point.items())

    @property
    def values(self) -> list[float]:
        """The figures of all seeds that were trained and scored."""
        trained = [one for one in self.outcomes if one is not None and one.kind == TRAINED]
        return [one.value for one in trained if math.isfinite(one.value)]

    @property
    def num_diverged(self) -> int:
        """Number of seeds that ended as NaN."""
        ended = [one for one in self.outcomes if one is not None]
        return sum(one.kind == DIVERGED or one.kind == TRAINED and not math.isfinite(one.value) for one in ended)

    @property
    def is_complete(self) -> bool:
        """Whether every seed has a figure or has diverged."""
        return len(self.values) + self.num_diverged == len(self.outcomes)

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN if one of them diverged or none has ended."""
        return statistics.fmean(self.values) if self.values and not self.num_diverged else math.nan

    def shown(self) -> str:
        """The figure as shown in the table: mean and standard deviation over the seeds."""
        text = with_spread(self.values, "{:.4g}")
        if self.num_diverged:
            partly = f"{NAN} ({self.num_diverged} of {len(self.outcomes)}; otherwise {text})"
            text = partly if self.values else NAN
        elif not self.values:
            return NOT_RUN
        missing = len(self.outcomes) - len(self.values) - self.num_diverged
        return text + (f" ({missing} of {len(self.outcomes)} seeds missing)" if missing else "")

    def column(self, name: str) -> str:
        """The mean and spread of another figure; see `COLUMNS`."""
        keys, form = COLUMNS[name]
        return with_spread(self.numbers(keys), form) or NOT_RUN

    def numbers(self, keys: tuple[str, ...]) -> list[float]:
        """One figure of every seed that has it."""
        found = []
        for outcome in self.outcomes:
            value: Any = outcome.result.summary if outcome is not None and outcome.result is not None else None
            for key in keys:
                value = value.get(key) if value is not None else None
            if value is not None:
                found.append(float(value))
        return found

    def course(self) -> dict[int, list[float]]:
        """FIDs of the seeds by training images seen; empty unless cells were scored during training."""
        found: dict[int, list[float]] = {}
        for outcome in self.outcomes:
            summary = outcome.result.summary if outcome is not None and outcome.result is not None else {}
            for point in summary.get("course", []):
                if point["fid"] is not None:
                    found.setdefault(point["images"], []).append(point["fid"])
        return dict(sorted(found.items()))

    @property
    def published(self) -> str:
        """The published figure as text; "" if there is none."""
        value = self.place.published
        if value is None:
            return ""
        return NAN if isinstance(value, float) and math.isnan(value) else f"{value}"


def with_spread(values: list[float], form: str) -> str:
    """Write a mean, and if there are several values the standard deviation of one; "" for no values."""
    if not values:
        return ""
    text = _without_power(form.format(statistics.fmean(values)))
    return text + (f" ± {_without_power(f'{statistics.stdev(values):.2g}')}" if len(values) > 1 else "")


def _without_power(text: str) -> str:
    """Write out Python's exponent notation: "1.2e+02" as "120"."""
    return f"{float(text):.0f}" if "e+" in text else text


def rows_of(study: Study, outcomes: Outcomes) -> list[Row]:
    """Return the rows in the order of the study file."""
    return [Row(place, tuple(outcomes[name] for name in place.cells)) for place in study.places]


def as_matrix(rows: list[Row]) -> tuple[str, list[str], dict[str, list[Row]]] | None:
    """Arrange rows as a table of families against values.

    Returns:
        The name of the setting, its values, and the rows by family; None if the families do not share the values of
        one setting.
    """
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.place.family, []).append(row)
    if any(len(row.place.point) != 1 for row in rows):
        return None
    heads = {tuple(next(iter(row.place.point.values())) for row in line) for line in families.values()}
    if len(heads) != 1:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row.place.point))
    return " / ".join(names), list(heads.pop()), families


def ranked(study: Study, rows: list[Row]) -> list[Row]:
    """Return the rows of which every seed has a figure, the best first."""
    finished = [row for row in rows if row.is_complete and math.isfinite(row.mean)]
    return sorted(finished, key=lambda row: row.mean, reverse=study.metric in HIGHER_IS_BETTER)


def winner(study: Study, rows: list[Row]) -> str:
    """Name the best row, the next one, and whether seeds explain the difference; "" with fewer than two to compare."""
    order = ranked(study, rows)
    if len(order) < 2:
        return ""
    best, second = order[:2]
    first, other = (" ".join(filter(None, (row.place.family, row.label))) for row in (best, second))
    complete = sum(row.is_complete for row in rows)
    so_far = "" if complete == len(rows) else f" among the {complete} of {len(rows)} rows that are complete"
    text = f"Best{so_far}: {first} with {METRICS[study.metric]} {best.shown()}; next: {other} with {second.shown()}."
    if min(len(best.values), len(second.values)) < 2:
        return f"{text} One seed cannot show whether this is more than chance."
    spread = max(statistics.stdev(best.values), statistics.stdev(second.values))
    within = abs(best.mean - second.mean) <= spread
    return f"{text} The difference is {'within' if within else 'more than'} the standard deviation over the seeds."


def agreements(study: Study, rows: list[Row]) -> list[str]:
    """Describe, in one sentence per family, how our ranking agrees with the published one."""
    sentences = []
    sign = -1 if study.metric in HIGHER_IS_BETTER else 1
    families = dict.fromkeys(row.place.family for row in rows) if any(row.place.point for row in rows) else [""]
    for family in families:
        line = [row for row in rows if row.place.family == family or not family]
        line = [row for row in line if row.is_complete and isinstance(row.place.published, int | float)]
        # Diverged cells rank last.
        ours = [sign * row.mean if math.isfinite(row.mean) else math.inf for row in line]
        theirs = [sign * row.place.published if math.isfinite(row.place.published) else math.inf for row in line]
        if len(line) < MIN_TO_RANK or len(set(ours)) == 1 or len(set(theirs)) == 1:
            continue  # no ranking
        best, their_best = (line[figures.index(min(figures))] for figures in (ours, theirs))
        correlation = float(spearmanr(ours, theirs).statistic)
        name = f"{family}: " if family else ""
        sentences.append(
            f"{name}best at {_point(best)} here, at {_point(their_best)} there; "
            f"rank correlation over {len(line)} values {correlation:+.2f}."
        )
    return sentences


def _point(row: Row) -> str:
    return row.label or row.place.family


def markdown_matrix(study: Study, rows: list[Row]) -> str:
    """Format the table of families against values, ours above the published ones; "" if it has another form."""
    matrix = as_matrix(rows)
    if matrix is None:
        return ""
    name, head, families = matrix
    lines = []
    for family, line in families.items():
        lines.append([family, *(row.shown() for row in line)])
        if any(row.published for row in line):
            lines.append([f"{family}, published", *(row.published or NOT_RUN for row in line)])
    return _markdown_table([f"{METRICS[study.metric]} by {name}", *head], lines)


def markdown_rows(study: Study, rows: list[Row]) -> str:
    """Format every place on its own line, with all figures."""
    return _markdown_table(heads(study, rows), [cells_of(study, row, rows) for row in rows])


def _markdown_table(head: list[str], lines: list[list[str]]) -> str:
    written = [f"| {' | '.join(map(markdown_text, line))} |" for line in (head, *lines)]
    return "\n".join([written[0], "| --- " * len(head) + "|", *written[1:]]) + "\n"


def heads(study: Study, rows: list[Row]) -> list[str]:
    """Return the headings of the long table."""
    point = ["setting"] if any(row.place.point for row in rows) else []
    published = ["published"] if any(row.published for row in rows) else []
    others = [name for name, (keys, _) in COLUMNS.items() if not _is_left_out(keys, study, rows)]
    return ["family", *point, METRICS[study.metric], *published, *others]


def _is_left_out(keys: tuple[str, ...], study: Study, rows: list[Row]) -> bool:
    """Whether the long table omits a column: the study's own metric, or reconstructions if there are no VAEs."""
    if keys[0] == "reconstructions":
        return not any(row.numbers(keys) for row in rows)
    return keys[-1] == study.metric


def cells_of(study: Study, row: Row, rows: list[Row]) -> list[str]:
    """Return a line of the long table."""
    wanted = heads(study, rows)
    cells = {"family": row.place.family, "setting": row.label, METRICS[study.metric]: row.shown()}
    cells["published"] = row.published or NOT_RUN
    return [cells[name] if name in cells else row.column(name) for name in wanted]


def csv_course(study: Study, rows: list[Row]) -> str:
    """Format the scores during training as CSV, one line each; "" if there are none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    lines = []
    for row in rows:
        for seed, outcome in zip(study.seeds, row.outcomes, strict=True):
            summary = outcome.result.summary if outcome is not None and outcome.result is not None else {}
            for point in summary.get("course", []):
                lines.append([row.place.family, row.label, seed, point["images"], point["fid"]])
    if not lines:
        return ""
    writer.writerows([["family", "setting", "seed", "images", "fid"], *lines])
    return buffer.getvalue()


def csv_cells(study: Study, rows: list[Row]) -> str:
    """Format a CSV line per place and seed, with all unrounded figures."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    settings = list(dict.fromkeys(key for row in rows for key in row.place.point))
    others = {name: keys for name, (keys, _) in COLUMNS.items() if not _is_left_out(keys, study, rows)}
    figures = [re.sub(r"\W+", "_", name).lower() for name in others]
    writer.writerow(["family", *settings, "seed", "outcome", study.metric, "step", "reason", *figures, "published"])
    for row in rows:
        point = [row.place.point.get(key, "") for key in settings]
        for seed, outcome in zip(study.seeds, row.outcomes, strict=True):
            alone = Row(row.place, (outcome,))
            measured = [next(iter(alone.numbers(keys)), "") for keys in others.values()]
            if outcome is None:
                result: list[Any] = ["not run", "", "", ""]
            else:
                result = [outcome.kind, outcome.value, "" if outcome.step is None else outcome.step, outcome.reason]
            writer.writerow([row.place.family, *point, seed, *result, *measured, row.published])
    return buffer.getvalue()


def latex(study: Study, rows: list[Row]) -> str:
    """Format the table as LaTeX for a paper, with booktabs."""
    matrix = as_matrix(rows)
    if matrix is not None:
        name, head, families = matrix
        first = [f"{METRICS[study.metric]} by {name}", *head]
        body = []
        for family, line in families.items():
            body.append([family, *(row.shown() for row in line)])
            if any(row.published for row in line):
                body.append([f"{family}, published", *(row.published or NOT_RUN for row in line)])
    else:
        first = heads(study, rows)[: 3 + any(row.published for row in rows)]
        body = [cells_of(study, row, rows)[: len(first)] for row in rows]
    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * (len(first) - 1)}}}",
        "\\toprule",
        " & ".join(map(latex_text, first)) + r" \\",
        "\\midrule",
        *(" & ".join(map(latex_text, line)) + r" \\" for line in body),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def latex_text(text: str) -> str:
    """Escape text for LaTeX."""
    return "".join(IN_LATEX.get(character, character) for character in " ".join(text.split()))
