"""The page of a run: what it says, and that it never disturbs the training. See also test_page_of_a_run.py."""

import html
import json
import re
import subprocess
import sys

import pytest
from line_method import fit, metrics, status
from made_up_runs import CLASSES, LIKE_A_PRESET, entry, made_up_run, scores
from PIL import Image
from toy_runs import checkpoint, files_of, train

from hfgen.data.settings import DataSettings
from hfgen.errors import UserError
from hfgen.settings.ddpm import DDPMSettings
from hfgen.settings.gan import GANSettings
from hfgen.settings.vae import VAESettings
from hfgen.training import page
from hfgen.training.charts import POINTS, charts_of, score_charts
from hfgen.training.history import images_at
from hfgen.training.page import SHOWN_SHEETS, best_fitting_classes, in_words, steps_to_show, write_page
from hfgen.training.reference_curves import read_reference_curves
from hfgen.training.settings import RunSettings


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def show(run, **options):
    return write_page(run, CLASSES, **options).read_text()


# ---------------------------------------- during a training


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "run"
    train("gan", folder, "--sample_every", "2", "--augment", "diffaugment")
    return folder


@pytest.mark.parametrize("method", ["gan", "vae", "ddpm"])
def test_each_method_shows_the_images_that_its_network_is_trained_on(tmp_path, method):
    train(method, tmp_path / "run", "--sample_every", "3")
    sheets = sorted(path.name for path in (tmp_path / "run" / "training_images").iterdir())
    assert sheets == ["step-00000003.png", "step-00000006.png"]
    assert Image.open(tmp_path / "run" / "training_images" / sheets[0]).size == (34, 34)  # the batch has four
    text = (tmp_path / "run" / "index.html").read_text()
    assert 'alt="samples"' in text and 'alt="training images"' in text and "step 6 of 6" in text
    assert ('alt="reconstructions"' in text) == (method == "vae")
    assert f"hfgen train {method} --preset " in text
    assert f"<pre>hfgen sample {tmp_path / 'run'} --output run_samples</pre>" in text


def test_the_page_says_which_augmentation_was_chosen_and_by_what(tmp_path):
    train("gan", tmp_path / "run", "--augment", "auto", "--max_train_steps", "1")
    text = html.unescape((tmp_path / "run" / "index.html").read_text())
    assert re.search(r"augmentation of the discriminator's input: diffaugment \(\d+ images, fewer than ", text)
    train("gan", tmp_path / "run", "--augment", "auto", "--max_train_steps", "2", "--resume", "latest")
    text = html.unescape((tmp_path / "run" / "index.html").read_text())
    assert "launches: 2" in text and "discriminator's input: diffaugment (" in text


def test_the_sheet_from_a_vae_s_density_is_shown_which_is_what_hfgen_sample_draws(tmp_path):
    train("vae", tmp_path / "run", "--density_components", "1", "--sample_every", "3")
    text = (tmp_path / "run" / "index.html").read_text()
    assert "<figcaption>samples from the ex-post density: <span>step 6" in text
    assert "<figcaption>samples: <span>step 6" in text


def test_a_setting_without_a_value_is_called_unset(tmp_path):
    text = show(made_up_run(tmp_path / "run", feature_weights="inception.pt", learning_rate_d=None))
    assert ">None<" not in text and ": None" not in text
    assert '<td class="text">inception.pt</td><td class="text">unset</td>' in text
    assert "learning_rate_d: unset\n" in text


def test_the_page_is_written_at_the_start_at_each_sheet_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAUSE", 0)
    seen = []
    monkeypatch.setattr(page, "write_page", lambda folder, _, step: seen.append((step, status(folder)["status"])))
    fit(tmp_path, sample_every=3, after=lambda run: run.finish())
    assert seen == [(0, "running"), (0, "running"), (3, "running"), (6, "running"), (6, "complete")]


def test_sheets_in_quick_succession_do_not_write_it_each_time(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(page, "PAUSE", 10**9)
    monkeypatch.setattr(page, "write_page", lambda folder, _, step: seen.append(step))
    fit(tmp_path, sample_every=1, after=lambda run: run.finish())
    assert seen == [0, 0, 6]


@pytest.mark.parametrize("error", [UserError("no space"), RuntimeError("odd"), MemoryError()])
def test_a_page_that_cannot_be_written_does_not_end_the_training(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(page, "write_page", fail)
    fit(tmp_path, after=lambda run: run.finish())
    assert status(tmp_path)["status"] == "complete" and len(metrics(tmp_path)) == 6
    assert f"index.html was not written: {error}" in capsys.readouterr().out


def test_the_page_changes_nothing_else_and_no_random_number(tmp_path, toy, monkeypatch):
    monkeypatch.setattr(page, "write_page", lambda *_: None)
    train("gan", tmp_path / "run", "--sample_every", "0", "--augment", "diffaugment")
    assert files_of(checkpoint(tmp_path / "run", 6) / "pipeline") == files_of(checkpoint(toy, 6) / "pipeline")
    assert (toy / "index.html").is_file() and not (tmp_path / "run" / "index.html").exists()


def test_a_resumed_run_continues_its_page_and_each_launch_says_once_where_it_is(tmp_path, capsys):
    fit(tmp_path, max_train_steps=4, after=lambda run: run.finish())
    assert capsys.readouterr().out.count(f"page of this run: {tmp_path / 'index.html'}\n") == 1
    fit(tmp_path, max_train_steps=6, resume="latest", after=lambda run: run.finish())
    text = (tmp_path / "index.html").read_text()
    assert "step 6 of 6" in text and "launches: 2" in text
    points = json.loads(text.split('id="charts">')[1].split("</script>")[0])[0]["lines"][0]["points"]
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_fails_says_so_on_its_page(tmp_path):
    def fail(run):
        if run.step == 3:
            raise UserError("a broken disk")

    with pytest.raises(UserError):
        fit(tmp_path, each_step=fail)
    assert "<b>failed</b>" in (tmp_path / "index.html").read_text() and "a broken disk" in show(tmp_path)


# ---------------------------------------- what it says


def test_a_running_run_says_how_far_it_is_and_how_long_it_will_take(tmp_path):
    text = show(made_up_run(tmp_path / "run"))
    for part in ("running", "step 4,000 of 8,000", "64,000 images", "160 images/s", "7 min of", "about 7 min left"):
        assert part in text
    assert 'value="0.5"' in text


def test_the_time_limit_of_a_launch_may_end_it_sooner(tmp_path):
    run = made_up_run(tmp_path / "run", max_train_time="430s")
    assert "about 30 s left" in show(run)
    (run / "status.json").write_text('{"status": "running", "reason": "", "step": 3000, "seconds": 300.0}')
    assert "about 6 min left" in show(run)  # 100 s of this launch are over, 330 s are left


def test_a_run_whose_process_is_gone_is_not_called_running(tmp_path):
    text = show(made_up_run(tmp_path / "run"), is_alive=False)
    assert "<b>interrupted</b>" in text and "running" not in text.split("<h2>")[0].split("<body>")[1]
    assert " left<" not in text and "location.reload" not in text


def test_sheets_from_before_a_rollback_are_not_shown(tmp_path):
    run = made_up_run(tmp_path / "run")
    assert "step 4,000 · 64,000 images · FID 50" in show(run)
    assert "step 4,000 ·" not in show(run, step=3000) and "step 3,000 · 48,000 images" in show(run, step=3000)


def test_damaged_and_missing_pictures_are_left_out(tmp_path):
    run = made_up_run(tmp_path / "run")
    (run / "samples" / "step-00002000.png").write_bytes(b"\x89PNG")
    for sheet in (run / "training_images").iterdir():
        sheet.unlink()
    text = show(run)
    assert "step 2,000" not in text and "step 3,000" in text and "as the network sees them" not in text


def test_scores_are_compared_with_the_reference_of_the_preset_and_the_best_is_marked(tmp_path):
    run = made_up_run(tmp_path / "run")
    (run / "best").mkdir()
    (run / "best" / "scores.json").write_text('{"step": 3000}')
    text = show(run)
    assert "FID 50 after 64,000 images seen; the reference run of preset dcgan had" in text
    best = json.dumps("step 3,000 · 48,000 images · FID 66.67 (best)")  # of a sheet that the script shows
    assert best in text and "best/ is that of step 3,000" in text
    (run / "evaluations.jsonl").unlink()
    assert "Not scored; with --evaluate_every N it could be compared with the reference run" in show(run)


def test_settings_that_differ_come_first_with_their_defaults(tmp_path):
    text = show(made_up_run(tmp_path / "run", learning_rate=0.125))
    changed = text.split('id="settings"')[1].split("</table>")[0]
    assert "learning_<wbr>rate</th>" in changed and ">0.125<" in changed and ">0.0002<" in changed
    assert "adam_<wbr>beta1" not in changed and "adam_beta1: 0.5" in text.split("</table>")[1]


@pytest.mark.parametrize(
    ("state", "options", "expected"),
    [
        (
            "running",
            {},
            "resume, if it stops</div>\n<pre>hfgen train gan --preset {run}/training_config.json --output",
        ),
        (
            "stopped",
            {},
            "resume</div>\n<pre>hfgen train gan --preset {run}/training_config.json --output_dir {run}",
        ),
        ("complete", {}, "--output_dir {run} --resume latest --max_train_steps 16000</pre>"),
        ("complete", {"lr_scheduler": "cosine"}, "To resume, run the same command with --resume latest."),
    ],
)
def test_the_command_to_go_on(tmp_path, state, options, expected):
    run = made_up_run(tmp_path / "run", status=state, **options)
    assert expected.format(run=run) in show(run)


def test_a_complete_run_without_checkpoints_can_only_start_another(tmp_path):
    run = made_up_run(tmp_path / "run", status="complete")
    (run / "checkpoints" / "step-00004000").rmdir()  # as a study does with its trained cells
    text = show(run)
    assert (
        "--resume latest" not in text
        and "To train further, start another run from its weights with --init_from." in text
    )


def test_the_run_of_another_script_has_a_page_too(tmp_path):
    run = made_up_run(tmp_path / "run", of_another_script=3)
    text = write_page(run, [RunSettings]).read_text()
    assert "of_<wbr>another_<wbr>script</th>" in text and "run the same command with --resume latest" in text


@pytest.mark.parametrize("of_method", [GANSettings, VAESettings, DDPMSettings])
def test_the_method_of_a_run_is_known_by_its_settings(tmp_path, of_method):
    train(of_method.__name__[:-8].lower(), tmp_path / "run", "--max_train_steps", "1")
    candidates = [(RunSettings, DataSettings, one) for one in (GANSettings, VAESettings, DDPMSettings)]
    assert best_fitting_classes(tmp_path / "run", candidates)[-1] is of_method


# ---------------------------------------- curves and sheets


def test_both_sides_of_a_gan_share_a_panel_and_constants_have_none():
    log = [entry(step) | {"learning_rate": 0.1, "grad_norm": step} for step in (1, 2, 3)]
    charts = charts_of(log)
    assert [chart["title"] for chart in charts] == [
        "losses of both networks",
        "mean logits of the discriminator",
        "grad norm",
    ]
    assert [line["name"] for line in charts[0]["lines"]] == ["discriminator", "generator"]
    assert charts[0]["lines"][1]["points"] == [[1, 2.001], [2, 2.002], [3, 2.003]]
    assert [chart["is_main"] for chart in charts] == [True, False, False]


def test_each_loss_of_a_vae_has_a_panel_of_its_own():
    log = [{"step": step, "images": step, "loss": -1.0, "reconstruction_loss": 2.0} for step in (1, 2)]
    assert [chart["title"] for chart in charts_of(log)] == ["loss", "reconstruction loss"]


def test_long_logs_are_averaged_and_keep_what_is_not_finite():
    log = [{"step": step, "images": step, "loss": float(step)} for step in range(10 * POINTS)]
    log[-1]["loss"] = float("nan")
    points = charts_of(log)[0]["lines"][0]["points"]
    assert len(points) == POINTS and points[0] == [4.5, 4.5] and points[-1][1] != points[-1][1]


def test_scores_stand_beside_the_reference_curve_of_the_preset():
    log, settings = [entry(1000), entry(2000)], {}
    evaluations = [{"step": 1000, **scores(1000)}, {"step": 1500, **scores(1500)}]
    assert [chart["title"] for chart in score_charts(log, evaluations, settings)] == [
        "FID by training images",
        "KID by training images",
        "fraction of copies by training images",
    ]
    curve = next(one for one in read_reference_curves() if one.preset == "dcgan")
    fid = score_charts(log, evaluations, curve.settings | LIKE_A_PRESET)[0]
    assert [(line["name"], line["is_reference"]) for line in fid["lines"]] == [
        ("this run", False),
        ("preset dcgan", True),
    ]
    assert fid["lines"][0]["points"] == [[16_000, 200.0], [24_000, pytest.approx(133.3, abs=0.1)]]


def test_images_between_and_beyond_log_entries():
    log = [entry(1000), entry(2000)]
    assert [images_at(log, step) for step in (0, 500, 1000, 1500, 2500)] == [0, 8000, 16_000, 24_000, 40_000]
    assert images_at([], 5) is None


@pytest.mark.parametrize("count", [0, 1, 2, 23, 24, 25, 60, 1000])
def test_a_slider_shows_the_first_and_the_last_sheet_and_not_too_many(count):
    shown = steps_to_show(list(range(count)))
    assert len(shown) <= SHOWN_SHEETS and shown[:1] == list(range(count))[:1] and shown[-1:] == list(range(count))[-1:]
    assert {*shown[:-1]} <= {*steps_to_show(list(range(max(count - 1, 0))))}  # so that only one is encoded anew


@pytest.mark.parametrize(("seconds", "words"), [(40.4, "40 s"), (720, "12 min"), (7500, "2 h 5 min")])
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


# ---------------------------------------- hfgen page


def test_hfgen_page_writes_the_page_of_an_old_run(hfgen, tmp_path):
    run = made_up_run(tmp_path / "run", status="stopped")
    ended, out, _ = hfgen("page", run)
    assert (ended, out.strip()) == (0, str(run / "index.html"))
    assert "<b>stopped</b>" in (run / "index.html").read_text()


def test_hfgen_page_refuses_what_is_not_a_run(refusal, tmp_path):
    assert "not the folder of a run: training_config.json is missing" in refusal("page", tmp_path)


def test_hfgen_page_imports_nothing_slow(tmp_path):
    run = made_up_run(tmp_path / "run")
    code = (
        "import sys; from hfgen.cli import main; sys.argv = ['hfgen', 'page', sys.argv[1]]\n"
        "try: main()\n"
        "finally: print({'torch', 'diffusers', 'accelerate', 'matplotlib'} & sys.modules.keys())"
    )
    process = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True)
    assert process.stdout.splitlines()[-1] == "set()" and "interrupted" in (run / "index.html").read_text()
