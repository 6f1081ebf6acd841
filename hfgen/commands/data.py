"""`hfgen data inspect` and `hfgen data floor`: what a dataset contains, and how it scores against itself."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hfgen.arguments import errors_name_dataset_as
from hfgen.commands.options import (
    DatasetColumn,
    DatasetConfig,
    DatasetSplit,
    Device,
    FeatureMode,
    Features,
    FeatureWeights,
    Seed,
    dataset_of,
    in_range,
    loading,
    refuse_to_replace,
    require_new_folder,
    start_new_folder,
)
from hfgen.files import write_text_atomically, writing
from hfgen.ranges import PIXELS, SCORED_IMAGES
from hfgen.texts import say, say_lines


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="image folder, Hub dataset or other --dataset value")],
    sample_size: Annotated[
        int, typer.Option("--sample_size", callback=in_range(PIXELS), help="training size in pixels")
    ] = 64,
    dataset_config: DatasetConfig = None,
    dataset_split: DatasetSplit = "train",
    dataset_column: DatasetColumn = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the full report to this file")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="new folder for pictures of the data and of each augmentation")
    ] = None,
) -> None:
    """Report what a dataset contains: counts, sizes, modes, unreadable files, duplicates."""
    if output is not None:
        require_new_folder(output, path)
    if json_file is not None:
        refuse_to_replace(json_file, "--json")
    from hfgen.data.settings import DataSettings
    from hfgen.data.store import load_images

    with errors_name_dataset_as("PATH"):
        settings = DataSettings(path, dataset_config, dataset_split, dataset_column, sample_size=sample_size)
        images = load_images(settings)
    say_lines(str(images.report))
    if json_file is not None:
        write_text_atomically(json_file, json.dumps(images.report.to_dict(), indent=1) + "\n")
    if output is not None:
        from hfgen.inference.data_figures import augmentation_sheet, data_sheet

        with errors_name_dataset_as("PATH"):
            augmented = augmentation_sheet(settings, images.report.grey_bits)
        start_new_folder(output)
        with writing(output):
            data_sheet(images).save(output / "images.png")
            augmented.save(output / "augmentations.png")
        say(f"images.png and augmentations.png in {output}")


def floor(
    path: Annotated[str, typer.Argument(metavar="PATH", help="image folder, Hub dataset or other --dataset value")],
    sample_size: Annotated[
        int, typer.Option("--sample_size", callback=in_range(PIXELS), help="image size in pixels")
    ] = 64,
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num_images",
            callback=in_range(SCORED_IMAGES),
            help="number of images that you plan to generate; that many real images, at most half, are scored against "
            "the rest; unset: half",
        ),
    ] = None,
    seed: Seed = 0,
    dataset_config: DatasetConfig = None,
    dataset_split: DatasetSplit = "train",
    dataset_column: DatasetColumn = None,
    features: Features = "inception",
    mode: FeatureMode = "clean",
    feature_weights: FeatureWeights = None,
    device: Device = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="also write all scores to this file")] = None,
) -> None:
    """Score some images of a dataset, at most half of them, against the others, and a resample against all."""
    if json_file is not None:
        refuse_to_replace(json_file, "--json")
    with loading():
        from hfgen.evaluation.reference import open_reference
        from hfgen.inference.opening import choose_device
        from hfgen.metrics.report import score_names, to_json

    data = dataset_of("PATH", path, sample_size, dataset_config, dataset_split, dataset_column)
    real = open_reference(data, choose_device(device), features, mode, feature_weights, "PATH")
    count = num_images or len(real.features)
    scores = real.floor(count, seed)
    split, identity = scores["split"], real.extractor.identity
    names = score_names(identity)
    say(f"{path}: {len(real.features):,} images of {sample_size} pixels, seed {seed}; features: {identity}")
    say_lines(
        f"{split['num_fake']:,} of them against the other {split['num_real']:,}: "
        f"{names['fid']} {split['fid']:.4g} ± {split['fid_standard_error']:.2g}, "
        f"{names['kid']} {split['kid']:.2g} ± {split['kid_standard_error']:.2g}, "
        f"precision {split['precision']:.2f}, recall {split['recall']:.2f}, density {split['density']:.2f}, "
        f"coverage {split['coverage']:.2f}, {names['mifid']} {split['mifid']:.4g}\n"
        f"{count:,} sampled with replacement, against all: {names['fid']} {scores['fid_at_n']:.4g}"
    )
    if json_file is not None:
        write_text_atomically(json_file, to_json(scores))
