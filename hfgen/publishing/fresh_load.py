"""Loads a published folder like a machine without hfgen, and generates images; run by load_check.py as a subprocess.

    python -c "..." FOLDER IMAGES.npy TRUST

Imports only torch and diffusers (and numpy).
"""

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline


NUM_IMAGES, SEED, STEPS = 2, 0, 4  # fewer steps are not enough for all schedulers of diffusers


def generate(pipeline: DiffusionPipeline) -> np.ndarray:
    """Generate a few images on one CPU thread: float `(NUM_IMAGES, height, width, channels)` in [0, 1]."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):  # diffusers' own may be unaligned, which changes the last bits
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.data = tensor.data.clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bitwise equal sums need the same split over threads
    try:
        steps = {"num_inference_steps": STEPS} if hasattr(pipeline, "unet") else {}
        generator = torch.Generator().manual_seed(SEED)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(batch_size=NUM_IMAGES, generator=generator, output_type="np", **steps).images
    finally:
        torch.set_num_threads(threads)


def main(folder: str, target: str, trust_remote_code: bool) -> None:
    """Load a folder with diffusers only, generate images, and write them to a file."""
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=trust_remote_code, use_safetensors=True)
    np.save(target, generate(pipeline), allow_pickle=False)


if __name__ == "__main__":
    if sys.modules.get("hfgen") is not None:
        raise SystemExit("hfgen is importable, but this process must work without it")
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "trust")
