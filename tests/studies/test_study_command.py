"""`hfgen study ...` as it is typed; the trainings themselves are those of test_worker.py and of the README."""

import importlib.util
import json
import re

import pytest

import hfgen.studies.plan
import hfgen.studies.worker
from hfgen.errors import UserError
from hfgen.studies.outcomes import TRAINED, Outcome
from hfgen.studies.plan import Plan, Probe, _kind
from hfgen.studies.scripts import SHIPPED_SCRIPTS
from hfgen.studies.storage import sqlite_url


FILE = """
title: Toy
families: {GAN: {method: gan, settings: {generator_channels: 4, discriminator_channels: 4}}}
data: {dataset: "toy_paintings:24", sample_size: 16}
grid: {adam_beta1: [0.0, 0.5]}
budget: {images: 100000}
seeds: [0, 1, 2]
evaluation: {num_images: 5000}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(FILE)
    return tmp_path / "toy.yaml"


@pytest.fixture
def planned(monkeypatch):
    """Every cell takes 10 s to launch, trains at 100 images/s and is scored at 5 images/s; counts the plans."""
    made = []

    def make_plan(study, workspace):
        made.append(study)
        kinds = {name: _kind(cell) for name, cell in study.cells.items()}
        return Plan(dict.fromkeys(kinds.values(), Probe(10.0, 100.0, 0.05, 1000, 1000)), kinds, 0.15, 0)

    monkeypatch.setattr(hfgen.studies.plan, "make_plan", make_plan)
    return made


@pytest.fixture
def worked(monkeypatch):
    """Nothing is trained: the first cell is said to have broken."""
    studies = []

    def work(store, study, workspace):
        studies.append(study)
        store.enqueue(list(study.cells)[:1])
        store.run_next(lambda name: Outcome("broken", reason="nobody tried"))

    monkeypatch.setattr(hfgen.studies.worker, "work", work)
    return studies


def test_a_plan_says_what_all_of_it_costs_and_what_is_left_of_it_in_less_time(file, planned, hfgen):
    status, out, _ = hfgen("study", "plan", file, "--budget", "1h")
    assert status == 0 and "6 cells, each trained for 100,000 images, seeds 0, 1, 2" in out
    all_of_it, less = out.split("--budget 1h: scaled down to it:")
    assert "about 3.4 h in total" in all_of_it and "about 60 min in total" in less and "885 scored images" in less
    assert [path.name for path in file.parent.iterdir()] == ["toy.yaml"]
    assert hfgen("study", "plan", file, "--budget", "4h")[1].endswith("--budget 4h: it fits\n")


def test_a_study_that_was_scaled_down_is_taken_up_again_as_it_was(file, planned, worked, hfgen):
    status, out, _ = hfgen("study", "run", file, "--budget", "1h")
    assert status == 0 and "885 scored images" in out
    assert hfgen("study", "run", file, "--budget", "1h")[0] == 0
    assert worked[0] == worked[1] and len(planned) == 1  # measured once
    report = (file.parent / "runs/studies/toy/report/report.md").read_text()
    assert "Scaled down to 1h of work in total" in report and "100,000 images" in report
    status, _, err = hfgen("study", "run", file)
    assert status == 2 and "the study toy in this database is a different one (stored -> now):" in err
    assert "num_images: 885 -> 5000" in err
    status, _, err = hfgen("study", "run", file, "--budget", "2h")
    assert status == 2 and "is a different one" in err


def test_a_scaled_down_study_with_a_learned_term_is_taken_up_again_as_it_was(file, planned, worked, hfgen):
    families = "families: {VAE: {method: vae, preset: vae_learned}}"
    text = FILE.replace(FILE.splitlines()[2], families).replace("sample_size: 16", "sample_size: 64")
    file.write_text(text.replace("grid: {adam_beta1: [0.0, 0.5]}\n", "").replace("100000", "450000"))
    for _ in range(2):
        status, _, err = hfgen("study", "run", file, "--budget", "1h")
        assert status == 0, err
    assert worked[0] == worked[1] and len(planned) == 1 and worked[0].budget.images < 200_000
    for cell in worked[1].cells.values():
        assert cell.settings["learned_term_start"] < cell.settings["max_train_steps"] / 2


def test_a_changed_file_is_refused_with_the_difference_also_under_the_same_budget(file, planned, worked, hfgen):
    assert hfgen("study", "run", file, "--budget", "1h")[0] == 0
    file.write_text(FILE.replace("generator_channels: 4,", "generator_channels: 8,"))
    status, _, err = hfgen("study", "run", file, "--budget", "1h")
    assert status == 2 and "cell GAN adam_beta1=0.0 seed=0: generator_channels: 4 -> 8" in err
    file.write_text(FILE.replace("100000", "200000"))
    status, _, err = hfgen("study", "run", file, "--budget", "1h")
    assert status == 2 and "100,000 images -> 200,000 images" in err
    assert len(worked) == 1


def test_a_study_that_fits_its_budget_is_not_measured_again(file, planned, worked, hfgen):
    assert hfgen("study", "run", file, "--budget", "9h")[0] == 0
    status, out, _ = hfgen("study", "run", file, "--budget", "8h")
    assert (
        status == 0
        and "note: --budget 8h is ignored: this study was begun without it, and continues at full size" in out
    )
    assert len(planned) == 1 and worked[0].budget.images == 100_000 and worked[0].asked is None


def test_a_folder_called_report_that_is_not_a_report_is_refused_before_any_work(file, worked, hfgen):
    mine = file.parent / "proj" / "report" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("three years")
    status, _, err = hfgen("study", "run", file, "--output", "proj")
    assert (status, err) == (
        2,
        "error: proj/report contains files that hfgen did not write: move or rename that folder first\n",
    )
    assert worked == [] and [path.name for path in (file.parent / "proj").rglob("*")] == ["report", "thesis.tex"]
    mine.rename(file.parent / "thesis.tex")
    assert hfgen("study", "run", file, "--output", "proj")[0] == 0
    mine.write_text("added to the report")
    assert hfgen("study", "run", file, "--output", "proj")[0] == 0
    assert mine.read_text() == "added to the report"


def test_an_interrupted_study_leaves_the_report_of_what_there_is(file, monkeypatch, hfgen):
    def work(store, study, workspace):
        raise KeyboardInterrupt

    monkeypatch.setattr(hfgen_worker(), "work", work)
    status, out, _ = hfgen("study", "run", file, "--output", "here")
    assert status != 0 and "report so far" in out
    assert "not run yet" in (file.parent / "here/report/report.md").read_text()


def test_the_report_of_a_finished_study_is_not_called_one_so_far(file, monkeypatch, hfgen):
    def work(store, study, workspace):
        store.enqueue(list(study.cells))
        for _ in study.cells:
            store.run_next(lambda name: Outcome("diverged", reason="nan"))

    monkeypatch.setattr(hfgen_worker(), "work", work)
    status, out, _ = hfgen("study", "run", file, "--output", "here")
    assert status == 0 and "report: here" in out and "so far" not in out


def test_what_ends_a_worker_is_printed_also_if_there_can_be_no_report(file, monkeypatch, refusal):
    def work(store, study, workspace):
        (workspace.output / "study.db").write_bytes(b"no database" * 9999)
        raise UserError("the database does not answer")

    monkeypatch.setattr(hfgen_worker(), "work", work)
    assert refusal("study", "run", file, "--output", "here") == "error: the database does not answer"
    monkeypatch.setattr(hfgen_worker(), "work", lambda *_: (file.parent / "two/study.db").write_bytes(b"no" * 9999))
    assert "two/study.db: the database cannot be read: " in refusal("study", "run", file, "--output", "two")


def hfgen_worker():
    return hfgen.studies.worker


def test_a_report_is_made_of_a_folder_or_a_database(file, worked, hfgen, refusal):
    assert hfgen("study", "run", file, "--output", "here")[0] == 0
    assert hfgen("study", "report", "here", "--output", "one")[0] == 0
    assert hfgen("study", "report", sqlite_url(file.parent / "here"), "--output", "two")[0] == 0
    one, two = ((file.parent / name / "report.md").read_text() for name in ("one", "two"))
    assert one == two and "nobody tried" in one
    assert "--output one exists and is not empty" in refusal("study", "report", "here", "--output", "one")
    assert "nowhere: not a study" in refusal("study", "report", "nowhere", "--output", "three")
    assert "--study other: not in the database, which contains toy" in refusal(
        "study", "report", "here", "--output", "three", "--study", "other"
    )
    assert not (file.parent / "three").exists()


def test_a_worker_takes_the_data_set_from_its_option_or_from_the_study(file, monkeypatch, hfgen):
    workspaces = []
    monkeypatch.setattr(hfgen_worker(), "work", lambda store, study, workspace: workspaces.append(workspace))
    assert hfgen("study", "run", file, "--output", "here")[0] == 0
    url = sqlite_url(file.parent / "here")
    assert hfgen("study", "work", url)[0] == 0
    assert hfgen("study", "work", url, "--dataset", "some/photos", "--output", "there")[0] == 0
    (file.parent / "photos").mkdir()
    assert hfgen("study", "work", url, "--dataset", "photos", "--output", "there")[0] == 0
    found = [workspace.dataset for workspace in workspaces]
    assert found == ["toy_paintings:24", "toy_paintings:24", "some/photos", str(file.parent / "photos")]
    assert [str(workspace.output) for workspace in workspaces] == ["here", "runs/studies/toy", "there", "there"]


def test_a_study_with_a_script_of_one_s_own_goes_on_only_with_that(file, planned, monkeypatch, hfgen):
    worked = []
    monkeypatch.setattr(hfgen_worker(), "work", lambda store, study, workspace: worked.append(workspace.scripts))
    own = file.parent / "training_scripts" / "train_gan.py"
    own.parent.mkdir()
    own.write_text((SHIPPED_SCRIPTS / own.name).read_text() + "# mine\n")
    url, said = sqlite_url(file.parent / "here"), f"training with your own {own}\n"
    commands = [("plan", file), ("run", file, "--output", "here"), ("work", url)]
    for command in commands:
        status, out, _ = hfgen("study", *command)
        assert status == 0 and out.count(said) == 1
    assert worked == [own.parent] * 2
    named = (
        r"error: the study was begun with .*\n  training_scripts/train_gan.py: your own with SHA-256 [0-9a-f]{12} -> "
    )
    for here in ("your own with", "hfgen's"):
        if here == "hfgen's":
            own.unlink()
        else:
            own.write_text(own.read_text() + "# changed\n")
        for command in commands[1:]:
            status, _, err = hfgen("study", *command)
            assert status == 2 and re.match(named + here, err)
            assert "Start it in a folder whose training_scripts/ has those of the study" in err
    assert len(worked) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "gan_loss"), "gan_loss names no dataset: give --dataset"),
        (("plan", "gan_los", "--dataset", "photos"), "gan_los: neither a study file nor one of the shipped studies"),
        (("run", "toy.yaml", "--budget", "soon"), "--budget soon: write a duration such as"),
        (("plan", "toy.yaml", "--budget", "soon"), "--budget soon: write a duration such as"),
        (("work", "study.db"), "--storage: not the URL of a database"),
    ],
)
def test_mistakes_are_told_with_the_remedy(file, arguments, told, refusal):
    assert told in refusal("study", *arguments)


def test_without_optuna_it_is_said_how_to_get_it(file, monkeypatch, refusal):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
    assert refusal("study", "plan", file) == 'error: hfgen study needs Optuna: pip install "hfgen[study]"'


def test_a_relative_dataset_path_is_stored_absolute_and_left_out_of_the_report(file, monkeypatch, hfgen):
    stored = []
    monkeypatch.setattr(hfgen_worker(), "work", lambda store, study, workspace: stored.append(study))
    (file.parent / "photos").mkdir()
    assert hfgen("study", "run", file, "--dataset", "photos", "--output", "here")[0] == 0
    assert stored[0].dataset == str(file.parent / "photos")
    assert json.loads((file.parent / "here/report/study.json").read_text())["dataset"] == "photos"
    assert TRAINED not in (file.parent / "here/report/cells.csv").read_text()
