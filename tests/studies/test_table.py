"""The table of a study, of figures that are worked out by hand."""

import csv
import io
import math
import re
import warnings
from dataclasses import replace

import pytest
from made_up_studies import RATES, broken, diverged, outcomes, study, trained

from hfgen.studies.cells import Place
from hfgen.studies.outcomes import Outcome
from hfgen.studies.page import best_rows
from hfgen.studies.study_file import METRICS
from hfgen.studies.table import (
    COLUMNS,
    Row,
    agreements,
    as_matrix,
    csv_cells,
    heads,
    latex,
    latex_text,
    markdown_matrix,
    markdown_rows,
    markdown_text,
    rows_of,
    winner,
)


THREE_SEEDS = (0, 1, 2)
NASTY = "a|b <script>x</script>\n\n# `c` \\ *d* _e_ & 5% $x_1$ {~^} ± [f]"


def test_the_best_figure_is_the_lowest_or_highest_and_never_a_diverged_one():
    for metric, best in (("fid", [1, 3]), ("images_per_second", [0, 4])):
        made = study({"A": RATES, "B": RATES}, seeds=(0, 1), metric=metric)
        rows = table(made, [9, 9], [2, 2], ["nan", 1 if metric == "fid" else 99], [3, 3], [8, 8], [None, None])
        assert [index for index, one in enumerate(rows) if id(one) in best_rows(made, rows)] == best


def test_a_row_that_lacks_a_seed_is_not_marked_as_the_best():
    made = study({"A": RATES}, seeds=THREE_SEEDS)
    rows = table(made, [20, 21, 22], [19, None, None], [24, 25, 26])
    assert best_rows(made, rows) == {id(rows[0])} and "Best among the 2 of 3 rows" in winner(made, rows)


def row(*of_seeds, published=None, point=None):
    return Row(Place("GAN", point or {}, tuple(f"seed={seed}" for seed in range(len(of_seeds))), published), of_seeds)


def table(made, *by_place):
    return rows_of(made, outcomes(made, *by_place, metric=made.metric))


def read_markdown(text):
    """What a renderer of Markdown makes of a table: the texts of its cells, row by row."""
    markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py: pip install markdown-it-py")
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    assert [token.type for token in tokens if token.level == 0] == ["table_open", "table_close"]
    read = []
    for token in tokens:
        if token.type == "tr_open":
            read.append([])
        elif token.type == "inline":
            assert {child.type for child in token.children} <= {"text", "text_special"}
            read[-1].append("".join(child.content for child in token.children))
    return read


def read_latex(text):
    """The cells of the rows of a table, as they are written."""
    body = text.split("\\toprule\n")[1].split("\\bottomrule")[0].replace("\\midrule\n", "")
    assert body.endswith(" \\\\\n") and "\n[" not in body and "\n*" not in body
    return [re.split(r"(?<!\\)&", line) for line in body.removesuffix(" \\\\\n").split(" \\\\\n")]


# ------------------------------------------------------------------------------------------------------------- figures


def test_the_figure_is_the_mean_with_the_sample_standard_deviation():
    # 10, 20, 60: mean 30, squared distances 400 + 100 + 900, and the root of half of that is 26.458.
    assert row(trained(10.0), trained(20.0), trained(60.0)).shown() == "30 ± 26"
    assert row(trained(1.0), trained(2.0)).shown() == "1.5 ± 0.71"  # not 0.5


def test_a_single_seed_has_no_spread():
    assert row(trained(38.589)).shown() == "38.59"
    assert row(trained(38.589), None).shown() == "38.59 (1 of 2 seeds missing)"


def test_large_figures_are_written_without_powers_of_ten():
    assert row(trained(12345.0)).shown() == "12340"  # four digits, halves to even
    assert row(trained(100.0), trained(500.0)).shown() == "300 ± 280"  # 282.8 to two digits
    assert row(trained(copies=2500)).column("copies by pixels") == "2500"


def test_what_diverged_is_nan_and_says_of_how_many_seeds():
    assert row(diverged(), diverged()).shown() == "NaN"
    assert row(trained(10.0), diverged(), trained(20.0)).shown() == "NaN (1 of 3; otherwise 15 ± 7.1)"
    assert row(trained(10.0), diverged(), None).shown() == "NaN (1 of 3; otherwise 10) (1 of 3 seeds missing)"
    partly = row(trained(10.0), diverged())
    assert math.isnan(partly.mean) and partly.is_complete and partly.num_diverged == 1


def test_a_figure_that_is_no_number_counts_as_nan():
    infinite = Outcome("trained", math.inf, result=trained().result)
    assert row(infinite).shown() == "NaN" and row(trained(3.0), infinite).shown() == "NaN (1 of 2; otherwise 3)"


def test_what_broke_or_was_not_run_has_no_figure_and_is_not_complete():
    assert row(broken()).shown() == row(None).shown() == "–"
    assert math.isnan(row(broken()).mean) and not row(broken()).is_complete
    assert row(trained(4.0), broken()).shown() == "4 (1 of 2 seeds missing)"
    assert row(trained(4.0), broken()).mean == 4.0 and not row(trained(4.0), broken()).is_complete


def test_other_columns_are_means_over_the_seeds_that_have_them():
    made = row(trained(kid=0.25), trained(kid=0.75), diverged())
    assert made.column("KID") == "0.5 ± 0.35"
    assert row(trained(kid=None)).column("KID") == row(diverged()).column("KID") == "–"


def test_published_figures_stand_as_they_were_published():
    shown = [row(None, published=value).published for value in (38.5, math.nan, "mode collapse", None, 0)]
    assert shown == ["38.5", "NaN", "mode collapse", "", "0"]


# --------------------------------------------------------------------------------------------------------------- forms


def test_families_that_share_a_grid_form_a_matrix_with_published_figures_below():
    made = study({"GAN": RATES, "VAE": RATES}, published={"VAE": [109.137, math.nan, None]})
    rows = table(made, 10, 20, "nan", 30.5, None, 50)
    assert read_markdown(markdown_matrix(made, rows)) == [
        ["FID by learning_rate", "1e-4", "2e-4", "10"],
        ["GAN", "10", "20", "NaN"],
        ["VAE", "30.5", "–", "50"],
        ["VAE, published", "109.137", "NaN", "–"],
    ]


def test_families_with_equal_values_of_different_settings_share_a_matrix_and_a_cell():
    widths = [[{name: value} for value in ("32", "64")] for name in ("ndf", "ngf")]
    same = (("ndf", widths[0][1]), ("ngf", 1))
    made = study({"ndf": widths[0], "ngf": widths[1]}, shared=[same])
    assert len(made.cells) == 3
    rows = table(made, 10, 20, 30, 20)
    assert read_markdown(markdown_matrix(made, rows)) == [
        ["FID by ndf / ngf", "32", "64"], ["ndf", "10", "20"], ["ngf", "30", "20"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "families",
    [
        {"GAN": [{"batch_size": "64", "learning_rate": "1"}, {"batch_size": "64", "learning_rate": "2"}]},
        {"GAN": RATES, "VAE": RATES[:2]},
        {"GAN": RATES, "VAE": RATES[::-1]},
        {"GAN": RATES, "VAE": [{}]},
        {"GAN": [{}], "VAE": [{}]},
    ],
    ids=["two settings", "other values", "another order", "a family without a grid", "no grid"],
)
def test_what_makes_no_matrix_is_written_in_rows(families):
    made = study(families)
    rows = table(made, *[10] * len(made.places))
    assert as_matrix(rows) is None and markdown_matrix(made, rows) == ""
    lines = read_markdown(markdown_rows(made, rows))
    assert [line[0] for line in lines] == ["family", *(place.family for place in made.places)]
    settings = [", ".join(f"{key} {value}" for key, value in place.point.items()) for place in made.places]
    if any(settings):
        assert [line[1] for line in lines] == ["setting", *settings]
    else:
        assert "setting" not in lines[0]


@pytest.mark.parametrize("metric", METRICS)
def test_each_metric_stands_first_and_once(metric):
    made = study({"GAN": [{}]}, metric=metric, published={"GAN": [7]})
    rows = table(made, 12.5)
    lines = read_markdown(markdown_rows(made, rows))
    assert lines[0][:3] == ["family", METRICS[metric], "published"] and len(set(lines[0])) == len(lines[0])
    assert lines[1][:3] == ["GAN", "12.5", "7"] and lines[1][1:].count("12.5") == 1
    assert len(lines[0]) == 3 + len(COLUMNS) - 2  # the metric stands first; only VAEs have reconstructions


def test_where_a_vae_was_scored_there_is_a_column_for_its_reconstructions():
    made = study({"GAN": [{}], "VAE": [{}]})
    rows = table(made, 12.5, trained(50.0, reconstructed=33.25))
    head, *lines = read_markdown(markdown_rows(made, rows))
    lines = [dict(zip(head, line, strict=True)) for line in lines]
    assert [line["FID of reconstructions"] for line in lines] == ["–", "33.25"]
    assert [line["FID"] for line in lines] == ["12.5", "50"]
    cells = list(csv.DictReader(io.StringIO(csv_cells(made, rows))))
    assert [(cell["fid"], cell["fid_of_reconstructions"]) for cell in cells] == [("12.5", ""), ("50.0", "33.25")]


# -------------------------------------------------------------------------------------------------------------- winner


def test_the_winner_is_named_with_its_spread_and_what_the_seeds_explain():
    made = study({"GAN": [{"latent_dim": "1"}], "VAE": [{}]}, seeds=(0, 1, 2))
    told = winner(made, table(made, [60, 61, 62], [50, 51, 52]))
    assert told == (
        "Best: VAE with FID 51 ± 1; next: GAN latent_dim 1 with 61 ± 1. "
        "The difference is more than the standard deviation over the seeds."
    )
    near = winner(made, table(made, [60, 61, 62], [50, 60, 70]))
    assert near.endswith(" The difference is within the standard deviation over the seeds.")
    one = study({"GAN": RATES})
    assert winner(one, table(one, 30, 20, "nan")) == (
        "Best: GAN learning_rate 2e-4 with FID 20; next: GAN learning_rate 1e-4 with 30. "
        "One seed cannot show whether this is more than chance."
    )
    fast = study({"GAN": RATES[:2]}, metric="images_per_second")
    assert winner(fast, table(fast, 30, 20)).startswith("Best: GAN learning_rate 1e-4 with images/s in training 30; ")
    assert winner(one, table(one, 30, "nan", "nan")) == ""
    assert winner(one, table(one, 30, 20, None)).startswith("Best among the 2 of 3 rows that are complete: GAN ")


# ---------------------------------------------------------------------------------------------------------- agreements


def test_the_rank_correlation_is_that_of_the_ranks():
    # Ranks here 1 2 3 4, there 1 2 4 3: 1 - 6 * (0 + 0 + 1 + 1) / (4 * 15) = 0.8.
    points = [{"latent_dim": str(value)} for value in (1, 2, 3, 4)]
    made = study({"GAN": points}, published={"GAN": [1.0, 1.1, 9.0, 8.0]})
    (told,) = agreements(made, table(made, 10, 20, 30, 4000))
    assert told == "GAN: best at latent_dim 1 here, at latent_dim 1 there; rank correlation over 4 values +0.80."


def test_each_family_is_compared_by_itself_in_the_order_of_the_file():
    made = study({"VAE": RATES, "GAN": RATES}, published={"VAE": [1, 2, 3], "GAN": [3, 2, 1]})
    told = agreements(made, table(made, 1, 2, 3, 1, 2, 3))
    assert [one.split(":")[0] for one in told] == ["VAE", "GAN"]
    assert [one.split()[-1] for one in told] == ["+1.00.", "-1.00."]


def test_nan_ranks_last_here_and_there():
    made = study({"GAN": RATES}, published={"GAN": [300, 200, math.nan]})
    (told,) = agreements(made, table(made, 3, 2, "nan"))
    assert "best at learning_rate 2e-4 here, at learning_rate 2e-4 there" in told and told.endswith("+1.00.")
    other = study({"GAN": RATES}, published={"GAN": [math.nan, 200, 300]})
    # Ranks here 2 1 3, there 3 1 2: 1 - 6 * 2 / 24.
    assert agreements(other, table(other, 3, 2, "nan"))[0].endswith("+0.50.")


def test_of_images_per_second_the_highest_are_best():
    made = study({"GAN": RATES}, metric="images_per_second", published={"GAN": [50, 70, 60]})
    (told,) = agreements(made, table(made, 10, 30, "nan"))
    assert "best at learning_rate 2e-4 here, at learning_rate 2e-4 there" in told
    # Best first, ranks here 2 1 3, there 3 1 2.
    assert told.endswith("+0.50.")


def test_without_a_grid_the_families_are_compared_with_each_other():
    made = study({"A": [{}], "B": [{}], "C": [{}]}, published={"A": [3], "B": [2], "C": [1]})
    (told,) = agreements(made, table(made, 1, 2, 3))
    assert told == "best at A here, at C there; rank correlation over 3 values -1.00."


def test_a_first_family_without_a_grid_does_not_mix_the_others():
    made = study({"A": [{}], "B": RATES}, published={"A": [1], "B": [1, 2, 3]})
    assert [one.split(":")[0] for one in agreements(made, table(made, 9, 1, 2, 3))] == ["B"]


def test_without_an_order_nothing_is_said_of_it():
    two = study({"GAN": RATES[:2]}, published={"GAN": [1, 2]})
    constant = study({"GAN": RATES}, published={"GAN": [5, 5, 5]})
    remarks = study({"GAN": RATES}, published={"GAN": ["bad", 2, 3]})
    full = study({"GAN": RATES}, published={"GAN": [1, 2, 3]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agreements(two, table(two, 1, 2)) == agreements(remarks, table(remarks, 1, 2, 3)) == []
        assert agreements(constant, table(constant, 1, 2, 3)) == []
        assert agreements(full, table(full, 4, 4, 4)) == agreements(full, table(full, *["nan"] * 3)) == []
        assert agreements(full, table(full, 1, 2, None)) == []  # two figures


# ----------------------------------------------------------------------------------------------- CSV, Markdown, LaTeX


def read_csv(made, rows):
    text = csv_cells(made, rows)
    names = next(csv.reader(io.StringIO(text)))
    assert len(set(names)) == len(names)
    return list(csv.DictReader(io.StringIO(text)))


def test_the_csv_holds_a_line_for_each_seed_with_figures_as_they_were_measured():
    made = study({"GAN": RATES[:2]}, seeds=THREE_SEEDS, published={"GAN": [1.5, "a, b"]})
    fid, kid = 100.12345678901234, 0.1 + 0.2
    found = diverged("it said \"no\",\nand 'why'", step=7)
    lines = read_csv(made, table(made, [trained(fid, kid=kid), found, None], [broken(), 2, 3]))
    assert [(line["learning_rate"], line["seed"], line["outcome"], line["published"]) for line in lines] == [
        ("1e-4", "0", "trained", "1.5"), ("1e-4", "1", "diverged", "1.5"), ("1e-4", "2", "not run", "1.5"),
        ("2e-4", "0", "broken", "a, b"), ("2e-4", "1", "trained", "a, b"), ("2e-4", "2", "trained", "a, b"),
    ]  # fmt: skip
    assert (float(lines[0]["fid"]), float(lines[0]["kid"])) == (fid, kid)
    assert math.isnan(float(lines[1]["fid"])) and lines[1]["reason"] == found.reason and lines[1]["step"] == "7"
    assert (lines[2]["fid"], lines[2]["kid"], lines[3]["step"], lines[3]["minutes"]) == ("", "", "", "")


@pytest.mark.parametrize("metric", METRICS)
def test_the_csv_has_every_figure_once_whatever_is_compared(metric):
    made = study({"GAN": [{}], "VAE": RATES[:1]}, metric=metric)
    first, second = read_csv(made, table(made, 1.25, 2.5))
    assert (first[metric], second[metric], first["learning_rate"]) == ("1.25", "2.5", "")
    figures = [name for name in COLUMNS if name != "FID of reconstructions"]  # of VAEs that were scored
    assert len(first) == len(["family", "learning_rate", "seed", "outcome", "step", "reason", "published", *figures])


def test_nasty_names_break_no_table():
    points = [{NASTY: value} for value in ("1|2", "3\n4")]
    made = study({NASTY: points, "B": points}, published={NASTY: [NASTY, 2]})
    rows = table(made, 1, 2, 3, "nan")
    plain = " ".join(NASTY.split())
    matrix = read_markdown(markdown_matrix(made, rows))
    assert matrix[0] == [f"FID by {plain}", "1|2", "3 4"] and matrix[1:3] == [
        [plain, "1", "2"],
        [f"{plain}, published", plain, "2"],
    ]
    lines = read_markdown(markdown_rows(made, rows))
    assert [len(line) for line in lines] == [len(heads(made, rows))] * 5 and lines[1][1] == f"{plain} 1|2"
    assert [len(line) for line in read_latex(latex(made, rows))] == [3] * 4
    long = replace(made, places=made.places[:3])  # no matrix
    assert [len(line) for line in read_latex(latex(long, rows[:3]))] == [4] * 4


def test_markdown_leaves_plain_names_as_they_are():
    assert markdown_text("learning_rate 1e-4, n_critic (5): 3 ± 1") == "learning_rate 1e-4, n_critic (5): 3 ± 1"
    assert markdown_text("__init__") == r"\_\_init\_\_" and markdown_text(r"a\*b") == r"a\\\*b"


def test_latex_takes_no_character_of_a_name_for_a_command():
    assert latex_text("a_b & 5% #1 $x {y}") == r"a\_b \& 5\% \#1 \$x \{y\}"
    assert latex_text("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    assert latex_text("1 ± 2 – <|>") == r"1 $\pm$ 2 -- \textless{}\textbar{}\textgreater{}"
    assert latex_text("[1]*\n2") == "{[}1{]}{*} 2"


def test_the_latex_table_shows_what_the_others_show():
    made = study({"GAN": RATES[:2]}, seeds=(0, 1), published={"GAN": [38.5, math.nan]})
    text = latex(made, table(made, [10, 20], ["nan", None]))
    assert "\\begin{tabular}{lrr}" in text
    assert [[cell.strip() for cell in line] for line in read_latex(text)] == [
        ["FID by learning\\_rate", "1e-4", "2e-4"],
        ["GAN", "15 $\\pm$ 7.1", "NaN (1 of 2 seeds missing)"],
        ["GAN, published", "38.5", "NaN"],
    ]


def test_the_long_latex_table_shows_the_figure_and_what_was_published():
    made = study({"A": [{}], "B": [{}]}, published={"A": ["collapse"]})
    lines = [[cell.strip() for cell in line] for line in read_latex(latex(made, table(made, 10, 20)))]
    assert [line[:3] for line in lines] == [["family", "FID", "published"], ["A", "10", "collapse"], ["B", "20", "--"]]
