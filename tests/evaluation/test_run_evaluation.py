"""Scores in the course of a run: when, of what, what is kept of them, and that training does not feel them."""

import errno
import json
import os
import signal
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
from hfgen.evaluation.during_training import RunEvaluation, is_copying, read_evaluations
from hfgen.evaluation.scores import distances_among, memorisation_report
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
    pytest.mark.usefixtures("fresh_accelerate_state"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    """Scores in features of 12 numbers; and a density that is fitted to few latents."""
    extractor = Colours()
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: extractor)
    monkeypatch.setattr("hfgen.methods.density.NUM_LATENTS", 500)
    return extractor


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


def test_without_the_option_nothing_is_loaded_or_scored(tmp_path, colours):
    train("gan", tmp_path / "run", "--max_train_steps", "2")
    assert colours.calls == 0 and read_evaluations(tmp_path / "run") == []
    assert not (tmp_path / "run" / "best").exists()


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


# ------------------------------------------------------------------------------------------------------------ stopping


def test_an_evaluation_that_fails_costs_its_score_and_not_the_training(tmp_path, monkeypatch, capsys):
    taken = []

    def before(pipeline, index):
        taken.append(index)
        if len(taken) == 12 + 4:  # of the second evaluation
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/images")

    watch_drawing(monkeypatch, before)
    train("gan", tmp_path / "run", "--evaluate_every", "2", "--max_train_steps", "6")
    assert [row["step"] for row in read_evaluations(tmp_path / "run")] == [2, 6]
    assert status(tmp_path / "run")["status"] == "complete"
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"]) == (4, "warning") and event["what"].startswith(
        "not scored: could not write"
    )
    assert f"warning: step 4: {event['what']}" in capsys.readouterr().out


def test_scores_that_cannot_be_kept_cost_no_training_either(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "best")

    monkeypatch.setattr(run_evaluation, "_save_best", full)
    train("gan", tmp_path / "run", "--evaluate_every", "3", "--max_train_steps", "6")
    assert status(tmp_path / "run")["status"] == "complete"
    assert [event["what"].partition(":")[0] for event in events(tmp_path / "run")] == ["not scored"] * 2


def test_a_bug_in_an_evaluation_is_not_hidden(tmp_path, monkeypatch):
    watch_drawing(monkeypatch, lambda pipeline, index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("gan", tmp_path / "run", "--evaluate_every", "2", "--max_train_steps", "6")


def test_the_time_limit_ends_an_evaluation_so_that_the_checkpoint_is_in_time(tmp_path, monkeypatch):
    taken = []

    class Clock:
        """Two hours later from the fifth image of the second evaluation on."""

        def monotonic(self):
            return time.monotonic() + (7200 if len(taken) >= 12 + 5 else 0)

    monkeypatch.setattr("hfgen.training.run.time", Clock())
    watch_drawing(monkeypatch, lambda pipeline, index: taken.append(index))
    arguments = ("--evaluate_every", "2", "--checkpoint_every", "0", "--max_train_steps", "9")
    train("gan", tmp_path / "run", *arguments, "--max_train_time", "1h")
    assert len(taken) < 12 + 8 and [row["step"] for row in read_evaluations(tmp_path / "run")] == [2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert status(tmp_path / "run")["reason"] == "time is up"
    assert [event["what"] for event in events(tmp_path / "run")] == ["not scored: the time is up"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["drawing", "features"])
def test_a_request_to_stop_ends_an_evaluation_without_a_score(tmp_path, monkeypatch, where):
    taken = []

    def before(pipeline, index):
        taken.append(index)
        if where == "drawing" and len(taken) == 12 + 4:  # of the second evaluation
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)

    def stop_at_third_call(calls):
        if where == "features" and calls == 3:  # of the training images, then of each evaluation
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGTERM)

    watch_drawing(monkeypatch, before)
    extractor = Colours(before_each=stop_at_third_call)
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: extractor)
    arguments = ("--evaluate_every", "2", "--checkpoint_every", "0", "--max_train_steps", "9")
    with pytest.raises(SystemExit) as end:
        train("gan", tmp_path / "run", *arguments)
    assert end.value.code == 143
    assert len(taken) == {"drawing": 16, "features": 24}[where]
    assert [row["step"] for row in read_evaluations(tmp_path / "run")] == [2]
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == 4 and "fid" not in last and last["images_per_second"] > 4 / 0.8
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["reason"] == "stopped by SIGTERM"


def test_diffusion_heeds_it_after_each_step(tmp_path, monkeypatch):
    """A batch of it may take minutes."""
    steps, run_generator = [], DDPMPipeline.__call__

    def watched(pipeline, *arguments, callback_on_step_end, **options):
        def after_each(pipeline, index, *rest):
            steps.append(index)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            callback_on_step_end(pipeline, index, *rest)

        return run_generator(pipeline, *arguments, callback_on_step_end=after_each, **options)

    monkeypatch.setattr(DDPMPipeline, "__call__", watched)
    with pytest.raises(SystemExit):
        train("ddpm", tmp_path / "run", "--evaluate_every", "1", "--sample_every", "0", "--num_inference_steps", "9")
    assert steps == [0, 1, 2] and read_evaluations(tmp_path / "run") == []


# ------------------------------------------------------------------------------------------------------------- copying


def test_that_copying_has_begun_is_said_once_and_not_again_after_a_resume(tmp_path, monkeypatch, capsys):
    originals, seen = paintings([0, 1, 2]) * 4, []

    def copy_from_the_second_on(pipeline, index):
        seen.append(index)
        return originals[index] if len(seen) > 12 else None

    watch_drawing(monkeypatch, copy_from_the_second_on)
    arguments = ("--evaluate_every", "2", "--max_train_steps", "6")
    train("gan", tmp_path / "run", *arguments)
    rows = read_evaluations(tmp_path / "run")
    assert [row["copying"] for row in rows] == [False, True, True]
    assert (rows[1]["copies"], rows[1]["copies_by_pixels"]) == (1, 1)
    assert rows[0]["copies"] == rows[0]["copies_by_pixels"] == 0 < rows[0]["copies_expected"]
    # The best is kept that does not copy, although copies score better.
    assert max(rows[1]["fid"], rows[2]["fid"]) < rows[0]["fid"]
    assert json.loads((tmp_path / "run" / "best" / "scores.json").read_text()).items() >= rows[0].items()
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["event"]) == (4, "warning")
    assert event["what"].startswith(
        "the samples have started to copy training images: 100.0% of them are nearer to a training image"
    )
    assert "warning: step 4: the samples have started to copy training images" in capsys.readouterr().out
    train("gan", tmp_path / "run", *arguments, "--resume", str(checkpoint(tmp_path / "run", 4)))
    assert len(events(tmp_path / "run")) == 1 and read_evaluations(tmp_path / "run")[-1]["copying"]


def test_a_generator_that_does_not_copy_is_not_warned_about(tmp_path):
    train("gan", tmp_path / "run", "--evaluate_every", "2")
    assert not any(row["copying"] for row in read_evaluations(tmp_path / "run"))
    assert events(tmp_path / "run") == []


@pytest.mark.parametrize("name", ["copies", "copies_by_pixels"])
@pytest.mark.parametrize(
    ("num_images", "expected", "share", "copying"),
    [
        # Four standard errors of 1% of 1000 are 1.26%.
        (1000, 0.01, 0.010, False), (1000, 0.01, 0.022, False), (1000, 0.01, 0.023, True),
        # Where none is expected, one more or less is chance.
        (1000, 0.0, 0.002, False), (1000, 0.0, 0.005, True), (10, 0.0, 0.3, False), (10, 0.0, 0.5, True),
        # For a few images the limits are 0.01 + 4 x 0.1 and 0.2 + 4 x 0.126.
        (10, 0.01, 0.4, False), (10, 0.01, 0.5, True), (10, 0.2, 0.7, False), (10, 0.2, 0.8, True),
    ],
)  # fmt: skip
def test_copies_are_told_from_chance(name, num_images, expected, share, copying):
    scores = dict.fromkeys(("copies", "copies_by_pixels", "copies_expected", "copies_by_pixels_expected"), 0.0)
    assert is_copying(scores | {name: share, f"{name}_expected": expected}, num_images, 10**9) is copying


@pytest.mark.parametrize("num_images", [10, 100, 1000])
def test_a_generator_as_good_as_the_data_is_hardly_ever_taken_for_a_copyist(num_images):
    copies = np.random.default_rng(0).binomial(num_images, 0.01, 4000) / num_images
    none = {"copies_expected": 0.01, "copies_by_pixels": 0.0, "copies_by_pixels_expected": 0.0}
    assert np.mean([is_copying({"copies": share, **none}, num_images, 10**9) for share in copies]) < 0.01


@pytest.mark.parametrize("num_real", [100, 300])
def test_the_threshold_of_a_few_real_images_is_uncertain_too(num_real):
    """With the error of the generated images alone, a perfect generator would be suspected in 20 to 40% of cases."""
    rng, suspected = np.random.default_rng(0), []
    for _ in range(40):
        real, fake = rng.normal(size=(num_real, 24)), rng.normal(size=(1000, 24))
        copies = memorisation_report(real, fake, distances_among(real))["num_copies"] / 1000
        scores = {"copies": copies, "copies_expected": 0.01, "copies_by_pixels": 0, "copies_by_pixels_expected": 0}
        suspected.append((is_copying(scores, 1000, num_real), is_copying(scores, 1000, 10**9)))
    honest, naive = np.mean(suspected, axis=0)
    assert honest <= 0.05 and naive >= 3 * max(honest, 0.03)


def test_a_copying_pipeline_never_replaces_one_that_does_not(tmp_path, monkeypatch):
    """Not even when a resumed run scores another number of images, so that the scores cannot be compared."""
    originals, copying = paintings([0, 1, 2]) * 8, []
    watch_drawing(monkeypatch, lambda pipeline, index: originals[index] if copying else None)
    train("gan", tmp_path / "run", "--evaluate_every", "2", "--max_train_steps", "2")
    first = json.loads((tmp_path / "run" / "best" / "scores.json").read_text())
    copying.append(True)
    more = ("--evaluate_every", "2", "--evaluate_num_images", "20", "--resume", "latest")
    train("gan", tmp_path / "run", *more, "--max_train_steps", "4")
    rows = read_evaluations(tmp_path / "run")
    assert [row["copying"] for row in rows] == [False, True] and rows[1]["num_images"] == 20 != first["num_images"]
    assert json.loads((tmp_path / "run" / "best" / "scores.json").read_text()) == first
    copying.clear()
    train("gan", tmp_path / "run", *more, "--max_train_steps", "6")
    assert json.loads((tmp_path / "run" / "best" / "scores.json").read_text())["step"] == 6


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
