"""Drawing from a pipeline and scoring what was drawn, in bounded memory: what `evaluate` and `compare` do."""

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hfgen.errors import UserError
from hfgen.figures import reconstruction_sheet
from hfgen.inference import draw_images, image_size
from hfgen.metrics.evaluation import memorisation_report, score_features
from hfgen.metrics.frechet import FEWEST_TO_EXTRAPOLATE, extrapolated_distance
from hfgen.metrics.memorisation import nearest_images
from hfgen.metrics.reference import Extractor, Reference


CLOSEST_PAIRS = 16
# Images of each pipeline on the sheet of a comparison.
NUM_SHOWN = 10


class Scored(NamedTuple):
    """What a pipeline drew and how good it is.

    Attributes:
        report: plain values, ready for JSON.
        closest: the generated images that are nearest to a real one, above those.
        shown: the first images.
    """

    report: dict[str, Any]
    closest: Image.Image
    shown: list[Image.Image]


def score_pipeline(
    pipeline: DiffusionPipeline,
    real: Reference,
    extractor: Extractor,
    count: int,
    seed: int,
    num_inference_steps: int,
    batch_size: int,
    sample_from: str | None = None,
    extrapolate: bool = False,
) -> Scored:
    """Draw images, each kept on the disk for as long as it is needed, and score them.

    Args:
        pipeline: of any family.
        real: the real images, of the size that the pipeline draws.
        extractor: made the features of the real images.
        count: images to draw.
        seed: of the images and of the resamplings.
        num_inference_steps: of a diffusion pipeline.
        batch_size: images drawn at once.
        sample_from: of a VAE; see `draw_images`.
        extrapolate: also estimate the FID of infinitely many generated images.

    Raises:
        UserError: as `draw_images` does, or if the images are too few to extrapolate from.
    """
    if extrapolate and count < FEWEST_TO_EXTRAPOLATE:
        raise UserError(f"--extrapolate needs {FEWEST_TO_EXTRAPOLATE} images at least, not --num_images {count}")
    size = image_size(pipeline)
    with tempfile.TemporaryDirectory() as folder:
        drawn = np.memmap(Path(folder) / "drawn", np.uint8, "w+", shape=(count, size, size, 3))
        started = time.perf_counter()
        images = draw_images(pipeline, count, seed, num_inference_steps, batch_size, sample_from=sample_from)
        for index, image in enumerate(images):
            drawn[index] = np.asarray(image)
        speed = count / (time.perf_counter() - started)
        features = extractor(drawn, count)
        closest = closest_sheet(real, drawn, features)
        shown = [Image.fromarray(np.array(pixels)) for pixels in drawn[:NUM_SHOWN]]
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    report: dict[str, Any] = {
        "pipeline": type(pipeline).__name__,
        "sample_size": size,
        "seed": seed,
        "features": extractor.identity,
        "num_parameters": sum(weight.numel() for network in networks for weight in network.parameters()),
        "drawing_images_per_second": round(speed, 2),
        "scores": score_features(real.features, features, seed),
        "floor": real.floor(count, seed),
        "memorisation": memorisation_report(real.features, features),
    }
    if extrapolate:
        report["fid_at_infinity"] = extrapolated_distance(real.features, features, seed)
    return Scored(report, closest, shown)


def closest_sheet(real: Reference, drawn: np.ndarray, features: np.ndarray) -> Image.Image:
    """Show the generated images that are nearest to a real one above those real ones.

    Args:
        real: the real images.
        drawn: the generated ones, uint8 `(count, height, width, 3)`.
        features: of the generated ones, `(count, num_features)`.
    """
    nearest = nearest_images(features, real.features)
    order = nearest.distances.argsort()[:CLOSEST_PAIRS]
    fake = [Image.fromarray(np.array(drawn[index])) for index in order]
    originals = [Image.fromarray(np.array(real.images[int(nearest.indices[index])])) for index in order]
    return reconstruction_sheet(fake, originals)
