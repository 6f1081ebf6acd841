"""Each setting of a method changes what is trained, saved or logged: none is parsed and forgotten."""

import dataclasses
import functools
import hashlib
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from run_files import metrics, state_of
from toy_runs import script, train


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


class Change(NamedTuple):
    """Another value of a setting, and what it must change.

    Attributes:
        value: on the command line.
        base: settings of both runs, under which it matters.
        changes: parts of a run, see `parts_of`; by default the network that generates images.
    """

    value: str
    base: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


NETWORK = {"gan": "generator", "vae": "vae", "ddpm": "unet"}
SNGAN = ("--network", "sngan", "--normalization", "spectral")
PLAIN = ("--normalization", "none", "--loss", "hinge")
LEARNED = ("--feature_weight", "1", "--adversarial_weight", "0.2", "--discriminator_channels", "4")
COMPACT = ("--unet", "compact")
OF_ADAMW = {
    "learning_rate": Change("1e-2"),
    "lr_scheduler": Change("linear", ("--lr_scheduler", "constant")),
    "lr_warmup_steps": Change("2", ("--lr_scheduler", "constant_with_warmup")),
    "adam_beta1": Change("0.2"),
    "adam_beta2": Change("0.7"),
    "weight_decay": Change("0.5"),
    "max_grad_norm": Change("1e-7"),
    "ema_decay": Change("0.01", changes=("ema", "pipeline")),
}
CHANGES = {
    "gan": {
        "network": Change("resnet", ("--augment", "none")),
        "discriminator_network": Change("resnet", changes=("discriminator",)),
        "normalization": Change("none", changes=("discriminator", "generator")),
        "spectral_scale": Change("2", SNGAN),
        "upsampling": Change("nearest", SNGAN),
        "latent_dim": Change("7"),
        "generator_channels": Change("5"),
        "discriminator_channels": Change("5", changes=("discriminator",)),
        "loss": Change("hinge"),
        "label_smoothing": Change("0.2", ("--augment", "ada"), changes=("discriminator",)),
        "gradient_penalty_weight": Change("1e5", PLAIN, changes=("discriminator",)),
        "r1_weight": Change("1e5", PLAIN, changes=("discriminator",)),
        "r2_weight": Change("1e5", PLAIN, changes=("discriminator",)),
        "n_critic": Change("2", changes=("discriminator", "generator")),
        "batch_size": Change("3"),
        "learning_rate": Change("1e-3", changes=("discriminator", "generator")),
        "learning_rate_d": Change("1e-3", changes=("discriminator",)),
        "adam_beta1": Change("0.2", changes=("discriminator", "generator")),
        "adam_beta2": Change("0.7", changes=("discriminator", "generator")),
        "ema_decay": Change("0.01", changes=("ema", "pipeline")),
        "statistics_images": Change("8", ("--statistics_images", "16"), changes=("pipeline",)),
        "augment": Change("diffaugment", ("--augment", "none"), changes=("discriminator", "generator")),
        "watch_every": Change("1", ("--watch_every", "0"), changes=("log",)),
    },
    "vae": {
        "latent_dim": Change("7"),
        "block_out_channels": Change("4 5"),
        "layers_per_block": Change("1"),
        "upsampling": Change("nearest"),
        "refine_channels": Change("4"),
        "normalization": Change("group"),
        "reconstruction": Change("l1"),
        "kl_weight": Change("50"),
        "feature_weight": Change("3", LEARNED),
        "adversarial_weight": Change("3", LEARNED),
        "discriminator_channels": Change("5", LEARNED, changes=("discriminator",)),
        "learning_rate_d": Change("1e-2", LEARNED, changes=("discriminator",)),
        "learned_term_start": Change("1", LEARNED),
        "kl_warmup_steps": Change("2", ("--kl_weight", "50")),
        "free_bits": Change("5", ("--kl_weight", "50")),
        "batch_size": Change("3"),
        **OF_ADAMW,
        "density_components": Change("1", changes=("pipeline",)),
        "density": Change("flow", changes=("pipeline",)),
        "watch_every": Change("1", ("--watch_every", "0"), changes=("log",)),
    },
    "ddpm": {
        "formulation": Change("edm", COMPACT),
        "unet": Change("compact", ("--block_out_channels", "8", "16")),
        "block_out_channels": Change("8 12"),
        "layers_per_block": Change("1", COMPACT),
        "patch_size": Change("2", COMPACT),
        "attention_size": Change("0", COMPACT),
        "dropout": Change("0.5", COMPACT),
        "noise_scale": Change("2", (*COMPACT, "--formulation", "edm")),
        "beta_schedule": Change("cosine", changes=("unet", "pipeline")),
        "num_train_timesteps": Change("100", changes=("unet", "pipeline")),
        "prediction_type": Change("sample", changes=("unet", "pipeline")),
        "loss": Change("l1"),
        "snr_gamma": Change("1"),
        "match_noise": Change("True"),
        "batch_size": Change("3"),
        # Of two parts, each has BatchNorm statistics of its own.
        "gradient_accumulation_steps": Change("2", changes=("unet", "accumulation")),
        **OF_ADAMW,
        "sampler": Change("ddim", changes=("pipeline",)),
        "num_inference_steps": Change("3", changes=("pipeline", "sheets")),
    },
}
# What follows a collapse, and how a network is compiled, is no matter of two healthy steps; they have their own tests.
ELSEWHERE = {"gan": {"on_collapse", "max_rollbacks"}, "vae": {"on_collapse", "max_rollbacks"}, "ddpm": {"compile"}}
TIMES = ("seconds", "images_per_second", "step_seconds")


def settings_class(kind):
    return {"gan": "GANSettings", "vae": "VAESettings", "ddpm": "DDPMSettings"}[kind]


def digest(value: Any) -> str:
    """A digest of tensors, numbers and texts, however they are nested."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest() + str(tuple(value.shape))
    if isinstance(value, dict):
        return str({key: digest(part) for key, part in value.items()})
    if isinstance(value, list | tuple):
        return str([digest(part) for part in value])
    return hashlib.sha256(pickle.dumps(value)).hexdigest()


@functools.cache
def parts_of(kind: str, arguments: tuple[str, ...]) -> dict[str, str]:
    """Train for two steps; return a digest of each part of the run: its state by name, pipeline, sheets and log."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        density = ("--density_components", "2" if "--density" in arguments else "0") if kind == "vae" else ()
        short = ("--max_train_steps", "2", "--dataset", "toy_paintings:12", "--sample_size", "8")
        train(kind, run, *short, *density, *arguments)
        found = {name: digest(part) for name, part in state_of(run, 2).items()}
        files = [path for path in sorted((run / "pipeline").rglob("*")) if path.suffix in (".json", ".safetensors")]
        with_times = ("digests.json",)
        found["pipeline"] = digest([path.read_bytes() for path in files if path.name not in with_times])
        found["sheets"] = digest([path.read_bytes() for path in sorted((run / "samples").iterdir())])
        entries = [{key: value for key, value in entry.items() if key not in TIMES} for entry in metrics(run)]
        found["log"] = digest([json.dumps(entry) for entry in entries])
        return found


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, changes in CHANGES.items() for name in changes])
def test_a_setting_changes_what_it_is_for(kind, name):
    value, base, changes = CHANGES[kind][name]
    before = parts_of(kind, base)
    after = parts_of(kind, (*base, f"--{name}", *value.split()))
    same = [part for part in changes or (NETWORK[kind],) if before[part] == after[part]]
    assert same == []


@pytest.mark.parametrize("kind", CHANGES)
def test_the_same_settings_train_the_same(kind):
    """Or all of the above would pass whatever the settings do."""
    again = parts_of(kind, ())
    parts_of.cache_clear()
    assert parts_of(kind, ()) == again


@pytest.mark.parametrize("kind", CHANGES)
def test_no_setting_is_left_out(kind):
    fields = {field.name for field in dataclasses.fields(getattr(script(kind), settings_class(kind)))}
    assert CHANGES[kind].keys() | ELSEWHERE[kind] == fields and not CHANGES[kind].keys() & ELSEWHERE[kind]
