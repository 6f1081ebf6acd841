import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from picture_files import noise
from PIL import Image

from hfgen.data import batches as batches_module
from hfgen.data.batches import ImageBatches, copied_to, random_crop
from hfgen.data.intake import IntakeReport
from hfgen.data.loading import TrainingData, load_training_data
from hfgen.data.settings import DataSettings
from hfgen.data.store import ImageStore, load_images
from hfgen.errors import UserError


CPU = torch.device("cpu")
COUNT = 7  # images in the store: a prime, so that no batch size divides it
AUGMENTED = {"horizontal_flip": True, "random_rotation": 30.0, "random_erasing": 0.5}
SIZES = [(8, 8), (8, 13), (20, 8), (8, 8), (9, 8), (8, 31), (11, 8)]


def store_of(folder: Path, sizes: Iterable[tuple[int, int]], **settings) -> ImageStore:
    folder.mkdir(exist_ok=True)
    for index, (height, width) in enumerate(sizes):
        Image.fromarray(noise(height, width, index)).save(folder / f"{index}.png")
    return load_images(DataSettings(dataset=str(folder), sample_size=8, **settings))


@pytest.fixture
def store(tmp_path) -> ImageStore:
    """Seven pictures of 8 x 8 pixels."""
    return store_of(tmp_path / "even", [(8, 8)] * COUNT)


@pytest.fixture
def ragged_store(tmp_path) -> ImageStore:
    """Seven pictures of different sizes, to be cropped at random."""
    return store_of(tmp_path / "ragged", SIZES, crop="random")


def batches_of(store: ImageStore, batch_size: int = 3, seed: int = 0, place=(CPU, 0, 1), **settings) -> ImageBatches:
    return ImageBatches(store, DataSettings(sample_size=8, **settings), batch_size, seed, *place)


def pixels_of(batch: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: uint8 `(batch_size, height, width, 3)`."""
    return ((batch + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def indices_in(batch: torch.Tensor) -> list[int]:
    """Tell which picture of the store each image of an unaltered batch is."""
    pictures = [noise(8, 8, index) for index in range(COUNT)]
    return [
        next(index for index, picture in enumerate(pictures) if np.array_equal(picture, image))
        for image in pixels_of(batch)
    ]


def sequence(store: ImageStore, length: int, batch_size: int, num_processes: int = 1, seed: int = 0) -> list[int]:
    """The pictures that all processes together draw, one after the other."""
    processes = [batches_of(store, batch_size, seed, (CPU, index, num_processes)) for index in range(num_processes)]
    drawn = []
    while len(drawn) < length:
        for batches in processes:
            drawn += indices_in(next(batches))
    return drawn[:length]


# The order


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_every_epoch_holds_every_image_once_over_all_batches_and_processes(store, batch_size, num_processes):
    drawn = sequence(store, 12 * COUNT, batch_size, num_processes)
    for epoch in range(12):
        assert sorted(drawn[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))


def test_the_order_depends_on_the_seed_alone_not_on_how_it_is_cut_into_batches(store):
    order = sequence(store, 60, batch_size=1)
    for batch_size, num_processes in [(5, 1), (2, 2), (3, 4), (40, 1)]:
        assert sequence(store, 60, batch_size, num_processes) == order
    torch.manual_seed(99)
    np.random.seed(99)
    assert sequence(store, 60, batch_size=1) == order


def test_the_order_differs_between_epochs_and_between_seeds(store):
    orders = [tuple(sequence(store, COUNT, COUNT, seed=seed)) for seed in range(10)]
    drawn = sequence(store, 10 * COUNT, COUNT)
    orders += [tuple(drawn[start : start + COUNT]) for start in range(COUNT, 10 * COUNT, COUNT)]
    assert len(set(orders)) == len(orders) == 19  # of 5040 possible orders


def test_every_place_of_an_epoch_is_taken_by_every_image_alike(store):
    batches = batches_of(store, batch_size=COUNT)
    orders = np.array([batches.indices(epoch) for epoch in range(1400)])
    often = np.array([[(orders[:, place] == index).sum() for index in range(COUNT)] for place in range(COUNT)])
    assert abs(often - 200).max() < 60  # 4.6 standard deviations


@pytest.mark.parametrize(("batch_size", "num_processes"), [(1, 7), (2, 3), (3, 2)])
def test_processes_draw_different_images_in_a_step(store, batch_size, num_processes):
    processes = [batches_of(store, batch_size, 0, (CPU, index, num_processes)) for index in range(num_processes)]
    step = [index for batches in processes for index in indices_in(next(batches))]
    assert len(set(step)) == batch_size * num_processes


def test_a_store_of_one_image_gives_batches_of_any_size(tmp_path):
    batches = batches_of(store_of(tmp_path / "one", [(8, 8)]), batch_size=5)
    for _ in range(3):
        assert indices_in(next(batches)) == [0] * 5


def test_indices_tell_what_a_batch_holds_before_it_is_drawn(store):
    batches = batches_of(store, 3, 0, (CPU, 1, 2))
    told = [batches.indices(number).tolist() for number in (4, 0, 2, 3, 1)]
    drawn = [indices_in(next(batches)) for _ in range(5)]
    assert told == [drawn[4], drawn[0], drawn[2], drawn[3], drawn[1]]


# What a batch holds


@pytest.mark.parametrize("settings", [{}, AUGMENTED, {"crop": "random"}, {"crop": "random", **AUGMENTED}])
def test_a_batch_has_the_promised_shape_type_range_and_memory_format(store, ragged_store, settings):
    batches = batches_of(ragged_store if "crop" in settings else store, **settings)
    assert iter(batches) is batches
    for _ in range(4):
        batch = next(batches)
        assert batch.shape == (3, 3, 8, 8) and batch.dtype == torch.float32 and batch.device == CPU
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert batch.abs().max() <= 1 + 1e-6


def test_a_random_crop_of_a_picture_of_the_training_size_is_the_whole_picture(store):
    whole, cut = batches_of(store, 5, **AUGMENTED), batches_of(store, 5, crop="random", **AUGMENTED)
    for _ in range(6):
        assert torch.equal(next(whole), next(cut))


def test_a_batch_is_a_copy_and_altering_it_leaves_the_store_alone(store):
    before = store.as_array().copy()
    batches = batches_of(store)
    for _ in range(5):
        next(batches).zero_()
    assert np.array_equal(store.as_array(), before)


def test_each_batch_and_each_process_and_each_seed_is_augmented_in_its_own_way(tmp_path):
    one = store_of(tmp_path / "one", [(8, 8)])
    drawn = [next(batches_of(one, 4, 0, (CPU, index, 3), **AUGMENTED)) for index in range(3)]
    drawn.append(next(batches_of(one, 4, 1, **AUGMENTED)))
    batches = batches_of(one, 4, 0, **AUGMENTED)
    next(batches)
    drawn += [next(batches) for _ in range(3)]
    assert not any(torch.equal(one, other) for index, one in enumerate(drawn) for other in drawn[:index])


def test_drawing_batches_leaves_the_global_random_numbers_alone(ragged_store):
    torch.manual_seed(5)
    np.random.seed(5)
    wanted = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    next(batches_of(ragged_store, crop="random", **AUGMENTED))
    assert (torch.rand(1), np.random.rand()) == wanted


# Random crops


def test_every_random_crop_is_a_window_of_its_picture_and_all_windows_are_drawn(ragged_store):
    batches = batches_of(ragged_store, batch_size=COUNT, crop="random")
    seen = set()
    for number in range(150):
        for index, image in zip(batches.indices(number), pixels_of(next(batches)), strict=True):
            height, width = SIZES[index]
            places = [
                (top, left)
                for top in range(height - 7)
                for left in range(width - 7)
                if np.array_equal(noise(height, width, index)[top : top + 8, left : left + 8], image)
            ]
            assert len(places) == 1
            seen.add((int(index), *places[0]))
    everywhere = {
        (index, top, left)
        for index, (height, width) in enumerate(SIZES)
        for top in range(height - 7)
        for left in range(width - 7)
    }
    assert seen == everywhere


def test_the_place_of_a_crop_is_drawn_anew_for_each_image_batch_process_and_seed(tmp_path):
    one = store_of(tmp_path / "one", [(8, 200)], crop="random")
    first = batches_of(one, 4, crop="random")
    drawn = [*next(first), *next(first)]
    drawn += next(batches_of(one, 4, 0, (CPU, 1, 2), crop="random"))
    drawn += next(batches_of(one, 4, 1, crop="random"))
    assert len({image.numpy().tobytes() for image in drawn}) >= 14  # of 193 places, 16 draws may meet once or twice


def test_a_random_crop_takes_every_place_alike():
    picture, generator = noise(10, 12), np.random.default_rng(0)
    often = np.zeros((3, 5), int)
    windows = {picture[top : top + 8, left : left + 8].tobytes(): (top, left) for top in range(3) for left in range(5)}
    for _ in range(3000):
        often[windows[random_crop(picture, 8, generator).tobytes()]] += 1
    assert abs(often - 200).max() < 65  # 4.7 standard deviations


# Resuming


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("drawn", [0, 1, 2, 9])
def test_resumed_batches_go_on_bit_for_bit(store, ragged_store, crop, drawn):
    settings = {"crop": crop, **AUGMENTED}
    images = store if crop == "center" else ragged_store
    place = (CPU, 1, 2)
    uninterrupted = batches_of(images, 4, 3, place, **settings)
    for _ in range(drawn):
        next(uninterrupted)
    state = json.loads(json.dumps(uninterrupted.state_dict()))  # plain values only
    wanted = [next(uninterrupted) for _ in range(6)]
    resumed = batches_of(images, 4, 3, place, **settings)
    resumed.load_state_dict(state)
    assert all(torch.equal(next(resumed), batch) for batch in wanted)
    assert resumed.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("sizes", [(4, 6, 4), (6, 1, 5), (1, 20, 3)])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_with_another_batch_size_the_next_images_are_those_that_were_next(store, sizes, num_processes):
    drawn, state = [], None
    for size in sizes:
        processes = [batches_of(store, size, 3, (CPU, index, num_processes)) for index in range(num_processes)]
        for batches in processes:
            if state is not None:
                batches.load_state_dict(state)
        for _ in range(3):
            drawn += [index for batches in processes for index in indices_in(next(batches))]
        state = json.loads(json.dumps(processes[0].state_dict()))
    assert drawn == sequence(store, len(drawn), 1, seed=3)
    assert state["images"] == len(drawn) == 3 * sum(sizes) * num_processes


def test_a_state_without_a_number_of_images_is_that_of_the_same_batch_size(store):
    batches, other = batches_of(store), batches_of(store)
    wanted = [next(batches) for _ in range(3)][2]
    other.load_state_dict({"position": 2})
    assert torch.equal(next(other), wanted) and other.state_dict() == batches.state_dict()


def test_batches_can_be_set_back_and_forth(ragged_store):
    batches = batches_of(ragged_store, 4, crop="random", **AUGMENTED)
    states, wanted = [], []
    for _ in range(6):
        states.append(batches.state_dict())
        wanted.append(next(batches))
    for number in (3, 0, 5, 1):
        batches.load_state_dict(states[number])
        assert torch.equal(next(batches), wanted[number])


def test_the_first_images_can_be_had_at_any_time(ragged_store):
    settings = DataSettings("toys", sample_size=8, crop="random", horizontal_flip=True)
    batches, others = (ImageBatches(ragged_store, settings, 3, 0, torch.device("cpu")) for _ in range(2))
    first, second = next(batches), next(batches)
    with TrainingData(batches, len(ragged_store), "").from_the_start() as again:
        assert torch.equal(next(again), first) and torch.equal(next(again), second)
        next(again)
    assert torch.equal(next(batches), [next(others) for _ in range(3)][2])


def test_images_are_copied_to_a_device_in_parts_without_a_warning(monkeypatch):
    monkeypatch.setattr("hfgen.data.batches.COPIED_AT_ONCE", 3)
    array = np.frombuffer(np.arange(7 * 2 * 2 * 3, dtype=np.uint8).tobytes(), np.uint8).reshape(7, 2, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of torch, about an array that must not be written to
        copied = copied_to(torch.device("cpu"), array)
    assert copied.dtype == torch.uint8 and np.array_equal(copied.numpy(), array)


def test_a_state_taken_earlier_does_not_move_with_the_batches(store):
    batches = batches_of(store)
    state = batches.state_dict()
    first = next(batches)
    batches.load_state_dict(state)
    assert torch.equal(next(batches), first)


# On an accelerator


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("part", [0.25, 0.0])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_gpu_gets_the_batches_of_a_cpu_whether_the_images_fit_on_it_or_not(
    store, ragged_store, crop, part, monkeypatch
):
    monkeypatch.setattr(batches_module, "RESIDENT_PART", part)
    images = store if crop == "center" else ragged_store
    settings = {"crop": crop, **AUGMENTED}
    on_gpu = batches_of(images, 4, 0, (torch.device("cuda"), 0, 1), **settings)
    on_cpu = batches_of(images, 4, **settings)
    for number in (0, 1, 2, 9, 10, 4):
        for batches in (on_gpu, on_cpu):
            batches.load_state_dict({"position": number})
        batch = next(on_gpu)
        assert batch.device.type == "cuda" and batch.is_contiguous(memory_format=torch.channels_last)
        assert (batch.cpu() - next(on_cpu)).abs().max() < 1e-4


# The call that a training script makes


def one_of(num_processes: int, index: int = 0) -> SimpleNamespace:
    """What is read of an `Accelerator`."""
    return SimpleNamespace(device=CPU, process_index=index, num_processes=num_processes, is_main_process=index == 0)


def test_training_data_are_loaded_with_the_report_printed_and_kept(store, tmp_path, capsys):
    settings = DataSettings(dataset=str(tmp_path / "even"), sample_size=8, **AUGMENTED)
    data = load_training_data(settings, 4, 3, one_of(1), tmp_path)
    assert data.images_per_epoch == COUNT and data.digest == store.digest
    assert torch.equal(next(data.batches), next(batches_of(store, 4, 3, **AUGMENTED)))
    assert capsys.readouterr().out == f"{store.report}\n"
    report = json.loads((tmp_path / "intake.json").read_text())
    assert report.pop("name") == "even" and str(IntakeReport(**report)) == str(store.report)


def test_another_process_than_the_first_gets_its_share_and_reports_nothing(store, tmp_path, capsys):
    settings = DataSettings(dataset=str(tmp_path / "even"), sample_size=8)
    data = load_training_data(settings, 2, 3, one_of(3, index=2), tmp_path)
    assert torch.equal(next(data.batches), next(batches_of(store, 2, 3, (CPU, 2, 3))))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "intake.json").exists()


# Settings


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sample_size": 7}, "--sample_size 7"),
        ({"sample_size": 1025}, "--sample_size 1025"),
        ({"random_erasing": 1.01}, "--random_erasing 1.01"),
        ({"random_erasing": -0.1}, "--random_erasing -0.1"),
        ({"random_erasing": float("nan")}, "--random_erasing nan"),
        ({"random_rotation": 181.0}, "--random_rotation 181.0"),
        ({"random_rotation": -1.0}, "--random_rotation -1.0"),
        ({"shuffle_buffer_size": 0}, "--shuffle_buffer_size 0"),
        ({"shuffle_buffer_size": 7}, "--shuffle_buffer_size 7: only for --streaming"),
        ({"streaming": True, "five_crop": True}, "--streaming"),
        ({"streaming": True, "drop_duplicates": True}, "--streaming"),
    ],
)
def test_senseless_settings_are_refused_by_name_and_value(settings, told):
    with pytest.raises(UserError, match=told):
        DataSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"sample_size": 8},
        {"sample_size": 1024},
        {"random_erasing": 1.0},
        {"random_rotation": 180.0},
        {"streaming": True},
    ],
)
def test_settings_at_the_edge_are_allowed(settings):
    assert DataSettings(**settings)
