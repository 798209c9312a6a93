"""The order of packed images: nothing lost or doubled, the same for any workers, reached at any step, as good as a full shuffle."""

import itertools

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mae_core.data.loader import TrainLoader
from mae_core.data.order import FullOrder, WindowedOrder
from mae_core.data.packed_source import PackedSource
from mae_core.data.skipped import SkippedImages
from mae_core.options import TransformConfig
from mae_core.world import World
from tests.unit.core_fixtures import TINY

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def starts_of(counts: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)])


class OrderedSource(PackedSource):
    """Shards of these many images, of which nothing is read."""

    def __init__(self, counts: list[int]) -> None:
        self.starts = starts_of(counts)


def loader(counts: list[int], *, batch_size: int, first: int = 0, workers: int = 1, rank: int = 0, accumulation: int = 1) -> TrainLoader:
    return TrainLoader(
        source=OrderedSource(counts),
        members=range(first, sum(counts)),
        model=TINY,
        transform=TransformConfig(),
        seed=5,
        batch_size=batch_size,
        accumulation=accumulation,
        world=World(rank, workers),
        num_threads=1,
        skipped=SkippedImages(),
    )


@given(counts=COUNTS, data=st.data(), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000), window=st.integers(1, 12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_an_epoch_has_each_member_once(counts: list[int], data: st.DataObject, seed: int, epoch: int, window: int) -> None:
    total = sum(counts)
    first = data.draw(st.integers(0, total - 1))
    order = WindowedOrder(starts_of(counts), range(first, total), seed=seed, window=window)
    cuts = sorted({0, total - first, *data.draw(st.lists(st.integers(0, total - first), max_size=6))})
    parts = [order.samples(epoch, start, stop) for start, stop in itertools.pairwise(cuts)]
    assert sorted(torch.cat(parts).tolist()) == list(range(first, total))


@given(counts=COUNTS, data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_steps_images_are_the_same_for_any_workers_and_accumulation_and_from_any_start(counts: list[int], data: st.DataObject) -> None:
    """Any step is reached without those before it: a loader that has read nothing yet gives the same."""
    workers, accumulation = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2]))
    batch_size = 12 * data.draw(st.integers(1, 2))
    if sum(counts) < batch_size:
        counts = [*counts, batch_size]
    whole = loader(counts, batch_size=batch_size)
    step = data.draw(st.integers(0, 3 * whole.steps_per_epoch))
    shared = [
        loader(counts, batch_size=batch_size, workers=workers, rank=rank, accumulation=accumulation).samples(step, part)
        for rank in range(workers)
        for part in range(accumulation)
    ]
    assert torch.cat(shared).sort().values.tolist() == whole.samples(step, 0).sort().values.tolist()
    in_passing = loader(counts, batch_size=batch_size)
    for before in range(step):
        in_passing.samples(before, 0)
    assert in_passing.samples(step, 0).tolist() == whole.samples(step, 0).tolist()


@given(counts=COUNTS, seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_steps_of_an_epoch_lose_and_double_nothing(counts: list[int], seed: int) -> None:
    batch_size = 1 + seed % sum(counts)
    each = loader(counts, batch_size=batch_size)
    for epoch in (0, 1):
        steps = range(epoch * each.steps_per_epoch, (epoch + 1) * each.steps_per_epoch)
        seen = torch.cat([each.samples(step, 0) for step in steps]).tolist()
        assert len(seen) == len(set(seen)) == each.steps_per_epoch * batch_size


def test_epochs_and_seeds_have_other_orders() -> None:
    counts = [50] * 40
    orders = [
        WindowedOrder(starts_of(counts), range(2000), seed=seed).samples(epoch, 0, 100).tolist() for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert len({tuple(sorted(order)) for order in orders}) == 3


def test_what_is_read_at_once_lies_in_few_shards_for_each_worker() -> None:
    """So that each machine fetches its own part of a window, and not all of it."""
    counts, workers = [100] * 64, 8
    shards = [
        {
            sample // 100
            for step in range(6)
            for sample in loader(counts, batch_size=256, workers=workers, rank=rank).samples(step, 0).tolist()
        }
        for rank in range(workers)
    ]
    assert all(len(few) <= 4 for few in shards), shards  # of the window's 16
    assert len(set().union(*shards)) == 16


def test_blocks_are_the_windows_counted_over_all_epochs() -> None:
    order = WindowedOrder(starts_of([10] * 20), range(200), seed=1, window=8)  # windows of 7, 6 and 7 shards
    assert [order.block(epoch, position) for epoch, position in ((0, 0), (0, 69), (0, 70), (0, 199), (1, 0), (2, 150))] == [
        0,
        0,
        1,
        2,
        3,
        8,
    ]
    assert [FullOrder(range(3000), seed=1).block(*place) for place in ((0, 0), (0, 1023), (0, 1024), (1, 0))] == [0, 0, 1, 2]


def class_spread(batches: NDArray[np.int64], labels: NDArray[np.int64], num_classes: int) -> float:
    """The variance of how often a class comes in a batch, over what it is where batches are drawn from all images without return."""
    counts = np.stack([np.bincount(labels[batch], minlength=num_classes) for batch in batches])
    share, batch_size = 1 / num_classes, batches.shape[1]
    expected = batch_size * share * (1 - share) * (len(labels) - batch_size) / (len(labels) - 1)
    return float(counts.var() / expected)


def test_batches_are_as_mixed_as_those_of_a_full_shuffle() -> None:
    """Packed images lie in the order of a hash: then batches from windows have as many of each class as those of a full shuffle.
    Shards of consecutive classes would not."""
    num_images, num_classes, batch = 64_000, 50, 128
    by_hash = np.random.default_rng(0).permutation(num_images) * num_classes // num_images
    sorted_labels = np.arange(num_images) * num_classes // num_images
    windowed = WindowedOrder(starts_of([250] * 256), range(num_images), seed=3)
    full = FullOrder(range(num_images), seed=3)
    for epoch in range(2):
        ours, theirs = (
            np.stack([order.samples(epoch, first, first + batch).numpy() for first in range(0, num_images, batch)])
            for order in (windowed, full)
        )
        assert abs(class_spread(ours, by_hash, num_classes) - 1) < 0.05
        assert abs(class_spread(theirs, by_hash, num_classes) - 1) < 0.05
        assert class_spread(ours, sorted_labels, num_classes) > 3  # the measure can tell


def test_where_an_image_comes_says_nothing_of_the_next_epoch() -> None:
    order = WindowedOrder(starts_of([250] * 256), range(64_000), seed=3)
    places = [np.argsort(order.samples(epoch, 0, 64_000).numpy()) for epoch in (0, 1)]
    assert abs(np.corrcoef(*places)[0, 1]) < 0.15  # of 16 windows' places: one shard of 256 decides for 250 images
