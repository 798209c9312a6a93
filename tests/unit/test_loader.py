import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_core.data.loader import MicroBatch, SkippedImages, TrainLoader, measured_batches
from mae_core.errors import DataError, SpecError
from mae_core.options import TransformConfig
from mae_core.world import World
from tests.unit.core_fixtures import TINY, PictureSource

NUM_IMAGES, BATCH = 27, 8  # three steps an epoch, three images left over
BROKEN = (4, 5, 26)


def loader(**changes: Any) -> TrainLoader:
    given: dict[str, Any] = {
        "source": PictureSource(NUM_IMAGES),
        "members": list(range(NUM_IMAGES)),
        "model": TINY,
        "transform": TransformConfig(),
        "seed": 1,
        "batch_size": BATCH,
        "accumulation": 1,
        "world": World(),
        "num_threads": 2,
        "skipped": SkippedImages(),
    }
    return TrainLoader(**(given | changes))


def global_batches(start: int, end: int, *, workers: int = 1, **changes: Any) -> list[tuple[Tensor, Tensor]]:
    """(pixels, samples) of each step over all workers and micro-batches, in the order of samples."""
    parts = changes.get("accumulation", 1)
    by_worker = [list(loader(world=World(rank, workers), **changes).from_step(start, end)) for rank in range(workers)]
    steps = []
    for step in range(end - start):
        micros = [micro for batches in by_worker for micro in batches[step * parts : (step + 1) * parts]]
        assert [micro.is_last for micro in micros] == ([False] * (parts - 1) + [True]) * workers
        samples, order = torch.cat([micro.batch.samples_B for micro in micros]).sort()
        steps.append((torch.cat([micro.batch.pixels_BHWC for micro in micros])[order], samples))
    return steps


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_steps_images_are_the_same_for_any_workers_and_accumulation(workers: int, accumulation: int) -> None:
    for (pixels, samples), (expected_pixels, expected_samples) in zip(
        global_batches(0, 7, workers=workers, accumulation=accumulation), global_batches(0, 7), strict=True
    ):
        assert torch.equal(samples, expected_samples)
        assert torch.equal(pixels, expected_pixels)


def test_the_order_does_not_depend_on_the_number_of_threads() -> None:
    one, five = (list(loader(num_threads=threads).from_step(0, 4)) for threads in (1, 5))
    assert all(same(a, b) for a, b in zip(one, five, strict=True))


def test_an_epoch_sees_each_image_once() -> None:
    for epoch in range(3):
        samples = torch.cat([samples for _, samples in global_batches(3 * epoch, 3 * epoch + 3)])
        assert len(samples) == len(set(samples.tolist())) == 24
    whole = loader(batch_size=NUM_IMAGES)
    assert sorted(next(iter(whole.from_step(0, 1))).batch.samples_B.tolist()) == list(range(NUM_IMAGES))


def test_epochs_have_other_orders_and_crops() -> None:
    first, second = (next(iter(loader(batch_size=NUM_IMAGES).from_step(step, step + 1))).batch for step in (0, 1))
    assert first.samples_B.tolist() != second.samples_B.tolist()
    assert not torch.equal(first.pixels_BHWC[first.samples_B.argsort()], second.pixels_BHWC[second.samples_B.argsort()])


@pytest.mark.parametrize("start", [1, 2, 3, 5, 8])
def test_starting_at_a_step_is_going_on_from_it(start: int) -> None:
    from_there = list(loader(accumulation=2).from_step(start, 9))
    undisturbed = list(loader(accumulation=2).from_step(0, 9))[2 * start :]
    assert len(from_there) == 2 * (9 - start)
    assert all(same(a, b) for a, b in zip(from_there, undisturbed, strict=True))
    assert from_there[0].epoch == start // 3


def same(a: MicroBatch, b: MicroBatch) -> bool:
    return a.epoch == b.epoch and a.is_last == b.is_last and all(torch.equal(x, y) for x, y in zip(a.batch, b.batch, strict=True))


def test_members_are_the_only_images_used() -> None:
    members = [1, 4, 9, 16, 25]
    seen = next(iter(loader(members=members, batch_size=5).from_step(0, 1)))
    assert sorted(seen.batch.samples_B.tolist()) == members


def test_labels_are_those_of_the_samples() -> None:
    batch = next(iter(loader().from_step(0, 1))).batch
    assert batch.labels_B.tolist() == [sample % 2 for sample in batch.samples_B.tolist()]
    unlabelled = PictureSource(NUM_IMAGES)
    unlabelled.classes, unlabelled.labels = [], []
    assert next(iter(loader(source=unlabelled).from_step(0, 1))).batch.labels_B.tolist() == [-1] * BATCH


def test_the_next_readable_image_stands_in_for_a_broken_one() -> None:
    """With its own label: a class may end between the two."""
    skipped = SkippedImages()
    broken = loader(source=PictureSource(NUM_IMAGES, broken=BROKEN), skipped=skipped, batch_size=NUM_IMAGES)
    batch = next(iter(broken.from_step(0, 1))).batch
    whole = next(iter(loader(batch_size=NUM_IMAGES).from_step(0, 1))).batch
    substitutes = {4: 6, 5: 6, 26: 0}
    assert batch.samples_B.tolist() == [substitutes.get(sample, sample) for sample in whole.samples_B.tolist()]
    assert batch.labels_B.tolist() == [sample % 2 for sample in batch.samples_B.tolist()]
    kept = ~torch.isin(whole.samples_B, torch.tensor(BROKEN))
    assert torch.equal(batch.pixels_BHWC[kept], whole.pixels_BHWC[kept])
    assert skipped.num_new == 3
    assert skipped.take_new() == {f"picture-{index}": f"picture-{index}: broken" for index in BROKEN}
    assert skipped.num_new == 0


def test_substitutes_are_the_same_for_any_workers() -> None:
    changes = {"source": PictureSource(NUM_IMAGES, broken=BROKEN)}
    for (pixels, samples), (expected_pixels, expected_samples) in zip(
        global_batches(0, 6, workers=4, **changes), global_batches(0, 6, **changes), strict=True
    ):
        assert torch.equal(samples, expected_samples)
        assert sorted(pixels.flatten(1).tolist()) == sorted(expected_pixels.flatten(1).tolist())


def test_an_image_is_told_of_once() -> None:
    skipped = SkippedImages()
    for _ in loader(source=PictureSource(NUM_IMAGES, broken=BROKEN), skipped=skipped, batch_size=NUM_IMAGES).from_step(0, 4):
        pass
    assert len(skipped.take_new()) == 3
    for _ in loader(source=PictureSource(NUM_IMAGES, broken=BROKEN), skipped=skipped).from_step(0, 4):
        pass
    assert skipped.take_new() == {}


def test_too_many_broken_images_in_a_row() -> None:
    broken = loader(source=PictureSource(NUM_IMAGES, broken=range(NUM_IMAGES)))
    with pytest.raises(DataError, match=r"images in a row cannot be read, the first one picture-\d+"):
        next(iter(broken.from_step(0, 1)))


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(SpecError, match=r"optim\.batch_size 28 is larger than the data \(27 training images\); lower it"):
        loader(batch_size=28)


def test_leaving_early_ends_the_threads() -> None:
    batches = loader().from_step(0, 1000)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_measuring_sees_each_readable_image_once_in_order() -> None:
    skipped = SkippedImages()
    source = PictureSource(NUM_IMAGES, broken=(0, 1, 2, 7))
    members = [0, 1, 2, 3, 7, 11, 12]
    batches = list(measured_batches(source, members, size=(8, 8), batch_size=3, num_threads=2, skipped=skipped))
    assert [batch.samples_B.tolist() for batch in batches] == [[3, 11], [12]]
    assert [batch.labels_B.tolist() for batch in batches] == [[1, 1], [0]]
    assert batches[0].pixels_BHWC.shape == (2, 8, 8, 3)
    assert skipped.num_new == 4
