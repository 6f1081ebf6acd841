"""The state that a checkpoint stores: everything that affects how training continues."""

import os
import textwrap
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hfgen.errors import UserError
from hfgen.files import read_json
from hfgen.run_files import INTAKE_FILE
from hfgen.texts import counted, say
from hfgen.training import checkpoints


# Learning rates are multiplied by this at each rollback.
ROLLBACK_FACTOR = 0.5


class Stateful(Protocol):
    """What a checkpoint can store: networks, EMA, optimizers, learning-rate schedules, data positions."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...  # noqa: D102


class SavablePipeline(Protocol):
    """The part of a diffusers pipeline that a run uses."""

    def save_pretrained(self, save_directory: str | os.PathLike) -> Any: ...  # noqa: D102


class RunState:
    """The parts of a run that a checkpoint stores.

    The hyperparameters of optimizers and learning-rate schedules are not restored: they are those of the settings,
    halved by the rollbacks so far. Unchanged settings give the same numbers, bit for bit.

    Args:
        parts: networks (unwrapped), EMA, optimizers and the like by name, as the settings say.
        batches: the batch iterator, whose state may differ between processes.
        pipeline: samples with the EMA network; saved with every checkpoint.
        data_digest: changes when the training images change.
        accelerator: gives the number of processes and the gradient scaler.
        may_lack: by name of a part, the last step whose checkpoints may lack it; it then stays as initialised.
    """

    def __init__(
        self,
        parts: dict[str, Stateful],
        batches: Stateful,
        pipeline: SavablePipeline,
        data_digest: str,
        accelerator: Accelerator,
        may_lack: dict[str, int] | None = None,
    ):
        self._may_lack = may_lack or {}
        self._parts, self._batches, self.pipeline = dict(parts), batches, pipeline
        if accelerator.scaler is not None:
            self._parts["grad_scaler"] = accelerator.scaler
        self._hyperparameters = {
            name: [{key: value for key, value in group.items() if key != "params"} for group in part.param_groups]
            for name, part in self._parts.items()
            if hasattr(part, "param_groups")
        }
        self._base_rates = {
            name: list(part.base_lrs) for name, part in self._parts.items() if hasattr(part, "base_lrs")
        }
        self._accelerator = accelerator
        self._agreement = {"num_processes": accelerator.num_processes, "data_digest": data_digest}

    def not_finite(self) -> list[str]:
        """Return the names of the networks that have a non-finite parameter or buffer."""
        return [name for name, part in self._parts.items() if not _is_finite(part)]

    def save_final_pipeline(self, folder: Path, step: int, rollbacks: int) -> None:
        """Save the pipeline in the run's folder, with the steps and rollbacks before it; main process only."""
        checkpoints.save_final_pipeline(folder, self.pipeline.save_pretrained, step, rollbacks)

    def save(self, folder: Path, progress: dict[str, Any], total_limit: int) -> None:
        """Write a checkpoint; all processes must call this.

        Args:
            folder: the run's `checkpoints` folder.
            progress: plain values to save with it, including "step".
            total_limit: number of checkpoints to keep.
        """
        batches_states = gather_object([self._batches.state_dict()])
        if self._accelerator.is_main_process:
            if "commit" in batches_states[0]:  # of a stream, which must be known before it is opened again
                progress = {**progress, "commit": batches_states[0]["commit"]}
            state = {name: part.state_dict() for name, part in self._parts.items()}
            checkpoints.save_checkpoint(
                folder,
                {**progress, "torch_version": torch.__version__, **self._agreement},
                {**state, "batches": batches_states},
                self.pipeline.save_pretrained,
                total_limit,
            )
        self._accelerator.wait_for_everyone()

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Load a checkpoint and return the plain values saved with it.

        Raises:
            UserError: if it was made with other data, another number of processes or other networks, or is damaged.
        """
        progress = checkpoints.load_progress(checkpoint)
        if progress["data_digest"] != self._agreement["data_digest"]:
            raise UserError(
                f"--dataset: these are not the images that {checkpoint} was trained on{_number_before(checkpoint)}; "
                "give the same images, without any that were added since, or start a new run from its weights "
                "(--init_from)"
            )
        for key, value in self._agreement.items():
            if progress[key] != value:
                raise UserError(
                    f"{checkpoint}: {key} was {progress[key]!r} and is now {value!r}; it must not change on resume"
                )
        if progress["torch_version"] != torch.__version__ and self._accelerator.is_main_process:
            say(
                f"note: the checkpoint is from torch {progress['torch_version']}, and this is {torch.__version__}: "
                "the run continues, but not bit for bit as it would have"
            )
        state = checkpoints.load_state(checkpoint)
        for name, part in self._parts.items():
            if name == "grad_scaler" and name not in state:
                continue  # fp16 only now: it finds its scale again within a few steps
            if name not in state and progress["step"] <= self._may_lack.get(name, -1):
                continue  # as initialised
            self._load_part(checkpoint, name, part, state)
            _lay_out_like_parameters(part)
        self._use_base_rates()
        self.scale_learning_rates(ROLLBACK_FACTOR ** progress.get("rollbacks", 0))
        self._batches.load_state_dict(state["batches"][self._accelerator.process_index])
        return progress

    def _load_part(self, checkpoint: Path, name: str, part: Stateful, state: dict[str, Any]) -> None:
        """Load one part; raise a `UserError` if the checkpoint has another one or none."""
        if name not in state:
            raise UserError(f"--resume {checkpoint}: it has no {name}; it was trained by another method")
        own = self._hyperparameters.get(name)
        try:
            saved = state[name]
            if own is not None:
                groups = zip(saved["param_groups"], own, strict=True)
                saved = {**saved, "param_groups": [{"params": group["params"], **values} for group, values in groups]}
            part.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = textwrap.shorten(str(error), 250)
            raise UserError(
                f"--resume {checkpoint}: its {name} does not match the current settings ({reason})"
            ) from error

    def _use_base_rates(self) -> None:
        """Let each schedule set the learning rates of its restored step, from the base rates of the settings."""
        for name, base_rates in self._base_rates.items():
            schedule: Any = self._parts[name]
            schedule.base_lrs = list(base_rates)
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            for group, rate, factor in zip(schedule.optimizer.param_groups, base_rates, factors, strict=True):
                group["lr"] = rate * factor

    def scale_learning_rates(self, factor: float) -> None:
        """Multiply the learning rate of every optimizer by a factor."""
        for part in self._parts.values():
            for group in getattr(part, "param_groups", []):
                group["lr"] *= factor
            if hasattr(part, "base_lrs"):  # a schedule, which sets the learning rate at each step
                part.base_lrs = [rate * factor for rate in part.base_lrs]


def _lay_out_like_parameters(part: Stateful) -> None:
    """Give an optimizer's state the memory format of its parameters; the checkpoint may have used another one.

    PyTorch's fused optimizers iterate over the memory of both in parallel and would pair the wrong elements.
    """
    for parameter, state in getattr(part, "state", {}).items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _number_before(checkpoint: Path) -> str:
    """Return how many images the run of a checkpoint had, in brackets, if it kept their report."""
    report = checkpoint.parents[1] / INTAKE_FILE
    if not report.is_file():
        return ""
    return f" ({counted(read_json(report, ('images',))['images'], 'image')} then)"


def _is_finite(part: Stateful) -> bool:
    """Whether all floating-point parameters and buffers of a network are finite; True if it is not a network."""
    if not isinstance(part, torch.nn.Module):
        return True
    tensors = [tensor for tensor in part.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()) if tensors else True
