"""Reading images stays within its memory, measured with a limit of the system, at a tenth of the real sizes."""

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from source_files import write_parquet_that_lies

from hfgen.data import memory
from hfgen.data.decode import memory_needed
from hfgen.data.settings import DataSettings


LIMIT = 300 << 20  # for each of the sources below, which took more
CODE = f"""
import os, resource, sys
import pyarrow.parquet
os.cpu_count = lambda: 8
from hfgen.data import archives, columns, memory, opening, parquet_pages, tables
from hfgen.data.settings import DataSettings
from hfgen.data.store import load_images
from hfgen.errors import UserError

memory.MAX_BYTES = parquet_pages.MAX_BYTES = 60 << 20
for module in (archives, columns, opening, parquet_pages, tables):
    module.MAX_ENCODED_BYTES = 16 << 20
status = open("/proc/self/status").read()
taken = int(status.partition("VmData:")[2].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (taken + {LIMIT}, taken + {LIMIT}))
for path in sys.argv[1:]:
    try:
        print(load_images(DataSettings(path, sample_size=16, max_image_pixels=3_000_000)).report.images)
    except UserError as error:
        print(*str(error).split())
"""


def grey_pictures(folder):
    """8 files of 8 kB that are 2.9 million pixels of 16 bits each."""
    folder.mkdir()
    Image.fromarray(np.full((1700, 1700), 4000, np.uint16)).save(folder / "0.png")
    for index in range(1, 8):
        os.link(folder / "0.png", folder / f"{index}.png")


def write_sparse(file, start, size):
    """Write a file that takes no place on the disk."""
    file.write_bytes(start)
    os.truncate(file, size)


def large_file(folder):
    folder.mkdir()
    write_sparse(folder / "x.png", b"", 1 << 30)


def equal_rows(file):
    """A file of 3 kB with 40 rows of 8 MB."""
    pyarrow.parquet.write_table(pyarrow.table({"image": [bytes(8 << 20)] * 40}), file, compression="zstd")


def false_row(file):
    """A file of 13 kB with a row of 400 MB, of which the metadata says that it is small."""
    write_parquet_that_lies(file, [bytes(400 << 20)])


def long_row_group(file):
    table = pyarrow.table({"image": [bytes(1 << 20)] * 350})
    pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False, write_batch_size=4)


def zip_of_zeros(file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for index in range(40):
            archive.writestr(f"{index}.png", bytes(8 << 20))


def tar_with_a_long_name(file):
    member = tarfile.TarInfo("x.png")
    member.type, member.size = tarfile.XHDTYPE, 400 << 20
    write_sparse(file, member.tobuf(), 401 << 20)


def array_of_one_large_image(file):
    np.save(file, np.zeros((1, 1, 1), np.uint8))
    start = file.read_bytes()[:-1].replace(b"(1, 1, 1), }" + b" " * 8, b"(1, 20000, 20000), }")
    write_sparse(file, start, len(start) + 20_000**2)


SOURCES = {
    "grey": (grey_pictures, "8"),
    "large": (large_file, "its only image cannot be read"),
    "rows.parquet": (equal_rows, "none of its 40 images can be read"),
    "false.parquet": (false_row, "the page at byte 4 takes 400 MiB of memory"),
    "group.parquet": (long_row_group, "none of its 350 images can be read"),
    "zeros.zip": (zip_of_zeros, "none of its 40 images can be read 0.png: not an image format"),
    "name.tar": (tar_with_a_long_name, "cannot be read as a tar file: a header of 419430400 bytes"),
    "array.npy": (array_of_one_large_image, "rejected as a decompression bomb (images of 20000 x 20000 pixels)"),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the memory of data alone")
def test_no_source_takes_more_memory_than_stated(tmp_path):
    for name, (make, _) in SOURCES.items():
        make(tmp_path / name)
    paths = [str(tmp_path / name) for name in SOURCES]
    # Arrow's own allocator reserves a gigabyte or, below a limit, most of what is left of it.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    process = subprocess.run(
        [sys.executable, "-c", CODE, *paths], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    said = process.stdout.splitlines()
    assert len(said) == len(SOURCES)
    for line, (_, expected) in zip(said, SOURCES.values(), strict=True):
        assert expected in line


def test_images_share_the_memory_and_keep_their_order(monkeypatch):
    monkeypatch.setattr(memory, "MAX_BYTES", 10)
    taken, most = 0, 0

    def needed_by(item):
        nonlocal taken, most
        taken += item
        most = max(most, taken)
        return item

    sizes = [1, 2, 3, 4, 11, 1, 9, 2, 5, 5]
    with ThreadPoolExecutor(3) as pool:
        for index, answer in enumerate(memory.map_in_bounded_memory(pool, str, sizes, needed_by, ahead=4)):
            assert answer == str(sizes[index])
            taken -= sizes[index]
    assert index == len(sizes) - 1 and most <= 10 + 11  # with the one that is looked at next


def test_the_memory_of_an_image_is_known_by_its_header():
    def encoded(side, form):
        buffer = io.BytesIO()
        Image.new("RGB", (side, side)).save(buffer, form)
        return buffer.getvalue()

    settings = DataSettings(sample_size=16, max_image_pixels=1_000_000)
    png, jpeg, large = encoded(500, "png"), encoded(512, "jpeg"), encoded(2000, "png")
    pixels = [(memory_needed(one, settings) - len(one)) / memory.BYTES_PER_PIXEL for one in (png, jpeg, large, b"no")]
    assert pixels == [500 * 500 + 256, 64 * 64 + 256, 1_000_000, 1_000_000]  # the JPEG is decoded at an eighth
    assert memory_needed(OSError(), settings) == 0
