"""Per-channel mean and standard deviation of the training images: `data.normalize: auto`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from mae_core.data.decode import UnreadableImage
from mae_core.data.moments import moments_of
from mae_core.data.packed_source import PackedSource
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import ImageSource
from mae_core.errors import DataError
from mae_core.options import NormalizeConfig
from mae_core.world import World

_MAX_IMAGES = 10_000
_CONSTANT = 1e-7  # deviation / mean: less than float32 can tell apart


def channel_statistics(
    source: ImageSource, members: Sequence[int], *, in_chans: int, world: World, num_threads: int, skipped: SkippedImages
) -> NormalizeConfig:
    """Mean and deviation of each channel over up to 10,000 of `members`, evenly spread, in the units of `normalise`.

    Packed images were measured when they were packed, all of them. Others are measured as they are decoded and count alike, whatever
    their size, because the model sees each at one size. The result is the
    same for any number of workers: each image's moments have a place of their own, and all are reduced together. Unreadable images are left
    out; `skipped` gets those that this worker met.

    Raises DataError, on all workers, where no image can be read and where a channel is constant: nothing can be learned from it, most
    likely it was lost when the images were made, and who wants it nevertheless has to say which deviation it is divided by.
    """
    if isinstance(source, PackedSource) and source.index.channels == in_chans:
        known = source.index.statistics
        return _checked(np.array(known.mean), np.array(known.std), num_images=source.index.num_images)
    num_images = min(_MAX_IMAGES, len(members))

    def moments(place: int) -> NDArray[np.float64] | None:
        # packed images lie in a random order, and the first ones in few shards
        sample = members[place if isinstance(source, PackedSource) else place * len(members) // num_images]
        try:
            return moments_of(source.read(sample))
        except UnreadableImage as error:
            skipped.add(source.keys[sample], str(error))
            return None

    rows = torch.zeros(num_images, 1 + 2 * in_chans, dtype=torch.float64)  # whether it was readable, means, variances
    mine = range(world.rank, num_images, world.size)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="measure") as pool:
        for place, found in zip(mine, pool.map(moments, mine), strict=True):
            if found is not None:
                rows[place] = torch.from_numpy(np.concatenate([[1.0], found]))
    all_rows = world.sum(rows.to(world.device)).cpu().numpy()
    readable = all_rows[all_rows[:, 0] == 1]
    if not len(readable):
        raise DataError(f"data: none of {num_images} training images can be read; data.normalize auto has nothing to measure")
    means, variances = np.split(readable[:, 1:], 2, axis=1)
    return _checked(means.mean(axis=0), np.sqrt(variances.mean(axis=0) + means.var(axis=0)), num_images=len(readable))


def _checked(mean: NDArray[np.float64], std: NDArray[np.float64], *, num_images: int) -> NormalizeConfig:
    constant = np.flatnonzero(std <= _CONSTANT * np.abs(mean))
    if len(constant):
        given = np.where(std <= _CONSTANT * np.abs(mean), 1.0, std)
        raise DataError(
            f"data.normalize auto: channel(s) {', '.join(map(str, constant))}, counted from 0, are constant in all of {num_images} images: "
            f"an alpha channel, or one that was lost? Leave them out of the images, or set data.normalize to "
            f"{{mean: {_listed(mean)}, std: {_listed(given)}}}"
        )
    return NormalizeConfig(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _listed(values: NDArray[np.float64]) -> str:
    return f"[{', '.join(f'{value:.6g}' for value in values)}]"
