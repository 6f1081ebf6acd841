"""The training scripts of a study: those of hfgen, or a user's own copies in `training_scripts/`."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import hfgen.training_scripts


METHODS = {"ddpm": "train_ddpm", "gan": "train_gan", "vae": "train_vae"}
SHIPPED_SCRIPTS = Path(hfgen.training_scripts.__file__).resolve().parent
OWN_SCRIPTS = "training_scripts"


def find_scripts() -> Path:
    """Return the folder of the training scripts: that of the working folder if there is one, else hfgen's."""
    own = Path(OWN_SCRIPTS)
    return own.resolve() if (own / f"{METHODS['gan']}.py").is_file() else SHIPPED_SCRIPTS


@functools.cache
def import_script(scripts: Path, method: str) -> ModuleType:
    """Import a training script for its settings and presets, without training.

    Args:
        scripts: folder of the training scripts.
        method: "ddpm", "gan" or "vae".
    """
    if scripts == SHIPPED_SCRIPTS:
        from hfgen.training_scripts import train_ddpm, train_gan, train_vae  # slow to import

        return {"ddpm": train_ddpm, "gan": train_gan, "vae": train_vae}[method]
    spec = importlib.util.spec_from_file_location(f"own_{METHODS[method]}", scripts / f"{METHODS[method]}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def launch_arguments(scripts: Path, method: str) -> list[str]:
    """Return the arguments of `accelerate launch` that name a training script."""
    if scripts == SHIPPED_SCRIPTS:
        return ["-m", f"hfgen.training_scripts.{METHODS[method]}"]
    return [str(scripts / f"{METHODS[method]}.py")]
