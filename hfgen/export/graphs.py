"""The parts of a pipeline to export: each network as a function of tensors, with named inputs and outputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from hfgen.errors import UserError
from hfgen.families import family


BATCH_SIZES = (1, 2, 5)  # for the checks: several, to detect a hard-coded batch size
IMAGES = "from -1 to 1; a level of 256 is round((value + 1) * 127.5)"


@dataclass
class Port:
    """An input or an output of a graph.

    Attributes:
        name: name in the file.
        shape: shape without the batch dimension.
        meaning: range or distribution of its values, in words.
        dtype: numpy's name of the data type.
    """

    name: str
    shape: tuple[int, ...]
    meaning: str
    dtype: str = "float32"

    def describe(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"name": self.name, "dtype": self.dtype, "shape": ["batch", *self.shape], "values": self.meaning}


@dataclass
class Graph:
    """A file to write.

    Attributes:
        file: file name.
        network: class name of the network.
        module: the module to trace; maps input tensors to an output tensor.
        reference: function with the same inputs, whose output the file must match.
        inputs: inputs, in the order of the module's arguments.
        output: the only output.
        checks: batches of inputs for the comparison; the first is a single image.
    """

    file: str
    network: str
    module: nn.Module
    reference: Callable[..., torch.Tensor]
    inputs: list[Port]
    output: Port
    checks: Sequence[tuple[torch.Tensor, ...]]


def graphs_of(pipeline: DiffusionPipeline) -> list[Graph]:
    """Return the graphs to export for a pipeline of any family.

    Its networks are moved to the CPU, to float32 and to eval mode.

    Raises:
        UserError: if a U-Net's images are not square.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.cpu().float().eval()
    random = torch.Generator().manual_seed(0)
    kind = family(pipeline)
    if kind == "gan":
        return [_generator(pipeline.generator, random)]
    if kind == "vae":
        graphs = [_decoder(pipeline.vae, random), _encoder(pipeline.vae, random)]
        return graphs if pipeline.density is None else [*graphs, _density(pipeline.density, random)]
    return [_unet(pipeline.unet, pipeline.scheduler.config, random)]


def how_to_generate(graphs: Sequence[Graph]) -> str:
    """Describe in one or two sentences how to generate images with the files."""
    files = [graph.file for graph in graphs]
    if "unet.onnx" in files:
        return (
            "Rebuild the scheduler from the config below, set its timesteps for num_inference_steps, and start from "
            "standard normal noise times its init_noise_sigma. At each timestep (of the type named below, one for "
            "each image of the batch) run the network on scheduler.scale_model_input(sample, timestep) and get the "
            "next sample from scheduler.step. Clip the last sample to [-1, 1]. If a timestep is below 0 (61 steps of "
            "1000, for example, have one by a rounding error), choose another number of steps."
        )
    if "density.onnx" in files:
        return "Run density.onnx on standard normal noise, then decoder.onnx on the resulting latents."
    return f"Run {files[0]} on standard normal latents."


def _latents(latent_dim: int, random: torch.Generator) -> list[tuple[torch.Tensor, ...]]:
    return [(torch.randn(count, latent_dim, generator=random),) for count in BATCH_SIZES]


def _generator(generator: nn.Module, random: torch.Generator) -> Graph:
    config: Any = generator.config
    latents = Port("latents", (config.latent_dim,), "standard normal")
    images = Port("images", (config.out_channels, config.sample_size, config.sample_size), IMAGES)
    checks = _latents(config.latent_dim, random)
    return Graph("generator.onnx", type(generator).__name__, generator, generator, [latents], images, checks)


def _decoder(vae: nn.Module, random: torch.Generator) -> Graph:
    config: Any = vae.config
    latents = Port("latents", (config.latent_dim,), "standard normal, or from the ex-post density")
    images = Port("images", (config.in_channels, config.sample_size, config.sample_size), IMAGES)
    module = _Decoder(vae)
    checks = _latents(config.latent_dim, random)
    return Graph("decoder.onnx", type(vae).__name__, module, module, [latents], images, checks)


def _encoder(vae: nn.Module, random: torch.Generator) -> Graph:
    config: Any = vae.config
    images = Port("images", (config.in_channels, config.sample_size, config.sample_size), IMAGES)
    latents = Port("latents", (config.latent_dim,), "mean of the posterior")
    module = _Encoder(vae)
    checks = [(2 * torch.rand(count, *images.shape, generator=random) - 1,) for count in BATCH_SIZES]
    return Graph("encoder.onnx", type(vae).__name__, module, module, [images], latents, checks)


def _density(density: nn.Module, random: torch.Generator) -> Graph:
    dimension: int = density.config.latent_dim  # type: ignore[union-attr,assignment]
    mixes = hasattr(density, "weights")
    meaning = "the first number chooses the component" if mixes else "the first number is not used"
    noise = Port("noise", (1 + dimension,), f"standard normal; {meaning}")
    latents = Port("latents", (dimension,), "sampled from the ex-post density")
    checks = _latents(1 + dimension, random)
    if not mixes:  # a flow, which needs only ONNX operations
        return Graph("density.onnx", type(density).__name__, density, density, [noise], latents, checks)
    # One sample from each component: the middle of its quantile range.
    weights = density.weights.detach().double()  # type: ignore[operator]
    middles = torch.special.ndtri((weights.cumsum(0) - weights / 2) / weights.sum()).float()
    others = torch.randn(len(weights), dimension, generator=random)
    checks.append((torch.cat([middles[:, None], others], dim=1),))
    return Graph("density.onnx", type(density).__name__, _Density(density), density, [noise], latents, checks)


def _unet(unet: nn.Module, scheduler: Any, random: torch.Generator) -> Graph:
    config: Any = unet.config
    size, last = config.sample_size, scheduler.num_train_timesteps - 1
    if not isinstance(size, int) and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int):
        raise UserError(f"sample_size={size} of the U-Net: only square images can be exported")
    sample = Port("sample", (config.in_channels, size, size), "noisy images, at the noise level of the timestep")
    if is_edm := "sigma_data" in scheduler:
        levels = (scheduler.sigma_min, scheduler.sigma_max)
        meaning = f"a quarter of the logarithm of the noise level, from {levels[0]:g} to {levels[1]:g}, of each image"
        timestep = Port("timestep", (), meaning, "float32")
    else:
        timestep = Port("timestep", (), f"from 0 to {last}, of each image", "int64")
    meaning = f"what the network predicts, called {scheduler.prediction_type} by the scheduler"
    output = Port("model_output", (config.out_channels, size, size), meaning)
    first, last = (math.log(level) / 4 for level in levels) if is_edm else (0, last)
    spread = [torch.linspace(first, last, 3)[index : index + 1] for index in range(3)]  # batches of one image
    spread += [torch.linspace(first, last, count) for count in BATCH_SIZES if count > 1]
    checks = [
        (torch.randn(len(steps), *sample.shape, generator=random), steps if is_edm else steps.long())
        for steps in spread
    ]  # fmt: skip
    module = _UNet(unet)
    return Graph("unet.onnx", type(unet).__name__, module, module, [sample, timestep], output, checks)


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, latent_dim)` to `(batch_size, channels, sample_size, sample_size)`."""
        return self.vae.decode(latents).sample  # type: ignore[operator]


class _Encoder(nn.Module):
    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, channels, sample_size, sample_size)` to `(batch_size, latent_dim)`."""
        return self.vae.encode(images).latent_dist.mode().flatten(1)  # type: ignore[operator]


class _Density(nn.Module):
    """The mixture of `GaussianMixture` in ONNX operations, which do not include ndtr and searchsorted."""

    def __init__(self, density: Any):
        super().__init__()
        self.means, self.scale_trils = density.means, density.scale_trils
        self.bounds = density.weights.detach().cumsum(0)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, 1 + latent_dim)` to `(batch_size, latent_dim)`."""
        quantiles = 0.5 * (1 + torch.erf(noise[:, :1] * 0.5**0.5)) * self.bounds[-1]  # (B, 1)
        chosen = (self.bounds < quantiles).sum(dim=1).clamp(max=len(self.bounds) - 1)  # (B,)
        return self.means[chosen] + (self.scale_trils[chosen] @ noise[:, 1:, None])[:, :, 0]


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, channels, height, width)` and `(batch_size,)` to a tensor of the first shape."""
        return self.unet(sample, timestep).sample
