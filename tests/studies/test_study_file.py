"""Study files: what is written in them, and every mistake named with its file, its place and the remedy."""

import math
import subprocess
import sys

import pytest

from hfgen.errors import UserError
from hfgen.studies.study_file import SET_BY_THE_STUDY, Budget, Evaluation, Family, StudyFile, read_study_file


TOY = """
title: A toy
families:
  one: {method: gan, preset: dcgan, settings: {loss: hinge}}
  other: {method: vae, grid: {latent_dim: [5, 6, 7]}}
data: {dataset: pictures, sample_size: 32}
settings: {adam_beta1: 0.5}
grid: {batch_size: [64, 128]}
budget: {steps: 10}
seeds: [0, 1]
evaluation: {num_images: 20}
published: {one: [3.5, a remark]}
"""


@pytest.fixture
def study(tmp_path):
    """Read a study file of that content."""

    def read(text: str | bytes) -> StudyFile:
        file = tmp_path / "toy.yaml"
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_study_file(file)

    return read


@pytest.fixture
def mistake(study, tmp_path):
    """Read a study file that is a mistake; return what is said behind the path of the file."""

    def read(text: str | bytes) -> str:
        with pytest.raises(UserError) as error:
            study(text)
        path, _, told = str(error.value).partition(".yaml: ")
        assert path == str(tmp_path / "toy") and "\n" not in told
        return told

    return read


def replaced(old: str, new: str) -> str:
    assert TOY.count(old) == 1
    return TOY.replace(old, new)


# ------------------------------------------------------------------------------------------------------ what is read


def test_all_parts_of_a_study_file_are_read(study):
    assert study(TOY) == StudyFile(
        name="toy",
        title="A toy",
        families={
            "one": Family("gan", "dcgan", {"loss": "hinge"}),
            "other": Family("vae", grid={"latent_dim": [5, 6, 7]}),
        },
        budget=Budget(steps=10),
        published={"one": [3.5, "a remark"]},
        data={"dataset": "pictures", "sample_size": 32},
        settings={"adam_beta1": 0.5},
        grid={"batch_size": [64, 128]},
        seeds=(0, 1),
        evaluation=Evaluation(num_images=20),
    )


def test_what_may_be_left_out_has_a_value(study):
    least = study("{title: T, families: {one: {method: ddpm}}, budget: {minutes: 2.5}}")
    assert least == StudyFile("toy", "T", {"one": Family("ddpm")}, Budget(minutes=2.5), seeds=(0,), metric="fid")
    assert (least.evaluation.num_images, least.evaluation.seed) == (5000, 0)


def test_a_family_s_own_grid_stands_for_that_of_the_study(study):
    toy = study(TOY)
    assert toy.points("one") == [{"batch_size": 64}, {"batch_size": 128}]
    assert toy.points("other") == [{"latent_dim": 5}, {"latent_dim": 6}, {"latent_dim": 7}]
    own = "settings: {batch_size: 9}, grid: {}"  # none of its own either, so that it may set what the others vary
    assert study(replaced("grid: {latent_dim: [5, 6, 7]}", own)).points("other") == [{}]


def test_the_points_of_a_grid_are_all_combinations_the_last_setting_fastest(study):
    toy = study(replaced("[64, 128]}", "[64, 128], watch_every: [1, 2]}").replace("published", "#"))
    values = [tuple(point.values()) for point in toy.points("one")]
    assert values == [(64, 1), (64, 2), (128, 1), (128, 2)]
    assert study(replaced("grid: {batch", "#").replace("published", "#")).points("one") == [{}]


def test_the_units_of_a_budget_are_said_in_words():
    told = [str(Budget(steps=1200)), str(Budget(images=1600000)), str(Budget(minutes=2.5))]
    assert told == ["1,200 steps", "1,600,000 images", "2.5 minutes"]


def test_numbers_that_yaml_reads_as_text_stay_text_in_a_grid_but_not_in_published(study):
    toy = study(TOY.replace("batch_size: [64, 128]", "learning_rate: [1e-4, 0.002]").replace("a remark", "1e-4"))
    assert toy.grid == {"learning_rate": ["1e-4", 0.002]}
    assert toy.published == {"one": [3.5, 1e-4]}


@pytest.mark.parametrize("written", [".nan", "NaN", "nan"])
def test_a_published_nan_is_a_number(study, written):
    first, last = study(replaced("a remark", written)).published["one"]
    assert first == 3.5 and isinstance(last, float) and math.isnan(last)


def test_one_published_figure_needs_no_list_and_one_that_is_not_known_is_null(study):
    assert study(replaced("3.5", "null")).published == {"one": [None, "a remark"]}
    without_grid = replaced("[64, 128]", "[64]").replace("[3.5, a remark]", "44.180")
    assert study(without_grid).published == {"one": [44.18]}


def test_names_of_families_may_have_any_letters(study):
    name = "Größe 64/128 … #1: ..\\"
    toy = study(replaced("  one:", f"  '{name}':").replace("{one:", f"{{'{name}':"))
    assert list(toy.families) == [name, "other"]
    assert list(toy.published) == [name]


def test_families_may_share_their_settings_by_an_alias_and_alter_them(study):
    families = """
  one: {method: gan, settings: &shared {loss: hinge, n_critic: 1}}
  other: {method: gan, settings: {<<: *shared, n_critic: 5}}
"""
    toy = study(f"title: T\nbudget: {{steps: 1}}\nfamilies:{families}")
    assert [family.settings for family in toy.families.values()] == [
        {"loss": "hinge", "n_critic": 1},
        {"loss": "hinge", "n_critic": 5},
    ]


def test_study_files_are_read_without_torch():
    code = (
        "import sys; from hfgen.studies.study_file import find_study_file, read_study_file\n"
        "read_study_file(find_study_file('gan_loss'))\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys() or 'none')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.stdout.strip(), process.stderr) == ("none", "")


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_every_file_that_is_no_mapping_in_yaml_is_refused(mistake, tmp_path):
    assert mistake("families: [").startswith("not valid YAML (while parsing")
    assert mistake(b"title: \xff\xfe").startswith("not valid YAML (")
    assert mistake("title: 2026-13-45").startswith("not valid YAML (month must be")
    assert mistake("title: !!python/object/apply:os.getcwd []").startswith("not valid YAML (could not determine")
    assert mistake("") == "the file: must be names with values, such as {batch_size: 64}, not nothing"
    assert mistake("- one").endswith(", not list")
    assert mistake("a study").endswith(", not str")
    with pytest.raises(UserError, match="absent.yaml: not valid YAML .*No such file"):
        read_study_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        # Keys
        ("title:", "titel:", "the file: unknown key: 'titel' is not one of name, title, families, "),
        ("seeds:", "sedes:", "; did you mean 'seeds'?"),
        ("title:", "name:", "the file: name: leave it out, the study is named after its file"),
        ("title: A toy", "", "the file: title must be given"),
        ("budget: {steps: 10}", "", "the file: budget must be given"),
        ("steps", "epochs", "budget: unknown key: 'epochs' is not one of steps, images, minutes"),
        ("steps", "step", "budget: unknown key: 'step' is not one of steps, images, minutes; did you mean 'steps'?"),
        ("num_images", "num_image", "evaluation: unknown key: 'num_image' is not one of num_images, seed, "),
        ("preset", "presets", "families: one: unknown key: 'presets' is not one of method, preset, "),
        ("method: vae, ", "", "families: other: method must be given"),
        ("settings: {adam_beta1", "settings: {1", "settings: 1: a name must be text; write it in quotes"),
        ("  one:", "  no:", "families: False: a name must be text; write it in quotes"),
        ("  one:", "  ' ':", "families: ' ': a name must be text; write it in quotes"),
        # Names that stand there twice
        ("  other:", "  one:", "line 5: 'one' appears twice; leave one out"),
        ("seeds:", "title:", "line 10: 'title' appears twice; leave one out"),
        ("adam_beta1: 0.5", "a: 1, b: 2, a: 3", "line 7: 'a' appears twice; leave one out"),
        ("[3.5, a", "[{a: 1, a: 2}, a", "line 12: 'a' appears twice; leave one out"),
        # Text
        ("A toy", "[A, toy]", "title: ['A', 'toy']: must be text; write it in quotes"),
        ("A toy", "2026", "title: 2026: must be text; write it in quotes"),
        ("A toy", "' '", "title: ' ': must be text; write it in quotes"),
        ("seeds:", "question: 5\nseeds:", "question: 5: must be text; write it in quotes"),
        ("seeds:", "source: {table: 2}\nseeds:", "source: {'table': 2}: must be text; write it in quotes"),
        ("dataset: pictures", "dataset: 5", "data: dataset: 5: must be text; write it in quotes"),
        # Mappings
        ("families:\n", "families: []\nrows:\n", "families: must be names with values"),
        ("{method: gan, preset: dcgan, settings: {loss: hinge}}", "dcgan", "families: one: must be names with values"),
        ("settings: {loss: hinge}", "settings: [hinge]", "families: one: settings: must be names with values, "),
        ("settings: {loss: hinge}", "settings:", "families: one: settings: must be names with values, "),
        ("grid: {latent_dim: [5, 6, 7]}", "grid: [5]", "families: other: grid: must be names with values, "),
        ("data: {dataset: pictures, sample_size: 32}", "data: pictures", "data: must be names with values, "),
        ("settings: {adam_beta1: 0.5}", "settings: 5", "settings: must be names with values, such as "),
        ("grid: {batch_size: [64, 128]}", "grid:", "grid: must be names with values, such as {batch_size: 64}, "),
        ("published: {one: [3.5, a remark]}", "published: [3]", "published: must be names with values, "),
        ("{steps: 10}", "10", "budget: must be names with values, such as {batch_size: 64}, not int"),
        ("{num_images: 20}", "20", "evaluation: must be names with values, such as "),
        # Seeds
        ("[0, 1]", "3", "seeds: write a list, such as [0, 1, 2]"),
        ("[0, 1]", "[]", "seeds: give at least one, without repeats"),
        ("[0, 1]", "[0, 1, 0]", "seeds: give at least one, without repeats"),
        ("[0, 1]", "[0, -1]", "seeds: -1: must be a whole number, at least 0"),
        ("[0, 1]", "[0, true]", "seeds: True: must be a whole number, at least 0"),
        ("[0, 1]", "[0, 1.5]", "seeds: 1.5: must be a whole number, at least 0"),
        ("[0, 1]", "['0']", "seeds: '0': must be a whole number, at least 0"),
        ("[0, 1]", "[[0]]", "seeds: [0]: must be a whole number, at least 0"),
        # Grids
        ("[64, 128]", "64", "grid: batch_size: write a list of values, such as [64, 128]"),
        ("[64, 128]", "[]", "grid: batch_size: write a list of values, such as [64, 128]"),
        ("[64, 128]", "{a: 1}", "grid: batch_size: write a list of values, such as [64, 128]"),
        ("[64, 128]", "[64, 64]", "grid: batch_size: a value appears twice; leave one out"),
        ("[64, 128]", "[64, '64']", "grid: batch_size: a value appears twice; leave one out"),
        ("[5, 6, 7]", "[]", "families: other: grid: latent_dim: write a list of values"),
        (
            "loss: hinge",
            "batch_size: 9",
            "families: one: grid: batch_size: is also among the settings, where it has",
        ),
        ("adam_beta1: 0.5", "batch_size: 9", "grid: batch_size: is also among the settings, where it has no effect"),
        (
            "vae, grid",
            "vae, settings: {latent_dim: 3}, grid",
            "families: other: grid: latent_dim: is also among the sett",
        ),
        # Words that must be one of a list
        (
            "method: vae",
            "method: vea",
            "families: other: method: 'vea' is not one of ddpm, gan, vae; did you mean 'vae'",
        ),
        ("method: vae", "method: [vae]", "families: other: method: ['vae'] is not one of ddpm, gan, vae"),
        ("method: vae", "method:", "families: other: method: None is not one of ddpm, gan, vae"),
        ("method: vae,", "method: vae, device: gpu,", "families: other: device: 'gpu' is not one of cpu, cuda"),
        ("preset: dcgan", "preset: 5", "families: one: preset: 5: must be the name of a preset, or the path of "),
        ("preset: dcgan", "preset: ''", "families: one: preset: '': must be the name of a preset, or the path of "),
        (
            "seeds:",
            "metric: fd\nseeds:",
            "metric: 'fd' is not one of fid, kid, minutes, images_per_second; did you mean ",
        ),
        # Published figures
        ("published: {one", "published: {ones", "published: 'ones' is not one of one, other; did you mean 'one'?"),
        ("a remark]", "4, 5]", "published: one: 3 figures for 2 points; write null for none"),
        ("[3.5, a remark]", "3.5", "published: one: 1 figures for 2 points; write null for none"),
        ("one: [3.5, a remark]", "other: [1, 2]", "published: other: 2 figures for 3 points; write null for none"),
        ("a remark]", "[1]]", "published: one: [1]: must be a number, or a remark in quotes"),
        ("a remark]", "no]", "published: one: False: must be a number, or a remark in quotes"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_remedy(mistake, old, new, told):
    assert told in mistake(replaced(old, new))


def test_a_study_without_families_is_refused(mistake):
    assert mistake("{title: T, budget: {steps: 1}}") == "families: give at least one"
    assert mistake("{title: T, budget: {steps: 1}, families: {}}") == "families: give at least one"


@pytest.mark.parametrize("written", ["{}", "{steps: 1, images: 2}", "{steps: null}", "{images: 1, minutes: 1}"])
def test_a_budget_has_one_unit(mistake, written):
    assert mistake(replaced("{steps: 10}", written)) == "budget: give exactly one of steps, images and minutes"


@pytest.mark.parametrize("unit", ["steps", "images", "minutes"])
@pytest.mark.parametrize("written", ["0", "-1", "true", "many", "1e6", "'5'", "[1]", ".nan", ".inf"])
def test_a_budget_is_a_number_above_0_in_digits(mistake, unit, written):
    told = mistake(replaced("{steps: 10}", f"{{{unit}: {written}}}"))
    whole = "" if unit == "minutes" else "whole "
    assert told.startswith(f"budget: {unit} ")
    assert told.endswith(f": must be a {whole}number above 0, in digits such as 90000")


def test_steps_and_images_are_whole_while_minutes_may_be_parts(mistake, study):
    assert mistake(replaced("steps: 10", "steps: 10.5")).startswith("budget: steps 10.5: must be a whole number")
    assert mistake(replaced("steps: 10", "images: 1.0e+6")).startswith("budget: images 1000000.0: must be a whole")
    assert study(replaced("steps: 10", "minutes: 0.5")).budget == Budget(minutes=0.5)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("num_images: 9", "num_images 9: must be a whole number, at least 10"),
        ("num_images: true", "num_images True: must be a whole number, at least 10"),
        ("num_images: 5e3", "num_images '5e3': must be a whole number, at least 10"),
        ("num_images: null", "num_images None: must be a whole number, at least 10"),
        ("num_inference_steps: 0", "num_inference_steps 0: must be a whole number, at least 1"),
        ("num_inference_steps: true", "num_inference_steps True: must be a whole number, at least 1"),
        ("seed: -1", "seed -1: must be a whole number, at least 0"),
        ("seed: 0.5", "seed 0.5: must be a whole number, at least 0"),
        ("sampler: dpms", "sampler: 'dpms' is not one of ddim, dpm, unipc, ddpm; did you mean 'dpm'?"),
        ("sample_from: encoder", "sample_from: 'encoder' is not one of prior, ex_post"),
        ("features: dino", "features: 'dino' is not one of inception, dinov2, clip; did you mean 'dinov2'?"),
        ("features: null", "features: None is not one of inception, dinov2, clip"),
        ("mode: cleen", "mode: 'cleen' is not one of clean, legacy; did you mean 'clean'?"),
        ("features: clip, mode: legacy", "mode with features clip: 'legacy' is not one of clean"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_anything_is_trained(mistake, written, told):
    assert mistake(replaced("num_images: 20", written)) == f"evaluation: {told}"


def test_an_evaluation_may_use_every_sampler_every_latent_and_every_network(study):
    from hfgen.methods.schedules import SAMPLERS
    from hfgen.metrics.vision_transformers import TRANSFORMERS

    networks = [("inception", "clean"), ("inception", "legacy"), *((name, "clean") for name in TRANSFORMERS)]
    for features, mode in networks:
        for sampler in SAMPLERS:
            written = f"num_images: 10, sampler: {sampler}, sample_from: prior, features: {features}, mode: {mode}"
            read = study(replaced("num_images: 20", written)).evaluation
            assert read == Evaluation(10, sampler=sampler, sample_from="prior", features=features, mode=mode)
    assert study(replaced("num_images: 20", "sample_from: ex_post")).evaluation.sample_from == "ex_post"


@pytest.mark.parametrize("setting", SET_BY_THE_STUDY)
def test_what_the_study_decides_is_not_to_be_set(mistake, setting):
    told = f"{setting} cannot be set there: {SET_BY_THE_STUDY[setting]}"
    assert mistake(replaced("adam_beta1: 0.5", f"{setting}: 5")) == f"settings: {told}"
    assert mistake(replaced("loss: hinge", f"{setting}: 5")) == f"families: one: settings: {told}"
    assert mistake(replaced("batch_size: [64, 128]", f"{setting}: [5]")) == f"grid: {told}"
    assert mistake(replaced("latent_dim: [5, 6, 7]", f"{setting}: [5]")) == f"families: other: grid: {told}"
    if setting != "dataset":
        assert mistake(replaced("sample_size: 32", f"{setting}: 5")) == f"data: {told}"


def test_a_study_decides_where_a_cell_is_kept_how_long_it_trains_and_publishing():
    assert set(SET_BY_THE_STUDY) == {
        *("dataset", "output_dir", "seed", "max_train_steps", "num_epochs", "max_train_time", "resume"),
        *("push_to_hub", "hub_model_id", "hub_private_repo"),
    }


LAUGHS = [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True)]
BOMBS = [
    "\n".join(["a: &a [x, x]", *LAUGHS]),
    "a: " + "[" * 100_000,
    "a: " + "[" * 30 + "]" * 30,
    "a: &a [*a]",
    "x: 1\n" + " " * (2 << 20),
]


@pytest.mark.parametrize("text", BOMBS, ids=len)
def test_a_study_file_is_bounded_in_size_depth_and_expansion(text, tmp_path):
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(UserError, match="bomb.yaml: not valid YAML .*(larger than|more than|levels)"):
        read_study_file(tmp_path / "bomb.yaml")
