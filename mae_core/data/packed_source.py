"""The images of a packed data set, local or streamed. What grows with their number stays on disk, mapped into memory."""

import hashlib
import json
import os
import tarfile
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mae_core.data.decode import Pixels, decode_image
from mae_core.errors import DataError
from mae_core.packed import BLOCK, COLUMNS, INDEX, Column, PackedFile, PackedIndex

_WORD = 2**64


class PackedFiles(Protocol):
    """The files of a packed folder, wherever it is."""

    place: str

    def open(self, file: PackedFile) -> BinaryIO:
        """A file, ready to be read here. Raises DataError where it is missing, has another size, or, from elsewhere, another checksum."""
        ...

    def want(self, files: Sequence[PackedFile]) -> None:
        """These will be needed soon, in this order. Returns at once."""
        ...


class LocalFiles:
    """In a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.place, self._folder = str(folder), folder

    def open(self, file: PackedFile) -> BinaryIO:
        path = self._folder / file.name
        try:
            opened = path.open("rb", buffering=0)
        except OSError as error:
            raise DataError(f"data: {path} cannot be read ({error.strerror}), though the index names it; pack the images again") from error
        if (found := os.fstat(opened.fileno()).st_size) != file.bytes:
            opened.close()
            raise DataError(f"data: {path} has {found} bytes, its index says {file.bytes}; copy it again, or pack the images again")
        return opened

    def want(self, files: Sequence[PackedFile]) -> None:
        pass


def read_index(content: bytes, place: str) -> PackedIndex:
    """The index of the packed data at `place`. Raises DataError where it is damaged or of another version."""
    try:
        return PackedIndex.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise DataError(
            f"data: {place}: {INDEX} is damaged or of another version ({where}: {fault['msg']}); pack the images again"
        ) from error


class PackedSource:
    """Raises DataError where a column cannot be opened; shards when they are read. `data verify` reads checksums on this disk."""

    def __init__(self, content: bytes, files: PackedFiles, *, in_chans: int) -> None:
        self._files, self._in_chans = files, in_chans
        self.index = read_index(content, files.place)
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum([shard.num_images for shard in self.index.shards])])
        self.classes: Sequence[str] = self.index.classes
        self._offsets, self._sizes = self._column("offsets"), self._column("sizes")
        self.labels: Sequence[int] = _Numbers(self._column("labels")) if self.classes else []
        self.keys: Sequence[str] = _Each(self.index.num_images, self._key)

    def read(self, index: int) -> Pixels:
        data = self._read_bytes(index, int(self._offsets[index]) * BLOCK, int(self._sizes[index]))
        return decode_image(data, self._in_chans, name=_Name(self, index))

    def want(self, samples: Sequence[int]) -> None:
        shards = np.searchsorted(self.starts, np.asarray(samples), side="right") - 1
        self._files.want([self.index.shards[shard] for shard in dict.fromkeys(shards.tolist())])

    def split(self, fraction: float) -> tuple[range, range]:
        """As `source.split` of the same files: in the order of their hashes, the images that are held back are the first."""
        num_held_back = 0
        if fraction:
            hashes = _Numbers(self._column("hashes"))
            num_held_back = bisect_left(hashes, fraction, key=lambda number: number / _WORD)
        return range(num_held_back, self.index.num_images), range(num_held_back)

    def _key(self, index: int) -> str:
        """An image's original name, from the JSON that lies before it."""
        shard = self._shard_of(index)
        first = 0
        if index > self.starts[shard]:
            end_before = int(self._offsets[index - 1]) * BLOCK + int(self._sizes[index - 1])
            first = -(-end_before // BLOCK) * BLOCK
        header = tarfile.TarInfo.frombuf(self._read_bytes(index, first, BLOCK), "utf-8", "surrogateescape")
        key: str = json.loads(self._read_bytes(index, first + BLOCK, header.size))["key"]
        return key

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def _read_bytes(self, index: int, first: int, length: int) -> bytes:
        shard = self.index.shards[self._shard_of(index)]
        with self._files.open(shard) as file:
            data = os.pread(file.fileno(), length, first)
        if len(data) != length:
            raise DataError(f"data: {self._files.place}: {shard.name} does not have the image {index} that its index names; pack it again")
        return data

    def _column(self, name: Column) -> NDArray[np.int64]:
        """A number for each image, of the column's own type."""
        file = self.index.columns[name]
        with self._files.open(file) as opened:
            if file.bytes != self.index.num_images * np.dtype(COLUMNS[name]).itemsize:
                raise DataError(f"data: {self._files.place}: {file.name} does not fit {INDEX}; pack the images again")
            return np.memmap(opened, dtype=COLUMNS[name], mode="r")


class _Name:
    """An image as errors call it; read when one does."""

    def __init__(self, source: PackedSource, index: int) -> None:
        self._source, self._index = source, index

    def __str__(self) -> str:
        return self._source.keys[self._index]


class _Each(Sequence[str]):
    """A sequence whose elements are made when they are asked for."""

    def __init__(self, length: int, element: Callable[[int], str]) -> None:
        self._places, self._element = range(length), element

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self._element(each) for each in self._places[place]]
        return self._element(self._places[place])


class _Numbers(Sequence[int]):
    """A column as Python's integers."""

    def __init__(self, column: NDArray[np.int64]) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        found = self._column[place]
        return found.tolist()  # type: ignore[no-any-return]
