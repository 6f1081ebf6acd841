"""The check before an upload: the folder loads without hfgen, and generates the same images."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hfgen.errors import UserError
from hfgen.inference.opening import open_pipeline
from hfgen.publishing import fresh_load


# Runs a file as a script without adding its folder to sys.path, and with importing hfgen disabled.
RUN_WITHOUT_HFGEN = (
    "import runpy, sys; file = sys.argv.pop(1); sys.modules['hfgen'] = None; runpy.run_path(file, run_name='__main__')"
)


def check_loads_anywhere(folder: Path) -> None:
    """Load a folder in a clean process, with diffusers only, and compare its images with hfgen's.

    Uses neither the network nor the remote code cache, and leaves nothing in it.

    Raises:
        UserError: if it does not load or generates different images.
    """
    index = json.loads((folder / "model_index.json").read_text())
    trust = "trust" if isinstance(index["_class_name"], list) else "no"
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images.npy"
        environment = {key: value for key, value in os.environ.items() if key != "DIFFUSERS_DISABLE_REMOTE_CODE"}
        environment |= {"HF_MODULES_CACHE": f"{temporary}/modules", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run(
            [sys.executable, "-c", RUN_WITHOUT_HFGEN, fresh_load.__file__, folder.resolve(), images, trust],
            cwd=temporary,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if result.returncode:
            reason = " ".join(result.stderr.strip().splitlines()[-1:])
            raise UserError(f"{folder}: does not load without hfgen installed: {reason}; nothing was uploaded")
        fresh = np.load(images, allow_pickle=False)
    ours = fresh_load.generate(open_pipeline(str(folder), "cpu", plain=True))
    if fresh.shape != ours.shape or not np.array_equal(fresh, ours):
        raise UserError(
            f"{folder}: generates other images without hfgen installed; nothing was uploaded. This is a bug in "
            "hfgen or of the installed diffusers: please report it with their versions"
        )
