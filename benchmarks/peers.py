"""Training steps of others, for comparison: their models, losses, optimizers and loops, without their data loaders.

Each `build_` function returns one step and the number of trained parameters. The images are already in memory, in the
peers' favour, except for pythae, whose loader is part of its trainer.
"""

from collections.abc import Callable
from typing import Any


Step = tuple[Callable[[], None], int]
LATENT_DIM, WIDTH, IMAGE_SIZE = 100, 64, 64
DATASET = "toy_paintings:256"


def build_denoising_diffusion(batch_size: int, mixed_precision: str) -> Step:
    """Build the step of `denoising_diffusion_pytorch.Trainer.train`: the same calls in the same order."""
    import torch
    from accelerate import Accelerator
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    torch.manual_seed(0)
    accelerator = Accelerator(split_batches=True, mixed_precision=mixed_precision, cpu=True)
    model = GaussianDiffusion(Unet(dim=64, dim_mults=(1, 2, 4, 8)), image_size=IMAGE_SIZE, timesteps=1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(model, beta=0.995, update_every=10)
    model, optimizer = accelerator.prepare(model, optimizer)
    images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)

    def step() -> None:
        model.train()
        with accelerator.autocast():
            loss = model(images)
            loss.item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step, sum(parameter.numel() for parameter in model.parameters())


def build_diffusers_example(batch_size: int, mixed_precision: str) -> Step:
    """Build a step as diffusers' example for unconditional images does it, with the U-Net of its default settings."""
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.nn.functional import mse_loss

    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=True)
    model = UNet2DModel(
        sample_size=IMAGE_SIZE,
        layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    learning_rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
    model, optimizer, learning_rate = accelerator.prepare(model, optimizer, learning_rate)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1

    def step() -> None:
        model.train()
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, 1000, (batch_size,))
        predicted = model(scheduler.add_noise(images, noise, timesteps), timesteps).sample
        loss = mse_loss(predicted.float(), noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        learning_rate.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        loss.detach().item()

    return step, sum(parameter.numel() for parameter in model.parameters())


def plain_generator() -> Any:
    """Build DCGAN's generator, as a sequence of layers."""
    from torch import nn

    widths = [8 * WIDTH, 4 * WIDTH, 2 * WIDTH, WIDTH]
    layers = [nn.ConvTranspose2d(LATENT_DIM, widths[0], 4, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(True)]
    for wide, narrow in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(WIDTH, 3, 4, 2, 1, bias=False), nn.Tanh())


def plain_discriminator() -> Any:
    """Build DCGAN's discriminator, as a sequence of layers."""
    from torch import nn

    widths = [WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH]
    layers = [nn.Conv2d(3, WIDTH, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
    for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, bias=False))


def build_plain_dcgan(batch_size: int, bf16: bool) -> Step:
    """Build a step as the well-known tutorials do it.

    NCHW, float32 or bf16 autocast, Adam, real and generated batch one after the other, the generator's update through
    the whole discriminator.
    """
    import torch
    from torch import nn

    torch.manual_seed(0)
    generator, discriminator = plain_generator(), plain_discriminator()
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    criterion = nn.BCEWithLogitsLoss()
    images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    ones, zeros = torch.ones(batch_size), torch.zeros(batch_size)

    def loss_of(batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return criterion(discriminator(batch).view(-1), labels)

    def step() -> None:
        discriminator.zero_grad()
        real_loss = loss_of(images, ones)
        real_loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            fake_images = generator(torch.randn(batch_size, LATENT_DIM, 1, 1))
        fake_loss = loss_of(fake_images.detach(), zeros)
        fake_loss.backward()
        optimizer_d.step()
        generator.zero_grad()
        generator_loss = loss_of(fake_images, ones)
        generator_loss.backward()
        optimizer_g.step()
        (real_loss + fake_loss).item(), generator_loss.item()

    networks = (generator, discriminator)
    return step, sum(weight.numel() for network in networks for weight in network.parameters())


def pythae_networks(blocks: int) -> tuple[Any, Any]:
    """Build an encoder and a decoder as pythae's documentation does, of the layers of hfgen's preset."""
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from torch import nn

    widths = [64, 128, 256, 512]

    class Residual(nn.Module):
        def __init__(self, channels: int):
            super().__init__()
            layers = []
            for _ in range(2):
                layers += [nn.BatchNorm2d(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
            self.layers = nn.Sequential(*layers)

        def forward(self, hidden_states):
            return hidden_states + self.layers(hidden_states)

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            layers = []
            for fine, coarse in zip([3, *widths[:-1]], widths, strict=True):
                layers += [nn.Conv2d(fine, coarse, 4, 2, 1), *(Residual(coarse) for _ in range(blocks))]
                layers += [nn.BatchNorm2d(coarse), nn.SiLU()]
            self.layers = nn.Sequential(*layers, nn.Flatten())
            self.embedding = nn.Linear(widths[-1] * 16, LATENT_DIM)
            self.log_var = nn.Linear(widths[-1] * 16, LATENT_DIM)

        def forward(self, images):
            features = self.layers(images)
            return ModelOutput(embedding=self.embedding(features), log_covariance=self.log_var(features))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            layers = [nn.Linear(LATENT_DIM, widths[-1] * 16), nn.Unflatten(1, (widths[-1], 4, 4))]
            for coarse, fine in zip(widths[::-1], [*widths[-2::-1], 3], strict=True):
                layers += [*(Residual(coarse) for _ in range(blocks)), nn.BatchNorm2d(coarse), nn.SiLU()]
                layers += [nn.ConvTranspose2d(coarse, fine, 4, 2, 1)]
            self.layers = nn.Sequential(*layers, nn.Tanh())

        def forward(self, latents):
            return ModelOutput(reconstruction=self.layers(latents))

    return Encoder(), Decoder()


def build_pythae(batch_size: int, blocks: int, folder: str) -> Step:
    """Build the body of the loop of `pythae.trainers.BaseTrainer.train_step`, with its loader, model and optimizer."""
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    from hfgen.data.settings import DataSettings
    from hfgen.data.store import load_images

    torch.manual_seed(0)
    store = load_images(DataSettings(dataset=DATASET, sample_size=IMAGE_SIZE))
    images = torch.stack([torch.tensor(store[index]).permute(2, 0, 1) / 127.5 - 1 for index in range(len(store))])
    model = VAE(VAEConfig(input_dim=(3, IMAGE_SIZE, IMAGE_SIZE), latent_dim=LATENT_DIM), *pythae_networks(blocks))
    config = BaseTrainerConfig(
        output_dir=folder, per_device_train_batch_size=batch_size, learning_rate=1e-3, optimizer_cls="AdamW"
    )
    trainer = BaseTrainer(model, BaseDataset(images, torch.zeros(len(images))), training_config=config)
    trainer.prepare_training()
    trainer.model.train()

    def endless():
        while True:
            yield from trainer.train_loader

    batches = endless()

    def step() -> None:
        inputs = trainer._set_inputs_to_device(next(batches))
        with trainer.amp_context:
            output = trainer.model(inputs, epoch=1, dataset_size=len(images), uses_ddp=False)
        trainer._optimizers_step(output)
        output.loss.item()

    return step, sum(weight.numel() for weight in model.parameters())
