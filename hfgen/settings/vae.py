"""Settings of VAE training: network, likelihood and learned term, optimizer, ex-post density."""

from dataclasses import dataclass, fields
from typing import Literal

from hfgen.config import check_ranges, setting
from hfgen.errors import UserError
from hfgen.ranges import CHANNELS, COUNT, COUNT_OR_NONE, DECAY, MAX_CHANNELS, NOT_NEGATIVE, POSITIVE, Range
from hfgen.texts import counted


@dataclass
class VAESettings:
    """Settings of the method."""

    _argument_group_name = "method"

    latent_dim: int = setting(100, "dimension of the latents", COUNT)
    block_out_channels: list[int] | None = setting(
        None,
        "channels of each level, finest first; each halves the resolution; unset: doubling from 64 to 512",
        CHANNELS,
    )
    layers_per_block: int = setting(
        0, "residual blocks per level, in encoder and decoder; try 1 or 2 if a slower run is fine", Range(0, 100)
    )
    upsampling: Literal["transposed", "nearest"] = setting(
        "transposed", "upsampling in the decoder; nearest: upsample, then convolve, which avoids grid artefacts"
    )
    refine_channels: int = setting(
        0,
        "channels of two convolutions at full resolution at the end of the decoder; 0: none; 32: finer texture with "
        "--adversarial_weight",
        Range(0, MAX_CHANNELS),
    )
    normalization: Literal["batch", "group"] = setting("batch", "normalization; batch: faster; group: small batches")
    reconstruction: Literal["calibrated", "mse", "l1", "bce"] = setting(
        "calibrated",
        "reconstruction loss; calibrated: Gaussian with the best-fitting variance; mse, l1: scale fixed to 1; bce: "
        "binary cross-entropy",
    )
    kl_weight: float = setting(1.0, "weight of the KL term; 1 is the ELBO, other values give a beta-VAE", NOT_NEGATIVE)
    feature_weight: float = setting(
        0.0,
        "strength of a loss on a discriminator's features, as gradient norm relative to the likelihood's; 0: off",
        NOT_NEGATIVE,
    )
    adversarial_weight: float = setting(
        0.0, "strength of an adversarial loss, as gradient norm relative to the likelihood's; 0: off", NOT_NEGATIVE
    )
    discriminator_channels: int = setting(
        32,
        "channels at the finest level of the discriminator, for --feature_weight and --adversarial_weight",
        CHANNELS,
    )
    learning_rate_d: float = setting(
        2e-4, "Adam learning rate of the discriminator, and of the decoder after --learned_term_start", POSITIVE
    )
    learned_term_start: int = setting(
        0,
        "updates with likelihood and KL only, before the discriminator is added; after that the encoder is frozen and "
        "only the decoder is trained; 0: use the discriminator from the first update, for both",
        COUNT_OR_NONE,
    )
    kl_warmup_steps: int = setting(0, "updates over which the KL weight rises from 0", COUNT_OR_NONE)
    free_bits: float = setting(
        0.0, "nats of KL per latent dimension that are not penalised (the paper's lambda)", NOT_NEGATIVE
    )
    batch_size: int = setting(64, "images per update and process", Range(1, 100_000))
    learning_rate: float = setting(1e-3, "AdamW learning rate, after the warm-up", POSITIVE)
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine", "linear"] = setting(
        "constant_with_warmup", "learning rate schedule"
    )
    lr_warmup_steps: int = setting(
        200, "updates over which the learning rate rises from 0, except with --lr_scheduler constant", COUNT_OR_NONE
    )
    adam_beta1: float = setting(0.9, "AdamW's beta1: decay of the mean gradient", DECAY)
    adam_beta2: float = setting(0.999, "AdamW's beta2: decay of the mean squared gradient", DECAY)
    weight_decay: float = setting(0.0, "AdamW weight decay; 0 is plain Adam", NOT_NEGATIVE)
    max_grad_norm: float = setting(
        1.0, "gradients of the loss in nats per dimension are clipped to this norm", POSITIVE
    )
    ema_decay: float = setting(
        0.999, "EMA decay per update; the EMA weights are sampled and saved; lower it for short runs", DECAY
    )
    density_components: int = setting(
        10,
        "maximum Gaussians in the ex-post density fitted to the latents after training; 0: fit none",
        COUNT_OR_NONE,
        may_change=True,
    )
    density: Literal["mixture", "flow", "auto"] = setting(
        "mixture",
        "ex-post density; flow: takes minutes to fit; auto: the one with the higher likelihood on held-out latents",
        may_change=True,
    )
    watch_every: int = setting(250, "steps between checks for posterior collapse; 0: off", COUNT_OR_NONE)
    on_collapse: Literal["rollback", "stop", "warn"] = setting(
        "rollback",
        "what to do on posterior collapse; rollback: restart from the last good checkpoint at half the learning rate",
        may_change=True,
    )
    max_rollbacks: int = setting(3, "stop the run after this many rollbacks", COUNT_OR_NONE, may_change=True)

    def __post_init__(self):
        check_ranges(self)
        if self.batch_size < 2 and self.normalization == "batch":
            raise UserError("--batch_size 1: BatchNorm needs at least 2 images; use --normalization group")
        if self.batch_size < 2 and self.adversarial_weight > 0:
            raise UserError("--batch_size 1: --adversarial_weight mixes latents of different images; use 2 or more")
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Raise a `UserError` for settings that would be ignored."""
        if not self.learns_a_term:
            for field in fields(self):
                if field.name in ("discriminator_channels", "learning_rate_d", "learned_term_start"):
                    if getattr(self, field.name) != field.default:
                        raise UserError(f"--{field.name}: needs --feature_weight or --adversarial_weight")
        if self.density != "mixture" and (self.density_components == 0 or self.latent_dim == 1):
            raise UserError(
                f"--density {self.density}: needs --latent_dim 2 or more and --density_components 1 or more; 0 "
                "switches all fitting off"
            )

    @property
    def learns_a_term(self) -> bool:
        """Whether there is a discriminator."""
        return self.feature_weight > 0 or self.adversarial_weight > 0


def default_learned_term_start(max_train_steps: int) -> int:
    """Return the update after which the learned term begins in a run of this length: as early as in `vae_learned`."""
    return max_train_steps * 4 // 9


def check_length(learned_term_start: int, max_train_steps: int) -> None:
    """Raise a `UserError` if a run would end before its learned term begins: it would be a plain VAE."""
    if learned_term_start >= max_train_steps > 0:
        raise UserError(
            f"--learned_term_start {learned_term_start}: the run ends after {counted(max_train_steps, 'update')}, "
            "before the learned term begins; use --learned_term_start "
            f"{default_learned_term_start(max_train_steps)}, or train a VAE without this term"
        )
