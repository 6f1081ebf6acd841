"""Read datasets with damaged or hostile bytes, and check that each is read or refused, in bounded memory and time.

    python tests/endurance/readers.py --count 5000

Not part of `make test`: 5,000 files take about ten minutes on one CPU core. Images and datasets of every format
are changed at random: bits and bytes, lengths, blocks cut out, repeated or exchanged. Each must end in a decoded set
or in a `UserError`; no other error, no end of the process, at most 4 GB of memory beside the libraries, at most a
minute. The first ones are undamaged, and must be read.
"""

import argparse
import collections
import gzip
import io
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "data"), str(ROOT / "tests"), str(ROOT)]
os.environ["HF_HUB_OFFLINE"] = "1"

from tfrecord_writer import bytes_feature, example, record  # noqa: E402

from hfgen.data.settings import DataSettings  # noqa: E402
from hfgen.data.store import load_images  # noqa: E402
from hfgen.errors import UserError  # noqa: E402


MEMORY = 4 << 30
SECONDS = 60
CASES_PER_PROCESS = 50
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "ICO", "TGA")


def picture(kind: str, number: int) -> bytes:
    """An image of 24 x 20 pixels in a format of Pillow."""
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def make_seeds() -> dict[str, bytes]:
    """The undamaged files, by name."""
    pictures = {f"{number}.jpg": picture("JPEG", number) for number in range(6)}
    seeds = {f"picture.{kind.lower()}": picture(kind, 0) for kind in FORMATS}
    grey = io.BytesIO()
    Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100).save(grey, "PNG")
    seeds["grey16.png"] = grey.getvalue()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in pictures.items():
            opened.writestr(f"images/{name}", content)
    seeds["pictures.zip"] = archive.getvalue()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as opened:
        for name, content in pictures.items():
            member = tarfile.TarInfo(f"images/{name}")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    seeds["pictures.tar"] = archive.getvalue()
    seeds["pictures.tar.gz"] = gzip.compress(archive.getvalue())
    table = pa.table({"image": [{"bytes": content, "path": name} for name, content in pictures.items()]})
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    seeds["pictures.parquet"] = parquet.getvalue()
    records = (record(example(image=bytes_feature(content))) for content in pictures.values())
    seeds["pictures.tfrec"] = b"".join(records)
    arrays = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), np.uint8)
    for name, save in {"pictures.npy": np.save, "pictures.npz": np.savez_compressed}.items():
        content = io.BytesIO()
        save(content, arrays)
        seeds[name] = content.getvalue()
    return seeds


def damaged(content: bytes, numbers: random.Random) -> bytes:
    """Change some bytes, as chance has it."""
    data = bytearray(content)
    for _ in range(numbers.choice([1, 1, 2, 4, 16])):
        place = numbers.randrange(len(data) or 1)
        if numbers.random() < 0.3:  # headers are at the beginning, and indices at the end
            place = numbers.choice([numbers.randrange(64), -1 - numbers.randrange(64)]) % (len(data) or 1)
        end = min(len(data), place + numbers.choice([1, 4, 8, 100, 1000]))
        match numbers.randrange(7):
            case 0:
                data[place : place + 1] = bytes([numbers.randrange(256)])
            case 1:
                del data[place:]
            case 2:
                del data[place:end]
            case 3:
                data[place:place] = data[place:end] * numbers.choice([1, 3, 50])
            case 4:
                data[place : place + 4] = numbers.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\x80\0\0\0"])
            case 5:
                data[place:end] = numbers.randbytes(end - place)
            case 6:
                data[place : place + 1] = bytes([data[place] ^ 1 << numbers.randrange(8)] if data[place:] else [])
    return bytes(data)


def read_in_this_process(file: Path, cache: Path) -> str:
    """Read a dataset; return "read", "refused", or what was wrong."""
    signal.alarm(SECONDS)
    try:
        load_images(DataSettings(dataset=str(file), sample_size=16, cache_dir=str(cache)))
    except UserError:
        return "refused"
    except BaseException:
        return " ".join(traceback.format_exc().splitlines()[-4:])[-400:]
    finally:
        signal.alarm(0)
        shutil.rmtree(cache, ignore_errors=True)
    return "read"


def read_all(files: list[Path], log: Path) -> list[str]:
    """Read datasets in a process of their own, bounded in memory; return a verdict for each."""
    verdicts: list[str] = []
    while len(verdicts) < len(files):
        log.write_text("")
        pid = os.fork()
        if pid == 0:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            for file in files[len(verdicts) :]:
                verdict = read_in_this_process(file, file.with_suffix(".cache"))
                with log.open("a") as lines:
                    lines.write(verdict.replace("\n", " ") + "\n")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        verdicts += log.read_text().splitlines()
        if status:
            verdicts.append(f"ended the process: {os.waitstatus_to_exitcode(status)}")
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="new folder for the files that were read wrongly")
    settings = parser.parse_args()
    numbers, seeds, counts, faults = random.Random(settings.seed), make_seeds(), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        for first in range(0, settings.count, CASES_PER_PROCESS):
            files = []
            for number in range(first, min(first + CASES_PER_PROCESS, settings.count)):
                name = sorted(seeds)[number % len(seeds)]
                folder = Path(temporary) / str(number)
                folder.mkdir()
                (folder / name).write_bytes(seeds[name] if number < len(seeds) else damaged(seeds[name], numbers))
                files.append(folder if name.startswith(("picture.", "grey16.")) else folder / name)
            for number, verdict in enumerate(read_all(files, Path(temporary) / "log"), first):
                right = verdict == "read" or (verdict == "refused" and number >= len(seeds))
                counts[verdict if right else "faults"] += 1
                if not right:
                    faults += 1
                    print(f"{sorted(seeds)[number % len(seeds)]}: {verdict}", flush=True)
                    if settings.keep is not None:
                        shutil.copytree(Path(temporary) / str(number), settings.keep / str(faults))
            for number in range(first, first + CASES_PER_PROCESS):
                shutil.rmtree(Path(temporary) / str(number), ignore_errors=True)
    print(f"{counts.total()} datasets: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
