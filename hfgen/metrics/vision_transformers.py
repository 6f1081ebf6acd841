"""Features of networks not trained on ImageNet's classes, for data without those classes.

FID with Inception features measures what distinguishes ImageNet's classes (Kynkaanniemi et al. 2023,
arXiv:2203.06026); features learned without labels agree better with human judgement (Stein et al. 2023,
arXiv:2306.04675).
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from hfgen.errors import UserError
from hfgen.metrics.extraction import Extractor, feature_batches
from hfgen.texts import one_line


class _TransformerKind(NamedTuple):
    """How to load and use one kind of network.

    Attributes:
        class_name: class in transformers.
        default: default Hub repo.
        output: name of the output used as features.
        mean: channel means of red, green and blue in [0, 1], as in the network's training.
        std: channel standard deviations, likewise.
    """

    class_name: str
    default: str
    output: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


TRANSFORMERS = {
    # The class token after the last norm, as in Stein et al. 2023.
    "dinov2": _TransformerKind(
        "Dinov2Model", "facebook/dinov2-large", "pooler_output", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ),
    # The embedding compared with text embeddings, before normalisation.
    "clip": _TransformerKind(
        "CLIPVisionModelWithProjection",
        "openai/clip-vit-large-patch14",
        "image_embeds",
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}
# Input size for DINOv2, which takes any multiple of its patch size. CLIP has a fixed input size.
DINOV2_SIDE = 224


class TransformerFeatures(Extractor):
    """Computes DINOv2 or CLIP features of images, `(num_images, num_features)`.

    Whole images are resized, with clean-fid's antialiasing bicubic resizer.

    Args:
        kind: "dinov2" or "clip".
        source: a Hub repo or a folder, with `model.safetensors`; the large model if None.
        device: where the network runs.

    Raises:
        UserError: if there is no such network there.

    Attributes:
        identity: names the network and its weights; features are comparable if identities are equal.
    """

    def __init__(self, kind: str, source: str | None, device: torch.device):
        from cleanfid.resize import make_resizer

        family = TRANSFORMERS[kind]
        network = _load(family, source or family.default)
        side = DINOV2_SIDE if kind == "dinov2" else network.config.image_size
        self._resize = make_resizer("PIL", False, "bicubic", (side, side))
        self._network, self._output, self._device = network.to(device), family.output, device
        self._mean, self._std = (
            torch.tensor(three, device=device).reshape(1, 3, 1, 1) for three in (family.mean, family.std)
        )
        self.identity = f"{kind} {side} pixels {_digest(network)}"

    def batches(self, images: Iterable[np.ndarray], count: int | None = None) -> Iterator[np.ndarray]:
        """Yield features, float32 `(batch_size, num_features)`; see `feature_batches`."""
        return feature_batches(images, count, self._resize, self._features, self._device)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return getattr(self._network(pixel_values=(pixels / 255 - self._mean) / self._std), self._output)


def _load(family: _TransformerKind, source: str) -> Any:
    """Load a network from safetensors only; pickled weights are refused."""
    import transformers

    network_class = getattr(transformers, family.class_name)
    try:
        network, loading = network_class.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # from JSON, safetensors, disk or internet: in any case there are no weights
        raise UserError(
            f"--feature_weights {source}: no {family.class_name} with model.safetensors could be loaded: "
            f"{one_line(error)}"
        ) from error
    if missing := loading["missing_keys"]:
        raise UserError(
            f"--feature_weights {source}: is not a {family.class_name}: {len(missing)} weights are missing"
        )
    # DINOv2 with registers has extra embeddings; ignoring them would give the features of neither model.
    if strange := [name for name in loading["unexpected_keys"] if name.startswith("embeddings.")]:
        raise UserError(f"--feature_weights {source}: is not a {family.class_name}: it also has {', '.join(strange)}")
    return network.float().eval()  # weights may be stored in half precision


def _digest(network: torch.nn.Module) -> str:
    """Return a hash of the weights, independent of their source."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
