"""A network that cannot be wrong: it knows the clean image. Any correct sampler draws that image with it."""

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput


class OracleUNet(ModelMixin, ConfigMixin):
    """Predicts the noise, the clean image or the velocity without error; it refuses timesteps that were not trained.

    Args:
        sample_size: height and width.
        in_channels: channels.
        prediction_type: "epsilon", "sample" or "v_prediction".
        num_train_timesteps: of the training.
    """

    @register_to_config
    def __init__(
        self, sample_size: int, in_channels: int, prediction_type: str = "epsilon", num_train_timesteps: int = 1000
    ):
        super().__init__()
        self.register_buffer("clean_image", torch.zeros(in_channels, sample_size, sample_size))
        self.register_buffer("alphas_cumprod", torch.zeros(num_train_timesteps))

    @classmethod
    def that_knows(cls, clean_image: torch.Tensor, schedule: DDPMScheduler) -> "OracleUNet":
        """Return the oracle of a clean image `(channels, size, size)` that was trained with a schedule."""
        config = schedule.config
        oracle = cls(clean_image.shape[1], clean_image.shape[0], config.prediction_type, config.num_train_timesteps)
        oracle.clean_image.copy_(clean_image)
        oracle.alphas_cumprod.copy_(schedule.alphas_cumprod)
        return oracle

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | int, return_dict: bool = True) -> UNet2DOutput:
        timestep = int(timestep)
        if not 0 <= timestep < len(self.alphas_cumprod):
            raise IndexError(f"timestep {timestep} is not from 0 to {len(self.alphas_cumprod) - 1}")
        alpha, clean = self.alphas_cumprod[timestep], self.clean_image.expand_as(sample)
        noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return UNet2DOutput({"epsilon": noise, "sample": clean, "v_prediction": velocity}[self.config.prediction_type])
