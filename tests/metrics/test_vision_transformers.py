"""Features of DINOv2 and CLIP, of small networks with random weights, against what transformers computes itself."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from hfgen.errors import UserError
from hfgen.metrics.feature_spaces import build_extractor


pytest.importorskip("cleanfid")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
STATISTICS = {
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
SIDES = {"dinov2": 224, "clip": 32}


def network_of(kind, seed=0):
    """A network whose weights are large enough that what is in an image shows in its features."""
    if kind == "dinov2":
        network = Dinov2Model(Dinov2Config(**SMALL, image_size=28, patch_size=14, mlp_ratio=2))
    else:
        config = CLIPVisionConfig(**SMALL, intermediate_size=32, projection_dim=12, image_size=32, patch_size=8)
        network = CLIPVisionModelWithProjection(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3
            weight.normal_(0, scale, generator=generator)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
    return network.eval()


@pytest.fixture(params=["dinov2", "clip"])
def kind(request):
    return request.param


@pytest.fixture
def saved(kind, tmp_path):
    network_of(kind).save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def build(kind, folder):
    return build_extractor(kind, "clean", str(folder), torch.device("cpu"))


def pictures(count, height, width):
    """Smooth, colourful and unlike their mirror images, uint8."""
    coarse = np.random.default_rng(1).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in coarse]


@torch.no_grad()
def expected_features(kind, network, images):
    """Each image resized by Pillow, 8 bits a value, normalised and put through the network by its parts."""
    side = SIDES[kind]
    small = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in images]
    mean, std = STATISTICS[kind]
    pixels = torch.tensor((np.stack(small) / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    if kind == "dinov2":
        hidden_states = network.encoder(network.embeddings(pixels))[0]
        return network.layernorm(hidden_states)[:, 0].numpy()
    tokens = network.vision_model(pixel_values=pixels).last_hidden_state
    return network.visual_projection(network.vision_model.post_layernorm(tokens[:, 0])).numpy()


def test_features_are_the_class_token_of_the_normalised_image(kind, saved):
    """Images that need no resizing, more than a batch of them: equal up to rounding."""
    images = pictures(35, SIDES[kind], SIDES[kind])
    features = build(kind, saved)(iter(images), len(images))
    assert features.shape == (35, 16 if kind == "dinov2" else 12) and features.dtype == np.float32
    np.testing.assert_allclose(features, expected_features(kind, network_of(kind), images), atol=1e-4)
    assert features.std(axis=0).mean() > 0.05  # of images that differ


@pytest.mark.parametrize("size", [(300, 200), (17, 40), (500, 500)])
def test_images_are_resized_as_a_whole_with_antialiasing(kind, saved, size):
    """Values of 8 bits in between are off by up to half a level: little, compared with how the images differ."""
    images = pictures(6, *size)
    features, expected = build(kind, saved)(images), expected_features(kind, network_of(kind), images)
    assert np.abs(features - expected).max() < 0.02 * features.std(axis=0).mean()


def test_a_fine_pattern_is_averaged_and_not_sampled(kind, saved):
    """A board of black and white pixels is grey when it is shrunk to a third."""
    side = 3 * SIDES[kind]
    board = (255 * (np.indices((side, side)).sum(axis=0) % 2)).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    grey = np.full((side, side, 3), 127, np.uint8)
    black = np.zeros_like(grey)
    extractor = build(kind, saved)
    features = extractor([board, grey, black])
    assert np.abs(features[0] - features[1]).max() < 0.1 * np.abs(features[2] - features[1]).max()


def test_features_keep_their_length(saved, kind):
    lengths = np.linalg.norm(build(kind, saved)(pictures(4, 40, 40)), axis=1)
    assert lengths.std() > 1e-3 and abs(lengths.mean() - 1) > 0.1


def test_the_identity_names_kind_side_and_weights_and_not_the_place(kind, saved, tmp_path):
    first = build(kind, saved)
    assert first.identity.startswith(f"{kind} {SIDES[kind]} pixels ")
    shutil.copytree(saved, tmp_path / "elsewhere")
    assert build(kind, tmp_path / "elsewhere").identity == first.identity
    changed = network_of(kind)
    with torch.no_grad():
        list(changed.parameters())[-1].view(-1)[0] += 1e-3
    changed.save_pretrained(tmp_path / "changed")
    assert build(kind, tmp_path / "changed").identity != first.identity


def test_the_two_kinds_have_different_identities(tmp_path):
    for kind in SIDES:
        network_of(kind).save_pretrained(tmp_path / kind)
    assert build("dinov2", tmp_path / "dinov2").identity != build("clip", tmp_path / "clip").identity


def test_weights_of_half_precision_are_computed_with_in_full(kind, tmp_path):
    network_of(kind).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    rounded = network_of(kind).to(torch.bfloat16).float()
    images = pictures(3, SIDES[kind], SIDES[kind])
    np.testing.assert_allclose(
        build(kind, tmp_path / "half")(images), expected_features(kind, rounded, images), atol=1e-4
    )


def test_dropout_is_off(tmp_path):
    config = Dinov2Config(**SMALL, image_size=28, patch_size=14, hidden_dropout_prob=0.5)
    Dinov2Model(config).train().save_pretrained(tmp_path)
    extractor, images = build("dinov2", tmp_path), pictures(2, 30, 30)
    assert np.array_equal(extractor(images), extractor(images))


def test_a_pickle_is_not_opened(kind, tmp_path, monkeypatch):
    network = network_of(kind)
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(UserError, match=f"--feature_weights {tmp_path}: no .*with model.safetensors could be loaded"):
        build(kind, tmp_path)


def test_the_other_kind_of_network_is_refused(kind, saved):
    other = {"dinov2": "clip", "clip": "dinov2"}[kind]
    with pytest.raises(UserError, match=rf"--feature_weights {saved}: is not a \w+: 2\d weights are missing"):
        build(other, saved)


def test_a_single_missing_weight_is_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    network_of("dinov2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"--feature_weights {tmp_path}: is not a Dinov2Model: 1 weights are missing"):
        build("dinov2", tmp_path)


def test_a_dinov2_with_registers_is_not_taken_for_one_without(tmp_path):
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=28, patch_size=14)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=f"--feature_weights {tmp_path}: is not a Dinov2Model: .*register_tokens"):
        build("dinov2", tmp_path)


def test_the_image_half_of_a_whole_clip_is_taken(tmp_path):
    """What is on the Hub has the network for texts in the same file."""
    from safetensors.torch import load_file, save_file

    network_of("clip").save_pretrained(tmp_path / "images")
    shutil.copytree(tmp_path / "images", tmp_path / "whole")
    more = {"text_model.final_layer_norm.weight": torch.ones(4), "logit_scale": torch.tensor(1.0)}
    weights = load_file(tmp_path / "images" / "model.safetensors")
    save_file(weights | more, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    assert build("clip", tmp_path / "whole").identity == build("clip", tmp_path / "images").identity


def test_damaged_folders_are_refused(saved, kind, tmp_path):
    with pytest.raises(UserError, match=f"--feature_weights {tmp_path / 'gone'}: no "):
        build(kind, tmp_path / "gone")
    shutil.copytree(saved, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=f"--feature_weights {tmp_path / 'cut'}: no "):
        build(kind, tmp_path / "cut")
    settings = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(settings | {"hidden_size": 24}))
    with pytest.raises(UserError, match=f"--feature_weights {saved}: no "):
        build(kind, saved)
