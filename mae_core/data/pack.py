"""Images → shards and their index, in parallel; a repeat goes on with what was broken off, to the same bytes."""

import hashlib
import json
import math
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from mae_core.data.decode import UnfitImage, UnreadableImage
from mae_core.data.encode import JPEG_QUALITY, encode
from mae_core.data.listing import ImagePlace, Listed
from mae_core.data.names import printable
from mae_core.data.packed_source import read_index
from mae_core.data.shards import ShardNote, ShardTask, find_note, pack_shard
from mae_core.errors import DataError
from mae_core.packed import BLOCK, COLUMNS, INDEX, UNREADABLE, ChannelStatistics, Column, PackedFile, PackedIndex
from mae_core.stores import PartStore

SHARD_BYTES = 64 * 2**20
_VERSION = 1  # of what this module makes of the same images
_TRIED = 32  # images whose size says how many a shard takes


class Packed(NamedTuple):
    """How far the packing is. Shards that an earlier call has packed count."""

    shards: int
    num_shards: int
    images: int
    unreadable: int


@dataclass(frozen=True)
class Packing:
    """How images are packed. channels: as a model that is trained on them would take them."""

    channels: int = 3
    resize: int | None = None
    shard_bytes: int = SHARD_BYTES  # on average


def pack(
    source: ImagePlace, listed: Listed, store: PartStore, packing: Packing, *, num_processes: int, tell: Callable[[Packed], None]
) -> PackedIndex:
    """Packs the listed images into `store`; its index, which is written last.

    Raises DataError where no image can be read, and where the store holds other packed images.
    """
    per_shard = _images_per_shard(source, listed, packing)
    made_of = _made_of(listed, packing, per_shard)
    names = set(store.names())
    if INDEX in names:
        index = read_index(store.read(INDEX), "the destination")
        if index.made_of != made_of:
            raise DataError("data: the destination holds other packed images, or these packed in another way; choose an empty one")
    else:
        notes = _pack_shards(source, listed, store, packing, per_shard, made_of, names, num_processes=num_processes, tell=tell)
        index = _finish(store, listed, packing, made_of, notes)
    for name in store.names():
        if name.startswith("shard-") and name.endswith(".json"):
            store.delete(name)
    return index


def _images_per_shard(source: ImagePlace, listed: Listed, packing: Packing) -> int:
    """By the size of some images. Raises DataError where none of them can be read, and where the first one has other channels."""
    sizes, why = [], ""
    for key in listed.keys[:: max(len(listed.keys) // _TRIED, 1)]:
        try:
            encoded = encode(source.read(key), printable(key), channels=packing.channels, resize=packing.resize)
            sizes.append(len(encoded.data) + 4 * BLOCK)
        except UnfitImage as error:
            if not sizes:
                raise DataError(f"data: {str(error).replace('model.in_chans', '--channels')}") from error
        except (UnreadableImage, OSError) as error:
            why = str(error)
    if not sizes:
        raise DataError(f"data: none of {min(_TRIED, len(listed.keys))} images can be read, such as {why}")
    return max(1, packing.shard_bytes * len(sizes) // sum(sizes))


def _made_of(listed: Listed, packing: Packing, per_shard: int) -> str:
    digest = hashlib.sha256(json.dumps([_VERSION, packing.channels, packing.resize, JPEG_QUALITY, per_shard, listed.classes]).encode())
    for key in listed.keys:
        digest.update(key.encode(errors="surrogateescape") + b"\0")
    digest.update(np.array(listed.labels, dtype="<i4").tobytes())
    return digest.hexdigest()


def _pack_shards(
    source: ImagePlace,
    listed: Listed,
    store: PartStore,
    packing: Packing,
    per_shard: int,
    made_of: str,
    names: set[str],
    *,
    num_processes: int,
    tell: Callable[[Packed], None],
) -> list[ShardNote]:
    """The notes of all shards, in order."""
    num_shards = math.ceil(len(listed.keys) / per_shard)

    def task(number: int) -> ShardTask:
        chosen = slice(number * per_shard, (number + 1) * per_shard)
        labels = listed.labels[chosen] if listed.classes else None
        return ShardTask(number, chosen.start, listed.keys[chosen], labels, packing.channels, packing.resize, made_of)

    found = {number: find_note(store, number, made_of=made_of, names=names) for number in range(num_shards)}
    notes = {number: note for number, note in found.items() if note is not None}
    images = sum(len(note.sizes) for note in notes.values())
    unreadable = sum(len(note.unreadable) for note in notes.values())
    tell(Packed(len(notes), num_shards, images, unreadable))
    missing = (task(number) for number in range(num_shards) if number not in notes)
    for number, note in _packed(source, store, missing, num_processes=num_processes):
        notes[number] = note
        images, unreadable = images + len(note.sizes), unreadable + len(note.unreadable)
        tell(Packed(len(notes), num_shards, images, unreadable))
    return [notes[number] for number in range(num_shards)]


def _packed(source: ImagePlace, store: PartStore, tasks: Iterator[ShardTask], *, num_processes: int) -> Iterator[tuple[int, ShardNote]]:
    """Shards by their numbers, in order. In processes that end with this one, however it ends."""
    if num_processes == 1:
        for task in tasks:
            yield task.number, pack_shard(source, store, task)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_end_with_parent) as pool:

        def begun(task: ShardTask) -> tuple[int, Future[ShardNote]]:
            return task.number, pool.submit(pack_shard, source, store, task)

        under_way = deque(begun(task) for task in islice(tasks, 2 * num_processes))
        while under_way:
            number, future = under_way.popleft()
            note = future.result()
            under_way += [begun(task) for task in islice(tasks, 1)]
            yield number, note


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # it was killed: nobody takes what is packed here any more

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _finish(store: PartStore, listed: Listed, packing: Packing, made_of: str, notes: list[ShardNote]) -> PackedIndex:
    """Writes the columns and what is unreadable, then the index."""
    num_images = sum(len(note.sizes) for note in notes)
    if not num_images:
        raise DataError(f"data: none of {len(listed.keys)} images can be read")
    unreadable = {key: why for note in notes for key, why in note.unreadable.items()}
    _put(store, UNREADABLE, json.dumps(unreadable, indent=1).encode())
    columns: list[Column] = ["offsets", "sizes", "hashes", *(["labels"] if listed.classes else [])]  # type: ignore[list-item]
    index = PackedIndex(
        made_of=made_of,
        num_images=num_images,
        num_unreadable=len(unreadable),
        channels=packing.channels,
        resize=packing.resize,
        classes=listed.classes,
        statistics=_statistics(notes, num_images),
        columns={
            name: _put(store, f"{name}.bin", b"".join(np.array(getattr(note, name), dtype=COLUMNS[name]).tobytes() for note in notes))
            for name in columns
        },
        shards=[shard for note in notes for shard in note.shards],
    )
    _put(store, INDEX, index.model_dump_json().encode())
    return index


def _statistics(notes: list[ShardNote], num_images: int) -> ChannelStatistics:
    """Over all images alike, as `statistics.channel_statistics` has them."""
    counts = np.array([len(note.sizes) for note in notes if note.sizes])[:, None]
    sums, within, between = (np.array([getattr(note, name) for note in notes if note.sizes]) for name in ("mean", "within", "between"))
    mean = sums.sum(axis=0) / num_images
    variance = (within + between + counts * (sums / counts - mean) ** 2).sum(axis=0) / num_images
    return ChannelStatistics(mean=tuple(mean.tolist()), std=tuple(np.sqrt(variance).tolist()))


def _put(store: PartStore, name: str, content: bytes) -> PackedFile:
    path = store.scratch / f".{name}"
    path.write_bytes(content)
    stored = store.put(name, path)
    return PackedFile(name=name, bytes=stored.bytes, sha256=stored.sha256)
