"""One shard: some of the listed images in a tar file, and a note beside it that says what it has become.

A shard depends on its images and on how they are packed alone, byte for byte: not on who packs it, nor when.
"""

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from mae_core.data.decode import UnreadableImage
from mae_core.data.encode import Encoded, encode
from mae_core.data.listing import ImagePlace
from mae_core.data.names import key_hash, printable
from mae_core.options import Strict
from mae_core.packed import BLOCK, Shard
from mae_core.stores import PartStore


@dataclass(frozen=True)
class ShardTask:
    """What is to become a shard: keys and labels (None: there are no classes) of consecutive listed images, from the place `first` on."""

    number: int
    first: int
    keys: list[str]
    labels: list[int] | None
    channels: int
    resize: int | None
    made_of: str


class ShardNote(Strict):
    """What lies in a shard; an empty `shards` where none of its images can be read. unreadable: name and why.

    mean, within, between: sums over the images of the channels' means and variances, and of the means' squared distances from their mean.
    """

    made_of: str
    shards: list[Shard]
    offsets: list[int] = Field(default=[])
    sizes: list[int] = Field(default=[])
    labels: list[int] = Field(default=[])
    hashes: list[int] = Field(default=[])
    unreadable: dict[str, str] = Field(default={})
    mean: list[float] = Field(default=[])
    within: list[float] = Field(default=[])
    between: list[float] = Field(default=[])


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def note_name(number: int) -> str:
    return f"shard-{number:06d}.json"


def find_note(store: PartStore, number: int, *, made_of: str, names: set[str]) -> ShardNote | None:
    """The note of a shard that is there and made of just that; else None."""
    if note_name(number) not in names:
        return None
    try:
        note = ShardNote.model_validate_json(store.read(note_name(number)))
    except ValidationError:
        return None
    return note if note.made_of == made_of and all(shard.name in names for shard in note.shards) else None


def pack_shard(source: ImagePlace, store: PartStore, task: ShardTask) -> ShardNote:
    """Packs one shard into `store`, then its note. What cannot be read is left out, and said in the note."""
    store.scratch.mkdir(parents=True, exist_ok=True)
    path = store.scratch / f".{shard_name(task.number)}"
    contents = _Contents()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, key in enumerate(task.keys):
            label = None if task.labels is None else task.labels[place]
            try:
                encoded = encode(_read(source, key), printable(key), channels=task.channels, resize=task.resize)
            except UnreadableImage as error:
                contents.unreadable[printable(key)] = printable(str(error))
                continue
            contents.add(tar, f"{task.first + place:09d}", key, label, encoded)
    note = contents.note(store, path, task)
    path.write_text(note.model_dump_json())
    store.put(note_name(task.number), path)
    return note


def _read(source: ImagePlace, key: str) -> bytes:
    try:
        return source.read(key)
    except OSError as error:
        raise UnreadableImage(f"{key}: {error}") from error


@dataclass
class _Contents:
    """What has gone into a shard so far."""

    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    moments: list[Any] = field(default_factory=list)

    def add(self, tar: tarfile.TarFile, name: str, key: str, label: int | None, encoded: Encoded) -> None:
        about = {"key": key} if label is None else {"key": key, "class": label}
        _add_member(tar, f"{name}.json", json.dumps(about).encode())
        if label is not None:
            _add_member(tar, f"{name}.cls", str(label).encode())
            self.labels.append(label)
        self.offsets.append(_add_member(tar, name + encoded.suffix, encoded.data))
        self.sizes.append(len(encoded.data))
        self.hashes.append(key_hash(key))
        self.moments.append(encoded.moments)

    def note(self, store: PartStore, path: Path, task: ShardTask) -> ShardNote:
        """Puts the shard into the store; what it has become."""
        if not self.sizes:
            path.unlink()
            return ShardNote(made_of=task.made_of, shards=[], unreadable=self.unreadable)
        name = shard_name(task.number)
        stored = store.put(name, path)
        means, variances = np.split(np.stack(self.moments), 2, axis=1)
        return ShardNote(
            made_of=task.made_of,
            shards=[Shard(name=name, bytes=stored.bytes, sha256=stored.sha256, num_images=len(self.sizes))],
            offsets=self.offsets,
            sizes=self.sizes,
            labels=self.labels,
            hashes=self.hashes,
            unreadable=self.unreadable,
            mean=means.sum(axis=0).tolist(),
            within=variances.sum(axis=0).tolist(),
            between=((means - means.mean(axis=0)) ** 2).sum(axis=0).tolist(),
        )


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a file whose bytes say nothing of who made it, or when; where its content begins, in blocks."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    place = tar.offset // BLOCK + 1  # behind a header of one block, as these short names need no more
    tar.addfile(member, io.BytesIO(data))
    return place
