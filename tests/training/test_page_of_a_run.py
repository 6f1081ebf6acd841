"""The page of a run in a browser, opened from the disk as its readers do."""

import io

import numpy as np
import pytest
from demo_pages import Complaints, browser, patient
from made_up_runs import CLASSES, colour, made_up_run
from PIL import Image

from hfgen.training.page import write_page


NASTY = "<script>window.taken = 1<" + "script><img src=x onerror='window.taken = 1'>"  # a name of a folder has no "/"
NASTIER = f"</script>{NASTY}"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    settings = {"dataset": NASTIER, "resume": NASTIER + "x" * 300}
    folder = made_up_run(tmp_path_factory.mktemp("runs") / NASTY, events=[(3000, NASTIER)], **settings)
    address = write_page(folder, CLASSES).as_uri()
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


def samples(page):
    return page.locator("[data-kind=samples]")


def shown_colour(page):
    pixels = np.asarray(Image.open(io.BytesIO(samples(page).locator("img").screenshot())).convert("RGB"))
    return pixels[40, 40]


def assert_shows(page, step):
    assert np.abs(shown_colour(page).astype(int) - colour(step)).max() < 6
    assert samples(page).locator("figcaption").inner_text().startswith(f"samples: step {step:,}")


def test_the_slider_shows_the_sheet_of_its_step(page):
    assert_shows(page, 4000)
    slider = page.get_by_role("slider", name="samples by step")
    slider.fill("0")
    assert_shows(page, 0)
    slider.fill("4")
    assert_shows(page, 4000)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert_shows(page, 3000)


def test_playing_goes_through_the_sheets_until_it_is_paused(page):
    page.get_by_role("button", name="play").click()
    page.wait_for_function("document.querySelector('[data-kind=samples] input').value === '2'")
    page.get_by_role("button", name="pause").click()
    at = page.get_by_role("slider").input_value()
    page.wait_for_timeout(600)
    assert page.get_by_role("slider").input_value() == at and page.get_by_role("button", name="play").is_visible()


def test_names_are_text(page):
    assert page.get_by_role("heading", level=1).inner_text() == NASTY
    assert page.title() == NASTY
    assert NASTIER in page.locator(".events").inner_text()
    assert page.locator("#settings").get_by_text(NASTIER, exact=True).is_visible()


def test_the_panels_name_their_curves_and_the_reference(page):
    charts = page.locator("#main svg")
    assert [charts.nth(index).get_attribute("aria-label") for index in range(charts.count())] == [
        *(f"{name} by training images" for name in ("FID", "KID", "fraction of copies")),
        "losses of both networks",
    ]
    assert page.locator("#main figcaption").nth(0).inner_text().split("\n") == ["this run", "preset dcgan"]
    assert page.locator("#main figcaption").nth(3).inner_text().split("\n") == ["discriminator", "generator"]
    assert charts.nth(0).locator("circle").count() >= 4 and charts.nth(0).locator("[stroke-dasharray]").count() == 1
    assert not page.locator("#others svg").first.is_visible()
    page.get_by_text("more curves").click()
    assert page.locator("#others svg").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything(page, scheme):
    page.set_viewport_size({"width": 390, "height": 800})
    page.emulate_media(color_scheme=scheme)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [390, 390]
    beyond = "[...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > 391).length"
    assert page.evaluate(beyond) == 0
    text = "rgb(255, 255, 255)" if scheme == "dark" else "rgb(0, 0, 0)"
    assert page.evaluate("getComputedStyle(document.body).color") == text


def test_without_scripts_the_newest_sheet_and_the_settings_are_there(opened):
    chromium, address, *_ = opened
    context = chromium.new_context(java_script_enabled=False)
    page = patient(context.new_page())
    page.goto(address)
    assert samples(page).locator("img").is_visible() and page.locator("#settings tr").count() > 3
    assert (
        page.get_by_text("need JavaScript").is_visible() and not page.get_by_role("button", name="play").is_visible()
    )
    context.close()
