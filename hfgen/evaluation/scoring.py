"""Drawing from a pipeline and scoring what was drawn, in bounded memory: what `evaluate` and `compare` do."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hfgen.data.store import ImageStore
from hfgen.errors import UserError
from hfgen.evaluation.reference import Reference
from hfgen.evaluation.scores import (
    held_out_report,
    memorisation_report,
    pixel_report,
    score_features,
    spread_over_seeds,
)
from hfgen.inference.draw import draw_images, image_size, weights_digest
from hfgen.inference.figures import reconstruction_sheet
from hfgen.methods.schedules import steps_of
from hfgen.metrics.extraction import Extractor
from hfgen.metrics.frechet import FEWEST_TO_EXTRAPOLATE, extrapolated_distance, frechet_distance
from hfgen.metrics.kernel import thinned_out
from hfgen.metrics.memorisation import nearest_images, nearest_pixels, thumbnails
from hfgen.pipelines import VAEPipeline


CLOSEST_PAIRS = 16
# Images of each pipeline on the sheet of a comparison.
NUM_SHOWN = 10


class Drawing(NamedTuple):
    """What is drawn from a pipeline, and how.

    Attributes:
        num_images: how many.
        seed: of the first set of images, and of the resamplings.
        num_inference_steps: of a diffusion pipeline; its own number if None.
        batch_size: images drawn at once.
        sample_from: of a VAE; see `draw_images`.
    """

    num_images: int
    seed: int = 0
    num_inference_steps: int | None = None
    batch_size: int = 32
    sample_from: str | None = None


class Drawn(NamedTuple):
    """Images that a pipeline drew.

    Attributes:
        images: uint8 `(num_images, height, width, 3)`, on the disk.
        features: `(num_images, num_features)`.
        images_per_second: of the drawing alone.
    """

    images: np.ndarray
    features: np.ndarray
    images_per_second: float


class Scored(NamedTuple):
    """What a pipeline drew and how good it is.

    Attributes:
        report: plain values, ready for JSON.
        closest: the generated images whose features are nearest to those of a real one, above those.
        closest_pixels: likewise by pixels.
        shown: the first images.
    """

    report: dict[str, Any]
    closest: Image.Image
    closest_pixels: Image.Image
    shown: list[Image.Image]


@contextmanager
def drawn_from(
    pipeline: DiffusionPipeline,
    drawing: Drawing,
    extractor: Extractor,
    before_each: Callable[[], None] = lambda: None,
) -> Iterator[Drawn]:
    """Draw images, each kept on the disk for as long as it is needed, and compute their features.

    Args:
        pipeline: of any family.
        drawing: what and how.
        extractor: computes the features.
        before_each: called before an image is kept and before its features are computed, and after each step of
            diffusion; may raise to give up.

    Raises:
        UserError: as `draw_images` does.
    """
    count, seed, num_inference_steps, batch_size, sample_from = drawing
    size = image_size(pipeline)
    with tempfile.TemporaryDirectory() as folder:
        images = np.memmap(Path(folder) / "drawn", np.uint8, "w+", shape=(count, size, size, 3))
        started = time.perf_counter()
        of_pipeline = draw_images(
            pipeline,
            count,
            seed,
            num_inference_steps,
            batch_size,
            sample_from=sample_from,
            after_each_step=before_each,
        )
        for index, image in enumerate(of_pipeline):
            before_each()
            images[index] = np.asarray(image)
        speed = count / (time.perf_counter() - started)

        def kept() -> Iterator[np.ndarray]:
            for image in images:
                before_each()
                yield image

        yield Drawn(images, extractor(kept(), count), speed)


def score_pipeline(
    pipeline: DiffusionPipeline,
    real: Reference,
    extractor: Extractor,
    drawing: Drawing,
    repeats: int = 1,
    extrapolate: bool = False,
    held_out: Reference | None = None,
) -> Scored:
    """Draw images and score them.

    Args:
        pipeline: of any family.
        real: the real images, of the size that the pipeline draws.
        extractor: made the features of the real images.
        drawing: what is drawn, and how.
        repeats: sets of images, with seeds that count up from the first; the scores are those of the first set.
        extrapolate: also estimate the FID of infinitely many generated images.
        held_out: real images that the pipeline was not trained on.

    Raises:
        UserError: as `draw_images` does, or if the images are too few to extrapolate from.
    """
    if extrapolate and drawing.num_images < FEWEST_TO_EXTRAPOLATE:  # before they are drawn
        raise _too_few(drawing.num_images)
    with drawn_from(pipeline, drawing, extractor) as drawn:
        scored = score_images(
            drawn.images, drawn.features, real, extractor.identity, drawing.seed, extrapolate, held_out
        )
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    steps = (drawing.num_inference_steps or steps_of(pipeline)) if hasattr(pipeline, "unet") else None
    facts = {
        "pipeline": type(pipeline).__name__,
        "num_inference_steps": steps,
        "num_parameters": sum(weight.numel() for network in networks for weight in network.parameters()),
        "drawing_images_per_second": round(drawn.images_per_second, 2),
        "weights_sha256": weights_digest(pipeline),
    }
    report = {**facts, **scored.report}
    if isinstance(pipeline, VAEPipeline):
        report["reconstructions"] = reconstruction_scores(pipeline, real, extractor, drawing)
    if repeats > 1:
        report["repeats"] = repeat_scores(pipeline, real, extractor, drawing, repeats, report["scores"])
    return scored._replace(report=report)


def reconstruction_scores(
    pipeline: VAEPipeline, real: Reference, extractor: Extractor, drawing: Drawing
) -> dict[str, Any]:
    """Score what comes back of real images: what a VAE would draw if its latents were drawn perfectly.

    Args:
        pipeline: of a VAE; images are decoded from the mean of their posterior.
        real: the real images, of the size that the pipeline draws.
        extractor: made their features.
        drawing: how many images, at most all real ones, and how many at once; its seed chooses them.

    Returns:
        Plain values: `num_images`, and `fid` against all real images.
    """
    chosen = thinned_out(np.arange(len(real.features)), drawing.num_images, drawing.seed)

    def reconstructions() -> Iterator[np.ndarray]:
        for start in range(0, len(chosen), drawing.batch_size):
            part = chosen[start : start + drawing.batch_size]
            images = [Image.fromarray(np.array(real.images[int(index)])) for index in part]
            yield from map(np.asarray, pipeline.reconstruct(images, return_dict=False)[0])

    features = extractor(reconstructions(), len(chosen))
    return {"num_images": len(chosen), "fid": float(frechet_distance(real.features, features))}


def score_images(
    images: np.ndarray | ImageStore,
    features: np.ndarray,
    real: Reference,
    identity: str,
    seed: int,
    extrapolate: bool = False,
    held_out: Reference | None = None,
) -> Scored:
    """Score generated images, wherever they come from.

    Args:
        images: each uint8 `(height, width, 3)`, of the size of the real ones.
        features: of them, `(num_images, num_features)`.
        real: the real images.
        identity: of the extractor that made the features.
        seed: of the resamplings.
        extrapolate: also estimate the FID of infinitely many generated images.
        held_out: real images that the generator was not trained on.

    Raises:
        UserError: if the images are too few to extrapolate from.
    """
    if extrapolate and len(features) < FEWEST_TO_EXTRAPOLATE:
        raise _too_few(len(features))
    small, real_small = thumbnails(images[index] for index in range(len(images))), real.thumbnails()
    floor = real.floor(len(features), seed)
    report: dict[str, Any] = {
        "sample_size": images[0].shape[0],
        "seed": seed,
        "features": identity,
        "scores": score_features(real.features, features, seed),
        "floor": floor,
        "memorisation": memorisation_report(real.features, features, floor["nearest"]),
        "memorisation_by_pixels": pixel_report(real_small, small, seed),
    }
    if extrapolate:
        report["fid_at_infinity"] = extrapolated_distance(real.features, features, seed)
    if held_out is not None:
        report["held_out"] = held_out_report(real.features, held_out.features, features)
    return Scored(
        report,
        closest_sheet(real, images, *nearest_images(features, real.features)),
        closest_sheet(real, images, *nearest_pixels(small, real_small)[:2]),
        [Image.fromarray(np.array(images[index])) for index in range(min(NUM_SHOWN, len(features)))],
    )


def _too_few(count: int) -> UserError:
    return UserError(f"--extrapolate needs {FEWEST_TO_EXTRAPOLATE} images at least, not {count}")


def repeat_scores(
    pipeline: DiffusionPipeline,
    real: Reference,
    extractor: Extractor,
    drawing: Drawing,
    repeats: int,
    first: dict[str, Any],
) -> dict[str, Any]:
    """Draw and score again with the following seeds; return the seeds and the spread of each score.

    Args:
        pipeline: of any family.
        real: the real images.
        extractor: made their features.
        drawing: of the first set.
        repeats: sets of images, the first one among them, at least 2.
        first: scores of the first set.
    """
    scores = [first]
    for seed in range(drawing.seed + 1, drawing.seed + repeats):
        with drawn_from(pipeline, drawing._replace(seed=seed), extractor) as drawn:
            scores.append(score_features(real.features, drawn.features, seed))
    return {"seeds": list(range(drawing.seed, drawing.seed + repeats)), **spread_over_seeds(scores)}


def closest_sheet(
    real: Reference, drawn: np.ndarray | ImageStore, indices: np.ndarray, distances: np.ndarray
) -> Image.Image:
    """Show the generated images that are nearest to a real one above those real ones.

    Args:
        real: the real images.
        drawn: the generated ones, each uint8 `(height, width, 3)`.
        indices: of the real image that is nearest to each, `(count,)`.
        distances: to those, `(count,)`.
    """
    order = distances.argsort(kind="stable")[:CLOSEST_PAIRS]
    fake = [Image.fromarray(np.array(drawn[int(index)])) for index in order]
    originals = [Image.fromarray(np.array(real.images[int(indices[index])])) for index in order]
    return reconstruction_sheet(fake, originals)
