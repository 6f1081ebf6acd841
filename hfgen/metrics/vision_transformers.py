"""Features of networks that were not trained on ImageNet's classes, for data that has none of them.

FID in Inception's features counts what ImageNet's classes tell apart (Kynkaanniemi et al. 2023, arXiv:2203.06026);
features learned without labels agree better with what people see (Stein et al. 2023, arXiv:2306.04675).
"""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from hfgen.errors import UserError
from hfgen.metrics.extraction import extract_features


class _Family(NamedTuple):
    """How one kind of network is loaded and fed.

    Attributes:
        class_name: of transformers.
        default: repo on the Hub.
        output: of the network's outputs, the one that is the feature.
        mean: of red, green and blue in [0, 1], as the network was trained with.
        std: likewise.
    """

    class_name: str
    default: str
    output: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


FAMILIES = {
    # The class token behind the last norm, as Stein et al. 2023 take it.
    "dinov2": _Family(
        "Dinov2Model", "facebook/dinov2-large", "pooler_output", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ),
    # The embedding that is compared with that of a text, before it is scaled to length 1.
    "clip": _Family(
        "CLIPVisionModelWithProjection",
        "openai/clip-vit-large-patch14",
        "image_embeds",
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}
# DINOv2 takes any multiple of its patches; this is what it is compared at. A CLIP takes the size that it was made for.
DINOV2_SIDE = 224


class TransformerFeatures:
    """Turns images into the features of DINOv2 or CLIP, `(num_images, num_features)`.

    Images are resized as a whole, by clean-fid's antialiasing bicubic resizer.

    Args:
        kind: "dinov2" or "clip".
        source: a repo of the Hub or a folder, with `model.safetensors`; the large model if None.
        device: where the network runs.

    Raises:
        UserError: if there is no such network there.

    Attributes:
        identity: names the network and its weights; features of equal identity are comparable.
    """

    def __init__(self, kind: str, source: str | None, device: torch.device):
        from cleanfid.resize import make_resizer

        family = FAMILIES[kind]
        network = _load(family, source or family.default)
        side = DINOV2_SIDE if kind == "dinov2" else network.config.image_size
        self._resize = make_resizer("PIL", False, "bicubic", (side, side))
        self._network, self._output, self._device = network.to(device), family.output, device
        self._mean, self._std = (
            torch.tensor(three, device=device).reshape(1, 3, 1, 1) for three in (family.mean, family.std)
        )
        self.identity = f"{kind} {side} pixels {_digest(network)}"

    def __call__(self, images: Iterable[np.ndarray], count: int | None = None) -> np.ndarray:
        """Compute features, float32 `(num_images, num_features)`; see `extract_features`."""
        return extract_features(images, count, self._resize, self._features, self._device)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return getattr(self._network(pixel_values=(pixels / 255 - self._mean) / self._std), self._output)


def _load(family: _Family, source: str) -> Any:
    """Load a network from its safetensors alone: those of a pickle are refused."""
    import transformers

    network_class = getattr(transformers, family.class_name)
    try:
        network, loading = network_class.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # of JSON, safetensors, the disk or the network: whatever it is, there is no network
        raise UserError(
            f"--feature_weights {source}: no {family.class_name} with model.safetensors could be had: "
            f"{' '.join(str(error).split())}"
        ) from error
    if missing := loading["missing_keys"]:
        raise UserError(f"--feature_weights {source}: is no {family.class_name}: {len(missing)} weights are missing")
    # A DINOv2 with registers has all that one without has: left out, they would give the features of neither.
    if strange := [name for name in loading["unexpected_keys"] if name.startswith("embeddings.")]:
        raise UserError(f"--feature_weights {source}: is no {family.class_name}: it has {', '.join(strange)} as well")
    return network.float().eval()  # weights that are kept in half precision too


def _digest(network: torch.nn.Module) -> str:
    """Return a hash of the weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
