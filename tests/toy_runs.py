"""Runs of each training script at toy size."""

import functools
import json

from conftest import load_script


TINY = [
    *("--dataset", "toy_paintings:24", "--sample_size", "16", "--batch_size", "4", "--mixed_precision", "no", "--cpu"),
    *("--num_sample_images", "2", "--report_to", "none", "--max_train_steps", "6", "--evaluate_num_images", "12"),
    *("--checkpoint_every", "2", "--checkpoints_total_limit", "9", "--log_every", "1"),
    *("--sample_every", "1000"),
]
METHODS = {
    "gan": [
        *("--latent_dim", "6", "--generator_channels", "4", "--discriminator_channels", "4", "--watch_every", "0"),
        *("--statistics_images", "32"),
    ],
    "ddpm": ["--block_out_channels", "8", "16", "--num_inference_steps", "2", "--lr_warmup_steps", "0"],
    "vae": [
        *("--latent_dim", "6", "--block_out_channels", "4", "8", "--lr_warmup_steps", "0", "--watch_every", "0"),
        *("--density_components", "2"),
    ],
}


@functools.cache
def script(kind):
    """The module of a training script: gan, ddpm or vae."""
    return load_script(f"train_{kind}", f"train_{kind}_at_toy_size")


def train(kind, folder, *arguments):
    """Train; what is in `arguments` wins."""
    script(kind).main([*TINY, *METHODS[kind], "--output_dir", str(folder), *map(str, arguments)])


def checkpoint(folder, step):
    return folder / "checkpoints" / f"step-{step:08d}"


def events(folder):
    file = folder / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def files_of(folder):
    """The content of all files below a folder, by path, but for those that hold times."""
    with_times = ("digests.json", "index.html", ".lock-holder")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in with_times)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
