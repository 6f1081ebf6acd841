"""A pipeline in words, for its card: the method, its papers, and the departures from them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hfgen.families import COMPONENTS, family_of_index
from hfgen.methods.schedules import DEFAULT_STEPS


GOODFELLOW = "Goodfellow et al. 2014, [arXiv:1406.2661](https://arxiv.org/abs/1406.2661)"
JOLICOEUR = "Jolicoeur-Martineau 2018, [arXiv:1807.00734](https://arxiv.org/abs/1807.00734)"
OBJECTIVES = {
    "non_saturating": f"the non-saturating objective ({GOODFELLOW})",
    "least_squares": "the least-squares objective of LSGAN (Mao et al. 2017, "
    "[arXiv:1611.04076](https://arxiv.org/abs/1611.04076))",
    "hinge": "the hinge objective (Miyato et al. 2018, [arXiv:1802.05957](https://arxiv.org/abs/1802.05957))",
    "wasserstein": "the Wasserstein objective (Arjovsky et al. 2017, "
    "[arXiv:1701.07875](https://arxiv.org/abs/1701.07875))",
    "relativistic": "the relativistic objective of R3GAN (Huang et al. 2024, "
    "[arXiv:2501.05441](https://arxiv.org/abs/2501.05441))",
    "relativistic_average": f"the relativistic average objective RaSGAN ({JOLICOEUR})",
    "relativistic_average_least_squares": f"the relativistic average least-squares objective RaLSGAN ({JOLICOEUR})",
    "relativistic_average_hinge": f"the relativistic average hinge objective RaHingeGAN ({JOLICOEUR})",
}
NETWORKS = {
    "DCGANGenerator": "DCGAN's generator, a stack of transposed convolutions (Radford et al. 2016, "
    "[arXiv:1511.06434](https://arxiv.org/abs/1511.06434))",
    "DCGAN256Generator": "a DCGAN for 256 pixels with a dense stem and 6x6 kernels",
    "SNGANConvGenerator": "SNGAN's convolutional generator (Miyato et al. 2018, "
    "[arXiv:1802.05957](https://arxiv.org/abs/1802.05957))",
    "SNGANGenerator": "SNGAN's residual generator (Miyato et al. 2018, "
    "[arXiv:1802.05957](https://arxiv.org/abs/1802.05957))",
    "ConvVAE": "an encoder and a decoder of strided convolutions",
    "UNetBase": "a convolutional U-Net without self-attention",
    "UNetAttention": "a U-Net with self-attention",
    "UNetCompact": "a U-Net of residual blocks",
    "UNet2DModel": "diffusers' U-Net with self-attention",
}
SAMPLERS = {
    "DDIMScheduler": "DDIM (Song et al. 2020, [arXiv:2010.02502](https://arxiv.org/abs/2010.02502))",
    "DPMSolverMultistepScheduler": "DPM-Solver++ (Lu et al. 2022, "
    "[arXiv:2211.01095](https://arxiv.org/abs/2211.01095))",
    "EDMDPMSolverMultistepScheduler": "DPM-Solver++ (Lu et al. 2022, "
    "[arXiv:2211.01095](https://arxiv.org/abs/2211.01095))",
    "EDMEulerScheduler": "Euler's method",
    "UniPCMultistepScheduler": "UniPC (Zhao et al. 2023, [arXiv:2302.04867](https://arxiv.org/abs/2302.04867))",
}
DISCRIMINATORS = {
    "dcgan": "DCGAN's discriminator (Radford et al. 2016, [arXiv:1511.06434](https://arxiv.org/abs/1511.06434))",
    "dcgan256": "a discriminator of 6x6 convolutions",
    "sngan": "SNGAN's convolutional discriminator (Miyato et al. 2018, "
    "[arXiv:1802.05957](https://arxiv.org/abs/1802.05957))",
    "resnet": "SNGAN's residual discriminator (Miyato et al. 2018, "
    "[arXiv:1802.05957](https://arxiv.org/abs/1802.05957))",
}
# What the departures compare with the papers: family -> (in the pipeline's files, in the training settings).
COMPARED = {
    "ddpm": (
        ["kind of noise schedule", "prediction target", "whether the network has self-attention", "sampler"],
        ["loss", "loss weighting", "pairing of images with noise"],
    ),
    "gan": (
        [],
        [
            "averaging of the generator's weights",
            "gradient penalties",
            "discriminator updates per generator update",
            "label smoothing",
            "normalisation of the discriminator",
            "upsampling",
            "BatchNorm statistics",
            "augmentation",
        ],
    ),
    "vae": (
        ["distribution that the latents are sampled from"],
        ["likelihood of the decoder", "weight of the KL term", "free bits", "loss from a discriminator"],
    ),
}
# Discriminators whose normalisation is a setting.
NORMALISED = ("dcgan", "sngan")
# BatchNorm's buffers.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Method:
    """A pipeline in words.

    Attributes:
        family: "gan", "vae" or "ddpm".
        sample_size: height and width of the images, in pixels; two numbers if they differ.
        summary: one paragraph: method, paper, network, size.
        departures: differences from the papers that were found, one clause each.
        compared: what was compared with the papers to find them; empty if nothing could be compared.
        call: arguments of a call that generates 16 images.
        needs_trust: whether `DiffusionPipeline` has to run the code next to the weights.
    """

    family: str
    sample_size: int | list[int]
    summary: str
    departures: list[str]
    compared: list[str]
    call: str
    needs_trust: bool


def sides(sample_size: int | list[int]) -> str:
    """Return width and height, such as "64x32", of a `sample_size`: one number, or height and width."""
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return f"{width}x{height}"


def describe_method(folder: Path, settings: dict[str, Any] | None, num_inference_steps: int | None = None) -> Method:
    """Describe the pipeline in a folder.

    Args:
        folder: as written by `save_pretrained` of an hfgen pipeline.
        settings: training settings, as in `training_config.json`; None if unknown.
        num_inference_steps: denoising steps to recommend for diffusion; the pipeline's default if None.
    """
    index = json.loads((folder / "model_index.json").read_text())
    trusted = isinstance(index["_class_name"], list)
    family = family_of_index(index)
    name = COMPONENTS[family][0]
    config = json.loads((folder / name / "config.json").read_text())
    network = NETWORKS.get(index[name][1], index[name][1])
    size = config["sample_size"]
    network += _parts_of(index[name][1], config)
    architecture = f"The network is {network}. It has {count_parameters(folder / name):,} parameters"
    if (folder / "density").is_dir():
        architecture += f", and {count_parameters(folder / 'density'):,} more in the density of its latents"
    architecture += "."
    generates = f"generates {sides(size)}-pixel images, without a prompt,"
    in_files, in_settings = COMPARED[family]
    compared = in_files + (in_settings if settings else [])
    if family == "gan":
        if settings and _discriminator(settings) not in NORMALISED:
            compared.remove("normalisation of the discriminator")
        objective = OBJECTIVES.get((settings or {}).get("loss", ""), "an unknown objective")
        summary = f"A generative adversarial network ({GOODFELLOW}) that {generates} from "
        against = DISCRIMINATORS.get(_discriminator(settings or {}) or "", "an unknown discriminator")
        summary += f"{config['latent_dim']}-dimensional latents. {architecture} It was trained against {against}, "
        summary += f"with {objective}."
        return Method(family, size, summary, _gan_departures(settings or {}), compared, "batch_size=16", trusted)
    if family == "vae":
        summary = (
            "A variational autoencoder (Kingma and Welling 2014, [arXiv:1312.6114](https://arxiv.org/abs/1312.6114)) "
        )
        summary += f"that {generates} from {config['latent_dim']}-dimensional latents, and encodes images. "
        summary += architecture
        departures = _vae_departures(settings or {}, index.get("density", [None, None])[1])
        return Method(family, size, summary, departures, compared, "batch_size=16", trusted)
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    summary = "A denoising diffusion model (Ho et al. 2020, [arXiv:2006.11239](https://arxiv.org/abs/2006.11239)) "
    summary += f"that {generates} from Gaussian noise. {architecture} "
    if "sigma_data" in schedule:
        summary += (
            "It was trained with EDM (Karras et al. 2022, [arXiv:2206.00364](https://arxiv.org/abs/2206.00364))."
        )
    else:
        summary += f"It has {schedule['num_train_timesteps']:,} timesteps."
    trained_with = (settings or {}).get("num_inference_steps", DEFAULT_STEPS)  # which diffusers' classes do not store
    steps = num_inference_steps or index.get("num_inference_steps", trained_with)
    steps = min(steps, schedule["num_train_timesteps"])
    call = f"batch_size=16, num_inference_steps={steps}"
    departures = _ddpm_departures(settings or {}, schedule, _has_attention(index[name][1], config), steps)
    return Method(family, size, summary, departures, compared, call, trusted)


def _parts_of(network: str, config: dict[str, Any]) -> str:
    """Return what a network's configuration adds to its name."""
    if network == "UNetCompact":
        return " with self-attention at its coarse levels" if _has_attention(network, config) else ""
    parts = ["residual blocks"] if network == "ConvVAE" and config.get("layers_per_block") else []
    parts += ["nearest-neighbour upsampling"] if config.get("upsampling") == "nearest" else []
    parts += ["convolutions at full resolution"] if config.get("refine_channels") else []
    *others, last = parts or [""]
    return f" with {', '.join(others)}{' and ' if others else ''}{last}" if last else ""


def count_parameters(folder: Path) -> int:
    """Count a network's parameters in its safetensors files, without BatchNorm's statistics and integers."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                tensor = weights.get_slice(name)  # its header alone is read
                if "F" in tensor.get_dtype() and name.split(".")[-1] not in STATISTICS:
                    count += math.prod(tensor.get_shape())
    return count


def _has_attention(network: str, config: dict[str, Any]) -> bool:
    """Whether a U-Net of this class and configuration has self-attention at any level."""
    if network == "UNet2DModel":
        blocks = (*config["down_block_types"], *config["up_block_types"])
        return config["add_attention"] or any("Attn" in block for block in blocks)
    largest = config.get("attention_size" if network == "UNetCompact" else "max_attention_size", 0)
    coarsest = config["sample_size"] // config.get("patch_size", 1) // 2 ** (len(config["block_out_channels"]) - 1)
    return coarsest <= largest  # UNetBase has no such limit, and no attention


def _ddpm_departures(settings: dict[str, Any], schedule: dict[str, Any], has_attention: bool, steps: int) -> list[str]:
    clauses = []
    if "sigma_data" in schedule:
        clauses.append("EDM's noise levels, preconditioning and loss weights instead of those of Ho et al.")
        if (scale := settings.get("noise_scale", 1)) != 1:
            clauses.append(
                f"noise levels in training {scale:g} times EDM's, for the image size (Hoogeboom et al. 2023, "
                "[arXiv:2301.11093](https://arxiv.org/abs/2301.11093))"
            )
    elif schedule["beta_schedule"] == "squaredcos_cap_v2":
        clauses.append(
            "a cosine noise schedule (Nichol and Dhariwal 2021, [arXiv:2102.09672](https://arxiv.org/abs/2102.09672)) "
            "instead of the linear one"
        )
    if schedule["prediction_type"] == "v_prediction":
        clauses.append(
            "the network predicts the velocity (Salimans and Ho 2022, "
            "[arXiv:2202.00512](https://arxiv.org/abs/2202.00512)) instead of the noise"
        )
    elif schedule["prediction_type"] == "sample":
        clauses.append("the network predicts the clean image instead of the noise")
    if not has_attention:
        clauses.append("no self-attention")
    if settings.get("loss") in ("l1", "huber"):
        clauses.append(
            f"the {settings['loss'].replace('l1', 'L1').replace('huber', 'Huber')} loss instead of the squared error"
        )
    if settings.get("match_noise"):
        clauses.append(
            "each image of a batch is paired with nearby noise (immiscible diffusion, Li et al. 2024, "
            "[arXiv:2406.12303](https://arxiv.org/abs/2406.12303))"
        )
    if settings.get("snr_gamma"):
        clauses.append(
            f"Min-SNR loss weights with gamma {settings['snr_gamma']:g} (Hang et al. 2023, "
            "[arXiv:2303.09556](https://arxiv.org/abs/2303.09556))"
        )
    own, in_all = schedule["_class_name"], schedule["num_train_timesteps"]
    sampler = None if own == "DDPMScheduler" else SAMPLERS.get(own, own)
    if sampler and steps < in_all:
        clauses.append(f"sampled with {sampler} in {steps:,} steps instead of with ancestral sampling in {in_all:,}")
    elif sampler:
        clauses.append(f"sampled with {sampler} instead of with ancestral sampling")
    elif steps < in_all:
        clauses.append(f"ancestral sampling in {steps:,} steps instead of {in_all:,}")
    return clauses


def _gan_departures(settings: dict[str, Any]) -> list[str]:
    average = "samples come from a moving average of the generator's weights"
    clauses = [average] if settings.get("ema_decay") else []
    if settings.get("gradient_penalty_weight"):
        clauses.append(
            f"a gradient penalty of weight {settings['gradient_penalty_weight']:g} (WGAN-GP, Gulrajani et al. 2017, "
            "[arXiv:1704.00028](https://arxiv.org/abs/1704.00028))"
        )
    if settings.get("r1_weight") or settings.get("r2_weight"):
        clauses.append(
            f"R1 and R2 penalties with gamma {settings['r1_weight']:g} and {settings['r2_weight']:g} (Mescheder et "
            "al. 2018, [arXiv:1801.04406](https://arxiv.org/abs/1801.04406))"
        )
    if (updates := settings.get("n_critic", 1)) > 1:
        clauses.append(f"{updates} discriminator updates per generator update")
    elif settings.get("loss") == "wasserstein":
        clauses.append("one discriminator update per generator update instead of the 5 of the Wasserstein GAN papers")
    if settings.get("label_smoothing"):
        clauses.append(
            f"real images labelled {1 - settings['label_smoothing']:g} instead of 1 (Salimans et al. 2016, "
            "[arXiv:1606.03498](https://arxiv.org/abs/1606.03498))"
        )
    norm = {
        "spectral": "spectral normalisation of the discriminator (Miyato et al. 2018, "
        "[arXiv:1802.05957](https://arxiv.org/abs/1802.05957))",
        "instance": "InstanceNorm in the discriminator instead of BatchNorm, which a gradient penalty rules out",
        "none": "no normalisation in the discriminator",
    }
    if _discriminator(settings) in NORMALISED and settings.get("normalization") in norm:
        clauses.append(norm[settings["normalization"]])
    if settings.get("spectral_scale", 1.0) != 1.0:
        clauses.append(f"each spectrally normalised weight multiplied by {settings['spectral_scale']:g}")
    if settings.get("upsampling") == "nearest":
        clauses.append("nearest-neighbour upsampling and a convolution instead of transposed convolutions")
    if settings.get("statistics_images") and settings.get("network") != "dcgan256":  # dcgan256 has no BatchNorm
        clauses.append("BatchNorm statistics recomputed for the EMA generator")
    augment = {
        "auto": "augmentation of the discriminator's input, chosen by the number of training images",
        "diffaugment": "DiffAugment (Zhao et al. 2020, [arXiv:2006.10738](https://arxiv.org/abs/2006.10738))",
        "ada": "adaptive augmentation (Karras et al. 2020, [arXiv:2006.06676](https://arxiv.org/abs/2006.06676))",
    }
    if settings.get("augment") in augment:
        clauses.append(augment[settings["augment"]])
    return clauses


def _discriminator(settings: dict[str, Any]) -> str | None:
    return settings.get("discriminator_network") or settings.get("network")


def _vae_departures(settings: dict[str, Any], density: str | None) -> list[str]:
    clauses = []
    if settings.get("reconstruction") == "calibrated":
        clauses.append(
            "a Gaussian decoder whose variance is the best-fitting one at each step (Rybkin et al. 2021, "
            "[arXiv:2006.13202](https://arxiv.org/abs/2006.13202))"
        )
    elif settings.get("reconstruction"):
        likelihood = {"mse": "Gaussian of variance 1", "l1": "Laplacian of scale 1", "bce": "binary cross-entropy"}
        clauses.append(f"the decoder's likelihood: {likelihood[settings['reconstruction']]}")
    if settings.get("kl_weight", 1.0) != 1.0:
        clauses.append(f"a KL term of weight {settings['kl_weight']:g}, which makes it a beta-VAE")
    if settings.get("free_bits"):
        clauses.append(f"free bits: {settings['free_bits']:g} nats of KL per latent dimension are not penalised")
    if settings.get("feature_weight") or settings.get("adversarial_weight"):
        start = settings.get("learned_term_start")
        since = f" after {start:,} updates, when the encoder is frozen" if start else ""
        clauses.append(
            "in addition to the pixel likelihood, a learned loss from a discriminator (Larsen et al. "
            f"2016, [arXiv:1512.09300](https://arxiv.org/abs/1512.09300)){since}"
        )
    if density:
        kind = "a mixture of Gaussians"
        if density == "LatentFlow":
            kind = "a flow (Dinh et al. 2017, [arXiv:1605.08803](https://arxiv.org/abs/1605.08803))"
        clauses.append(
            f"sampled from {kind} fitted to the latents of the training images (ex-post "
            "density estimation, Ghosh et al. 2020, [arXiv:1903.12436](https://arxiv.org/abs/1903.12436)); "
            '`sample_from="prior"` samples from the prior'
        )
    return clauses
