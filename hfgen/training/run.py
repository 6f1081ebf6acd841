"""Run: what all training scripts share.

Each script has its own explicit training loop and calls `Run` for what does not depend on the method: device, seed,
step counter, log, sample sheets, checkpoints and shutdown. `Run` never calls the script's code.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from hfgen.config import settings_to_dict
from hfgen.errors import UserError
from hfgen.files import write_atomically
from hfgen.hardware import seed_global_generator
from hfgen.randomness import keyed_seed
from hfgen.training import checkpoints, folder
from hfgen.training.duration import parse_duration, time_left
from hfgen.training.launcher import open_accelerator
from hfgen.training.log import RunLog
from hfgen.training.page import RunPage
from hfgen.training.settings import RunSettings, planned_steps
from hfgen.training.state import ROLLBACK_FACTOR, RunState, SavablePipeline, Stateful
from hfgen.training.stopping import INTERRUPTED, REASONS, TIME_IS_UP, StopRequests
from hfgen.training.trouble import (
    CollapseError,
    NonFiniteError,
    TrainingTroubleError,
    check_losses,
    ending_of,
    lost_process,
)


class Run:
    """One training run in one folder.

    Use: `with Run(...) as run:`, `run.plan(...)`, build everything, `run.restore(...)`, then
    `for step in run.steps():` with one update and `run.log(...)` in its body, and `run.finish()` after the loop. At
    the end of the `with` block the folder is free for another launch.

    Args:
        settings: the run's settings.
        other_settings: data and method settings; saved with the run and compared on resume.
        allows_fp16: whether the method can be trained in fp16, with scaled gradients.

    Attributes:
        output_dir, accelerator, device: the run's folder, and where it computes.
        is_main, is_new: whether this is the process that writes, and whether the run starts without a checkpoint.
        commit: of the dataset that the checkpoint to resume from has streamed; None without one.
        step, rollbacks: updates, the current one included, and rollbacks so far.
        choices: describe what was chosen for settings that leave it open, by their names; noted when a run begins.
        images_per_step, max_train_steps: images per update, over all processes, and the last update; set by `plan`.
        images_before: images that earlier launches had more than `step * images_per_step`, from other batch sizes.

    Raises:
        UserError: if the folder holds something else, or `--resume` comes with changed settings.
    """

    images_per_step: int
    max_train_steps: int
    choices: dict[str, Callable[[], str]]
    _trouble: str | None = None  # what a watch last reported
    _state: RunState  # set by `restore`, like `_log`
    _log: RunLog

    def __init__(self, settings: RunSettings, *other_settings: Any, allows_fp16: bool = False):
        self.settings, self._all_settings = settings, (settings, *other_settings)
        self.output_dir, self._checkpoints = Path(settings.output_dir), Path(settings.output_dir) / "checkpoints"
        self.step, self.rollbacks, self.choices = 0, 0, {}
        self._seconds_before, self.images_before = 0.0, 0  # of earlier launches of a resumed run; see `RunLog`
        self._time_limit = time_left(parse_duration("--max_train_time", settings.max_train_time))  # of this launch
        self._started, self._aside = time.monotonic(), 0.0  # seconds of this step not spent on training
        self._stop_requests, self._on_collapse, self._max_rollbacks = StopRequests(), "stop", 0
        self._good, self._is_open = True, False  # what a watch last reported; whether `status.json` says "running"
        self.accelerator = open_accelerator(settings, allows_fp16)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self._page = RunPage(self.output_dir, self._all_settings, self.is_main)
        self._lock, resumed, self._changes = folder.open_folder(self.accelerator, settings, self._all_settings)
        self._checkpoint, self.is_new, self.commit = resumed, resumed is None, checkpoints.commit_of(resumed)
        torch.manual_seed(settings.seed)  # the same initial weights in all processes

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Record how the run ended if it did not come to `finish`, and free its folder.

        Raises:
            UserError: in place of an error of PyTorch's that only says that another process is gone.
        """
        lost = lost_process(error, self.accelerator.num_processes)
        try:
            if error is not None and self._is_open and self.is_main:
                with contextlib.suppress(UserError):  # a full disk, say; the error that ends the run counts more
                    self._set_status(*ending_of(lost or error))
                folder.print_break(self.step)
        finally:
            if self._lock is not None:
                self._lock.release()
        if lost is not None:
            raise lost from error

    def plan(self, images_per_step: int, images_per_epoch: int | None) -> int:
        """Return the number of updates, from `--max_train_steps` or `--num_epochs`.

        Args:
            images_per_step: images per update, over all processes.
            images_per_epoch: images in the dataset; None for a stream, whose length is unknown.

        Raises:
            UserError: if only `--num_epochs` is given and the dataset is a stream.
        """
        self.images_per_step = images_per_step
        self.max_train_steps = planned_steps(self.settings, images_per_step, images_per_epoch, self._checkpoint)
        return self.max_train_steps

    def restore(
        self,
        stateful: dict[str, Stateful],
        batches: Stateful,
        pipeline: SavablePipeline,
        data_digest: str,
        on_collapse: str = "stop",
        max_rollbacks: int = 0,
        may_lack: dict[str, int] | None = None,
    ) -> None:
        """Register what checkpoints store, and load the checkpoint to resume from, if any.

        Args:
            stateful: networks (unwrapped), EMA, optimizers and learning-rate schedules by name.
            batches: the batch iterator, whose state may differ between processes.
            pipeline: samples with the EMA network; saved with every checkpoint and at the end.
            data_digest: changes when the training images change.
            on_collapse: what to do when a watch reports trouble: "warn", "stop", or "rollback" to the newest good
                checkpoint with half the learning rates. A non-finite loss always stops the run or rolls it back.
            max_rollbacks: number of rollbacks after which the run stops.
            may_lack: by name of a part, the last step whose checkpoints may lack it.

        Raises:
            UserError: if the checkpoint was made with other data, another number of processes or other networks.
        """
        self._on_collapse, self._max_rollbacks = on_collapse, max_rollbacks
        self._state = RunState(stateful, batches, pipeline, data_digest, self.accelerator, may_lack)
        if self._checkpoint is not None:
            self._load(self._checkpoint)
        self._log = RunLog(self.output_dir, self.accelerator, self.images_per_step, self.images_before)
        self._log.open(self.step, self.max_train_steps, self._time_limit, self.all_settings, self.settings.report_to)
        if self.is_main:
            folder.write_settings(self.output_dir, self._all_settings, self._checkpoint)
            if self._checkpoint is not None:
                folder.set_aside_newer(self.output_dir, self.step)
            launch = {"from_step": self.step, "max_train_steps": self.max_train_steps, "data_digest": data_digest}
            folder.note_launch(self.output_dir, launch, self._changes, self.choices, self.accelerator)
            self._set_status("running", "")

    def steps(self) -> Iterator[int]:
        """Yield the number of each update, from the one after the restored step to the last.

        Logs and saves checkpoints between updates. Ends early, with a checkpoint, on a signal and when the time is
        up. After a rollback, numbering continues from the checkpoint.

        Raises:
            TrainingTroubleError: if a loss or a weight is not finite, or a watch reported trouble, and no rollback is
                possible.
        """
        self._page.write(self.step)  # there may be a first sheet
        self._log.start_window()
        with self._log.bar, self._stop_requests.caught():
            while self.step < self.max_train_steps:
                step_started, self._aside = time.monotonic(), 0.0
                # Users of the global generator, such as dropout, also depend only on (seed, step, process).
                seed_global_generator(keyed_seed(*self._random_key()), self.device)
                self.step += 1
                yield self.step
                try:
                    if self._between_updates(time.monotonic() - step_started - self._aside):
                        break
                except TrainingTroubleError as trouble:
                    self._roll_back(trouble)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator on the run's device for a purpose; it depends only on (seed, step, process, purpose)."""
        return torch.Generator(self.device).manual_seed(keyed_seed(*self._random_key(), purpose))

    def log(self, losses: dict[str, torch.Tensor], notes: dict[str, float] | None = None) -> None:
        """Record the losses of this update, without a device sync.

        Args:
            losses: scalars by name; their means over steps and processes are written every `log_every` steps.
            notes: plain numbers, such as the learning rate; the latest value is written.
        """
        self._log.add(losses, notes or {})

    def report(self, good: bool, trouble: str | None = None, warning: str | None = None) -> None:
        """Accept a watch's result for this update. All processes must call this; the main process's result is used.

        Args:
            good: whether a checkpoint saved now is a good one to roll back to.
            trouble: what is wrong, as a clause; handled according to `on_collapse`.
            warning: message for the user, as a sentence.
        """
        self._good, self._trouble, warning = broadcast_object_list([good, trouble, warning])
        if self._trouble and self._on_collapse == "warn":
            warning, self._trouble = self._trouble, None
        if warning and self.is_main:
            self.warn(warning)

    def warn(self, warning: str) -> None:
        """Print a warning, given as a sentence, and record it. Main process only."""
        self._log.say(f"warning: step {self.step}: {warning}")
        folder.note_event(self.output_dir, self.step, "warning", warning)

    def note(self, values: dict[str, float], seconds: float) -> None:
        """Log numbers, and exclude the seconds that computing them took from the training speed."""
        self._log.note(values, seconds)
        self._aside += seconds

    @property
    def all_settings(self) -> dict[str, Any]:
        """All settings of the run, by name."""
        return settings_to_dict(*self._all_settings)

    @property
    def evaluation_due(self) -> bool:
        """Whether the pipeline should be evaluated after this update; the same on all processes."""
        return self.settings.evaluate_every > 0 and self._due(self.settings.evaluate_every)

    @property
    def sample_due(self) -> bool:
        """Whether a sample sheet is due after this update; only ever True on the main process."""
        return self.is_main and self._due(self.settings.sample_interval(self.max_train_steps))

    @property
    def first_sheet_due(self) -> bool:
        """Whether a new run should save a sheet of its untrained network; only ever True on the main process."""
        return self.is_main and self.step == 0 and self.settings.sample_interval(self.max_train_steps) > 0

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked this process to stop; long work, such as sampling a sheet, should then end."""
        return self._stop_requests.request >= INTERRUPTED

    @property
    def is_time_up(self) -> bool:
        """Whether this launch has reached its time limit; work that can be left out should then end."""
        return self._time_limit is not None and time.monotonic() - self._started >= self._time_limit

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal ended the loop; the same on all processes, which `stop_requested` need not be."""
        return self._stop_requests.agreed >= INTERRUPTED

    @property
    def is_complete(self) -> bool:
        """Whether the last update is done, even if a stop was requested during it."""
        return self.step >= self.max_train_steps

    @property
    def last_sheet_due(self) -> bool:
        """Whether a run whose time is up still lacks a sheet for its last step; only ever True on the main process."""
        return self.is_main and self._stop_requests.request == TIME_IS_UP and not self._sheet_path().exists()

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Return a context for generating images: NaN counts as a NaN loss, its seconds not as training time."""
        started = time.monotonic()
        with self._stop_requests.unless_finite():
            yield
        self.note({}, time.monotonic() - started)

    def save_sheet(self, sheet: Image.Image, kind: str = "samples") -> Path:
        """Save a sheet to the run's folder `kind` and log it to the tracker; return its path."""
        path = self._sheet_path(kind)
        write_atomically(path, lambda temporary: sheet.save(temporary, format="png"))
        self._log.show_image(kind, sheet, self.step)
        if kind == "samples":
            self._log.say(f"step {self.step}: sample sheet {path}")
        return path

    def finish(self) -> Path:
        """Save the pipeline, print how the run ended, and return the pipeline's folder.

        Raises:
            SystemExit: with a shell's status if a signal ended the run, such as 143 for SIGTERM and 130 for Ctrl-C.
        """
        if self._stop_requests.not_finite:  # the images of the last sheet
            raise self._stopped_for(NonFiniteError("a generated image is not finite"))
        reason = "complete" if self.is_complete else REASONS[self._stop_requests.request]
        if self.is_main:
            self._state.save_final_pipeline(self.output_dir, self.step, self.rollbacks)
            self._set_status("complete" if self.is_complete else "stopped", reason)
            folder.print_end(self.output_dir, reason, self.step, self.max_train_steps, self.seconds)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if not self.is_complete and self._stop_requests.exit_status:
            raise SystemExit(self._stop_requests.exit_status)
        return self.output_dir / checkpoints.PIPELINE_FOLDER

    @property
    def seconds(self) -> float:
        """Seconds of this run so far, over all launches."""
        return self._seconds_before + time.monotonic() - self._started

    def _sheet_path(self, kind: str = "samples") -> Path:
        return self.output_dir / kind / f"step-{self.step:08d}.png"

    def _set_status(self, status: str, reason: str) -> None:
        """Write `status.json` and the page; main process only."""
        folder.write_status(self.output_dir, status, reason, self.step, self.seconds)
        self._is_open = status == "running"
        self._page.write(self.step)

    def _load(self, checkpoint: Path) -> None:
        """Load the checkpoint to resume from, and say what differs from the run that it belongs to."""
        try:
            progress = self._state.load(checkpoint)
        except UserError as error:
            raise (UserError(f"{error}; {folder.differing(self._changes)}") if self._changes else error) from error
        self.step, self.rollbacks = progress["step"], progress.get("rollbacks", 0)
        self._good, self._seconds_before = progress.get("good", True), progress["seconds"]
        self.images_before = progress["images"] - self.step * self.images_per_step
        checkpoints.check_not_beyond(self.max_train_steps, self.step, checkpoint)
        if self.is_main:
            folder.print_resumption(checkpoint, self.step, self.is_complete, self._changes, self.rollbacks)

    def _random_key(self) -> tuple[int | str, ...]:
        """Key of the random numbers; a rollback changes it, to avoid the numbers that led into trouble."""
        key = (self.settings.seed, self.step, self.accelerator.process_index)
        return (*key, f"rollback {self.rollbacks}") if self.rollbacks else key

    def _between_updates(self, step_seconds: float) -> bool:
        """Log, check and save what is due, scores at their own step; return whether the run ends here."""
        if self._trouble:
            raise CollapseError(self._trouble)
        stop = self._should_stop(step_seconds)
        if stop or self.evaluation_due or self._due(self.settings.log_interval(self.max_train_steps)):
            check_losses(self._log.write(self.step, self.seconds), self.accelerator.scaler)
        self._log.note({}, self._page.refresh(self.step) if self.sample_due else 0.0)
        self._log.bar.update()
        if stop or self._due(self.settings.checkpoint_every):
            self._save()
        return stop

    def _save(self) -> None:
        """Write a checkpoint, unless a network has non-finite weights: it must not replace a good one."""
        if bad := self._state.not_finite():
            raise NonFiniteError(f"non-finite weights in {', '.join(bad)}")
        progress = {"step": self.step, "seconds": round(self.seconds, 3), "good": self._good}
        progress |= {"images": self.step * self.images_per_step + self.images_before, "rollbacks": self.rollbacks}
        self._state.save(self._checkpoints, progress, self.settings.checkpoints_total_limit)
        if self.is_main:
            self._log.say(f"step {self.step}: checkpoint {checkpoints.checkpoint_of(self._checkpoints, self.step)}")

    def _roll_back(self, trouble: TrainingTroubleError) -> None:
        """Roll back to the newest good checkpoint with half the learning rates; stop if that is not possible."""
        good = checkpoints.newest_good_checkpoint(self._checkpoints)
        if self._on_collapse != "rollback" or good is None or self.rollbacks >= self._max_rollbacks:
            raise self._stopped_for(trouble) from None
        self.accelerator.wait_for_everyone()  # all processes pick the same checkpoint before any is deleted
        if self.is_main:
            folder.note_event(self.output_dir, self.step, "rollback", f"{trouble}; back to {good.name}")
            folder.roll_back(self.output_dir, good)
        progress = self._state.load(good)
        self.rollbacks += 1
        self._state.scale_learning_rates(ROLLBACK_FACTOR ** (self.rollbacks - progress.get("rollbacks", 0)))
        where = f"step {self.step}: {trouble}. Back to step {progress['step']} with half the learning rates"
        self.step, self._good, self._trouble, self._stop_requests.not_finite = progress["step"], True, None, False
        self._log.rewind(self.step)
        if self.is_main:
            self._log.say(f"{where} (rollback {self.rollbacks} of {self._max_rollbacks})")

    def _due(self, every: int) -> bool:
        return self.step == self.max_train_steps or (every > 0 and self.step % every == 0)

    def _should_stop(self, step_seconds: float) -> bool:
        """Whether all processes stop now: one got a stop request, or there is no time for another step."""
        if self._time_limit is not None and time.monotonic() - self._started + step_seconds >= self._time_limit:
            self._stop_requests.raise_to(TIME_IS_UP)
        # On an accelerator this would force a sync; there, losses are checked when they are logged.
        if self.device.type == "cpu" and not self._log.is_finite():
            self._stop_requests.not_finite = True
        request = self._stop_requests.agree()
        if self._stop_requests.not_finite:
            self._stop_requests.not_finite = False
            raise NonFiniteError(f"{'a generated image' if self._log.is_finite() else 'a loss'} is not finite")
        return bool(request)

    def _stopped_for(self, trouble: TrainingTroubleError) -> TrainingTroubleError:
        """Record how the run ends, keeping the last good checkpoint; return the error that ends it."""
        if self.is_main:
            folder.note_event(self.output_dir, self.step, trouble.status, str(trouble))
            self._set_status(trouble.status, str(trouble))
        good = checkpoints.newest_good_checkpoint(self._checkpoints)
        return trouble.explained(self.step, self.rollbacks, self.all_settings, good)
