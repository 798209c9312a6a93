import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mae_core.data.decode import Pixels
from mae_core.data.loader import MicroBatch, TrainLoader, measured_batches
from mae_core.data.randaugment import numbers_per_augment, rand_augment
from mae_core.data.skipped import SkippedImages
from mae_core.errors import SpecError
from mae_core.options import FinetuneTransformConfig, TransformConfig
from mae_core.randomness import Stream, uniform
from mae_core.world import World
from tests.unit.core_fixtures import TINY, PictureSource, picture

NUM_IMAGES, BATCH = 27, 8  # three steps an epoch, three images left over
BROKEN = (4, 5, 26)


class ArraySource:
    """Given images, without labels."""

    def __init__(self, images: Sequence[Pixels]) -> None:
        self.keys = [f"array-{index}" for index in range(len(images))]
        self.classes: list[str] = []
        self.labels: list[int] = []
        self._images = images

    def read(self, index: int) -> Pixels:
        return self._images[index]


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


def test_too_many_broken_images_in_a_row_are_told_of_and_not_raised() -> None:
    """Raised in one worker's thread, it would leave the others waiting in a collective."""
    skipped = SkippedImages()
    broken = loader(source=PictureSource(NUM_IMAGES, broken=range(NUM_IMAGES)), skipped=skipped)
    assert skipped.fatal is None
    micro, later = broken.from_step(0, 2)
    assert micro.batch.pixels_BHWC.shape == (BATCH, 8, 8, 3)
    assert not micro.batch.pixels_BHWC.any()
    assert later.batch.samples_B.tolist() == next(iter(loader().from_step(1, 2))).batch.samples_B.tolist()
    assert skipped.fatal is not None
    assert re.search(r"27 images in a row cannot be read, the first one picture-\d+; .*picture-\d+: broken", skipped.fatal)


def test_the_first_reason_to_give_up_stays() -> None:
    skipped = SkippedImages()
    skipped.give_up("first")
    skipped.give_up("second")
    assert skipped.fatal == "first"


def test_what_an_earlier_part_of_the_run_told_of_is_not_told_again() -> None:
    skipped = SkippedImages({"picture-4": "broken then"})
    broken = loader(source=PictureSource(NUM_IMAGES, broken=BROKEN), skipped=skipped, batch_size=NUM_IMAGES)
    next(iter(broken.from_step(0, 1)))
    assert sorted(skipped.take_new()) == ["picture-26", "picture-5"]
    assert skipped.known() == {"picture-4": "broken then", "picture-5": "picture-5: broken", "picture-26": "picture-26: broken"}


def test_a_batch_larger_than_the_data() -> None:
    with pytest.raises(SpecError, match=r"optim\.batch_size: each step takes 28 images .*accumulation 7.*only 27 training images; lower"):
        loader(batch_size=28, accumulation=7)


def test_a_batch_that_workers_cannot_share() -> None:
    with pytest.raises(SpecError, match=r"2 worker\(s\) x accumulation 8; make it a multiple of 16"):
        loader(batch_size=8, accumulation=8, world=World(0, 2))


FINETUNE = FinetuneTransformConfig()


def test_rand_augment_comes_after_crop_and_flip_with_numbers_of_its_own() -> None:
    assert FINETUNE.rand_augment is not None
    plain = loader(transform=FINETUNE.model_copy(update={"rand_augment": None}), batch_size=NUM_IMAGES)
    cropped = next(iter(plain.from_step(0, 1))).batch
    augmented = next(iter(loader(transform=FINETUNE, batch_size=NUM_IMAGES).from_step(0, 1))).batch
    numbers = uniform(seed=1, epoch=0, stream=Stream.AUGMENT, samples=cropped.samples_B, count=numbers_per_augment(FINETUNE.rand_augment))
    expected = [
        np.asarray(rand_augment(Image.fromarray(pixels.numpy()), FINETUNE.rand_augment, drawn.numpy()))
        for pixels, drawn in zip(cropped.pixels_BHWC, numbers, strict=True)
    ]
    assert np.array_equal(augmented.pixels_BHWC.numpy(), np.stack(expected))
    assert not torch.equal(augmented.pixels_BHWC, cropped.pixels_BHWC)


def test_rand_augment_of_grey_images() -> None:
    grey = TINY.model_copy(update={"in_chans": 1})
    source = ArraySource([picture(index, mode="L") for index in range(NUM_IMAGES)])
    assert next(iter(loader(source=source, model=grey, transform=FINETUNE).from_step(0, 1))).batch.pixels_BHWC.shape == (BATCH, 8, 8, 1)


@pytest.mark.parametrize(("chans", "dtype", "bits"), [(3, np.uint16, "more than 8"), (4, np.uint8, "8"), (1, np.float32, "more than 8")])
def test_rand_augment_of_other_images_ends_the_run(chans: int, dtype: type, bits: str) -> None:
    skipped = SkippedImages()
    source = ArraySource([np.zeros((9, 9, chans), dtype=dtype)] * NUM_IMAGES)
    model = TINY.model_copy(update={"in_chans": chans})
    next(iter(loader(source=source, model=model, transform=FINETUNE, skipped=skipped).from_step(0, 1)))
    assert skipped.fatal is not None
    assert re.search(rf"array-\d+ has {chans} channel\(s\) of {bits} bits; set data\.transform\.rand_augment to null", skipped.fatal)


def test_batches_of_arrays() -> None:
    pixels = np.arange(9 * 9 * 5, dtype=np.uint16).reshape(9, 9, 5) * 150
    whole = TransformConfig(crop_scale=(1.0, 1.0), flip=False)
    model = TINY.model_copy(update={"image_size": (9, 9), "in_chans": 5})
    batch = next(iter(loader(source=ArraySource([pixels] * NUM_IMAGES), model=model, transform=whole).from_step(0, 1))).batch
    assert batch.pixels_BHWC.dtype == torch.float32
    np.testing.assert_allclose(batch.pixels_BHWC[0].numpy(), pixels / 65535, rtol=1e-6)


def test_images_of_different_kinds_in_a_batch_become_floats() -> None:
    eight = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    source = ArraySource([Image.fromarray(eight), eight.astype(np.uint16) * 257, eight.astype(np.float32)])
    batch = next(measured_batches(source, [0, 1, 2], size=(8, 8), batch_size=3, num_threads=1, skipped=SkippedImages()))
    assert batch.pixels_BHWC.dtype == torch.float32
    assert torch.equal(batch.pixels_BHWC[0], torch.from_numpy(eight) / 255)
    assert torch.equal(batch.pixels_BHWC[1], batch.pixels_BHWC[0])
    assert torch.equal(batch.pixels_BHWC[2], torch.from_numpy(eight).float())


def test_leaving_early_ends_the_threads() -> None:
    batches = loader().from_step(0, 1000)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_measuring_sees_each_readable_image_once_in_order() -> None:
    skipped = SkippedImages()
    source = PictureSource(NUM_IMAGES, broken=(0, 1, 2, 7))
    members = [0, 1, 2, 3, 7, 11, 12]
    none_readable, *batches = measured_batches(source, members, size=(8, 8), batch_size=3, num_threads=2, skipped=skipped)
    assert none_readable is None
    assert [batch.samples_B.tolist() for batch in batches] == [[3, 11], [12]]
    assert [batch.labels_B.tolist() for batch in batches] == [[1, 1], [0]]
    assert batches[0].pixels_BHWC.shape == (2, 8, 8, 3)
    assert skipped.num_new == 4


def test_measuring_reads_one_batch_ahead() -> None:
    source, read = PictureSource(NUM_IMAGES), threading.Semaphore(0)

    class Counting(PictureSource):
        def read(self, index: int) -> Image.Image:
            read.release()
            return source.read(index)

    batches = measured_batches(Counting(NUM_IMAGES), list(range(12)), size=(8, 8), batch_size=3, num_threads=1, skipped=SkippedImages())
    next(batches)
    assert all(read.acquire(timeout=60) for _ in range(6)), "the next batch is decoded while this one is used"
    assert not read.acquire(blocking=False), "and no further one"
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
