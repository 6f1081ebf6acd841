"""Loads a published folder as a machine without hfgen does, and draws: run in a process of its own by load_check.py.

    python -c "..." FOLDER IMAGES.npy TRUST

Imports torch and diffusers only.
"""

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline


NUM_IMAGES, SEED, STEPS = 2, 0, 2


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    """Draw a few images on one thread of the CPU: float `(NUM_IMAGES, height, width, channels)` in [0, 1]."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):  # diffusers' own leave weights at addresses that alter the last bits
            for tensor in (*part.parameters(), *part.buffers()):
                tensor.data = tensor.data.clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are the same, bit for bit, only if they are cut up in the same way
    try:
        steps = {"num_inference_steps": STEPS} if hasattr(pipeline, "unet") else {}
        generator = torch.Generator().manual_seed(SEED)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(batch_size=NUM_IMAGES, generator=generator, output_type="np", **steps).images
    finally:
        torch.set_num_threads(threads)


def main(folder: str, target: str, trust_remote_code: bool) -> None:
    """Load a folder by diffusers alone, draw, and write the images to a file."""
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=trust_remote_code, use_safetensors=True)
    np.save(target, draw(pipeline), allow_pickle=False)


if __name__ == "__main__":
    if sys.modules.get("hfgen") is not None:
        raise SystemExit("hfgen is there, which this process is to do without")
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "trust")
