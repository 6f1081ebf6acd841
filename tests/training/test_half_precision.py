"""Training in fp16 with scaled gradients, on a CPU: accelerate would only do so on a GPU."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from toy_runs import checkpoint, train

from hfgen.training import launcher
from hfgen.training.trouble import NonFiniteError


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
NORMS = {"ddpm", "vae"}
LEARNED = ("--feature_weight", "1", "--adversarial_weight", "0.1")


@pytest.fixture
def in_fp16(monkeypatch):
    """Let runs compute in fp16, with a scaler that begins at a given scale."""

    def choose(scale=2.0**16):
        def accelerator(mixed_precision, **options):
            AcceleratorState._reset_state()
            made = Accelerator(mixed_precision="no", **options)
            made.state._mixed_precision, made.native_amp = mixed_precision, True
            made.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            return made

        monkeypatch.setattr(launcher, "Accelerator", accelerator)
        monkeypatch.setattr(launcher, "choose_mixed_precision", lambda *_: "fp16")

    return choose


def logged(folder, *names):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[entry[name] for name in names] for entry in entries])


def state_of(folder, step):
    return torch.load(checkpoint(folder, step) / "state.pt", weights_only=True)


@pytest.mark.parametrize(
    ("kind", "names", "arguments"),
    [
        ("ddpm", ["loss", "grad_norm"], []),
        ("vae", ["loss", "grad_norm"], []),
        ("vae", ["loss", "grad_norm"], LEARNED),
        ("vae", ["loss", "grad_norm"], [*LEARNED, "--learned_term_start", "3"]),
        ("gan", ["loss_d", "loss_g"], []),
    ],
    ids=["ddpm", "vae", "vae and learned term", "vae, then learned term", "gan"],
)
def test_the_losses_and_gradients_are_those_of_fp32(tmp_path, in_fp16, kind, names, arguments):
    train(kind, tmp_path / "fp32", *arguments)
    in_fp16()
    train(kind, tmp_path / "fp16", *arguments, "--mixed_precision", "fp16")
    expected = logged(tmp_path / "fp32", *names)
    torch.testing.assert_close(logged(tmp_path / "fp16", *names), expected, rtol=0.1, atol=1e-3)
    assert not torch.equal(logged(tmp_path / "fp16", *names), expected)


@pytest.mark.parametrize("kind", ["ddpm", "vae", "gan"])
def test_updates_whose_gradients_overflow_are_skipped_until_the_scale_is_small(tmp_path, in_fp16, kind):
    in_fp16(scale=2.0**40)
    train(kind, tmp_path / "run", "--mixed_precision", "fp16", "--max_train_steps", "40", "--checkpoint_every", "1",
          "--checkpoints_total_limit", "50")  # fmt: skip
    name = {"ddpm": "unet", "vae": "vae", "gan": "generator"}[kind]
    first, second, last = (state_of(tmp_path / "run", step) for step in (1, 2, 40))
    weights = next(key for key in first[name] if key.endswith("weight"))
    assert first["grad_scaler"]["scale"] < 2.0**40 and torch.equal(first[name][weights], second[name][weights])
    assert last["grad_scaler"]["scale"] < first["grad_scaler"]["scale"]
    assert not torch.equal(last[name][weights], second[name][weights]) and last[name][weights].isfinite().all()
    if kind in NORMS:
        norms = logged(tmp_path / "run", "grad_norm")
        assert norms[0] == 0 and 0 < norms[-1] < 100


def test_a_scale_that_falls_without_end_stops_the_run(tmp_path, in_fp16):
    in_fp16(scale=0.5)
    with pytest.raises(NonFiniteError, match="gradients overflow in fp16.*--mixed_precision no"):
        train("ddpm", tmp_path / "run", "--mixed_precision", "fp16")


@pytest.mark.parametrize("kind", ["ddpm", "vae", "gan"])
def test_a_resumed_run_in_fp16_ends_bit_identical(tmp_path, in_fp16, kind):
    in_fp16(scale=2.0**18)
    options = ("--mixed_precision", "fp16")
    train(kind, tmp_path / "run", *options)
    expected = state_of(tmp_path / "run", 6)
    train(kind, tmp_path / "run", *options, "--resume", checkpoint(tmp_path / "run", 2))
    found = state_of(tmp_path / "run", 6)
    assert found["grad_scaler"] == expected["grad_scaler"]
    for name in ("unet", "vae", "generator", "discriminator"):
        for key, value in expected.get(name, {}).items():
            assert torch.equal(found[name][key], value), key
