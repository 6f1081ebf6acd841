"""Saving a pipeline so that it loads anywhere, and loading it without running any code from its folder.

`save_pretrained` writes, beside weights and configuration, the source file of the pipeline and of each network that
diffusers does not ship, so that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` needs no hfgen.
`from_pretrained` of the classes here takes the installed classes instead and never looks at those files.
"""

import ast
import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import snapshot_download


SHIPPED_IMPORTS = {"torch", "diffusers", *sys.stdlib_module_names}
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")


class SelfContainedPipelineMixin:
    """Joined with a plain pipeline class in `hfgen.pipelines`.

    Attributes:
        shipped_class: the plain class, whose file is published.
        component_classes: the networks of hfgen that the pipeline may hold.
    """

    shipped_class: type
    component_classes: tuple[type, ...] = ()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any):
        """Save as diffusers does (same arguments), and the code beside the weights.

        A pipeline of nothing but diffusers' own parts, whose class diffusers has under the same name, needs no code:
        it is left as it is and loads with plain diffusers.

        Raises:
            ValueError: for `push_to_hub`, which would upload the folder before its code is in it.
        """
        if push_to_hub:
            raise ValueError("save_pretrained(push_to_hub=True): save first, then use pipeline.push_to_hub(repo_id)")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        index_file = folder / "model_index.json"
        index = json.loads(index_file.read_text())
        index.pop("_name_or_path", None)  # of a loaded pipeline: a path of this machine
        index["_class_name"] = self.shipped_class.__name__
        own = {name: part for name, part in self.components.items() if _is_own(part)}  # type: ignore[attr-defined]
        for name, part in own.items():
            index[name] = _ship(type(part), folder / name)
        if own or not hasattr(diffusers, self.shipped_class.__name__):
            index["_class_name"] = _ship(self.shipped_class, folder)
        index_file.write_text(json.dumps(index, indent=2) + "\n")
        for config_file in folder.glob("*/config.json"):
            config = json.loads(config_file.read_text())
            if config.pop("_name_or_path", None) is not None:  # of a loaded network, likewise
                config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Load from a folder or a Hub repo, with hfgen's classes; the arguments are those of diffusers.

        No code of the folder or repo is run, so no `trust_remote_code` is needed, and weights are read from
        safetensors alone unless `use_safetensors=False` is given.
        """
        kwargs.pop("trust_remote_code", None)
        kwargs.setdefault("use_safetensors", True)
        folder = str(pretrained_model_name_or_path)
        if not os.path.isdir(folder):
            hub_arguments = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
            folder = snapshot_download(folder, ignore_patterns=["*.py", "*.md", "samples/*"], **hub_arguments)
        return super().from_pretrained(folder, **kwargs)  # type: ignore[misc]

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any):
        """Read `model_index.json`, with the installed classes in the place of the files beside the weights.

        `from_pretrained` of diffusers reads the index through this method, so this is where it learns what to load.
        """
        loaded = super().load_config(*args, **kwargs)  # type: ignore[misc]
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        index["_class_name"] = cls.__name__
        installed = {component.__name__: component for component in cls.component_classes}
        for name, entry in index.items():
            if isinstance(entry, list | tuple) and len(entry) == 2 and entry[1] in installed:
                index[name] = [installed[entry[1]].__module__, entry[1]]
        return loaded


def _is_own(part: Any) -> bool:
    return part is not None and type(part).__module__.split(".")[0] not in ("diffusers", "transformers")


def _ship(shipped_class: type, folder: Path) -> list[str]:
    """Copy the file of a class into a folder and return its entry for `model_index.json`: [module, class].

    Raises:
        ValueError: if the file imports what a machine without hfgen may lack, or bears a name that diffusers takes
            for one of its own pipelines.
    """
    file = Path(inspect.getsourcefile(shipped_class) or "")
    if hasattr(diffusers.pipelines, file.stem):
        raise ValueError(f"{file.name} has the name of a pipeline of diffusers, which would be loaded in its place")
    for node in ast.walk(ast.parse(file.read_text())):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = ["." if node.level else node.module or ""]
        for module in imported:
            if module.split(".")[0] not in SHIPPED_IMPORTS:
                raise ValueError(f"{file.name} imports {module}, but is published by itself: only torch and diffusers")
    shutil.copyfile(file, folder / file.name)
    return [file.stem, shipped_class.__name__]
