"""Data settings: where the images come from and how they are preprocessed and augmented."""

from dataclasses import dataclass
from typing import Literal

from hfgen.config import check_ranges, setting
from hfgen.data.location import hub_id_of_address
from hfgen.errors import UserError
from hfgen.ranges import COUNT, FRACTION, PIXELS, Range


DEFAULT_SHUFFLE_BUFFER = 1000


@dataclass
class DataSettings:
    """Data settings."""

    _argument_group_name = "data"

    dataset: str = setting(
        "toy_paintings",
        "image folder, zip, tar, npz, parquet or TFRecord, Hub dataset id, or the built-in toy_paintings[:COUNT]",
        may_change=True,  # the data may have moved; the checkpoint checks that the images are the same
    )
    dataset_config: str | None = setting(
        None, "configuration of the Hub dataset, if it has several", belongs_to="dataset"
    )
    dataset_split: str = setting(
        "train",
        "split to train on: of a Hub dataset, or local files in folders such as train/ and test/; all: use everything",
        belongs_to="dataset",
    )
    dataset_column: str | None = setting(
        None, "column or feature with the images; set it if it is not detected", belongs_to="dataset"
    )
    streaming: bool = setting(
        False, "read a Hub dataset over the network during training instead of downloading it", belongs_to="dataset"
    )
    shuffle_buffer_size: int = setting(
        DEFAULT_SHUFFLE_BUFFER,
        "images per shuffle block of a stream; larger: better mixed, more memory",
        COUNT,
        belongs_to="dataset",
    )
    sample_size: int = setting(64, "height and width of the training images in pixels, 8 to 1024", PIXELS)
    crop: Literal["center", "random"] = setting(
        "center", "square crop after the short side is resized to sample_size; random: a new position each time"
    )
    horizontal_flip: bool = setting(
        False, "mirror each image with probability 0.5; the model then generates mirrored images too; fine for faces"
    )
    five_crop: bool = setting(
        False,
        "add five crops of each image (corners and centre, 4/5 of the short side); the model then generates "
        "close-ups too",
    )
    random_rotation: float = setting(
        0.0,
        "rotate by up to this many degrees; the model then generates tilted images with mirrored corners too",
        Range(0, 180, unit="degrees"),
    )
    random_erasing: float = setting(
        0.0,
        "probability of filling a random rectangle with grey; the model then generates grey rectangles too",
        FRACTION,
    )
    drop_duplicates: bool = setting(False, "keep only the first of several images with identical pixels")
    cache_dir: str | None = setting(
        None, "folder for decoded images; default: $HFGEN_CACHE or <HF_HOME>/hfgen", may_change=True
    )
    max_image_pixels: int = setting(
        100_000_000,
        "reject larger images as decompression bombs; raise it if you trust them",
        Range(1, 10**12),
        may_change=True,
    )

    def __post_init__(self):
        check_ranges(self)
        self.dataset = hub_id_of_address(self.dataset, "datasets", "--dataset")
        if self.shuffle_buffer_size != DEFAULT_SHUFFLE_BUFFER and not self.streaming:
            raise UserError(f"--shuffle_buffer_size {self.shuffle_buffer_size}: only for --streaming; leave it out")
        if self.streaming and (self.five_crop or self.drop_duplicates):
            raise UserError("--five_crop and --drop_duplicates need the whole dataset; leave out --streaming")
