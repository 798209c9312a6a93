"""A packed data set as its index tells of it: shards, columns, classes, statistics. Pydantic only, so that the service reads it too.

The folder, local or below an `s3://` prefix, holds

    index.json                       written last: without it nothing is there
    shard-000000.tar, …              images, each behind a JSON with its original name and a class number (WebDataset reads them)
    offsets.bin sizes.bin labels.bin hashes.bin      a number for each image, in order, little-endian
    unreadable.json                  what was left out, by name, and why

Images lie in the order of a hash of their names: so each shard is a random sample of the set, and the images that
`data.validation_fraction` holds back are the first ones.
"""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from mae_core.options import Strict

INDEX = "index.json"
UNREADABLE = "unreadable.json"
BLOCK = 512  # bytes: what offsets count in, and tar files are made of
MAX_INDEX_BYTES = 2**28

# dtype of each column. offsets: of the image's bytes in its shard, in blocks. hashes: of the names, in rising order.
COLUMNS = {"offsets": "<u4", "sizes": "<u4", "labels": "<i4", "hashes": "<u8"}
Column = Literal["offsets", "sizes", "labels", "hashes"]


class PackedFile(Strict):
    """A file of the folder. sha256: in hexadecimal digits."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Shard(PackedFile):
    """Consecutive images. Shards without any do not exist."""

    num_images: int = Field(ge=1)


class ChannelStatistics(Strict):
    """Mean and standard deviation of each channel over all images, as `data.normalize` counts them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class PackedIndex(Strict):
    """resize: the length of the shorter side to which larger images were brought; None: their files are as they were.

    made_of: what the folder was packed from and how, as a digest: a repeat of the same command finds it done.
    """

    format: Literal["maestro-packed"] = "maestro-packed"
    version: Literal[1] = 1
    made_of: str
    num_images: int = Field(ge=1)
    num_unreadable: int = Field(ge=0)
    channels: int = Field(ge=1)
    resize: int | None = None
    classes: list[str]
    statistics: ChannelStatistics
    columns: dict[Column, PackedFile]
    shards: list[Shard]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if sum(shard.num_images for shard in self.shards) != self.num_images:
            raise ValueError(f"its shards do not have {self.num_images} images")
        missing = COLUMNS.keys() - self.columns.keys() - (set() if self.classes else {"labels"})
        if missing:
            raise ValueError(f"it lacks columns: {', '.join(sorted(missing))}")
        return self

    @property
    def files(self) -> Sequence[PackedFile]:
        return [*self.columns.values(), *self.shards]


def is_remote(place: str) -> bool:
    """Whether images lie in object storage."""
    return place.startswith("s3://")


def is_packed(content: bytes) -> bool:
    """Whether the `index.json` of a folder is one of packed images, of whatever version."""
    return b'"maestro-packed"' in content[:200]
