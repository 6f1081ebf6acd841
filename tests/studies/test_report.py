"""The folder of a report: complete, of any state of a study, and without what only its machine knows."""

import json
import math
import re
from dataclasses import replace

import pytest
from made_up_studies import RATES, broken, diverged, losses, outcomes, study, trained

from hfgen.errors import UserError
from hfgen.studies.launch import Workspace
from hfgen.studies.outcomes import Outcome
from hfgen.studies.pictures import plot_score_curves
from hfgen.studies.report import FILES, MAX_REASON, endings, statements, write_report
from hfgen.studies.study_file import Budget, Evaluation
from hfgen.studies.table import rows_of


PICTURES = ("curves.png", "samples.jpg", "denoising.jpg", "scores.png")


def written(folder, made, *by_place):
    """The files of a report, as text, pictures as bytes."""
    write_report(made, outcomes(made, *by_place, metric=made.metric), folder)
    return {file.name: file.read_bytes() if file.name in PICTURES else file.read_text() for file in folder.iterdir()}


def told(made, *by_place):
    return " ".join(statements(made, rows_of(made, outcomes(made, *by_place)), made.dataset))


def places_of(page):
    """What the page's own script reads. JSON has no word for NaN."""
    (found,) = re.findall(r'id="places">(.*?)</script>', page, re.DOTALL)
    return json.loads(found, parse_constant=pytest.fail)


def test_the_report_holds_every_file_that_it_names(tmp_path):
    made = study({"GAN": RATES[:1], "DDPM": RATES[:1]}, methods={"DDPM": "ddpm"})
    files = written(tmp_path / "report", made, trained(curve=losses(2.0, 1.0)), trained(strip=True))
    assert sorted(files) == sorted([*FILES, "winner.json", *PICTURES[:3]])  # nothing was scored on the way
    named = set(re.findall(r"\]\((\S+?)\)", files["report.md"]))
    assert named == files.keys() - {"report.md"}
    assert json.loads(files["study.json"])["cells"].keys() == made.cells.keys()


def test_the_best_cell_can_be_trained_again_by_what_the_report_says(tmp_path):
    made = study({"GAN": RATES[:2]}, seeds=(4, 5), budget=Budget(minutes=1.5))
    files = written(tmp_path / "report", made, [30, 31], [10, 12])
    assert json.loads(files["winner.json"]) == made.cells["GAN learning_rate=2e-4 seed=4"].settings
    again = "hfgen train gan --dataset someone/cats --preset winner.json --output_dir"
    folder = "runs/GAN-learning_rate=2e-4-seed=4 --max_train_time 90s"
    for name in ("report.md", "index.html"):
        assert "Best: GAN learning_rate 2e-4 with FID 11 ± 1.4; next: GAN learning_rate 1e-4 with 30.5" in files[name]
        assert f"To train it again, in the folder of this report: {again} {folder}" in files[name]


def test_a_finished_study_counts_its_cells_once_and_training_times_are_readable(tmp_path):
    made = study({"GAN": RATES[:2]})
    page = written(tmp_path / "report", made, trained(minutes=0.101), trained(minutes=2.5))["index.html"]
    assert "6,000 steps in 6.1 seconds" in page and "6,000 steps in 2.5 minutes" in page
    assert "FID of 2 cells, each trained" in page
    assert "FID of 1 cell, each" in told(study({"GAN": RATES[:1]}), 1)


def test_the_denoising_steps_are_those_that_the_cells_were_scored_in():
    made = study({"GAN": [{}], "DDPM": RATES[:2]}, methods={"DDPM": "ddpm"})
    scored = [trained(inference_steps=steps) for steps in (10, 50)]
    assert "generated with seed 0, diffusion in 50 steps)" in told(made, None, None, None)
    assert "generated with seed 0, diffusion in 10 steps)" in told(made, 1, scored[0], scored[0])
    assert "generated with seed 0, diffusion in 10 to 50 steps)" in told(made, 1, scored[1], scored[0])


@pytest.mark.parametrize(
    ("size", "num_real", "told_of"),
    [
        (16, 24, "24 real images of 16 pixels of"),
        (16, 25, "real images of 16 pixels of"),  # one cell drops duplicates
        (32, 24, "24 real images of"),
        (32, 25, "the real images of"),
    ],
)
def test_the_real_images_are_told_with_what_all_cells_have_in_common(size, num_real, told_of):
    made = study({"GAN": RATES[:2]})
    found = told(made, trained(), trained(size=size, num_real=num_real))
    assert f"(generated with seed 0) against {told_of} someone/cats." in found


def test_a_study_in_which_nothing_has_ended_has_a_report(tmp_path):
    made = study({"GAN": RATES})
    files = written(tmp_path / "report", made, None, None, None)
    assert sorted(files) == sorted(FILES)
    assert "FID of 3 cells (0 ended)" in files["report.md"] and "| GAN | – | – | – |" in files["report.md"]
    names = "GAN learning_rate=1e-4 seed=0, GAN learning_rate=2e-4 seed=0, GAN learning_rate=10 seed=0"
    assert f"not run yet: {names}\n" in files["report.md"] and f"not run yet: {names}\n" in files[
        "index.html"
    ].replace("</li>", "")


def test_scores_on_the_way_have_a_picture_and_a_file(tmp_path):
    made = study({"GAN": RATES[:2]}, seeds=(0, 1))
    course = [{"images": 8, "fid": 300.5}, {"images": 16, "fid": None}, {"images": 24, "fid": 100.0}]
    figures = [trained(course=course), trained(course=course[:1])]
    files = written(tmp_path / "report", made, figures, [None, trained()])
    assert files["course.csv"].splitlines() == [
        "family,setting,seed,images,fid",
        "GAN,learning_rate 1e-4,0,8,300.5",
        "GAN,learning_rate 1e-4,0,16,",
        "GAN,learning_rate 1e-4,0,24,100.0",
        "GAN,learning_rate 1e-4,1,8,300.5",
    ]
    assert "[course.csv](course.csv)" in files["report.md"] and "](scores.png)" in files["report.md"]
    assert files["scores.png"].startswith(b"\x89PNG")
    (row, other) = rows_of(made, outcomes(made, figures, [None, trained()]))
    assert row.course() == {8: [300.5, 300.5], 24: [100.0]} and other.course() == {}
    figure = plot_score_curves([row, other])
    assert [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")] == [
        " GAN learning_rate 1e-4"
    ]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[8, 300.5]]  # where all seeds have a score
    assert plot_score_curves([other]) is None


def test_a_newer_report_replaces_the_earlier_one(tmp_path):
    made = study({"GAN": [{}]})
    first = written(tmp_path / "report", made, trained(curve=losses(2.0, 1.0)))
    second = written(tmp_path / "report", made, "nan")
    assert first.keys() - second.keys() == {"curves.png", "samples.jpg"}
    assert [file.name for file in tmp_path.iterdir()] == ["report"]


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    made = study({"GAN": [{}]})
    first = written(tmp_path / "report", made, trained())
    no_picture = Outcome("trained", 1.0, result=replace(trained().result, sheet="bm8gcGljdHVyZQ=="))
    with pytest.raises(UserError, match="any previous version is unchanged"):
        write_report(made, {name: no_picture for name in made.cells}, tmp_path / "report")
    assert {file.name for file in (tmp_path / "report").iterdir()} == first.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["report"]


# ------------------------------------------------------------------------------------------------ what is not for all


SECRET = "/home/somebody/private"


@pytest.mark.parametrize(
    "reason, shown",
    [
        (f"error: --dataset {SECRET}/cats: not on this machine", "error: --dataset cats: not on this machine"),
        (f"[Errno 28] No space left: '{SECRET}/my runs/a.bin'", "[Errno 28] No space left: 'a.bin'"),
        (f"could not write {SECRET}/x/y.json: full", "could not write y.json: full"),
        (f"--output={SECRET}/x", "--output=x"),
        (f"error:{SECRET}/x", "error:x"),
        (f"sqlite:///{SECRET}/study.db is locked", "sqlite:study.db is locked"),
        (r"C:\Users\somebody\private\x.bin is open", "x.bin is open"),
        ("~/somebody/private/x", "x"),
        ("FID 3 / 4 images/s at https://host/a/b and/or n/a", "FID 3 / 4 images/s at https://host/a/b and/or n/a"),
    ],
)
def test_of_a_path_a_report_shows_the_last_part(tmp_path, reason, shown):
    made = study({"GAN": [{}]})
    files = written(tmp_path / "report", made, broken(reason))
    assert f"no score: {shown}\n" in files["report.md"]
    assert places_of(files["index.html"])[0]["seeds"][0]["summary"] == f"broken: {shown}"
    assert all("somebody" not in text for text in files.values())


def test_no_file_of_the_report_says_where_anything_lies_on_this_machine(tmp_path):
    made = study({"GAN": RATES[:2]}, dataset=f"{SECRET}/my own/cats")
    workspace = Workspace(tmp_path, tmp_path, made.dataset)
    cells = {name: replace(cell, settings={**cell.settings, "cache_dir": f"{SECRET}/cache", "channels": [8, 16]})
             for name, cell in made.cells.items()}  # fmt: skip
    made = replace(made, cells=cells)
    warned = trained(warnings=[f"step 5: cannot write {workspace.run_folder(next(iter(cells.values())))}/x"])
    files = written(tmp_path / "report", made, warned, broken(f"error: --dataset {workspace.dataset}: not there"))
    everything = "".join(text for text in files.values() if isinstance(text, str))
    assert SECRET not in everything and "somebody" not in everything and str(tmp_path) not in everything
    assert "24 real images of 16 pixels of cats." in files["report.md"]
    assert "error: --dataset cats: not there" in files["cells.csv"]
    settings = json.loads(files["study.json"])["cells"]["GAN learning_rate=1e-4 seed=0"]["settings"]
    assert (settings["cache_dir"], settings["channels"]) == ("cache", [8, 16])
    assert "step 5: cannot write x" in files["report.md"] and made.dataset == f"{SECRET}/my own/cats"


def test_long_reasons_are_cut(tmp_path):
    made = study({"GAN": [{}]})
    files = written(tmp_path / "report", made, diverged("word " * 10_000))
    (line,) = [line for line in files["report.md"].splitlines() if line.startswith("- GAN")]
    assert MAX_REASON < len(line) < MAX_REASON + 50 and line.endswith(" …")
    assert len(files["index.html"]) < 20_000 and len(files["cells.csv"]) < 1000


def test_curves_and_figures_that_are_not_finite_leave_the_json_valid(tmp_path):
    made = study({"GAN": RATES[:2]}, published={"GAN": [math.nan, 3.5]})
    curve = losses(1.0, math.inf, math.nan, -math.inf)
    files = written(tmp_path / "report", made, trained(curve=curve), trained(kid=math.nan))
    assert places_of(files["index.html"])[0]["seeds"][0]["curves"] == {
        "loss": [[100, 1.0], [200, None], [300, None], [400, None]]
    }
    assert [one["published"] for one in json.loads(files["study.json"], parse_constant=pytest.fail)["places"]] == [
        "NaN", 3.5,
    ]  # fmt: skip


def test_names_are_no_markup(tmp_path):
    nasty = "<b>x</b></script><script>alert(1)</script>"
    made = study({nasty: [{nasty: nasty}]}, title=nasty, question=nasty, source=nasty, published={nasty: [nasty]})
    files = written(tmp_path / "report", made, diverged(nasty))
    assert "<b>" not in files["report.md"] and "<b>" not in files["index.html"]
    assert files["index.html"].count("<script>") == 1
    (place,) = places_of(files["index.html"])
    assert (place["name"], place["point"]) == (nasty, f"{nasty} {nasty}")


# ------------------------------------------------------------------------------------------------- what is said of it


def test_the_conditions_are_said_as_they_were():
    made = study({"DDPM": [{}]}, seeds=(3, 4), methods={"DDPM": "ddpm"}, question="Why?", source="a paper",
                 evaluation=Evaluation(num_images=5000, seed=7, sampler="dpm"), published={"DDPM": [3]})  # fmt: skip
    assert told(made, [1, None]) == (
        "Why? FID of 2 cells (1 ended), each trained for 24 images; seeds 3, 4; ± is the standard deviation over "
        "them. 5,000 images of each are scored (generated with seed 7, diffusion in 50 steps of dpm) against 24 real "
        "images of 16 pixels of someone/cats. Trained on: cpu, 2 threads, fp32, torch 2, hfgen 1. The floor: 12 real "
        "images score FID 20 against 13 others. "
        "Published: a paper."
    )


def test_a_single_seed_and_no_diffusion_are_not_spoken_of():
    text = told(study({"GAN": [{}]}), 1)
    assert "; seed 0. " in text and "±" not in text and "diffusion" not in text and "Published" not in text


def test_a_study_that_was_scaled_down_says_what_it_asks_for():
    made = study({"GAN": [{}]}, asked="2h", full_budget=Budget(images=1_600_000), full_seeds=(0, 1, 2),
                 full_evaluation=Evaluation(num_images=9000))  # fmt: skip
    full = "each cell trained for 1,600,000 images, 9,000 images scored, seeds 0, 1, 2."
    assert f"Scaled down to 2h of work in total; the full study asks for: {full}" in told(made, 1)
    only = replace(made, full_seeds=made.seeds, full_evaluation=made.evaluation)
    assert told(only, 1).count("the full study asks for: each cell trained for 1,600,000 images.") == 1
    assert "Scaled" not in told(replace(made, asked=None), 1)


def test_sizes_and_floors_that_differ_between_the_cells_are_not_given_as_one():
    made = study({"A": [{}], "B": [{}]})
    text = told(made, trained(size=16), trained(size=64))
    assert "24 real images of someone/cats" in text and "pixels" not in text
    other = trained()
    other.result.summary["floor"] = {"split": {"num_fake": 12, "num_real": 13, "fid": 3.0}}
    assert "The floor" not in told(made, 1, other) and "The floor" not in told(made, None, None)
    assert "The floor" not in told(study({"A": [{}]}, metric="minutes"), 1)


def test_every_machine_is_named():
    other = trained()
    other.result.summary["environment"] |= {"device": "cuda H200", "threads": 1, "mixed_precision": "bf16"}
    text = told(study({"GAN": [{}]}, seeds=(0, 1, 2)), [1, other, 2])
    assert "Trained on: cpu, 2 threads, fp32, torch 2, hfgen 1; cuda H200, 1 thread, bf16, torch 2, hfgen 1." in text


def test_each_ending_is_told_once_also_of_a_cell_in_two_places():
    made = study({"ndf": RATES[:1], "ngf": RATES[:1]}, seeds=(0, 1), shared=[(("ndf", RATES[0]), ("ngf", 0))])
    found = [trained(rollbacks=1, warnings=["step 5: slow"]), diverged(step=1200)]
    names = "ndf learning_rate=1e-4 seed"
    assert endings(made, rows_of(made, outcomes(made, found, found))) == [
        f"{names}=0: rolled back once, with half the learning rate each time",
        f"{names}=0: step 5: slow",
        f"{names}=1: NaN at step 1,200: diverged: the loss is NaN",
    ]


def test_of_many_cells_that_were_not_run_a_few_are_named():
    points = [{"x": str(value)} for value in range(9)]
    made = study({"A": points})
    (line,) = endings(made, rows_of(made, outcomes(made, *[None] * 9)))
    assert line.startswith("not run yet: A x=0 seed=0, A x=1") and line.endswith("A x=5 seed=0 and 3 more")
