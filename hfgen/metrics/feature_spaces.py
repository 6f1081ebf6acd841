"""The feature networks in which images can be compared, chosen by name."""

import importlib.util

import torch

from hfgen.errors import UserError
from hfgen.metrics.extraction import Extractor
from hfgen.metrics.inception import InceptionFeatures, find_weights
from hfgen.metrics.vision_transformers import TRANSFORMERS, TransformerFeatures


def build_extractor(features: str, mode: str, weights: str | None, device: torch.device) -> Extractor:
    """Load the network named by `--features`.

    Args:
        features: "inception", "dinov2" or "clip".
        mode: resizing for Inception: "clean" or "legacy".
        weights: Inception's TorchScript file, or a folder or Hub repo for the other two; None for the default.
        device: where the network runs.

    Raises:
        UserError: if there is no such network or mode, or its weights are not available.
    """
    if features not in ("inception", *TRANSFORMERS):
        raise UserError(f"--features {features}: must be one of inception, {', '.join(TRANSFORMERS)}")
    if mode not in ("clean", "legacy"):
        raise UserError(f"--mode {mode}: must be clean or legacy")
    if importlib.util.find_spec("cleanfid") is None:
        raise UserError('clean-fid, which resizes the images, is not installed: pip install "hfgen[eval]"')
    if features == "inception":
        return InceptionFeatures(find_weights(weights), device, mode)
    if mode != "clean":
        raise UserError(f"--mode {mode}: only for --features inception; leave it out with --features {features}")
    return TransformerFeatures(features, weights, device)
