"""`hfgen compare`: several pipelines on the same terms, in one table and on one sheet."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfgen.cli_options import (
    BatchSize,
    Device,
    InceptionWeights,
    Reference,
    SampleFrom,
    Seed,
    Steps,
    require_new_folder,
)
from hfgen.errors import UserError
from hfgen.evaluate_command import MAX_DEFAULT_IMAGES


if TYPE_CHECKING:  # heavy, as everything that stands inside the functions
    from PIL import Image


LABEL_WIDTH = 150
COLUMNS = ("FID", "KID", "precision", "recall", "coverage", "copies", "parameters", "steps", "images/s")


def compare(
    pipelines: Annotated[list[str], typer.Argument(metavar="DIR...", help="runs, checkpoints, pipelines, Hub repos")],
    reference: Reference,
    output: Annotated[Path, typer.Option("--output", help="new folder for comparison.json, .md and sheet.png")],
    num_images: Annotated[
        int | None, typer.Option("--num_images", min=10, help="of each; as many as real ones if not given, up to 5000")
    ] = None,
    seed: Seed = 0,
    num_inference_steps: Steps = 50,
    steps: Annotated[
        str | None, typer.Option("--steps", help="of diffusion: a row for each of these, such as 10,25,50")
    ] = None,
    sample_from: SampleFrom = None,
    batch_size: BatchSize = 32,
    inception_weights: InceptionWeights = None,
    device: Device = "auto",
) -> None:
    """Score several pipelines against the same real images: quality, copies, size and speed side by side."""
    require_new_folder(output)
    all_steps = parse_steps(steps) if steps is not None else [num_inference_steps]
    from hfgen.data.settings import DataSettings
    from hfgen.inference import image_size, open_pipeline
    from hfgen.metrics.inception import InceptionFeatures, find_weights
    from hfgen.metrics.reference import load_reference
    from hfgen.scoring import score_pipeline

    # All are opened before the first is scored: a misspelt one must not cost the work on the others.
    loaded = {where: open_pipeline(where, device) for where in pipelines}
    sizes = {where: image_size(pipeline) for where, pipeline in loaded.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{where} {size}" for where, size in sizes.items())
        raise UserError(f"the pipelines draw images of several sizes and cannot be compared: {told} pixels")
    extractor = InceptionFeatures(find_weights(inception_weights), loaded[pipelines[0]].device)
    real = load_reference(DataSettings(reference, sample_size=sizes[pipelines[0]]), extractor)
    count = num_images or min(len(real.features), MAX_DEFAULT_IMAGES)

    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, list[Image.Image]]] = []
    for where, pipeline in loaded.items():
        source = sample_from if hasattr(pipeline, "vae") else None
        for wanted in all_steps if hasattr(pipeline, "unet") else [None]:
            scored = score_pipeline(pipeline, real, extractor, count, seed, wanted or 1, batch_size, source)
            rows.append({"name": where, "steps": wanted, **scored.report})
            shown.append((where if wanted is None else f"{where}, {wanted} steps", scored.shown))
            typer.echo(f"{shown[-1][0]}: FID {scored.report['scores']['fid']:.4g}")
    output.mkdir(parents=True, exist_ok=True)
    (output / "comparison.json").write_text(json.dumps({"reference": reference, "rows": rows}, indent=2) + "\n")
    (output / "comparison.md").write_text(table(rows))
    labelled_sheet(shown).save(output / "sheet.png")
    typer.echo(table(rows))
    typer.echo(f"comparison.json, comparison.md and sheet.png in {output}")


def parse_steps(text: str) -> list[int]:
    """Read numbers of denoising steps such as "10,25,50".

    Raises:
        UserError: if one is no number from 1.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--steps {text}: write numbers with commas between them") from error
    if min(numbers) < 1:
        raise UserError(f"--steps {text}: each must be at least 1")
    return numbers


def table(rows: list[dict[str, Any]]) -> str:
    """Write the scores of all pipelines as a table, the data's own floor below."""
    scores, floor = rows[0]["scores"], rows[0]["floor"]
    lines = [
        f"{scores['num_fake']:,} images of {rows[0]['sample_size']} pixels of each against {scores['num_real']:,} "
        f"real ones, seed {rows[0]['seed']}; features: {rows[0]['features']}. ±: standard error.",
        "",
        f"| pipeline | {' | '.join(COLUMNS)} |",
        "| --- " * (1 + len(COLUMNS)) + "|",
    ]
    for row in rows:
        one = row["scores"]
        cells = [
            f"{one['fid']:.4g} ± {one['fid_standard_error']:.2g}",
            f"{one['kid']:.4g} ± {one['kid_standard_error']:.2g}",
            *(f"{one[name]:.2f}" for name in ("precision", "recall", "coverage")),
            f"{row['memorisation']['num_copies']} of {row['memorisation']['num_fake']:,}",
            f"{row['num_parameters'] / 1e6:.1f}M",
            str(row["steps"] or 1),
            f"{row['drawing_images_per_second']:.4g}",
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    halves = floor["halves"]
    cells = [f"{halves['fid']:.4g}", f"{halves['kid']:.2g}"]
    cells += [f"{halves[name]:.2f}" for name in ("precision", "recall", "coverage")]
    name = f"floor: half of the real images against the other, {halves['num_fake']:,} each"
    lines.append(f"| {name} | {' | '.join(cells)} | | | | |")
    return "\n".join(lines) + "\n"


def labelled_sheet(rows: "list[tuple[str, list[Image.Image]]]") -> "Image.Image":
    """Draw a row of images for each name, the name beside it."""
    from PIL import Image, ImageDraw

    from hfgen.figures import image_sheet

    strips = [image_sheet(images, columns=len(images)) for _, images in rows]
    height = strips[0].height + 4
    sheet = Image.new("RGB", (LABEL_WIDTH + strips[0].width, height * len(rows)), "white")
    for index, ((name, _), strip) in enumerate(zip(rows, strips, strict=True)):
        sheet.paste(strip, (LABEL_WIDTH, index * height))
        # The end of a path says more than its beginning.
        ImageDraw.Draw(sheet).text((4, index * height + strip.height // 2 - 6), name[-24:], fill="black")
    return sheet
