"""Images in object storage: packed ones, or whatever lies below a prefix. Their bytes come through functions that workers give."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from mae_core.data.cache import Fetch, FileCache, RemoteFile
from mae_core.data.decode import Pixels, decode_image
from mae_core.data.names import labels_of
from mae_core.data.packed_source import PackedSource
from mae_core.errors import DataError
from mae_core.options import IMAGE_SUFFIXES
from mae_core.packed import INDEX, MAX_INDEX_BYTES, PackedFile, is_packed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """How this process reads objects, by addresses such as s3://bucket/key.

    listed: all objects below a prefix; the same ones whenever a run asks again. fetch: see `cache.Fetch`.
    """

    fetch: Fetch
    listed: Callable[[str], Sequence[RemoteFile]]
    cache: FileCache


def open_remote(place: str, remote: Remote | None, *, in_chans: int) -> "PackedSource | PrefixSource":
    """The images at an address. Raises DataError where there are none, or nobody can fetch them."""
    if remote is None:
        raise DataError(f"data: {place} is read by the service's workers alone; submit the job, or name a folder of this machine")
    prefix = f"{place.rstrip('/')}/"
    try:
        content = remote.fetch(prefix + INDEX, 0, MAX_INDEX_BYTES)
    except FileNotFoundError:
        content = b""
    if is_packed(content):
        return PackedSource(content, RemoteFiles(prefix, remote.cache), in_chans=in_chans)
    return PrefixSource(prefix, remote, in_chans=in_chans)


class RemoteFiles:
    """The files of a packed set below a prefix."""

    def __init__(self, prefix: str, cache: FileCache) -> None:
        self.place, self._cache = prefix, cache

    def open(self, file: PackedFile) -> BinaryIO:
        return self._cache.open(self._remote(file))

    def want(self, files: Sequence[PackedFile]) -> None:
        self._cache.want([self._remote(file) for file in files])

    def _remote(self, file: PackedFile) -> RemoteFile:
        return RemoteFile(self.place + file.name, file.bytes, file.sha256)


class PrefixSource:
    """Every image below a prefix, in sorted order, as `source.FolderSource` has them. Each is an object, and a request, of its own."""

    def __init__(self, prefix: str, remote: Remote, *, in_chans: int) -> None:
        self._cache, self._in_chans = remote.cache, in_chans
        found = [file for file in remote.listed(prefix) if file.address.lower().endswith(IMAGE_SUFFIXES)]
        self._files = sorted(found, key=lambda file: file.address)
        if not self._files:
            raise DataError(f"data: no images below {prefix} (looked for {', '.join(IMAGE_SUFFIXES)}), and no {INDEX} of packed ones")
        self.keys = [file.address.removeprefix(prefix) for file in self._files]
        self.classes, self.labels = labels_of(self.keys)
        logger.warning(
            "%s is no packed data set: each of its %d images is a request of its own, which is slower; pack them with `maestro data pack`",
            prefix,
            len(self.keys),
        )

    def read(self, index: int) -> Pixels:
        with self._cache.open(self._files[index]) as file:
            data = file.read()
        return decode_image(data, self._in_chans, name=self.keys[index])

    def want(self, samples: Sequence[int]) -> None:
        self._cache.want([self._files[sample] for sample in samples])
