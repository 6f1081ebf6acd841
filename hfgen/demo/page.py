"""The demo: a web page to sample, interpolate, denoise, reconstruct and compare with trained pipelines.

A copy of this file and the few that it imports is part of each Space.
"""

import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hfgen.demo.drawing import (
    Settings,
    denoise,
    describe,
    generate,
    height_and_width,
    image_generator,
    interpolate,
    open_upload,
    starting_noise,
    to_images,
)
from hfgen.demo.fields import (
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    css_classes_of,
    image_gallery,
    most_steps,
    number,
    only_finite,
    option_fields,
    read_settings,
    refusal,
    seed_field,
    single_picture,
    whole_number,
)
from hfgen.families import family
from hfgen.methods.schedules import default_num_inference_steps
from hfgen.texts import counted, markdown_text


# Pipelines are not thread-safe: one call at a time, over all users.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "drawing"}
NUM_FRAMES = 8  # pictures kept during denoising
WALK_STEPS = 7  # from one end of an interpolation to the other
UPLOADS = """JPEG, PNG, WebP, BMP, TIFF or GIF. The image is center-cropped to a square and resized to the size
of the images that the VAE was trained on."""
CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: 0 auto !important; }
.images .grid-wrap { height: auto !important; max-height: 640px; min-height: 0; }
.images .grid-container { height: auto !important; }
.pixels img { image-rendering: pixelated; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.note p { opacity: 0.75; }
/* Gradio moves tabs that do not fit into a menu, and lets thumbnails below 100 pixels leave their frame. */
.images .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
@media (max-width: 640px) {
  .images .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
  .tab-wrapper { height: auto !important; flex-wrap: wrap; justify-content: flex-start !important; }
  .overflow-menu, .overflow-dropdown { display: contents !important; }
  .overflow-menu > button { display: none !important; }
  .overflow-dropdown > button { width: auto !important; min-height: 32px; }
}
"""


def build_demo(pipelines: dict[str, DiffusionPipeline], title: str = "hfgen demo") -> gr.Blocks:
    """Build the page; `launch` serves it.

    Args:
        pipelines: pipelines by displayed name; of any family, on any device.
        title: page title.

    Raises:
        ValueError: if there is no pipeline, or one of an unknown kind.
    """
    if not pipelines:
        raise ValueError("pipelines is empty: a demo needs at least one")
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# {markdown_text(title)}")
        if len(pipelines) == 1:
            for name, pipeline in pipelines.items():
                _pipeline_tabs(page, name, pipeline)
        else:
            with gr.Tabs():
                for name, pipeline in pipelines.items():
                    with gr.Tab(name):
                        _pipeline_tabs(page, name, pipeline)
                with gr.Tab("Compare"):
                    _compare_tab(pipelines)
    return page


def launch(
    page: gr.Blocks,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    prevent_thread_lock: bool = False,
) -> None:
    """Serve a page with its theme and CSS.

    Args:
        page: from `build_demo`.
        host: address to listen on; only this machine if None.
        port: a free one from 7860 if None.
        share: also serve it at a public gradio address, for a week.
        prevent_thread_lock: return at once instead of when the page is closed.
    """
    fonts = ("system-ui", "sans-serif")  # system fonts: nothing is downloaded
    theme = gr.themes.Default(font=fonts, font_mono=("ui-monospace", "monospace"))
    quiet = prevent_thread_lock  # the caller prints the address
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=prevent_thread_lock,
        quiet=quiet,
        theme=theme,
        css=CSS,
        max_file_size="32mb",
        footer_links=["gradio", "settings"],
    )


def _pipeline_tabs(page: gr.Blocks, name: str, pipeline: DiffusionPipeline) -> None:
    """Lay out the tabs for a pipeline's family."""
    gr.Markdown(describe(pipeline), elem_classes="note")
    with gr.Tabs():
        with gr.Tab("Generate"):
            _sample_tab(page, name, pipeline)
        with gr.Tab("Interpolate"):
            _interpolate_tab(page, pipeline)
        if family(pipeline) == "ddpm":
            with gr.Tab("Denoise"):
                _denoise_tab(pipeline)
        if family(pipeline) == "vae":
            with gr.Tab("Reconstruct"):
                _reconstruct_tab(pipeline)


def _sample_tab(page: gr.Blocks, name: str, pipeline: DiffusionPipeline) -> None:
    folder = tempfile.TemporaryDirectory(prefix="hfgen-demo-")
    one_pass = family(pipeline) != "ddpm"
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            seed = seed_field("Seed", 0, "the same seed gives the same images")
            count = gr.Slider(1, MAX_IMAGES, 12 if one_pass else 4, step=1, label="Images")
            options = option_fields(pipeline)
            button = gr.Button("Generate", variant="primary")
            download = gr.DownloadButton("Download", interactive=False)
        with gr.Column(scale=3):
            gallery = image_gallery("Images", css_classes_of(pipeline))
            note = gr.Markdown(elem_classes="note")

    def handle(seed, count, *options, progress=gr.Progress()):  # noqa: B008 (gradio requires it as a default)
        seed, count = whole_number(seed, "Seed", 0, MAX_SEED), whole_number(count, "Images", 1, MAX_IMAGES)
        settings = read_settings(pipeline, options)
        start = time.monotonic()
        generators = [image_generator(seed, index) for index in range(count)]
        with only_finite():
            images = generate(pipeline, generators, settings, _follow(progress))
        seconds = time.monotonic() - start
        file = _write_download(Path(folder.name), f"{Path(name).name}-seed-{seed}", images)
        label = "Download as PNG" if count == 1 else f"Download {count} PNGs in a zip"
        note = f"{counted(count, 'image')} in {seconds:.1f} s"
        return images, note, gr.DownloadButton(label, value=file, interactive=True)

    triggers = [button.click, seed.submit, *([page.load] if one_pass else [])]
    gr.on(triggers, handle, [seed, count, *options], [gallery, note, download], api_name="draw", **ONE_AT_A_TIME)


def _interpolate_tab(page: gr.Blocks, pipeline: DiffusionPipeline) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            first, second = seed_field("From seed", 0), seed_field("To seed", 1)
            options = option_fields(pipeline, between=True)
            button = gr.Button("Interpolate", variant="primary")
        with gr.Column(scale=3):
            picture = single_picture("Interpolation", css_classes_of(pipeline))
            part = gr.Slider(0, 1, 0.5, step=0.01, label="Position", info="0 and 1 are the images of the two seeds")
    walk = image_gallery("The way from one to the other", css_classes_of(pipeline), columns=WALK_STEPS + 1)

    def between(first, second, parts, options, progress):
        ends = whole_number(first, "From seed", 0, MAX_SEED), whole_number(second, "To seed", 0, MAX_SEED)
        parts = [number(part, "Position", 0, 1) for part in parts]
        settings = read_settings(pipeline, options, between=True)
        with only_finite():
            return interpolate(pipeline, ends, parts, settings, _follow(progress))

    def handle(first, second, part, *options, progress=gr.Progress()):  # noqa: B008 (gradio requires it as a default)
        parts = [step / WALK_STEPS for step in range(WALK_STEPS + 1)]
        images = between(first, second, [*parts, part], options, progress)
        heads = ["a = 0", *(f"a = {step}/{WALK_STEPS}" for step in range(1, WALK_STEPS)), "a = 1"]
        return images[-1], list(zip(images[:-1], heads, strict=True))

    def move(first, second, part, *options, progress=gr.Progress()):  # noqa: B008 (gradio requires it as a default)
        return between(first, second, [part], options, progress)[0]

    triggers = [button.click, first.submit, second.submit]
    triggers += [page.load] if family(pipeline) != "ddpm" else []
    inputs = [first, second, part, *options]
    waiting: dict[str, Any] = {"trigger_mode": "always_last", **ONE_AT_A_TIME}
    gr.on(triggers, handle, inputs, [picture, walk], api_name="walk", **waiting)
    gr.on([part.release], move, inputs, picture, api_name="interpolate", **waiting)


def _denoise_tab(pipeline: DiffusionPipeline) -> None:
    folder = tempfile.TemporaryDirectory(prefix="hfgen-demo-")
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            seed = seed_field("Seed", 0)
            options = option_fields(pipeline)
            button = gr.Button("Denoise", variant="primary")
            stop = gr.Button("Stop")
        with gr.Column(scale=3):
            picture = single_picture("Current image", css_classes_of(pipeline))
            note = gr.Markdown("From pure noise to an image, step by step.", elem_classes="note")
    frames = image_gallery("Intermediate images", css_classes_of(pipeline), columns=NUM_FRAMES + 1)

    def handle(seed, *options):
        seed, settings = whole_number(seed, "Seed", 0, MAX_SEED), read_settings(pipeline, options)
        generators = [image_generator(seed)]
        noise = starting_noise(pipeline, generators)
        frame = _write_frame(Path(folder.name), 0, noise)
        kept = [(frame, "noise")]
        yield frame, "noise", kept
        for done, steps, timestep, sample in denoise(pipeline, noise, generators, settings):
            if _due(done, steps, 3 * NUM_FRAMES):
                with only_finite():
                    frame = _write_frame(Path(folder.name), done, sample)
                kept = [*kept, (frame, f"after {timestep}")] if _due(done, steps, NUM_FRAMES) else kept
                yield frame, f"step {done} of {steps}, timestep {timestep}", kept

    outputs = [picture, note, frames]
    start = [button.click, seed.submit]
    event = gr.on(
        start, handle, [seed, *options], outputs, api_name="denoise", show_progress="hidden", **ONE_AT_A_TIME
    )
    stop.click(None, cancels=[event])


def _reconstruct_tab(pipeline: DiffusionPipeline) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            file = gr.File(label="Your image", type="filepath", height=180)
            gr.Markdown(UPLOADS, elem_classes="note")
        original = single_picture("Original, cropped", css_classes_of(pipeline))
        reconstruction = single_picture("Reconstruction", css_classes_of(pipeline))

    def handle(path):
        if path is None:
            return None, None
        try:
            image = open_upload(path, height_and_width(pipeline))
        except ValueError as error:
            raise refusal(str(error)) from error
        with only_finite():
            return image, pipeline.reconstruct(image).images[0]

    outputs = [original, reconstruction]
    gr.on([file.upload, file.clear], handle, file, outputs, api_name="reconstruct", **ONE_AT_A_TIME)


def _compare_tab(pipelines: dict[str, DiffusionPipeline]) -> None:
    names = list(pipelines)
    with gr.Row():
        chosen = [gr.Dropdown(names, value=names[index], label=label) for index, label in enumerate(("Left", "Right"))]
        seed = seed_field("Seed", 0)
        count = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Images")
        own = [default_num_inference_steps(pipeline) for pipeline in pipelines.values() if family(pipeline) == "ddpm"]
        most = min(MAX_STEPS, max(own, default=1))  # so that no pipeline looks worse for lack of steps
        steps = gr.Slider(
            1, MAX_STEPS, most, step=1, label="Denoising steps", info="for diffusion models", visible=bool(own)
        )
    button = gr.Button("Compare", variant="primary")
    sides: list[Any] = []
    sharp = all(map(css_classes_of, pipelines.values()))  # a large image that is shrunk would show patterns
    with gr.Row():
        for label in ("Left", "Right"):
            with gr.Column():
                note = gr.Markdown(elem_classes="note")
                sides += [image_gallery(label, ["pixels"] if sharp else []), note]

    def handle(left, right, seed, count, steps, progress=gr.Progress()):  # noqa: B008 (gradio requires it as a default)
        seed, count = whole_number(seed, "Seed", 0, MAX_SEED), whole_number(count, "Images", 1, MAX_IMAGES)
        steps = whole_number(steps, "Denoising steps", 1, MAX_STEPS)
        results: list[Any] = []
        for name in (left, right):
            if name not in pipelines:
                raise refusal("Choose two pipelines.")
            pipeline = pipelines[name]
            settings = Settings(steps=min(steps, most_steps(pipeline)))
            start = time.monotonic()
            with only_finite():
                generators = [image_generator(seed, index) for index in range(count)]
                images = generate(pipeline, generators, settings, _follow(progress))
            seconds = time.monotonic() - start
            with_steps = f" ({settings.steps} steps)" if family(pipeline) == "ddpm" else ""
            note = f"**{name}**: {counted(count, 'image')} in {seconds:.2f} s{with_steps}  \n{describe(pipeline)}"
            results += [images, note]
        return results

    inputs = [*chosen, seed, count, steps]
    gr.on([button.click, seed.submit], handle, inputs, sides, api_name="compare", **ONE_AT_A_TIME)


def _due(done: int, steps: int, times: int) -> bool:
    """Whether this step is one of `times` evenly spaced steps that include the last."""
    return done * times // steps > (done - 1) * times // steps


def _write_frame(folder: Path, done: int, sample: torch.Tensor) -> str:
    """Write a picture once: gradio would rewrite the file of an in-memory image while the page still reads it."""
    file = folder / f"{done:04d}.png"
    to_images(sample)[0].save(file)
    return str(file)


def _follow(progress: gr.Progress) -> Callable[[int, int], None]:
    return lambda done, steps: progress((done, steps), desc="denoising", unit="steps")


def _write_download(folder: Path, stem: str, images: list[Image.Image]) -> str:
    """Write one image as a PNG, several as a zip of PNGs named as in `hfgen sample`.

    Deletes the previous file, which has already been served.
    """
    for earlier in folder.iterdir():
        earlier.unlink()
    if len(images) == 1:
        images[0].save(folder / f"{stem}.png")
        return str(folder / f"{stem}.png")
    with zipfile.ZipFile(folder / f"{stem}.zip", "w") as archive:
        for index, image in enumerate(images):
            with archive.open(f"{index:06d}.png", "w") as file:
                image.save(file, "PNG")
    return str(folder / f"{stem}.zip")
