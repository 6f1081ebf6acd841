"""Starting from trained weights: all networks of a run, or the one of a pipeline; other architectures are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import checkpoint, files_of, train

from hfgen.errors import UserError


NETWORKS = {"gan": ["generator", "discriminator"], "vae": ["vae"], "ddpm": ["unet"]}


def state(folder, step):
    return torch.load(checkpoint(folder, step) / "state.pt", weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", NETWORKS)
def test_a_run_starts_where_another_ended_with_a_new_optimizer(tmp_path, capsys, method):
    train(method, tmp_path / "cats", "--max_train_steps", "2")
    # So small a rate that the weights stay as they are: what is saved after a step is what it started with.
    still = ("--learning_rate", "1e-30", "--max_train_steps", "1", "--checkpoint_every", "1", "--ema_decay", "0.99999")
    train(method, tmp_path / "monets", *still, "--init_from", tmp_path / "cats")
    before, after = state(tmp_path / "cats", 2), state(tmp_path / "monets", 1)
    for name in NETWORKS[method]:
        learned = {key: value for key, value in before[name].items() if "running_" not in key and "num_b" not in key}
        assert all(torch.allclose(after[name][key], value, atol=1e-7) for key, value in learned.items())
    assert int(after["ema"]["n_averaged"]) == 1  # or the average would keep showing cats
    optimizer = next(name for name in after if name.startswith("optimizer"))
    assert {int(moments["step"]) for moments in after[optimizer]["state"].values()} == {1}
    said = f"initialised from {checkpoint(tmp_path / 'cats', 2)}: {', '.join(NETWORKS[method])} and EMA weights\n"
    assert said in capsys.readouterr().out


def test_a_checkpoint_and_a_pipeline_start_a_run_too_and_what_is_new_is_said(tmp_path, capsys):
    train("gan", tmp_path / "cats", "--max_train_steps", "4")
    train("gan", tmp_path / "a", "--max_train_steps", "1", "--init_from", checkpoint(tmp_path / "cats", 2))
    train("gan", tmp_path / "b", "--max_train_steps", "1", "--init_from", tmp_path / "cats" / "pipeline")
    out = capsys.readouterr().out
    assert f"initialised from {checkpoint(tmp_path / 'cats', 2)}: generator, discriminator and EMA weights\n" in out
    assert (
        "cats/pipeline: generator and EMA weights; the discriminator is new, because this pipeline comes without one\n"
        in out
    )


def test_the_discriminator_of_a_learned_term_goes_on_too(tmp_path, capsys):
    learned = ("--feature_weight", "1", "--discriminator_channels", "4", "--max_train_steps", "2")
    train("vae", tmp_path / "cats", *learned)
    still = ("--learning_rate_d", "1e-30", "--max_train_steps", "1", "--checkpoint_every", "1")
    train("vae", tmp_path / "monets", *learned, *still, "--init_from", tmp_path / "cats")
    before, after = (state(*one)["discriminator"] for one in ((tmp_path / "cats", 2), (tmp_path / "monets", 1)))
    weights = [key for key in before if "running_" not in key and "num_b" not in key]
    assert all(torch.allclose(before[key], after[key], atol=1e-7) for key in weights)
    train("vae", tmp_path / "plain", "--max_train_steps", "2")
    train("vae", tmp_path / "later", *learned, "--init_from", tmp_path / "plain")
    out = capsys.readouterr().out
    assert f"initialised from {checkpoint(tmp_path / 'cats', 2)}: vae, discriminator and EMA weights\n" in out
    assert "vae and EMA weights; the discriminator is new, because the run had none\n" in out


def test_a_resumed_run_goes_on_from_its_own_checkpoint(tmp_path):
    train("ddpm", tmp_path / "cats", "--max_train_steps", "2")
    start = ("--init_from", tmp_path / "cats")
    train("ddpm", tmp_path / "whole", *start, "--max_train_steps", "4")
    train("ddpm", tmp_path / "parts", *start, "--max_train_steps", "2")
    shutil.rmtree(tmp_path / "cats")  # not needed any more
    train("ddpm", tmp_path / "parts", *start, "--max_train_steps", "4", "--resume", "latest")
    ended = [
        load_file(tmp_path / name / "pipeline/unet/diffusion_pytorch_model.safetensors") for name in ("whole", "parts")
    ]
    assert equal(*ended)
    scratch = tmp_path / "scratch"
    train("ddpm", scratch, "--max_train_steps", "4")
    assert not equal(ended[0], load_file(scratch / "pipeline/unet/diffusion_pytorch_model.safetensors"))


def test_a_network_that_predicts_something_else_is_refused(tmp_path, capsys):
    train("ddpm", tmp_path / "cats", "--max_train_steps", "2")
    for source in (tmp_path / "cats", tmp_path / "cats" / "pipeline", checkpoint(tmp_path / "cats", 2)):
        for prediction in ("v_prediction", "sample"):
            told = f"with --prediction_type epsilon, and this run has --prediction_type {prediction};"
            with pytest.raises(UserError, match=f"cats.*: its network was trained {told}"):
                train("ddpm", tmp_path / "new", "--prediction_type", prediction, "--init_from", source)
        capsys.readouterr()
        train("ddpm", tmp_path / "new", "--max_train_steps", "1", "--beta_schedule", "cosine", "--init_from", source)
        noise = [f"--beta_schedule {kind} --num_train_timesteps 1000" for kind in ("linear", "cosine")]
        told = f"note: --init_from {source}: its network was trained with {noise[0]}, and this run has {noise[1]}:"
        assert told in capsys.readouterr().out
        shutil.rmtree(tmp_path / "new")


def test_a_network_of_the_other_formulation_is_refused(tmp_path):
    compact = ("--unet", "compact", "--max_train_steps", "2")
    train("ddpm", tmp_path / "discrete", *compact)
    train("ddpm", tmp_path / "edm", *compact, "--formulation", "edm")
    for source, settings, told in (
        ("discrete", (*compact, "--formulation", "edm"), "--prediction_type epsilon"),
        ("edm", compact, "--formulation edm"),
    ):
        with pytest.raises(UserError, match=f"its network was trained with {told}, and this run has "):
            train("ddpm", tmp_path / "new", *settings, "--init_from", tmp_path / source)
    train("ddpm", tmp_path / "new", *compact, "--formulation", "edm", "--init_from", tmp_path / "edm")


def test_a_network_of_the_same_levels_starts_at_another_size(tmp_path):
    compact = ("--unet", "compact", "--formulation", "edm", "--max_train_steps", "2")
    train("ddpm", tmp_path / "small", *compact, "--attention_size", "8")  # at the coarser of its levels, 16 and 8
    larger = (*compact, "--sample_size", "32", "--init_from", tmp_path / "small")
    train("ddpm", tmp_path / "large", *larger, "--attention_size", "16")
    config = json.loads((tmp_path / "large" / "pipeline" / "unet" / "config.json").read_text())
    assert (config["sample_size"], config["attention_size"]) == (32, 16)
    with pytest.raises(UserError, match=r"attention.*; if you change --sample_size, change --attention_size in prop"):
        train("ddpm", tmp_path / "other", *larger, "--attention_size", "8")


def test_what_does_not_fit_is_refused_by_name_and_leaves_the_folder_free(tmp_path):
    train("gan", tmp_path / "cats", "--max_train_steps", "2")
    before = files_of(tmp_path / "cats")
    for arguments, message in (
        (
            ("gan", "--generator_channels", "8"),
            r"cats: its generator has another architecture: \S+ is [\dx]+ there",
        ),
        (("gan", "--discriminator_channels", "8"), "cats: its discriminator has another architecture: "),
        (("gan", "--latent_dim", "9"), "its generator has another architecture: .*--preset RUN/training_config.json"),
        (("ddpm",), "cats: .*step-00000002 is of another method: it has no unet"),
    ):
        with pytest.raises(UserError, match=message):
            train(*arguments[:1], tmp_path / "new", *arguments[1:], "--init_from", tmp_path / "cats")
    with pytest.raises(UserError, match=r"nope: no such folder \(there are: \S+cats\)"):
        train("gan", tmp_path / "new", "--init_from", tmp_path / "nope")
    train("gan", tmp_path / "new", "--max_train_steps", "1")
    assert files_of(tmp_path / "cats") == before
    assert json.loads((tmp_path / "new" / "training_config.json").read_text())["init_from"] is None
