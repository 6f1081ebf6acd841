"""The training scripts of a study: for each method a user's own copy in `training_scripts/`, or that of hfgen."""

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import hfgen.training_scripts
from hfgen.errors import UserError


METHODS = {"ddpm": "train_ddpm", "gan": "train_gan", "vae": "train_vae"}
SHIPPED_SCRIPTS = Path(hfgen.training_scripts.__file__).resolve().parent
OWN_SCRIPTS = "training_scripts"
PRESETS, STUDIES = "presets", "studies"


def find_scripts() -> Path:
    """Return the working folder's `training_scripts/` if it has anything of a study's, else hfgen's.

    What it lacks is hfgen's: see `own_scripts`, `presets_of` and `study_folders`.
    """
    own = Path(OWN_SCRIPTS)
    parts = (*(f"{name}.py" for name in METHODS.values()), PRESETS, STUDIES)
    return own.resolve() if any((own / part).exists() for part in parts) else SHIPPED_SCRIPTS


def own_scripts(scripts: Path, methods: Iterable[str]) -> dict[str, Path]:
    """Return the user's own training scripts by method; hfgen's are used for the methods without one.

    Args:
        scripts: from `find_scripts`.
        methods: "ddpm", "gan" and "vae", or some of them.
    """
    files = {method: scripts / f"{METHODS[method]}.py" for method in sorted(set(methods))}
    return {method: file for method, file in files.items() if scripts != SHIPPED_SCRIPTS and file.is_file()}


def script_digests(scripts: Path, methods: Iterable[str]) -> dict[str, str | None]:
    """Return the SHA-256 of each own training script, by method; None if it is hfgen's, or an unchanged copy of it."""
    digests: dict[str, str | None] = dict.fromkeys(sorted(set(methods)))
    for method, file in own_scripts(scripts, digests).items():
        content = file.read_bytes()
        if content != (SHIPPED_SCRIPTS / file.name).read_bytes():
            digests[method] = hashlib.sha256(content).hexdigest()
    return digests


def script_differences(stored: dict[str, str | None], here: dict[str, str | None]) -> list[str]:
    """List the training scripts that are others here than in a stored study, one line each; from `script_digests`."""
    return [
        f"{OWN_SCRIPTS}/{METHODS[method]}.py: {_shown(stored[method])} -> {_shown(here[method])}"
        for method in stored
        if method in here and stored[method] != here[method]
    ]


def _shown(digest: str | None) -> str:
    return "hfgen's" if digest is None else f"your own with SHA-256 {digest[:12]}"


def require_same_scripts(stored: dict[str, str | None], here: dict[str, str | None], otherwise: str = "") -> None:
    """Refuse to train a stored study's remaining cells by other scripts than those before.

    Args:
        stored: digests of the study's scripts.
        here: digests of those that would train.
        otherwise: what else the user can do, as an end of the sentence.

    Raises:
        UserError: if one of them differs.
    """
    if changes := script_differences(stored, here):
        raise UserError(
            "the study was begun with other training scripts than there are here (study -> here):\n  "
            + "\n  ".join(changes)
            + f"\nStart it in a folder whose {OWN_SCRIPTS}/ has those of the study (for hfgen's, move your own away)"
            + otherwise
        )


def presets_of(scripts: Path, method: str) -> Path:
    """Return the folder of a method's presets: the user's own if there is one, else the script's."""
    own = scripts / PRESETS / method
    return own if own.is_dir() else import_script(scripts, method).PRESETS


def study_folders() -> list[Path]:
    """Return the folders of study files that can be named without their path, the user's own first."""
    return [scripts / STUDIES for scripts in dict.fromkeys((find_scripts(), SHIPPED_SCRIPTS))]


@functools.cache
def import_script(scripts: Path, method: str) -> ModuleType:
    """Import a training script for its settings and presets, without training.

    Args:
        scripts: from `find_scripts`.
        method: "ddpm", "gan" or "vae".
    """
    own = own_scripts(scripts, [method])
    if not own:
        from hfgen.training_scripts import train_ddpm, train_gan, train_vae  # slow to import

        return {"ddpm": train_ddpm, "gan": train_gan, "vae": train_vae}[method]
    spec = importlib.util.spec_from_file_location(f"own_{METHODS[method]}", own[method])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def launch_arguments(scripts: Path, method: str) -> list[str]:
    """Return the arguments of `accelerate launch` that name a training script."""
    own = own_scripts(scripts, [method])
    return [str(own[method])] if own else ["-m", f"hfgen.training_scripts.{METHODS[method]}"]
