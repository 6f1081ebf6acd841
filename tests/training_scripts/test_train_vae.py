"""`training_scripts/train_vae.py`, end to end, at toy size."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image
from run_files import assert_equal, metrics, state_of
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from hfgen.errors import UserError
from hfgen.inference.figures import image_sheet
from hfgen.losses.vae import RECONSTRUCTIONS
from hfgen.methods.recent_latents import RecentLatents
from hfgen.pipelines import VAEPipeline
from hfgen.randomness import keyed_seed
from hfgen.training.trouble import CollapseError


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training_scripts" / "train_vae.py"
PRESETS = sorted(path.stem for path in (ROOT / "training_scripts" / "presets" / "vae").glob("*.json"))
TINY = [
    *("--dataset", "toy_paintings:24", "--sample_size", "16", "--latent_dim", "6", "--batch_size", "4", "--cpu"),
    *("--block_out_channels", "4", "8", "--num_sample_images", "4", "--report_to", "none", "--lr_warmup_steps", "0"),
    *("--max_train_steps", "6", "--checkpoint_every", "2", "--checkpoints_total_limit", "9", "--log_every", "1"),
    *("--watch_every", "2", "--mixed_precision", "no", "--density_components", "0"),
]
METHODS = {
    "plain": [],
    "residual": [
        *("--layers_per_block", "1", "--refine_channels", "4", "--mixed_precision", "bf16", "--lr_warmup_steps", "4")
    ],
    "options": [
        *("--normalization", "group", "--reconstruction", "bce", "--kl_warmup_steps", "4", "--free_bits", "0.05"),
        *("--lr_scheduler", "cosine", "--horizontal_flip"),
    ],
}


@pytest.fixture(scope="module")
def train_vae():
    return load_script("train_vae")


def train(module, folder, *arguments):
    """Train; what is in `arguments` wins over TINY."""
    module.main([*TINY, "--output_dir", str(folder), *arguments])
    return weights(folder)


def weights(folder, pipeline="pipeline"):
    return load_file(folder / pipeline / "vae" / "diffusion_pytorch_model.safetensors")


def report(folder):
    return json.loads((folder / "latents.json").read_text())


def test_latents_are_drawn_from_the_posterior_and_not_its_mean(train_vae):
    settings = train_vae.VAESettings(latent_dim=6, block_out_channels=[4, 8], reconstruction="mse")
    vae = train_vae.build_vae(settings, 16).eval()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    run = SimpleNamespace(generator=lambda purpose: torch.Generator().manual_seed(5))
    _, (losses, *_) = train_vae.losses_of(vae, images, settings, 1.0, None, run, slice(0, 4))
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=run.generator("posterior"))
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        of_the_mean = vae.decode(posterior.mean).sample
    rmse = [(one - images).square().mean().sqrt().item() for one in (decoded, of_the_mean)]
    assert losses["rmse"].item() == pytest.approx(rmse[0], abs=2e-6)
    assert abs(rmse[0] - rmse[1]) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(train_vae, tmp_path, method):
    folder = tmp_path / "run"
    train(train_vae, folder, *METHODS[method])
    first = state_of(folder, 6)
    assert first.keys() == {"vae", "ema", "optimizer", "lr_scheduler", "watch", "accumulation", "recent", "batches"}
    latents = report(folder)
    train(train_vae, folder, *METHODS[method], "--resume", str(folder / "checkpoints" / "step-00000002"))
    assert_equal(first, state_of(folder, 6))
    assert_equal(latents, report(folder))
    assert [entry["step"] for entry in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_all_weights_learn_and_the_average_is_what_is_shipped(train_vae, tmp_path):
    shipped = train(train_vae, tmp_path / "run", "--layers_per_block", "1", "--ema_decay", "0.5")
    before, after = state_of(tmp_path / "run", 2), state_of(tmp_path / "run", 6)
    assert all(not torch.equal(before["vae"][key], after["vae"][key]) for key in before["vae"])
    averaged = {key.removeprefix("module."): value for key, value in after["ema"].items()}
    assert all(torch.equal(value, averaged[key]) for key, value in shipped.items())
    assert not torch.equal(shipped["from_latents.weight"], after["vae"]["from_latents.weight"])


def test_the_loss_falls_and_is_the_sum_of_its_parts(train_vae, tmp_path):
    arguments = ("--max_train_steps", "60", "--kl_warmup_steps", "10", "--kl_weight", "2", "--log_every", "1")
    train(train_vae, tmp_path / "run", *arguments, "--checkpoint_every", "0", "--learning_rate", "3e-3")
    log = metrics(tmp_path / "run")
    for entry in (log[0], log[4], log[59]):
        assert entry["kl_weight"] == pytest.approx(2 * min(1, entry["step"] / 10))
        total = entry["reconstruction_loss"] + entry["kl_weight"] * entry["kl_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    first, last = (sum(entry["rmse"] for entry in part) / 5 for part in (log[:5], log[-5:]))
    assert last < 0.8 * first  # of the pixels' error
    # 768 log(rmse), for 3 x 16 x 16 numbers, is what the calibrated loss says of it.
    gained = log[0]["reconstruction_loss"] - log[-1]["reconstruction_loss"]
    assert gained == pytest.approx(768 * (torch.tensor(log[0]["rmse"] / log[-1]["rmse"]).log()).item(), rel=1e-3)


def test_a_warm_up_that_the_run_is_too_short_for_is_pointed_out_once(train_vae, tmp_path, capsys):
    too_long = ("--lr_warmup_steps", "7", "--kl_warmup_steps", "9")
    train(train_vae, tmp_path / "run", *too_long)
    length = "is longer than the training of 6 updates"
    warnings = [
        f"warning: step 0: the warm-up of 7 updates (--lr_warmup_steps) {length}: the learning rate never rises",
        f"warning: step 0: the warm-up of 9 updates (--kl_warmup_steps) {length}: the KL weight never rises",
    ]
    said = capsys.readouterr().out
    assert all(said.count(warning) == 1 for warning in warnings), said
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert events.count("never rises to its full value") == 2
    train(train_vae, tmp_path / "run", *too_long, "--resume", "latest", "--max_train_steps", "8")
    assert "warm-up" not in capsys.readouterr().out
    train(train_vae, tmp_path / "rest", "--lr_warmup_steps", "9", "--lr_scheduler", "constant")
    train(train_vae, tmp_path / "just", "--lr_warmup_steps", "6", "--kl_warmup_steps", "6")
    assert "warm-up" not in capsys.readouterr().out


def test_free_bits_are_free(train_vae, tmp_path):
    """With more for free than the KL costs, it is not part of the loss, but logged as it is."""
    train(train_vae, tmp_path / "run", "--free_bits", "5", "--max_train_steps", "1")
    (entry,) = metrics(tmp_path / "run")
    assert entry["loss"] - entry["reconstruction_loss"] == pytest.approx(6 * 5, abs=0.01)
    assert 0 < entry["kl_loss"] < 5


def test_the_gradient_is_clipped_per_dimension_whatever_the_size(train_vae, tmp_path):
    """The norm that is logged is that of the nats per dimension: sizes that differ fourfold have similar norms."""
    for size in (16, 32):
        train(train_vae, tmp_path / str(size), "--sample_size", str(size), "--max_train_steps", "1")
    norms = [metrics(tmp_path / size)[0]["grad_norm"] for size in ("16", "32")]
    assert 0.4 < norms[0] / norms[1] < 2.5
    train(train_vae, tmp_path / "clipped", "--max_train_steps", "1", "--max_grad_norm", "0.001")
    first = state_of(tmp_path / "clipped", 1)["optimizer"]["state"]
    total = torch.stack([state["exp_avg"].norm() for state in first.values()]).norm() / (1 - 0.9)
    assert total.item() == pytest.approx(0.001, rel=0.01)


def test_the_log_has_what_the_watch_saw(train_vae, tmp_path):
    train(train_vae, tmp_path / "run")
    second = metrics(tmp_path / "run")[1]
    assert 0 <= second["active_units"] <= 6
    assert 0 <= second["kl_dimension_min"] <= second["kl_dimension_median"] <= second["kl_dimension_max"]
    # The mean of the two updates' KL lies between the dimensions' extremes.
    mean = sum(entry["kl_loss"] for entry in metrics(tmp_path / "run")[:2]) / 2 / 6
    assert second["kl_dimension_min"] <= mean <= second["kl_dimension_max"]
    train(train_vae, tmp_path / "blind", "--watch_every", "0")
    assert all("active_units" not in entry for entry in metrics(tmp_path / "blind"))


def test_sheets_of_samples_and_of_reconstructions_are_kept(train_vae, tmp_path):
    train(train_vae, tmp_path / "run", "--sample_every", "3")
    names = [f"step-0000000{step}.png" for step in (0, 3, 6)]
    for kind, size in (("samples", (2 * 18 - 2, 2 * 18 - 2)), ("reconstructions", (4 * 18 - 2, 2 * 18 - 2))):
        assert sorted(path.name for path in (tmp_path / "run" / kind).iterdir()) == names
        sheet = Image.open(tmp_path / "run" / kind / names[-1])
        assert sheet.size == size and len(sheet.convert("RGB").getcolors(10_000)) > 20
    # The originals above stay, the reconstructions below change.
    early, late = (Image.open(tmp_path / "run" / "reconstructions" / name) for name in names[1:])
    upper, lower = (0, 0, 70, 16), (0, 18, 70, 34)
    assert early.crop(upper).tobytes() == late.crop(upper).tobytes()
    assert early.crop(lower).tobytes() != late.crop(lower).tobytes()


@pytest.mark.parametrize("components", [0, 2])
def test_samples_are_of_recent_latents_or_of_the_prior_where_no_density_is_wanted(train_vae, tmp_path, components):
    arguments = [
        "--max_train_steps",
        "60",
        "--checkpoint_every",
        "60",
        "--sample_every",
        "60",
        "--learning_rate",
        "0.01",
    ]
    train(train_vae, tmp_path / "run", *arguments, "--density_components", str(components))
    recent = RecentLatents(6, torch.device("cpu"))
    recent.load_state_dict(state_of(tmp_path / "run", 60)["recent"])
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(keyed_seed(0, "samples")))
    pipeline = VAEPipeline.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000060" / "pipeline")
    drawn = [image_sheet(pipeline(latents=latents).images) for latents in (noise, recent.to_latents(noise))]
    from_prior, from_recent = (np.asarray(sheet).astype(int) for sheet in drawn)
    shown = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-00000060.png")).astype(int)
    expected, other = (from_recent, from_prior) if components else (from_prior, from_recent)
    assert np.abs(shown - expected).max() <= 1 < np.abs(shown - other).max()


def test_the_images_that_are_shown_are_not_taken_away_from_training(train_vae, tmp_path):
    train(train_vae, tmp_path / "run", "--max_train_steps", "6")
    assert [batches["position"] for batches in state_of(tmp_path / "run", 6)["batches"]] == [6]


def test_the_density_is_fitted_to_the_training_set_and_saved(train_vae, tmp_path, capsys):
    train(train_vae, tmp_path / "run", "--density_components", "2", "--max_train_steps", "30", "--batch_size", "5")
    latents = report(tmp_path / "run")
    assert latents["num_images"] == 24 and len(latents["kl_dimensions"]) == 6
    assert f"{latents['active_units']} of 6 latent units are active" in capsys.readouterr().out
    (sheet,) = (tmp_path / "run" / "ex_post").iterdir()
    assert sheet.name == "step-00000030.png" and Image.open(sheet).size == (2 * 18 - 2, 2 * 18 - 2)
    assert sheet.read_bytes() != (tmp_path / "run" / "samples" / sheet.name).read_bytes()
    pipeline = VAEPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.density.config.num_components == latents["density"]["num_components"] <= 2
    assert latents["density"]["held_out_nats"] > latents["density"]["prior_nats"] - 1
    # It has the mean of the latents of the training images, not that of the prior.
    with torch.no_grad():
        drawn = pipeline.draw_latents(20_000, torch.Generator().manual_seed(0))
        from hfgen.data.settings import DataSettings
        from hfgen.data.store import load_images

        store = load_images(DataSettings("toy_paintings:24", sample_size=16))
        images = torch.stack([torch.tensor(store[index]).permute(2, 0, 1) / 255 for index in range(24)])
        encoded = pipeline.encode(images)
    assert torch.allclose(drawn.mean(dim=0), encoded.mean(dim=0), atol=0.05)
    # Checkpoints are made on the way, before the encoder is final: they have the Gaussian of recent latents.
    checkpoint = VAEPipeline.from_pretrained(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "pipeline")
    assert checkpoint.density.config.num_components == 1
    assert has_density_of_recent_latents(checkpoint, tmp_path / "run", 30)
    # A finished run can be given another density, or none.
    train(train_vae, tmp_path / "run", "--max_train_steps", "30", "--batch_size", "5", "--resume", "latest")
    assert VAEPipeline.from_pretrained(tmp_path / "run" / "pipeline").density is None


def has_density_of_recent_latents(pipeline, run, step):
    recent = RecentLatents(6, torch.device("cpu"))
    recent.load_state_dict(state_of(run, step)["recent"])
    assert pipeline.density is not None
    expected = recent.density().state_dict()
    return all(torch.equal(expected[name], value) for name, value in pipeline.density.state_dict().items())


def test_no_density_is_saved_where_none_is_wanted(train_vae, tmp_path):
    train(train_vae, tmp_path / "run", "--checkpoint_every", "3")  # with --density_components 0
    for folder in ("checkpoints/step-00000003/pipeline", "checkpoints/step-00000006/pipeline", "pipeline"):
        assert VAEPipeline.from_pretrained(tmp_path / "run" / folder).density is None


@pytest.mark.parametrize(("step", "complete"), [(6, True), (4, False)])
def test_a_run_that_is_stopped_in_its_last_step_has_its_density_all_the_same(
    train_vae, tmp_path, monkeypatch, step, complete
):
    def average_and_stop(averaged, network):
        updates.append(network)
        if len(updates) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        AveragedModel.update_parameters(averaged, network)

    updates: list = []
    averaged_copy = train_vae.averaged_copy

    def watched(network, decay):
        average = averaged_copy(network, decay)
        average.update_parameters = lambda other: average_and_stop(average, other)
        return average

    monkeypatch.setattr(train_vae, "averaged_copy", watched)
    arguments = [*TINY, "--output_dir", str(tmp_path / "run"), "--density_components", "2"]
    if complete:
        train_vae.main(arguments)
    else:
        with pytest.raises(SystemExit, match="143"):
            train_vae.main(arguments)
    assert (tmp_path / "run" / "latents.json").is_file() == complete
    pipeline = VAEPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    # The Gaussian of recent latents in place of the fitted density, rather than none: the prior gives grey images.
    assert has_density_of_recent_latents(pipeline, tmp_path / "run", step) != complete
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == ("complete" if complete else "stopped")


@pytest.mark.slow
def test_a_collapsed_posterior_ends_the_run_with_reason_and_remedy(train_vae, tmp_path):
    arguments = ["--kl_weight", "1e5", "--watch_every", "5", "--max_train_steps", "200", "--batch_size", "8"]
    with pytest.raises(CollapseError) as caught:
        train(train_vae, tmp_path / "run", *arguments, "--on_collapse", "stop", "--learning_rate", "1e-2")
    told = str(caught.value)
    assert "the posterior has collapsed: none of the 6 latent units is active" in told and "--kl_weight" in told
    assert "--augment" not in told  # which only GANs have
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "collapsed" and status["step"] < 200
    # Whoever wants that goes on, with a warning.
    arguments[5] = str(status["step"] + 5)
    train(train_vae, tmp_path / "on", *arguments, "--on_collapse", "warn", "--learning_rate", "1e-2")
    assert metrics(tmp_path / "on")[-1]["step"] == status["step"] + 5
    events = (tmp_path / "on" / "events.jsonl").read_text()
    assert "the posterior has collapsed" in events


def test_a_healthy_run_is_left_alone(train_vae, tmp_path):
    arguments = ("--max_train_steps", "40", "--watch_every", "4", "--batch_size", "12", "--learning_rate", "3e-3")
    train(train_vae, tmp_path / "run", *arguments, "--checkpoint_every", "40")
    assert metrics(tmp_path / "run")[-1]["active_units"] >= 1
    progress = json.loads((tmp_path / "run" / "checkpoints" / "step-00000040" / "progress.json").read_text())
    assert progress["good"] is True and progress["rollbacks"] == 0


@pytest.mark.parametrize("rate", ["1e-2", "1e-1"])
def test_a_learning_rate_far_too_high_stays_finite_or_says_what_happened(train_vae, tmp_path, rate):
    """Study A's VAE broke above 2e-4."""
    train(train_vae, tmp_path / "run", "--learning_rate", rate, "--max_train_steps", "40", "--on_collapse", "warn")
    assert all(entry["loss"] < 3000 for entry in metrics(tmp_path / "run"))  # 768 numbers of at most 4 nats each


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--latent_dim", "0"], "--latent_dim 0: must be positive"),
        (["--kl_weight", "-1"], "--kl_weight -1.0: must not be negative"),
        (["--free_bits", "-0.5"], "--free_bits -0.5: must not be negative"),
        (["--max_grad_norm", "0"], "--max_grad_norm 0.0: must be positive"),
        (["--density_components", "-1"], "--density_components -1: must not be negative"),
        (["--batch_size", "1"], "--normalization group"),
        (["--ema_decay", "1"], "--ema_decay 1.0: must be from 0 to below 1"),
        (["--sample_size", "18"], "sample_size=18 must be a multiple of 4"),
    ],
)
def test_bad_input_is_named(train_vae, tmp_path, arguments, told):
    with pytest.raises(UserError, match=told.replace(".", r"\.")):
        train(train_vae, tmp_path / "run", *arguments)


def test_every_likelihood_can_be_chosen(train_vae):
    from typing import get_args, get_type_hints

    choices = get_args(get_type_hints(train_vae.VAESettings)["reconstruction"])
    assert sorted(choices) == sorted(RECONSTRUCTIONS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_builds_its_network(train_vae, preset):
    _, data, method = train_vae.parse_settings(
        (train_vae.RunSettings, train_vae.DataSettings, train_vae.VAESettings), train_vae.PRESETS, ["--preset", preset]
    )
    with torch.device("meta"):
        network = train_vae.build_vae(method, data.sample_size)
    latent_dim, first_channels = {"vae": (100, 64), "vae_200": (200, 64), "vae_learned": (200, 32)}[preset]
    assert network.config.latent_dim == latent_dim and network.coarse_size == 4
    assert list(network.config.block_out_channels) == [first_channels * factor for factor in (1, 2, 4, 8)]


@pytest.mark.parametrize(("size", "coarse"), [(32, 4), (64, 4), (96, 6), (128, 4), (256, 4)])
def test_the_network_goes_down_to_a_few_pixels_whatever_the_size(train_vae, size, coarse):
    with torch.device("meta"):
        network = train_vae.build_vae(train_vae.VAESettings(), size)
    assert network.coarse_size == coarse and max(network.config.block_out_channels) == (256 if size == 32 else 512)


LEARNED = ("--feature_weight", "1", "--adversarial_weight", "0.5", "--discriminator_channels", "4")


def test_two_processes_hold_the_same_weights_and_resume_exactly(programs, tmp_path):
    """Without --cpu: where there is no accelerator the processes must find each other all the same."""
    folder = tmp_path / "run"
    cpu = [] if not torch.cuda.is_available() else ["--cpu"]
    tiny = [argument for argument in TINY if argument != "--cpu"]
    arguments = [str(SCRIPT), *tiny, *cpu, *LEARNED, "--learned_term_start", "3", "--output_dir", str(folder)]
    arguments += ["--density_components", "1"]
    assert [rank.returncode for rank in programs.run_ranks(2, *arguments)] == [0, 0]
    assert json.loads((folder / "launches.jsonl").read_text())["num_processes"] == 2
    first, latents = state_of(folder, 6), report(folder)
    assert len(first["batches"]) == 2 and latents["num_images"] == 24
    assert metrics(folder)[-1]["images"] == 6 * 2 * 4
    resume = ["--resume", str(folder / "checkpoints" / "step-00000002")]
    assert [rank.returncode for rank in programs.run_ranks(2, *arguments, *resume)] == [0, 0]
    assert_equal(first, state_of(folder, 6))
    assert_equal(latents, report(folder))


@pytest.mark.slow
def test_a_run_with_a_learned_term_resumes_bit_equal_and_its_discriminator_learns(train_vae, tmp_path, monkeypatch):
    monkeypatch.setattr("hfgen.methods.density.FLOW_STEPS", 50)
    folder = tmp_path / "run"
    train(train_vae, folder, *LEARNED, "--density_components", "2", "--density", "auto")
    before, first = state_of(folder, 2), state_of(folder, 6)
    assert first.keys() == {
        *("vae", "ema", "optimizer", "lr_scheduler", "watch", "accumulation", "recent", "batches"),
        *("discriminator", "optimizer_d"),
    }
    weights = [key for key in first["discriminator"] if key.endswith("weight")]
    assert all(not torch.equal(before["discriminator"][key], first["discriminator"][key]) for key in weights)
    assert {"loss_d", "loss_g", "feature_distance"} <= metrics(folder)[-1].keys()
    assert report(folder)["density"]["tried"].keys() == {"mixture", "flow"}
    train(train_vae, folder, *LEARNED, "--resume", str(folder / "checkpoints" / "step-00000002"))
    assert_equal(first, state_of(folder, 6))


DECODER_ONLY = (*LEARNED, "--refine_channels", "4", "--learned_term_start", "3", "--lr_scheduler", "linear")


def test_a_learned_term_goes_on_for_longer_as_if_it_had_been_planned(train_vae, tmp_path):
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    train(train_vae, straight, *DECODER_ONLY)
    train(train_vae, longer, *DECODER_ONLY, "--max_train_steps", "4")
    train(train_vae, longer, *DECODER_ONLY, "--resume", "latest")
    assert_equal(state_of(straight, 6), state_of(longer, 6))


def test_after_the_start_of_the_learned_term_only_the_decoder_is_trained(train_vae, tmp_path):
    folder = tmp_path / "run"
    train(train_vae, folder, *DECODER_ONLY, "--checkpoint_every", "1", "--ema_decay", "0.5")
    third, fourth, last = (state_of(folder, step) for step in (3, 4, 6))
    averaged = {key.removeprefix("module."): value for key, value in third["ema"].items()}
    for key in [key for key in third["vae"] if not key.endswith("num_batches_tracked")]:
        value = last["vae"][key]
        if key.startswith(("down_blocks", "to_posterior")):  # continued from the average, then fixed
            assert torch.equal(value, averaged[key]) and not torch.equal(value, third["vae"][key])
        else:
            assert not torch.equal(value, fourth["vae"][key])
    log = metrics(folder)
    assert ["loss_d" in entry for entry in log] == 3 * [False] + 3 * [True]
    # The schedule ends with the encoder's training; then the decoder has the discriminator's learning rate.
    assert [entry["learning_rate"] for entry in log] == pytest.approx([2e-3 / 3, 1e-3 / 3, 0, 2e-4, 2e-4, 2e-4])


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_run_resumes_bit_equal_around_the_start_of_the_learned_term(train_vae, tmp_path, step):
    folder = tmp_path / "run"
    train(train_vae, folder, *DECODER_ONLY, "--checkpoint_every", "1")
    first = state_of(folder, 6)
    train(train_vae, folder, *DECODER_ONLY, "--resume", str(folder / "checkpoints" / f"step-{step:08d}"))
    assert_equal(first, state_of(folder, 6))


def test_a_plain_vae_is_continued_with_a_learned_term_from_its_start_on(train_vae, tmp_path):
    train(train_vae, tmp_path / "plain")
    whole = train(train_vae, tmp_path / "whole", *LEARNED, "--learned_term_start", "4")
    checkpoints = tmp_path / "plain" / "checkpoints"
    arguments = (*LEARNED, "--learned_term_start", "4", "--resume", str(checkpoints / "step-00000004"))
    continued = train(train_vae, tmp_path / "continued", *arguments)
    assert all(torch.equal(whole[key], value) for key, value in continued.items())
    late = (*LEARNED, "--learned_term_start", "4", "--resume", str(checkpoints / "step-00000006"))
    with pytest.raises(UserError, match="step-00000006: it has no discriminator"):
        train(train_vae, tmp_path / "late", *late, "--max_train_steps", "8")


def test_a_run_that_stops_before_its_learned_term_says_that_it_is_a_plain_vae(train_vae, tmp_path, monkeypatch):
    for limit, warns in (("0.000001s", True), ("1h", False)):
        folder = tmp_path / limit
        train(train_vae, folder, *LEARNED, "--learned_term_start", "5", "--max_train_time", limit)
        events = folder / "events.jsonl"
        assert (events.is_file() and "begins after update 5: so far" in events.read_text()) == warns


def test_without_a_learned_term_nothing_of_it_is_built(train_vae, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "LearnedTerm", None)
    train(train_vae, tmp_path / "run")
    assert "loss_d" not in metrics(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--discriminator_channels", "8"], "--discriminator_channels: needs --feature_weight"),
        (["--learning_rate_d", "1e-3"], "--learning_rate_d: needs --feature_weight"),
        (["--learned_term_start", "3"], "--learned_term_start: needs --feature_weight"),
        (["--feature_weight", "1", "--learned_term_start", "6"], "--learned_term_start 6: the run ends after 6 "),
        (
            ["--batch_size", "1", "--normalization", "group", "--adversarial_weight", "1"],
            "--batch_size 1: --adversarial_weight mixes latents",
        ),
        (["--density", "flow"], "--density flow: needs .* --density_components 1 or more"),
        (
            ["--density", "auto", "--density_components", "2", "--latent_dim", "1"],
            "--density auto: needs --latent_dim 2",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(train_vae, tmp_path, arguments, told):
    with pytest.raises(UserError, match=told):
        train(train_vae, tmp_path / "run", *arguments)


def test_nearest_upsampling_is_passed_on(train_vae):
    settings = train_vae.VAESettings(upsampling="nearest", block_out_channels=[4, 8])
    assert train_vae.build_vae(settings, 16).config.upsampling == "nearest"


def test_sizes_that_the_discriminator_does_not_take_are_named(train_vae, tmp_path):
    with pytest.raises(UserError, match="--feature_weight, --adversarial_weight: .*power of two"):
        train(train_vae, tmp_path / "run", *LEARNED, "--sample_size", "24")
