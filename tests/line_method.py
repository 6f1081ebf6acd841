"""A method of three lines for tests of the rails: a straight line fitted to points."""

import json
from dataclasses import dataclass

import torch

from hfgen.config import setting
from hfgen.training.run import Run
from hfgen.training.settings import RunSettings


@dataclass
class LineSettings:
    learning_rate: float = setting(0.1, "of SGD")


class CountedBatches:
    """Hands out 1, 2, 3, ...: a source with a position."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return torch.tensor([float(self.position)])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.position = state_dict["position"]


class LinePipeline:
    """Saves the weight, as a diffusers pipeline saves its network."""

    def __init__(self, network):
        self.network = network

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
        (folder / "weight.txt").write_text(repr(self.network.weight.item()))


def fit(
    folder,
    *,
    each_step=lambda run: None,
    before=lambda run: None,
    after=lambda run: None,
    digest="d",
    line=None,
    on_collapse="stop",
    images_per_step=1,
    **settings,
):
    """Run the method and return the run and its network."""
    defaults = {"max_train_steps": 6, "checkpoint_every": 2, "log_every": 1, "report_to": "none", "cpu": True}
    settings = RunSettings(output_dir=str(folder), **{**defaults, **settings})
    with Run(settings, line or LineSettings()) as run:
        run.plan(images_per_step, images_per_epoch=4)
        network = torch.nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(network.parameters(), lr=(line or LineSettings()).learning_rate, momentum=0.9)
        batches = CountedBatches()
        stateful = {"network": network, "optimizer": optimizer}
        run.restore(stateful, batches, LinePipeline(network), digest, on_collapse, max_rollbacks=2)
        run.learning_rate = lambda: optimizer.param_groups[0]["lr"]
        before(run)
        for _ in run.steps():
            point = next(batches) / 6 + torch.randn(1, generator=run.generator("noise")) + torch.randn(1) * 0.1
            loss = (network(point) - 2 * point).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log({"loss": loss}, {"learning_rate": 0.1})
            each_step(run)
        after(run)
    return run, network


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def status(folder):
    return json.loads((folder / "status.json").read_text())
