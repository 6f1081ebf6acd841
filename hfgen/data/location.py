"""What a name given by the user means: a path on this machine, or an id on the Hub.

One rule for datasets and pipelines:

1. What exists on this machine is a path, even if the Hub has something of the same name.
2. Otherwise "name" and "owner/name" are Hub ids, of letters, digits, "_", "-" and "."; but not if they begin with "."
   or end like a file of images, as "cats.zip" does.
3. Anything else is a path that does not exist: "./cats", "~/cats", "/data/cats", "data/cats/train".

A dataset may also be the built-in `toy_paintings` or `toy_paintings:COUNT`, which takes precedence over a path.
"""

import os
import re
from pathlib import Path

from hfgen.errors import UserError


# What Pillow decodes by itself: not EPS, for which it runs another program, nor what it only recognises.
IMAGE_SUFFIXES = set(
    ".apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .gif .icb .icns .ico .im .j2c .j2k .jfif .jp2 .jpc .jpe "
    ".jpeg .jpf .jpg .jpx .mpo .msp .pbm .pcx .pfm .pgm .png .pnm .ppm .psd .qoi .ras .rgb .rgba .sgi .tga .tif .tiff "
    ".vda .vst .webp .xbm .xpm".split()
)
# Pictures in formats that Pillow does not decode by itself: phones, cameras, drawings, science, video.
OTHER_PICTURE_SUFFIXES = set(
    ".ai .arw .avi .cr2 .cr3 .dcm .dng .emf .eps .exr .fits .hdr .heic .heif .hif .jxl .mkv .mov .mp4 .nef .nii .orf "
    ".pdf .psb .raf .raw .rw2 .svg .webm .wmf".split()
)
TFRECORD_SUFFIXES = {".tfrec", ".tfrecord", ".tfrecords"}
TAR_SUFFIXES = {".tar", ".tgz", ".tbz2", ".txz"}
ARRAY_SUFFIXES = {".npy", ".npz"}
FILE_SUFFIXES = {".zip", ".parquet", ".arrow", *TAR_SUFFIXES, *ARRAY_SUFFIXES, *TFRECORD_SUFFIXES, *IMAGE_SUFFIXES}
# What else is probably packed, such as the .gz of a .tar.gz.
PACKED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst", ".rar", ".7z"}
# Also cats.tfrecord.gz and the shards cats.tfrecord-00000-of-00002.
TFRECORD_NAME = re.compile(r"\.tfrec(ords?)?(-\d+(-of-\d+)?)?(\.gz|\.gzip|\.zlib)?", re.IGNORECASE)
SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.|$)")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
ADDRESS = re.compile(r"\w+://|(www\.)?(huggingface\.co|hf\.co)/")
HUB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?P<kind>datasets/|spaces/|models/)?"
    r"(?P<id>[\w.-]+(?:/(?!(?:tree|viewer|blob|resolve)(?:/|$))[\w.-]+)?)(?P<rest>/[^?#]*)?(?:[?#].*)?"
)
TOY_PAINTINGS = re.compile(r"toy_paintings(?::(\d+))?")


def is_hub_id(name: str) -> bool:
    """Whether the name of a dataset or a pipeline is a Hub id; see the rule above."""
    is_file_name = os.path.splitext(name)[1].lower() in FILE_SUFFIXES or names_tfrecord(name)
    return HUB_ID.fullmatch(name) is not None and not is_file_name and not _exists(name)


def names_tfrecord(name: str) -> bool:
    """Whether a file name is one of TFRecord files, which may be packed or split into shards."""
    match = TFRECORD_NAME.search(name)
    return match is not None and match.end() == len(name)


def is_tar(path: Path) -> bool:
    """Whether a file is named as a tar, which may be compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    is_compressed = suffixes[-1:] in ([".gz"], [".bz2"], [".xz"]) and suffixes[:1] == [".tar"]
    return is_compressed or path.suffix.lower() in TAR_SUFFIXES


def is_archive(path: Path) -> bool:
    """Whether a file is named as a zip or tar."""
    return path.suffix.lower() == ".zip" or is_tar(path)


def inside_archive(name: str) -> tuple[Path, str] | None:
    """Return the archive and the folder in it that a name such as "set.zip/cats" means; None for other names."""
    path = Path(os.path.expanduser(name))
    for parent in path.parents:
        if is_archive(parent) and os.path.isfile(parent):
            return parent, path.relative_to(parent).as_posix()
    return None


def is_path(dataset: str) -> bool:
    """Whether the name of a dataset is a path, which may be missing."""
    return TOY_PAINTINGS.fullmatch(dataset) is None and not is_hub_id(dataset)


def is_missing(dataset: str) -> bool:
    """Whether the name of a dataset is a path that does not exist."""
    return is_path(dataset) and not _exists(dataset)


def hub_id_of_address(name: str, kind: str, argument: str) -> str:
    """Return the Hub id in a pasted address of the Hub; other names as they are.

    Args:
        name: of a dataset or pipeline, or its address.
        kind: "datasets" or "models".
        argument: what gave it, for messages.

    Raises:
        UserError: if it is the address of something else.
    """
    if not ADDRESS.match(name):
        return name
    match = HUB_ADDRESS.fullmatch(name)
    if match is None:
        what = "a Hub dataset" if kind == "datasets" else "a Hub model"
        raise UserError(
            f"{argument} {name}: URLs are not supported; download it and give its path, or the id of {what}"
        )
    if (match["kind"] or "models/").strip("/") != kind:
        raise UserError(f"{argument} {name}: this is not in the {kind} of the Hub")
    if match["rest"] and not re.fullmatch(
        r"/?(tree/main|viewer.*|resolve/main|blob/main/README.md)?/?", match["rest"]
    ):
        raise UserError(f"{argument} {name}: only whole repositories are supported; use {match['id']}")
    return match["id"]


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name)) or inside_archive(name) is not None
