"""Settings of the data: where the images come from and what becomes of them."""

from dataclasses import dataclass
from typing import Literal

from hfgen.config import setting
from hfgen.errors import UserError


@dataclass
class DataSettings:
    """Settings of the data."""

    _argument_group_name = "data"

    dataset: str = setting(
        "toy_paintings",
        "a folder of images, a zip of one, parquet or TFRecord files, a Hub data set id, or toy_paintings[:COUNT]",
        may_change=True,  # the images may lie elsewhere now; that they are the same ones is what a checkpoint checks
    )
    dataset_split: str = setting("train", "split of a Hub data set")
    dataset_column: str | None = setting(None, "column or feature that holds the images; found if there is one only")
    streaming: bool = setting(False, "read a Hub data set over the network while training, without downloading it")
    shuffle_buffer_size: int = setting(1000, "images of a stream that are shuffled among each other")
    sample_size: int = setting(64, "height and width of the training images, in pixels")
    crop: Literal["center", "random"] = setting(
        "center", "the square cut out after the short side is resized to sample_size; random draws it anew each time"
    )
    horizontal_flip: bool = setting(
        False, "mirror every other image; mirrored scenes are then generated too: harmless for faces and landscapes"
    )
    five_crop: bool = setting(
        False,
        "add the four corners and the centre of each image, 4/5 of its short side; generated too: they look close-up",
    )
    random_rotation: float = setting(
        0.0, "rotate by up to this many degrees; generated images are then tilted too, with mirrored corners"
    )
    random_erasing: float = setting(
        0.0, "probability of greying a random rectangle out; grey rectangles are then generated too"
    )
    drop_duplicates: bool = setting(False, "use only the first of images with identical pixels")
    cache_dir: str | None = setting(
        None, "where decoded images are kept; $HFGEN_CACHE or <HF_HOME>/hfgen if not given", may_change=True
    )
    max_image_pixels: int = setting(
        100_000_000, "an image with more pixels is refused as a decompression bomb", may_change=True
    )

    def __post_init__(self):
        if not 8 <= self.sample_size <= 1024:
            raise UserError(f"--sample_size {self.sample_size}: must be from 8 to 1024 pixels")
        if not 0 <= self.random_erasing <= 1:
            raise UserError(f"--random_erasing {self.random_erasing}: a probability is from 0 to 1")
        if not 0 <= self.random_rotation <= 180:
            raise UserError(f"--random_rotation {self.random_rotation}: must be from 0 to 180 degrees")
        if self.shuffle_buffer_size < 1:
            raise UserError(f"--shuffle_buffer_size {self.shuffle_buffer_size}: must be at least 1")
        if self.streaming and (self.five_crop or self.drop_duplicates):
            raise UserError("--five_crop and --drop_duplicates need the whole data set; leave out --streaming")
