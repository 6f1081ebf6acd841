"""Arguments, options and checks that several commands have in common."""

from pathlib import Path
from typing import Annotated

import typer

from hfgen.errors import UserError


PipelineFolder = Annotated[str, typer.Argument(metavar="DIR", help="a run, a checkpoint, a pipeline, or a Hub repo")]
Steps = Annotated[
    int | None,
    typer.Option("--num_inference_steps", min=1, help="denoising steps; as many as were saved with it if not given"),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="the same seed draws the same images")]
Sampler = Annotated[str | None, typer.Option("--sampler", help="ddim, dpm, unipc or ddpm; as saved if not given")]
SampleFrom = Annotated[
    str | None,
    typer.Option(
        "--sample_from", help="latents of a VAE: prior, or ex_post, which is the default where it was fitted"
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")]
Reference = Annotated[str, typer.Option("--reference", help="the real images; what --dataset takes")]
DatasetSplit = Annotated[str, typer.Option("--dataset_split", help="split of a Hub data set")]
DatasetColumn = Annotated[str | None, typer.Option("--dataset_column", help="column or feature that holds the images")]
Features = Annotated[str, typer.Option("--features", help="inception, dinov2 or clip: where images are compared")]
FeatureMode = Annotated[
    str, typer.Option("--mode", help="how Inception's images are resized: clean (clean-fid's) or legacy")
]
FeatureWeights = Annotated[
    str | None,
    typer.Option(
        "--feature_weights",
        help="TorchScript file of Inception, found by itself if installed; folder or Hub repo of the other two",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="drawn at once; bounds the memory")]


def require_new_folder(output: Path) -> None:
    """Raise a `UserError` if there is something in the folder that a command is to fill."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not empty; choose another folder")
