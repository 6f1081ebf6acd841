"""Storing weights as 16-bit floats, which halves the size of a pipeline; they are loaded as 32-bit floats."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from hfgen.errors import UserError


def round_to_half(pipeline: DiffusionPipeline) -> None:
    """Round the weights of a pipeline to values that 16-bit floats have; they stay 32-bit floats.

    Raises:
        UserError: if a weight is too large for 16 bits.
    """
    for part, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            round_weights(part, network.state_dict())


def round_weights(part: str, state: Mapping[str, torch.Tensor]) -> None:
    """Round the weights of one network in place; raises as `round_to_half` does."""
    for name, weights in state.items():
        if weights.dtype != torch.float32:
            continue
        rounded = weights.half()
        if weights.isfinite().all() and not rounded.isfinite().all():
            problem = f"{part}.{name} has values up to {weights.abs().max():.3g}, more than 16-bit floats hold"
            raise UserError(f"--half: {problem}; leave out --half")
        weights.copy_(rounded)


def store_in_half(folder: Path) -> None:
    """Store the 32-bit weights of a saved pipeline as 16-bit floats, in place.

    Args:
        folder: of the pipeline, with one folder for each component.
    """
    for file in sorted(folder.glob("*/*.safetensors")):
        weights = load_file(file)
        stored = {name: one.half() if one.dtype == torch.float32 else one for name, one in weights.items()}
        save_file(stored, file, metadata={"format": "pt"})
