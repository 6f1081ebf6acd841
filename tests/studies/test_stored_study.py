"""What is kept of a study in its database, and in what two studies differ."""

import json
import math
from dataclasses import replace

import pytest

import hfgen
from hfgen.errors import UserError
from hfgen.studies.cells import Study, differences, expand
from hfgen.studies.scripts import find_scripts
from hfgen.studies.study_file import Budget, Evaluation, Family, StudyFile


GAN = {"DCGAN": Family("gan", "dcgan")}
EVALUATION = ["evaluation: mode: 'clean' -> 'legacy'", "evaluation: num_images: 5000 -> 20"]


def study_of(families=GAN, **parts) -> Study:
    return expand(StudyFile("toy", "A toy", families, Budget(steps=10), **parts), find_scripts(), "pictures")


def full_study() -> Study:
    families = {**GAN, "VAE": Family("vae", settings={"block_out_channels": [8, 16]}, device="cpu")}
    return study_of(families, grid={"latent_dim": [8, 9]}, published={"VAE": [3.5, "failed"]}, seeds=(0, 1))


def test_a_setting_that_came_later_than_a_stored_study_counts_as_its_default():
    study = study_of({"Diffusion": Family("ddpm")})
    (cell,) = study.cells.values()
    older = {key: value for key, value in cell.settings.items() if key not in ("formulation", "dropout")}
    stored = replace(study, cells={cell.name: replace(cell, settings=older)})
    assert differences(stored, study) == differences(study, stored) == []
    changed = replace(cell, settings={**cell.settings, "dropout": 0.5})
    assert differences(stored, replace(study, cells={cell.name: changed})) == [
        f"cell {cell.name}: dropout: 0.1 -> 0.5"
    ]


def test_another_training_script_is_a_difference_unless_none_was_stored():
    study = full_study()
    assert study.scripts == {"gan": None, "vae": None}
    mine = replace(study, scripts={"gan": "0123456789abcdef", "vae": None})
    own = "your own with SHA-256 0123456789ab"
    assert differences(mine, study) == [f"training_scripts/train_gan.py: {own} -> hfgen's"]
    assert differences(study, mine) == [f"training_scripts/train_gan.py: hfgen's -> {own}"]
    assert Study.from_dict(json.loads(json.dumps(mine.to_dict()))) == mine
    older = mine.to_dict()
    del older["scripts"]
    assert differences(Study.from_dict(older), mine) == differences(Study.from_dict(older), study) == []


def test_a_study_comes_back_from_json_as_it_was():
    study = full_study()
    full = {
        "full_budget": Budget(images=99),
        "full_evaluation": Evaluation(77, mode="legacy"),
        "full_seeds": (0, 1, 2),
    }
    for one in (study, replace(study, asked="2h", **full)):
        assert Study.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_a_published_nan_survives_json():
    study = study_of(published={"DCGAN": [math.nan]})
    (place,) = Study.from_dict(json.loads(json.dumps(study.to_dict()))).places
    assert math.isnan(place.published)


@pytest.mark.parametrize(
    "change", [{"full_seeds": None}, {"unheard_of": 1}, {"budget": {"epochs": 3}}, {"cells": {"a": {}}}]
)
def test_a_study_that_another_version_has_written_is_refused(change):
    values = {**full_study().to_dict(), "version": "9.9", **change}
    if change == {"full_seeds": None}:
        del values["full_seeds"]
    with pytest.raises(UserError, match=f"made with hfgen 9.9, which hfgen {hfgen.__version__} cannot read"):
        Study.from_dict(values)


def test_a_study_does_not_differ_from_itself_nor_by_what_alters_no_figure():
    study = full_study()
    assert differences(Study.from_dict(study.to_dict()), full_study()) == []
    other = {"title": "B", "question": "?", "source": "s", "dataset": "elsewhere", "asked": "2h"}
    places = tuple(replace(place, published=1.0) for place in study.places[::-1])
    assert differences(study, replace(study, **other, places=places)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": "9.9"}, [f"version: {hfgen.__version__} -> 9.9"]),
        ({"metric": "kid"}, ["metric: fid -> kid"]),
        ({"budget": Budget(images=2000)}, ["budget: 10 steps -> 2,000 images"]),
        ({"seeds": (0,)}, ["seeds: (0, 1) -> (0,)"]),
        ({"evaluation": Evaluation(20, mode="legacy")}, EVALUATION),
    ],
)
def test_what_alters_every_figure_is_named(change, told):
    assert differences(full_study(), replace(full_study(), **change)) == told


def test_a_scaled_down_study_is_compared_by_what_it_had_asked_for():
    scaled = {
        "asked": "2h",
        "full_budget": Budget(steps=99),
        "full_evaluation": Evaluation(77),
        "full_seeds": (0, 1, 2),
    }
    stored = replace(full_study(), **scaled)
    changed = {"full_budget": Budget(steps=98), "full_evaluation": Evaluation(76), "full_seeds": (0, 1)}
    assert differences(stored, replace(stored, **changed)) == [
        "full_budget: 99 steps -> 98 steps",
        "full_seeds: (0, 1, 2) -> (0, 1)",
        "full_evaluation: num_images: 77 -> 76",
    ]
    assert differences(stored, full_study()) == differences(full_study(), stored) == []  # nothing was cut


def test_cells_that_have_changed_are_named_with_each_setting():
    before = study_of({"a": Family("gan"), "b": Family("ddpm"), "c": Family("vae")})
    changed = {"a": Family("gan", settings={"batch_size": 8, "latent_dim": 9}), "b": Family("ddpm", device="cuda")}
    now = study_of({**changed, "d": Family("vae", settings={"latent_dim": 7})})
    assert differences(before, now) == [
        "cell a seed=0: batch_size: 64 -> 8",
        "cell a seed=0: latent_dim: 100 -> 9",
        "cell b seed=0: device: None -> 'cuda'",
        "cell c seed=0: gone",
        "cell d seed=0: new",
    ]
    cells = {name: replace(cell, method="gan") for name, cell in before.cells.items() if name.startswith("c")}
    assert differences(before, replace(before, cells={**before.cells, **cells})) == [
        "cell c seed=0: method: 'vae' -> 'gan'"
    ]


def test_a_row_that_comes_without_a_cell_of_its_own_is_named():
    before, now = study_of(), study_of({**GAN, "again": Family("gan", "dcgan")})
    assert list(before.cells) == list(now.cells)
    assert differences(before, now) == differences(now, before) == ["row again: new, gone or with other cells"]


def test_a_long_list_of_differences_is_cut():
    before, now = (study_of(seeds=tuple(range(first, first + 12))) for first in (0, 12))
    told = differences(before, now)
    assert len(told) == 21 and told[-1] == "and 5 more"
    before, now = (study_of(seeds=tuple(range(count))) for count in (19, 38))
    assert len(differences(before, now)) == 20  # the seeds, and 19 new cells
