"""From images to features, with networks that are written by hand."""

import numpy as np
import pytest
import torch

from hfgen import bars
from hfgen.metrics import feature_spaces
from hfgen.metrics.extraction import feature_batches
from hfgen.metrics.feature_spaces import build_extractor
from hfgen.metrics.inception import InceptionFeatures


CPU = torch.device("cpu")


def noise(count, height=5, width=7):
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def as_it_is(image):
    return image.astype(np.float32)


def corner_and_means(pixels):
    """The mean of each channel and the top row's one, `(batch, 6, 1, 1)`, float64."""
    return torch.cat([pixels.mean(dim=(2, 3)), pixels[:, :, 0].mean(dim=2)], dim=1)[:, :, None, None].double()


def extract_features(*arguments):
    return np.concatenate(list(feature_batches(*arguments)))


@pytest.mark.parametrize("count", [1, 32, 33, 70])
def test_each_image_has_its_features_in_order_red_first_and_rows_down(count):
    images = noise(count)
    features = extract_features(images, count, as_it_is, corner_and_means, CPU)
    expected = [[*image.mean(axis=(0, 1)), *image[0].mean(axis=0)] for image in images]
    assert features.shape == (count, 6) and features.dtype == np.float32
    np.testing.assert_allclose(features, expected, rtol=1e-5)


def test_the_network_gets_full_batches_and_a_rest_of_what_the_resizer_made():
    seen = []

    def network(pixels):
        assert torch.is_inference_mode_enabled()
        seen.append((tuple(pixels.shape), pixels.dtype, float(pixels.max())))
        return pixels.flatten(1)

    white = [np.full((9, 9, 3), 255, np.uint8)] * 70
    features = extract_features(white, None, lambda image: as_it_is(image[:2, :4]) - 0.5, network, CPU)
    assert seen == [((count, 3, 2, 4), torch.float32, 254.5) for count in (32, 32, 6)]
    assert features.shape == (70, 24)


def test_features_do_not_depend_on_the_precision_around_them():
    weights = torch.randn(105, 4, generator=torch.Generator().manual_seed(0))

    def network(pixels):
        return pixels.flatten(1) @ weights

    plain = extract_features(noise(3), None, as_it_is, network, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(extract_features(noise(3), None, as_it_is, network, CPU), plain)


def test_no_more_than_a_batch_of_images_is_drawn_ahead_and_any_sizes_go_together():
    drawn, drawn_at_call = [], []

    def images():
        for index in range(64):
            drawn.append(index)
            yield np.full((4 + index, 6, 3), index, np.uint8)

    def network(pixels):
        drawn_at_call.append(len(drawn))
        return pixels.mean(dim=(1, 2, 3))

    features = extract_features(images(), 64, lambda image: as_it_is(image[:2, :2]), network, CPU)
    assert drawn_at_call == [32, 64]
    assert features[:, 0].tolist() == list(range(64))


def test_the_bar_shows_images_done_of_all(monkeypatch):
    shown = []

    class Bar(bars.tqdm):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.steps = []
            shown.append(self)

        def update(self, n=1):
            self.steps.append(n)
            return super().update(n)

    monkeypatch.setattr(bars, "tqdm", Bar)
    extract_features(iter(noise(40)), 40, as_it_is, corner_and_means, CPU)
    assert [(bar.total, bar.steps) for bar in shown] == [(40, [32, 8])]


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8 \(8, 8, 4\)"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \(3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.float32), r"float32 \(8, 8, 3\)"),
        (np.zeros((8, 8, 3, 1), np.uint8), r"uint8 \(8, 8, 3, 1\)"),
    ],
)
def test_what_is_no_8_bit_image_is_named_even_behind_others(image, told):
    with pytest.raises(ValueError, match=rf"images must be uint8 \(height, width, 3\), not {told}"):
        extract_features([*noise(2), image], None, as_it_is, corner_and_means, CPU)


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match="no images to compute features of"):
        extract_features(iter(()), 0, as_it_is, corner_and_means, CPU)


@pytest.mark.parametrize(
    ("features", "mode", "told"),
    [
        ("vgg", "clean", "--features vgg: must be one of inception, dinov2, clip$"),
        ("inception", "tidy", "--mode tidy: must be clean or legacy$"),
        ("dinov2", "tidy", "--mode tidy: must be clean or legacy$"),
        ("dinov2", "legacy", "--mode legacy: only for --features inception; leave it out with --features dinov2$"),
        ("clip", "legacy", "--mode legacy: only for --features inception; leave it out with --features clip$"),
    ],
)
def test_an_unknown_choice_is_named(features, mode, told, tmp_path):
    with pytest.raises(feature_spaces.UserError, match=told):
        build_extractor(features, mode, str(tmp_path / "nothing"), CPU)


@pytest.mark.parametrize("features", ["inception", "dinov2", "clip"])
def test_without_clean_fid_the_user_is_told_how_to_get_it(features, monkeypatch, tmp_path):
    find_spec = feature_spaces.importlib.util.find_spec
    monkeypatch.setattr(
        feature_spaces.importlib.util, "find_spec", lambda name: None if name == "cleanfid" else find_spec(name)
    )
    with pytest.raises(feature_spaces.UserError, match=r'clean-fid.* is not installed: pip install "hfgen\[eval\]"'):
        build_extractor(features, "clean", str(tmp_path / "nothing"), CPU)


def test_inception_has_both_modes_and_takes_its_file(inception_weights, tmp_path):
    built = [build_extractor("inception", mode, str(inception_weights), CPU) for mode in ("clean", "legacy")]
    direct = [InceptionFeatures(inception_weights, CPU, mode) for mode in ("clean", "legacy")]
    assert [one.identity for one in built] == [one.identity for one in direct]
    assert built[0].identity != built[1].identity
    image = noise(1, 40, 60)
    assert np.array_equal(built[1](image), direct[1](image))
    with pytest.raises(feature_spaces.UserError, match="--feature_weights .*gone.pt: no such file"):
        build_extractor("inception", "clean", str(tmp_path / "gone.pt"), CPU)
