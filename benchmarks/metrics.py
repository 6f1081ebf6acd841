#!/usr/bin/env python
"""FID's arithmetic and the extraction of features: hfgen's functions against clean-fid's.

    python benchmarks/metrics.py [--quick]

The arithmetic starts from the features, 2,048 for each image, and ends with the distance. The extraction starts from
images in memory for hfgen and from PNG files for clean-fid, which reads folders only (its own loader, no workers);
both run the same weights. Both sides are timed in turn.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from script_steps import describe, verdict


NUM_FEATURES = 2048
# At least: the arithmetic at 300 and at 5,000 images, and the extraction.
AT_300, AT_5000, EXTRACTION = 100.0, 3.0, 1.0


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def time_arithmetic(count: int, rounds: int) -> tuple[float, float]:
    """Return the median seconds of hfgen and of clean-fid for `count` images against as many."""
    import numpy as np
    from cleanfid.fid import fid_from_feats

    from hfgen.metrics.frechet import frechet_distance

    rng = np.random.default_rng(0)
    # Skewed and correlated, as features behind a rectifier are.
    mixing = rng.normal(size=(NUM_FEATURES, NUM_FEATURES)) / NUM_FEATURES**0.5
    one, other = (np.abs(rng.gamma(0.5, scale, (count, NUM_FEATURES)) @ mixing) for scale in (1.0, 1.1))
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds_of(lambda: frechet_distance(one, other)))
        theirs.append(seconds_of(lambda: fid_from_feats(one, other)))
    return statistics.median(ours), statistics.median(theirs)


def time_extraction(count: int, rounds: int) -> tuple[float, float]:
    """Return the images/s of hfgen and of clean-fid."""
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

    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for index, image in enumerate(images):
            Image.fromarray(image).save(Path(folder) / f"{index}.png")
        extractor(images[:32])  # not timed: the first calls choose kernels
        for _ in range(rounds):
            ours.append(seconds_of(lambda: extractor(images, count)))
            theirs.append(
                seconds_of(
                    lambda: get_folder_features(
                        folder, peer, num_workers=0, batch_size=32, device=torch.device("cpu"), verbose=False
                    )
                )
            )
    return count / statistics.median(ours), count / statistics.median(theirs)


def main() -> None:
    """Time both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only test that it runs, not how fast")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(options.threads)
    small, large, images, rounds = (20, 30, 8, 1) if options.quick else (300, 5000, 128, options.rounds)
    at_small, at_large = time_arithmetic(small, rounds), time_arithmetic(large, rounds)
    extraction = time_extraction(images, rounds)
    print(describe(options.threads, "clean-fid", "numpy", "scipy") + "\n")
    print("| | hfgen | clean-fid | ratio | at least | |\n|---|---|---|---|---|---|")
    for name, (ours, theirs), least in ((small, at_small, AT_300), (large, at_large, AT_5000)):
        ratio = theirs / ours
        text = f"FID of {name:,} against {name:,} images, s"
        print(f"| {text} | {ours:.3f} | {theirs:.2f} | {ratio:.1f} | {least} | {verdict(ratio, least)} |")
    ratio = extraction[0] / extraction[1]
    text = f"features of {images} images, images/s"
    result = verdict(ratio, EXTRACTION)
    print(f"| {text} | {extraction[0]:.2f} | {extraction[1]:.2f} | {ratio:.2f} | {EXTRACTION} | {result} |")


if __name__ == "__main__":
    main()
