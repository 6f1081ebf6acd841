"""Networks as ONNX files, each compared with PyTorch before it is written.

Uses the tracing (TorchScript) exporter: it supports every network here from torch 2.5 on, the newer exporter only from
later versions. A trace may hard-code what it saw, such as the batch size, so `check_parity` runs each file at several
batch sizes.
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
from hfgen.export.graphs import Graph, graphs_of, how_to_generate
from hfgen.families import image_network
from hfgen.files import write_atomically
from hfgen.methods.schedules import default_num_inference_steps
from hfgen.texts import one_line


if TYPE_CHECKING:  # may not be installed
    import onnxruntime


OPSET = 17  # the first with LayerNormalization; GroupNormalization, of 18, is not yet right in this exporter
# Relative to PyTorch's largest value. Rounding (kernels sum in a different order) gives 1e-7 to 1e-6; a wrong graph
# gives 1e-2 or more. In an image, 1e-4 is an eightieth of one of the 256 levels.
RELATIVE_TOLERANCE = 1e-4
SMALLEST_TOLERANCE = 1e-6  # for outputs close to zero
REPEATS = 4  # of a call whose time is measured
# Warnings that the exporter gives for every network.
CHATTER = (
    "You are using the legacy TorchScript-based",
    "The feature will be removed",
    "Constant folding - Only steps=1",
)


@dataclass
class Exported:
    """A written file and its comparison with PyTorch.

    Attributes:
        file: file name in the folder.
        num_bytes: file size.
        max_difference: largest absolute difference of an output value.
        tolerance: largest allowed difference; the smallest over all checks.
        seconds: time for a single image with onnxruntime, the fastest of several runs.
        torch_seconds: the same with PyTorch, on the same number of threads.
    """

    file: str
    num_bytes: int
    max_difference: float
    tolerance: float
    seconds: float
    torch_seconds: float


def require_onnx() -> None:
    """Raise a `UserError` if the packages for writing and running ONNX files are missing."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'hfgen export needs onnx and onnxruntime: pip install "hfgen[export]" ({missing[0]} is missing)'
        )


def export_onnx(pipeline: DiffusionPipeline, folder: Path) -> list[Exported]:
    """Write a pipeline's networks as ONNX files, and `export.json`, which says how to use them.

    A generator becomes `generator.onnx`; a VAE `decoder.onnx`, `encoder.onnx` and, if it has an ex-post density,
    `density.onnx`; a U-Net `unet.onnx`. The batch size is dynamic, all other sizes are fixed, the precision is
    float32.

    Args:
        pipeline: from `open_pipeline(..., plain=True)`. Its networks are moved to the CPU, to float32 and to eval
            mode.
        folder: new or empty; created only after all files were written and checked.

    Raises:
        UserError: if packages are missing, a network cannot be exported, a file's output differs from PyTorch's, or
            the folder cannot be written.
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
        UserError: if the exporter fails.
    """
    import onnx

    # One image: if a network uses the batch size as a plain number, the trace has a constant 1, which ONNX broadcasts
    # to any batch.
    example = graph.checks[0]
    graph.module.eval()  # else the exporter, which restores the mode, would leave the network in train mode
    names = [port.name for port in graph.inputs]
    content = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Warnings about values that become constants: `check_parity` covers these.
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
        # The exporter leaves some output sizes unknown, or names an unknown height "batch".
        dimensions = model.graph.output[0].type.tensor_type.shape.dim
        for dimension, size in zip(dimensions[1:], graph.output.shape, strict=True):
            dimension.dim_value = size
        onnx.checker.check_model(model, full_check=True)
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"{graph.file}: {graph.network} cannot be exported: {one_line(error)}") from error
    return model.SerializeToString()


def check_parity(
    file: Path, reference: Callable[..., torch.Tensor], checks: Sequence[tuple[torch.Tensor, ...]]
) -> tuple[float, float]:
    """Compare an ONNX file with its reference on the same inputs.

    Args:
        file: the ONNX file.
        reference: maps the inputs to the output.
        checks: batches of inputs, of several batch sizes.

    Returns:
        The largest absolute difference, and the smallest tolerance over all checks.

    Raises:
        UserError: if the outputs' values or shapes differ, are not finite, or onnxruntime cannot run the file.
    """
    session = _session(file)
    largest, tolerances = 0.0, []
    for inputs in checks:
        with torch.no_grad():
            expected = reference(*inputs).numpy()
        found = _run(session, file, inputs)
        where = f"{file.name} at batch size {len(inputs[0])}"
        if found.shape != expected.shape:
            raise UserError(f"{where} returns {found.shape} instead of {expected.shape}; nothing was written")
        for name, values in (("PyTorch", expected), ("onnxruntime", found)):
            if not np.isfinite(values).all():
                raise UserError(f"{where}: the output of {name} contains non-finite values; nothing was written")
        difference = np.abs(found.astype(np.float64) - expected)
        tolerances.append(max(RELATIVE_TOLERANCE * float(np.abs(expected).max()), SMALLEST_TOLERANCE))
        if difference.max() > tolerances[-1]:
            index = tuple(int(part) for part in np.unravel_index(difference.argmax(), difference.shape))
            timesteps = f", timesteps {inputs[1].tolist()}" if len(inputs) > 1 else ""
            raise UserError(
                f"{where} differs from PyTorch by {difference.max():.3g} (allowed: {tolerances[-1]:.3g}) at {index}"
                f"{timesteps}; nothing was written"
            )
        largest = max(largest, float(difference.max()))
    return largest, min(tolerances)


def describe(pipeline: DiffusionPipeline, graphs: Sequence[Graph], exported: Sequence[Exported]) -> dict[str, Any]:
    """Return the content of `export.json`: how to use the files without hfgen, and how they were checked."""
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
    config = image_network(pipeline).config
    description: dict[str, Any] = {
        "format": "onnx",
        "pipeline": type(pipeline).__name__,
        "sample_size": config.sample_size,
        "use": how_to_generate(graphs),
        "files": files,
    }
    if "latent_dim" in config:
        description["latent_dim"] = config.latent_dim
    if "scheduler" in pipeline.components:
        description["num_inference_steps"] = default_num_inference_steps(pipeline)
        description["scheduler"] = _scheduler_config(pipeline.scheduler)
    modules = (torch, diffusers, onnx, onnxruntime)
    versions = {"hfgen": __version__, **{module.__name__: str(module.__version__) for module in modules}}
    return {**description, "opset": OPSET, "versions": versions}


def _scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return the scheduler's config for `from_config`, without local paths, which a loaded scheduler has.

    Infinite bounds, which JSON does not support, are the scheduler's default and are left out.
    """
    config = json.loads(scheduler.to_json_string())
    kept = ("_class_name", "_diffusers_version")
    infinite = {key for key, value in config.items() if isinstance(value, float) and not math.isfinite(value)}
    return {
        key: value for key, value in config.items() if (key in kept or not key.startswith("_")) and key not in infinite
    }


def _check(graph: Graph, file: Path) -> Exported:
    """Compare a file with PyTorch, then measure the speed of both."""
    largest, tolerance = check_parity(file, graph.reference, graph.checks)
    session, inputs = _session(file), graph.checks[0]
    with torch.no_grad():
        torch_seconds = _fastest(lambda: graph.reference(*inputs))
    seconds = _fastest(lambda: _run(session, file, inputs))
    return Exported(file.name, file.stat().st_size, largest, tolerance, seconds, torch_seconds)


def _fastest(call: Callable[[], object]) -> float:
    """Return the time of the fastest of several calls, in seconds."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _session(file: Path) -> "onnxruntime.InferenceSession":
    """Open a file on the CPU, with PyTorch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise UserError(
            f"{file.name}: cannot be opened by onnxruntime: {one_line(error)}; nothing was written"
        ) from error


def _run(session: "onnxruntime.InferenceSession", file: Path, inputs: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the first output of a file."""
    names = [port.name for port in session.get_inputs()]
    try:
        return session.run(None, {name: part.numpy() for name, part in zip(names, inputs, strict=True)})[0]
    except Exception as error:  # as in `_session`
        raise UserError(
            f"{file.name} at batch size {len(inputs[0])}: onnxruntime fails: {one_line(error)}; nothing was written"
        ) from error
