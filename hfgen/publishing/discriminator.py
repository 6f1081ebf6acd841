"""The discriminator of a run, published beside the pipeline, so that others can train it further on their images."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from hfgen.errors import UserError
from hfgen.families import image_network
from hfgen.inference.opening import load_discriminator
from hfgen.texts import one_line
from hfgen.training.checkpoints import checkpoint_of, list_checkpoints, load_state


def discriminator_of(
    pipeline: DiffusionPipeline, folder: Path, run: Path | None, step: int | None
) -> dict[str, torch.Tensor]:
    """Return the weights of the discriminator that a pipeline was trained against, by name.

    Args:
        pipeline: with the weights as trained.
        folder: where it was loaded from; may have been published with its discriminator.
        run: of the pipeline, if there is one.
        step: of the run, at which the pipeline was saved.

    Raises:
        UserError: if there was no discriminator, or the run has kept no checkpoint of this step.
    """
    if (published := load_discriminator(str(folder))) is not None:
        return published
    if run is None or step is None:
        raise UserError(f"--discriminator: {folder} has none, and is not part of a run; leave out --discriminator")
    checkpoints = list_checkpoints(run / "checkpoints")
    kept = checkpoint_of(run / "checkpoints", step)
    if kept not in checkpoints:
        names = ", ".join(str(one) for one in checkpoints) or "none"
        raise UserError(
            f"--discriminator: {run} has deleted its checkpoint of step {step:,}; publish one of those that it has "
            f"({names}), or leave out --discriminator"
        )
    try:
        state = load_state(kept)
    except UserError as error:
        raise UserError(f"--discriminator: {one_line(error)}, or leave out --discriminator") from error
    if "discriminator" not in state:
        raise UserError(f"--discriminator: {run} was trained without one; leave out --discriminator")
    # After a rollback a run passes the same steps again, with other weights.
    parameters = image_network(pipeline).named_parameters()
    if not all(torch.equal(state["ema"][f"module.{name}"], one.detach().cpu()) for name, one in parameters):
        raise UserError(
            f"--discriminator: {kept} has other weights than {folder}; publish the checkpoint, or leave out "
            "--discriminator"
        )
    return {name: weights.contiguous() for name, weights in state["discriminator"].items()}  # safetensors need it
