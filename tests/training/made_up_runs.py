"""Folders of runs that nobody has trained: logs, sheets of one colour, scores and events, as hfgen writes them."""

import dataclasses
import json

from PIL import Image

from hfgen.data.settings import DataSettings
from hfgen.settings.gan import GANSettings
from hfgen.training.settings import RunSettings


CLASSES = (RunSettings, DataSettings, GANSettings)
# Of the preset dcgan, to be compared with its reference curve.
LIKE_A_PRESET = {"sample_size": 64, "batch_size": 16, "evaluate_every": 1000, "evaluate_num_images": 1000}


def write_lines(file, lines):
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def colour(step):
    return (step // 100 % 256, 0, 255)


def made_up_run(folder, steps=4000, every=1000, log_every=100, status="running", events=(), **settings):
    """Make the folder of a GAN's run of 8,000 steps that has come to `steps`, at 16 images and 0.1 s each."""
    folder.mkdir(parents=True)
    values = {field.name: field.default for one in CLASSES for field in dataclasses.fields(one)}
    values |= {"output_dir": str(folder), "max_train_steps": 8000, "dataset": "photos"} | LIKE_A_PRESET | settings
    (folder / "training_config.json").write_text(json.dumps(values))
    seconds = 0.0 if status == "running" else steps / 10
    state = {"status": status, "reason": "", "step": 0 if status == "running" else steps, "seconds": seconds}
    (folder / "status.json").write_text(json.dumps(state))
    write_lines(folder / "launches.jsonl", [{"from_step": 0, "max_train_steps": 8000, "num_processes": 1}])
    write_lines(folder / "metrics.jsonl", [entry(step) for step in range(log_every, steps + 1, log_every)])
    scored = range(every, steps + 1, every)
    write_lines(folder / "evaluations.jsonl", [{"step": step, "copying": False, **scores(step)} for step in scored])
    write_lines(folder / "events.jsonl", [{"step": step, "event": "warning", "what": what} for step, what in events])
    (folder / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
    for kind, steps_shown in (("samples", range(0, steps + 1, every)), ("training_images", scored)):
        (folder / kind).mkdir()
        for step in steps_shown:
            Image.new("RGB", (34, 34), colour(step)).save(folder / kind / f"step-{step:08d}.png")
    return folder


def entry(step):
    losses = {"loss_d": 1.0, "loss_g": 2.0 + step / 1000, "d_real": 0.5, "d_fake": -0.5, "penalty": 0.0}
    return {"step": step, "images": 16 * step, "seconds": step / 10, **losses, "images_per_second": 160.0}


def scores(step):
    return {"fid": 200_000 / step, "kid": 0.1, "copies": 0.0}
