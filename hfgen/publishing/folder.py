"""The folder to publish: a pipeline with its code, card, pictures, settings and records; nothing private.

Never uploaded: checkpoints and optimizer states, logs, file names of the data, sheets with training images, and local
paths.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from hfgen.errors import UserError
from hfgen.families import family
from hfgen.files import read_json_lines
from hfgen.hub.card import REPORT_FILE, write_card
from hfgen.hub.model_index import reference_name
from hfgen.inference.curves import plot_curves
from hfgen.inference.figures import denoising_steps, labelled_sheet
from hfgen.inference.gifs import progress_frames, write_gif
from hfgen.inference.opening import find_pipeline, open_pipeline
from hfgen.inference.sampling import (
    SamplingOptions,
    generate_images,
    interpolated_images,
    latents_of_seeds,
    network_digest,
    way_of_sampling,
    weights_digest,
)
from hfgen.metrics.report import read_report, to_json
from hfgen.pipelines.self_contained import make_weights_readable
from hfgen.publishing.discriminator import discriminator_of
from hfgen.publishing.half import round_to_half, round_weights, store_in_half
from hfgen.publishing.records import add_records_of_run, copy_records, moment_of, was_published
from hfgen.run_files import DISCRIMINATOR_FILE, METRICS_FILE
from hfgen.texts import say
from hfgen.training.folder import run_of
from hfgen.training.history import NEEDED


NUM_SAMPLES, DENOISING_ROWS, WALKS, WALK_STEPS, MAX_FRAMES = 16, 4, 4, 8, 24
# What `read_report` raises for a file that is missing or something else.
NOT_A_REPORT = (OSError, ValueError, KeyError, TypeError, AttributeError)
TEXT_FILES = (".json", ".jsonl", ".md", ".py", ".txt", ".yml")


def make_publication(
    source: Path,
    target: Path,
    repo_id: str,
    scores: Path | None = None,
    license_id: str | None = None,
    half: bool = False,
    discriminator: bool = False,
) -> None:
    """Write everything to publish into a new folder.

    Args:
        source: a run, its `best/`, one of its checkpoints, or a pipeline folder.
        target: empty or non-existent folder.
        repo_id: "owner/name", for the card.
        scores: a folder from `hfgen evaluate`, or the `evaluation.json` in it.
        license_id: licence of the weights, for the card.
        half: store the weights as 16-bit floats; the pictures are then made with these.
        discriminator: also write the weights of the discriminator.

    Raises:
        UserError: if there is no pipeline or discriminator, the scores belong to other weights or another way of
            sampling, a local path would be published, or a weight is too large for 16 bits.
    """
    folder = find_pipeline(source)
    pipeline = open_pipeline(str(folder), plain=True)
    digests, network = [weights_digest(pipeline)], network_digest(pipeline)
    run = None if was_published(folder, network) else run_of(folder)  # into its run, say, which has gone on
    opponent = _opponent(pipeline, folder, run) if discriminator else {}
    if half:
        round_to_half(pipeline)
        round_weights("discriminator", opponent)
        digests.append(weights_digest(pipeline))
    report: dict[str, Any] | None
    if scores is not None:
        report = scores_of(scores, digests)
        refuse_other_sampling(f"--scores {scores}", report, pipeline)
    else:
        report = _report_beside(folder, digests, pipeline) if run is None else None
    pipeline.save_pretrained(target)
    if opponent:
        (target / DISCRIMINATOR_FILE).parent.mkdir()
        save_file(opponent, target / DISCRIMINATOR_FILE, metadata={"format": "pt"})
    if half:
        store_in_half(target)
    make_weights_readable(target)
    if report is not None:
        report["reference"] = reference_name(report["reference"])
        (target / REPORT_FILE).write_text(to_json(report))
    save_pictures(pipeline, target / "samples", (report or {}).get("num_inference_steps"))
    if run is not None:
        add_records_of_run(run, folder, target, network, network_digest(pipeline))
        add_pictures_of_run(run, target / "samples")
    else:
        copy_records(folder, target, network, network_digest(pipeline))
    write_card(target, repo_id, license_id)
    private = [Path.home(), Path.cwd(), source.expanduser().resolve(), *([run.resolve()] if run else [])]
    refuse_private_paths(target, [str(path) for path in private])


def _opponent(pipeline: DiffusionPipeline, folder: Path, run: Path | None) -> dict[str, torch.Tensor]:
    """Return the weights of the discriminator that the pipeline in a folder was trained against."""
    step = None if run is None else moment_of(run, folder, ()).step
    return discriminator_of(pipeline, folder, run, step)


def _report_beside(folder: Path, digests: Sequence[str], pipeline: DiffusionPipeline) -> dict[str, Any] | None:
    """Return the report that a pipeline was published with; None if there is none, or it does not describe it."""
    try:
        report = _of_these_weights(read_report(folder / REPORT_FILE), digests)
    except NOT_A_REPORT:  # nor is another program's file of that name
        return None
    if report is None:
        return None
    try:
        refuse_other_sampling(f"{folder / REPORT_FILE}", report, pipeline)
    except UserError as error:
        say(f"note: its scores are left out: {error}")
        return None
    return report


def scores_of(scores: Path, digests: Sequence[str]) -> dict[str, Any]:
    """Read a report of `hfgen evaluate`.

    Args:
        scores: its folder or file.
        digests: of the trained weights and, if they are rounded to 16 bits for publishing, of the rounded ones.

    Raises:
        UserError: if it is not a report, or belongs to other weights.
    """
    file = scores / REPORT_FILE if scores.is_dir() else scores
    try:
        report = _of_these_weights(read_report(file), digests)
    except NOT_A_REPORT as error:
        raise UserError(f"--scores {scores}: contains no {REPORT_FILE} from hfgen evaluate ({error!r})") from error
    if report is None:
        raise UserError(
            f"--scores {scores}: these scores belong to other weights; run hfgen evaluate for this pipeline"
        )
    return report


def _of_these_weights(report: dict[str, Any], digests: Sequence[str]) -> dict[str, Any] | None:
    """Return a report that says if the weights were rounded after it, and into which; None if it is of others."""
    plain = {name: value for name, value in report.items() if name not in ("before_rounding", "rounded_sha256")}
    if plain["weights_sha256"] == digests[-1]:
        return plain
    if plain["weights_sha256"] in digests or report.get("rounded_sha256") in digests:
        return plain | {"before_rounding": True, "rounded_sha256": digests[-1]}
    return None


def refuse_other_sampling(argument: str, report: dict[str, Any], pipeline: DiffusionPipeline) -> None:
    """Raise a `UserError` if images were sampled for a report in another way than the pipeline samples by default."""
    options = {"sampler": "--sampler", "sample_from": "--sample_from"}
    for name, own in way_of_sampling(pipeline).items():
        if report.get(name, own) != own:
            raise UserError(
                f"{argument}: measured with {report[name]}, but this pipeline samples with {own}; run hfgen evaluate "
                f"without {options[name]}"
            )


def save_pictures(pipeline: DiffusionPipeline, folder: Path, num_inference_steps: int | None) -> None:
    """Generate the card's pictures of a pipeline: samples, and interpolations or the denoising."""
    folder.mkdir(exist_ok=True)
    images = list(generate_images(pipeline, SamplingOptions(NUM_SAMPLES, 0, num_inference_steps, NUM_SAMPLES)))
    numbers = [str(index) for index in range(NUM_SAMPLES)]
    labelled_sheet(images, title="seed 0; image numbers below", captions=numbers).save(folder / "sheet.png")
    if family(pipeline) == "ddpm":
        size = pipeline.unet.config.sample_size
        side = size if isinstance(size, int) else max(size)
        rows = min(DENOISING_ROWS, max(1, DENOISING_ROWS * 64 // side))  # large images of noise are large files
        states, heads, _ = denoising_steps(pipeline, rows, 0, num_inference_steps)
        labelled_sheet(states, len(heads), heads=heads).save(folder / "denoising.png")
        return
    ends = latents_of_seeds(pipeline, range(WALKS + 1), None)
    parts = [step / (WALK_STEPS - 1) for step in range(WALK_STEPS)]
    walks = interpolated_images(pipeline, ends, parts, spherical=True)
    heads = ["a = 0", *(f"{step}/{WALK_STEPS - 1}" for step in range(1, WALK_STEPS - 1)), "1"]
    names = [f"seed {seed} to {seed + 1}" for seed in range(WALKS)]
    labelled_sheet(walks, WALK_STEPS, heads=heads, names=names).save(folder / "interpolation.png")


def add_pictures_of_run(run: Path, folder: Path) -> None:
    """Add a GIF of the training and its curves, if the run has the files for them."""
    try:
        frames = progress_frames(run, MAX_FRAMES)
    except UserError:  # no sheets, or different sizes
        frames = []
    if len(frames) > 1:
        write_gif([*frames, *frames[-1:] * 3], folder / "progress.gif", frame_seconds=0.5)
    if read_json_lines(run / METRICS_FILE, NEEDED):
        plot_curves([run]).savefig(folder / "curves.png", dpi=80)


def refuse_private_paths(folder: Path, paths: Sequence[str]) -> None:
    """Raise a `UserError` if a text file in a folder to publish contains a local path."""
    for file in sorted(folder.rglob("*")):
        if file.suffix in TEXT_FILES:
            text = file.read_text(encoding="utf-8")
            for path in paths:
                # Not as part of a longer word: "/cats" also occurs in "huggan/cats".
                if len(path) > 1 and re.search(rf"(?<![\w.-]){re.escape(path)}(?!\w)", text):
                    raise UserError(f"{file.name} would publish {path}, a path on this machine; nothing was uploaded")
