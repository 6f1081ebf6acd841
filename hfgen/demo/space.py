"""A Hub Space for a published pipeline: the demo, without hfgen."""

import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hfgen
from hfgen.errors import UserError
from hfgen.texts import markdown_text


# The demo and the hfgen modules that it imports. File names must be unique: in a Space they are in one folder.
COPIED = (
    "demo/page.py",
    "demo/drawing.py",
    "demo/fields.py",
    "families.py",
    "inference/interpolation.py",
    "randomness.py",
    "data/metadata.py",
    "data/rgb.py",
    "methods/schedules.py",
    "texts.py",
)
# In the README.md of a Space by hfgen.
BY_HFGEN = "on the demo page of hfgen"
APP = '''"""Shows {what} on a web page."""

import os

import torch
from diffusers import DiffusionPipeline

from page import build_demo, launch


REPO_ID = {repo_id}
REVISION = {revision}

# The pipeline's code comes with its weights. If the repository is private, the Space needs a secret HF_TOKEN.
pipeline = DiffusionPipeline.from_pretrained(
    REPO_ID, revision=REVISION, token=os.environ.get("HF_TOKEN"), trust_remote_code=True
)
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

if __name__ == "__main__":
    launch(build_demo({{REPO_ID: pipeline}}, {title}))
'''


def write_space(folder: Path, repo_id: str, revision: str | None, title: str, license_name: str | None = None) -> None:
    """Write the files of a Space: `app.py`, the demo, `requirements.txt` and `README.md`.

    Args:
        folder: a new folder.
        repo_id: Hub repo of the pipeline, or a local folder to try the Space locally.
        revision: branch, tag or commit; the main branch if None.
        title: title of the page and the Space.
        license_name: Hub licence id, such as "apache-2.0"; omitted from the card if None.

    Raises:
        UserError: if the folder is not empty, or gradio, whose version the Space requires, is not installed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose another folder for the Space")
    gradio = gradio_version()
    what = repo_id.replace("\\", "/").replace('"', "'")
    app = APP.format(what=what, repo_id=repr(repo_id), revision=repr(revision), title=repr(title))
    files = {
        "app.py": app,
        "requirements.txt": _requirements(gradio),
        "README.md": _card(repo_id, title, gradio, license_name),
    }
    for name in COPIED:
        file = Path(hfgen.__file__).parent / name
        files[file.name] = re.sub(r"from hfgen\.(?:\w+\.)*(\w+) import", r"from \1 import", file.read_text("utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def gradio_version() -> str:
    """Return the gradio version for a Space: the installed one.

    Raises:
        UserError: if gradio is not installed.
    """
    try:
        return version("gradio")
    except PackageNotFoundError as error:
        raise UserError(
            'publishing a Space needs gradio, whose version it requests: pip install "hfgen[demo]"'
        ) from error


def _requirements(gradio: str) -> str:
    """Require the installed versions or newer; for gradio the same major version, because majors break pages."""
    lines = [f"{package}>={version(package).split('+')[0]}" for package in ("torch", "diffusers")]
    major = int(gradio.split(".")[0])
    return "\n".join([*lines, f"gradio>={major},<{major + 1}"]) + "\n"


def _card(repo_id: str, title: str, gradio: str, license_name: str | None) -> str:
    """Format the Space's settings as YAML, and a line for its readers; JSON strings are valid YAML."""
    settings = {"title": title, "sdk": "gradio", "sdk_version": gradio, "app_file": "app.py", "models": [repo_id]}
    if license_name is not None:
        settings["license"] = license_name
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    sentence = f"Generates images with [{repo_id}](https://huggingface.co/{repo_id}), {BY_HFGEN}."
    return "\n".join(["---", *lines, "---", "", f"# {markdown_text(title)}", "", sentence, ""])
