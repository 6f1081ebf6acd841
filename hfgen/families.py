"""The three families of pipelines, "gan", "vae" and "ddpm", told apart by their components.

So a pipeline of diffusers' own, or one loaded with the code beside its weights, counts like one of hfgen's classes.
This file imports only torch and diffusers: a copy of it is part of each Space.
"""

from collections.abc import Collection
from typing import Any

from diffusers import DiffusionPipeline


# The required components of each family; the first is the network that generates the images.
COMPONENTS = {"gan": ("generator",), "vae": ("vae",), "ddpm": ("unet", "scheduler")}
OPTIONAL_COMPONENTS = {"density"}


def family(pipeline: DiffusionPipeline) -> str:
    """Return "gan", "vae" or "ddpm".

    Raises:
        ValueError: if the pipeline is none of these.
    """
    return _family_with(pipeline.components, type(pipeline).__name__)


def family_of_index(index: dict[str, Any]) -> str:
    """Return "gan", "vae" or "ddpm" for a saved pipeline.

    Args:
        index: content of its `model_index.json`.

    Raises:
        ValueError: if the pipeline is none of these.
    """
    class_name = index["_class_name"]
    parts = [name for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")]
    return _family_with(parts, class_name[-1] if isinstance(class_name, list) else class_name)


def image_network(pipeline: DiffusionPipeline) -> Any:
    """Return the network that generates a pipeline's images; raises as `family` does."""
    return pipeline.components[COMPONENTS[family(pipeline)][0]]


def _family_with(parts: Collection[str], class_name: str) -> str:
    for name, required in COMPONENTS.items():
        if set(parts) - OPTIONAL_COMPONENTS == set(required):
            return name
    raise ValueError(f"a {class_name} ({', '.join(sorted(parts))}) does not generate images from noise alone")
