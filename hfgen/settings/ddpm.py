"""Settings of diffusion training: formulation, U-Net, noise schedule, loss, optimizer, sampler."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from hfgen.config import check_ranges, setting
from hfgen.errors import UserError
from hfgen.ranges import CHANNELS, COUNT, COUNT_OR_NONE, DECAY, NOT_NEGATIVE, POSITIVE, Range


# Settings that only some U-Nets have.
TAKEN_BY = {
    "layers_per_block": ("library", "compact"),
    "patch_size": ("compact",),
    "attention_size": ("compact",),
    "dropout": ("compact",),
}


@dataclass
class DDPMSettings:
    """Settings of the method."""

    _argument_group_name = "method"

    formulation: Literal["ddpm", "edm"] = setting(
        "ddpm",
        "ddpm: discrete timesteps of a noise schedule; edm: continuous noise levels and the preconditioning of Karras "
        "et al. 2022, needs --unet compact",
    )
    unet: Literal["base", "attention", "library", "compact"] = setting(
        "base",
        "base: convolutions only; attention: self-attention at levels of at most 32 pixels; library: diffusers' "
        "UNet2DModel; compact: residual blocks, attention at coarse levels",
    )
    block_out_channels: list[int] | None = setting(
        None, "channels per level, finest first; unset: the network's default", CHANNELS
    )
    layers_per_block: int = setting(
        2, "residual blocks per level, for --unet library and compact; more is slower", Range(1, 100)
    )
    patch_size: int = setting(
        1, "side in pixels of the patches folded into channels, for --unet compact; 2 is faster", COUNT
    )
    attention_size: int = setting(
        16, "levels with at most this many patches a side have self-attention, for --unet compact", COUNT_OR_NONE
    )
    dropout: float = setting(0.1, "dropout probability, for --unet compact; increase it to reduce overfitting", DECAY)
    noise_scale: float = setting(
        1.0,
        "factor of the noise levels in training, for --formulation edm; above 64 pixels, sample_size / 64 follows "
        "Hoogeboom et al. 2023",
        POSITIVE,
    )
    beta_schedule: Literal["linear", "cosine"] = setting("linear", "noise schedule; cosine adds noise more slowly")
    num_train_timesteps: int = setting(1000, "number of diffusion timesteps in training", Range(1, 100_000))
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = setting(
        "epsilon", "what the network predicts: the noise, the clean image, or the velocity"
    )
    loss: Literal["l1", "l2", "huber"] = setting("l2", "loss on the network's prediction")
    snr_gamma: float | None = setting(
        None, "gamma of Min-SNR loss weighting (5 in the paper); unset: no weighting", POSITIVE
    )
    match_noise: bool = setting(False, "pair each image of a batch with nearby noise (immiscible diffusion)")
    batch_size: int = setting(64, "images per update and process", Range(1, 100_000))
    gradient_accumulation_steps: int = setting(
        1, "split each update's batch into this many parts: less memory, same batch size", COUNT
    )
    learning_rate: float = setting(2e-4, "AdamW learning rate, after the warm-up", POSITIVE)
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine", "linear"] = setting(
        "constant_with_warmup", "learning rate schedule"
    )
    lr_warmup_steps: int = setting(
        500, "updates over which the learning rate rises from 0, except with --lr_scheduler constant", COUNT_OR_NONE
    )
    adam_beta1: float = setting(0.9, "AdamW's beta1: decay of the mean gradient", DECAY)
    adam_beta2: float = setting(0.999, "AdamW's beta2: decay of the mean squared gradient", DECAY)
    weight_decay: float = setting(0.0, "AdamW weight decay; 0 is plain Adam", NOT_NEGATIVE)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", POSITIVE)
    ema_decay: float = setting(
        0.9999, "EMA decay per update; the EMA weights are sampled and saved; lower it for short runs", DECAY
    )
    compile: bool = setting(False, "use torch.compile: takes minutes at the start, faster on CUDA")
    sampler: Literal["ddim", "dpm", "unipc", "ddpm"] = setting("dpm", "default sampler of the saved pipeline")
    num_inference_steps: int = setting(
        50,
        "denoising steps for sample sheets, and default of the saved pipeline; fewer is faster",
        COUNT,
        may_change=True,
    )

    def __post_init__(self):
        check_ranges(self)
        if self.batch_size % self.gradient_accumulation_steps:
            raise UserError(
                f"--batch_size {self.batch_size} must be a multiple of "
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        if self.batch_size // self.gradient_accumulation_steps < self.smallest_batch:
            raise UserError(
                f"--batch_size {self.batch_size}, --gradient_accumulation_steps {self.gradient_accumulation_steps}: "
                "BatchNorm needs at least 2 images at a time; use a larger batch, accumulate less, or --unet compact"
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name, networks in TAKEN_BY.items():
            if self.unet not in networks and getattr(self, name) != defaults[name]:
                raise UserError(
                    f"--{name} {getattr(self, name)}: only for --unet {' or '.join(networks)}; give "
                    f"--{name} {defaults[name]} with --unet {self.unet}"
                )
        if self.formulation == "edm":
            self._check_edm(defaults)
        elif self.noise_scale != 1:
            raise UserError(f"--noise_scale {self.noise_scale:g}: only for --formulation edm; leave it at 1")
        if self.snr_gamma is not None and self.loss != "l2":
            raise UserError(f"--snr_gamma {self.snr_gamma:g}: its weights are those of --loss l2, not {self.loss}")
        if self.num_inference_steps > self.num_train_timesteps:
            raise UserError(
                f"--num_inference_steps {self.num_inference_steps}: must be from 1 to "
                f"--num_train_timesteps {self.num_train_timesteps}"
            )

    @property
    def smallest_batch(self) -> int:
        """The fewest images that can be computed at a time: two with BatchNorm."""
        return 2 if self.unet in ("base", "attention") else 1

    def _check_edm(self, defaults: dict[str, Any]) -> None:
        from hfgen.methods.schedules import EDM_SAMPLERS, NOT_OF_EDM  # imports diffusers, which takes seconds

        if self.unet != "compact":
            raise UserError("--formulation edm needs --unet compact: the other U-Nets embed discrete timesteps")
        if self.sampler not in EDM_SAMPLERS:
            raise UserError(f"--sampler {self.sampler}: with --formulation edm use {' or '.join(EDM_SAMPLERS)}")
        for name in NOT_OF_EDM:
            if getattr(self, name) != defaults[name]:
                raise UserError(
                    f"--{name} {getattr(self, name)}: EDM has its own; use --formulation ddpm, or leave it at "
                    f"{defaults[name]}"
                )
