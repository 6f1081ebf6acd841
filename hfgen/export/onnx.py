"""Networks as ONNX files, each compared with PyTorch before it is handed out.

The exporter is the one that traces (TorchScript's): it covers every network here from torch 2.5 on, which the newer
one does only from later versions. A trace may bake in what it saw, such as the batch size; so nothing is believed of
it until `check_parity` has run the file at several batch sizes.
"""

import importlib.util
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from hfgen import __version__
from hfgen.errors import UserError
from hfgen.export.graphs import Graph, graphs_of, how_to_draw
from hfgen.files import write_atomically


if TYPE_CHECKING:  # may not be installed
    import onnxruntime


OPSET = 17  # the first with LayerNormalization; GroupNormalization, of 18, is not yet right in this exporter
# Of the largest value that PyTorch gives. Rounding makes 1e-7 to 1e-6 of it (kernels add up in another order); a graph
# that is wrong somewhere makes 1e-2 and more. In an image, 1e-4 is an eightieth of one of the 256 levels.
RELATIVE_TOLERANCE = 1e-4
SMALLEST_TOLERANCE = 1e-6  # for a network that gives next to nothing
# What the exporter says of any network: that it traces, that it is the older one, and what it does not fold.
CHATTER = (
    "You are using the legacy TorchScript-based",
    "The feature will be removed",
    "Constant folding - Only steps=1",
)


@dataclass
class Exported:
    """A file that was written, and how it compares with PyTorch.

    Attributes:
        file: its name in the folder.
        num_bytes: its size.
        max_difference: the largest absolute difference of an output's value.
        tolerance: the smallest one that would have been refused, of all checks.
        seconds: of one pass of a single image by onnxruntime, the fastest of several.
        torch_seconds: the same by PyTorch, on as many threads.
    """

    file: str
    num_bytes: int
    max_difference: float
    tolerance: float
    seconds: float
    torch_seconds: float


def require_onnx() -> None:
    """Raise a `UserError` if the packages are missing that write and run ONNX files."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'hfgen export needs onnx and onnxruntime: pip install "hfgen[export]" ({missing[0]} is missing)'
        )


def export_onnx(pipeline: DiffusionPipeline, folder: Path) -> list[Exported]:
    """Write the networks that draw as ONNX files, and `export.json`, which says how to use them.

    A generator becomes `generator.onnx`; a VAE `decoder.onnx`, `encoder.onnx` and, if it has an ex-post density,
    `density.onnx`; a U-Net `unet.onnx`. The batch size is free, everything else fixed, the precision float32.

    Args:
        pipeline: as `open_pipeline(..., plain=True)` gives it. Its networks are moved to the CPU, into float32 and
            into evaluation mode.
        folder: new, or empty. It is there when all files are, and all of them were checked; else not.

    Raises:
        UserError: if the packages are missing, a network cannot be exported, a file gives something else than
            PyTorch, or the disk refuses.
    """
    require_onnx()
    graphs = graphs_of(pipeline)
    exported = []

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for graph in graphs:
            file = temporary / graph.file
            file.write_bytes(trace(graph))
            exported.append(_check(graph, file))
        description = json.dumps(describe(pipeline, graphs, exported), indent=2, allow_nan=False)
        (temporary / "export.json").write_text(description + "\n")

    write_atomically(folder.resolve(), write)
    return exported


def trace(graph: Graph) -> bytes:
    """Return the content of a graph's ONNX file, weights included.

    Raises:
        UserError: if the exporter gives up.
    """
    import onnx

    # One image: where a network takes the length of its batch as a plain number, the trace has a constant 1, and ONNX
    # broadcasts that to any batch.
    example = graph.checks[0]
    graph.module.eval()  # or the exporter, which restores the mode it found, would put the network into training mode
    names = [port.name for port in graph.inputs]
    content = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # That a value becomes a constant is what the check is for.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            for message in CHATTER:
                warnings.filterwarnings("ignore", message)
            torch.onnx.export(
                graph.module,
                example,
                content,  # type: ignore[arg-type]
                input_names=names,
                output_names=[graph.output.name],
                dynamic_axes={name: {0: "batch"} for name in (*names, graph.output.name)},
                opset_version=OPSET,
                dynamo=False,
            )
        model = onnx.load_from_string(content.getvalue())
        # The exporter gives up on some sizes of the output, or calls a height "batch" because it is unknown as well.
        dimensions = model.graph.output[0].type.tensor_type.shape.dim
        for dimension, size in zip(dimensions[1:], graph.output.shape, strict=True):
            dimension.dim_value = size
        onnx.checker.check_model(model, full_check=True)
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"{graph.file}: {graph.network} cannot be exported: {_one_line(error)}") from error
    return model.SerializeToString()


def check_parity(
    file: Path, reference: Callable[..., torch.Tensor], checks: Sequence[tuple[torch.Tensor, ...]]
) -> tuple[float, float]:
    """Run an ONNX file and what it was made of on the same inputs.

    Args:
        file: the ONNX file.
        reference: maps the inputs to the output.
        checks: batches of inputs; they should be of several sizes.

    Returns:
        The largest absolute difference, and the smallest that would have been refused.

    Raises:
        UserError: if the outputs differ, have other shapes or are not finite, or onnxruntime cannot run the file.
    """
    session = _session(file)
    largest, tolerances = 0.0, []
    for inputs in checks:
        with torch.no_grad():
            expected = reference(*inputs).numpy()
        found = _run(session, file, inputs)
        where = f"{file.name} at batch size {len(inputs[0])}"
        if found.shape != expected.shape:
            raise UserError(f"{where} gives {found.shape} instead of {expected.shape}; nothing was written")
        for name, values in (("PyTorch", expected), ("onnxruntime", found)):
            if not np.isfinite(values).all():
                raise UserError(f"{where}: what {name} gives is not finite everywhere; nothing was written")
        difference = np.abs(found.astype(np.float64) - expected)
        tolerances.append(max(RELATIVE_TOLERANCE * float(np.abs(expected).max()), SMALLEST_TOLERANCE))
        if difference.max() > tolerances[-1]:
            place = tuple(int(index) for index in np.unravel_index(difference.argmax(), difference.shape))
            raise UserError(
                f"{where} differs from PyTorch by {difference.max():.3g} (allowed: {tolerances[-1]:.3g}) at {place}"
                f"{_timesteps_of(inputs)}; nothing was written"
            )
        largest = max(largest, float(difference.max()))
    return largest, min(tolerances)


def describe(pipeline: DiffusionPipeline, graphs: Sequence[Graph], exported: Sequence[Exported]) -> dict[str, Any]:
    """Return what `export.json` holds: how to use the files without hfgen, and how they were checked."""
    import onnx
    import onnxruntime

    files = {}
    for graph, result in zip(graphs, exported, strict=True):
        files[graph.file] = {
            "network": graph.network,
            "inputs": [port.describe() for port in graph.inputs],
            "outputs": [graph.output.describe()],
            "max_difference": result.max_difference,
            "tolerance": result.tolerance,
            "checked_at_batch_sizes": sorted({len(inputs[0]) for inputs in graph.checks}),
        }
    config = (getattr(pipeline, "generator", None) or getattr(pipeline, "vae", None) or pipeline.unet).config
    description: dict[str, Any] = {
        "format": "onnx",
        "pipeline": type(pipeline).__name__,
        "sample_size": config.sample_size,
        "use": how_to_draw(graphs),
        "files": files,
    }
    if "latent_dim" in config:
        description["latent_dim"] = config.latent_dim
    if "scheduler" in pipeline.components:
        description["scheduler"] = _scheduler_config(pipeline.scheduler)
    modules = (torch, diffusers, onnx, onnxruntime)
    versions = {"hfgen": __version__, **{module.__name__: str(module.__version__) for module in modules}}
    return {**description, "opset": OPSET, "versions": versions}


def _scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return what `from_config` of the scheduler's class takes; no path of this machine, which a loaded one has.

    An infinite bound, for which JSON has no word, is the scheduler's own default and is left out.
    """
    config = json.loads(scheduler.to_json_string())
    kept = ("_class_name", "_diffusers_version")
    infinite = {key for key, value in config.items() if isinstance(value, float) and not math.isfinite(value)}
    return {
        key: value for key, value in config.items() if (key in kept or not key.startswith("_")) and key not in infinite
    }


def _check(graph: Graph, file: Path) -> Exported:
    """Compare a file with PyTorch, then measure how fast both are."""
    largest, tolerance = check_parity(file, graph.reference, graph.checks)
    session, inputs = _session(file), graph.checks[0]
    with torch.no_grad():
        torch_seconds = _fastest(lambda: graph.reference(*inputs))
    seconds = _fastest(lambda: _run(session, file, inputs))
    return Exported(file.name, file.stat().st_size, largest, tolerance, seconds, torch_seconds)


def _fastest(call: Callable[[], object], repeats: int = 4) -> float:
    """Return the seconds of the fastest of several calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _session(file: Path) -> "onnxruntime.InferenceSession":
    """Open a file on the CPU, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each kind of failure, and no common one
        raise UserError(f"{file.name}: onnxruntime cannot open it: {_one_line(error)}; nothing was written") from error


def _run(session: "onnxruntime.InferenceSession", file: Path, inputs: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the first output of a file."""
    names = [port.name for port in session.get_inputs()]
    try:
        return session.run(None, {name: part.numpy() for name, part in zip(names, inputs, strict=True)})[0]
    except Exception as error:  # as in `_session`
        raise UserError(
            f"{file.name} at batch size {len(inputs[0])}: onnxruntime fails: {_one_line(error)}; nothing was written"
        ) from error


def _timesteps_of(inputs: Sequence[torch.Tensor]) -> str:
    return f", timesteps {inputs[1].tolist()}" if len(inputs) > 1 else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
