"""`hfgen demo` as its users see it: a page in a browser, served by a process of its own."""

import contextlib
import io
import signal
import zipfile

import numpy as np
import pytest
from demo_pages import (
    Complaints,
    browser,
    free_port,
    patient,
    picture,
    serving,
    shown_images,
    toy_pipelines,
)
from PIL import Image

from hfgen.inference.sampling import image_generators, open_image


pytest.importorskip("gradio", reason='needs gradio: pip install "hfgen[demo]"')

# Grey levels. `hfgen sample` draws with GANs and VAEs in bf16 where the hardware has it, the page never does.
ROUNDING = 4
STEPS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    for name, pipeline in toy_pipelines().items():
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def served(folders, programs):
    port = free_port()
    command = (programs.hfgen, "demo", *(folders / name for name in ("gan", "vae", "ddpm")), "--port", port)
    with browser() as chromium, serving(programs, command, f"http://127.0.0.1:{port}"):
        # One context, so that the page's scripts are fetched and compiled once.
        yield chromium.new_context(viewport={"width": 1280, "height": 900}), f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def first_visit(served):
    """The page, opened for all tests that use `page`: a browser takes ten seconds to start it."""
    with opened(*served) as (page, complaints):
        yield page, complaints


@contextlib.contextmanager
def opened(context, address):
    page = patient(context.new_page())
    complaints = Complaints(page, address)
    page.goto(address)
    shown_images(page, 12)  # of the first pipeline, without being asked
    yield page, complaints
    page.close()


@pytest.fixture
def page(first_visit):
    """The page at the first pipeline, as the tests before left it; in the end nothing about it may be wrong."""
    page, complaints = first_visit
    complaints.found.clear()
    open_tabs(page, "gan", "Generate")
    yield page
    assert complaints.found == []


def visible(locator):
    return locator.locator("visible=true")


def open_tabs(page, *names):
    for name in names:
        visible(page.get_by_role("tab", name=name, exact=True)).click()


def click(page, name):
    visible(page.get_by_role("button", name=name, exact=True)).click()


def fill(page, label, value):
    visible(page.get_by_label(label, exact=True)).first.fill(str(value))


def fill_slider(page, label, value):
    field = visible(page.get_by_label(f"number input for {label}"))
    field.fill(str(value))
    field.blur()


def single(page, label):
    """The pixels of the picture with this label; None while there is none."""
    block = visible(page.locator(".picture").filter(has=page.get_by_text(label, exact=True)))
    images = visible(block.locator("img"))
    return picture(page, images.first.get_attribute("src")) if images.count() else None


def wait_for_picture(page, label, is_it, seconds=300):
    """Wait until the picture with this label is the expected one; return it."""
    for _ in range(10 * seconds):
        pixels = single(page, label)
        if pixels is not None and is_it(pixels):
            return pixels
        page.wait_for_timeout(100)
    raise AssertionError(f"{label!r} did not show what was expected")


def near(expected, tolerance=1):
    expected = np.asarray(expected).astype(int)
    return lambda pixels: pixels.shape == expected.shape and np.abs(pixels - expected).max() <= tolerance


def message(page):
    return visible(page.locator(".toast-body.error")).last


def test_the_page_draws_what_sample_draws_and_the_originals_can_be_had(page, folders, hfgen, tmp_path):
    status, _, _ = hfgen("sample", folders / "gan", "--seed", 7, "--num_images", 3, "--output", tmp_path / "drawn")
    assert status == 0
    fill(page, "Seed", 7)
    fill_slider(page, "Images", 3)
    click(page, "Generate")
    shown = shown_images(page, 3)
    page.get_by_text("3 images in").wait_for()
    for index, ours in enumerate(shown):
        theirs = np.asarray(Image.open(tmp_path / "drawn" / f"{index:06d}.png")).astype(int)
        np.testing.assert_allclose(ours, theirs, atol=ROUNDING)
    assert np.abs(shown[0] - shown[1]).max() > 3 * ROUNDING
    with page.expect_download() as download:
        click(page, "Download 3 PNGs in a zip")
    assert download.value.suggested_filename == "gan-seed-7.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.namelist() == ["000000.png", "000001.png", "000002.png"]
        for name, ours in zip(archive.namelist(), shown, strict=True):
            image = Image.open(io.BytesIO(archive.read(name)))
            assert image.format == "PNG" and np.array_equal(np.asarray(image).astype(int), ours)


def test_one_image_is_downloaded_as_what_the_button_says(page):
    fill(page, "Seed", 0)
    fill_slider(page, "Images", 1)
    click(page, "Generate")
    (shown,) = shown_images(page, 1)
    with page.expect_download() as download:
        click(page, "Download as PNG")
    assert download.value.suggested_filename == "gan-seed-0.png"
    image = Image.open(download.value.path())
    assert image.format == "PNG" and np.array_equal(np.asarray(image).astype(int), shown)


def test_the_whole_way_is_shown_from_one_seed_to_the_other(page):
    pipeline = toy_pipelines()["gan"]
    ends = [pipeline(1, generator=image_generators(seed, 0, 1)).images[0] for seed in (4, 9)]
    open_tabs(page, "Interpolate")
    fill(page, "From seed", 4)
    fill(page, "To seed", 9)
    click(page, "Interpolate")
    for _ in range(3000):
        walk = shown_images(page, 8)
        if near(ends[0])(walk[0]) and near(ends[1])(walk[-1]):
            break
        page.wait_for_timeout(100)
    assert near(ends[0])(walk[0]) and near(ends[1])(walk[-1])
    assert all(np.abs(one - other).max() > 0 for one, other in zip(walk[:-1], walk[1:], strict=True))
    assert visible(page.locator(".images")).get_by_text("a = 3/7").is_visible()


def test_a_phone_shows_all_tabs_and_all_images(served):
    context, address = served
    page = patient(context.new_page())
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(address)
    shown_images(page, 12)
    # As long names of pipelines would do, and later the fonts of another machine.
    page.add_style_tag(content=".tab-wrapper button { min-width: 120px }")
    page.set_viewport_size({"width": 389, "height": 844})
    for name in ("vae", "ddpm", "Compare", "Interpolate"):
        tab = visible(page.locator('.tab-wrapper button:not([tabindex="-1"])')).filter(has_text=name)
        assert (box := tab.bounding_box())["x"] >= 0 and box["x"] + box["width"] <= 389
    for image in visible(page.locator(".images img")).all():
        frame, box = visible(page.locator(".images")).bounding_box(), image.bounding_box()
        assert frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"]
        assert box["width"] >= 64
    visible(page.locator('.tab-wrapper button:not([tabindex="-1"])')).filter(has_text="Compare").click()
    visible(page.get_by_role("button", name="Compare", exact=True)).wait_for()
    page.close()


def test_small_images_are_shown_large_with_sharp_pixels(page):
    image = visible(page.locator(".images img")).first
    assert image.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
    assert image.evaluate("one => [one.naturalWidth, one.clientWidth >= 8 * one.naturalWidth]") == [16, True]


def test_a_bad_seed_gets_a_sentence(page):
    for value in ("-1", "1.5", "1e300", ""):
        fill(page, "Seed", value)
        click(page, "Generate")
        assert "Seed must be a whole number from 0 to" in message(page).inner_text(), value
        page.locator(".toast-close").first.click()  # else it may stay, or vanish by itself, before the next one
        page.locator(".toast-body").wait_for(state="detached")


def test_moving_the_slider_walks_from_one_seeds_image_to_the_others(page):
    for name, pipeline in toy_pipelines().items():
        steps = {"num_inference_steps": STEPS} if name == "ddpm" else {}
        first, second = (pipeline(1, generator=image_generators(seed, 0, 1), **steps).images[0] for seed in (4, 9))
        open_tabs(page, name, "Interpolate")
        fill(page, "From seed", 4)
        fill(page, "To seed", 9)
        if steps:
            fill_slider(page, "Denoising steps", STEPS)
        slider = visible(page.get_by_label("range slider for Position"))
        for key, expected in (("Home", first), ("End", second)):
            slider.focus()
            slider.press(key)
            slider.dispatch_event("pointerup")
            wait_for_picture(page, "Interpolation", near(expected))
        assert not near(first, 3 * ROUNDING)(np.asarray(second))


def test_denoising_is_watched_to_the_end(page):
    pipeline = toy_pipelines()["ddpm"]
    expected = pipeline(1, generator=image_generators(3, 0, 1), num_inference_steps=16).images[0]
    open_tabs(page, "ddpm", "Denoise")
    fill(page, "Seed", 3)
    fill_slider(page, "Denoising steps", 16)
    click(page, "Denoise")
    page.get_by_text("step 16 of 16, timestep").wait_for()
    wait_for_picture(page, "Current image", near(expected))
    frames = shown_images(page, 9)  # noise, and eight on the way
    assert near(expected)(frames[-1])
    distances = [np.abs(frame - np.asarray(expected)).mean() for frame in frames]
    assert distances[0] > distances[4] > distances[-1]


def test_an_upload_is_shown_beside_its_reconstruction(page, folders, tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "mine.png")
    open_tabs(page, "vae", "Reconstruct")
    page.locator("input[type=file]").set_input_files(tmp_path / "mine.png")
    original = open_image(tmp_path / "mine.png", 16)
    wait_for_picture(page, "Original, cropped", near(original, 0))
    wait_for_picture(page, "Reconstruction", near(toy_pipelines()["vae"].reconstruct(original).images[0]))


def test_an_upload_that_is_no_image_gets_a_sentence(served, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"no image")
    with opened(*served) as (page, complaints):
        open_tabs(page, "vae", "Reconstruct")
        page.locator("input[type=file]").set_input_files(tmp_path / "holiday.jpg")
        assert "This file is not a readable image" in message(page).inner_text()
        assert complaints.found == []


def test_two_pipelines_are_compared_on_one_seed_with_their_times(page):
    open_tabs(page, "Compare")
    fill(page, "Seed", 5)
    fill_slider(page, "Images", 2)
    click(page, "Compare")
    shown = shown_images(page, 4)
    pipelines = toy_pipelines()
    for start, name in ((0, "gan"), (2, "vae")):
        expected = pipelines[name](2, generator=image_generators(5, 0, 2)).images
        assert all(near(one)(ours) for one, ours in zip(expected, shown[start : start + 2], strict=True))
        told = visible(page.locator(".note").filter(has_text=f"{name}: 2 images in")).first.inner_text()
        assert f"{'GAN' if name == 'gan' else 'VAE'} · 16 × 16 pixels" in told


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly_and_a_port_in_use_is_refused(folders, programs, hfgen):
    port = free_port()
    command = (programs.hfgen, "demo", folders / "gan", "--port", port)
    with serving(programs, command, f"http://127.0.0.1:{port}") as process:
        status, _, err = hfgen("demo", folders / "gan", "--port", port)
        assert (status, err) == (2, f"error: --port {port} is in use, perhaps by another demo; choose another\n")
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0
    assert "Traceback" not in process.output.read_text() + process.errors.read_text()
