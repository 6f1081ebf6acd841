"""Input fields of the demo's page, and validation of their values.

A copy of this file and the few that it imports is part of each Space.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import numpy as np
from diffusers import DiffusionPipeline

from hfgen.demo.drawing import SAVED, Settings, height_and_width
from hfgen.families import family
from hfgen.methods.schedules import default_num_inference_steps, samplers_of


MAX_SEED = 2**53 - 1  # largest exact integer in a browser
MAX_IMAGES = 16
MAX_STEPS = 250
SMALL = 200  # pixels; smaller images are shown with sharp pixels
SAMPLER_NAMES = {"dpm": "DPM-Solver++", "unipc": "UniPC", "ddim": "DDIM", "ddpm": "DDPM (ancestral)"}
SCHEDULERS = {
    "DPMSolverMultistepScheduler": "dpm",
    "UniPCMultistepScheduler": "unipc",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EDMDPMSolverMultistepScheduler": "dpm",
    "EDMEulerScheduler": "ddim",
}
SAMPLE_FROM = [("ex-post density", "ex_post"), ("prior", "prior")]


def seed_field(label: str, value: int, info: str | None = None) -> gr.Number:
    """Make a field for a seed; it is validated when used, because gradio would round it silently."""
    return gr.Number(value, label=label, info=info)


def option_fields(pipeline: DiffusionPipeline, between: bool = False) -> list[gr.components.Component]:
    """Make the fields for the pipeline's family, for `read_settings`.

    Args:
        pipeline: of any family.
        between: for interpolation, which needs samplers that add no noise, and has no truncation.
    """
    kind = family(pipeline)
    if kind == "gan" and between:
        return []
    if kind == "ddpm":
        most = most_steps(pipeline)
        own = min(default_num_inference_steps(pipeline), most)
        saved, keys = type(pipeline.scheduler).__name__, _samplers(pipeline, between)
        saved_name = SAMPLER_NAMES[SCHEDULERS[saved]] if saved in SCHEDULERS else saved
        names = {SAVED: f"as saved ({saved_name})", **SAMPLER_NAMES}
        return [
            gr.Slider(1, most, own, step=1, label="Denoising steps", info="fewer steps are faster but less accurate"),
            gr.Dropdown([(names[key], key) for key in keys], value=keys[0], label="Sampler"),
        ]
    if kind == "gan":
        truncate = gr.Checkbox(False, label="Truncate latents")
        return [
            truncate,
            gr.Slider(
                0.1,
                3,
                1,
                step=0.1,
                label="Truncation",
                info="lower values give less diversity; 3 truncates almost nothing",
            ),
        ]
    if pipeline.density is None:
        return []
    return [gr.Radio(SAMPLE_FROM, value="ex_post", label="Latents from")]


def _samplers(pipeline: DiffusionPipeline, between: bool) -> list[str]:
    keys = [key for key in SAMPLER_NAMES if key in samplers_of(pipeline.scheduler)]
    return [key for key in keys if key != "ddpm"] if between else [SAVED, *keys]


def read_settings(pipeline: DiffusionPipeline, options: tuple, between: bool = False) -> Settings:
    """Read the values of the fields of `option_fields`.

    Raises:
        gr.Error: if a value is invalid.
    """
    kind = family(pipeline)
    if kind == "ddpm":
        steps, sampler = options
        if sampler not in _samplers(pipeline, between):
            raise refusal("Choose a sampler.")
        return Settings(steps=whole_number(steps, "Denoising steps", 1, most_steps(pipeline)), sampler=sampler)
    if kind == "gan" and options and options[0]:
        return Settings(truncation=number(options[1], "Truncation", 0.1, 3))
    return Settings(sample_from=options[0]) if kind == "vae" and options else Settings()


def image_gallery(label: str, css_classes: list[str], columns: int = 4) -> gr.Gallery:
    """Make a field that shows several images; `css_classes` is from `css_classes_of`."""
    return gr.Gallery(
        label=label,
        show_label=False,
        format="png",
        columns=columns,
        fit_columns=False,
        object_fit="contain",
        interactive=False,
        elem_classes=["images", *css_classes],
    )


def single_picture(label: str, css_classes: list[str]) -> gr.Image:
    """Make a field that shows one image; `css_classes` is from `css_classes_of`."""
    return gr.Image(
        label=label,
        type="pil",
        format="png",
        height=384,
        interactive=False,
        elem_classes=["picture", *css_classes],
        buttons=["download", "fullscreen"],
    )


def css_classes_of(pipeline: DiffusionPipeline) -> list[str]:
    """Return the CSS classes for a pipeline's images: small ones are shown with sharp pixels."""
    return ["pixels"] if max(height_and_width(pipeline)) < SMALL else []


def most_steps(pipeline: DiffusionPipeline) -> int:
    """Return the page's maximum number of denoising steps for a pipeline."""
    return min(MAX_STEPS, pipeline.scheduler.config.num_train_timesteps) if family(pipeline) == "ddpm" else MAX_STEPS


def number(value: Any, label: str, lowest: float, highest: float) -> float:
    """Return the value of a field if it is a number in a range; raise a `gr.Error` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise refusal(f"{label} must be a number from {lowest} to {highest}.")
    return value


def whole_number(value: Any, label: str, lowest: int, highest: int) -> int:
    """Return the value of a field if it is a whole number in a range; raise a `gr.Error` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest or value % 1:
        raise refusal(f"{label} must be a whole number from {lowest} to {highest}.")
    return int(value)


@contextmanager
def only_finite() -> Iterator[None]:
    """Refuse images that are NaN, which the page would show black."""
    try:
        with np.errstate(invalid="raise"):  # of the conversion to 8 bits
            yield
    except FloatingPointError:
        raise refusal("The images of this pipeline are NaN: its training has diverged.") from None


def refusal(sentence: str) -> gr.Error:
    """Return an error that is shown on the page but not in the terminal."""
    return gr.Error(sentence, print_exception=False)
