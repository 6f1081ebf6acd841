"""The page of a report in a browser, opened from the disk as its readers do."""

import re

import pytest
from demo_pages import Complaints, browser, patient
from made_up_studies import RATES, broken, diverged, losses, outcomes, study, trained

from hfgen.studies.report import write_report


NASTY = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 1'>"


def long_study():
    """Three families, one of which has remarks for figures; everything that can become of a cell."""
    published = {"Diffusion": [147.226, 'the "best" of all', float("nan")]}
    made = study({"GAN": RATES, NASTY: RATES, "Diffusion": RATES}, seeds=(0, 1), published=published, title=NASTY,
                 methods={"Diffusion": "ddpm"})  # fmt: skip
    gan = [{"step": 1.0, "loss_d": 1.0, "loss_g": 1e6}, {"step": 9.0, "loss_d": float("nan"), "loss_g": 1.0}]
    found = outcomes(
        made,
        [trained(40.0, kid=0.25, curve=gan), trained(50.0, kid=0.5, curve=gan, size=64)],
        [diverged(NASTY), trained(5.0, kid=0.125)],
        [9.5, 9.5],
        [broken(NASTY + " and so on" * 50), None],
        ["nan", "nan"],
        [120, 80],
        [trained(147.0, curve=losses(1.0, 0.5, 0.25), strip=True), 153],
        [None, None],
        [None, 300],
    )
    return made, found


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    made, found = long_study()
    folder = tmp_path_factory.mktemp("study") / "report"
    write_report(made, found, folder)
    address = (folder / "index.html").as_uri()
    with browser() as chromium:
        page = patient(chromium.new_page())
        yield chromium, address, page, Complaints(page, address)


@pytest.fixture
def page(opened):
    """The page, newly loaded; in the end nothing about it may be wrong, and no name may have run as a script."""
    _, address, page, complaints = opened
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")
    page.goto(address)
    yield page
    assert complaints.found == [] and page.evaluate("window.taken") is None


def chosen(page):
    return page.locator("#chosen")


def figure(page, text):
    return page.locator("#table").get_by_role("button", name=text, exact=True)


def column(page, name):
    """The texts of a column of the long table, as it is sorted."""
    heads = page.locator("#all th").all_inner_texts()
    number = heads.index(name) + 1
    return page.locator(f"#all tbody td:nth-child({number})").all_inner_texts()


def sort(page, name):
    page.locator("#all").get_by_role("button", name=name, exact=True).click()


def widths(page):
    return page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")


def contrast(page, selector):
    """The ratio of the luminances of an element's text and of the page, after WCAG 2."""
    script = """selector => {
        const parse = text => text.match(/[\\d.]+/g).map(Number);
        const light = rgb => rgb.slice(0, 3).map(part => part / 255)
            .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
            .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
        const canvas = document.createElement("div");
        canvas.style.color = "Canvas";
        document.body.append(canvas);
        const pair = [getComputedStyle(document.querySelector(selector)).color, getComputedStyle(canvas).color];
        canvas.remove();
        const [text, ground] = pair.map(parse).map(light);
        return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    }"""
    return page.evaluate(script, selector)


def test_the_best_figure_is_shown_from_the_start(page):
    assert page.locator("#table button[aria-pressed=true]").all_inner_texts() == ["9.5 ± 0"]
    assert page.locator("#table .best").all_inner_texts() == ["9.5 ± 0", "100 ± 28", "150 ± 4.2"]
    assert "the best of its family" in page.locator("body").inner_text()


def test_choosing_a_figure_shows_its_samples_curves_and_settings(page):
    figure(page, "45 ± 7.1").click()
    assert page.locator("#table button[aria-pressed=true]").all_inner_texts() == ["45 ± 7.1"]
    assert chosen(page).get_by_role("heading").inner_text() == "GAN learning_rate 1e-4"
    told = "FID 40, KID 0.25, precision 0.25, recall 0.75; 6,000 steps in 2 minutes"
    assert chosen(page).locator("li").first.inner_text() == f"seed 0: {told}"
    assert chosen(page).locator("img").evaluate_all("all => all.map(one => one.naturalWidth)") == [142, 526]
    assert chosen(page).locator("svg text:first-child").all_text_contents() == ["loss_d by steps", "loss_g by steps"]
    lines = chosen(page).locator("svg polyline")
    assert lines.count() == 4 and lines.nth(0).get_attribute("stroke") != lines.nth(1).get_attribute("stroke")
    assert [len(lines.nth(index).get_attribute("points").split()) for index in (0, 2)] == [1, 2]  # NaN is left out
    texts = [chosen(page).locator("svg").nth(index).locator("text").all_text_contents() for index in (0, 1)]
    assert texts == [["loss_d by steps", "1", "1"], ["loss_g by steps", "logarithmic", "1", "1.0e+6", "1", "9"]]
    chosen(page).get_by_text("settings").click()
    assert '"learning_rate": "1e-4"' in chosen(page).locator("pre").last.inner_text()
    command = (
        "hfgen train gan --dataset someone/cats --learning_rate=1e-4 --output_dir runs/GAN-learning_rate=1e-4-seed=0"
    )
    assert chosen(page).locator("pre.command").inner_text() == command


def test_a_point_of_a_curve_stands_where_its_axes_say(page):
    figure(page, "150 ± 4.2").click()
    # 380 x 200, of which 52 on the left, 8 on the right, 22 above and 24 below are not the curve's.
    points = [
        tuple(map(float, one.split(","))) for one in chosen(page).locator("polyline").get_attribute("points").split()
    ]
    assert points == [pytest.approx((52, 22)), pytest.approx((212, 22 + 154 * 2 / 3)), pytest.approx((372, 176))]
    assert chosen(page).locator("svg text").all_text_contents() == ["loss by steps", "0.25", "1", "100", "300"]
    assert chosen(page).locator("figcaption").all_inner_texts() == [
        "seed 0, samples",
        "seed 0, denoising, after the steps nearest to t = 499, 428, 356, 285, 214, 143, 71, 0",
        "seed 1, samples",
    ]


def test_a_cell_without_a_figure_says_why(page):
    page.locator("#table tbody tr").nth(1).get_by_role("button").first.click()
    first, second = chosen(page).locator("li").all_inner_texts()
    assert first.startswith(f"seed 0: broken: {NASTY}") and first.endswith(" …") and second == "seed 1: not run yet"
    assert chosen(page).locator("img").count() == chosen(page).locator("svg").count() == 0


def test_published_figures_stand_below_ours(page):
    rows = page.locator("#table tbody tr").all_inner_texts()
    assert [re.split(r"\s*\t\s*", row)[1:] for row in rows[-2:]] == [
        ["150 ± 4.2", "–", "300 (1 of 2 seeds missing)"],
        ["147.226", 'the "best" of all', "NaN"],
    ]


def test_sorting_puts_what_has_no_figure_last_both_ways(page):
    without = ["NaN (1 of 2; otherwise 5)", "–", "NaN", "–"]
    sort(page, "FID")
    up = column(page, "FID")
    assert up == ["9.5 ± 0", "45 ± 7.1", "100 ± 28", "150 ± 4.2", "300 (1 of 2 seeds missing)", *without]
    assert page.locator("#all th[aria-sort]").get_attribute("aria-sort") == "ascending"
    sort(page, "FID")
    assert column(page, "FID") == [*up[4::-1], *without]
    assert page.locator("#all th[aria-sort]").get_attribute("aria-sort") == "descending"


def test_settings_and_families_are_sorted_as_the_study_file_has_them(page):
    sort(page, "KID")
    sort(page, "setting")
    assert [text.split()[-1] for text in column(page, "setting")] == [*["1e-4"] * 3, *["2e-4"] * 3, *["10"] * 3]
    sort(page, "family")
    assert [text[:3] for text in column(page, "family")] == [*["GAN"] * 3, *["</s"] * 3, *["Dif"] * 3]
    assert page.locator("#all th[aria-sort]").all_inner_texts() == ["family"]


def test_everything_is_reached_with_the_keyboard(page):
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("[document.activeElement.tagName, document.activeElement.innerText].join()"))
        if reached[-1] == "BUTTON,45 ± 7.1":
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "dashed"
            page.keyboard.press("Enter")
        if reached[-1] == "BUTTON,KID":
            page.keyboard.press("Space")
            break
    assert "SUMMARY,settings, and the command that trains it again" in reached and column(page, "KID")[0].startswith(
        "0.12"
    )
    assert chosen(page).get_by_role("heading").inner_text() == "GAN learning_rate 1e-4"


def test_a_narrow_screen_needs_no_scrolling_sideways(page):
    page.set_viewport_size({"width": 375, "height": 700})
    page.locator("#table tbody tr").nth(1).get_by_role("button").first.click()
    assert widths(page) == [375, 375]
    figure(page, "45 ± 7.1").click()
    chosen(page).get_by_text("settings").click()
    assert widths(page) == [375, 375]
    assert page.evaluate("[...document.querySelectorAll('svg')].every(one => one.getBoundingClientRect().right < 360)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_by_day_and_by_night(page, scheme):
    page.emulate_media(color_scheme=scheme)
    assert (page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")) == (scheme == "dark")
    text = "rgb(255, 255, 255)" if scheme == "dark" else "rgb(0, 0, 0)"
    assert page.evaluate("getComputedStyle(document.body).color") == text
    for selector in ("h1", "p", "#table button", "#all td", "#chosen li", "figcaption"):
        assert contrast(page, selector) > 10


def test_each_sheet_stands_in_the_page_once_as_sheets_make_most_of_its_size(page):
    seeds = page.evaluate("places.flatMap(place => place.seeds)")
    in_gallery = [seed for seed in seeds if seed["in_gallery"] is not None]
    assert [seed["in_gallery"] for seed in in_gallery] == list(range(page.locator(".gallery img").count()))
    assert len(in_gallery) > 2 and all(seed["sheet"] == "" for seed in in_gallery)
    assert any(seed["sheet"] for seed in seeds)  # of further seeds


def test_without_scripts_the_tables_samples_and_reasons_are_there(opened):
    chromium, address, *_ = opened
    context = chromium.new_context(java_script_enabled=False)
    page = patient(context.new_page())
    page.goto(address)
    text = page.locator("body").inner_text()
    assert text.count("45 ± 7.1") == 3 and "not run yet: " in text and "the best of its family" in text
    assert "Choose" not in text and page.get_by_role("button", disabled=False).count() == 0
    assert page.locator(".gallery figcaption").all_inner_texts()[:2] == [
        "GAN learning_rate 1e-4, seed 0", "GAN learning_rate 2e-4, seed 1",
    ]  # fmt: skip
    assert page.locator(".gallery img").first.is_visible()
    context.close()
