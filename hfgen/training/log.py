"""The log of a run: `metrics.jsonl`, the tracker (TensorBoard or wandb) and the progress bar."""

import hashlib
import importlib
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from hfgen.bars import update_interval
from hfgen.errors import UserError
from hfgen.files import append_json_line, json_lines, read_json_lines, write_text_atomically, writing
from hfgen.run_files import ABANDONED_FILE, METRICS_FILE
from hfgen.texts import one_message


# The first losses of a method, beside the speed on the progress bar, which has to fit into 80 columns.
SHOWN_LOSSES = 2


class TrainingBar(tqdm):
    """A progress bar of updates that says how long the launch will still take.

    Args:
        step: updates of earlier launches.
        max_train_steps: number of the last update.
        time_limit: seconds after which this launch stops; None if it does not.
        hidden: show nothing, in processes that are not the main one.
    """

    def __init__(self, step: int, max_train_steps: int, time_limit: float | None, hidden: bool):
        self._time_limit = time_limit
        super().__init__(
            total=max_train_steps,
            initial=step,
            bar_format="{percentage:3.0f}%|{bar}| {steps}, {left} left{postfix}",
            dynamic_ncols=True,
            disable=hidden,
            mininterval=update_interval(),
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return what the bar shows: the nearer of the two ends, the last update or the time limit."""
        values = super().format_dict
        step, steps, elapsed = values["n"], values["total"], values["elapsed"]
        done = step - values["initial"]
        left = (steps - step) * elapsed / done if done > 0 else math.inf  # after a rollback it may be less
        share = step / steps
        if self._time_limit is not None and self._time_limit - elapsed < left:
            left, share = max(0.0, self._time_limit - elapsed), min(1.0, elapsed / self._time_limit)
        counted = f"step {step}" if self._time_limit is not None else f"{step}/{steps}"
        remaining = "?" if left == math.inf else tqdm.format_interval(left)
        return {**values, "n": share, "total": 1, "steps": counted, "left": remaining}


class RunLog:
    """Logs mean losses at regular intervals, averaged over all processes.

    Args:
        folder: the run's folder.
        accelerator: reduces over processes and holds the trackers.
        images_per_step: images per update, over all processes.
        images_before: images of a run that this one continues with another number of images per update, beyond what
            its steps would have with this one.
    """

    bar: TrainingBar  # set by `open`

    def __init__(self, folder: Path, accelerator: Accelerator, images_per_step: int, images_before: int = 0):
        self._metrics_file = folder / METRICS_FILE
        self._folder, self._accelerator, self._images_per_step = folder, accelerator, images_per_step
        self._images_before = images_before
        self.start_window()

    def open(
        self, step: int, max_train_steps: int, time_limit: float | None, settings: dict[str, Any], report_to: str
    ) -> None:
        """Start the tracker and the progress bar at `step`, without log entries after it.

        Args:
            step: updates so far.
            max_train_steps: number of the last update.
            time_limit: seconds after which this launch stops; None if it does not.
            settings: of the run, for the tracker.
            report_to: "tensorboard", "wandb" or "none".

        Raises:
            UserError: if wandb cannot start.
        """
        self._drop_beyond(step)
        if report_to != "none":
            self._start_tracker(step, settings, report_to)
        self.bar = TrainingBar(step, max_train_steps, time_limit, not self._accelerator.is_main_process)
        self.start_window()

    def rewind(self, step: int) -> None:
        """Go back to `step`, without log entries after it."""
        self._drop_beyond(step)
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":  # the next file hides the later steps of this one
                tracker.tracker.close()
                tracker.tracker.purge_step = step + 1
                self._wait_for_a_later_file_name()
        self.bar.n = step
        self.bar.refresh()
        self.start_window()

    def say(self, message: str) -> None:
        """Print a line above the progress bar. Main process only."""
        self.bar.write(one_message(message))

    def add(self, losses: dict[str, torch.Tensor], notes: dict[str, float]) -> None:
        """Add the losses of one update to the current window; see `Run.log`."""
        self._steps += 1
        for name, loss in losses.items():
            # Summed on the device: reading each loss would force a sync.
            self._sums[name] = (
                self._sums[name] + loss.detach().float() if name in self._sums else loss.detach().float()
            )
        self._notes.update(notes)

    def note(self, values: dict[str, float], seconds: float) -> None:
        """Add numbers to the next entry, and exclude the seconds spent on them from its speed."""
        self._notes.update(values)
        self._window_started += seconds

    def is_finite(self) -> bool:
        """Whether all losses since the last entry are finite. Syncs with the device."""
        return all(math.isfinite(total.item()) for total in self._sums.values())

    def write(self, step: int, seconds: float) -> dict[str, float]:
        """Write the means since the last entry and start a new window.

        Args:
            step: updates so far.
            seconds: training time so far, over all launches.

        Returns:
            Mean of each loss over the window and all processes.
        """
        if not self._steps:
            return {}
        sums = {name: total / self._steps for name, total in self._sums.items()}
        losses = {name: mean.item() for name, mean in self._accelerator.reduce(sums, "mean").items()}
        speed = self._steps * self._images_per_step / (time.monotonic() - self._window_started)
        values = {**losses, **self._notes, "images_per_second": round(speed, 3)}
        if self._accelerator.is_main_process:
            images = step * self._images_per_step + self._images_before
            entry = {"step": step, "images": images, "seconds": round(seconds, 2), **values}
            append_json_line(self._metrics_file, entry)
        shown = [
            f"{name.removeprefix('loss_').removesuffix('_loss')} {value:.3g}"
            for name, value in list(losses.items())[:SHOWN_LOSSES]
        ]
        self.bar.set_postfix_str(", ".join([*shown, f"{speed:.3g} images/s"]), refresh=False)
        with writing(self._folder / "logs"):
            self._accelerator.log(values, step=step)
        self.start_window()
        return losses

    def show_image(self, name: str, image: Image.Image, step: int) -> None:
        """Log an image to the tracker. Main process only."""
        for tracker in self._accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with writing(self._folder / "logs"):
                tracker.log_images({name: np.asarray(image)[None]}, step=step, **options)

    def _start_tracker(self, step: int, settings: dict[str, Any], report_to: str) -> None:
        logs, name = self._folder / "logs", self._folder.resolve().name
        run_id = hashlib.sha256(os.fsencode(self._folder.resolve())).hexdigest()[:12]
        with writing(logs):
            logs.mkdir(parents=True, exist_ok=True)  # otherwise wandb writes to a temporary folder
        init_kwargs = {
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"id": run_id, "name": name, "resume": "allow", "dir": str(logs)},
        }
        config = {
            # Names of files need not be UTF-8, which trackers refuse.
            key: value if isinstance(value, int | float) else str(value).encode("utf-8", "backslashreplace").decode()
            for key, value in settings.items()
        }
        if report_to == "tensorboard":
            self._wait_for_a_later_file_name()
        tracker_errors = (importlib.import_module("wandb.errors").Error,) if report_to == "wandb" else ()
        try:
            with writing(logs):
                self._accelerator.init_trackers("hfgen", config, {report_to: init_kwargs[report_to]})
        except tracker_errors as error:  # most often no login or no network
            raise UserError(
                f"--report_to wandb: cannot start: {error}; log in with `wandb login`, set WANDB_MODE=offline to "
                "upload the run later with `wandb sync`, or use --report_to tensorboard"
            ) from error

    def _wait_for_a_later_file_name(self) -> None:
        """Wait, for a second at most, until TensorBoard's next file comes after the others in order of name.

        Within a second, the names are ordered by process and by a number without leading zeros, so TensorBoard could
        read the file that hides later steps before the one with those steps.
        """
        while any((self._folder / "logs" / "hfgen").glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)

    def _drop_beyond(self, step: int) -> None:
        """Move the entries after a step, of an interrupted launch or of a branch that the run leaves, to a file."""
        if self._accelerator.is_main_process:
            entries = read_json_lines(self._metrics_file, ("step",))
            for entry in entries:
                if entry["step"] > step:
                    append_json_line(self._folder / ABANDONED_FILE, entry)
            write_text_atomically(self._metrics_file, json_lines([one for one in entries if one["step"] <= step]))

    def start_window(self) -> None:
        """Forget the updates since the last entry, and measure the speed from now on."""
        self._steps, self._window_started = 0, time.monotonic()
        self._sums: dict[str, torch.Tensor] = {}
        self._notes: dict[str, float] = {}
