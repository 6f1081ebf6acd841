"""What a name given by the user means: a path on this machine, or an id on the Hub.

One rule for data sets and pipelines:

1. What exists on this machine is a path, even if the Hub has something of the same name.
2. Otherwise "name" and "owner/name" are Hub ids, of letters, digits, "_", "-" and "."; but not if they begin with "."
   or end like a file of images, as "cats.zip" does.
3. Anything else is a path that does not exist: "./cats", "~/cats", "/data/cats", "data/cats/train".

A data set may also be the built-in `toy_paintings` or `toy_paintings:COUNT`, which takes precedence over a path.
"""

import os
import re


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
FILE_SUFFIXES = {".zip", ".parquet", *TFRECORD_SUFFIXES, *IMAGE_SUFFIXES}
# Also cats.tfrecord.gz and the shards cats.tfrecord-00000-of-00002.
TFRECORD_NAME = re.compile(r"\.tfrec(ords?)?(-\d+(-of-\d+)?)?(\.gz|\.gzip|\.zlib)?", re.IGNORECASE)
SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.|$)")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TOY_PAINTINGS = re.compile(r"toy_paintings(?::(\d+))?")


def is_hub_id(name: str) -> bool:
    """Whether the name of a data set or a pipeline is a Hub id; see the rule above."""
    is_file_name = os.path.splitext(name)[1].lower() in FILE_SUFFIXES or names_tfrecord(name)
    return HUB_ID.fullmatch(name) is not None and not is_file_name and not _exists(name)


def names_tfrecord(name: str) -> bool:
    """Whether a file name is one of TFRecord files, which may be packed or split into shards."""
    match = TFRECORD_NAME.search(name)
    return match is not None and match.end() == len(name)


def is_path(dataset: str) -> bool:
    """Whether the name of a data set is a path, which may be missing."""
    return TOY_PAINTINGS.fullmatch(dataset) is None and not is_hub_id(dataset)


def is_missing(dataset: str) -> bool:
    """Whether the name of a data set is a path that does not exist."""
    return is_path(dataset) and not _exists(dataset)


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))  # unlike Path.expanduser, accepts an unknown user
