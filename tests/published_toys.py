"""Toy runs of every family for the tests of publishing, and what belongs into what is published of them."""

from pathlib import Path

from toy_runs import train


FAMILIES = {
    "gan": ("gan",),
    "vae": ("vae",),
    "ddpm": ("ddpm",),
    "library": ("ddpm", "--unet", "library"),
    "edm": ("ddpm", "--formulation", "edm", "--unet", "compact"),
}
CODE = {
    "gan": {"pipeline_gan.py", "generator/dcgan.py"},
    "vae": {"pipeline_vae.py", "vae/vae.py", "density/gaussian_mixture.py"},
    "ddpm": {"pipeline_ddpm.py", "unet/unet_base.py"},
    "library": set(),
    "edm": {"pipeline_ddpm.py", "unet/unet_compact.py"},
}
PARTS = {
    "gan": ("generator",),
    "vae": ("vae", "density"),
    "ddpm": ("unet",),
    "library": ("unet",),
    "edm": ("unet",),
}
OF_A_RUN = {"README.md", "model_index.json", "training_config.json", "training.json", "metrics.jsonl"}


def train_toys(root: Path) -> dict[str, Path]:
    """Train a run of each family; return their folders."""
    for name, arguments in FAMILIES.items():
        train(arguments[0], root / name, "--cache_dir", str(root / "cache"), "--sample_every", "2", *arguments[1:])
    return {name: root / name for name in FAMILIES}


def files_to_publish(name: str) -> set[str]:
    """Return the paths of all that may go up of a toy run, beside scores."""
    parts = {
        f"{part}/{file}" for part in PARTS[name] for file in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    shown = {"sheet", "curves", "denoising" if "unet" in PARTS[name] else "interpolation"}
    pictures = {f"samples/{picture}.png" for picture in shown} | {"samples/progress.gif"}
    schedule = {"scheduler/scheduler_config.json"} if "unet" in PARTS[name] else set()
    return OF_A_RUN | CODE[name] | parts | pictures | schedule
