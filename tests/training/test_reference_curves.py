"""The reference curves that are shipped, and where a run is beside them."""

import json

import pytest
from stand_in_features import Colours
from toy_runs import events, script, train
from typer.testing import CliRunner

from hfgen.cli import app
from hfgen.config import settings_to_dict
from hfgen.inference.curves import compared_with_references, plot_curves, read_metrics
from hfgen.metrics import feature_spaces
from hfgen.training import reference_curves
from hfgen.training.reference_curves import (
    FAR_BEHIND,
    ReferenceCurve,
    compare_with_reference,
    curve_of,
    read_reference_curves,
    reference_of,
)


POINTS = [(10, 1.0, 200.0), (1000, 90.0, 20.0)]
CURVE = ReferenceCurve("toy", {"loss": "hinge", "batch_size": 4}, 12, "toys, one core", POINTS)
SETTINGS = {"loss": "hinge", "batch_size": 4, "seed": 7, "evaluate_num_images": 12}


@pytest.fixture
def references(monkeypatch):
    monkeypatch.setattr(reference_curves, "read_reference_curves", lambda: [CURVE])
    return [CURVE]


def test_between_two_points_fid_is_on_the_line_of_both_logarithms():
    assert CURVE.fid_at(9) is None
    assert CURVE.fid_at(10) == pytest.approx(200)
    assert CURVE.fid_at(100) == pytest.approx((200 * 20) ** 0.5)  # halfway, in logarithms
    assert CURVE.fid_at(5000) == pytest.approx(20)


def test_a_run_is_compared_with_the_preset_whose_settings_it_has(references):
    behind, told = compare_with_reference(SETTINGS, 12, 10, 200 * FAR_BEHIND + 1)
    assert behind and told == (
        "FID 301 after 10 images seen; the reference run of preset toy had 200 (toys, one core)"
    )
    assert compare_with_reference(SETTINGS, 12, 10, 200 * FAR_BEHIND - 1)[0] is False
    for settings, num_images, images in (
        ({**SETTINGS, "loss": "wasserstein"}, 12, 10),
        ({"loss": "hinge"}, 12, 10),
        (SETTINGS, 13, 10),
        (SETTINGS, 12, 9),
    ):
        assert compare_with_reference(settings, num_images, images, 9999) == (False, "")


@pytest.mark.usefixtures("fresh_accelerate_state")
@pytest.mark.parametrize(("generated", "warnings"), [(24, 1), (25, 0)])
def test_a_run_that_is_far_behind_says_so_once_unless_real_images_are_few(tmp_path, monkeypatch, generated, warnings):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    settings, points = {"loss": "non_saturating"}, [(4, 1.0, 1e-9)]
    curve = CURVE._replace(settings=settings, points=points, num_images=generated)
    monkeypatch.setattr(reference_curves, "read_reference_curves", lambda: [curve])
    evaluation = ("--evaluate_every", "2", "--evaluate_num_images", str(generated))
    train("gan", tmp_path / "run", "--max_train_steps", "4", *evaluation)
    told = [event["what"] for event in events(tmp_path / "run") if "reference run" in event["what"]]
    assert len(told) == warnings and all("preset toy had 0 (toys, one core). Other data" in one for one in told)


def scored_run(folder, fid=90.0):
    folder.mkdir()
    lines = [
        {"step": step, "images": 4 * step, "seconds": 60.0 * step, "loss_g": 1.0, "images_per_second": 0.5}
        for step in (1, 25)
    ]
    lines[-1] |= {"fid": fid} if fid else {}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "training_config.json").write_text(json.dumps(SETTINGS))
    return folder


def test_a_run_is_drawn_among_the_references_against_images(tmp_path, references):
    figure = plot_curves([scored_run(tmp_path / "mine")], references)
    by_images, by_time = figure.axes[-2:]
    assert by_images.get_xlabel() == "training images seen" and "toys, one core" in by_images.get_title()
    lines = {line.get_label(): line.get_xydata().tolist() for line in by_images.lines}
    assert lines == {"mine": [[100, 90.0]], "preset toy": [[10, 200.0], [1000, 20.0]]}
    assert {line.get_label(): line.get_xydata().tolist() for line in by_time.lines} == {
        "mine": [[pytest.approx(100 / 0.5 / 60), 90.0]],  # and not the 25 minutes that passed in all
        "preset toy": [[1.0, 200.0], [90.0, 20.0]],
    }


def test_a_run_without_scores_is_left_out_beside_one_that_has_some(tmp_path, references):
    runs = [scored_run(tmp_path / "mine"), scored_run(tmp_path / "data", fid=None)]
    figure = plot_curves(runs, references)
    assert [line.get_label() for line in figure.axes[-2].lines] == ["mine", "preset toy"]
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["mine", "preset toy"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["mine", "data"]  # its losses are there


def test_without_any_score_the_command_says_how_to_get_one_and_draws_nothing(refusal, tmp_path, references):
    run = scored_run(tmp_path / "mine", fid=None)
    line = refusal("curves", run, "--reference", "--output", tmp_path / "curves.png")
    assert "--reference: compares scores, and no run here has any: train with --evaluate_every" in line
    assert not (tmp_path / "curves.png").exists()


def test_what_the_references_are_of_is_wrapped_to_the_width_of_its_axes(tmp_path, references):
    long = CURVE._replace(about="8,000 cat faces of 64 pixels, 1,000 images scored; " + "one core of many, " * 8)
    figure = plot_curves([scored_run(tmp_path / "mine")], [long])
    figure.canvas.draw()
    by_images, by_time = figure.axes[-2:]
    assert by_images.get_title() == "grey: 8,000 cat faces of 64 pixels, 1,000 images scored"
    assert by_time.get_title().startswith("grey: one core of many") and "\n" in by_time.get_title()
    for axes in (by_images, by_time):
        assert axes.title.get_window_extent().width <= axes.get_window_extent().width


def test_the_command_says_where_each_run_is(tmp_path, references):
    runs = [str(scored_run(tmp_path / "one")), str(scored_run(tmp_path / "two", fid=None))]
    result = CliRunner().invoke(app, ["curves", *runs, "--reference", "--output", str(tmp_path / "curves.png")])
    told = result.output
    assert result.exit_code == 0 and (tmp_path / "curves.png").stat().st_size > 1000
    assert f"{runs[0]}: FID 90 after 100 images seen; the reference run of preset toy had 63" in told
    assert f"{runs[1]}: not scored yet: train with --evaluate_every" in told


def test_a_run_of_another_family_or_without_settings_has_no_reference(tmp_path, references):
    run = scored_run(tmp_path / "mine")
    for settings in ({"loss": "l1", "evaluate_num_images": 12}, {}):
        (run / "training_config.json").write_text(json.dumps(settings))
        assert compared_with_references(run).startswith("no reference curve has these settings")
    (run / "training_config.json").unlink()
    assert compared_with_references(run).startswith("no reference curve has these settings")


def test_a_curve_is_made_of_a_run_s_scores_and_of_the_minutes_of_its_updates(tmp_path):
    log = [(40, 10.0, None), (80, 20.0, 300.26), (200, 40.0, None), (320, 20.0, 99.99)]
    lines = [
        {"step": images, "seconds": images, "images": images, "images_per_second": speed, "fid": fid}
        for images, speed, fid in log
    ]
    lines = [{key: value for key, value in line.items() if value is not None} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "training_config.json").write_text(json.dumps({**SETTINGS, "network": "dcgan"}))
    assert curve_of(tmp_path, read_metrics(tmp_path), "toy", "toys") == {
        "preset": "toy",
        "settings": {"batch_size": 4, "loss": "hinge", "network": "dcgan"},
        "num_images": 12,
        "about": "toys",
        "points": [[80, 0.1, 300.3], [320, 0.2, 100.0]],  # 4 s and 2 s; then 3 s and 6 s more
    }


def test_the_shipped_curves_are_those_of_presets_and_say_what_they_are_of():
    curves = read_reference_curves()
    assert curves
    for curve in curves:
        assert "cat faces" in curve.about and curve.num_images >= 500 and curve.settings["sample_size"] in (32, 64)
        images, minutes, fids = zip(*curve.points, strict=True)
        assert list(images) == sorted(images) and list(minutes) == sorted(minutes)
        assert fids[0] >= fids[-1] > 5


@pytest.mark.parametrize("curve", read_reference_curves(), ids=lambda curve: curve.preset)
def test_a_run_of_a_preset_as_it_is_finds_the_shipped_curve_of_that_preset(curve):
    kind = next((kind for kind in ("ddpm", "vae") if curve.preset.startswith(kind)), "gan")
    module = script(kind)
    settings = settings_to_dict(*module.parse_settings(module.SETTINGS, module.PRESETS, ["--preset", curve.preset]))
    assert reference_of(settings, curve.num_images) == curve


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("vae", ["--feature_weight", "0", "--adversarial_weight", "0", "--learned_term_start", "0"]),
        ("vae", ["--learned_term_start", "5000"]),
        ("vae", ["--refine_channels", "0"]),
        ("ddpm", ["--num_inference_steps", "50"]),
    ],
)
def test_a_preset_without_what_made_its_curve_is_not_compared_with_it(kind, changes):
    module = script(kind)
    arguments = ["--preset", {"vae": "vae_learned", "ddpm": "ddpm"}[kind], *changes]
    settings = settings_to_dict(*module.parse_settings(module.SETTINGS, module.PRESETS, arguments))
    assert reference_of(settings, 1000) is None
