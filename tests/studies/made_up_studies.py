"""Studies, outcomes and results of made-up figures: nothing is trained."""

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("optuna", reason='needs optuna: pip install "hfgen[study]"')

from hfgen.inference.figures import image_sheet
from hfgen.studies.cells import Cell, Place, Study
from hfgen.studies.outcomes import BROKEN, DIVERGED, TRAINED, Outcome, Result
from hfgen.studies.results import SHEET_COLUMNS, STRIP_COLUMNS, encode_picture
from hfgen.studies.study_file import Budget, Evaluation


RATES = ({"learning_rate": "1e-4"}, {"learning_rate": "2e-4"}, {"learning_rate": "10"})


def study(families, seeds=(0,), published=None, metric="fid", shared=(), methods=None, **parts):
    """A study of families with their points; `published` by family, a figure for each point.

    `shared` names pairs of places (family, index of the point): the second takes the cells of the first.
    """
    cells, places = {}, []
    for family, points in families.items():
        for index, point in enumerate(points):
            names = [
                " ".join([family, *(f"{key}={value}" for key, value in point.items()), f"seed={seed}"])
                for seed in seeds
            ]
            for first, second in shared:
                if second == (family, index):
                    names = next(one.cells for one in places if (one.family, one.point) == first)
            for name, seed in zip(names, seeds, strict=True):
                method = (methods or {}).get(family, "gan")
                own = {"seed": seed, **({"num_train_timesteps": 500} if method == "ddpm" else {}), **point}
                cells.setdefault(name, Cell(name, method, own))
            figure = published[family][index] if published and family in published else None
            places.append(Place(family, point, tuple(names), figure))
    own = {"title": "Made up", "question": "", "source": "", "dataset": "someone/cats", "budget": Budget(images=24)}
    own |= {"name": "made_up", "version": "1", "evaluation": Evaluation(num_images=5000), **parts}
    return Study(metric=metric, seeds=tuple(seeds), cells=cells, places=tuple(places), **own)


def result(fid=100.0, size=16, curve=(), strip=False, seed=0, **figures):
    """A result; `figures` by name, such as kid=0.01, minutes=3."""
    scores = {"num_real": 24, "fid": fid, "kid": 0.5, "precision": 0.25, "recall": 0.75, "coverage": 0.5}
    scores |= {key: value for key, value in figures.items() if key in scores}
    training = {"steps": 6000, "images": 24, "minutes": 2.0, "images_per_second": 80.0, "rollbacks": 0, "warnings": []}
    training |= {key: value for key, value in figures.items() if key in training}
    environment = {"device": "cpu", "threads": 2, "mixed_precision": "no", "torch": "2", "hfgen": "1"}
    summary = {
        "scores": scores,
        "training": training,
        "environment": environment,
        "sample_size": size,
        "memorisation_by_pixels": {"num_copies": figures.get("copies", 0)},
        "floor": {"split": {"num_fake": 12, "num_real": 13, "fid": 20.0}, "fid_at_n": 9.5},
        **({"num_inference_steps": figures["inference_steps"]} if "inference_steps" in figures else {}),
        **({"course": figures["course"]} if "course" in figures else {}),
        **({"reconstructions": {"fid": figures["reconstructed"]}} if "reconstructed" in figures else {}),
    }
    rows = (4, 3) if size < 128 else (1, 1)  # larger ones would be reduced to fit into the database
    sheet = encode_picture(image_sheet(images(rows[0] * SHEET_COLUMNS, size, seed), SHEET_COLUMNS))
    noise = encode_picture(image_sheet(images(rows[1] * STRIP_COLUMNS, size, seed), STRIP_COLUMNS)) if strip else ""
    return Result(summary, list(curve), sheet, noise)


def images(count, size, seed=0):
    """Squares of one colour each, the first of them red, green and blue."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    colours += np.random.default_rng(seed).integers(0, 256, (count, 3)).tolist()
    return [Image.new("RGB", (size, size), tuple(colour)) for colour in colours[:count]]


def trained(value=100.0, **figures):
    metric = figures.pop("metric", "fid")
    made = result(**{metric: value, **figures})
    return Outcome(TRAINED, value, step=6000, result=made)


def diverged(reason="diverged: the loss is NaN", step=1200):
    return Outcome(DIVERGED, reason=reason, step=step)


def broken(reason="needs a CUDA device", step=None):
    return Outcome(BROKEN, reason=reason, step=step)


def outcomes(study, *by_place, metric="fid"):
    """Outcomes by the cells' names: for each place a list with one for each seed, or a single one.

    A number is the figure of a trained cell, "nan" one that diverged, None one that has not been run.
    """
    found = dict.fromkeys(study.cells)
    for place, given in zip(study.places, by_place, strict=True):
        for name, one in zip(place.cells, given if isinstance(given, list) else [given], strict=True):
            if isinstance(one, int | float):
                one = trained(float(one), metric=metric)
            found[name] = diverged() if isinstance(one, str) and one == "nan" else one
    return found


def losses(*values, name="loss"):
    """A curve: an entry a hundred steps."""
    return [{"step": 100.0 * (index + 1), name: value} for index, value in enumerate(values)]
