"""`hfgen page`, `hfgen progress` and `hfgen curves`: how a run went."""

from pathlib import Path
from typing import Annotated

import typer

from hfgen.commands.options import FLAG, in_range, refuse_to_replace, require_apart
from hfgen.files import writing
from hfgen.ranges import Range
from hfgen.texts import counted, say


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run, finished or not")]
FRAME_SECONDS = Range(0.02, 160)  # a GIF holds at most 655 seconds per frame, and the last stays for four


def progress(
    run: RunFolder,
    output: Annotated[Path, typer.Option("--output", help="GIF file to write")] = Path("progress.gif"),
    frame_seconds: Annotated[
        float, typer.Option("--frame_seconds", callback=in_range(FRAME_SECONDS), help="seconds per frame")
    ] = 0.5,
) -> None:
    """Make a GIF of a run's sample sheets: from the same random numbers over the course of training."""
    refuse_to_replace(output, endings=(".gif",))
    require_apart(output, sources=[run])
    from hfgen.inference.gifs import progress_frames, write_gif

    frames = progress_frames(run)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_gif([*frames, *frames[-1:] * 3], output, frame_seconds)  # hold the last frame
    still = "1 sample sheet, so a still image until the run has more (--sample_every)"
    say(f"{output}: {len(frames)} sample sheets" if len(frames) > 1 else f"{output}: {still}")


def page(run: RunFolder) -> None:
    """Rewrite a run's page: RUN/index.html, with its samples over time, curves, settings and warnings."""
    from hfgen.commands.train_settings import METHODS, settings_classes
    from hfgen.training.lock import holder_of
    from hfgen.training.page import best_fitting_classes, write_page

    classes = best_fitting_classes(run, [settings_classes(method) for method in METHODS])
    say(write_page(run, classes, is_alive=holder_of(run) is not None))


def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs, finished or not")],
    output: Annotated[Path, typer.Option("--output", help="plot to write: .png, .pdf or .svg")] = Path("curves.png"),
    reference: Annotated[
        bool,
        typer.Option(
            "--reference",
            metavar=FLAG,
            help="plot FID next to the presets' reference curves; for runs with --evaluate_every",
        ),
    ] = False,
) -> None:
    """Plot the losses and scores of runs against steps and time."""
    refuse_to_replace(output, endings=(".png", ".pdf", ".svg"))
    require_apart(output, sources=runs)
    from hfgen.inference.curves import compared_with_references, plot_curves
    from hfgen.training.reference_curves import read_reference_curves

    figure = plot_curves(runs, read_reference_curves() if reference else ())
    if reference:
        for run in runs:
            say(f"{run}: {compared_with_references(run)}")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=110)
    say(f"{output}: losses of {counted(len(runs), 'run')}")
