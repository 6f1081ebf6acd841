"""The store of decoded images when processes or threads meet, or one is killed."""

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
from picture_files import encoded, noise
from stores import entries, load, pictures_in, same

from hfgen.data import store as store_module
from hfgen.data.decode import DecodedImage, decode_image


# Processes are forked, because importing torch anew takes longer than all tests of this file.
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_a_process_killed_while_decoding_leaves_nothing_that_looks_whole(image_folder, cache_of_this_test):
    (image_folder / "7.png").write_bytes(encoded(noise(16, 16, 7)))
    context = multiprocessing.get_context("fork")
    reached = context.Event()

    def load_and_wait_at_the_last_image() -> None:
        def decode(name: str, *arguments) -> DecodedImage:
            if name == "7.png":
                reached.set()
                time.sleep(300)
            return decode_image(name, *arguments)

        store_module.decode_image = decode
        load(image_folder)

    process = context.Process(target=load_and_wait_at_the_last_image)
    process.start()
    assert reached.wait(300)
    process.kill()
    process.join()
    (leftover,) = entries(cache_of_this_test)
    assert leftover.startswith(".") and not (cache_of_this_test / leftover / "digest.txt").exists()

    # In a container a process often gets the number that the killed one had.
    stem, _ = leftover.rsplit("-", 1)
    (cache_of_this_test / leftover).rename(cache_of_this_test / f"{stem}-{os.getpid()}")
    (cache_of_this_test / f"{stem}-0").mkdir()
    loaded = load(image_folder)
    assert same(pictures_in(loaded), [noise(16, 16, seed) for seed in range(8)])
    assert entries(cache_of_this_test) == [loaded.folder.name]


@needs_fork
def test_two_processes_at_once_get_the_same_whole_store(image_folder, cache_of_this_test):
    context = multiprocessing.get_context("fork")
    together, answers = context.Barrier(2), context.SimpleQueue()

    def work() -> None:
        together.wait(30)
        store = load(image_folder)
        answers.put((store.digest, np.array(pictures_in(store)).tobytes()))

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    pixels = np.stack([noise(16, 16, seed) for seed in range(7)]).tobytes()
    store = load(image_folder)
    assert [answers.get(), answers.get()] == [(store.digest, pixels)] * 2
    assert entries(cache_of_this_test) == [store.folder.name]


def test_many_threads_at_once_get_the_same_whole_store(image_folder, cache_of_this_test):
    together, stores = threading.Barrier(6), []

    def work() -> None:
        together.wait()
        stores.append(load(image_folder))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 6
    for store in stores:
        assert same(pictures_in(store), [noise(16, 16, seed) for seed in range(7)])
    assert len(entries(cache_of_this_test)) == 1
