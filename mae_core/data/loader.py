"""Batches in a deterministic order, read ahead by threads.

The global batch of step s is the s-th slice of the epoch's order (`mae_core.data.order`); accumulation and workers take consecutive parts
of it. So the order of samples is a function of (seed, epoch) alone, and any step can be reached without replaying those before it.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mae_core.data.decode import UnreadableImage
from mae_core.data.order import FullOrder, Order, WindowedOrder
from mae_core.data.packed_source import PackedSource
from mae_core.data.randaugment import numbers_per_augment, rand_augment
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import ImageSource, StreamedSource
from mae_core.data.transforms import NUMBERS_PER_CROP, ModelPixels, as_floats, centre_crop, random_resized_crop
from mae_core.errors import DataError, SpecError
from mae_core.options import FinetuneTransformConfig, ModelConfig, RandAugmentConfig, TransformConfig
from mae_core.randomness import Stream, uniform
from mae_core.world import World

_BATCHES_AHEAD = 3
_WANTED_AHEAD = 8  # batches that a streamed source is told of when images are measured
_MAX_SUBSTITUTES = 100


class Batch(NamedTuple):
    """pixels_BHWC: uint8, or float32 as `normalise` takes it, in memory channel by channel. samples_B: int64 indices into the source.
    labels_B: int64, -1 without labels.

    Where an image could not be read, all three are those of its substitute.
    """

    pixels_BHWC: Tensor
    samples_B: Tensor
    labels_B: Tensor


class MicroBatch(NamedTuple):
    """The part of a step's batch that one worker takes at once. `is_last`: the optimiser steps after it."""

    epoch: int
    batch: Batch
    is_last: bool


class _Read(NamedTuple):
    """One image at the model's size, and its index."""

    sample: int
    pixels_HWC: ModelPixels


@dataclass(frozen=True)
class TrainLoader:
    """The training images of one worker.

    `members` are the indices of the source that may be used, in rising order. `batch_size` counts the images that one step decodes, over
    all workers and micro-batches. An image that cannot be replaced is all zeros, and `skipped` says that the run cannot go on.
    """

    source: ImageSource
    members: Sequence[int]
    model: ModelConfig
    transform: TransformConfig
    seed: int
    batch_size: int
    accumulation: int
    world: World
    num_threads: int
    skipped: SkippedImages

    def __post_init__(self) -> None:
        if self.batch_size > len(self.members):
            raise SpecError(
                f"optim.batch_size: each step takes {self.batch_size} images (per device x {self.world.size} worker(s) x accumulation "
                f"{self.accumulation}), but the data has only {len(self.members)} training images; lower optim.batch_size"
            )
        if self.batch_size % (self.accumulation * self.world.size):
            raise SpecError(
                f"optim.batch_size: the {self.batch_size} images of a step cannot be shared evenly by {self.world.size} worker(s) x "
                f"accumulation {self.accumulation}; make it a multiple of {self.accumulation * self.world.size}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """The last, incomplete batch of an epoch is dropped."""
        return len(self.members) // self.batch_size

    def from_step(self, start: int, end: int) -> Iterator[MicroBatch]:
        """Micro-batches of the optimiser steps `start` to `end` - 1."""
        parts = ((step, part) for step in range(start, end) for part in range(self.accumulation))
        wanted = _Wanted(self, start, end)
        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode") as pool:
            ahead: deque[tuple[int, bool, list[Future[list[_Read]]]]] = deque()

            def read_ahead() -> None:
                for step, part in parts:
                    wanted.reached(step, part)
                    epoch = step // self.steps_per_epoch
                    chunks = self.samples(step, part).chunk(self.num_threads)
                    futures = [pool.submit(self._read, epoch, chunk) for chunk in chunks]
                    ahead.append((epoch, part == self.accumulation - 1, futures))
                    if len(ahead) >= _BATCHES_AHEAD:
                        return

            try:
                read_ahead()
                while ahead:
                    epoch, is_last, futures = ahead.popleft()
                    images = [image for future in futures for image in future.result()]
                    read_ahead()
                    batch = _batch(self.source, images)
                    if self.world.device.type == "cuda":  # a copy from pinned memory does not wait for the device
                        batch = batch._replace(pixels_BHWC=batch.pixels_BHWC.pin_memory())
                    yield MicroBatch(epoch, batch, is_last)
            finally:
                for *_, futures in ahead:
                    for future in futures:
                        future.cancel()

    @cached_property
    def _order(self) -> Order:
        if isinstance(self.source, PackedSource):
            assert isinstance(self.members, range)
            return WindowedOrder(self.source.starts, self.members, seed=self.seed)
        return FullOrder(self.members, seed=self.seed)

    def samples(self, step: int, part: int) -> Tensor:
        """Indices into the source of this worker's part of one micro-batch."""
        epoch, first = self._place(step, part)
        micro = self.batch_size // self.accumulation
        mine = micro // self.world.size
        return self._order.samples(epoch, first, first + micro)[self.world.rank * mine :][:mine]

    def block(self, step: int, part: int) -> int:
        """Which stretch of the order a micro-batch begins in."""
        return self._order.block(*self._place(step, part))

    def _place(self, step: int, part: int) -> tuple[int, int]:
        """The epoch of a micro-batch, and the position in it of its first image, over all workers."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch, place * self.batch_size + part * (self.batch_size // self.accumulation)

    @property
    def _rand_augment(self) -> RandAugmentConfig | None:
        return self.transform.rand_augment if isinstance(self.transform, FinetuneTransformConfig) else None

    def _read(self, epoch: int, samples: Tensor) -> list[_Read]:
        def drawn(stream: Stream, count: int) -> NDArray[np.float32]:
            return uniform(seed=self.seed, epoch=epoch, stream=stream, samples=samples, count=count).numpy()

        images = [self._read_one(sample, crop) for sample, crop in zip(samples.tolist(), drawn(Stream.CROP, NUMBERS_PER_CROP), strict=True)]
        if (config := self._rand_augment) is None:
            return images
        augments = drawn(Stream.AUGMENT, numbers_per_augment(config))
        return [self._augmented(image, config, augment) for image, augment in zip(images, augments, strict=True)]

    def _read_one(self, sample: int, crop: NDArray[np.float32]) -> _Read:
        """The image, or, where it cannot be read, the next one of the source that can: a function of the data alone."""
        position = bisect_left(self.members, sample)
        tries = 0 if self.skipped.fatal else min(_MAX_SUBSTITUTES, len(self.members))
        for tried in range(tries):
            candidate = self.members[(position + tried) % len(self.members)]
            try:
                return _Read(candidate, random_resized_crop(self.source.read(candidate), self.model.image_size, self.transform, crop))
            except UnreadableImage as error:
                self.skipped.add(self.source.keys[candidate], str(error))
                why = str(error)
            except DataError as error:  # not of this image alone: a shard is missing or damaged
                self.skipped.give_up(str(error))
                tries = 0
                break
        if tries:
            self.skipped.give_up(
                f"data: {tries} images in a row cannot be read, the first one {self.source.keys[sample]}; remove or mend them. "
                f"The last one: {why}"
            )
        return _Read(sample, np.zeros((*self.model.image_size, self.model.in_chans), dtype=np.uint8))

    def _augmented(self, image: _Read, config: RandAugmentConfig, uniform: NDArray[np.float32]) -> _Read:
        pixels = image.pixels_HWC
        if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
            self.skipped.give_up(
                f"data.transform.rand_augment: its operations need 8-bit images of 1 or 3 channels, but {self.source.keys[image.sample]} "
                f"has {pixels.shape[2]} channel(s) of {'8' if pixels.dtype == np.uint8 else 'more than 8'} bits; "
                "set data.transform.rand_augment to null"
            )
            return image
        augmented = np.asarray(rand_augment(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), config, uniform))
        return image._replace(pixels_HWC=augmented.reshape(pixels.shape))


class _Wanted:
    """Tells a streamed source which images come next: those of the stretch of the order that is being read, and of the one behind it."""

    def __init__(self, loader: TrainLoader, start: int, end: int) -> None:
        self._loader = loader
        is_streamed = isinstance(loader.source, StreamedSource)
        self._parts = ((step, part) for step in range(start, end if is_streamed else start) for part in range(loader.accumulation))
        self._next = next(self._parts, None)

    def reached(self, step: int, part: int) -> None:
        """A micro-batch will be read now."""
        source = self._loader.source
        while self._next is not None and self._loader.block(*self._next) <= self._loader.block(step, part) + 1:
            assert isinstance(source, StreamedSource)
            source.want(self._loader.samples(*self._next).tolist())
            self._next = next(self._parts, None)


def _batch(source: ImageSource, images: list[_Read]) -> Batch:
    samples = [image.sample for image in images]
    labels = [source.labels[sample] if source.labels else -1 for sample in samples]
    pixels = [image.pixels_HWC for image in images]
    if len({array.dtype for array in pixels}) > 1:
        pixels = [as_floats(array) for array in pixels]
    return Batch(stacked(pixels), torch.tensor(samples), torch.tensor(labels))


def stacked(pixels: list[ModelPixels]) -> Tensor:
    """(H, W, C) each → (B, H, W, C), in memory channel by channel, as training crops are and `normalise` makes them."""
    return torch.from_numpy(np.stack([array.transpose(2, 0, 1) for array in pixels])).permute(0, 2, 3, 1)


def measured_batches(
    source: ImageSource, members: Sequence[int], *, size: tuple[int, int], batch_size: int, num_threads: int, skipped: SkippedImages
) -> Generator[Batch | None]:
    """All images of `members` once, in order, centre-cropped, the next batch being decoded while one is used.

    Unreadable images are left out; None stands for a batch that has no others.
    """

    def read(sample: int) -> _Read | None:
        try:
            return _Read(sample, centre_crop(source.read(sample), size))
        except UnreadableImage as error:
            skipped.add(source.keys[sample], str(error))
            return None

    def batch_of(reads: Iterator[_Read | None]) -> Batch | None:
        images = [image for image in reads if image is not None]
        return _batch(source, images) if images else None

    def next_ones(first: int) -> Sequence[int]:
        if isinstance(source, StreamedSource):
            source.want(members[first : first + _WANTED_AHEAD * batch_size])
        return members[first : first + batch_size]

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
    try:
        begun = (pool.map(read, next_ones(first)) for first in range(0, len(members), batch_size))
        ahead = next(begun, None)
        while ahead is not None:
            batch = batch_of(ahead)
            ahead = next(begun, None)
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
