"""`hfgen steps`, and the number of denoising steps that a pipeline is saved with."""

import json
import logging
import shutil

import diffusers
import pytest
import torch
from edm_pipelines import edm_pipeline
from stand_in_features import Colours

from hfgen.commands.steps import fewest_that_suffice, save_number_of_steps
from hfgen.errors import UserError
from hfgen.files import read_json
from hfgen.hub.method import describe_method
from hfgen.inference.opening import open_pipeline
from hfgen.inference.sampling import SamplingOptions, generate_images
from hfgen.integrity import find_damage, record_digests, recorded_names
from hfgen.methods.schedules import default_num_inference_steps, noise_schedule, sampling_scheduler
from hfgen.metrics import feature_spaces
from hfgen.models import DCGANGenerator, UNetBase
from hfgen.pipelines import DDPMPipeline, GANPipeline


@pytest.fixture
def folder(tmp_path):
    edm_pipeline().save_pretrained(tmp_path / "run" / "pipeline")
    return tmp_path / "run"


def pixels(pipeline, steps=None):
    return pipeline(2, generator=torch.Generator().manual_seed(3), num_inference_steps=steps, output_type="np").images


def test_a_pipeline_draws_in_as_many_steps_as_it_was_saved_with(tmp_path):
    made = edm_pipeline()
    made.register_to_config(num_inference_steps=3)
    made.save_pretrained(tmp_path / "three")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "three")
    assert (pixels(loaded) == pixels(made, 3)).all() and (pixels(loaded) != pixels(made, 4)).any()
    by_remote_code = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "three", trust_remote_code=True)
    assert (pixels(by_remote_code) == pixels(made, 3)).all()


@pytest.mark.slow
def test_a_pipeline_of_before_draws_in_50_steps_or_in_all_that_it_was_trained_with(folder):
    index_file = folder / "pipeline" / "model_index.json"
    index = json.loads(index_file.read_text())
    assert index.pop("num_inference_steps") == 50
    index_file.write_text(json.dumps(index))
    loaded = open_pipeline(str(folder))
    assert (pixels(loaded) == pixels(loaded, 50)).all()
    network = UNetBase(8, block_out_channels=(4, 8), time_embedding_dim=6).eval()
    short = DDPMPipeline(network, sampling_scheduler(noise_schedule("linear", 20), "ddim"))
    assert (pixels(short) == pixels(short, 20)).all()


@pytest.fixture
def library(tmp_path):
    """A pipeline of nothing but diffusers' own classes."""
    unet = diffusers.UNet2DModel(
        8, block_out_channels=(4, 8), norm_num_groups=2, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip
    scheduler = sampling_scheduler(noise_schedule("linear", 20), "ddim")
    DDPMPipeline(unet.eval(), scheduler, num_inference_steps=4).save_pretrained(tmp_path / "library")
    return tmp_path / "library"


@pytest.mark.parametrize(
    "place", ["run/pipeline", "run/best/pipeline", "run/checkpoints/step-2/pipeline", "published"]
)
def test_a_library_pipeline_takes_the_number_of_steps_of_its_run(library, tmp_path, place):
    assert default_num_inference_steps(open_pipeline(str(library), "cpu")) == 20  # all of its schedule: default 50
    shutil.copytree(library, tmp_path / place)
    config = tmp_path / ("published" if place == "published" else "run") / "training_config.json"
    config.write_text(json.dumps({"num_inference_steps": 4}))
    assert default_num_inference_steps(open_pipeline(str(tmp_path / place), "cpu")) == 4
    assert "num_inference_steps=4)" in f"{describe_method(tmp_path / place, read_json(config)).call})"
    config.write_text(json.dumps({"num_inference_steps": "many"}))
    assert default_num_inference_steps(open_pipeline(str(tmp_path / place), "cpu")) == 20
    # The settings of another run, further up, are not those of this pipeline.
    config.write_text(json.dumps({"num_inference_steps": 4}))
    shutil.copytree(library, tmp_path / "run" / "mine")
    assert default_num_inference_steps(open_pipeline(str(tmp_path / "run" / "mine"), "cpu")) == 20


def test_a_library_pipeline_keeps_no_number_of_steps_and_loads_without_a_warning(library, caplog):
    diffusers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            loaded = diffusers.DiffusionPipeline.from_pretrained(library)
    finally:
        diffusers.utils.logging.disable_propagation()
    assert type(loaded) is diffusers.DDPMPipeline
    assert [record for record in caplog.records if "expected" in record.getMessage()] == []
    assert default_num_inference_steps(open_pipeline(str(library))) == 20  # of 50, as many as there are


def test_code_of_before_beside_the_weights_learns_of_the_saved_number(folder):
    code = folder / "pipeline" / "pipeline_ddpm.py"
    current = code.read_text()
    code.write_text(current.replace(", num_inference_steps: int = 50", "").replace("self.register_to_config", "dict"))
    save_number_of_steps(folder / "pipeline", 3)
    assert code.read_text() == current
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder / "pipeline", trust_remote_code=True)
    assert (pixels(loaded) == pixels(edm_pipeline(), 3)).all()


@pytest.mark.parametrize("command", ["sample", "denoise"])
def test_commands_take_the_saved_number(hfgen, folder, tmp_path, command):
    pipeline = DDPMPipeline.from_pretrained(folder / "pipeline")
    pipeline.register_to_config(num_inference_steps=4)
    pipeline.save_pretrained(folder / "pipeline")
    outputs = []
    for name, asked in (
        ("own", ()),
        ("asked", ("--num_inference_steps", "4")),
        ("more", ("--num_inference_steps", "7")),
    ):
        target = tmp_path / name
        assert hfgen(command, folder, "--num_images", "1", "--device", "cpu", *asked, "--output", target)[0] == 0
        outputs.append((target / {"sample": "000000.png", "denoise": "denoising.png"}[command]).read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("of_a_run", "told"),
    [(True, "continue the run with --num_inference_steps 3"), (False, "it was moved or deleted .* to save was 3")],
)
def test_a_pipeline_that_is_gone_is_not_half_written_anew(folder, of_a_run, told):
    shutil.rmtree(folder / "pipeline")
    if of_a_run:
        (folder / "launches.jsonl").touch()
    with pytest.raises(UserError, match=f"pipeline is gone: .*{told}"):
        save_number_of_steps(folder / "pipeline", 3)
    assert not (folder / "pipeline").exists()


def test_the_fewest_steps_within_one_standard_error_of_the_lowest_are_chosen():
    rows = [(5, 60.0), (10, 41.9), (18, 40.0), (25, 39.9), (50, 44.0)]
    rows = [{"steps": steps, "scores": {"fid": fid, "fid_standard_error": 2.0}} for steps, fid in rows]
    assert fewest_that_suffice(rows) == 10
    rows[1]["scores"]["fid"] = 42.0
    assert fewest_that_suffice(rows) == 18
    rows[2]["scores"]["fid"] = rows[3]["scores"]["fid"] = float("nan")
    assert fewest_that_suffice(rows) == 10
    with pytest.raises(UserError, match="no number of steps has a finite FID"):
        fewest_that_suffice(rows[2:4])


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(feature_spaces, "build_extractor", lambda *_: Colours())


def test_steps_scores_each_number_and_saves_the_best_one_if_asked(hfgen, folder, tmp_path, colours):
    index_file = folder / "pipeline" / "model_index.json"
    arguments = ("steps", folder, "--reference", "toy_paintings:12", "--num_images", "10", "--device", "cpu")
    before = index_file.read_bytes()
    status, out, _ = hfgen(*arguments, "--steps", "6,2", "--output", tmp_path / "tried")
    assert status == 0 and index_file.read_bytes() == before
    report = json.loads((tmp_path / "tried" / "steps.json").read_text())
    assert [row["num_inference_steps"] for row in report["rows"]] == [2, 6]
    assert report["enough"] == fewest_that_suffice(report["rows"]) and f"steps needed: {report['enough']}, " in out
    assert (tmp_path / "tried" / "steps.md").read_text() in out and (tmp_path / "tried" / "sheet.png").is_file()

    assert hfgen(*arguments, "--steps", "6", "--save", "--output", tmp_path / "saved")[0] == 0
    assert json.loads(index_file.read_text()) == json.loads(before) | {"num_inference_steps": 6}
    assert open_pipeline(str(folder)).config.num_inference_steps == 6
    drawn = next(generate_images(open_pipeline(str(folder), "cpu"), SamplingOptions(1, 0, None, 1)))
    assert drawn == next(generate_images(open_pipeline(str(folder), "cpu"), SamplingOptions(1, 0, 6, 1)))


def test_steps_refuses_before_anything_is_drawn(hfgen, folder, library, tmp_path, colours):
    GANPipeline(DCGANGenerator(8, 4, base_channels=4).eval()).save_pretrained(tmp_path / "gan")
    arguments = ("--reference", "toy_paintings:12", "--output", tmp_path / "tried", "--device", "cpu")
    for where, options, said in (
        (tmp_path / "gan", (), "is not a diffusion pipeline"),
        (folder, ("--steps", "5,1001"), "takes at most 1000"),
        ("somebody/cats", ("--save",), "--save: somebody/cats is not a local folder"),
        (library, ("--save", "--steps", "2"), "which cannot store a number of steps"),
        (folder, ("--steps", "0"), "at least 1"),
        (folder, ("--save", "--sampler", "ddim"), "use only one of them"),
    ):
        status, _, errors = hfgen("steps", where, *options, *arguments)
        assert status == 2 and said in errors and not (tmp_path / "tried").exists()


def test_what_a_user_keeps_beside_the_weights_stays_the_user_s(folder):
    pipeline = folder / "pipeline"
    (pipeline / "notes.txt").write_text("mine")
    save_number_of_steps(pipeline, 3)
    assert not (pipeline / "digests.json").exists()  # there was none
    record_digests(pipeline, ["model_index.json", "pipeline_ddpm.py", "unet/config.json"])
    save_number_of_steps(pipeline, 4)
    assert find_damage(pipeline) is None
    assert recorded_names(pipeline) == ["model_index.json", "pipeline_ddpm.py", "unet/config.json", "digests.json"]
