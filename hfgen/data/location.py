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


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
TFRECORD_SUFFIXES = {".tfrec", ".tfrecord", ".tfrecords"}
FILE_SUFFIXES = {".zip", ".parquet", *TFRECORD_SUFFIXES, *IMAGE_SUFFIXES}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TOY_PAINTINGS = re.compile(r"toy_paintings(?::(\d+))?")


def is_hub_id(name: str) -> bool:
    """Whether the name of a data set or a pipeline is a Hub id; see the rule above."""
    is_file_name = os.path.splitext(name)[1].lower() in FILE_SUFFIXES
    return HUB_ID.fullmatch(name) is not None and not is_file_name and not _exists(name)


def is_path(dataset: str) -> bool:
    """Whether the name of a data set is a path, which may be missing."""
    return TOY_PAINTINGS.fullmatch(dataset) is None and not is_hub_id(dataset)


def is_missing(dataset: str) -> bool:
    """Whether the name of a data set is a path that does not exist."""
    return is_path(dataset) and not _exists(dataset)


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))  # unlike Path.expanduser, accepts an unknown user
