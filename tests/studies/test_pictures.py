"""The pictures of a study, of made-up curves and of squares of one colour."""

import math

import numpy as np
import pytest
from made_up_studies import RATES, images, losses, outcomes, study, trained
from PIL import Image

from hfgen.inference.figures import LABEL_LINE, LABEL_WIDTH, image_sheet
from hfgen.studies.pictures import (
    cut,
    loss_range,
    plot_loss_curves,
    sample_rows,
    strip_rows,
)
from hfgen.studies.table import rows_of


def rows_with(made, *by_place):
    return rows_of(made, outcomes(made, *by_place))


def panels(figure):
    return {ax.get_title(): ax for ax in figure.axes if ax.get_title()}


def drawn(figure, tmp_path):
    figure.savefig(tmp_path / "curves.png", dpi=40)
    return Image.open(tmp_path / "curves.png")


# -------------------------------------------------------------------------------------------------------------- curves


def test_there_is_a_panel_for_each_family_and_loss_and_a_line_for_each_cell(tmp_path):
    made = study({"GAN": RATES[:2], "VAE": RATES[:2]}, seeds=(0, 1))
    two = [{"step": 1.0, "loss_d": 1.0, "loss_g": 2.0, "d_real": 3.0}, {"step": 2.0, "loss_d": 1.5, "loss_g": 2.5}]
    gan, vae = trained(curve=two), trained(curve=losses(3.0, 2.0, 1.0))
    figure = plot_loss_curves(rows_with(made, [gan, gan], [None, gan], [vae, "nan"], ["nan", "nan"]))
    found = panels(figure)
    assert list(found) == ["GAN: loss_d", "GAN: loss_g", "VAE: loss"]
    assert [len(ax.lines) for ax in found.values()] == [3, 3, 1]
    assert found["GAN: loss_g"].lines[0].get_xydata().tolist() == [[1.0, 2.0], [2.0, 2.5]]
    drawn(figure, tmp_path)


def test_the_legend_names_each_grid_point_once_even_without_its_first_seed():
    made = study({"GAN": RATES[:2]}, seeds=(0, 1))
    one = trained(curve=losses(3.0, 2.0))
    (ax,) = panels(plot_loss_curves(rows_with(made, [one, one], ["nan", one]))).values()
    assert [text.get_text().strip() for text in ax.get_legend().get_texts()] == [
        "learning_rate 1e-4",
        "learning_rate 2e-4",
    ]
    first, second, third = (line.get_color() for line in ax.lines)
    assert first == second != third


def test_each_family_has_the_ten_colours_to_itself():
    grids = [[{name: str(value)} for value in range(9)] for name in ("ndf", "ngf")]
    made = study(dict(zip(("A", "B"), grids, strict=True)))
    figure = plot_loss_curves(rows_with(made, *[trained(curve=losses(2.0, 1.0))] * 18))
    assert [len({line.get_color() for line in ax.lines}) for ax in panels(figure).values()] == [9, 9]


def test_where_nothing_was_trained_there_are_no_pictures():
    made = study({"GAN": RATES})
    rows = rows_with(made, "nan", None, "nan")
    assert plot_loss_curves(rows) is sample_rows(rows) is strip_rows(made, rows) is None


def test_a_curve_that_explodes_leaves_the_axis_and_the_title_says_so(tmp_path):
    made = study({"GAN": RATES})
    calm = [losses(*(2 + math.sin(step) for step in range(50)), name="loss_d") for _ in range(2)]
    wild = losses(*(-1.5 for _ in range(10)), -1e6, 1e6, name="loss_d")
    figure = plot_loss_curves(rows_with(made, *(trained(curve=curve) for curve in (*calm, wild))))
    ((title, ax),) = panels(figure).items()
    assert title == "GAN: loss_d\n1 of 3 curves leaves the plot" and ax.get_yscale() == "linear"
    low, high = ax.get_ylim()
    assert -200 < low < -1.5 and 3 < high < 200
    drawn(figure, tmp_path)


def test_positive_losses_that_span_decades_have_a_logarithmic_axis():
    assert loss_range([[1.0, 2.0], [4.0, 100.0]])[0] == "log"
    assert loss_range([[1.0, 2.0], [4.0, 19.0]])[0] == loss_range([[0.0, 2.0], [4.0, 100.0]])[0] == "linear"
    _, low, high = loss_range([[1.0, 10.0, 100.0, 1000.0]])
    assert (math.log10(low), math.log10(high)) == pytest.approx((-0.15, 3.15))  # a twentieth of three decades


def test_a_linear_axis_ends_a_twentieth_beyond_the_losses():
    assert loss_range([[1.0, 2.0], [3.0]])[1:] == pytest.approx((0.9, 3.1))
    assert loss_range([[2.0, 2.0]])[1:] == (1.5, 2.5)


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    assert loss_range([[math.nan, math.inf], []]) == ("linear", 0.0, 0.0)
    assert loss_range([[1.0, math.inf, 3.0]])[1:] == pytest.approx((0.9, 3.1))
    made = study({"GAN": RATES[:2]})
    nothing, ending = losses(math.nan, math.nan), losses(1.0, 3.0, math.inf, math.nan)
    for curves, told in (((nothing, nothing), "2 of 2 curves leave the plot"), ((ending, losses(2.0)), "1 of 2")):
        figure = plot_loss_curves(rows_with(made, *(trained(curve=curve) for curve in curves)))
        assert told in next(iter(panels(figure)))
        drawn(figure, tmp_path)


def test_names_are_drawn_as_they_are_and_long_ones_are_cut(tmp_path):
    nasty = "_cost $5 and $x_{ " + "very long " * 20
    made = study({nasty: [{nasty: "1"}, {nasty: "2"}]})
    figure = plot_loss_curves(rows_with(made, *[trained(curve=losses(2.0, 1.0))] * 2))
    ((title, ax),) = panels(figure).items()
    assert title.startswith(r"_cost \$5 and \$x_{ very") and len(title) < 60
    assert [len(text.get_text()) < 40 for text in ax.get_legend().get_texts()] == [True, True]
    drawn(figure, tmp_path)


# -------------------------------------------------------------------------------------------------------------- sheets


def test_a_sheet_is_cut_into_the_images_it_was_made_of():
    made = images(12, 5)
    parts = cut(image_sheet(made, 4), 4)
    assert [np.array(part).tolist() for part in parts] == [np.array(image).tolist() for image in made]


def test_a_sheet_that_was_reduced_as_a_whole_is_cut_in_the_right_places():
    sheet = image_sheet(images(24, 128), 8)
    parts = cut(sheet.resize((800, round(sheet.height * 800 / sheet.width))), 8)
    assert len(parts) == 24
    for part, image in zip(parts, images(24, 1), strict=True):
        assert np.abs(np.array(part)[4:-4, 4:-4].astype(int) - np.array(image)).max() <= 2


def colour(picture, x, y):
    return np.array(picture.getpixel((x, y))).round(-2).tolist()  # JPEG


@pytest.mark.parametrize("size, shown", [(16, 64), (32, 64), (48, 48), (64, 64), (128, 128), (256, 128)])
def test_small_images_are_enlarged_and_large_ones_reduced(size, shown):
    sheet = sample_rows(rows_with(study({"GAN": [{}]}), trained(size=size)))
    assert sheet.size == (LABEL_WIDTH + 12 * (shown + 2) - 2, shown + 6)
    middles = [colour(sheet, LABEL_WIDTH + shown // 2 + index * (shown + 2), shown // 2) for index in range(3)]
    assert middles == [[300, 0, 0], [0, 300, 0], [0, 0, 300]]


def test_families_of_several_sizes_stand_below_each_other():
    made = study({"A": [{}], "B": [{}], "C": [{}]})
    sheet = sample_rows(rows_with(made, trained(size=64), "nan", trained(size=256)))
    assert sheet.size == (LABEL_WIDTH + 12 * 130 - 2, 64 + 6 + 128 + 6)
    assert colour(sheet, LABEL_WIDTH + 10, 10) == colour(sheet, LABEL_WIDTH + 10, 80) == [300, 0, 0]
    assert np.array(sheet)[:70, LABEL_WIDTH + 12 * 66 :].min() == 255  # white, beside the smaller ones


def test_the_first_seed_that_has_images_is_shown():
    made = study({"GAN": [{}]}, seeds=(0, 1))
    assert sample_rows(rows_with(made, ["nan", trained(size=64)])).height == 64 + 6


def test_strips_are_enlarged_and_reduced_alike():
    made = study({"A": [{}], "B": [{}], "GAN": [{}]}, methods={"A": "ddpm", "B": "ddpm"})
    small, large = trained(size=16, strip=True), trained(size=256, strip=True)
    sheet = strip_rows(made, rows_with(made, small, large, trained()))
    assert sheet.size == (LABEL_WIDTH + 8 * 130 - 2, LABEL_LINE + 3 * 130 - 2 + 6 + LABEL_LINE + 128 + 6)


def test_the_timesteps_stand_above_the_columns_of_a_strip():
    made = study({"A": [{}], "B": [{"num_train_timesteps": 50}]}, methods={"A": "ddpm", "B": "ddpm"})
    pixels = np.array(strip_rows(made, rows_with(made, *2 * [trained(size=128, strip=True)])))
    of_each = np.split(pixels[:, LABEL_WIDTH:], 2)
    heads = [strip[:LABEL_LINE] for strip in of_each]
    images = [strip[LABEL_LINE:] for strip in of_each]
    assert np.array_equal(*images) and not np.array_equal(*heads)
    written = [[head[:, left : left + 128].min() < 128 for left in range(0, 8 * 130, 130)] for head in heads]
    assert written == 2 * [8 * [True]]
    # 499 and 49 at the left, 0 at the right of both
    assert np.array_equal(*(head[:, -128:] for head in heads)) and not np.array_equal(
        *(head[:, :128] for head in heads)
    )
