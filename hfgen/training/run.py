"""Run: the rails that every training script shares.

A script shows its whole step in a visible loop and calls `Run` for what is the same for all methods: the device, the
seed, the steps, the log, the sample sheets, the checkpoints and the end. `Run` never calls the script's code.
"""

import importlib.util
import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from PIL import Image

from hfgen.config import settings_to_dict
from hfgen.errors import UserError
from hfgen.files import append_json_line, write_atomically
from hfgen.hardware import (
    choose_mixed_precision,
    describe_environment,
    has_accelerator,
    keep_freed_memory,
    use_all_cores,
)
from hfgen.hub.upload import check_access
from hfgen.randomness import keyed_seed
from hfgen.training import checkpoints
from hfgen.training.folder import claim_folder, keep_settings, list_results, note_event, write_status
from hfgen.training.log import RunLog
from hfgen.training.settings import RunSettings, planned_steps
from hfgen.training.state import RunState, SavablePipeline, Stateful
from hfgen.training.stopping import GO_ON, INTERRUPTED, NOT_FINITE, REASONS, TIME_IS_UP, StopRequests, parse_duration
from hfgen.training.trouble import CollapseError, NonFiniteError, TrainingTroubleError


# After each return to an earlier checkpoint the learning rates are lower by this factor.
ROLLBACK_FACTOR = 0.5


class Run:
    """One training run in one folder.

    Use: `Run(...)`, `plan(...)`, build everything, `restore(...)`, then `for step in run.steps():` with one update
    and `run.log(...)` in its body, and `run.finish()` behind it.

    Args:
        settings: the settings of the rails.
        other_settings: those of data and method, written with the run and compared when it is resumed.

    Raises:
        UserError: if the folder holds something else, or `--resume` comes with changed settings.
    """

    def __init__(self, settings: RunSettings, *other_settings: Any):
        self.settings, self._all_settings = settings, (settings, *other_settings)
        self.output_dir = Path(settings.output_dir)
        self._checkpoints = self.output_dir / "checkpoints"
        self.step, self.rollbacks = 0, 0
        self._started = time.monotonic()
        self._seconds_before = 0.0  # of the earlier launches of a resumed run
        self._aside = 0.0  # of this step, spent on something that is no training
        self._stop_requests = StopRequests()
        if settings.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
            raise UserError("--report_to wandb: wandb is not installed; pip install wandb, or use tensorboard")
        self.accelerator = Accelerator(
            mixed_precision=choose_mixed_precision(settings.mixed_precision, settings.cpu),
            cpu=settings.cpu or not has_accelerator(),  # else several processes on CPUs would not find each other
            log_with=None if settings.report_to == "none" else settings.report_to,
            project_config=ProjectConfiguration(str(self.output_dir), logging_dir=str(self.output_dir / "logs")),
            # Copying BatchNorm's statistics at a forward pass would spoil an earlier pass of the same update.
            # While the main one draws and scores images the others wait for longer than they would by default.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(hours=3)),
            ],
        )
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
            use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", self.accelerator.num_processes)))
        self.is_main = self.accelerator.is_main_process
        self._checkpoint = self._open_folder()
        # All processes build the same weights; afterwards random numbers are keyed by (seed, step, process).
        torch.manual_seed(settings.seed)

    def plan(self, images_per_step: int, images_per_epoch: int | None) -> int:
        """Return the number of updates, from `--max_train_steps` or `--num_epochs`.

        Args:
            images_per_step: images of one update, over all processes.
            images_per_epoch: images of the data set; None for a stream, whose length nobody knows.

        Raises:
            UserError: if nothing but epochs is asked for, of a stream.
        """
        self.images_per_step = images_per_step
        self.max_train_steps = planned_steps(self.settings, images_per_step, images_per_epoch)
        return self.max_train_steps

    def restore(
        self,
        stateful: dict[str, Stateful],
        batches: Stateful,
        pipeline: SavablePipeline,
        data_digest: str,
        on_collapse: str = "stop",
        max_rollbacks: int = 0,
    ) -> None:
        """Say what a checkpoint carries, and load the one that the run resumes from.

        Args:
            stateful: networks (unwrapped), averages, optimizers and learning-rate schedules by name.
            batches: the source of batches, whose state may differ from process to process.
            pipeline: draws with the averaged network; saved with every checkpoint and at the end.
            data_digest: changes when the training images do.
            on_collapse: what follows trouble that a watch reports: "warn", "stop", or "rollback" to the newest good
                checkpoint with half the learning rates. A loss that is not finite stops the run or rolls it back.
            max_rollbacks: after so many the run stops.

        Raises:
            UserError: if the checkpoint was made with other data or another number of processes.
        """
        self._on_collapse, self._max_rollbacks = on_collapse, max_rollbacks
        self._good, self._trouble = True, None
        self._state = RunState(stateful, batches, pipeline, data_digest, self.accelerator)
        if self._checkpoint is not None:
            progress = self._state.load(self._checkpoint)
            self.step, self.rollbacks = progress["step"], progress.get("rollbacks", 0)
            self._good, self._seconds_before = progress.get("good", True), progress["seconds"]
            if self.is_main:
                print(f"resumed from {self._checkpoint} at step {self.step}")
        self._log = RunLog(self.output_dir, self.accelerator, self.images_per_step)
        self._log.open(self.step, self.max_train_steps, self.all_settings, self.settings.report_to)
        if self.is_main:
            keep_settings(self.output_dir, self._all_settings)  # those that may change, now that nothing is refused
            write_status(self.output_dir, "running", "", self.step, self.seconds)
            launch = {"from_step": self.step, **describe_environment(self.accelerator)}
            append_json_line(self.output_dir / "launches.jsonl", launch)

    def steps(self) -> Iterator[int]:
        """Yield the number of each update, from the one after the restored one to the last.

        Logs and saves checkpoints between updates. Ends early, with a checkpoint, on SIGTERM, on Ctrl-C and when
        the time is up. After a rollback the numbers go on from that of the checkpoint.

        Raises:
            TrainingTroubleError: if a loss or a weight is not finite, or a watch reported trouble, and there is no way
                back.
        """
        with self._log.bar, self._stop_requests.caught():
            while self.step < self.max_train_steps:
                step_started, self._aside = time.monotonic(), 0.0
                # What draws from the global generator (dropout, say) is a function of (seed, step, process) as well.
                self._seed_global_generator(keyed_seed(*self._random_key()))
                self.step += 1
                yield self.step
                try:
                    if self._between_updates(time.monotonic() - step_started - self._aside):
                        break
                except TrainingTroubleError as trouble:
                    self._roll_back(trouble)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a random number generator on the run's device for one use within the current update.

        It is a function of (seed, step, process, purpose) and of nothing that happened before, so a resumed run draws
        what an uninterrupted one would have drawn.
        """
        return torch.Generator(self.device).manual_seed(keyed_seed(*self._random_key(), purpose))

    def log(self, losses: dict[str, torch.Tensor], notes: dict[str, float] | None = None) -> None:
        """Note the losses of this update; nothing is read off the device.

        Args:
            losses: scalars by name; every `log_every` steps their means over steps and processes are written.
            notes: plain numbers, such as the learning rate, of which the last is written.
        """
        self._log.add(losses, notes or {})

    def report(self, good: bool, trouble: str | None = None, warning: str | None = None) -> None:
        """Take the verdict of a watch on this update; all processes must call this, the main process's counts.

        Args:
            good: whether a checkpoint of this moment is worth going back to.
            trouble: what is wrong, as a clause; what follows is up to `on_collapse`.
            warning: what the user should know, as a sentence.
        """
        self._good, self._trouble, warning = broadcast_object_list([good, trouble, warning])
        if self._trouble and self._on_collapse == "warn":
            warning, self._trouble = self._trouble, None
        if warning and self.is_main:
            self.warn(warning)

    def warn(self, warning: str) -> None:
        """Tell the user something, as a sentence, and keep it. Main process only."""
        self._log.say(f"warning: step {self.step}: {warning}")
        note_event(self.output_dir, self.step, "warning", warning)

    def note(self, values: dict[str, float], seconds: float) -> None:
        """Log numbers that took so many seconds to find out, which do not count as training in the speed."""
        self._log.note(values, seconds)
        self._aside += seconds

    @property
    def all_settings(self) -> dict[str, Any]:
        """All settings of the run, by name."""
        return settings_to_dict(*self._all_settings)

    @property
    def evaluation_due(self) -> bool:
        """Whether the pipeline is to be scored after this update; the same on all processes."""
        return self.settings.evaluate_every > 0 and self._due(self.settings.evaluate_every)

    @property
    def sample_due(self) -> bool:
        """Whether a sheet of samples follows this update; True on the main process alone."""
        return self.is_main and self._due(self.settings.sample_every)

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked this process to stop: long work, such as drawing a sheet, should end then."""
        return self._stop_requests.request >= INTERRUPTED

    @property
    def is_complete(self) -> bool:
        """Whether the last update is done, also if the run was asked to stop in it."""
        return self.step >= self.max_train_steps

    @property
    def last_sheet_due(self) -> bool:
        """Whether a run that ended because its time is up still lacks a sheet of its last step; main process alone."""
        return self.is_main and self._stop_requests.request == TIME_IS_UP and not self._sheet_path().exists()

    def save_sheet(self, sheet: Image.Image, kind: str = "samples") -> Path:
        """Write a sheet to the folder `kind` of the run and to the tracker; return its path."""
        path = self._sheet_path(kind)
        write_atomically(path, lambda temporary: sheet.save(temporary, format="png"))
        self._log.show_image(kind, sheet, self.step)
        return path

    def finish(self) -> Path:
        """Write the pipeline, say how the run ended, and return the pipeline's folder.

        Raises:
            SystemExit: with status 143 if SIGTERM ended the run, 130 if Ctrl-C did, so that nobody takes an
                interrupted run for a finished one.
        """
        target = self.output_dir / "pipeline"
        complete = self.is_complete
        reason = "complete" if complete else REASONS[self._stop_requests.request]
        if self.is_main:
            write_atomically(target, self._state.pipeline.save_pretrained)
            write_status(self.output_dir, "complete" if complete else "stopped", reason, self.step, self.seconds)
            print(f"{reason}: step {self.step} of {self.max_train_steps}, {self.seconds:.0f} s of training in all")
            print("\n".join(list_results(self.output_dir)))
            if not complete:
                print("the same command with --resume latest goes on from here")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if not complete and self._stop_requests.exit_status:
            raise SystemExit(self._stop_requests.exit_status)
        return target

    @property
    def seconds(self) -> float:
        """Seconds of all launches of this run so far."""
        return self._seconds_before + time.monotonic() - self._started

    def _sheet_path(self, kind: str = "samples") -> Path:
        return self.output_dir / kind / f"step-{self.step:08d}.png"

    def _open_folder(self) -> Path | None:
        """Create or reopen the run's folder; return the checkpoint to resume from. All processes fail together."""
        problem, checkpoint = None, None
        if self.is_main:
            try:
                if self.settings.push_to_hub:  # what would fail after the training is to fail before it
                    check_access(self.settings.hub_repo_id, self.settings.hub_private_repo)
                checkpoint = claim_folder(self.output_dir, self.settings.resume, self._all_settings)
            except UserError as error:
                problem = str(error)
        problem, checkpoint = broadcast_object_list([problem, checkpoint])
        if problem is not None:
            raise UserError(problem)
        return checkpoint

    def _seed_global_generator(self, seed: int) -> None:
        """Do what `torch.manual_seed` does, for the device in use: it seeds all that there could be, in 0.5 ms."""
        if self.device.type not in ("cpu", "cuda", "mps"):
            torch.manual_seed(seed)
            return
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def _random_key(self) -> tuple[int | str, ...]:
        """What random numbers depend on; after a rollback they are others than those that led into trouble."""
        key = (self.settings.seed, self.step, self.accelerator.process_index)
        return (*key, f"rollback {self.rollbacks}") if self.rollbacks else key

    def _between_updates(self, step_seconds: float) -> bool:
        """Log, check and save as is due after an update; return whether the run ends here."""
        if self._trouble:
            raise CollapseError(self._trouble)
        stop = self._should_stop(step_seconds)
        if stop or self._due(self.settings.log_every):
            self._check_finite(self._log.write(self.step, self.seconds))
        self._log.bar.update()
        if stop or self._due(self.settings.checkpoint_every):
            self._save()
        return stop

    def _save(self) -> None:
        """Write a checkpoint, unless a network has gone bad: a bad one must never take the place of a good one."""
        if bad := self._state.not_finite():
            raise NonFiniteError(f"a weight of {', '.join(bad)} is not finite")
        progress = {"step": self.step, "seconds": round(self.seconds, 3), "images": self.step * self.images_per_step}
        progress |= {"good": self._good, "rollbacks": self.rollbacks}
        self._state.save(self._checkpoints, progress, self.settings.checkpoints_total_limit)

    def _roll_back(self, trouble: TrainingTroubleError) -> None:
        """Go back to the newest good checkpoint with half the learning rates; if there is no way back, stop."""
        good = checkpoints.newest_good_checkpoint(self._checkpoints)
        if self._on_collapse != "rollback" or good is None or self.rollbacks >= self._max_rollbacks:
            raise self._stopped_for(trouble, good) from None
        self.accelerator.wait_for_everyone()  # all have chosen the same checkpoint before any is deleted
        if self.is_main:
            note_event(self.output_dir, self.step, "rollback", f"{trouble}; back to {good.name}")
            newer = [path for path in checkpoints.list_checkpoints(self._checkpoints) if path.name > good.name]
            checkpoints.remove_checkpoints(newer)
        progress = self._state.load(good)
        self.rollbacks += 1
        self._state.scale_learning_rates(ROLLBACK_FACTOR ** (self.rollbacks - progress.get("rollbacks", 0)))
        where = f"step {self.step}: {trouble}. Back to step {progress['step']} with half the learning rates"
        self.step, self._good, self._trouble = progress["step"], True, None
        self._log.rewind(self.step)
        if self.is_main:
            self._log.say(f"{where} (rollback {self.rollbacks} of {self._max_rollbacks})")

    def _due(self, every: int) -> bool:
        return self.step == self.max_train_steps or (every > 0 and self.step % every == 0)

    def _should_stop(self, step_seconds: float) -> bool:
        """Whether all processes stop now: one of them was told to, or the time does not allow another step."""
        budget = parse_duration("--max_train_time", self.settings.max_train_time)
        if budget is not None and time.monotonic() - self._started + step_seconds >= budget:
            self._stop_requests.raise_to(TIME_IS_UP)
        # On an accelerator this would wait for the step to end; there the log's cadence has to do.
        if self.device.type == "cpu" and not self._log.is_finite():
            self._stop_requests.raise_to(NOT_FINITE)
        request = self._stop_requests.agree()
        if request == NOT_FINITE:
            self._stop_requests.request = GO_ON
            raise NonFiniteError("a loss is not finite")
        return bool(request)

    def _check_finite(self, losses: dict[str, float]) -> None:
        if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
            raise NonFiniteError(f"{', '.join(bad)} is not finite")

    def _stopped_for(self, trouble: TrainingTroubleError, good: Path | None) -> TrainingTroubleError:
        """Note how the run ends, leaving its last good checkpoint as it is; return the error that ends it."""
        if self.is_main:
            write_status(self.output_dir, trouble.status, str(trouble), self.step, self.seconds)
            note_event(self.output_dir, self.step, trouble.status, str(trouble))
        return trouble.explained(self.step, self.rollbacks, self.all_settings, good)
