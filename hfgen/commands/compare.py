"""`hfgen compare`: several pipelines scored alike, in one table and on one sheet."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hfgen.commands.options import (
    MAX_DEFAULT_IMAGES,
    BatchSize,
    DatasetColumn,
    DatasetConfig,
    DatasetSplit,
    Device,
    FeatureMode,
    Features,
    FeatureWeights,
    Reference,
    SampleFrom,
    ScoredImages,
    Seed,
    Steps,
    absolute_if_path,
    dataset_of,
    loading,
    parse_numbers,
    require_new_folder,
    start_new_folder,
    trained_on_reference,
)
from hfgen.errors import UserError, message_for_user
from hfgen.files import writing
from hfgen.ranges import COUNT
from hfgen.texts import markdown_text, say, say_lines


if TYPE_CHECKING:  # slow to import, like the imports inside the functions
    from diffusers import DiffusionPipeline
    from PIL import Image

    from hfgen.evaluation.scoring import Scored


COLUMNS = ("precision", "recall", "coverage", "copies", "copies by pixels", "parameters", "steps", "images/s")


def compare(
    pipelines: Annotated[list[str], typer.Argument(metavar="DIR...", help="runs, checkpoints, pipelines, Hub repos")],
    reference: Reference,
    output: Annotated[Path, typer.Option("--output", help="new folder for comparison.json, .md and sheet.png")],
    dataset_config: DatasetConfig = None,
    dataset_split: DatasetSplit = "train",
    dataset_column: DatasetColumn = None,
    num_images: ScoredImages = None,
    seed: Seed = 0,
    num_inference_steps: Steps = None,
    steps: Annotated[
        str | None, typer.Option("--steps", help="denoising steps to compare, such as 10,25,50; a row for each")
    ] = None,
    sample_from: SampleFrom = None,
    batch_size: BatchSize = 32,
    features: Features = "inception",
    mode: FeatureMode = "clean",
    feature_weights: FeatureWeights = None,
    device: Device = "auto",
) -> None:
    """Score several pipelines against the same real images: quality, copies, size and speed side by side."""
    require_new_folder(output, reference, pipelines)
    all_steps = parse_steps(steps) if steps is not None else [num_inference_steps]
    with loading():
        from hfgen.evaluation.reference import open_reference
        from hfgen.evaluation.scoring import score_pipeline
        from hfgen.families import family
        from hfgen.inference.sampling import SamplingOptions

    loaded, size = open_all(pipelines, device)
    refuse_unused({family(pipeline) for pipeline in loaded.values()}, steps, num_inference_steps, sample_from)
    check_options(loaded, all_steps, sample_from)
    data = dataset_of("--reference", reference, size, dataset_config, dataset_split, dataset_column)
    real = open_reference(data, loaded[pipelines[0]].device, features, mode, feature_weights)
    count = num_images or min(len(real.features), MAX_DEFAULT_IMAGES)
    trained_on = trained_on_reference(list(loaded), data, real)
    results: list[Result] = []
    failures: list[str] = []
    try:
        for where, pipeline in loaded.items():
            source = sample_from if family(pipeline) == "vae" else None
            for asked in all_steps if family(pipeline) == "ddpm" else [None]:
                options = SamplingOptions(count, seed, asked, batch_size, sample_from=source)
                try:
                    scored = score_pipeline(pipeline, real, options, trained_on=trained_on[where])
                except Exception as error:  # it does not cost the others their scores
                    if (message := message_for_user(error)) is None:
                        raise
                    failures.append(where if asked is None else f"{where} in {asked} steps")
                    say(f"warning: {failures[-1]}: {message}", err=True)
                else:
                    results.append(named_result(where, scored))
                    say(": ".join(results[-1].label.splitlines()))
    finally:  # what has been scored outlives an interruption, too
        if results:
            write_comparison(output, absolute_if_path(reference), results)
    if failures:
        kept = f"; the others are in {output}" if results else ""
        raise UserError(f"could not be scored, for the reasons above: {', '.join(failures)}{kept}")


class Result(NamedTuple):
    """What a comparison shows of a pipeline, or of one number of steps of it.

    Attributes:
        row: its name, number of steps and report, for the table.
        label: its name, steps and FID, on two lines.
        shown: a row of its images.
    """

    row: dict[str, Any]
    label: str
    shown: "Image.Image"


def named_result(where: str, scored: "Scored") -> Result:
    """Name the scores and images of the pipeline in `where`."""
    from hfgen.inference.figures import labelled_sheet
    from hfgen.metrics.report import score_names

    row = {"name": where, "steps": scored.report["num_inference_steps"], **scored.report}
    name = where if row["steps"] is None else f"{where}, {row['steps']} steps"
    fid = f"{score_names(row['features'])['fid']} {row['scores']['fid']:.4g}"
    return Result(row, f"{name}\n{fid}", labelled_sheet(scored.shown, columns=len(scored.shown)))


def write_comparison(output: Path, reference: str, results: list[Result]) -> None:
    """Write the table and the sheet into a new folder, the lowest FID first, and print the table."""
    from hfgen.inference.figures import labelled_rows
    from hfgen.metrics.report import to_json

    rows = [result.row for result in results]
    best_first = sorted(results, key=lambda result: at_the_end_if_nan(result.row["scores"]["fid"]))
    sorted_rows = [result.row for result in best_first]
    say_lines(table(sorted_rows, warns=False))  # before anything that may fail
    start_new_folder(output)
    with writing(output):
        (output / "comparison.json").write_text(to_json({"reference": reference, "rows": rows}))
        (output / "comparison.md").write_text(table(sorted_rows), encoding="utf-8")
        labelled_rows([(result.label, result.shown) for result in best_first]).save(output / "sheet.png")
    say(f"comparison.json, .md and sheet.png in {output}")


def open_all(pipelines: list[str], device: str) -> "tuple[dict[str, DiffusionPipeline], int]":
    """Open all pipelines before scoring any, so that a misspelt one fails at once.

    Returns:
        The pipelines by their argument, and the height and width of their images in pixels.

    Raises:
        UserError: if one is given twice or cannot be opened, or their image sizes differ.
    """
    from hfgen.inference.opening import open_pipeline
    from hfgen.inference.sampling import image_size

    places = [os.path.realpath(os.path.expanduser(where)) for where in pipelines]
    if len(set(places)) < len(places):
        raise UserError(f"{' '.join(pipelines)}: give each pipeline only once")
    loaded = {where: open_pipeline(where, device) for where in pipelines}
    sizes = {where: image_size(pipeline) for where, pipeline in loaded.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{where} {size}" for where, size in sizes.items())
        raise UserError(
            f"the pipelines cannot be compared, because their image sizes differ: {listed} pixels; score "
            "images of each, from hfgen sample, with hfgen evaluate-images at one --sample_size"
        )
    return loaded, sizes[pipelines[0]]


def refuse_unused(
    families: set[str], steps: str | None, num_inference_steps: int | None, sample_from: str | None
) -> None:
    """Raise a `UserError` for an option that no pipeline of these families uses."""
    if steps is not None and num_inference_steps is not None:
        raise UserError("--steps --num_inference_steps: both set the number of denoising steps; use only one of them")
    if (steps is not None or num_inference_steps is not None) and "ddpm" not in families:
        raise UserError("--steps and --num_inference_steps apply only to diffusion models; leave them out")
    if sample_from is not None and "vae" not in families:
        raise UserError(f"--sample_from {sample_from}: applies only to a VAE; leave it out")


def check_options(
    loaded: "dict[str, DiffusionPipeline]", all_steps: Sequence[int | None], sample_from: str | None
) -> None:
    """Raise a `UserError` for what a pipeline cannot do, before any of them is scored for a long time."""
    from hfgen.families import family

    for where, pipeline in loaded.items():
        kind = family(pipeline)
        if kind == "ddpm" and (most := max(steps or 1 for steps in all_steps)) > (
            trained := pipeline.scheduler.config.num_train_timesteps
        ):
            raise UserError(
                f"{where} takes at most {trained} denoising steps, not {most}; leave it out, or give fewer"
            )
        if kind == "vae" and sample_from not in (None, "prior", "ex_post"):
            raise UserError(f"--sample_from {sample_from}: must be prior or ex_post")
        if kind == "vae" and sample_from == "ex_post" and pipeline.density is None:
            raise UserError(f"--sample_from ex_post: {where} has no ex-post density; use prior, or leave it out")


def parse_steps(text: str) -> list[int]:
    """Parse numbers of denoising steps such as "10,25,50"; one that is repeated counts once.

    Raises:
        UserError: if one is not a whole number from 1.
    """
    numbers = parse_numbers("--steps", text)
    if min(numbers) < 1:
        raise UserError(f"--steps {text}: each must be at least 1")
    COUNT.check("--steps", max(numbers))
    return list(dict.fromkeys(numbers))


def table(rows: list[dict[str, Any]], warns: bool = True) -> str:
    """Format the scores of all pipelines as a table, the best of each in bold, with the data's own floor below.

    Args:
        rows: reports of the pipelines.
        warns: name those that were trained on other data than the reference, unless a warning has.
    """
    from hfgen.metrics.report import OTHER_DATA, floor_name, of_a_subset, score_names

    scores, floor, names = rows[0]["scores"], rows[0]["floor"], score_names(rows[0]["features"])
    head = ["pipeline", names["fid"], names["kid"], *COLUMNS]
    lines = [
        f"{scores['num_fake']:,} images of {rows[0]['sample_size']} pixels from each against {scores['num_real']:,} "
        f"real ones, seed {rows[0]['seed']}; features: {rows[0]['features']}. ±: standard error. Bold: the best.",
        "",
        f"| {' | '.join(head)} |",
        "| --- " * len(head) + "|",
    ]
    best = best_scores(rows)
    for row in rows:
        one = row["scores"]
        scored = {
            "fid": f"{one['fid']:.4g} ± {one['fid_standard_error']:.2g}",
            "kid": f"{one['kid']:.4g} ± {one['kid_standard_error']:.2g}",
            **{name: f"{one[name]:.2f}" for name in ("precision", "recall", "coverage")},
        }
        cells = [f"**{cell}**" if one[name] == best[name] else cell for name, cell in scored.items()]
        cells += [
            *(str(row[kind]["num_copies"]) for kind in ("memorisation", "memorisation_by_pixels")),
            f"{row['num_parameters'] / 1e6:.1f}M",
            str(row["steps"] or 1),
            f"{row['drawing_images_per_second']:.4g}",
        ]
        lines.append(f"| {markdown_text(row['name'])} | {' | '.join(cells)} |")
    others = list(dict.fromkeys(row["name"] for row in rows if row.get("trained_on_reference") is False))
    split = floor["split"]
    cells = [f"{split['fid']:.4g}", f"{split['kid']:.2g}"]
    cells += [f"{split[name]:.2f}" for name in ("precision", "recall", "coverage")]
    lines.append(f"| {floor_name(split)} | {' | '.join(cells)} | | | | | |")
    if subset := of_a_subset(rows[0]):
        lines += ["", subset]
    if others and warns:
        lines += ["", f"Warning: {markdown_text(', '.join(others))}: {OTHER_DATA}."]
    decoded = {row["name"]: row["reconstructions"] for row in rows if "reconstructions" in row}
    if decoded:
        count = next(iter(decoded.values()))["num_images"]
        listed = ", ".join(f"{markdown_text(name)} {part['fid']:.4g}" for name, part in decoded.items())
        lines += ["", f"{names['fid']} of {count:,} real images after encoding and decoding: {listed}."]
    return "\n".join(lines) + "\n"


def best_scores(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the best of each score of the table; None if there is one row, or no score above 0 or finite."""
    best: dict[str, float | None] = {}
    for name, choose in {"fid": min, "kid": min, "precision": max, "recall": max, "coverage": max}.items():
        found = [row["scores"][name] for row in rows if math.isfinite(row["scores"][name])]
        chosen = choose(found, default=None)
        best[name] = None if len(rows) == 1 or (choose is max and not chosen) else chosen
    return best


def at_the_end_if_nan(score: float) -> float:
    """Return a score for sorting, the lowest first."""
    return score if math.isfinite(score) else math.inf
