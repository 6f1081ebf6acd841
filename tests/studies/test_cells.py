"""The cells of a study: all their settings, shared ones run once, mistakes told, and the names of folders."""

import json
from dataclasses import replace

import pytest

import hfgen
from hfgen.errors import UserError
from hfgen.studies.cells import (
    ALL_CHECKPOINTS,
    Cell,
    Study,
    expand,
    images_per_step,
    num_scored_checkpoints,
    with_max_train_steps,
)
from hfgen.studies.scripts import find_scripts
from hfgen.studies.study_file import Budget, Evaluation, Family, StudyFile


GAN = {"DCGAN": Family("gan", "dcgan")}
PARTS = ("budget", "settings", "grid", "data", "seeds", "published", "evaluation", "metric", "question")


def study_of(families=GAN, name="toy", title="A toy", **parts) -> Study:
    assert set(parts) <= set(PARTS)
    file = StudyFile(name, title, families, **{"budget": Budget(steps=10), **parts})
    return expand(file, find_scripts(), "pictures")


def refusal_of(families=GAN, **parts) -> str:
    with pytest.raises(UserError) as error:
        study_of(families, **parts)
    assert "\n" not in str(error.value)
    return str(error.value)


def settings_of(study: Study, key: str) -> list:
    return [cell.settings[key] for cell in study.cells.values()]


# ------------------------------------------------------------------------------------------------ cells and places


def test_every_grid_point_is_trained_with_every_seed_the_first_seed_first():
    study = study_of(grid={"batch_size": [8, 16], "learning_rate": ["1e-4", 0.01]}, seeds=(4, 3))
    assert list(study.cells) == [
        f"DCGAN batch_size={size} learning_rate={rate} seed={seed}"
        for seed in (4, 3)
        for size in (8, 16)
        for rate in ("1e-4", "0.01")
    ]
    assert settings_of(study, "batch_size") == [8, 8, 16, 16] * 2
    assert settings_of(study, "learning_rate") == [1e-4, 0.01] * 4
    assert settings_of(study, "seed") == [4] * 4 + [3] * 4
    assert [place.point for place in study.places] == [
        {"batch_size": size, "learning_rate": rate} for size in ("8", "16") for rate in ("1e-4", "0.01")
    ]
    names = list(study.cells)
    assert [place.cells for place in study.places] == list(zip(names[:4], names[4:], strict=True))


def test_the_study_keeps_what_the_file_says_of_it():
    study = study_of(title="T", question="Q?", seeds=(1,), metric="kid", evaluation=Evaluation(20))
    assert (study.name, study.title, study.question, study.metric) == ("toy", "T", "Q?", "kid")
    assert (study.dataset, study.version, study.seeds) == ("pictures", hfgen.__version__, (1,))
    assert (study.budget, study.evaluation, study.asked) == (Budget(steps=10), Evaluation(20), None)
    assert (study.full_budget, study.full_evaluation, study.full_seeds) == (None, None, None)


def test_settings_are_taken_from_grid_then_family_then_study_then_data_then_preset():
    families = {"one": Family("gan", "wgan_gp", {"n_critic": 3}, grid={"batch_size": [8]})}
    study = study_of(
        families, data={"dataset": "pictures", "sample_size": 32}, settings={"n_critic": 2, "crop": "random"}
    )
    (cell,) = study.cells.values()
    told = {key: cell.settings[key] for key in ("batch_size", "n_critic", "crop", "sample_size", "loss", "adam_beta2")}
    assert told == {
        **{"batch_size": 8, "n_critic": 3, "crop": "random", "sample_size": 32, "loss": "wasserstein"},
        "adam_beta2": 0.9,
    }
    assert cell.settings["watch_every"] == 250  # as the script has it
    assert "dataset" not in cell.settings


def test_what_only_serves_who_watches_a_run_is_left_out_unless_the_study_wants_it():
    assert settings_of(study_of(), "report_to") == ["none"] and settings_of(study_of(), "sample_every") == [0]
    watched = study_of(settings={"report_to": "tensorboard", "sample_every": 5})
    assert (settings_of(watched, "report_to"), settings_of(watched, "sample_every")) == (["tensorboard"], [5])


def test_a_family_s_own_grid_stands_for_that_of_the_study():
    families = {
        **GAN,
        "wide": Family("gan", "dcgan", grid={"generator_channels": [4, 8]}),
        "plain": Family("vae", grid={}),
    }
    study = study_of(families, grid={"batch_size": [16, 32]})
    assert [(place.family, place.point) for place in study.places] == [
        ("DCGAN", {"batch_size": "16"}),
        ("DCGAN", {"batch_size": "32"}),
        ("wide", {"generator_channels": "4"}),
        ("wide", {"generator_channels": "8"}),
        ("plain", {}),
    ]
    assert list(study.cells)[-1] == "plain seed=0"


def test_a_setting_of_the_grid_that_a_family_lacks_is_refused_with_the_way_out():
    families = {"GAN": Family("gan"), "DDPM": Family("ddpm")}
    grid = {"latent_dim": [8, 9], "batch_size": [4]}
    with pytest.raises(UserError) as refused:
        study_of(families, grid=grid)
    assert str(refused.value).endswith(
        "DDPM latent_dim=8 batch_size=4: settings: unknown setting 'latent_dim'; give DDPM a grid of its own, without "
        "latent_dim: grid: {batch_size: [4]}"
    )
    study = study_of({**families, "DDPM": Family("ddpm", grid={"batch_size": [4]})}, grid=grid)
    assert [place.point for place in study.places][-1] == {"batch_size": "4"}
    with pytest.raises(UserError, match="unknown setting 'latent'; did you mean 'latent_dim'.$"):
        study_of(families, grid={"latent": [8, 9]})


def test_equal_cells_of_two_rows_are_trained_once():
    families = {
        "one": Family("gan", settings={"latent_dim": 8}, grid={"batch_size": [16, 32]}),
        "other": Family("gan", settings={"batch_size": "32"}, grid={"latent_dim": [8, 9]}),
    }
    study = study_of(families, seeds=(0, 1))
    assert len(study.cells) == 6
    assert study.places[1].cells == study.places[2].cells == ("one batch_size=32 seed=0", "one batch_size=32 seed=1")


def test_another_script_or_device_makes_another_cell():
    families = {"a": Family("ddpm", device="cuda"), "b": Family("ddpm"), "c": Family("ddpm", settings={"cpu": True})}
    study = study_of({**families, "d": Family("ddpm", device="cpu"), "e": Family("vae")})
    assert len(study.cells) == 5
    assert settings_of(study, "cpu") == [False, False, True, True, False]
    assert [cell.device for cell in study.cells.values()] == ["cuda", None, None, "cpu", None]
    assert [cell.method for cell in study.cells.values()] == ["ddpm"] * 4 + ["vae"]


def test_values_of_a_grid_may_be_lists_where_the_setting_is_one():
    study = study_of({"VAE": Family("vae")}, grid={"block_out_channels": [[8, 16], [16, 32]]})
    assert settings_of(study, "block_out_channels") == [[8, 16], [16, 32]]
    assert study.places[0].point == {"block_out_channels": "[8, 16]"}


def test_published_figures_stand_at_their_points():
    study = study_of({**GAN, "VAE": Family("vae")}, grid={"latent_dim": [8, 9]}, published={"DCGAN": [2.5, "failed"]})
    assert [place.published for place in study.places] == [2.5, "failed", None, None]


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        (Family("gan", "dcgn"), {}, "--preset dcgn: must be one of dcgan, dcgan256, dcgan_nearest, lsgan, "),
        (Family("gan", "--help"), {}, "--preset --help: must be one of dcgan, "),
        (Family("gan", "dcgan"), {"learning_rates": 1}, "'learning_rates'; did you mean 'learning_rate'?"),
        (Family("vae"), {"n_critic": 5}, "unknown setting 'n_critic'"),
        (Family("gan"), {"batch_size": "many"}, "argument --batch_size/--batch-size: invalid int value: 'many'"),
        (Family("gan"), {"batch_size": 64.5}, "argument --batch_size/--batch-size: invalid int value: '64.5'"),
        (Family("gan"), {"batch_size": [8, 9]}, "unknown argument 9"),
        (Family("gan"), {"batch_size": {"a": 1}}, "invalid int value: "),
        (Family("gan"), {"loss": "hinged"}, "argument --loss: invalid choice: 'hinged'"),
        (Family("gan"), {"augment": False}, "argument --augment: invalid choice: 'False'"),
        (Family("vae"), {"block_out_channels": []}, "block-out-channels: expected at least one argument"),
        (Family("gan"), {"batch_size": 1}, "--batch_size 1: BatchNorm needs at least 2 images"),
        (Family("ddpm", "ddpm_base"), {"batch_size": 1}, "BatchNorm needs at least 2 images at a time; use a larger"),
        (Family("gan", "wgan_gp"), {"augment": "ada"}, "--augment ada needs a loss that measures how much "),
        (Family("gan", "dcgan_nearest"), {"generator_channels": None}, "generator_channels null: does not change 32"),
        (Family("ddpm", device="cuda"), {"cpu": True}, "device cuda and the setting cpu contradict each other; leave"),
    ],
)  # fmt: skip
def test_settings_that_a_script_would_refuse_are_named_with_study_family_and_point(family, settings, told):
    own = {**family.settings, **settings}
    message = refusal_of({"row": replace(family, settings=own)}, grid={"adam_beta2": ["0.99"]})
    assert message.startswith("study toy: row adam_beta2=0.99: ")
    assert told in message
    assert "error: " not in message  # what argparse writes before it


def test_a_value_of_a_grid_that_the_script_refuses_is_told_with_its_point():
    message = refusal_of(grid={"batch_size": [8, 1]})
    assert message == "study toy: DCGAN batch_size=1: --batch_size 1: BatchNorm needs at least 2 images"
    assert refusal_of(grid={"sample_sise": [8]}).endswith("unknown setting 'sample_sise'; did you mean 'sample_size'?")


def test_null_is_a_value_where_the_preset_has_none():
    assert settings_of(study_of(grid={"generator_channels": [None, 8]}), "generator_channels") == [None, 8]


@pytest.mark.parametrize("rates", [["1e-4", 0.0001], [0.0001, "0.00010"]])
def test_one_value_written_in_two_ways_is_refused(rates):
    told = f"DCGAN learning_rate={rates[1]}: has the same settings as another point of its grid; leave one out"
    assert told in refusal_of(grid={"learning_rate": rates})


def test_a_preset_may_be_the_settings_of_an_earlier_run(tmp_path):
    file = tmp_path / "training_config.json"
    earlier = {
        "batch_size": 24,
        "num_epochs": 3,
        "max_train_steps": 7,
        "output_dir": "runs/x",
        "seed": 5,
        "resume": "latest",
    }
    file.write_text(json.dumps({**earlier, "max_train_time": "1m", "push_to_hub": True, "dataset": "elsewhere"}))
    (cell,) = study_of({"again": Family("vae", str(file))}).cells.values()
    assert (cell.settings["batch_size"], cell.settings["seed"], cell.settings["max_train_steps"]) == (24, 0, 10)
    decided = {"num_epochs", "output_dir", "resume", "max_train_time", "push_to_hub", "hub_model_id", "dataset"}
    assert cell.settings.keys() & decided == set()


# ----------------------------------------------------------------------------------------------------------- budgets


def test_a_budget_in_steps_is_that_of_every_cell():
    assert settings_of(study_of(grid={"batch_size": [8, 16]}, budget=Budget(steps=12)), "max_train_steps") == [12, 12]


@pytest.mark.parametrize(("images", "steps"), [(1, 1), (64, 1), (65, 2), (6400, 100), (1_600_000, 25_000)])
def test_a_budget_in_images_is_rounded_up_to_whole_steps(images, steps):
    assert with_max_train_steps({"batch_size": 64}, Budget(images=images))["max_train_steps"] == steps


def test_a_sampler_that_edm_lacks_is_refused_before_anything_is_trained():
    family = Family("ddpm", settings={"formulation": "edm", "unet": "compact"})
    told = refusal_of({"EDM": family}, evaluation=Evaluation(num_images=20, sampler="unipc"))
    assert told == "study toy: EDM: evaluation: sampler: unipc: EDM has only ddim and dpm"
    assert study_of({"EDM": family}, evaluation=Evaluation(num_images=20, sampler="ddim")).cells


def test_samples_from_a_density_that_is_not_fitted_are_refused_before_training():
    vae = {**GAN, "VAE": Family("vae", grid={"density_components": [5, 0]})}
    told = refusal_of(vae, evaluation=Evaluation(num_images=20, sample_from="ex_post"))
    reason = "density_components 0 fits no density; give 1 or more, or leave sample_from out"
    assert told == f"study toy: VAE density_components=0: evaluation: sample_from ex_post: {reason}"
    for source in ("prior", None):
        assert len(study_of(vae, evaluation=Evaluation(num_images=20, sample_from=source)).cells) == 3


def test_of_a_gan_images_are_those_that_the_discriminator_has_seen():
    assert images_per_step({"batch_size": 16, "n_critic": 5}) == 80
    assert images_per_step({"batch_size": 16}) == 16
    study = study_of({"WGAN": Family("gan", "wgan_gp", {"n_critic": 5, "batch_size": 16})}, budget=Budget(images=801))
    assert settings_of(study, "max_train_steps") == [11]  # 16 images, 5 times


@pytest.mark.parametrize("budget", [Budget(steps=10**6), Budget(images=10**8), Budget(minutes=1)])
def test_the_epochs_of_a_preset_cut_no_budget_short(budget):
    (cell,) = study_of({"Diffusion": Family("ddpm", "ddpm_base")}, budget=budget).cells.values()
    assert "num_epochs" not in cell.settings and "max_train_time" not in cell.settings
    assert cell.settings["max_train_steps"] >= 10**8 // 128


def test_with_a_budget_in_minutes_no_number_of_steps_ends_a_run():
    study = study_of({"DDPM": Family("ddpm"), **GAN}, budget=Budget(minutes=600))
    assert min(settings_of(study, "max_train_steps")) >= 10**9


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_a_learning_rate_that_falls_to_the_last_step_needs_to_know_it(scheduler):
    families = {"VAE": Family("vae", settings={"lr_scheduler": scheduler})}
    told = (
        f"study toy: VAE: budget: minutes: lr_scheduler {scheduler} needs to know the last step; give steps or images"
    )
    assert refusal_of(families, budget=Budget(minutes=5)) == told
    assert settings_of(study_of(families, budget=Budget(steps=5)), "lr_scheduler") == [scheduler]
    families = {"VAE": Family("vae", settings={"lr_scheduler": "constant"})}
    assert settings_of(study_of(families, budget=Budget(minutes=5)), "lr_scheduler") == ["constant"]
    learned = {"VAE": Family("vae", "vae_learned", {"lr_scheduler": scheduler})}  # whose schedule ends where it begins
    told = "study toy: VAE: budget: minutes: learned_term_start needs to know the last step; give steps or images"
    assert refusal_of(learned, budget=Budget(minutes=5)) == told


@pytest.mark.parametrize(("steps", "start"), [(2, 0), (9000, 4000), (12_500, 5555)])
def test_a_budget_that_ends_before_a_learned_term_begins_is_refused(steps, start):
    """Its row would be that of a plain VAE, under another name."""
    told = f"study toy: VAE: --learned_term_start 12500: the run ends after {steps:,} updates, before the "
    message = refusal_of({"VAE": Family("vae", "vae_learned")}, budget=Budget(steps=steps))
    assert message.startswith(told) and f"use --learned_term_start {start}," in message
    settings = {"learned_term_start": start}
    assert study_of({"VAE": Family("vae", "vae_learned", settings)}, budget=Budget(steps=steps))
    assert study_of({"VAE": Family("vae", "vae_learned")}, budget=Budget(steps=12_501))


@pytest.mark.parametrize(("every", "steps", "scores"), [(32, 4, 2), (33, 5, 2), (64, 8, 1), (96, 12, 0), (500, 63, 0)])
def test_where_scores_are_asked_for_on_the_way_a_checkpoint_is_kept(every, steps, scores):
    study = study_of(
        budget=Budget(images=96), evaluation=Evaluation(10, every_images=every), settings={"batch_size": 8}
    )
    (cell,) = study.cells.values()
    assert cell.settings["checkpoint_every"] == steps and cell.settings["checkpoints_total_limit"] == ALL_CHECKPOINTS
    assert num_scored_checkpoints(cell) == scores


@pytest.mark.parametrize("name", ["checkpoint_every", "checkpoints_total_limit"])
def test_scores_on_the_way_and_checkpoints_of_one_s_own_contradict_each_other(name):
    told = refusal_of(evaluation=Evaluation(10, every_images=20), settings={name: 3})
    assert told.endswith(f"settings: {name}: is set by evaluation: every_images; leave one out")


def test_scores_on_the_way_need_a_budget_that_is_known_in_images():
    told = refusal_of(evaluation=Evaluation(10, every_images=20), budget=Budget(minutes=3))
    assert told == "evaluation: every_images needs a budget in images or steps, not in minutes"


def test_without_scores_on_the_way_checkpoints_are_as_the_settings_say():
    (cell,) = study_of(settings={"checkpoint_every": 3}).cells.values()
    assert (cell.settings["checkpoint_every"], cell.settings["checkpoints_total_limit"]) == (3, 2)
    assert num_scored_checkpoints(cell) == 0


# ------------------------------------------------------------------------------------------------- names of folders


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("DCGAN batch_size=64 seed=0", "DCGAN-batch_size=64-seed=0"),
        ("B1: a/b\\c? <256px>|* seed=0", "B1-a-b-c-256px-seed=0"),
        (".. seed=0", "seed=0"),
        ("../../x seed=0", "x-seed=0"),
        ("~ seed=1", "seed=1"),
        ("Größe … seed=0", "Gr-e-seed=0"),
        ("a\nb\t seed=0", "a-b-seed=0"),
        ("VAE rate=1e-4 channels=[8, 16] seed=0", "VAE-rate=1e-4-channels=-8-16-seed=0"),
    ],
)  # fmt: skip
def test_the_name_of_a_folder_is_one_that_every_file_system_takes(name, folder):
    assert Cell(name, "gan", {}).folder_name == folder


@pytest.mark.parametrize("names", [("a/b", "a b"), ("Ä", "Ö"), ("..", "~"), ("gan", "GAN"), ("a\n", "a")])
def test_two_names_that_would_share_a_folder_are_refused(names):
    families = {name: Family("gan", settings={"latent_dim": 8 + index}) for index, name in enumerate(names)}
    first, second = (repr(f"{name} seed=0") for name in names)
    remedy = "their family names must differ in letters a to z or digits"
    told = f"study toy: {first} and {second} would share a folder: {remedy}"
    assert refusal_of(families) == told
    assert len(study_of({name: GAN["DCGAN"] for name in names}).cells) == 1  # of one training they may


def test_two_cells_of_one_name_are_refused_unless_they_are_one_training():
    row = Family("gan", grid={"batch_size": [8]})
    same, other = (Family("gan", settings={"batch_size": size}, grid={}) for size in (8, 16))
    assert len(study_of({"a": row, "a batch_size=8": same}).cells) == 1
    told = refusal_of({"a": row, "a batch_size=8": other})
    assert told == "study toy: families: a batch_size=8: another family also has a cell named 'a batch_size=8 seed=0'"


def test_a_name_too_long_for_a_folder_is_refused():
    (fits,) = study_of({"a" * 193: GAN["DCGAN"]}).cells.values()
    assert len(fits.folder_name) == 200
    assert refusal_of({"a" * 195: GAN["DCGAN"]}).endswith("shorten the name of the family by 2 letters")
