"""FID's arithmetic and the extraction of features: hfgen's functions against clean-fid's.

The arithmetic starts from the features, 2,048 for each image, and ends with the distance. The extraction starts from
images in memory for hfgen and from PNG files for clean-fid, which reads folders only (its own loader, no workers);
both run the same weights. The sides are timed in turn.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from script_steps import call_in_process
from tables import Goal, Table


NUM_FEATURES = 2048
# At least: the arithmetic by the number of images, and the extraction.
ARITHMETIC, EXTRACTION = {300: 100.0, 5000: 3.0}, 1.0


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median seconds of both calls."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for work, taken in zip((ours, theirs), seconds, strict=True):
            started = time.perf_counter()
            work()
            taken.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def time_arithmetic(count: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds of hfgen and of clean-fid for `count` images against as many."""
    import numpy as np
    from cleanfid.fid import fid_from_feats

    from hfgen.metrics.frechet import frechet_distance

    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    # Skewed and correlated, as features behind a rectifier are.
    mixing = rng.normal(size=(NUM_FEATURES, NUM_FEATURES)) / NUM_FEATURES**0.5
    one, other = (np.abs(rng.gamma(0.5, scale, (count, NUM_FEATURES)) @ mixing) for scale in (1.0, 1.1))
    return in_turn(lambda: frechet_distance(one, other), lambda: fid_from_feats(one, other), rounds)


def time_extraction(count: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds of hfgen and of clean-fid for the features of `count` images."""
    import torch
    from cleanfid.fid import get_folder_features
    from PIL import Image

    from hfgen.data.toy_paintings import paint
    from hfgen.metrics.inception import InceptionFeatures, find_weights

    images = [paint(index, 64) for index in range(count)]
    weights = find_weights(None)
    extractor = InceptionFeatures(weights, torch.device("cpu"))
    network = torch.jit.load(str(weights)).eval()

    def peer(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network((batch - 128) / 128).reshape(len(batch), -1)

    settings: dict[str, Any] = {"num_workers": 0, "batch_size": 32, "device": torch.device("cpu"), "verbose": False}
    with tempfile.TemporaryDirectory() as folder:
        for index, image in enumerate(images):
            Image.fromarray(image).save(Path(folder) / f"{index}.png")
        extractor(images[:32])  # not timed: the first calls choose kernels
        return in_turn(lambda: extractor(images, count), lambda: get_folder_features(folder, peer, **settings), rounds)


def compare_metrics(rounds: int, threads: int, counts: tuple[int, ...], images: int) -> tuple[list[Table], list[Goal]]:
    """Compare the arithmetic at several numbers of images, and the features of `images` images."""
    about = "Seconds. Features: of the 2015 Inception network, toy paintings of 64 pixels."
    table = Table("FID", about, ["", "hfgen, s", "clean-fid, s", "times faster"])
    goals = []
    for count in counts:
        ours, theirs = call_in_process(time_arithmetic, count, rounds, threads=threads)
        table.rows.append([f"FID of {count:,} against {count:,} images", ours, theirs, theirs / ours])
        if count in ARITHMETIC:
            goals.append(Goal(f"FID of {count:,} images over clean-fid", theirs / ours, ARITHMETIC[count]))
    ours, theirs = call_in_process(time_extraction, images, rounds, threads=threads)
    table.rows.append([f"features of {images} images", ours, theirs, theirs / ours])
    goals.append(Goal("features over clean-fid", theirs / ours, EXTRACTION))
    return [table], goals
