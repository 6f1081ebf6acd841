"""Scores in the course of a run: when, of what, what is kept of them, and that training does not feel them."""

import json
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from line_method import fit, status
from run_files import assert_equal, metrics, state_of
from stand_in_features import Colours, folder_of, paintings, quarters, watch_drawing
from toy_runs import METHODS, checkpoint, events, files_of, script, train

from hfgen.evaluation import during_training as run_evaluation
from hfgen.evaluation.during_training import RunEvaluation, read_evaluations
from hfgen.families import family, image_network
from hfgen.inference.opening import open_pipeline
from hfgen.inference.sampling import SamplingOptions, generate_images, network_digest
from hfgen.metrics import feature_spaces
from hfgen.metrics.frechet import frechet_distance
from hfgen.metrics.kernel import kernel_distance
from hfgen.metrics.memorisation import nearest_images
from hfgen.pipelines import DDPMPipeline
from hfgen.training.run import Run
from hfgen.training.trouble import NonFiniteError


pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate_state", "colours"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def script_scores(monkeypatch, fid, kid):
    """Let the evaluations find these scores, one after the other."""
    fids, kids = iter(fid), iter(kid)
    monkeypatch.setattr(run_evaluation, "frechet_distance", lambda *_: next(fids))
    monkeypatch.setattr(run_evaluation, "kernel_distance", lambda *_: type("Distance", (), {"value": next(kids)}))


# ------------------------------------------------------------------------------------------------------ what is scored


@pytest.mark.slow
def test_the_pipeline_is_scored_on_the_cadence_and_at_the_last_step(tmp_path, monkeypatch):
    drawn = {}
    watch_drawing(monkeypatch, lambda pipeline, index: drawn.setdefault("numbers", []).append(index))
    train("gan", tmp_path / "run", "--evaluate_every", "2", "--max_train_steps", "5", "--seed", "3")
    rows = read_evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 5] and all(row["num_images"] == 12 for row in rows)
    assert drawn["numbers"] == 3 * [*range(12)]
    logged = {entry["step"]: entry for entry in metrics(tmp_path / "run")}
    for row in rows:
        assert row["features"] == "inception-2015 stand-in" and row["num_inference_steps"] is None
        others = ("step", "num_images", "copying", "network_sha256", "features", "num_inference_steps")
        scores = {name: row[name] for name in row if name not in others}
        assert len(scores) == 7 and scores.items() <= logged[row["step"]].items()
    assert not any("fid" in logged[step] for step in (1, 3))
    scored = network_digest(open_pipeline(str(checkpoint(tmp_path / "run", 4)), "cpu"))
    assert rows[1]["network_sha256"] == scored != rows[0]["network_sha256"]
    # By hand, of the pipeline of that step's checkpoint; the seed is the run's.
    real = np.stack([quarters(image) for image in paintings(range(24))])
    images = open_and_draw(checkpoint(tmp_path / "run", 4), 12, seed=3)
    fake = np.stack([quarters(image) for image in images])
    among = np.median(nearest_images(real, real, own=np.arange(24)).distances)
    assert rows[1]["fid"] == pytest.approx(frechet_distance(real, fake), rel=1e-3)
    assert rows[1]["kid"] == pytest.approx(kernel_distance(real, fake).value, rel=1e-3)
    ratio = np.median(nearest_images(fake, real).distances) / among
    assert rows[1]["nearest_distance_ratio"] == pytest.approx(ratio, rel=1e-2)


def open_and_draw(folder, count, seed=0):
    pipeline = open_pipeline(str(folder), "cpu")
    steps = 2 if family(pipeline) == "ddpm" else None
    return list(generate_images(pipeline, SamplingOptions(count, seed, steps, 32)))


def test_scored_images_have_the_run_s_seed_and_the_denoising_steps_of_its_sheets(tmp_path, monkeypatch):
    given = []

    def watched(pipeline, *arguments, **options):
        given.append(arguments)
        return generate_images(pipeline, *arguments, **options)

    monkeypatch.setattr("hfgen.evaluation.scoring.generate_images", watched)
    train("ddpm", tmp_path / "run", "--evaluate_every", "6", "--seed", "3", "--num_inference_steps", "4")
    assert [options for options, _ in given] == [SamplingOptions(12, 3, 4, 32)]


@pytest.mark.slow
def test_the_scored_and_shown_images_have_the_precision_of_hfgen_sample(tmp_path, monkeypatch):
    autocast = []
    call = DDPMPipeline.__call__

    def watched(pipeline, *arguments, **options):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return call(pipeline, *arguments, **options)

    monkeypatch.setattr(DDPMPipeline, "__call__", watched)
    arguments = ("--evaluate_every", "2", "--sample_every", "2", "--max_train_steps", "2", "--mixed_precision", "bf16")
    train("ddpm", tmp_path / "run", *arguments)
    assert set(autocast) == {False}  # rounding errors would add up over the steps


def test_scores_are_logged_at_their_own_step_however_rarely_losses_are(tmp_path):
    train("gan", tmp_path / "run", "--evaluate_every", "2", "--log_every", "5", "--max_train_steps", "8")
    logged = {entry["step"]: entry.get("fid") for entry in metrics(tmp_path / "run")}
    assert logged == {row["step"]: row["fid"] for row in read_evaluations(tmp_path / "run")} | {5: None}


def test_without_the_option_nothing_is_loaded_or_scored(tmp_path, colours, capsys):
    train("gan", tmp_path / "run", "--max_train_steps", "2", "--best_by", "kid", "--feature_weights", "mine.pt")
    assert colours.calls == 0 and read_evaluations(tmp_path / "run") == []
    assert not (tmp_path / "run" / "best").exists()
    note = "note: without --evaluate_every nothing is scored, so --evaluate_num_images 12, --best_by kid, "
    assert f"{note}--feature_weights mine.pt is not used" in capsys.readouterr().out


def test_the_training_images_are_cut_as_squares_however_training_cuts_them(tmp_path, monkeypatch):
    """Generated images are squares: wide pictures squeezed into one would be others."""
    wide = folder_of([image.resize((40, 16)) for image in paintings(range(14))], tmp_path / "wide")
    # The features of the real images alone are scored.
    monkeypatch.setattr(run_evaluation, "frechet_distance", lambda real, fake: real.sum().item())
    for crop in ("center", "random"):
        arguments = ("--dataset", str(wide), "--crop", crop, "--evaluate_every", "1", "--max_train_steps", "1")
        train("gan", tmp_path / crop, *arguments)
    center, random = (read_evaluations(tmp_path / crop)[0]["fid"] for crop in ("center", "random"))
    assert center == random > 0


def test_the_speed_of_training_is_told_without_the_evaluation(tmp_path):
    def each_step(run):
        if run.evaluation_due:
            time.sleep(0.6)
            run.note({"fid": 5.0}, 0.6)

    fit(tmp_path / "run", each_step=each_step, evaluate_every=2)
    assert ["fid" in entry for entry in metrics(tmp_path / "run")] == [False, True] * 3
    assert all(entry["images_per_second"] > 2 for entry in metrics(tmp_path / "run"))  # 1 / 0.6 with the pause


def test_the_speed_of_training_is_told_without_the_sheets(tmp_path):
    def each_step(run):
        if run.sample_due:
            with run.generating():
                time.sleep(0.6)

    fit(tmp_path / "run", each_step=each_step, sample_every=2)
    assert len(metrics(tmp_path / "run")) == 6
    assert all(entry["images_per_second"] > 2 for entry in metrics(tmp_path / "run"))  # 1 / 0.6 with the pause


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gan", "vae"])
def test_a_slow_evaluation_does_not_make_training_look_slow(tmp_path, monkeypatch, kind):
    slow = Colours(before_each=lambda calls: time.sleep(calls == 2))  # at the first call the run has not begun
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: slow)
    if kind == "vae":  # of which fitting the density is a part
        fit_density = script("vae").fit_density
        monkeypatch.setattr(script("vae"), "fit_density", lambda *given: time.sleep(1) or fit_density(*given))
    train(kind, tmp_path / "run", "--evaluate_every", "2", "--max_train_steps", "2")
    assert slow.calls == 2 and metrics(tmp_path / "run")[-1]["images_per_second"] > 4 / 0.8


# -------------------------------------------------------------------------------------------------------- what is kept


def test_what_somebody_adds_to_a_pipeline_stays_when_that_is_replaced(tmp_path):
    run, arguments = tmp_path / "run", ("--evaluate_every", "1", "--max_train_steps")
    train("gan", run, *arguments, "1")
    notes = [run / name / "notes.txt" for name in ("pipeline", "best", "best/pipeline")]
    scores = json.loads((run / "best" / "scores.json").read_text())
    (run / "best" / "scores.json").write_text(json.dumps(scores | {"fid": 1e9}))  # the next one is better
    for note in notes:
        note.write_text("mine")
    train("gan", run, *arguments, "2", "--resume", "latest")
    assert json.loads((run / "best" / "scores.json").read_text())["step"] == 2
    assert [note.read_text() for note in notes] == ["mine"] * 3


@pytest.mark.parametrize(("best_by", "best"), [("fid", 2), ("kid", 3)])
def test_the_pipeline_of_the_best_score_is_kept(tmp_path, monkeypatch, capsys, best_by, best):
    fid, kid = [5.0, 3.0, 4.0, 3.0, 9.0], [0.1, 0.4, 0.05, 0.2, 0.05]
    script_scores(monkeypatch, fid, kid)
    arguments = ("--evaluate_every", "1", "--checkpoint_every", "1", "--max_train_steps", "5", "--best_by", best_by)
    train("gan", tmp_path / "run", *arguments)
    rows = read_evaluations(tmp_path / "run")
    assert [(row["fid"], row["kid"]) for row in rows] == list(zip(fid, kid, strict=True))
    kept = tmp_path / "run" / "best"
    measured = {"num_inference_steps": None, "features": Colours().identity}
    assert json.loads((kept / "scores.json").read_text()) == rows[best - 1] | measured | {"rollbacks": 0}
    of_that_step = checkpoint(tmp_path / "run", best)
    assert files_of(kept / "pipeline") == files_of(of_that_step / "pipeline")
    assert files_of(kept / "pipeline") != files_of(checkpoint(tmp_path / "run", 5) / "pipeline")
    for one, other in zip(open_and_draw(kept, 3), open_and_draw(of_that_step, 3), strict=True):
        assert one.tobytes() == other.tobytes()
    told = f"best pipeline: {kept} (FID {fid[best - 1]:.4g}, KID {kid[best - 1]:.4g} at step {best})"
    assert told in capsys.readouterr().out.splitlines()


def poisoned_once(found, poison):
    """Return a function like `found` whose first call is with what `poison` has made NaN."""
    calls = []

    def call(first, *arguments, **options):
        if not calls:
            poison(first)
        calls.append(first)
        return found(first, *arguments, **options)

    return call


def fill_with_nan(network):
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(float("nan"))


@pytest.mark.parametrize("kind", METHODS)
def test_a_network_that_an_evaluation_finds_diverged_is_handled_as_by_its_loss(tmp_path, monkeypatch, kind):
    poison = poisoned_once(generate_images, lambda pipeline: fill_with_nan(image_network(pipeline)))
    monkeypatch.setattr("hfgen.evaluation.scoring.generate_images", poison)
    arguments = (kind, tmp_path / "run", "--evaluate_every", "4", "--checkpoint_every", "1")
    if kind == "ddpm":  # which has no rollbacks
        with pytest.raises(NonFiniteError, match="step 4: a generated image is not finite"):
            train(*arguments)
        assert status(tmp_path / "run")["status"] == "diverged" and read_evaluations(tmp_path / "run") == []
        return
    train(*arguments)
    assert [event["what"] for event in events(tmp_path / "run")] == [
        "a generated image is not finite; back to step-00000003"
    ]
    assert [row["step"] for row in read_evaluations(tmp_path / "run")] == [4, 6]
    assert status(tmp_path / "run")["status"] == "complete"


def test_an_encoder_found_diverged_at_an_evaluation_leads_back_without_a_score(tmp_path, monkeypatch):
    poison = poisoned_once(script("vae").encode_images, fill_with_nan)
    monkeypatch.setattr(script("vae"), "encode_images", poison)
    drawn = []
    watch_drawing(monkeypatch, lambda pipeline, index: drawn.append(index))
    train("vae", tmp_path / "run", "--evaluate_every", "4", "--checkpoint_every", "1", "--max_train_steps", "5")
    assert [event["event"] for event in events(tmp_path / "run")] == ["rollback"]
    assert [row["step"] for row in read_evaluations(tmp_path / "run")] == [4, 5] and len(drawn) == 24


def test_waiting_for_an_evaluation_is_no_training_time(tmp_path, monkeypatch):
    seconds = []
    between = Run._between_updates
    monkeypatch.setattr(Run, "_between_updates", lambda run, step: seconds.append(step) or between(run, step))
    monkeypatch.setattr(RunEvaluation, "_score", lambda *_: time.sleep(3) or {})
    monkeypatch.setattr(RunEvaluation, "_record", lambda *_: None)
    wait = Accelerator.wait_for_everyone
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda own: time.sleep(2) or wait(own))
    train("gan", tmp_path / "run", "--evaluate_every", "2", "--max_train_steps", "2", "--checkpoint_every", "2")
    assert len(seconds) == 2 and seconds[1] < 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_training_ends_bit_equal_with_and_without_evaluations(tmp_path, kind):
    train(kind, tmp_path / "without")
    train(kind, tmp_path / "with", "--evaluate_every", "1")
    assert len(read_evaluations(tmp_path / "with")) == 6
    for step in (2, 4, 6):
        assert_equal(state_of(tmp_path / "without", step), state_of(tmp_path / "with", step))
        assert_equal(*(files_of(checkpoint(tmp_path / name, step) / "pipeline") for name in ("without", "with")))
    assert_equal(*(files_of(tmp_path / name / "pipeline") for name in ("without", "with")))
    losses = [[entry[key] for entry in metrics(tmp_path / name) for key in entry if "loss" in key]
              for name in ("without", "with")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) >= 6


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_evaluations_of_an_uninterrupted_one(tmp_path, monkeypatch):
    folder, arguments = tmp_path / "run", ("--evaluate_every", "1", "--checkpoint_every", "2")
    train("gan", folder, *arguments)
    evaluations, best = (folder / "evaluations.jsonl").read_text(), files_of(folder / "best")
    train("gan", folder, *arguments, "--resume", str(checkpoint(folder, 2)))
    assert (folder / "evaluations.jsonl").read_text() == evaluations and files_of(folder / "best") == best
    # Killed by a signal behind an evaluation and before the checkpoint of that step.
    killed = tmp_path / "killed"
    note = run_evaluation.Run.note

    def kill_at_5(run, values, seconds):
        note(run, values, seconds)
        if run.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_evaluation.Run, "note", kill_at_5)
    with pytest.raises(KeyboardInterrupt):
        train("gan", killed, *arguments)
    assert [row["step"] for row in read_evaluations(killed)] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(run_evaluation.Run, "note", note)
    train("gan", killed, *arguments, "--resume", "latest")
    assert (killed / "evaluations.jsonl").read_text() == evaluations and files_of(killed / "best") == best


def test_settings_of_the_evaluations_may_change_on_resume(tmp_path):
    folder = tmp_path / "run"
    train("gan", folder, "--evaluate_every", "4")
    changed = ("--evaluate_every", "1", "--evaluate_num_images", "10", "--best_by", "kid", "--feature_weights", "w.pt")
    train("gan", folder, *changed, "--resume", str(checkpoint(folder, 4)))
    assert [(row["step"], row["num_images"]) for row in read_evaluations(folder)] == [(4, 12), (5, 10), (6, 10)]
    assert json.loads((folder / "training_config.json").read_text())["best_by"] == "kid"


# ----------------------------------------------------------------------------------------------------------------- VAE


@pytest.mark.parametrize("components", ["2", "0"])
def test_a_vae_is_scored_with_the_density_that_it_would_be_shipped_with(tmp_path, monkeypatch, components):
    with_density = []
    watch_drawing(monkeypatch, lambda pipeline, index: with_density.append(pipeline.density is not None))
    script_scores(monkeypatch, [3.0, 2.0, 1.0], [0.0] * 3)
    train("vae", tmp_path / "run", "--evaluate_every", "2", "--density_components", components, "--sample_every", "2")
    assert with_density == [components == "2"] * 36
    best = open_pipeline(str(tmp_path / "run" / "best"), "cpu")
    assert (best.density is not None) == (components == "2")
    # The best is that of the last step here, whose density is that of the end of the run.
    shipped = files_of(tmp_path / "run" / "pipeline")
    assert json.loads(shipped.pop("progress.json")) == {"step": 6, "rollbacks": 0}
    assert files_of(tmp_path / "run" / "best" / "pipeline") == shipped
    assert (open_pipeline(str(checkpoint(tmp_path / "run", 4)), "cpu").density is not None) == (components == "2")
    assert [batches["position"] for batches in state_of(tmp_path / "run", 4)["batches"]] == [4]
