"""Streams from the Hub on loopback.

`HF_ENDPOINT` is read when the libraries are imported. So the server runs here, and this file, run as a script, is its
client: it does everything that needs the Hub, once, and prints one line of JSON for each of the functions below that
are marked as `answer`. The tests judge the answers.
"""

import contextlib
import hashlib
import io
import json
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hfgen.data.settings import DataSettings
from hfgen.errors import UserError


COUNT, SHARDS = 43, 4  # images and parquet files of tester/paintings
ANSWERS = {}


def answer(function):
    ANSWERS[function.__name__] = function
    return function


# ---------------------------------------------------------------------------------------------------------------------
# The client


def encoded(index: int) -> bytes:
    """A PNG whose green tells its index; noise in red and a ramp in blue tell crops and mirrored images apart."""
    red = np.random.default_rng(index).integers(256, size=(32, 40))
    pixels = np.stack([red, np.full_like(red, index), np.arange(40) * 6 + 0 * red], axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def encoded_grey(highest: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32), highest, np.uint16)).save(buffer, "png")
    return buffer.getvalue()


def fill_the_hub(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature
    from huggingface_hub import HfApi

    def push(name, shards, **columns):
        rows = {key: [content and {"bytes": content, "path": None} for content in columns[key]] for key in columns}
        features = Features({key: ImageFeature() for key in columns})
        Dataset.from_dict(rows, features=features).push_to_hub(f"tester/{name}", num_shards=shards)

    indices = range(COUNT)
    push("paintings", SHARDS, imageA=[encoded(i) for i in indices], imageB=[encoded(200 - i) for i in indices])
    bad = {2: None, 5: b"not an image", 11: encoded(11)[:90]}
    push("partly_broken", 1, image=[bad.get(i, encoded(i)) for i in range(12)])
    push("broken", 1, image=[b"not an image"] * 6)
    push("twelve_bits", 1, image=[encoded_grey(4095 - i) for i in range(4)])
    push("doomed", 4, image=[encoded(i) for i in range(16)])
    for name in ("files", "zipped", "unmarked", "script"):
        (folder / name).mkdir()
    for index in range(12):
        (folder / "files" / f"{index:02d}.png").write_bytes(encoded(index))
    with zipfile.ZipFile(folder / "zipped" / "images.zip", "w") as archive:
        for index in range(12):
            archive.writestr(f"{index:02d}.png", encoded(index))
    parquet.write_table(pa.table({"picture": [encoded(i) for i in range(12)]}), folder / "unmarked" / "train.parquet")
    (folder / "script" / "script.py").write_text("import datasets")
    for name in ("files", "zipped", "unmarked", "script"):
        HfApi().create_repo(f"tester/{name}", repo_type="dataset")
        HfApi().upload_folder(repo_id=f"tester/{name}", repo_type="dataset", folder_path=folder / name)


def open_stream(dataset="tester/paintings", batch_size=1, seed=0, process=0, processes=1, **settings):
    from hfgen.data.streaming import StreamBatches

    if dataset == "tester/paintings":
        settings.setdefault("dataset_column", "imageA")
    settings = DataSettings(dataset=dataset, streaming=True, sample_size=32, **{"shuffle_buffer_size": 8, **settings})
    return StreamBatches(settings, batch_size, seed, torch.device("cpu"), process, processes)


def indices_of(batch: torch.Tensor) -> list[int]:
    return ((batch[:, 1].mean(dim=(1, 2)) + 1) * 127.5).round().int().tolist()


def epochs_of(stream, epochs: int) -> list[list[int]]:
    """The images of the next epochs, one list each; the stream yields batches of one image."""
    first = stream.state_dict()["epoch"]
    found: list[list[int]] = [[] for _ in range(epochs)]
    while (epoch := stream.state_dict()["epoch"] - first) < epochs:
        found[epoch] += indices_of(next(stream))
    return found


def fingerprints(stream, batches: int) -> list[str]:
    return [hashlib.sha256(next(stream).numpy().tobytes()).hexdigest() for _ in range(batches)]


def refused(**settings) -> str:
    try:
        next(open_stream(**settings))
    except UserError as error:
        return str(error)
    return "not refused"


def through_a_checkpoint(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert json.loads(json.dumps(state)) == state
    return torch.load(buffer, weights_only=True)


@answer
def epochs(folder):
    return {
        f"seed {seed}, {processes} processes": [
            epochs_of(open_stream(seed=seed, process=process, processes=processes), 4) for process in range(processes)
        ]
        for seed, processes in ((0, 1), (0, 2), (1, 2), (0, 3))
    }


@answer
def batch_properties(folder):
    batch = next(open_stream(batch_size=5))
    return [
        str(batch.dtype), list(batch.shape), batch.is_contiguous(memory_format=torch.channels_last),
        batch.min().item(), batch.max().item(), batch.std().item(),
    ]  # fmt: skip


@answer
def resumes(folder):
    """For (kind of place, batch size, processes): the fingerprints without a stop, and those of a resumed stream."""
    found = {}
    for batch_size, process, processes in ((1, 0, 1), (1, 1, 2), (3, 0, 2), (5, 2, 3)):
        options = {"batch_size": batch_size, "process": process, "processes": processes, "seed": 5}
        options |= {"crop": "random", "horizontal_flip": True, "random_erasing": 0.5}
        stream = open_stream(**options)
        states, uninterrupted = [], []
        for _ in range(110 // batch_size):
            states.append(through_a_checkpoint(stream.state_dict()))
            uninterrupted += fingerprints(stream, 1)
        chosen: dict[str, int] = {}
        for number, state in enumerate(states[:-3]):
            where = "in a block" if state["used"] else "at a block's end" if state["block"] else "at an epoch's start"
            chosen.setdefault(f"{where} of epoch {min(state['epoch'], 2)}", number)
        for where, number in chosen.items():
            resumed = open_stream(**options)
            if number % 2:
                next(resumed)  # what a stream did before it loads a state must not matter
            resumed.load_state_dict(states[number])
            assert resumed.state_dict() == states[number]
            rest = uninterrupted[number:][:25]
            found[f"{where}, {options}"] = [rest, fingerprints(resumed, len(rest))]
    return found


@answer
def refusals(folder):
    from hfgen.data.store import load_images

    def refused_by_store(**settings):
        try:
            load_images(DataSettings(cache_dir=str(folder / "cache"), **settings))
        except UserError as error:
            return str(error)
        return "not refused"

    found = {
        "two columns": {"dataset_column": None},
        "no column": {"dataset_column": "imageC"},
        "no dataset": {"dataset": "tester/nothing"},
        "no split": {"dataset_split": "test"},
        "a script": {"dataset": "tester/script"},
    }
    found = {key: {"dataset": "tester/paintings", **settings} for key, settings in found.items()}
    answers = {key: [refused(**settings), refused_by_store(**settings)] for key, settings in found.items()}
    answers["a folder"] = [refused(dataset=str(folder))]
    answers["toy_paintings"] = [refused(dataset="toy_paintings:5")]
    return answers


@answer
def downloaded(folder):
    from hfgen.data.store import load_images

    found = {}
    for dataset, column in (
        ("tester/paintings", "imageA"), ("tester/paintings", "imageB"), ("tester/partly_broken", None),
        ("tester/files", None), ("tester/zipped", None), ("tester/unmarked", None),
    ):  # fmt: skip
        settings = DataSettings(dataset, dataset_column=column, sample_size=32, cache_dir=str(folder / "cache"))
        store = load_images(settings)
        again = load_images(settings)
        found[f"{dataset} {column}"] = [store.as_array()[:, :, :, 1].mean(axis=(1, 2)).round().astype(int).tolist()]
        found[f"{dataset} {column}"] += [again.folder == store.folder]
    return found


@answer
def unreadable(folder):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        stream = open_stream("tester/partly_broken", shuffle_buffer_size=5)
        found = [index for _ in range(4 * 9) for index in indices_of(next(stream))]
        count, printed_so_far = stream.unreadable, printed.getvalue()
        resumed = open_stream("tester/partly_broken", shuffle_buffer_size=5)
        resumed.load_state_dict(stream.state_dict())
        same = fingerprints(stream, 20) == fingerprints(resumed, 20)
    return {"found": found, "count": count, "same": same, "printed": printed_so_far}


@answer
def twelve_bits(folder):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        batch = next(open_stream("tester/twelve_bits", batch_size=4))
    return [indices_of(batch), printed.getvalue()]


@answer
def nothing_readable(folder):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        stream = open_stream("tester/broken", shuffle_buffer_size=4)
        try:
            next(stream)
        except UserError as error:
            return [str(error), stream.unreadable, printed.getvalue()]


@answer
def rows_without_image(folder):
    from hfgen.data.hub_datasets import encoded_images

    found = []
    for path in (None, str(folder / "nowhere.png"), "https://elsewhere.example/0.png", "zip://0.png::file:///0.zip"):
        ((name, content),) = encoded_images("a row", {"bytes": None, "path": path})
        found.append([name, type(content).__name__, str(content)])
    return found


@answer
def files(folder):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        alone = epochs_of(open_stream("tester/files"), 3)
        others = [epochs_of(open_stream(f"tester/{name}"), 2) for name in ("zipped", "unmarked")]
        shares = [epochs_of(open_stream("tester/files", process=p, processes=2, seed=1), 2) for p in range(2)]
        options = {"process": 1, "processes": 2, "batch_size": 2, "shuffle_buffer_size": 4}
        stream = open_stream("tester/files", **options)
        next(stream)
        state = stream.state_dict()
        resumed = open_stream("tester/files", **options)
        resumed.load_state_dict(state)
        same = fingerprints(stream, 8) == fingerprints(resumed, 8)
    return {"alone": alone, "others": others, "shares": shares, "same": same, "printed": printed.getvalue()}


@answer
def broken_off(folder):
    from huggingface_hub import HfApi

    stream = open_stream("tester/doomed", shuffle_buffer_size=2)
    next(stream)
    HfApi().delete_repo("tester/doomed", repo_type="dataset")
    try:
        for _ in range(16):
            next(stream)
    except UserError as error:
        return str(error)


@answer
def data_set_that_changes(folder):
    """Must come last: it changes tester/paintings."""
    from huggingface_hub import HfApi

    stream = open_stream(batch_size=3)
    next(stream)
    state = through_a_checkpoint(stream.state_dict())
    uninterrupted = fingerprints(stream, 20)
    for number in range(1, SHARDS):  # what was shard 0 is all that remains
        path = f"data/train-{number:05d}-of-{SHARDS:05d}.parquet"
        HfApi().delete_file(path, "tester/paintings", repo_type="dataset")
    HfApi().delete_file("README.md", "tester/paintings", repo_type="dataset")
    changed = open_stream(batch_size=3)
    fresh = [index for _ in range(10) for index in indices_of(next(changed))]
    resumed = open_stream(batch_size=3)
    resumed.load_state_dict(state)
    again = fingerprints(resumed, 20)
    other = open_stream(dataset_column="imageB")
    digests = [stream.digest, resumed.digest, other.digest, open_stream("tester/files").digest]
    return {"uninterrupted": uninterrupted, "resumed": again, "fresh": fresh, "digests": digests}


def main() -> None:
    import datasets

    datasets.disable_progress_bars()
    folder = Path.cwd()
    (folder / "images").mkdir()
    fill_the_hub(folder / "images")
    for name, function in ANSWERS.items():
        try:
            result = {"answer": function(folder)}
        except Exception:
            result = {"failed": traceback.format_exc()}
        print("ANSWER", json.dumps([name, result]), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The tests


@pytest.fixture(scope="module")
def answers(programs, tmp_path_factory):
    """A function that returns what the client answered under a name."""
    from loopback_hub import LoopbackHub  # not at the top: the client, which runs this file alone, does not find it

    folder = tmp_path_factory.mktemp("client")
    with LoopbackHub() as hub:
        ended = programs.run(__file__, environment=hub.environment(folder / "hf"), folder=folder)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("ANSWER ")]
    results = dict(json.loads(line.removeprefix("ANSWER ")) for line in lines)
    errors = ended.stderr[-3000:]

    def get(name):
        result = results.get(name, {"failed": f"the client gave no such answer; its stderr ends with\n{errors}"})
        assert "answer" in result, result["failed"]
        return result["answer"]

    return get


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_processes_together_see_each_image_exactly_once_per_epoch(answers, processes):
    shares = answers("epochs")[f"seed 0, {processes} processes"]
    assert len(shares) == processes
    for epoch in range(4):
        assert sorted(index for share in shares for index in share[epoch]) == list(range(COUNT))
        assert min(len(share[epoch]) for share in shares) >= COUNT // SHARDS


def test_the_order_differs_between_epochs_and_between_seeds(answers):
    for shares in answers("epochs").values():
        for share in shares:
            assert len({tuple(epoch) for epoch in share}) == len(share)
    first, second = (answers("epochs")[f"seed {seed}, 2 processes"] for seed in (0, 1))
    assert all(first[process][epoch] != second[process][epoch] for process in range(2) for epoch in range(4))


def test_each_epoch_deals_the_shards_out_anew(answers):
    dealt = [frozenset(epoch) for epoch in answers("epochs")["seed 0, 2 processes"][0]]
    assert len(set(dealt)) > 1


def test_each_block_is_permuted_by_itself(answers):
    order = answers("epochs")["seed 0, 1 processes"][0][0]
    blocks = [order[start : start + 8] for start in range(0, COUNT - 8, 8)]  # without the short one at the end
    ranks = []
    for block in blocks:
        in_file_order = sorted(block)
        runs = 1 + sum(after - before > 1 for before, after in zip(in_file_order, in_file_order[1:], strict=False))
        assert runs <= 2  # a block comes from one shard or from two that follow each other
        assert block != in_file_order
        ranks.append(tuple(np.argsort(np.argsort(block))))
    assert len(set(ranks)) == len(ranks)


def test_a_batch_is_float32_in_minus_one_to_one_and_channels_last(answers):
    dtype, shape, channels_last, low, high, deviation = answers("batch_properties")
    assert (dtype, shape, channels_last) == ("torch.float32", [5, 3, 32, 32], True)
    assert -1 <= low < -0.9 and 0.9 < high <= 1 and deviation > 0.1


def test_a_stream_resumed_anywhere_goes_on_bit_for_bit(answers):
    resumes = answers("resumes")
    for where, (uninterrupted, resumed) in resumes.items():
        assert len(uninterrupted) >= 3, where
        assert resumed == uninterrupted, where
        assert len(set(uninterrupted)) > len(uninterrupted) / 2, where  # equal because exact, not because constant
    for place in ("in a block", "at a block's end", "at an epoch's start"):
        for epoch in range(3):
            assert any(where.startswith(f"{place} of epoch {epoch}") for where in resumes), (place, epoch)


def test_a_resumed_stream_keeps_to_its_commit_when_the_data_set_changes(answers):
    answer = answers("data_set_that_changes")
    assert len(set(answer["fresh"])) <= 11  # a new run sees the one shard that is left
    assert answer["resumed"] == answer["uninterrupted"]


def test_the_digest_tells_data_sets_and_columns_apart_but_not_commits(answers):
    before, after, other_column, other_data_set = answers("data_set_that_changes")["digests"]
    assert before == after
    assert len({before, other_column, other_data_set}) == 3


@pytest.mark.parametrize(
    "what, named",
    [
        ("two columns", ["imageA", "imageB", "--dataset_column"]),
        ("no column", ["imageC", "tester/paintings"]),
        ("no dataset", ["tester/nothing"]),
        ("no split", ["tester/paintings has no split test", "--dataset_split", "'train'"]),
        ("a script", ["tester/script", "scripts are no longer supported"]),
        ("a folder", ["--streaming"]),
        ("toy_paintings", ["toy_paintings:5", "--streaming"]),
    ],
)
def test_what_is_not_there_is_refused_by_name_streamed_or_not(answers, what, named):
    for message in answers("refusals")[what]:
        assert all(name in message for name in named), message


def test_a_downloaded_data_set_of_the_hub_decodes_column_by_column(answers):
    downloaded = answers("downloaded")
    assert downloaded["tester/paintings imageA"] == [list(range(COUNT)), True]
    assert downloaded["tester/paintings imageB"] == [[200 - index for index in range(COUNT)], True]
    for name in ("files", "zipped", "unmarked"):
        assert downloaded[f"tester/{name} None"] == [list(range(12)), True]
    assert downloaded["tester/partly_broken None"] == [[0, 1, 3, 4, 6, 7, 8, 9, 10], True]


def test_unreadable_images_are_skipped_counted_and_named(answers):
    answer = answers("unreadable")
    for start in range(0, 4 * 9, 9):
        assert sorted(answer["found"][start : start + 9]) == [0, 1, 3, 4, 6, 7, 8, 9, 10]
    assert answer["same"]
    printed = answer["printed"].splitlines()
    for row in (2, 5, 11):
        assert any(f"tester/partly_broken, shard 0, row {row}:" in line for line in printed)
    assert 3 * 3 <= answer["count"] <= 4 * 3  # 3 of them in each epoch; the last ones may be still to come
    assert len(printed) == 3  # each named once


def test_a_stream_of_twelve_bits_in_sixteen_is_nearly_black_with_a_warning(answers):
    greens, printed = answers("twelve_bits")
    assert greens == [16, 16, 16, 16]  # 4095 of 65535: other images of the stream may be brighter
    assert "warning: tester/twelve_bits, shard 0" in printed and "without --streaming" in printed


def test_an_epoch_without_a_readable_image_is_an_error(answers):
    message, count, printed = answers("nothing_readable")
    assert "tester/broken" in message and "no readable image in a whole epoch" in message
    assert count == 6
    assert len(printed.splitlines()) == 5  # of 6: the first few


def test_a_row_that_names_no_file_of_the_data_set_is_unreadable(answers):
    nothing, missing, elsewhere, outside = answers("rows_without_image")
    assert nothing[:2] == ["a row", "ValueError"]
    assert missing[:2] == ["a row", "FileNotFoundError"]
    for name, kind, message in (elsewhere, outside):
        assert (name, kind) == ("a row", "ValueError") and "outside the dataset" in message


def test_a_repository_of_a_zip_or_of_unmarked_bytes_streams_too(answers):
    for epochs in answers("files")["others"]:
        assert all(sorted(epoch) == list(range(12)) for epoch in epochs)


def test_a_repository_of_image_files_streams_too(answers):
    answer = answers("files")
    assert all(sorted(epoch) == list(range(12)) for epoch in answer["alone"])
    assert len({tuple(epoch) for epoch in answer["alone"]}) == 3
    assert answer["same"]


def test_too_few_shards_are_split_by_rows_with_one_warning(answers):
    answer = answers("files")
    for epoch in range(2):
        first, second = (share[epoch] for share in answer["shares"])
        assert len(first) == len(second) == 6
        assert sorted(first + second) == list(range(12))
    assert answer["printed"].count("warning: ") == 1
    assert "1 shard(s) for 2 processes" in answer["printed"]


def test_a_stream_that_breaks_off_is_an_error_that_says_how_to_go_on(answers):
    message = answers("broken_off")
    assert "tester/doomed" in message and "--resume latest" in message


if __name__ == "__main__":
    main()
