"""`hfgen ...`: the command line; each command is a function in `hfgen/commands/`.

Heavy imports are inside the commands, so that `hfgen --help` is fast.
"""

import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import hfgen
from hfgen.arguments import refuse_empty_values, with_home
from hfgen.commands.compare import compare
from hfgen.commands.data import floor, inspect
from hfgen.commands.demo import demo
from hfgen.commands.evaluate import evaluate, evaluate_images
from hfgen.commands.export import export
from hfgen.commands.kaggle import kaggle_zip
from hfgen.commands.options import FLAG
from hfgen.commands.presets import presets
from hfgen.commands.publish import publish
from hfgen.commands.runs import curves, page, progress
from hfgen.commands.sample import denoise, interpolate, reconstruct, sample
from hfgen.commands.steps import steps
from hfgen.commands.study import study_app
from hfgen.commands.train import train
from hfgen.errors import TerminatedError, run_reporting_user_errors
from hfgen.texts import say


# `hfgen train` parses its options itself: they are those of the training scripts.
AS_TYPED = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
# Commands as `hfgen --help` lists them: in the order in which they are used.
ORDER = (
    *("train", "presets", "data", "progress", "curves", "page", "sample", "interpolate", "reconstruct", "denoise"),
    *("evaluate", "compare", "steps", "evaluate-images", "kaggle-zip", "demo", "publish", "export", "study"),
)


class CommandsInOrder(TyperGroup):
    """The commands of `hfgen`, listed in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return their names in that order."""
        return sorted(self.commands, key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it with a line, while typer itself would end it without a word.

        Raises:
            TerminatedError: after Ctrl-C.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise TerminatedError(signal.SIGINT) from None


def with_underscores(name: str) -> str:
    """Return the name of an option with underscores for dashes: --num-images is --num_images."""
    return name.replace("-", "_")


app = typer.Typer(
    cls=CommandsInOrder,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, compare and ship small unconditional image generators.",
    context_settings={"token_normalize_func": with_underscores},
)
data_app = typer.Typer(no_args_is_help=True, help="Inspect datasets.")
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
for command in (
    *(sample, denoise, interpolate, reconstruct, page, progress, curves),
    *(presets, evaluate, compare, steps, publish, demo, export),
):
    app.command()(command)
app.command("train", context_settings=AS_TYPED)(train)
app.command("evaluate-images")(evaluate_images)
app.command("kaggle-zip")(kaggle_zip)
data_app.command()(inspect)
data_app.command()(floor)


def print_version(wanted: bool) -> None:
    """Print the version and exit, for --version."""
    if wanted:
        say(f"hfgen {hfgen.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar=FLAG, help="print the version and exit", is_eager=True, callback=print_version
        ),
    ] = False,
) -> None:
    """Train, compare and ship small unconditional image generators."""


def main() -> None:
    """Run the command line; a user error ends with one message, not a traceback."""

    def run() -> None:
        refuse_empty_values(sys.argv[1:])
        sys.argv[1:] = with_home(sys.argv[1:])
        app()

    run_reporting_user_errors(run)
