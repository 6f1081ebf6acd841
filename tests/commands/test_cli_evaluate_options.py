"""`hfgen evaluate` with cheap features: what each option adds, and that every number stands in its cell."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from labelled_sheets import tiles
from PIL import Image
from stand_in_features import Colours, folder_of, paintings, quarters, table_of, watch_drawing

from hfgen.commands.evaluate import held_out_of
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.evaluation import reference
from hfgen.evaluation.scores import held_out_report
from hfgen.metrics import feature_spaces
from hfgen.metrics.report import TABLE
from hfgen.models import ConvVAE, DCGANGenerator
from hfgen.pipelines import GANPipeline, VAEPipeline


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A GAN and a VAE of 16 pixels, untrained."""
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    GANPipeline(DCGANGenerator(16, 4, base_channels=4).eval()).save_pretrained(root / "gan")
    VAEPipeline(ConvVAE(16, latent_dim=4, block_out_channels=(4, 8)).eval()).save_pretrained(root / "vae")
    return root


@pytest.fixture
def asked_for(monkeypatch):
    """Let `--features` be the colours of an image; return what was asked for, and what they are called."""
    wanted = {"identity": "inception-2015 stand-in"}

    def build(features, mode, weights, device):
        wanted["arguments"] = (features, mode, weights)
        return Colours(wanted["identity"])

    monkeypatch.setattr(feature_spaces, "build_extractor", build)
    return wanted


@pytest.fixture
def evaluate(hfgen, asked_for, pipelines, tmp_path):
    """Run the command on the GAN; return the report and the Markdown."""

    def run(*arguments, pipeline="gan", output="scores"):
        common = ("--reference", "toy_paintings:14", "--num_images", "10", "--device", "cpu")
        status, out, _ = hfgen("evaluate", pipelines / pipeline, *common, *arguments, "--output", tmp_path / output)
        assert status == 0
        markdown = (tmp_path / output / "evaluation.md").read_text()
        assert markdown in out
        return json.loads((tmp_path / output / "evaluation.json").read_text()), markdown

    return run


def test_every_number_of_the_table_stands_in_its_row_and_column(evaluate):
    report, markdown = evaluate()
    rows = table_of(markdown)
    head = ["score", "generated", "floor: 7 real images against 7 others"]
    assert [list(row) for row in rows] == [head] * 7
    assert [row["score"] for row in rows] == ["FID", "KID", "precision", "recall", "density", "coverage", "MiFID"]
    for row, (key, error) in zip(rows, TABLE.items(), strict=True):
        for column, part in zip(head[1:], (report["scores"], report["floor"]["split"]), strict=True):
            assert row[column] == f"{part[key]:.4g}" + (f" ± {part[error]:.2g}" if error else ""), (key, column)
    assert TABLE["fid"] == "fid_standard_error" and TABLE["kid"] == "kid_standard_error"
    assert markdown.startswith("10 images of 16 pixels against 14 real ones, seed 0; features: inception-2015 stand")
    assert f"sampled with replacement, against all: {report['floor']['fid_at_n']:.4g}." in markdown
    for kind in ("memorisation", "memorisation_by_pixels"):
        assert report[kind]["statement"] in markdown
    assert "Held out" not in markdown and "Likelihood" not in markdown and "repeats" not in report


def test_repeats_are_draws_with_seeds_that_count_up_and_the_spread_is_theirs(evaluate):
    report, markdown = evaluate("--repeats", "3", "--seed", "4")
    alone = [evaluate("--seed", str(seed), output=f"seed{seed}")[0]["scores"] for seed in (4, 5, 6)]
    repeats = report["repeats"]
    assert repeats["seeds"] == [4, 5, 6] and report["scores"] == alone[0] and report["seed"] == 4
    rows = table_of(markdown)
    head = ["score", "generated", "mean ± standard deviation over 3 seeds"]
    assert list(rows[0])[:3] == head and list(rows[0])[3].startswith("floor")
    for row, key in zip(rows, TABLE, strict=True):
        values = [scores[key] for scores in alone]
        assert repeats["mean"][key] == pytest.approx(np.mean(values))
        assert repeats["standard_deviation"][key] == pytest.approx(np.std(values, ddof=1))
        assert row[head[2]] == f"{repeats['mean'][key]:.4g} ± {repeats['standard_deviation'][key]:.2g}"
        assert row["generated"].startswith(f"{alone[0][key]:.4g}")
    assert repeats["standard_deviation"]["fid"] > 0
    assert evaluate("--repeats", "1", output="one")[0].keys() == evaluate(output="none")[0].keys()


def test_an_interruption_of_the_repeats_keeps_the_first_scores(hfgen, asked_for, pipelines, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hfgen.evaluation.scoring.repeat_scores", interrupt)
    arguments = ("--reference", "toy_paintings:14", "--num_images", "10", "--device", "cpu", "--repeats", "2")
    assert hfgen("evaluate", pipelines / "gan", *arguments, "--output", tmp_path / "scores")[0] == 130
    assert json.loads((tmp_path / "scores" / "evaluation.json").read_text())["scores"]["num_fake"] == 10


@pytest.mark.parametrize("size", [32, 3])
def test_bits_are_measured_in_the_batches_asked_for_and_a_failure_keeps_the_scores(
    hfgen, asked_for, pipelines, tmp_path, monkeypatch, size
):
    seen = []

    def interrupt(vae, images, numbers, batch_size):
        seen.append(batch_size)
        raise KeyboardInterrupt

    monkeypatch.setattr("hfgen.evaluation.bits_per_dimension.vae_bits", interrupt)
    arguments = ("--reference", "toy_paintings:14", "--num_images", "10", "--device", "cpu", "--bits_per_dimension")
    command = ("evaluate", pipelines / "vae", *arguments, "--output", tmp_path / "scores", "--batch_size", size)
    assert hfgen(*command)[0] == 130 and seen == [size]
    report = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert report["scores"]["num_fake"] == 10 and "likelihood" not in report


def test_images_that_cannot_be_read_are_named_before_the_scores(hfgen, asked_for, pipelines, tmp_path):
    folder = folder_of(paintings(range(16)), tmp_path / "real")
    for name in ("003.png", "007.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    command = ("evaluate", pipelines / "gan", "--reference", folder, "--num_images", "10", "--device", "cpu")
    status, _, err = hfgen(*command, "--output", tmp_path / "scores")
    assert status == 0 and f"warning: --reference {folder}: left out 003.png: " in err and "(and 1 other)" in err
    assert json.loads((tmp_path / "scores" / "evaluation.json").read_text())["scores"]["num_real"] == 14


def test_held_out_images_are_compared_with_as_such(evaluate, tmp_path):
    """Drawn are eight of the training images and two others: nearer to those than to what was held out."""
    kept = paintings(range(200, 213))
    folder = folder_of(kept, tmp_path / "kept")
    drawn = paintings([*range(8), 30, 31])
    with pytest.MonkeyPatch.context() as patch:
        watch_drawing(patch, lambda pipeline, index: drawn[index])
        report, markdown = evaluate("--held_out", folder)
    train, held_out, fake = (
        np.stack([quarters(image) for image in images]).astype(np.float32)
        for images in (paintings(range(14)), kept, drawn)
    )
    assert report["held_out"] == held_out_report(train, held_out, fake, "reference")
    part = report["held_out"]
    assert part["num_held_out"] == 13 and part["gap"] > 0 and part["copying_share"] > 0.7
    assert report["scores"]["num_real"] == 14 and part["fid"] > report["scores"]["fid"]
    assert f"Held out: FID {part['fid']:.4g} against 13 images; {part['statement']}." in markdown
    assert report["memorisation"]["num_copies"] == report["memorisation_by_pixels"]["num_copies"] == 8


def test_each_data_set_has_the_split_that_was_given_for_it(evaluate, monkeypatch):
    opened, open_images, load_reference = [], reference.open_images, reference.load_reference

    def load(settings, extractor, argument, fewest=None):
        opened.append((argument, settings.dataset, settings.dataset_split, settings.sample_size))
        return load_reference(settings, extractor, argument, fewest)

    def open_without_splits(settings, argument, fewest=None):
        return open_images(replace(settings, dataset_split="train"), argument, fewest)  # toys have no other

    monkeypatch.setattr(reference, "load_reference", load)
    monkeypatch.setattr(reference, "open_images", open_without_splits)
    evaluate("--held_out", "toy_paintings:13", "--held_out_split", "kept", "--dataset_split", "seen")
    real, held_out = ("--reference", "toy_paintings:14", "seen", 16), ("--held_out", "toy_paintings:13", "kept", 16)
    assert opened == [real, held_out]
    evaluate("--held_out", "toy_paintings:13", output="again")
    assert [split for _, _, split, _ in opened[2:]] == ["train", "test"]


def test_held_out_images_need_not_have_the_column_of_the_reference(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", train_images=images[:25], test_images=images[25:])
    data = DataSettings(str(tmp_path / "set.npz"), dataset_column="train_images", sample_size=16)
    for held_out, count in ((data.dataset, 15), ("toy_paintings:13", 13)):
        assert len(load_images(held_out_of(held_out, None, data))) == count


def test_the_sheet_of_copies_by_pixels_shows_the_nearest_pair_first(evaluate, tmp_path, monkeypatch):
    noise = [np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8) for index in range(10)]
    drawn = [Image.fromarray(image) for image in noise]
    mirrored = paintings([5])[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawn[3] = mirrored
    watch_drawing(monkeypatch, lambda pipeline, index: drawn[index])
    report, markdown = evaluate()
    assert report["memorisation_by_pixels"]["num_copies"] == 1
    assert "1 of 10 are copies by their pixels" in markdown
    sheet = tiles(tmp_path / "scores" / "closest_pixels.png", 4, 8, 16)
    assert np.array_equal(sheet[0, 0], np.asarray(mirrored))
    assert np.array_equal(sheet[1, 0], np.asarray(paintings([5])[0]))
    by_features = tiles(tmp_path / "scores" / "closest.png", 4, 8, 16)
    assert not np.array_equal(by_features, sheet)


def test_bits_per_dimension_are_of_held_out_images_where_there_are_some(evaluate):
    report, markdown = evaluate("--bits_per_dimension", pipeline="vae")
    told = report["likelihood"]
    assert told["num_images"] == 14 and not told["held_out"]
    assert f"Likelihood: {told['statement']}." in markdown and "that may have been in its training data" in markdown
    report, markdown = evaluate(
        "--bits_per_dimension", "--held_out", "toy_paintings:13", pipeline="vae", output="held_out"
    )
    assert report["likelihood"]["num_images"] == 13 and report["likelihood"]["held_out"]
    assert "bits per dimension for 13 held-out images" in markdown
    assert "likelihood" not in evaluate(pipeline="vae", output="without")[0]


def test_bits_per_dimension_of_a_gan_are_refused_before_any_work(refusal, asked_for, pipelines, tmp_path):
    arguments = ("--reference", "no/such/folder", "--output", tmp_path / "out", "--bits_per_dimension")
    line = refusal("evaluate", pipelines / "gan", *arguments)
    assert "--bits_per_dimension: a GANPipeline has no likelihood" in line
    assert "arguments" not in asked_for and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("identity", "names"),
    [
        ("dinov2 224 pixels 0", ("Frechet distance (DINOv2)", "kernel distance (DINOv2)", "MiFD (DINOv2)")),
        ("clip 224 pixels 0", ("Frechet distance (CLIP)", "kernel distance (CLIP)", "MiFD (CLIP)")),
        ("inception-2015 legacy 0", ("FID", "KID", "MiFID")),
    ],
)
def test_features_are_chosen_and_give_the_scores_their_names(evaluate, asked_for, identity, names):
    asked_for["identity"] = identity
    family = identity.split()[0] if "inception" not in identity else "inception"
    mode = "legacy" if family == "inception" else "clean"
    chosen = ("--features", family, "--mode", mode, "--feature_weights", "some/weights")
    report, markdown = evaluate(*chosen, "--held_out", "toy_paintings:13")
    assert asked_for["arguments"] == (family, mode, "some/weights") and report["features"] == identity
    rows = table_of(markdown)
    assert (rows[0]["score"], rows[1]["score"], rows[6]["score"]) == names
    assert f"\n{names[0]} of 10 real images" in markdown and f"Held out: {names[0]} " in markdown
    assert f"the bias of {names[0]}:" in markdown and ("FID" in markdown) == (family == "inception")
    evaluate(output="usual")
    assert asked_for["arguments"] == ("inception", "clean", None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--features", "vgg"), "--features vgg: must be one of inception, dinov2, clip"),
        (("--features", "clip", "--mode", "legacy"), "--mode legacy: only for --features inception"),
        (("--held_out", "toy_paintings:1"), "--held_out toy_paintings:1: 1 image, but 2 are needed"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(refusal, pipelines, tmp_path, monkeypatch, arguments, told):
    pytest.importorskip("cleanfid")
    if "--held_out" in arguments:
        monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    common = ("--reference", "toy_paintings:14", "--output", tmp_path / "out", "--device", "cpu")
    assert told in refusal("evaluate", pipelines / "gan", *common, *arguments)
    assert not (tmp_path / "out").exists()


def test_the_model_index_names_model_data_and_scores(evaluate, tmp_path, monkeypatch):
    folder = folder_of(paintings(range(13)), tmp_path / "my_photos")
    report, _ = evaluate("--reference", folder, "--seed", "2")
    text = (tmp_path / "scores" / "model-index.yml").read_text()
    assert str(tmp_path) not in text
    results = ModelCard(f"---\n{text}---\n# A generator\n").data.eval_results
    scores = {result.metric_type: result.metric_value for result in results}
    assert scores == {name: pytest.approx(report["scores"][name], abs=1e-6) for name in scores} and "fid" in scores
    assert {result.dataset_name for result in results} == {"my_photos"}
    assert "name: gan" in text
    monkeypatch.chdir(folder)
    evaluate("--reference", ".", output="here")
    assert "name: my_photos" in (tmp_path / "here" / "model-index.yml").read_text()


def test_grey_images_of_other_depths_are_warned_about(hfgen, colours, tmp_path):
    for name, most in (("deep", 60_000), ("shallow", 16_000), ("as shallow", 16_000)):
        (tmp_path / name).mkdir()
        for index in range(14):
            pixels = np.random.default_rng(index).integers(0, most, (16, 16), dtype=np.uint16)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    arguments = ("evaluate-images", tmp_path / "shallow", "--sample_size", 16, "--output")
    _, _, err = hfgen(*arguments, tmp_path / "a", "--reference", tmp_path / "deep", "--held_out", tmp_path / "shallow")
    assert "warning: IMAGES: white is 16383 in these 16-bit grey images and 65535 in the reference's (by" in err
    assert "warning: --held_out: white is 16383 in these 16-bit grey" in err
    _, _, err = hfgen(*arguments, tmp_path / "b", "--reference", tmp_path / "as shallow")
    assert "white is" not in err
