import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d
from torch.nn.utils.parametrizations import spectral_norm

from hfgen.methods import matrix_convolution
from hfgen.methods.matrix_convolution import convolve, convolve_transposed, use_matrix_products


CONVOLUTION = matrix_convolution._Convolution.apply
TRANSPOSED_CONVOLUTION = matrix_convolution._TransposedConvolution.apply


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 5, 2, 2), (3, 1, 4, 10)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_both_convolutions_are_those_of_torch_with_their_gradients(shape, channels_last, with_bias):
    bias = draw(6, seed=2).requires_grad_() if with_bias else None
    for ours, theirs, weight in (
        (convolve, conv2d, draw(6, shape[1], 4, 4, seed=1)),
        (convolve_transposed, conv_transpose2d, draw(shape[1], 6, 4, 4, seed=1)),
    ):
        format = torch.channels_last if channels_last else torch.contiguous_format
        images = draw(*shape).contiguous(memory_format=format).requires_grad_()
        weight = weight.contiguous(memory_format=format).requires_grad_()
        results = ours(images, weight, bias), theirs(images, weight, bias, stride=2, padding=1)
        torch.testing.assert_close(*results)
        assert results[0].is_contiguous(memory_format=torch.channels_last)
        inputs = [images, weight, *([bias] if with_bias else [])]
        factor = draw(*results[0].shape, seed=3)
        for one, other in zip(*(torch.autograd.grad((r * factor).sum(), inputs) for r in results), strict=True):
            torch.testing.assert_close(one, other)


def test_gradients_of_gradients_are_right():
    images, weight = draw(2, 2, 4, 4).requires_grad_(), draw(3, 2, 4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: convolve(x, w, None).square(), (images, weight))
    weight = draw(2, 3, 4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: convolve_transposed(x, w, None).square(), (images, weight))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 5, 2, 2), (3, 1, 4, 10)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_whose_weight_gradient_is_a_product_are_those_of_torch(shape, channels_last):
    for ours, theirs, weight in (
        (CONVOLUTION, conv2d, draw(6, shape[1], 4, 4, seed=1)),
        (TRANSPOSED_CONVOLUTION, conv_transpose2d, draw(shape[1], 6, 4, 4, seed=1)),
    ):
        format = torch.channels_last if channels_last else torch.contiguous_format
        images = draw(*shape).contiguous(memory_format=format).requires_grad_()
        inputs = [images, weight.contiguous(memory_format=format).requires_grad_()]
        results = ours(*inputs), theirs(*inputs, stride=2, padding=1)
        assert torch.equal(*results)
        factor = draw(*results[0].shape, seed=3)
        for one, other in zip(*(torch.autograd.grad((r * factor).sum(), inputs) for r in results), strict=True):
            torch.testing.assert_close(one, other)


def test_their_gradients_of_gradients_are_right_too():
    images, weight = draw(2, 2, 4, 4).requires_grad_(), draw(3, 2, 4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: CONVOLUTION(x, w).square(), (images, weight))
    weight = draw(2, 3, 4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: TRANSPOSED_CONVOLUTION(x, w).square(), (images, weight))


def test_frozen_weights_get_no_gradient():
    images, weight = draw(2, 2, 4, 4).requires_grad_(), draw(3, 2, 4, 4, seed=1)
    (gradient,) = torch.autograd.grad(CONVOLUTION(images, weight).sum(), [images])
    torch.testing.assert_close(gradient, conv_transpose2d(torch.ones(2, 3, 2, 2).double(), weight, None, 2, 1))
    assert weight.grad is None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, stride=2, padding=1),  # from 16 pixels: too many
        spectral_norm(nn.Conv2d(4, 8, 4, stride=2, padding=1)),  # from 8
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, bias=False),  # from 4
        nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),  # from 8: too many
        nn.Conv2d(3, 3, 3, padding=1),
    ).to(memory_format=torch.channels_last)


def products(module: nn.Module, images: torch.Tensor) -> list[str]:
    """The names of the operations of a forward pass that are convolutions or matrix products."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = function.overloadpacket.__name__
            if name in ("convolution", "mkldnn_convolution", "addmm", "mm"):
                names.append("convolution" if "convolution" in name else "product")
            return function(*arguments, **(options or {}))

    names = []
    with Seen():
        module(images)
    return names


def test_only_in_bf16_on_a_cpu_convolutions_of_few_pixels_become_products():
    plain, fast, images = network(), network(), draw(2, 3, 16, 16).float()
    fast.load_state_dict(plain.state_dict())
    use_matrix_products(fast)
    plain.eval(), fast.eval()
    assert products(fast, images) == ["convolution"] * 5
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert products(plain, images) == ["convolution"] * 5
        assert products(fast, images) == ["convolution", "product", "product", "convolution", "convolution"]
        torch.testing.assert_close(fast(images), plain(images), atol=0.02, rtol=0.02)
    assert torch.equal(fast(images), plain(images))
    assert fast.state_dict().keys() == plain.state_dict().keys()


def test_other_convolutions_are_left_alone():
    others = nn.Sequential(
        nn.Conv2d(4, 4, 4, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 4, 4, stride=2, padding=0),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 4, stride=2, padding=1, dilation=2),
        nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, output_padding=1),
    )
    before = copy.deepcopy(others)
    use_matrix_products(others)
    for one, other in zip(others, before, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(one(draw(1, 4, 8, 8).float()), other(draw(1, 4, 8, 8).float()))
        assert "forward" not in vars(one)


@pytest.mark.parametrize("in_bf16", [True, False])
def test_a_step_of_training_moves_the_weights_as_with_torchs_own_convolutions(in_bf16):
    networks, images = [network(), network()], draw(4, 3, 16, 16).float()
    use_matrix_products(networks[1])
    for module in networks:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            loss = (module(images) - images).square().mean()
        loss.backward()
    for (name, one), (_, other) in zip(*(module.named_parameters() for module in networks), strict=True):
        assert (one.grad - other.grad).norm() < (0.03 if in_bf16 else 1e-5) * one.grad.norm(), name


def test_in_fp32_only_the_weight_gradients_of_few_pixels_are_products():
    module, images = network(), draw(2, 3, 16, 16).float()
    use_matrix_products(module)
    assert products(module, images) == ["convolution"] * 5
    result = module(images).sum()
    assert products(lambda of: of.backward(), result).count("product") == 2
