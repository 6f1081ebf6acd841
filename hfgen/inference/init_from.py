"""Starting from trained weights: `--init_from`, a run, one of its checkpoints, a pipeline or a Hub repo."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hfgen.errors import UserError
from hfgen.families import image_network
from hfgen.inference.opening import load_discriminator, open_pipeline
from hfgen.methods.schedules import is_edm
from hfgen.models.unet_compact import UNetCompact
from hfgen.texts import say
from hfgen.training.checkpoints import STATE_FILE, find_checkpoint, list_checkpoints, load_state
from hfgen.training.run import Run


Weights = Mapping[str, Any]


def start_from(
    run: Run, networks: dict[str, nn.Module], ema: AveragedModel, scheduler: SchedulerMixin | None = None
) -> list[str]:
    """Load the weights that `--init_from` names into the new networks of a run and their average, if it is given.

    A run and a checkpoint have the average and all networks that were trained. A pipeline, also the `best/` of a run,
    has the average of the first network, which both then start from, and may have been published with its
    discriminator. Optimizers and averaging start anew. Nothing is done in a resumed run.

    Args:
        run: the run.
        networks: by their names in a checkpoint; the first is the one that generates the images.
        ema: average of the first network.
        scheduler: of a DDPM: tells what its network predicts.

    Returns:
        The names of the networks whose weights were loaded.

    Raises:
        UserError: if there are no such weights, or those of another architecture or of another prediction.
    """
    source = run.settings.init_from
    if source is None or not run.is_new:
        return []
    checkpoint, first = _checkpoint_in(Path(source).expanduser()), next(iter(networks))
    if checkpoint is None:
        found = _weights_of_pipeline(source, first, "discriminator" in networks)
    else:
        found = load_state(checkpoint)
    if first not in found:
        raise UserError(f"--init_from {source}: {checkpoint or 'it'} is of another method: it has no {first}")
    average = {key.removeprefix("module."): value for key, value in found["ema"].items() if key != "n_averaged"}
    loaded = [name for name in networks if name in found]
    for name, weights in [*((name, found[name]) for name in loaded), (first, average)]:
        _require_same_shapes(source, name, weights, networks[name])
    if scheduler is not None:
        _require_same_prediction(run, source, checkpoint, scheduler)
    for name in loaded:
        networks[name].load_state_dict(found[name])
    ema.module.load_state_dict(average)
    ema.n_averaged.zero_()  # or the average would show the old images for thousands of updates
    if run.is_main:
        lacking = "the run had none" if checkpoint else "this pipeline comes without one"
        untrained = [f"; the {name} is new, because {lacking}" for name in networks if name not in found]
        say(f"initialised from {checkpoint or source}: {', '.join(loaded)} and EMA weights{''.join(untrained)}")
    return loaded


def _weights_of_pipeline(source: str, name: str, with_discriminator: bool) -> dict[str, Weights]:
    """Return the weights of a pipeline as a checkpoint has them; empty if its network has another name."""
    pipeline = open_pipeline(source, "cpu", plain=True)
    if name not in pipeline.components:
        return {}
    weights = image_network(pipeline).state_dict()
    found: dict[str, Weights] = {name: weights, "ema": weights}
    if with_discriminator and (weights := load_discriminator(source)) is not None:
        found["discriminator"] = weights
    return found


def _require_same_prediction(run: Run, source: str, checkpoint: Path | None, here: SchedulerMixin) -> None:
    """Raise a `UserError` if a network predicts something else, although all shapes are the same: it would unlearn.

    With another noise schedule it has only the noise levels to learn anew, which is said.
    """
    there = open_pipeline(str(checkpoint or source), "cpu", plain=True).scheduler
    told = [
        "--formulation edm" if is_edm(one) else f"--prediction_type {one.config.prediction_type}"
        for one in (there, here)
    ]
    if told[0] != told[1]:
        raise UserError(
            f"--init_from {source}: its network was trained with {told[0]}, and this run has {told[1]}; give the "
            "settings of that run (--preset RUN/training_config.json)"
        )
    noise = [_noise_of(one) for one in (there, here)]
    if run.is_main and noise[0] != noise[1]:
        say(
            f"note: --init_from {source}: its network was trained with {noise[0]}, and this run has {noise[1]}: it "
            "has to learn these noise levels anew"
        )


def _noise_of(scheduler: SchedulerMixin) -> str:
    """Return the settings of the noise schedule that a network was trained with; EDM has none."""
    if is_edm(scheduler):
        return "--formulation edm"
    config = scheduler.config
    kind = "cosine" if config.beta_schedule == "squaredcos_cap_v2" else config.beta_schedule
    return f"--beta_schedule {kind} --num_train_timesteps {config.num_train_timesteps}"


def _checkpoint_in(path: Path) -> Path | None:
    """Return the checkpoint that a path means: itself, or the newest one of a run; None if it is a pipeline."""
    if (path / STATE_FILE).is_file():
        return find_checkpoint(path.parent, str(path))
    return find_checkpoint(path / "checkpoints", "latest") if list_checkpoints(path / "checkpoints") else None


def _require_same_shapes(source: str, name: str, there: Weights, network: nn.Module) -> None:
    """Raise a `UserError` that names a tensor in which weights differ from those of a network, if any."""
    here, is_compact = network.state_dict(), isinstance(network, UNetCompact)
    hint = (
        "; if you change --sample_size, change --attention_size in proportion"
        if is_compact
        else ", and keep its --sample_size"
    )
    for key in [*here, *there]:
        shapes = [tuple(weights[key].shape) if key in weights else None for weights in (there, here)]
        if shapes[0] != shapes[1]:
            said = ["missing" if shape is None else "x".join(map(str, shape)) or "a number" for shape in shapes]
            raise UserError(
                f"--init_from {source}: its {name} has another architecture: {key} is {said[0]} there and {said[1]} "
                f"here; give the settings of that run (--preset RUN/training_config.json){hint}"
            )
