"""`hfgen publish`: upload a pipeline with its code, card and pictures to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from hfgen.commands.options import FLAG, loading, require_new_folder
from hfgen.errors import UserError
from hfgen.files import require_utf8
from hfgen.texts import say


def publish(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_DIR", help="a run, its best/, a checkpoint or a pipeline folder")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name, or just name for your own repo")],
    private: Annotated[
        bool, typer.Option("--private", metavar=FLAG, help="make a new repo private; fails if it exists and is public")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="folder from hfgen evaluate; the card shows its scores")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="Hub licence id for the weights, such as apache-2.0")
    ] = None,
    space: Annotated[
        bool, typer.Option("--space", metavar=FLAG, help="also publish the demo as a Space of the same name")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", metavar=FLAG, help="store the weights as 16-bit floats, half the size")
    ] = False,
    discriminator: Annotated[
        bool,
        typer.Option(
            "--discriminator",
            metavar=FLAG,
            help="also publish the discriminator, so that others can continue the training with --init_from",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="only write the files to this new folder; upload nothing")
    ] = None,
) -> None:
    """Publish a pipeline on the Hub, loadable without hfgen, with a card of the measured results."""
    if output is not None:
        if private or space:
            raise UserError(
                f"{'--private' if private else '--space'}: nothing is uploaded with --output; leave it out"
            )
        require_new_folder(output)
        require_utf8(output, "--output")
    with loading():
        from hfgen.files import write_atomically
        from hfgen.publishing import publish as hub

    if output is not None:
        write_atomically(
            output, lambda folder: hub.prepare(source, folder, repo_id, scores, license_id, half, discriminator)
        )
        say(f"{output}: the files to publish, checked to load without hfgen; README.md is the card")
        return
    published = hub.publish(
        source, repo_id, private, scores, license_id, space, half=half, discriminator=discriminator
    )
    hub.say_published(published)
    if private and published.space_commit is not None:
        say("the Space needs a secret HF_TOKEN with read access, because the model is private")
