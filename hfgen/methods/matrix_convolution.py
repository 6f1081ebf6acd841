"""Convolutions with few pixels and many channels as matrix products, for training on CPUs.

At 8 x 8 pixels, PyTorch's CPU kernels for them reach a tenth of the CPU's bf16 throughput; in fp32 only the weight
gradient is slow, with a third of the throughput of the others. A matrix product of gathered patches computes the same
numbers several times faster. Supported is the convolution used in DCGAN's networks: kernel 4, stride 2, padding 1.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d, linear, pad


KERNEL, STRIDE, PADDING = 4, 2, 1
# Maximum side, in pixels, of the finer end for which the matrix product is faster; measured with 64 images.
MAX_SIZE = 8


class _Patches(torch.autograd.Function):
    """Gathers, for each pixel of the coarser side, the 4 x 4 pixels of the finer side that the kernel covers.

    `(batch_size, channels, height, width)` -> `(batch_size * height/2 * width/2, 16 * channels)`. A linear map, whose
    gradient is `_Fold`; this also gives the second-order gradients that penalties need.
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor) -> torch.Tensor:
        ctx.shape = images.shape
        batch_size, channels, height, width = images.shape
        padded = pad(images.permute(0, 2, 3, 1), (0, 0, PADDING, PADDING, PADDING, PADDING))  # (B, H + 2, W + 2, C)
        image, row, column, channel = padded.stride()
        shape = (batch_size, height // STRIDE, width // STRIDE, KERNEL, KERNEL, channels)
        strides = (image, STRIDE * row, STRIDE * column, row, column, channel)
        return padded.as_strided(shape, strides).reshape(-1, KERNEL * KERNEL * channels)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Fold.apply(gradient, ctx.shape)


class _Fold(torch.autograd.Function):
    """Sums patches at their original positions: the transpose of `_Patches`, and its gradient."""

    @staticmethod
    def forward(ctx: Any, patches: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        batch_size, channels, height, width = shape
        patches = patches.view(batch_size, height // STRIDE, width // STRIDE, KERNEL, KERNEL, channels)
        images = patches.new_empty(batch_size, height, width, channels)
        # Row r of the kernel maps to row 2 i + r - 1 of the images: the inner rows 1 and 2 fill all rows, the outer
        # rows 0 and 3 are added where they are inside the image.
        targets = (slice(1, None, 2), slice(0, None, 2), slice(1, None, 2), slice(2, None, 2))
        sources = (slice(1, None), slice(None), slice(None), slice(None, -1))
        places = sorted(itertools.product(range(KERNEL), repeat=2), key=lambda place: not {*place} <= {1, 2})
        for row, column in places:
            target = images[:, targets[row], targets[column]]
            source = patches[:, sources[row], sources[column], row, column]
            # The last target of row 0 has no source: it would be outside the image.
            target = target[:, : source.shape[1], : source.shape[2]]
            target.copy_(source) if {row, column} <= {1, 2} else target.add_(source)
        return images.permute(0, 3, 1, 2)  # channels_last

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Patches.apply(gradient), None


class _Convolution(torch.autograd.Function):
    """`conv2d(images, weight, stride=2, padding=1)` whose weight gradient is a matrix product.

    The gradients are differentiable, as penalties on gradients need them.
    """

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        return conv2d(images, weight, None, STRIDE, PADDING)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        images, weight = ctx.saved_tensors
        return (
            _TransposedConvolution.apply(gradient, weight) if ctx.needs_input_grad[0] else None,
            _weight_gradient(images, gradient) if ctx.needs_input_grad[1] else None,
        )


class _TransposedConvolution(torch.autograd.Function):
    """`conv_transpose2d(images, weight, stride=2, padding=1)` whose weight gradient is a matrix product."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        return conv_transpose2d(images, weight, None, STRIDE, PADDING)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        images, weight = ctx.saved_tensors
        return (
            _Convolution.apply(gradient, weight) if ctx.needs_input_grad[0] else None,
            _weight_gradient(gradient, images) if ctx.needs_input_grad[1] else None,
        )


def _weight_gradient(fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the weight, `(coarse_channels, fine_channels, 4, 4)`.

    Args:
        fine: `(batch_size, fine_channels, 2 height, 2 width)`, the input or, if transposed, the output's gradient.
        coarse: `(batch_size, coarse_channels, height, width)`, the other one.
    """
    pixels = coarse.permute(0, 2, 3, 1).flatten(0, 2)
    product = pixels.t() @ _Patches.apply(fine)
    return product.view(coarse.shape[1], KERNEL, KERNEL, fine.shape[1]).permute(0, 3, 1, 2)


def convolve(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `conv2d(images, weight, bias, stride=2, padding=1)` for a 4 x 4 kernel.

    Args:
        images: `(batch_size, in_channels, height, width)`, height and width even.
        weight: `(out_channels, in_channels, 4, 4)`.
        bias: `(out_channels,)` or None.

    Returns:
        `(batch_size, out_channels, height / 2, width / 2)`, in channels_last memory format.
    """
    batch_size, _, height, width = images.shape
    result = linear(_Patches.apply(images), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return result.view(batch_size, height // STRIDE, width // STRIDE, -1).permute(0, 3, 1, 2)


def convolve_transposed(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `conv_transpose2d(images, weight, bias, stride=2, padding=1)` for a 4 x 4 kernel.

    Args:
        images: `(batch_size, in_channels, height, width)`.
        weight: `(in_channels, out_channels, 4, 4)`.
        bias: `(out_channels,)` or None.

    Returns:
        `(batch_size, out_channels, 2 height, 2 width)`, in channels_last memory format.
    """
    batch_size, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)
    patches = linear(pixels, weight.permute(2, 3, 1, 0).flatten(0, 2))
    result = _Fold.apply(patches, (batch_size, weight.shape[1], STRIDE * height, STRIDE * width))
    return result if bias is None else result + bias[:, None, None].to(result.dtype)


def use_matrix_products(network: nn.Module) -> None:
    """Compute a network's convolutions with few pixels as matrix products when it runs on a CPU.

    Output and both gradients in bf16, the weight gradient alone in fp32. Weights, their names and the results (up to
    rounding) do not change; neither does anything on other devices. Copy the network before this call: a later copy
    would use the original's weights.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            options = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
            supported = ((KERNEL,) * 2, (STRIDE,) * 2, (PADDING,) * 2, (1, 1), 1)
            if options == supported and not any(module.output_padding):
                module.forward = _forward_of(module)  # type: ignore[assignment]


def _forward_of(module: nn.Conv2d | nn.ConvTranspose2d) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the replacement for the module's `forward`."""
    original = module.forward
    transposed = isinstance(module, nn.ConvTranspose2d)
    largest = MAX_SIZE // STRIDE if transposed else MAX_SIZE

    def forward(images: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, in_channels, height, width)` to half or twice the resolution."""
        height, width = images.shape[2:]
        even = height % STRIDE == width % STRIDE == 0 or transposed
        if images.device.type != "cpu" or max(height, width) > largest or not even:
            return original(images)
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            return (convolve_transposed if transposed else convolve)(images, module.weight, module.bias)
        if images.dtype == torch.float32 and torch.is_grad_enabled():
            function = _TransposedConvolution if transposed else _Convolution
            result = function.apply(images, module.weight)
            return result if module.bias is None else result + module.bias[:, None, None]
        return original(images)

    return forward
