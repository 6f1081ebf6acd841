"""`hfgen export`: write a pipeline's networks as files for other runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from hfgen.commands.options import PipelineFolder, loading, require_new_folder
from hfgen.errors import UserError
from hfgen.files import require_utf8
from hfgen.texts import say


FORMATS = ("onnx",)


def export(
    pipeline: PipelineFolder,
    output: Annotated[Path, typer.Option("--output", help="new folder for the .onnx files and export.json")],
    file_format: Annotated[str, typer.Option("--format", help="file format; only onnx is supported")] = "onnx",
) -> None:
    """Export a pipeline's networks to run without PyTorch; files are written only if their outputs match PyTorch's."""
    require_new_folder(output)
    require_utf8(output, "--output")
    if file_format not in FORMATS:
        raise UserError(f"--format {file_format}: must be {' or '.join(FORMATS)}")
    with loading():
        from hfgen.export.onnx import export_onnx, require_onnx
        from hfgen.inference.opening import open_pipeline

    require_onnx()
    for result in export_onnx(open_pipeline(pipeline, "cpu", plain=True), output):
        say(
            f"{result.file}: {result.num_bytes / 1e6:.3g} MB, differs from PyTorch by at most "
            f"{result.max_difference:.1e} (allowed: {result.tolerance:.1e}); one image in "
            f"{1000 * result.seconds:.3g} ms with onnxruntime, {1000 * result.torch_seconds:.3g} ms with plain PyTorch"
        )
    say(f"export.json, with instructions for using the files, in {output}")
