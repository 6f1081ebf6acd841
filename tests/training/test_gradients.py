"""Gradients of a batch in parts: the same as of the whole, and smaller parts when memory runs out."""

import json

import pytest
import torch
from accelerate import Accelerator
from toy_runs import checkpoint, events, train

from hfgen.training.gradients import GradientAccumulation


pytestmark = pytest.mark.usefixtures("fresh_accelerate_state", "quick_retries")
OUT_OF_MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN's choice of an algorithm": RuntimeError("FIND was unable to find an engine to execute this computation"),
    "convolution on a CPU": RuntimeError("could not create a primitive"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:130] . DefaultCPUAllocator: can't allocate memory: you tried"),
}


@pytest.fixture
def quick_retries(monkeypatch):
    """When memory runs out, garbage is collected: about a second each time, with all that the tests have made."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


class StandInRun:
    """The part of a run that the accumulation uses."""

    def __init__(self, num_processes=1):
        self.accelerator, self.device, self.warnings = Accelerator(cpu=True), torch.device("cpu"), []
        self.accelerator.state.num_processes = num_processes
        self.warn = self.warnings.append

    def generator(self, purpose):
        return torch.Generator().manual_seed(len(purpose))


def accumulated(batch_size, parts=1, most=None, error=None, **options):
    """The gradient of a linear layer, the sizes of the parts tried, and the accumulation; `most` images fit."""
    torch.manual_seed(0)
    network, images, sizes = torch.nn.Linear(3, 1), torch.randn(batch_size, 3), []
    run = StandInRun(options.pop("num_processes", 1))
    accumulation = GradientAccumulation(run, batch_size, parts, **options)

    def loss_of(part):
        sizes.append(part.stop - part.start)
        loss = network(images[part]).square().mean()
        if most is not None and sizes[-1] > most:
            raise error
        return loss, part

    results = accumulation.backward(network, loss_of)
    assert results == [slice(start, start + sizes[-1]) for start in range(0, batch_size, sizes[-1])]
    return network.weight.grad, sizes, accumulation


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
@pytest.mark.parametrize(
    ("batch_size", "parts", "most", "sizes"),
    [
        (8, 1, 8, [8]),
        (8, 2, 8, [4, 4]),
        (8, 1, 7, [8, 4, 4]),
        (8, 1, 1, [8, 4, 2, *8 * [1]]),
        (8, 2, 3, [4, 2, 2, 2, 2]),
        (6, 1, 2, [6, 3, *6 * [1]]),  # 2 parts of 3; 4 or 5 would not be equal
        (7, 1, 4, [7, *7 * [1]]),
    ],
)
def test_smaller_parts_are_taken_until_they_fit_and_the_gradient_is_that_of_a_batch(
    batch_size, parts, most, sizes, error
):
    gradient, tried, accumulation = accumulated(batch_size, parts, most, error)
    torch.testing.assert_close(gradient, accumulated(batch_size)[0])
    assert tried == sizes and accumulation.parts == batch_size // sizes[-1]


def test_the_gradients_of_parts_before_memory_ran_out_are_not_counted_twice():
    network, images, starts = torch.nn.Linear(1, 1), torch.arange(8.0).reshape(8, 1), []

    def loss_of(part):
        starts.append(part.start)
        if starts == [0, 4]:
            raise OUT_OF_MEMORY["CUDA"]
        return network(images[part]).mean(), None

    GradientAccumulation(StandInRun(), 8, 2).backward(network, loss_of)
    assert starts == [0, 4, 0, 2, 4, 6] and network.weight.grad.item() == pytest.approx(3.5)  # the mean of 0 to 7


@pytest.mark.parametrize(
    ("most", "error", "options"),
    [
        (0, OUT_OF_MEMORY["CPU"], {}),  # not even one image fits
        (2, RuntimeError("shapes do not match"), {}),
        (2, OUT_OF_MEMORY["CUDA"], {"may_split": False}),
        (2, OUT_OF_MEMORY["CUDA"], {"num_processes": 2}),
        (1, OUT_OF_MEMORY["CPU"], {"smallest": 2}),  # BatchNorm
    ],
    ids=["one image", "another error", "not allowed", "two processes", "smallest part"],
)
def test_what_smaller_parts_do_not_mend_is_raised(most, error, options):
    with pytest.raises(RuntimeError) as raised:
        accumulated(8, 1, most, error, **options)
    assert raised.value is error


@pytest.mark.parametrize(
    ("batch_size", "asked", "parts"),
    [(8, 1, 2), (8, 4, 4), (16, 1, 4), (4, 1, 1), (6, 1, 2), (6, 2, 2), (5, 1, 5), (2, 1, 1), (24, 1, 6)],
)
def test_a_resumed_run_takes_parts_as_small_as_it_had_or_smaller_if_asked(batch_size, asked, parts):
    state = accumulated(8, 1, 4, OUT_OF_MEMORY["CPU"])[2].state_dict()  # parts of 4 images
    resumed = GradientAccumulation(StandInRun(), batch_size, asked)
    resumed.load_state_dict(state)
    assert resumed.parts == parts and batch_size % parts == 0
    in_one = GradientAccumulation(StandInRun(), batch_size, may_split=False)  # a discriminator learns from each part
    in_one.load_state_dict(state)
    assert in_one.parts == 1


def test_parts_that_were_only_asked_for_are_not_kept_when_others_are():
    state = GradientAccumulation(StandInRun(), 8, 4).state_dict()
    for batch_size, asked in ((8, 1), (8, 2), (6, 1), (2, 1)):
        resumed = GradientAccumulation(StandInRun(), batch_size, asked)
        resumed.load_state_dict(state)
        assert resumed.parts == asked
    earlier = GradientAccumulation(StandInRun(), 8)
    earlier.load_state_dict({"parts": 4})  # of an earlier version, which did not say why
    assert earlier.parts == 4


@pytest.mark.parametrize(("kind", "options"), [("ddpm", ["--unet", "library"]), ("vae", [])])
def test_a_run_that_is_short_of_memory_goes_on_in_parts_and_does_so_when_resumed(tmp_path, monkeypatch, kind, options):
    backward = GradientAccumulation.backward

    def with_memory_for_two(self, network, loss_of):
        def limited(part):
            loss = loss_of(part)
            if part.stop - part.start > 2:
                raise OUT_OF_MEMORY["CUDA"]
            return loss

        return backward(self, network, limited)

    train(kind, tmp_path / "whole", *options)
    with monkeypatch.context() as patched:
        patched.setattr(GradientAccumulation, "backward", with_memory_for_two)
        train(kind, tmp_path / "run", *options, "--max_train_steps", "4")
    (warning,) = [event["what"] for event in events(tmp_path / "run") if event["event"] == "warning"]
    assert "out of memory: from now on the 4 images of an update are computed in 2 parts" in warning
    train(kind, tmp_path / "run", *options, "--resume", "latest")
    state = torch.load(checkpoint(tmp_path / "run", 6) / "state.pt", weights_only=True)
    assert state["accumulation"] == {"parts": 2, "asked": 1, "batch_size": 4}
    if kind == "ddpm":  # a VAE's BatchNorm sees other batches
        torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-4, atol=0)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
