"""Adds to a plain pipeline class loading that runs no code from the folder, and publishing.

The plain classes save a self-contained folder: weights, configuration, and the source files of the pipeline and of
each network that diffusers does not ship, for `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
`from_pretrained` here uses the installed classes instead and never reads those files.
"""

import ast
import contextlib
import inspect
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from huggingface_hub import snapshot_download

from hfgen.hub.card import SETTINGS_FILE, is_somebodys_own, variant_of, write_card
from hfgen.hub.upload import check_access, read_card, upload


SHIPPED_IMPORTS = {"torch", "diffusers", *sys.stdlib_module_names}
PIPELINE_FOLDER = "pipeline"  # in the folder of a run
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")


class SelfContainedPipelineMixin:
    """Mixed into the plain pipeline classes in `hfgen.pipelines`.

    Attributes:
        component_classes: hfgen's networks that the pipeline may contain.
    """

    component_classes: tuple[type, ...] = ()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as the plain class does, after checking that the networks' files can be published on their own.

        Raises:
            ValueError: if a file imports more than torch, diffusers and the standard library, or its name is that of
                one of diffusers' pipelines.
        """
        for part in self.components.values():  # type: ignore[attr-defined]
            kind = type(getattr(part, "_orig_mod", part))  # of a compiled network, the one inside
            if part is not None and kind.__module__.split(".")[0] not in ("diffusers", "transformers"):
                _check_stands_alone(kind)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        make_weights_readable(Path(save_directory))

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Upload the pipeline with its code and a card, in one commit; arguments as in diffusers.

        `hfgen publish` does the same for a run, with its scores and pictures. Here the card says that nothing was
        measured; a hand-written card in the repo is kept.

        Args:
            repo_id: "user/name", or "name" for your own repo.
            commit_message: default: "Upload" and the class name.
            private: make a new repo private; fails if the repo exists and is public.
            token: Hub token; if None, that of the current login.
            create_pr: open a pull request instead of committing.
            safe_serialization: save weights as safetensors; must be True.
            variant: variant in the weights' file names, such as "fp16"; the card names it. Earlier weights in the
                repo are replaced, whatever their variant.
            subfolder: must be None: the loaders look for the index at the top of a repo.

        Returns:
            The URL of the commit.

        Raises:
            UserError: if the Hub refuses; the message says what to do.
            ValueError: for pickled weights or a subfolder.
        """
        if not safe_serialization or subfolder:
            raise ValueError(
                "push_to_hub uploads safetensors to the top of the repo: leave out safe_serialization and subfolder"
            )
        target = check_access(repo_id, bool(private), token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            if not is_somebodys_own(read_card(target)):
                write_card(Path(folder), target.repo_id)
            message = commit_message or f"Upload {type(self).__name__}"
            return upload(Path(folder), target, message, create_pr).address

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Load from a folder, a run (its newest pipeline) or a Hub repo, with hfgen's classes, as in diffusers.

        No code from the folder or repo is run, so `trust_remote_code` is not needed. Weights are read only from
        safetensors, unless `use_safetensors=False` is given. If there is only one variant of them, such as "fp16", it
        need not be named. A pipeline of diffusers' own classes does not store its number of denoising steps: that of
        its run is taken.
        """
        kwargs.pop("trust_remote_code", None)
        kwargs.setdefault("use_safetensors", True)
        folder = str(pretrained_model_name_or_path)
        if not os.path.isdir(folder):
            hub_arguments = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
            unused = ["*.py", "*.md", "samples/*", "discriminator/*"]
            folder = snapshot_download(folder, ignore_patterns=unused, **hub_arguments)
        if not os.path.isfile(os.path.join(folder, "model_index.json")):
            folder = str(pipeline_of_run(Path(folder)) or folder)
        if kwargs["use_safetensors"] and (variant := variant_of(Path(folder))):
            kwargs.setdefault("variant", variant)
        pipeline = super().from_pretrained(folder, **kwargs)  # type: ignore[misc]
        if "num_inference_steps" not in kwargs and (steps := steps_of_the_run(Path(folder))) is not None:
            pipeline.register_to_config(num_inference_steps=steps)
        for part in pipeline.components.values():
            if isinstance(part, UNet2DModel):  # hfgen's own networks align their weights themselves
                for tensor in (*part.parameters(), *part.buffers()):
                    tensor.data = tensor.data.clone()
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, torch_dtype: torch.dtype | None = None, **parts: Any):
        """Make a pipeline of the parts of another one, without copying them, as in diffusers.

        Args:
            pipeline: of the same family.
            torch_dtype: convert the networks, which both pipelines share, to this type.
            parts: networks, a scheduler or settings in the place of the other's.
        """
        names = inspect.signature(cls).parameters.keys()
        before = {name: value for name, value in {**pipeline.config, **pipeline.components}.items() if name in names}
        made = cls(**before | parts)
        return made if torch_dtype is None else made.to(torch_dtype)  # type: ignore[attr-defined]

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any):
        """Read `model_index.json`, replacing the source files next to the weights by the installed classes.

        diffusers' `from_pretrained` reads the index through this method to find out which classes to load.
        """
        loaded = super().load_config(*args, **kwargs)  # type: ignore[misc]
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        index["_class_name"] = cls.__name__
        installed = {component.__name__: component for component in cls.component_classes}
        for name, entry in index.items():
            if isinstance(entry, list | tuple) and len(entry) == 2 and entry[1] in installed:
                index[name] = [installed[entry[1]].__module__, entry[1]]
        return loaded


def make_weights_readable(folder: Path) -> None:
    """Let those who may read a pipeline's index read its weights: safetensors writes them for their owner alone."""
    mode = (folder / "model_index.json").stat().st_mode
    for file in folder.glob("*/*.safetensors"):
        with contextlib.suppress(OSError):  # a disk without such permissions
            file.chmod(mode)


def pipeline_of_run(run: Path) -> Path | None:
    """Return the folder of a run's newest pipeline, or None if it has none.

    That is `pipeline/`, written when a launch ends, or, if the run has gone on since, that of the newest checkpoint of
    healthy training; before a launch has ended, that of the newest checkpoint.
    """
    final, later = run / PIPELINE_FOLDER, []
    step = _progress(final).get("step", math.inf)  # an earlier version did not write it
    for checkpoint in run.glob("checkpoints/step-*"):
        is_whole = (checkpoint / "progress.json").is_file() and re.fullmatch(r"step-\d+", checkpoint.name)
        if is_whole and (checkpoint / PIPELINE_FOLDER / "model_index.json").is_file():
            is_good, at = _progress(checkpoint).get("good", True), int(checkpoint.name.removeprefix("step-"))
            later.append((is_good, at, checkpoint / PIPELINE_FOLDER))
    if not (final / "model_index.json").is_file():
        return max(((at, folder) for _, at, folder in later), default=(0, None))[1]
    good = [(at, folder) for is_good, at, folder in later if is_good and at > step]
    return max(good, default=(step, final))[1]


def _progress(folder: Path) -> dict[str, Any]:
    """Return what is noted beside the pipeline of a run or in a checkpoint; empty if it is missing or damaged."""
    try:
        found = json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def steps_of_the_run(folder: Path) -> int | None:
    """Return the number of denoising steps of a run for a pipeline that stores none; None for all others.

    Args:
        folder: of the pipeline, in a run or alone; published, it has the run's settings.
    """
    if "num_inference_steps" in json.loads((folder / "model_index.json").read_text()):
        return None
    is_of_a_run = re.fullmatch(rf"(abandoned\d*-)?{PIPELINE_FOLDER}", folder.name)  # or RUN/checkpoints/STEP/pipeline
    of_a_run = folder.resolve().parents[:3] if is_of_a_run else []
    for file in (place / SETTINGS_FILE for place in (folder, *of_a_run)):
        if file.is_file():
            steps = json.loads(file.read_text()).get("num_inference_steps")
            return steps if isinstance(steps, int) and steps > 0 else None
    return None


def _check_stands_alone(network: type) -> None:
    """Raise a `ValueError` if a network's file would not load where only torch and diffusers are installed."""
    file = Path(inspect.getfile(network))
    if hasattr(diffusers.pipelines, file.stem):
        raise ValueError(
            f"{file.name} has the name of a diffusers pipeline, which would be loaded in its place; rename it"
        )
    for node in ast.walk(ast.parse(file.read_text())):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = ["." if node.level else node.module or ""]
        for module in imported:
            if module.split(".")[0] not in SHIPPED_IMPORTS:
                raise ValueError(
                    f"{file.name} imports {module}, but is published alone: it may import only torch and diffusers"
                )
