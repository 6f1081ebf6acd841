"""Settings of GAN training: networks, adversarial loss, optimizers, collapse watch."""

from dataclasses import dataclass
from typing import Literal

from hfgen.config import check_ranges, setting
from hfgen.errors import UserError
from hfgen.ranges import CHANNELS, COUNT, COUNT_OR_NONE, DECAY, NOT_NEGATIVE, POSITIVE, Range


@dataclass
class GANSettings:
    """Settings of the method."""

    _argument_group_name = "method"

    network: Literal["dcgan", "dcgan256", "sngan", "resnet"] = setting(
        "dcgan",
        "architecture; dcgan: convolutions, sizes that are powers of two from 8; dcgan256: large kernels, for "
        "paintings; sngan: SNGAN's convolutional network; resnet: SNGAN's residual network",
    )
    discriminator_network: Literal["dcgan", "dcgan256", "sngan", "resnet"] | None = setting(
        None, "architecture of the discriminator; unset: same as --network"
    )
    normalization: Literal["batch", "spectral", "instance", "none"] = setting(
        "batch", "normalization in a dcgan or sngan discriminator; fixed in the other networks"
    )
    spectral_scale: float = setting(
        1.0, "multiplies the discriminator's weights with --normalization spectral; above 1 it learns faster", POSITIVE
    )
    upsampling: Literal["transposed", "nearest"] = setting(
        "transposed", "upsampling in the sngan generator; nearest: nearest-neighbour upsampling, then a convolution"
    )
    latent_dim: int = setting(100, "dimension of the latents", COUNT)
    generator_channels: int | None = setting(
        None,
        "channels of the generator's narrowest layer; unset: 64, or 32 with dcgan256; more is slower",
        CHANNELS,
        alias="--ngf",
    )
    discriminator_channels: int | None = setting(
        None,
        "channels of the discriminator's narrowest layer; unset: 64, or 32 with dcgan256; more is slower",
        CHANNELS,
        alias="--ndf",
    )
    loss: Literal[
        "non_saturating",
        "least_squares",
        "hinge",
        "wasserstein",
        "relativistic",
        "relativistic_average",
        "relativistic_average_least_squares",
        "relativistic_average_hinge",
    ] = setting("non_saturating", "adversarial loss; wasserstein needs --gradient_penalty_weight")
    label_smoothing: float = setting(
        0.0,
        "label of real images is 1 minus this, for --loss non_saturating and least_squares",
        Range(0, 0.5, below=True),
    )
    gradient_penalty_weight: float = setting(
        0.0, "lambda of WGAN-GP's gradient penalty (10 in the paper); 0: off", NOT_NEGATIVE
    )
    r1_weight: float = setting(0.0, "gamma of R1, the gradient penalty at real images; 0: off", NOT_NEGATIVE)
    r2_weight: float = setting(0.0, "gamma of R2, the gradient penalty at generated images; 0: off", NOT_NEGATIVE)
    n_critic: int = setting(1, "discriminator updates per generator update", COUNT)
    batch_size: int = setting(64, "images per update and process", Range(1, 100_000))
    learning_rate: float = setting(2e-4, "Adam learning rate of both networks", POSITIVE)
    learning_rate_d: float | None = setting(
        None, "learning rate of the discriminator; unset: --learning_rate", POSITIVE
    )
    adam_beta1: float = setting(0.5, "Adam's beta1: decay of the mean gradient", DECAY)
    adam_beta2: float = setting(0.999, "Adam's beta2: decay of the mean squared gradient", DECAY)
    ema_decay: float = setting(
        0.999,
        "EMA decay per update; the EMA generator is sampled and saved; lower it for short runs",
        DECAY,
    )
    statistics_images: int = setting(
        1024,
        "generated images for recomputing BatchNorm's statistics before the EMA generator is sampled, scored or "
        "saved; 0: average the training statistics",
        COUNT_OR_NONE,
        may_change=True,
    )
    augment: Literal["auto", "none", "diffaugment", "ada"] = setting(
        "auto",
        "augment the discriminator's input; diffaugment: always; ada: more as it overfits; auto: depends on the "
        "number of images",
    )
    on_collapse: Literal["rollback", "stop", "warn"] = setting(
        "rollback",
        "what to do when training collapses; rollback: restart from the last good checkpoint at half the "
        "learning rates",
        may_change=True,
    )
    max_rollbacks: int = setting(3, "stop the run after this many rollbacks", COUNT_OR_NONE, may_change=True)
    watch_every: int = setting(250, "steps between checks for collapse; 0: off", COUNT_OR_NONE)

    def __post_init__(self):
        check_ranges(self)
        if self.batch_size < 2:
            raise UserError("--batch_size 1: BatchNorm needs at least 2 images")
        if self.label_smoothing or self.augment == "ada":
            self._check_loss()
        if self.is_penalised and self.normalizes_batches:
            raise UserError(
                "gradient penalties need a discriminator without BatchNorm: --normalization "
                "instance, spectral or none with --network dcgan or sngan, or --network resnet"
            )
        has_choice = self.discriminator_architecture in ("dcgan", "sngan")
        if self.normalization != "batch" and not has_choice:
            raise UserError(
                f"--normalization {self.normalization}: only a dcgan or sngan discriminator has a choice; with "
                f"{self.discriminator_architecture}, whose normalization is fixed, give --normalization batch"
            )
        if self.spectral_scale != 1 and not (has_choice and self.normalization == "spectral"):
            raise UserError(
                f"--spectral_scale {self.spectral_scale:g} needs --normalization spectral and a dcgan or sngan "
                "discriminator; with any other use --spectral_scale 1"
            )
        if self.upsampling != "transposed" and self.network != "sngan":
            raise UserError(
                f"--upsampling {self.upsampling}: only --network sngan has it; with --network {self.network} add "
                "--upsampling transposed"
            )
        if self.loss == "wasserstein" and not self.gradient_penalty_weight:
            raise UserError(
                "--loss wasserstein needs --gradient_penalty_weight (10 in the paper): it diverges without it"
            )

    def _check_loss(self) -> None:
        from hfgen.losses.gan import GAN_LOSSES  # imports torch, which takes seconds

        loss = GAN_LOSSES[self.loss]
        if self.label_smoothing and not loss.has_labels:
            raise UserError(f"--label_smoothing: the {self.loss} loss has no labels to smooth")
        if self.augment == "ada" and loss.boundary is None:
            raise UserError(
                f"--augment ada needs a loss that measures how much the discriminator overfits; {self.loss} does not: "
                "use --augment diffaugment"
            )

    @property
    def is_penalised(self) -> bool:
        """Whether the discriminator's loss includes a gradient penalty."""
        return max(self.gradient_penalty_weight, self.r1_weight, self.r2_weight) > 0

    @property
    def discriminator_architecture(self) -> str:
        """The discriminator's architecture."""
        return self.discriminator_network or self.network

    @property
    def normalizes_batches(self) -> bool:
        """Whether the discriminator has BatchNorm, so that its logits depend on the batch."""
        if self.discriminator_architecture in ("dcgan", "sngan"):
            return self.normalization == "batch"
        return self.discriminator_architecture == "dcgan256"
