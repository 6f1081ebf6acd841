"""Data settings: where the images come from and how they are preprocessed and augmented."""

from dataclasses import dataclass
from typing import Literal

from hfgen.config import setting
from hfgen.data.location import hub_id_of_address
from hfgen.errors import UserError


@dataclass
class DataSettings:
    """Data settings."""

    _argument_group_name = "data"

    dataset: str = setting(
        "toy_paintings",
        "image folder, zip, tar, npz, parquet or TFRecord, Hub data set id, or the built-in toy_paintings[:COUNT]",
        may_change=True,  # the data may have moved; the checkpoint checks that the images are the same
    )
    dataset_config: str | None = setting(None, "configuration of the Hub data set, if it has several")
    dataset_split: str = setting(
        "train",
        "split to train on: of a Hub data set, or local files in folders such as train/ and test/; all: every one",
    )
    dataset_column: str | None = setting(None, "column or feature with the images; set it if it is not detected")
    streaming: bool = setting(False, "read a Hub data set over the network during training instead of downloading it")
    shuffle_buffer_size: int = setting(1000, "images per shuffle block of a stream; larger: better mixed, more memory")
    sample_size: int = setting(64, "height and width of the training images in pixels, 8 to 1024")
    crop: Literal["center", "random"] = setting(
        "center", "square crop after the short side is resized to sample_size; random: a new position each time"
    )
    horizontal_flip: bool = setting(
        False, "mirror each image with probability 0.5; mirrored ones are then generated: fine for faces, landscapes"
    )
    five_crop: bool = setting(
        False,
        "add five crops of each image (corners and centre, 4/5 of the short side); close-ups are then generated too",
    )
    random_rotation: float = setting(
        0.0, "rotate by up to this many degrees; tilted images with mirrored corners are then generated too"
    )
    random_erasing: float = setting(
        0.0, "probability of filling a random rectangle with grey; grey rectangles are then generated too"
    )
    drop_duplicates: bool = setting(False, "keep only the first of several images with identical pixels")
    cache_dir: str | None = setting(
        None, "folder for decoded images; default: $HFGEN_CACHE or <HF_HOME>/hfgen", may_change=True
    )
    max_image_pixels: int = setting(
        100_000_000, "reject larger images as decompression bombs; raise it if you trust them", may_change=True
    )

    def __post_init__(self):
        self.dataset = hub_id_of_address(self.dataset, "datasets", "--dataset")
        if not 8 <= self.sample_size <= 1024:
            raise UserError(f"--sample_size {self.sample_size}: must be from 8 to 1024 pixels")
        if not 0 <= self.random_erasing <= 1:
            raise UserError(f"--random_erasing {self.random_erasing}: must be a probability from 0 to 1")
        if not 0 <= self.random_rotation <= 180:
            raise UserError(f"--random_rotation {self.random_rotation}: must be from 0 to 180 degrees")
        if self.shuffle_buffer_size < 1:
            raise UserError(f"--shuffle_buffer_size {self.shuffle_buffer_size}: must be at least 1")
        if self.streaming and (self.five_crop or self.drop_duplicates):
            raise UserError("--five_crop and --drop_duplicates need the whole data set; leave out --streaming")
