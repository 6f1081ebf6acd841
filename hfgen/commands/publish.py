"""`hfgen publish`: a pipeline, its code, its card and its pictures on the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from hfgen.commands.options import require_new_folder


def publish(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_DIR", help="a run, its best/, a checkpoint, or the folder of a pipeline")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name; or name, for a repo of your own")],
    private: Annotated[
        bool, typer.Option("--private", help="make the repo private; refused if it exists and is public")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="folder from hfgen evaluate, whose scores the card is to show")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="of the weights, as the Hub writes it, such as apache-2.0")
    ] = None,
    space: Annotated[bool, typer.Option("--space", help="also publish the demo as a Space of the same name")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="only make the folder, in this new place, and upload nothing")
    ] = None,
) -> None:
    """Publish a pipeline on the Hub: it loads there without hfgen, with a card of what was measured."""
    if output is not None:
        require_new_folder(output)
    from hfgen.files import write_atomically
    from hfgen.publishing import publish as hub

    if output is not None:
        write_atomically(output, lambda folder: hub.prepare(source, folder, repo_id, scores, license_id))
        typer.echo(f"{output}: what would be published, checked to load without hfgen; its README.md is the card")
        return
    published = hub.publish(source, repo_id, private, scores, license_id, space)
    typer.echo(f"published {published.repo_id}: {published.commit.address}")
    if published.replaced_card:
        typer.echo("its README.md was somebody's own; the card is in its place now, and the old one in the history")
    if published.space_commit is not None:
        typer.echo(f"its Space: {published.space_commit.address}")
        if private:
            typer.echo("the Space needs a secret HF_TOKEN with the right to read, as the model is private")
