"""`training_scripts/train_gan.py`, end to end, at toy size."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from conftest import load_script
from run_files import assert_equal, metrics, state_of
from safetensors.torch import load_file

from hfgen.errors import UserError
from hfgen.hub.method import STATISTICS
from hfgen.losses.gan import GAN_LOSSES
from hfgen.pipelines import GANPipeline
from hfgen.training.checkpoints import load_progress
from hfgen.training.folder import read_launches
from hfgen.training.trouble import CollapseError


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training_scripts" / "train_gan.py"
PRESETS = sorted(path.stem for path in (ROOT / "training_scripts" / "presets" / "gan").glob("*.json"))
TINY = [
    *("--dataset", "toy_paintings:24", "--sample_size", "16", "--latent_dim", "6", "--batch_size", "4", "--cpu"),
    *("--generator_channels", "4", "--discriminator_channels", "4", "--num_sample_images", "4", "--report_to", "none"),
    *("--statistics_images", "32"),
    *("--max_train_steps", "6", "--checkpoint_every", "2", "--checkpoints_total_limit", "9", "--log_every", "1"),
    *("--watch_every", "2", "--mixed_precision", "no"),
]
# Between them: every network, normalisation, loss, penalty and augmentation, and several updates a step.
METHODS = {
    "dcgan": ["--augment", "none", "--label_smoothing", "0.1"],
    "lsgan": ["--preset", "lsgan", "--augment", "ada", "--mixed_precision", "bf16"],
    "sngan": ["--preset", "sngan", "--augment", "ada", "--n_critic", "2"],
    "sngan_resnet": ["--network", "resnet", "--loss", "hinge", "--augment", "diffaugment"],
    "wgan_gp": ["--preset", "wgan_gp", "--num_epochs", "99", "--n_critic", "3", "--mixed_precision", "bf16"],
    "r3gan": ["--loss", "relativistic", "--normalization", "none", "--r1_weight", "0.1", "--r2_weight", "0.2"],
    "sngan_conv": [
        "--network",
        "sngan",
        "--upsampling",
        "nearest",
        "--normalization",
        "spectral",
        "--loss",
        "hinge",
        "--spectral_scale",
        "1.5",
        "--augment",
        "none",
    ],  # fmt: skip
    "ralsgan": [
        "--loss",
        "relativistic_average_least_squares",
        "--discriminator_network",
        "sngan",
        "--augment",
        "none",
    ],
    "dcgan256": ["--preset", "dcgan256", "--mixed_precision", "bf16"],
}


@pytest.fixture(scope="module")
def train_gan():
    return load_script("train_gan")


def train(module, folder, *arguments):
    """Train; what is in `arguments` wins over TINY, and TINY over a preset."""
    module.main([*TINY, "--output_dir", str(folder), *arguments])
    return weights(folder)


def weights(folder):
    return load_file(folder / "pipeline" / "generator" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(train_gan, tmp_path, method):
    folder = tmp_path / "run"
    train(train_gan, folder, *METHODS[method], "--horizontal_flip")
    first = state_of(folder, 6)
    train(
        train_gan,
        folder,
        *METHODS[method],
        "--horizontal_flip",
        "--resume",
        str(folder / "checkpoints" / "step-00000002"),
    )
    assert first.keys() == {
        *("generator", "discriminator", "ema", "optimizer_g", "optimizer_d", "augmentation", "watch", "batches")
    }
    assert_equal(first, state_of(folder, 6))
    assert len(first["optimizer_d"]["state"]) > 3 and len(first["optimizer_g"]["state"]) > 3
    assert all(value.isfinite().all() for value in weights(folder).values())
    if "ada" in METHODS[method]:  # it counts the updates since it last adapted, which it does at every fourth
        assert first["augmentation"]["updates"] == {"lsgan": 6 % 4, "sngan": 12 % 4}[method]


def test_both_networks_learn_and_the_average_follows_the_generator(train_gan, tmp_path):
    train(train_gan, tmp_path / "run")
    before, after = state_of(tmp_path / "run", 2), state_of(tmp_path / "run", 4)
    for network in ("generator", "discriminator", "ema"):
        moved = [not torch.equal(before[network][key], after[network][key]) for key in before[network]]
        assert all(moved), network
    ema = {key.removeprefix("module."): value for key, value in after["ema"].items()}
    saved = load_file(
        tmp_path / "run/checkpoints/step-00000004/pipeline/generator/diffusion_pytorch_model.safetensors"
    )
    recomputed = {key for key, value in saved.items() if not torch.equal(value, ema[key])}
    assert recomputed == {key for key in saved if key.split(".")[-1] in STATISTICS}


def test_statistics_of_the_averaged_generator_are_averages_too_if_that_is_asked_for(train_gan, tmp_path):
    train(train_gan, tmp_path / "run", "--statistics_images", "0")
    ema = {key.removeprefix("module."): value for key, value in state_of(tmp_path / "run", 4)["ema"].items()}
    saved = load_file(
        tmp_path / "run/checkpoints/step-00000004/pipeline/generator/diffusion_pytorch_model.safetensors"
    )
    assert all(torch.equal(value, ema[key]) for key, value in saved.items())


def test_the_discriminator_is_updated_so_many_times_for_each_update_of_the_generator(train_gan, tmp_path):
    train(train_gan, tmp_path / "run", "--n_critic", "3", "--max_train_steps", "2")
    state = state_of(tmp_path / "run", 2)
    assert {float(moments["step"]) for moments in state["optimizer_d"]["state"].values()} == {6.0}
    assert {float(moments["step"]) for moments in state["optimizer_g"]["state"].values()} == {2.0}
    assert [batches["position"] for batches in state["batches"]] == [6]
    assert metrics(tmp_path / "run")[-1]["images"] == 2 * 3 * 4


class Watched:
    """Keeps what a network is called with."""

    def __init__(self, module, name, monkeypatch):
        self.inputs = []
        build = getattr(module, name)

        def build_watched(settings, sample_size):
            network = build(settings, sample_size)
            network.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0].detach().clone()))
            return network

        monkeypatch.setattr(module, name, build_watched)


def test_each_update_of_the_discriminator_sees_new_images(tmp_path, monkeypatch):
    train_gan = load_script("train_gan", "train_gan_with_watched_networks")
    generator = Watched(train_gan, "build_generator", monkeypatch)
    train(train_gan, tmp_path / "run", "--n_critic", "3", "--max_train_steps", "2", "--num_sample_images", "5")
    latents = torch.cat([given for given in generator.inputs if len(given) == 4])
    assert len(latents) == 2 * 3 * 4 == len(latents.unique(dim=0))


@pytest.mark.parametrize(("loss", "judged"), [("relativistic", [4, 4, 4, 4]), ("non_saturating", [4, 4, 4])])
def test_a_relativistic_generator_is_compared_by_the_updated_discriminator(tmp_path, monkeypatch, loss, judged):
    """It judges real and generated images for its own update, generated ones for that of the generator, and real ones
    again only where the loss compares the two sides.
    """
    train_gan = load_script("train_gan", "train_gan_with_watched_networks")
    discriminator = Watched(train_gan, "build_discriminator", monkeypatch)
    train(train_gan, tmp_path / "run", "--loss", loss, "--augment", "none", "--max_train_steps", "1")
    assert [len(given) for given in discriminator.inputs] == judged
    if loss == "relativistic":
        assert torch.equal(discriminator.inputs[0], discriminator.inputs[3])


def test_real_and_generated_images_are_augmented_by_numbers_of_their_own(tmp_path, monkeypatch):
    train_gan = load_script("train_gan", "train_gan_with_watched_augmentation")
    seeds = []

    def keep(augmentation, images, generator):
        seeds.append(generator.initial_seed())
        return images

    monkeypatch.setattr(train_gan.Augmentation, "apply", keep)
    train(train_gan, tmp_path / "run", "--n_critic", "2", "--max_train_steps", "2")
    assert len(seeds) == 2 * (2 * 2 + 1) == len(set(seeds))


def test_sheets_show_the_same_latents_throughout_the_run(train_gan, tmp_path):
    """With rates of next to nothing, the images change only with their latents."""
    still = ("--learning_rate", "1e-30", "--sample_every", "2", "--max_train_steps", "4")
    train(train_gan, tmp_path / "run", *still)
    first, second = (tmp_path / "run" / "samples" / f"step-0000000{step}.png" for step in (2, 4))
    assert first.read_bytes() == second.read_bytes()


def test_the_update_of_one_network_leaves_the_other_as_it_is(train_gan, tmp_path):
    """With a learning rate of next to nothing for one of them, the other learns and this one does not."""
    train(train_gan, tmp_path / "run", "--learning_rate_d", "1e-30")
    before, after = state_of(tmp_path / "run", 2), state_of(tmp_path / "run", 6)
    for name, value in before["discriminator"].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, after["discriminator"][name], rtol=0, atol=1e-25)
    moved = [not torch.equal(before["generator"][key], after["generator"][key]) for key in before["generator"]]
    assert all(moved)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dcgan", "lsgan", "sngan", "r3gan"])
def test_each_network_gets_better_while_the_other_stands_still(train_gan, tmp_path, method):
    still, steps = "1e-30", ["--max_train_steps", "60", "--checkpoint_every", "0", "--watch_every", "0"]
    rates = {"loss_g": ("1e-2", still), "loss_d": (still, "1e-2")}
    for loss, (rate_g, rate_d) in rates.items():
        arguments = ["--learning_rate", rate_g, "--learning_rate_d", rate_d, *METHODS[method], *steps]
        train(train_gan, tmp_path / loss, *arguments, "--augment", "none", "--n_critic", "1")
        values = [entry[loss] for entry in metrics(tmp_path / loss)]
        assert sum(values[-10:]) < sum(values[:10]) - 0.1, (loss, values[0], values[-1])


@pytest.mark.parametrize("penalty", ["gradient_penalty_weight", "r1_weight", "r2_weight"])
def test_each_penalty_is_logged_by_its_weight_and_moves_the_discriminator(train_gan, tmp_path, penalty):
    plain = ["--normalization", "none", "--augment", "none", "--max_train_steps", "2", "--loss", "hinge"]
    penalties, networks = [], []
    for weight in ("0", "1e5", "1e6"):  # large, because so small a network is nearly flat
        folder = tmp_path / weight
        train(train_gan, folder, *plain, f"--{penalty}", weight)
        penalties.append(metrics(folder)[0]["penalty"])
        networks.append(state_of(folder, 2)["discriminator"])
    assert penalties[0] == 0 < penalties[1] and penalties[2] == pytest.approx(10 * penalties[1])
    assert not torch.equal(networks[0]["conv_in.weight"], networks[1]["conv_in.weight"])
    assert not torch.equal(networks[1]["conv_in.weight"], networks[2]["conv_in.weight"])


def test_the_two_learning_rates_and_the_betas_reach_their_optimizers(train_gan, tmp_path):
    train(train_gan, tmp_path / "run", "--learning_rate", "3e-4", "--learning_rate_d", "7e-4", "--adam_beta1", "0.25")
    state = state_of(tmp_path / "run", 6)
    groups = [state[name]["param_groups"][0] for name in ("optimizer_g", "optimizer_d")]
    assert [group["lr"] for group in groups] == [3e-4, 7e-4]
    assert all(tuple(group["betas"]) == (0.25, 0.999) for group in groups)


def test_another_folder_continues_with_the_rates_betas_and_augmentation_given_now(train_gan, tmp_path, capsys):
    train(train_gan, tmp_path / "old", "--augment", "ada")
    checkpoint = str(tmp_path / "old" / "checkpoints" / "step-00000006")
    record = str(tmp_path / "old" / "training_config.json")
    changed = ("--learning_rate", "3e-4", "--adam_beta1", "0.25", "--augment", "diffaugment", "--max_train_steps", "8")
    train(train_gan, tmp_path / "new", "--preset", record, "--resume", checkpoint, *changed)
    state = state_of(tmp_path / "new", 8)
    groups = [state[name]["param_groups"][0] for name in ("optimizer_g", "optimizer_d")]
    assert [(group["lr"], *group["betas"]) for group in groups] == [(3e-4, 0.25, 0.999)] * 2
    assert state["augmentation"]["kind"] == "diffaugment" and state["augmentation"]["probability"] == 1
    assert "learning_rate: 0.0002 -> 0.0003" in capsys.readouterr().out
    train(train_gan, tmp_path / "anew", "--preset", str(tmp_path / "new" / "training_config.json"))
    assert metrics(tmp_path / "anew")[0]["step"] == 1  # a preset resumes nothing


def test_the_log_has_both_losses_the_logits_and_the_signals_of_the_watch(train_gan, tmp_path):
    train(train_gan, tmp_path / "run", "--augment", "ada")
    entries = metrics(tmp_path / "run")
    assert {"loss_d", "loss_g", "d_real", "d_fake", "penalty", "augment_probability"} <= entries[0].keys()
    assert "diversity" not in entries[0]
    assert {"diversity", "coverage", "d_right", "overfitting"} <= entries[1].keys()
    assert 0 < entries[1]["diversity"] < 1 and 0 <= entries[1]["d_right"] <= 1


def test_the_saved_pipeline_draws_and_sheets_are_kept(train_gan, tmp_path):
    train(train_gan, tmp_path / "run", "--sample_every", "3")
    pipeline = GANPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert [image.size for image in pipeline(2).images] == [(16, 16)] * 2
    assert [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())] == [
        "step-00000000.png",
        "step-00000003.png",
        "step-00000006.png",
    ]


def test_building_the_watch_takes_no_image_away_from_training(train_gan, tmp_path):
    train(train_gan, tmp_path / "run", "--max_train_steps", "1", "--checkpoint_every", "1")
    assert [batches["position"] for batches in state_of(tmp_path / "run", 1)["batches"]] == [1]


@pytest.mark.parametrize(
    ("few_images", "chosen"), [(25, "diffaugment (24 images, fewer than 25"), (24, "ada (24 images")]
)
def test_the_augmentation_is_chosen_by_the_number_of_images_and_said(
    train_gan, tmp_path, monkeypatch, capsys, few_images, chosen
):
    monkeypatch.setattr("hfgen.methods.augmentation.FEW_IMAGES", few_images)  # paintings take time
    train(train_gan, tmp_path / "run", "--max_train_steps", "1")
    assert f"augmentation: {chosen}" in capsys.readouterr().out


def test_a_run_continued_in_another_folder_notes_the_augmentation_that_it_keeps(train_gan, tmp_path, monkeypatch):
    train(train_gan, tmp_path / "old", "--max_train_steps", "1", "--checkpoint_every", "1")
    monkeypatch.setattr("hfgen.methods.augmentation.FEW_IMAGES", 20)  # a new run of 24 images would have ADA
    arguments = ("--resume", str(tmp_path / "old" / "checkpoints" / "step-00000001"), "--max_train_steps", "2")
    train(train_gan, tmp_path / "new", *arguments, "--checkpoint_every", "1")
    (launch,) = read_launches(tmp_path / "new")
    assert launch["choices"] == {"augment": "diffaugment (as at the start of this training)"}
    train(train_gan, tmp_path / "new", "--resume", "latest", "--max_train_steps", "3")
    assert ["choices" in one for one in read_launches(tmp_path / "new")] == [True, False]


# ---------------------------------------------------------------------------------------------------------- the watch


@pytest.mark.slow
def test_a_collapsing_run_is_rolled_back_and_given_up_with_a_clear_message(tmp_path, monkeypatch):
    """A learning rate of 2 after the generator has taken off: its tanh saturates and all images become one."""
    train_gan = load_script("train_gan", "train_gan_to_collapse")
    # So that the first checkpoint already counts as good.
    monkeypatch.setattr("hfgen.methods.collapse.GOOD_DIVERSITY", 0.0)
    monkeypatch.setattr("hfgen.methods.collapse.GOOD_COVERAGE", 0.0)
    wild = ["--learning_rate", "2", "--learning_rate_d", "1e-5", "--max_train_steps", "20", "--ema_decay", "0"]
    with pytest.raises(CollapseError) as stopped:
        train(train_gan, tmp_path / "run", *wild)
    told = str(stopped.value)
    assert "after 3 rollbacks: the generator has collapsed: its images have" in told
    assert "learning_rate=2.0" in told and "Last good checkpoint: " in told
    assert told.endswith("or try another preset; on few images try --augment diffaugment")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "warning"] == ["rollback"] * 3 + ["collapsed"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "collapsed"
    # Who wants to see more of it may: what follows a collapse is no setting that a resumed run must keep.
    train(train_gan, tmp_path / "run", *wild, "--on_collapse", "warn", "--resume", "latest")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize(("count", "size", "batches"), [(1024, 64, 16), (257, 64, 5), (257, 128, 17), (3, 256, 1)])
def test_the_latents_for_the_statistics_are_in_batches_of_similar_size(train_gan, count, size, batches):
    run = SimpleNamespace(settings=SimpleNamespace(seed=0), device=torch.device("cpu"))
    settings = train_gan.GANSettings(statistics_images=count, latent_dim=2)
    sizes = [len(batch) for batch in train_gan.statistics_latents(settings, run, size)]
    assert sum(sizes) == count and len(sizes) == batches and max(sizes) - min(sizes) <= 1


def test_a_healthy_run_is_left_alone(train_gan, tmp_path, capsys):
    arguments = ["--dataset", "toy_paintings:64", "--preset", "dcgan", "--sample_size", "16", "--batch_size", "16"]
    arguments += ["--generator_channels", "16", "--discriminator_channels", "16", "--max_train_steps", "480"]
    arguments += [
        "--watch_every",
        "40",
        "--checkpoint_every",
        "160",
        "--learning_rate",
        "1e-3",
        "--augment",
        "diffaugment",
        "--latent_dim",
        "32",
    ]
    train(train_gan, tmp_path / "run", *arguments)
    assert not (tmp_path / "run" / "events.jsonl").exists()
    looks = [(entry["diversity"], entry["coverage"]) for entry in metrics(tmp_path / "run") if "diversity" in entry]
    assert len(looks) == 12 and min(looks[-1]) > 0.7
    assert load_progress(tmp_path / "run" / "checkpoints" / "step-00000480")["good"]


def test_without_a_watch_nothing_is_looked_at(train_gan, tmp_path):
    train(train_gan, tmp_path / "run", "--watch_every", "0")
    assert not any("diversity" in entry for entry in metrics(tmp_path / "run"))
    assert load_progress(tmp_path / "run" / "checkpoints" / "step-00000006")["good"]


# -------------------------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sample_size", "24"], "sample_size=24 must be a power of two"),
        (["--network", "dcgan256", "--sample_size", "24"], "sample_size=24 must be a multiple of 16"),
        (["--loss", "wasserstein", "--normalization", "none"], "--loss wasserstein needs --gradient_penalty_weight"),
        (["--gradient_penalty_weight", "10"], "a discriminator without BatchNorm"),
        (["--network", "dcgan256", "--r1_weight", "1"], "a discriminator without BatchNorm"),
        (["--loss", "hinge", "--label_smoothing", "0.1"], "the hinge loss has no labels"),
        (["--label_smoothing", "0.5"], "--label_smoothing 0.5"),
        (["--preset", "wgan_gp", "--augment", "ada"], "--augment ada needs a loss"),
        (["--learning_rate_d", "0"], "--learning_rate_d 0.0: must be positive"),
        (["--n_critic", "0"], "--n_critic 0: must be positive"),
        (["--network", "resnet", "--normalization", "spectral"], "--normalization spectral: only a dcgan or sngan"),
        (["--network", "dcgan256", "--normalization", "none"], "with dcgan256, whose normalization is fixed, give"),
        (["--network", "resnet", "--spectral_scale", "2"], "with any other use --spectral_scale 1"),
        (["--preset", "sngan", "--network", "resnet"], "with --network resnet add --upsampling transposed"),
        (["--spectral_scale", "0"], "--spectral_scale 0.0: must be positive"),
        (["--upsampling", "nearest"], "--upsampling nearest: only --network sngan has it"),
        (["--statistics_images", "-1"], "--statistics_images -1: must not be negative"),
        (["--batch_size", "1"], "--batch_size 1: BatchNorm"),
        (["--adam_beta1", "1"], "--adam_beta1"),
        (["--max_rollbacks", "-1"], "--max_rollbacks -1"),
    ],
)
def test_bad_input_is_named(train_gan, tmp_path, arguments, told):
    with pytest.raises(UserError, match=told.replace("(", "\\(")):
        train(train_gan, tmp_path / "run", *arguments)


def test_every_loss_can_be_chosen(train_gan):
    assert get_args(train_gan.GANSettings.__dataclass_fields__["loss"].type) == tuple(GAN_LOSSES)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_builds_its_networks(train_gan, preset):
    _, data, method = train_gan.parse_settings(
        (train_gan.RunSettings, train_gan.DataSettings, train_gan.GANSettings),
        train_gan.PRESETS,
        ["--preset", preset],
    )
    with torch.device("meta"):
        generator, discriminator = train_gan.build_networks(method, data.sample_size)
    assert generator.config.sample_size == discriminator.config.sample_size == data.sample_size
    assert generator.config.latent_dim == method.latent_dim
    for network, names in ((generator, ("upsampling",)), (discriminator, ("normalization", "spectral_scale"))):
        for name in names:
            assert network.config.get(name, getattr(method, name)) == getattr(method, name), name
    if method.network != "dcgan256":  # whose normalization is fixed
        assert {"normalization", "spectral_scale"} <= discriminator.config.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "width", "latent_dim"), [(32, 32, 50), (64, 64, 100), (128, 128, 200), (256, 32, 100)]
)
@pytest.mark.parametrize("network", ["dcgan", "sngan", "resnet"])
def test_the_networks_are_built_from_32_to_256_pixels_and_with_the_widths_of_study_a(
    train_gan, network, size, width, latent_dim
):
    settings = train_gan.GANSettings(
        network=network, latent_dim=latent_dim, generator_channels=width, discriminator_channels=width
    )
    with torch.device("meta"):
        generator, discriminator = train_gan.build_networks(settings, size)
    assert (generator.config.base_channels, discriminator.config.base_channels) == (width, width)
    assert generator.config.latent_dim == latent_dim


# -------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("method", ["dcgan", "wgan_gp"])
def test_two_processes_hold_the_same_weights_and_resume_exactly(programs, tmp_path, method):
    folder = tmp_path / "run"
    arguments = [str(SCRIPT), *TINY, "--output_dir", str(folder), *METHODS[method], "--max_train_steps", "4"]
    assert [rank.returncode for rank in programs.run_ranks(2, *arguments)] == [0, 0]
    assert json.loads((folder / "launches.jsonl").read_text())["num_processes"] == 2
    first = state_of(folder, 4)
    assert len(first["batches"]) == 2
    assert metrics(folder)[-1]["images"] == 4 * 2 * 4 * (3 if method == "wgan_gp" else 1)
    resume = ["--resume", str(folder / "checkpoints" / "step-00000002")]
    assert [rank.returncode for rank in programs.run_ranks(2, *arguments, *resume)] == [0, 0]
    assert_equal(first, state_of(folder, 4))


def test_a_process_of_two_computes_the_gradient_of_the_whole_batch(programs, tmp_path):
    """Two processes with two images each take the same first step as one process with the four of them."""
    arguments = [str(SCRIPT), *TINY, *METHODS["r3gan"], "--max_train_steps", "1", "--checkpoint_every", "1"]
    arguments += ["--batch_size", "2"]
    ranks = programs.run_ranks(2, *arguments, "--output_dir", tmp_path / "two")
    assert [rank.returncode for rank in ranks] == [0, 0]
    state = state_of(tmp_path / "two", 1)
    # Adam's first mean gradient is a tenth (beta1 0.5: a half) of the averaged gradient: it is not that of one process
    # alone, which a single process with the same share of the batch would have got.
    assert programs.run(*arguments, "--output_dir", tmp_path / "one").returncode == 0
    alone = state_of(tmp_path / "one", 1)
    moments = [part["optimizer_d"]["state"][0]["exp_avg"] for part in (state, alone)]
    assert moments[0].abs().max() > 0 and not torch.allclose(*moments)
