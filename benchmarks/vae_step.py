#!/usr/bin/env python
"""Training step of a VAE at 64px on the CPU: hfgen's script against pythae's trainer.

    python benchmarks/vae_step.py [--quick]

Both sides train on the same images with layers of the same sizes: pythae's trainer gets them as its encoder and its
decoder, in the way that its documentation shows. All sides are timed in turn, step by step; medians are compared.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable

from script_steps import Worker, describe, serve_script, serve_step, verdict


IMAGE_SIZE, LATENT_DIM = 64, 100
DATASET = "toy_paintings:512"
# At least.
OVER_PEER = 2.0


def peer_networks(blocks: int):
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


def build_peer(batch_size: int, blocks: int, folder: str) -> tuple[Callable[[], None], int]:
    """Return the body of the loop of `pythae.trainers.BaseTrainer.train_step`, and the number of parameters.

    Its data loader, model, loss and optimizer, and the same calls in the same order.
    """
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    from hfgen.data.settings import DataSettings
    from hfgen.data.store import load_images

    torch.manual_seed(0)
    store = load_images(DataSettings(dataset=DATASET, sample_size=IMAGE_SIZE))
    images = torch.stack([torch.tensor(store[index]).permute(2, 0, 1) / 127.5 - 1 for index in range(len(store))])
    model = VAE(VAEConfig(input_dim=(3, IMAGE_SIZE, IMAGE_SIZE), latent_dim=LATENT_DIM), *peer_networks(blocks))
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


def main() -> None:
    """Time both sides in turn, with and without residual blocks, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only test that it runs, not how fast")
    options = parser.parse_args()
    batch_size, rounds = (4, 2) if options.quick else (options.batch_size, options.rounds)

    rows, ratios = [], []
    for blocks in (1, 0):
        settings = ("--preset", "vae", "--dataset", DATASET, "--batch_size", str(batch_size))
        settings += ("--layers_per_block", str(blocks), "--num_epochs", "1000")
        with tempfile.TemporaryDirectory() as folder:
            peer = (build_peer, batch_size, blocks, f"{folder}/peer")
            workers = {
                "hfgen": Worker(serve_script, "train_vae", f"{folder}/run", *settings, threads=options.threads),
                "pythae": Worker(serve_step, *peer, threads=options.threads),
            }
            seconds: dict[str, list[float]] = {side: [] for side in workers}
            for worker in workers.values():  # not timed: first calls choose kernels and allocate the optimizers' state
                worker.step()
            for _ in range(rounds):
                for side, worker in workers.items():
                    seconds[side].append(worker.step())
            for side, worker in workers.items():
                worker.close()
                work, median = worker.work, statistics.median(seconds[side])
                rows.append(
                    f"| {side} | {blocks} | {work.parameters / 1e6:.2f}M | {work.flops / batch_size / 1e9:.2f} | "
                    f"{median:.3f} | {batch_size / median:.1f} |"
                )
        ratios.append((blocks, statistics.median(seconds["pythae"]) / statistics.median(seconds["hfgen"])))

    print(describe(options.threads, "diffusers", "accelerate", "pythae"))
    print(f"{IMAGE_SIZE}px, batch size {batch_size}, latents of {LATENT_DIM}, median of {rounds} rounds\n")
    print("| side | residual blocks per level | parameters | GFLOP per image | s per step | images/s |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))
    print("\n| hfgen | measured | at least | |\n|---|---|---|---|")
    for blocks, ratio in ratios:
        name = f"images/s over pythae's, {blocks} residual block(s) per level"
        print(f"| {name} | {ratio:.2f} | {OVER_PEER} | {verdict(ratio, OVER_PEER)} |")


if __name__ == "__main__":
    main()
