"""The shipped studies: where they are found, and that they are the tables which they are named after."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest

from hfgen.errors import UserError
from hfgen.studies.cells import expand
from hfgen.studies.scripts import (
    METHODS,
    SHIPPED_SCRIPTS,
    find_scripts,
    import_script,
    launch_arguments,
    own_scripts,
    script_digests,
)
from hfgen.studies.study_file import Budget, Evaluation, Family, StudyFile, find_study_file, read_study_file


NAN = math.nan
# Study A's tables 2 to 8, and what study B says of itself.
PUBLISHED = {
    "batch_size": {
        "DCGAN": [346.018, 357.736, 370.288],
        "VAE": [120.807, 133.822, 152.050],
        "Diffusion": [196.418, 164.738, 182.891],
    },
    "learning_rate": {
        "DCGAN": [38.589, 75.355, 83.213, 79.890, 50.029, 412.715],
        "VAE": [109.137, 120.807, 306.088, 274.463, 347.216, 347.190],
        "Diffusion": [147.226, 261.701, 230.554, 298.246, 340.721, NAN],
    },
    "beta1": {
        "DCGAN": [38.09, 48.81, 38.59, 55.51],
        "VAE": [111.22, 123.15, 109.14, 127.23],
        "Diffusion": [278.665, 187.994, 237.30, 258.43],
    },
    "gan_loss": {"DCGAN": [44.180], "LSGAN": [35.731], "SNGAN": [30.976], "WGAN-GP": [None]},
    "latent_dim": {"DCGAN": [39.454, 38.589, 41.928], "VAE": [113.689, 109.137, 104.949]},
    "filters": {"ndf": [48.83, 38.59, 39.19], "ngf": [53.02, 38.59, 53.66]},
    "timesteps": {"Diffusion": [83.648, 171.280, 140.617, 231.182, 200.919, 177.716]},
    "cpu_vs_cuda": {"CPU": [120], "CUDA": [5]},
    "monet_families": {
        "B1 DCGAN 256px": ["mode collapse"],
        "B2 WGAN-GP": ["their best"],
        "B3 diffusion, linear": ["the baseline"],
        "B4 library diffusion 128px": ["failed at step 999"],
        "B5 attention, cosine": ["below B6"],
        "B6 attention, linear": ["better than B5"],
        "WGAN-GP, augmented": [None],
        "SNGAN, augmented": [None],
        "VAE": [None],
    },
}
POINTS = {
    "batch_size": [{"batch_size": size} for size in ("64", "128", "256")],
    "learning_rate": [{"learning_rate": rate} for rate in ("1e-4", "2e-4", "5e-4", "1e-3", "5e-3", "1e-2")],
    "beta1": [{"adam_beta1": value} for value in ("0.0", "0.3", "0.5", "0.7")],
    "latent_dim": [{"latent_dim": size} for size in ("50", "100", "200")],
    "timesteps": [{"num_train_timesteps": count} for count in ("100", "250", "500", "750", "1000", "1500")],
}
# What every cell of a table has in common, as study A states it.
STATED = {
    "batch_size": {"learning_rate": 2e-4, "adam_beta1": 0.5},
    "learning_rate": {"batch_size": 64, "adam_beta1": 0.5},
    "beta1": {"batch_size": 64, "learning_rate": 1e-4},
    "gan_loss": {"batch_size": 64},
    "latent_dim": {"batch_size": 64, "learning_rate": 1e-4, "adam_beta1": 0.5},
    "filters": {"batch_size": 64, "learning_rate": 1e-4, "adam_beta1": 0.5, "loss": "non_saturating"},
    "timesteps": {"batch_size": 64, "learning_rate": 1e-4},
}
SHIPPED = sorted(PUBLISHED)


def expanded(name):
    return expand(read_study_file(find_study_file(name)), find_scripts(), "pictures")


@pytest.mark.parametrize("name", SHIPPED)
def test_published_figures_stand_at_their_points_as_they_were_published(name):
    found = {}
    for place in expanded(name).places:
        found.setdefault(place.family, []).append(place.published)
    assert repr(found) == repr(PUBLISHED[name])  # as text, in which NaN is NaN


@pytest.mark.parametrize("name", POINTS)
def test_a_table_has_the_columns_of_the_published_one(name):
    study = expanded(name)
    for family in {place.family for place in study.places}:
        assert [place.point for place in study.places if place.family == family] == POINTS[name]


@pytest.mark.parametrize("name", STATED)
def test_the_tables_of_study_a_have_its_recipe_at_every_cell(name):
    study = expanded(name)
    assert (study.budget, study.seeds) == (Budget(images=1_600_000), (0, 1, 2))
    assert study.evaluation == Evaluation(num_images=5000, num_inference_steps=50)
    assert len(study.cells) == 3 * {"filters": 5}.get(name, len(study.places))
    recipe = {"sample_size": 64, "crop": "center", "horizontal_flip": False, "random_rotation": 0.0, **STATED[name]}
    for cell in study.cells.values():
        told = {**cell.settings, "augment": cell.settings.get("augment", "none")}
        assert {key: told[key] for key in recipe} == recipe
        assert told["augment"] == "none"
        assert told.get("on_collapse", "warn") == "warn"
        images = told["max_train_steps"] * told["batch_size"] * told.get("n_critic", 1)
        assert 1_600_000 <= images < 1_600_000 + told["batch_size"] * told.get("n_critic", 1)


@pytest.mark.parametrize(
    ("name", "family", "method", "settings"),
    [
        ("batch_size", "DCGAN", "gan", {"loss": "non_saturating", "normalization": "batch", "latent_dim": 100}),
        ("batch_size", "VAE", "vae", {"latent_dim": 100}),
        ("batch_size", "Diffusion", "ddpm", {"unet": "base", "loss": "l1", "num_train_timesteps": 1000}),
        ("gan_loss", "DCGAN", "gan", {"loss": "non_saturating", "n_critic": 1}),
        ("gan_loss", "LSGAN", "gan", {"loss": "least_squares", "n_critic": 1}),
        ("gan_loss", "SNGAN", "gan", {"loss": "hinge", "normalization": "spectral"}),
        ("gan_loss", "WGAN-GP", "gan", {"loss": "wasserstein", "n_critic": 5, "generator_channels": 64}),
        ("monet_families", "B1 DCGAN 256px", "gan", {"network": "dcgan256", "augment": "none", "sample_size": 256}),
        ("monet_families", "B2 WGAN-GP", "gan", {"loss": "wasserstein", "augment": "none", "generator_channels": 128}),
        ("monet_families", "B3 diffusion, linear", "ddpm", {"unet": "base", "beta_schedule": "linear"}),
        ("monet_families", "B4 library diffusion 128px", "ddpm", {"unet": "library", "sample_size": 128}),
        ("monet_families", "B5 attention, cosine", "ddpm", {"unet": "attention", "beta_schedule": "cosine"}),
        ("monet_families", "B6 attention, linear", "ddpm", {"unet": "attention", "beta_schedule": "linear"}),
        ("monet_families", "WGAN-GP, augmented", "gan", {"loss": "wasserstein", "augment": "auto"}),
        ("monet_families", "SNGAN, augmented", "gan", {"loss": "hinge", "augment": "auto"}),
        ("monet_families", "VAE", "vae", {"latent_dim": 100}),
    ],
)
def test_a_row_is_the_system_that_it_is_named_after(name, family, method, settings):
    study = expanded(name)
    (place, *_) = [place for place in study.places if place.family == family]
    for cell in (study.cells[one] for one in place.cells):
        assert cell.method == method
        assert {key: cell.settings[key] for key in settings} == settings


def test_the_middle_of_both_rows_of_the_filters_is_one_training():
    study = expanded("filters")
    widths = [
        (cell.settings["discriminator_channels"], cell.settings["generator_channels"]) for cell in study.cells.values()
    ]
    assert sorted(set(widths)) == [(32, 64), (64, 32), (64, 64), (64, 128), (128, 64)]
    places = {(place.family, *place.point.values()): place.cells for place in study.places}
    assert places["ndf", "64"] == places["ngf", "64"]
    assert len(study.places) == 6 and len({cell for place in study.places for cell in place.cells}) == 15


def test_cpu_and_cuda_differ_in_the_device_alone():
    study = expanded("cpu_vs_cuda")
    on_cpu, on_cuda = (study.cells[place.cells[0]] for place in study.places)
    assert (on_cpu.device, on_cuda.device, study.metric) == ("cpu", "cuda", "minutes")
    assert {key for key in on_cpu.settings if on_cpu.settings[key] != on_cuda.settings[key]} == {"cpu"}
    assert (on_cpu.settings["cpu"], on_cuda.settings["cpu"]) == (True, False)
    assert on_cpu.settings["max_train_steps"] == math.ceil(100 * 300 / 128)


# ------------------------------------------------------------------------------------------------- where studies are


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_study_is_found_by_its_name_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).resolve().parents[2] / "training_scripts" / "studies" / f"{name}.yaml"
    for written in (name, f"{name}.yaml", f"studies/{name}", f"studies/{name}.yaml", str(file)):
        assert find_study_file(written) == file


def test_a_file_in_the_working_folder_goes_before_a_shipped_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gan_loss.yaml").write_text("title: T")
    assert find_study_file("gan_loss.yaml") == Path("gan_loss.yaml")
    assert find_study_file("gan_loss") == find_scripts() / "studies" / "gan_loss.yaml"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_study_file("~/gan_loss.yaml") == tmp_path / "gan_loss.yaml"


@pytest.mark.parametrize("name", ["gan_los", "studies/absent.yaml", "..", ""])
def test_a_study_that_is_not_there_is_refused_with_the_shipped_ones(name):
    with pytest.raises(UserError) as error:
        find_study_file(name)
    assert str(error.value) == f"{name}: neither a study file nor one of the shipped studies ({', '.join(SHIPPED)})"


def test_training_scripts_of_the_working_folder_go_before_those_beside_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = Path(__file__).resolve().parents[2] / "training_scripts"
    (tmp_path / "training_scripts").mkdir()
    assert find_scripts() == shipped
    (tmp_path / "training_scripts" / "train_gan.py").touch()
    assert find_scripts() == tmp_path / "training_scripts"


@pytest.mark.parametrize("own", METHODS)
def test_a_script_that_the_working_folder_lacks_is_that_of_hfgen(tmp_path, monkeypatch, own):
    (tmp_path / "training_scripts").mkdir()
    file = tmp_path / "training_scripts" / f"{METHODS[own]}.py"
    file.write_text((SHIPPED_SCRIPTS / file.name).read_text())
    monkeypatch.chdir(tmp_path)
    assert own_scripts(find_scripts(), METHODS) == {own: file}
    for method, name in METHODS.items():
        launched = [str(file)] if method == own else ["-m", f"hfgen.training_scripts.{name}"]
        assert launch_arguments(find_scripts(), method) == launched
        module = f"own_{name}" if method == own else f"hfgen.training_scripts.{name}"
        assert import_script(find_scripts(), method).__name__ == module


def test_shipped_studies_and_presets_are_found_beside_scripts_of_one_s_own(tmp_path, monkeypatch):
    own = tmp_path / "training_scripts"
    (own / "studies").mkdir(parents=True)
    (own / "studies" / "beta1.yaml").write_text("title: Mine")
    (own / "studies" / "mine.yaml").write_text("title: Mine")
    monkeypatch.chdir(tmp_path)
    assert find_study_file("beta1") == own / "studies" / "beta1.yaml"
    assert find_study_file("gan_loss") == SHIPPED_SCRIPTS / "studies" / "gan_loss.yaml"
    with pytest.raises(UserError, match="batch_size, beta1, cpu_vs_cuda, .* learning_rate, mine, monet_families"):
        find_study_file("absent")
    families = {"mine": Family("gan", "tiny"), "VAE": Family("vae", "vae_200")}
    (own / "presets" / "gan").mkdir(parents=True)
    (own / "presets" / "gan" / "tiny.json").write_text('{"generator_channels": 4}')
    study = expand(StudyFile("toy", "A toy", families, Budget(steps=1)), find_scripts(), "photos")
    mine, vae = study.cells.values()
    assert (mine.settings["generator_channels"], vae.settings["latent_dim"]) == (4, 200)
    assert study.scripts == {"gan": None, "vae": None}


def test_only_a_script_that_is_not_hfgen_s_has_a_digest(tmp_path):
    (tmp_path / "train_gan.py").write_bytes((SHIPPED_SCRIPTS / "train_gan.py").read_bytes())
    (tmp_path / "train_vae.py").write_bytes(b"mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    assert script_digests(tmp_path, METHODS) == {"ddpm": None, "gan": None, "vae": digest}
    assert script_digests(tmp_path, ["ddpm"]) == script_digests(SHIPPED_SCRIPTS, ["ddpm"]) == {"ddpm": None}


def test_shipped_scripts_are_imported_and_launched_as_modules():
    for method in METHODS:
        assert import_script(SHIPPED_SCRIPTS, method).__name__ == f"hfgen.training_scripts.train_{method}"
        assert launch_arguments(SHIPPED_SCRIPTS, method) == ["-m", f"hfgen.training_scripts.train_{method}"]


OWN_SETTINGS = """
from dataclasses import dataclass
from hfgen.config import setting
from hfgen.ranges import COUNT

@dataclass
class OwnSettings(GANSettings):
    latent_dim: int = setting(77, "dimension of the latents", COUNT)

SETTINGS = (RunSettings, DataSettings, OwnSettings)
"""


def test_a_study_reads_and_launches_the_scripts_of_the_working_folder(tmp_path, monkeypatch):
    own = tmp_path / "training_scripts"
    shutil.copytree(SHIPPED_SCRIPTS, own)
    text = (own / "train_gan.py").read_text()
    settings = "SETTINGS = (RunSettings, DataSettings, GANSettings)"
    assert settings in text
    (own / "train_gan.py").write_text(text.replace(settings, OWN_SETTINGS))
    preset = json.loads((own / "presets" / "gan" / "lsgan.json").read_text())
    preset.pop("latent_dim", None)
    (own / "presets" / "gan" / "mine.json").write_text(json.dumps(preset))
    monkeypatch.chdir(tmp_path)
    study = expand(
        StudyFile("toy", "A toy", {"mine": Family("gan", "mine")}, Budget(steps=1)), find_scripts(), "photos"
    )
    assert [cell.settings["latent_dim"] for cell in study.cells.values()] == [77]
    assert launch_arguments(find_scripts(), "gan") == [str(own / "train_gan.py")]
    assert import_script(SHIPPED_SCRIPTS, "gan").GANSettings().latent_dim == 100
