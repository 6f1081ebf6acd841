"""`hfgen demo`: trained pipelines on a web page."""

from pathlib import Path
from typing import Annotated

import typer

from hfgen.commands.options import FLAG, Device, in_range, loading
from hfgen.errors import UserError
from hfgen.ranges import Range
from hfgen.run_files import LAUNCHES_FILE
from hfgen.texts import say


def demo(
    pipelines: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="runs, checkpoints, pipelines or Hub repos, of any family")
    ],
    device: Device = "auto",
    host: Annotated[
        str, typer.Option("--host", help="address to listen on; 0.0.0.0: reachable from other machines")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", callback=in_range(Range(1, 65_535)), help="port of the page")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", metavar=FLAG, help="also serve it at a public gradio address, for a week")
    ] = False,
) -> None:
    """Show pipelines on a web page: sample, interpolate, denoise, reconstruct, compare."""
    names = pipeline_names(pipelines)
    refuse_port_in_use(host, port)  # before the pipelines are loaded
    import os

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when a page is built
    try:
        import gradio  # noqa: F401 (checks that it is installed)
    except ImportError as error:
        raise UserError('the demo needs gradio: pip install "hfgen[demo]"') from error
    with loading():
        from hfgen.demo.page import build_demo, launch
        from hfgen.inference.opening import open_pipeline

    loaded = {name: open_pipeline(where, device) for name, where in zip(names, pipelines, strict=True)}
    page = build_demo(loaded, title=names[0] if len(names) == 1 else "hfgen demo")
    try:
        launch(page, host, port, share, prevent_thread_lock=True)
    except OSError as error:  # taken while the pipelines were loaded
        raise UserError(f"--port {port}: cannot listen on it: {error}") from error
    say(f"{', '.join(names)}: {page.share_url or page.local_url} (Ctrl-C stops it)")
    page.block_thread()


def pipeline_names(pipelines: list[str]) -> list[str]:
    """Name pipelines after their folders, or by full path where two folders have the same name.

    Raises:
        UserError: if a pipeline is given twice.
    """
    if len(set(pipelines)) < len(pipelines):
        raise UserError(f"{' '.join(pipelines)}: give each pipeline only once")
    names = []
    for where in pipelines:
        folder = Path(where).expanduser()
        part, is_run = folder.resolve().name, (folder / LAUNCHES_FILE).is_file()
        inside_a_run = folder.exists() and not is_run and part in ("pipeline", "best")
        local = folder.resolve().parent if inside_a_run else folder.resolve()
        names.append(local.name if folder.exists() else where)
    return [name if names.count(name) == 1 else where for name, where in zip(names, pipelines, strict=True)]


def refuse_port_in_use(host: str, port: int) -> None:
    """Raise a `UserError` if a page cannot be served at this host and port."""
    import errno
    import socket

    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is in use, perhaps by another demo; choose another") from error
        raise UserError(f"--host {host} --port {port}: cannot listen on it: {error}") from error
