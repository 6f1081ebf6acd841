"""`hfgen compare` on tiny pipelines of several families."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from stand_in_features import Colours, paintings, table_of, watch_drawing

from hfgen.commands.compare import best_scores, parse_steps
from hfgen.errors import UserError
from hfgen.evaluation import scoring
from hfgen.inference.figures import LABEL_WIDTH
from hfgen.methods.schedules import noise_schedule, sampling_scheduler
from hfgen.metrics import feature_spaces
from hfgen.models import ConvVAE, DCGANGenerator, UNetBase
from hfgen.pipelines import DDPMPipeline, GANPipeline, VAEPipeline


SHARES = ("precision", "recall", "coverage")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Untrained pipelines of 16 pixels, one of each family, and a GAN of 8."""
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    GANPipeline(DCGANGenerator(16, 4, base_channels=4).eval()).save_pretrained(root / "gan")
    GANPipeline(DCGANGenerator(8, 4, base_channels=4).eval()).save_pretrained(root / "small")
    VAEPipeline(ConvVAE(16, latent_dim=4, block_out_channels=(4, 8)).eval()).save_pretrained(root / "vae")
    unet = UNetBase(16, block_out_channels=(4, 8), time_embedding_dim=6).eval()
    DDPMPipeline(unet, sampling_scheduler(noise_schedule("linear", 20), "ddim")).save_pretrained(root / "ddpm")
    return root


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_families_are_compared_and_diffusion_has_a_row_per_number_of_steps(hfgen, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    arguments = ("--reference", "toy_paintings:14", "--num_images", "12", "--device", "cpu", "--steps", "2,4")
    families = [folders / name for name in ("gan", "vae", "ddpm")]
    status, out, _ = hfgen("compare", *families, *arguments, "--output", tmp_path / "compared")
    assert status == 0
    rows = json.loads((tmp_path / "compared" / "comparison.json").read_text())["rows"]
    assert [(row["pipeline"], row["steps"]) for row in rows] == [
        ("GANPipeline", None), ("VAEPipeline", None), ("DDPMPipeline", 2), ("DDPMPipeline", 4)
    ]  # fmt: skip
    assert rows[2]["scores"]["fid"] != rows[3]["scores"]["fid"]
    assert all(row["scores"]["num_fake"] == 12 and row["floor"] == rows[0]["floor"] for row in rows)
    parameters = [sum(w.numel() for w in network.parameters()) for network in (
        DCGANGenerator(16, 4, base_channels=4), ConvVAE(16, latent_dim=4, block_out_channels=(4, 8)),
        UNetBase(16, block_out_channels=(4, 8), time_embedding_dim=6),
    )]  # fmt: skip
    assert [row["num_parameters"] for row in rows] == [*parameters, parameters[-1]]
    table = (tmp_path / "compared" / "comparison.md").read_text()
    assert table in out and table.count("\n| ") == 2 + 4 + 1
    for row in rows:
        line = next(line for line in table.splitlines() if f"| {row['steps'] or 1} |" in line and row["name"] in line)
        assert f"| {row['scores']['fid']:.4g} ± " in line.replace("**", "")
    lines = [line for line in table.splitlines() if line.startswith("| /")]
    fids = [float(re.search(r"\| \**([\d.e+]+) ± ", line)[1]) for line in lines]
    assert fids == sorted(fids)
    assert [f"| **{fid:.4g} ± " in line for fid, line in zip(fids, lines, strict=True)] == [True, False, False, False]
    # One row of ten images of 16 pixels for each row of the table, beside its name, which may be higher.
    sheet = np.asarray(Image.open(tmp_path / "compared" / "sheet.png"))
    assert sheet.shape[0] >= 4 * (64 + 6) and sheet.shape[1:] == (LABEL_WIDTH + 10 * 66 - 2, 3)
    assert (
        hfgen("sample", folders / "gan", "--num_images", "1", "--output", tmp_path / "one", "--device", "cpu")[0] == 0
    )
    alone = np.asarray(Image.open(tmp_path / "one" / "000000.png"))
    shown = sheet[:, LABEL_WIDTH : LABEL_WIDTH + 64 : 4]
    assert any(np.array_equal(shown[top : top + 64 : 4], alone) for top in range(len(shown)))
    assert (sheet[:16, :LABEL_WIDTH] < 128).any()  # the name


def test_the_best_of_each_score_is_marked_unless_there_is_none():
    first = {"fid": 3.0, "kid": math.nan, "precision": 0.5, "recall": 0.0, "coverage": 0.1}
    second = {"fid": 2.0, "kid": math.nan, "precision": 0.25, "recall": 0.0, "coverage": 0.1}
    best = {"fid": 2.0, "kid": None, "precision": 0.5, "recall": None, "coverage": 0.1}
    assert best_scores([{"scores": first}, {"scores": second}]) == best
    assert set(best_scores([{"scores": first}]).values()) == {None}


def test_pipelines_of_several_sizes_are_refused_before_anything_is_scored(refusal, folders, tmp_path):
    both = (folders / "gan", folders / "small")
    line = refusal("compare", *both, "--reference", "toy_paintings:14", "--output", tmp_path / "out")
    assert f"{both[0]} 16, {both[1]} 8 pixels" in line and not (tmp_path / "out").exists()


def test_a_misspelt_pipeline_is_refused_before_anything_is_scored(refusal, folders, tmp_path):
    both = (folders / "gan", folders / "gone")
    line = refusal("compare", *both, "--reference", "toy_paintings:14", "--output", tmp_path / "out")
    assert f"{both[1]}: no such folder" in line and "features" not in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--steps", "2,5000"), "ddpm takes at most 20 denoising steps, not 5000; leave it out, or give fewer"),
        (("--num_inference_steps", "5000"), "ddpm takes at most 20 denoising steps, not 5000"),
        (("--sample_from", "zzz"), "--sample_from zzz: must be prior or ex_post"),
        (("--sample_from", "ex_post"), "vae has no ex-post density; use prior, or leave it out"),
    ],
)
def test_what_one_of_the_pipelines_cannot_do_is_refused_before_any_is_scored(
    refusal, folders, tmp_path, monkeypatch, arguments, told
):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: pytest.fail("the real images were read"))
    all_three = (folders / name for name in ("gan", "vae", "ddpm"))
    line = refusal("compare", *all_three, "--reference", "toy_paintings:14", *arguments, "--output", tmp_path / "out")
    assert told in line and not (tmp_path / "out").exists()


def test_a_pipeline_that_is_given_twice_is_refused(refusal, folders, tmp_path):
    arguments = ("--reference", "toy_paintings:14", "--output", tmp_path / "out")
    line = refusal("compare", folders / "gan", f"{folders / 'gan'}/", *arguments)
    assert line.endswith(": give each pipeline only once")


@pytest.mark.parametrize("text", ["10,", "ten", "0,5", ""])
def test_steps_that_are_no_numbers_are_refused(text):
    with pytest.raises(UserError, match=f"--steps {text}"):
        parse_steps(text)
    assert parse_steps("10,25") == [10, 25] == parse_steps("10,25,10")


def test_every_column_has_the_numbers_of_its_row_and_the_floor_those_of_real_images(
    hfgen, folders, tmp_path, monkeypatch
):
    """The GAN copies, of twelve images, five darkened and three mirrored ones; the VAE nothing."""
    real = paintings(range(14))
    darker = [image.point(lambda value: value * 0.7) for image in real[:5]]
    drawn = [*darker, *(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in real[6:9])]
    drawn += [Image.fromarray(np.full((16, 16, 3), (255 - 20 * index, 20 * index, 0), np.uint8)) for index in range(4)]
    watch_drawing(monkeypatch, lambda pipeline, index: drawn[index] if hasattr(pipeline, "generator") else None)
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    both = (folders / "gan", folders / "vae")
    arguments = ("--reference", "toy_paintings:14", "--num_images", "12", "--device", "cpu", "--seed", "2")
    assert hfgen("compare", *both, *arguments, "--output", tmp_path / "out")[0] == 0
    reports = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    *rows, floor = table_of((tmp_path / "out" / "comparison.md").read_text())
    by_fid = sorted(reports, key=lambda report: report["scores"]["fid"])
    assert [row["pipeline"] for row in rows] == [report["name"] for report in by_fid]
    marked = {key: min(report["scores"][key.lower()] for report in reports) for key in ("FID", "KID")}
    marked |= {key: max(report["scores"][key] for report in reports) or None for key in SHARES}
    for row, report in zip(rows, by_fid, strict=True):
        for key, best in marked.items():
            assert row[key].startswith("**") == row[key].endswith("**") == (report["scores"][key.lower()] == best)
            row[key] = row[key].strip("*")
    rows.sort(key=lambda row: [str(folder) for folder in both].index(row["pipeline"]))
    for row, report in zip(rows, reports, strict=True):
        scores = report["scores"]
        assert row["FID"] == f"{scores['fid']:.4g} ± {scores['fid_standard_error']:.2g}"
        assert row["KID"] == f"{scores['kid']:.4g} ± {scores['kid_standard_error']:.2g}"
        assert [row[name] for name in SHARES] == [f"{scores[name]:.2f}" for name in SHARES]
        assert row["copies"] == str(report["memorisation"]["num_copies"])
        assert row["copies by pixels"] == str(report["memorisation_by_pixels"]["num_copies"])
        assert row["parameters"] == f"{report['num_parameters'] / 1e6:.1f}M" and row["steps"] == "1"
        assert row["images/s"] == f"{report['drawing_images_per_second']:.4g}"
        assert float(row["images/s"]) > 0 and report["seed"] == 2
    decoded = f"{both[1]} {reports[1]['reconstructions']['fid']:.4g}."
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text.endswith(f"\nFID of 12 real images after encoding and decoding: {decoded}\n")
    # In features a darker image has the same direction; by pixels a mirrored one is the same.
    assert [(row["copies"], row["copies by pixels"]) for row in rows] == [("5", "3"), ("0", "0")]
    split = reports[0]["floor"]["split"]
    assert floor["pipeline"] == "floor: 7 real images against 7 others"
    assert (floor["FID"], floor["KID"]) == (f"{split['fid']:.4g}", f"{split['kid']:.2g}")
    assert [floor[name] for name in SHARES] == [f"{split[name]:.2f}" for name in SHARES]
    assert {floor[name] for name in ("copies", "copies by pixels", "parameters", "steps", "images/s")} == {""}


def diverged(folder, broken):
    """A copy of a pipeline whose last weights are NaN."""
    shutil.copytree(folder, broken)
    (file,) = broken.glob("*/*.safetensors")
    weights = load_file(file)
    weights[list(weights)[-1]].fill_(torch.nan)
    save_file(weights, file)
    return broken


def test_a_pipeline_that_has_diverged_does_not_cost_the_others_their_scores(hfgen, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    broken = diverged(folders / "gan", tmp_path / "broken")
    arguments = ("--reference", "toy_paintings:14", "--num_images", "10", "--device", "cpu")
    pipelines = (folders / "gan", broken, folders / "vae")
    status, _, err = hfgen("compare", *pipelines, *arguments, "--output", tmp_path / "out")
    assert status == 2 and f"warning: {broken}: the generated images are not finite" in err
    told = f"error: could not be scored, for the reasons above: {broken}; the others are in {tmp_path / 'out'}"
    assert err.splitlines()[-1] == told
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["name"] for row in kept["rows"]] == [str(folders / "gan"), str(folders / "vae")]
    assert (tmp_path / "out" / "comparison.md").is_file() and (tmp_path / "out" / "sheet.png").is_file()


def test_a_pipeline_that_needs_too_much_memory_does_not_cost_the_others_theirs(hfgen, folders, tmp_path, monkeypatch):
    score = scoring.score_pipeline

    def score_but_the_first(pipeline, *given, **named):
        if isinstance(pipeline, GANPipeline):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return score(pipeline, *given, **named)

    monkeypatch.setattr(scoring, "score_pipeline", score_but_the_first)
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    arguments = ("--reference", "toy_paintings:14", "--num_images", "10", "--device", "cpu")
    status, _, err = hfgen("compare", folders / "gan", folders / "vae", *arguments, "--output", tmp_path / "out")
    assert status == 2 and f"warning: {folders / 'gan'}: out of memory" in err and "lower --batch_size" in err
    (row,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert row["name"] == str(folders / "vae")


def test_an_interruption_keeps_what_has_been_scored(hfgen, folders, tmp_path, monkeypatch):
    scores = [scoring.score_pipeline]

    def score_once(*given, **named):
        if not scores:
            raise KeyboardInterrupt
        return scores.pop()(*given, **named)

    monkeypatch.setattr(scoring, "score_pipeline", score_once)
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    arguments = ("--reference", "toy_paintings:14", "--num_images", "10", "--device", "cpu")
    status, _, err = hfgen("compare", folders / "gan", folders / "vae", *arguments, "--output", tmp_path / "out")
    assert status == 130 and "interrupted by Ctrl-C" in err
    (row,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert row["name"] == str(folders / "gan")


def test_the_features_can_be_chosen(hfgen, folders, tmp_path, monkeypatch):
    asked_for = []

    def build(features, mode, weights, device):
        asked_for.append((features, mode, weights))
        return Colours(f"{features} stand-in")

    monkeypatch.setattr(feature_spaces, "build_extractor", build)
    common = (folders / "gan", "--reference", "toy_paintings:14", "--num_images", "10", "--device", "cpu")
    chosen = ("--features", "clip", "--feature_weights", "some/folder")
    status, out, _ = hfgen("compare", *common, *chosen, "--output", tmp_path / "clip")
    assert status == 0 and "features: clip stand-in." in out
    assert list(table_of(out)[0])[:3] == ["pipeline", "Frechet distance (CLIP)", "kernel distance (CLIP)"]
    assert hfgen("compare", *common, "--mode", "legacy", "--output", tmp_path / "legacy")[0] == 0
    assert asked_for == [("clip", "clean", "some/folder"), ("inception", "legacy", None)]


def test_what_is_infinite_is_null_in_the_files(hfgen, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())
    monkeypatch.setattr("hfgen.evaluation.scores.memorisation_informed_fid", lambda *_: float("inf"))
    arguments = ("--reference", "toy_paintings:12", "--num_images", "10", "--device", "cpu")
    assert hfgen("compare", folders / "gan", *arguments, "--output", tmp_path / "compared")[0] == 0
    file = tmp_path / "floor.json"
    assert hfgen("data", "floor", "toy_paintings:12", "--device", "cpu", "--json", file)[0] == 0

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    (row,) = json.loads((tmp_path / "compared" / "comparison.json").read_text(), parse_constant=refuse)["rows"]
    assert row["scores"]["mifid"] is None
    assert json.loads(file.read_text(), parse_constant=refuse)["split"]["mifid"] is None
