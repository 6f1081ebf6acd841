"""What a study is said to cost, and what is left of it when there is less time."""

import dataclasses
import re
from pathlib import Path

import pytest
from stand_in_features import Colours

import hfgen.studies.plan
from hfgen.errors import UserError
from hfgen.evaluation.reference import load_reference
from hfgen.studies import launch
from hfgen.studies.cells import expand
from hfgen.studies.launch import Workspace, launch_command
from hfgen.studies.plan import (
    Plan,
    Probe,
    _kind,
    _measure,
    cut_budget,
    describe_plan,
    features_to_compute,
    make_plan,
    scale_down,
)
from hfgen.studies.results import data_settings
from hfgen.studies.scripts import find_scripts
from hfgen.studies.study_file import Budget, Evaluation, Family, StudyFile
from hfgen.training.duration import estimated, format_duration


# 10 s a launch, 100 images/s in training, 0.05 s to draw an image, 100 MB kept, 300 MB of checkpoints
PROBE = Probe(10.0, 100.0, 0.05, 100_000_000, 300_000_000)
FEATURE_SECONDS = 0.15
SMALL = {"generator_channels": 4, "discriminator_channels": 4, "batch_size": 10}


def study_file(budget=None, seeds=(0, 1, 2), num_images=5000, grid=None):
    return StudyFile(
        "toy",
        "Toy",
        {"GAN": Family("gan", "dcgan", SMALL)},
        budget or Budget(images=100_000),
        grid={"adam_beta1": [0.0, 0.5]} if grid is None else grid,
        seeds=seeds,
        evaluation=Evaluation(num_images=num_images),
    )


def workspace_in(folder=Path(), dataset="toy_paintings:24"):
    return Workspace(folder, find_scripts(), dataset)


def planned(file, real_images=0):
    study = expand(file, find_scripts(), "toy_paintings:24")
    kinds = {name: _kind(cell) for name, cell in study.cells.items()}
    return study, Plan(dict.fromkeys(kinds.values(), PROBE), kinds, FEATURE_SECONDS, real_images)


def test_the_time_is_that_of_launches_training_drawing_scoring_and_the_real_images():
    study, plan = planned(study_file(), real_images=8000)
    training, scoring = 100_000 / 100, 5000 * (0.05 + 0.15)
    assert plan.seconds(study) == pytest.approx(6 * (10 + training + scoring) + 8000 * 0.15)
    told = describe_plan(study, plan)
    assert "6 cells" in told and "100,000 images" in told and "and 5 more like it" in told
    assert "100 images/s, 16.7 min of training, 16.7 min for 5,000 scored images" in told
    assert "about 3.7 h in total" in told and "about 100 min of it training" in told
    assert "0.9 GB" in told  # six that stay, and the checkpoints of the one in work


def test_a_budget_in_minutes_costs_those_minutes_and_one_in_steps_its_images():
    minutes, plan = planned(study_file(Budget(minutes=7)))
    assert plan.train_seconds(next(iter(minutes.cells.values())), minutes.budget) == 420
    steps, plan = planned(study_file(Budget(steps=50)))
    assert plan.train_seconds(next(iter(steps.cells.values())), steps.budget) == pytest.approx(50 * 10 / 100)


def test_cells_share_a_probe_unless_a_setting_alters_the_time_of_an_update():
    idle = {"adam_beta1": [0.0, 0.5], "learning_rate": ["1e-4", "1e-3"], "latent_dim": [50, 100]}
    assert len(planned(study_file(grid=idle))[1].probes) == 1
    assert len(planned(study_file(grid={"loss": ["non_saturating", "hinge"]}))[1].probes) == 2
    assert len(planned(study_file(grid={"n_critic": [1, 2]}))[1].probes) == 2


def test_a_study_that_fits_is_left_as_it_is():
    file = study_file()
    study, plan = planned(file)
    assert scale_down(file, study, plan, "4h", 4 * 3600, workspace_in()) is study


@pytest.mark.parametrize(("hours", "seeds", "num_images"), [(3, 3, 2685), (1, 3, 885), (0.15, 2, 250), (0.07, 1, 250)])
def test_what_is_scaled_down_fits_and_is_cut_in_order(hours, seeds, num_images):
    file = study_file()
    study, plan = planned(file)
    reduced = scale_down(file, study, plan, f"{hours}h", 3600 * hours, workspace_in())
    assert 0.85 * 3600 * hours <= plan.seconds(reduced) <= 3600 * hours
    assert (len(reduced.seeds), reduced.evaluation.num_images) == (seeds, num_images)
    assert reduced.seeds == file.seeds[:seeds] and len(reduced.cells) == 2 * seeds
    assert len({cell.settings["max_train_steps"] for cell in reduced.cells.values()}) == 1  # all cells alike
    if hours == 3:  # fewer scored images are enough, and there is time left over
        assert reduced.budget == file.budget
    else:
        assert reduced.budget.images < file.budget.images
    assert (reduced.full_budget, reduced.full_seeds) == (file.budget, file.seeds)
    assert (reduced.full_evaluation, reduced.asked) == (file.evaluation, f"{hours}h")
    # Training never gets less than half, unless there is nothing left to give up.
    trained = sum(plan.train_seconds(cell, reduced.budget) for cell in reduced.cells.values())
    assert trained >= 0.45 * 3600 * hours or seeds == 1


def test_a_learned_term_begins_as_early_in_a_training_that_is_cut():
    vae = {"VAE": Family("vae", "vae_learned"), "late": Family("vae", "vae_learned", {"learned_term_start": 20_000})}
    file = StudyFile("toy", "Toy", vae, Budget(images=450_000), seeds=(0,), evaluation=Evaluation(num_images=250))
    study, plan = planned(file)
    reduced = scale_down(file, study, plan, "1h", 3600, workspace_in())
    share = reduced.budget.images / 450_000
    starts = [cell.settings["learned_term_start"] for cell in reduced.cells.values()]
    assert 0.1 < share < 0.5 and starts == [int(share * 12_500), int(share * 20_000)]


@pytest.mark.parametrize("starts", [[9000], [1000, 9000]])
def test_a_learned_term_that_the_grid_starts_stays_where_it_is(starts):
    vae = {"VAE": Family("vae", "vae_learned"), "own": Family("vae", "vae_learned", grid={})}
    grid = {"learned_term_start": starts}
    file = StudyFile("toy", "Toy", vae, Budget(images=450_000), grid=grid, evaluation=Evaluation(num_images=250))
    study, plan = planned(file)
    reduced = scale_down(file, study, plan, "2.5h", 2.5 * 3600, workspace_in())
    assert reduced.budget.images < file.budget.images
    found = [cell.settings["learned_term_start"] for cell in reduced.cells.values()]
    assert found[:-1] == starts and 0 < found[-1] < 12_500
    told = r"--budget 45m: too short for learned_term_start 9000 of the grid: VAE learned_term_start=9000 seed=0 would"
    with pytest.raises(UserError, match=told):
        scale_down(file, study, plan, "45m", 45 * 60, workspace_in())


def test_the_reconstructions_of_a_vae_are_scored_too():
    file = dataclasses.replace(study_file(grid={}, seeds=(0,)), families={"VAE": Family("vae", "vae")})
    study, plan = planned(file)
    (cell,) = study.cells.values()
    assert plan.score_seconds(cell, Evaluation(100)) == pytest.approx(100 * (0.05 + 2 * FEATURE_SECONDS))


def test_diffusion_costs_its_denoising_steps_at_most_its_timesteps():
    family = Family("ddpm", settings={"formulation": "ddpm", "num_inference_steps": 10})
    file = dataclasses.replace(
        study_file(grid={"num_train_timesteps": [10, 1000]}, seeds=(0,)), families={"DDPM": family}
    )
    study, plan = planned(file)
    assert len(plan.probes) == 1 and study.evaluation.num_inference_steps == 50
    fewer, many = (plan.score_seconds(cell, study.evaluation) for cell in study.cells.values())
    assert fewer == pytest.approx(5000 * (10 * 0.05 + FEATURE_SECONDS))
    assert many == pytest.approx(5000 * (50 * 0.05 + FEATURE_SECONDS))
    assert plan.score_seconds(study.cells["DDPM num_train_timesteps=10 seed=0"], study.evaluation, 1) == fewer / 5000
    assert "and 1 more like it: 100 images/s, 16.7 min of training, 54.2 min to 3.68 h for 5" in describe_plan(
        study, plan
    )


def test_the_time_of_the_real_images_is_left_for_them():
    file = study_file()
    study, plan = planned(file, real_images=2000)
    reduced = scale_down(file, study, plan, "1h", 3600, workspace_in())
    assert plan.seconds(reduced) <= 3600
    assert reduced.budget.images < scale_down(file, *planned(file), "1h", 3600, workspace_in()).budget.images


def test_a_time_that_not_even_one_seed_fits_into_is_refused_with_the_one_that_would():
    file = study_file()
    study, plan = planned(file)
    with pytest.raises(UserError, match="--budget 1m: too short for 2 cells.*give at least ") as refused:
        scale_down(file, study, plan, "1m", 60, workspace_in())
    number, unit = re.search(r"give at least ([\d.]+) (s|min)", str(refused.value)).groups()
    enough = 1.01 * float(number) * {"s": 1, "min": 60}[unit]
    assert plan.seconds(scale_down(file, study, plan, "more", enough, workspace_in())) <= enough
    with pytest.raises(UserError):
        scale_down(file, study, plan, "less", 0.95 * enough, workspace_in())


def test_a_kind_of_cell_that_this_machine_cannot_train_costs_nothing_and_is_named():
    file = dataclasses.replace(study_file(), families={"CUDA": Family("gan", "dcgan", SMALL, device="cuda")})
    study, plan = planned(file)
    nothing = dataclasses.replace(plan, probes=dict.fromkeys(plan.probes))
    assert nothing.seconds(study) == 0
    assert "left out, as this machine does not have the device" in describe_plan(study, nothing)
    assert describe_plan(study, nothing).endswith("\nwithout 6 of 6 cells, which need a machine with CUDA")
    assert "without" not in describe_plan(study, plan)


def test_a_device_that_is_missing_is_named_instead_of_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(hfgen.studies.plan, "build_extractor", lambda *_: None)
    monkeypatch.setattr(hfgen.studies.plan, "features_to_compute", lambda *_: 0)
    monkeypatch.setattr(hfgen.studies.plan, "_feature_seconds", lambda *_: 0.0)
    file = dataclasses.replace(study_file(), families={"CUDA": Family("gan", "dcgan", SMALL, device="cuda")})
    plan = make_plan(expand(file, find_scripts(), "toy_paintings:24"), workspace_in(tmp_path))
    assert set(plan.probes.values()) == {None}
    told = "CUDA adam_beta1=0.0 seed=0: left out: needs a CUDA device, which this machine does not have\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    ("budget", "share", "cut"),
    [
        (Budget(images=1_600_000), 0.0512, Budget(images=81_000)),
        (Budget(images=1000), 0.9999, Budget(images=990)),
        (Budget(steps=7), 0.5, Budget(steps=3)),
        (Budget(steps=7), 0.01, Budget(steps=1)),
        (Budget(minutes=30), 0.1, Budget(minutes=3)),
    ],
)
def test_a_budget_is_cut_to_a_round_figure_below(budget, share, cut):
    assert cut_budget(budget, share) == cut


@pytest.mark.parametrize(("seconds", "told"), [(35, "35 s"), (720, "12 min"), (12240, "3.4 h"), (260000, "3.01 days")])
def test_times_are_told_in_units_that_people_use(seconds, told):
    assert format_duration(seconds) == told


@pytest.mark.parametrize(
    ("seconds", "told"), [(63.6, "about 64 s"), (4.04, "about 4 s"), (119.9, "about 120 s"), (13234, "about 3.7 h")]
)
def test_an_estimate_has_no_more_digits_than_it_deserves(seconds, told):
    assert estimated(seconds) == told


def test_features_of_real_images_that_are_kept_already_are_not_counted(tmp_path):
    file = dataclasses.replace(study_file(), data={"sample_size": 16})
    study = expand(file, find_scripts(), "toy_paintings:24")
    there = workspace_in(tmp_path)
    assert features_to_compute(study, there, Colours()) == 24
    load_reference(data_settings(next(iter(study.cells.values())), there), Colours(), "--dataset")
    assert features_to_compute(study, there, Colours()) == 0
    assert features_to_compute(study, there, Colours("other features")) == 24


@pytest.mark.slow
def test_a_plan_is_made_by_training_for_real_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hfgen.studies.plan, "PROBE_SECONDS", 2.0)
    monkeypatch.setattr(hfgen.studies.plan, "build_extractor", lambda *_: Colours())
    monkeypatch.chdir(tmp_path)
    file = dataclasses.replace(
        study_file(grid={"adam_beta1": [0.0, 0.5]}), data={"sample_size": 16}, seeds=(0,), settings={"cpu": True}
    )
    study = expand(file, find_scripts(), "toy_paintings:24")
    plan = make_plan(study, workspace_in(tmp_path))
    assert capsys.readouterr().out == "measuring GAN adam_beta1=0.0 seed=0\n"
    (probe,) = plan.probes.values()
    assert probe.start_seconds > 1 and probe.images_per_second > 10  # a process starts, a tiny network trains
    assert 0 < probe.generate_seconds < 1 and 0 < plan.feature_seconds < 1
    # A checkpoint holds both networks, the average and Adam's moments; what stays is the average alone.
    assert 1e4 < probe.kept_bytes < probe.passing_bytes / 3 and probe.passing_bytes % 3 == 0
    assert plan.real_images == 24 and list(tmp_path.iterdir()) == []


def test_a_vae_is_measured_before_and_after_its_learned_term_begins(monkeypatch):
    file = StudyFile("toy", "Toy", {"VAE": Family("vae", "vae_learned")}, Budget(steps=50_000), seeds=(0,))
    study = expand(file, find_scripts(), "toy_paintings:24")
    (cell,) = study.cells.values()
    probes = {12_500: PROBE, 1: dataclasses.replace(PROBE, images_per_second=50.0, start_seconds=0.0, kept_bytes=7)}
    monkeypatch.setattr(
        hfgen.studies.plan, "_train_and_generate", lambda cell, *_: probes[cell.settings["learned_term_start"]]
    )
    probe = _measure(cell, study, workspace_in())
    assert (probe.start_seconds, probe.kept_bytes) == (10.0, 7)
    assert 50_000 / probe.images_per_second == pytest.approx(12_500 / 100 + 37_500 / 50)


@pytest.mark.slow
def test_a_vae_that_chooses_its_density_and_learns_a_term_can_be_planned(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(hfgen.studies.plan, "PROBE_SECONDS", 1.0)
    monkeypatch.setattr(launch, "launch_command", lambda *of: [str(programs.python), *launch_command(*of)[1:]])
    small = {"block_out_channels": [4, 8], "discriminator_channels": 4, "refine_channels": 4, "latent_dim": 4}
    family = Family("vae", "vae_learned", {**small, "learned_term_start": 500, "sample_size": 16, "cpu": True})
    study = expand(StudyFile("toy", "Toy", {"VAE": family}, Budget(steps=1000)), find_scripts(), "toy_paintings:24")
    cell = next(iter(study.cells.values()))
    assert cell.settings["density"] == "auto"
    assert _measure(cell, study, workspace_in(tmp_path)).images_per_second > 10
