import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mae_core.data import statistics
from mae_core.data.decode import Pixels, UnreadableImage
from mae_core.data.loader import measured_batches
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import DigitsSource
from mae_core.data.statistics import channel_statistics
from mae_core.data.transforms import normalise
from mae_core.errors import DataError
from mae_core.options import NormalizeConfig
from mae_core.world import World
from tests.unit.core_fixtures import PictureSource, picture
from tests.unit.threaded_world import by_workers


class ArraySource:
    """Given images; None cannot be read. Keeps which ones were asked for."""

    def __init__(self, images: Sequence[Pixels | None]) -> None:
        self.keys = [f"array-{index}" for index in range(len(images))]
        self.classes: list[str] = []
        self.labels: list[int] = []
        self.asked: list[int] = []
        self._images = images

    def read(self, index: int) -> Pixels:
        self.asked.append(index)
        image = self._images[index]
        if image is None:
            raise UnreadableImage(f"{self.keys[index]}: broken")
        return image


def measured(source: Any, **changes: Any) -> NormalizeConfig:
    given = {"members": list(range(len(source.keys))), "in_chans": 3, "world": World(), "num_threads": 2, "skipped": SkippedImages()}
    return channel_statistics(source, **(given | changes))


def test_mean_and_deviation_of_all_pixels_from_0_to_1() -> None:
    found = measured(PictureSource(12))
    pixels = np.stack([np.asarray(picture(index)) for index in range(12)]).reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "scale", "shift"), [(np.uint8, 40, 90), (np.uint16, 9000, 30000), (np.float32, 3, 1e4), (np.float32, 0.01, 0)]
)
def test_normalised_by_them_images_have_mean_0_and_deviation_1(dtype: type, scale: float, shift: float) -> None:
    """In the units of `normalise`, whatever the type; a large mean costs no accuracy."""
    rng = np.random.default_rng(0)
    source = ArraySource([(rng.normal(0, scale, (8, 8, 5)) + shift).astype(dtype) for _ in range(20)])
    found = measured(source, in_chans=5)
    batch = next(measured_batches(source, list(range(20)), size=(8, 8), batch_size=20, num_threads=1, skipped=SkippedImages()))
    images_BCHW = normalise(batch.pixels_BHWC, found).double()
    np.testing.assert_allclose(images_BCHW.mean(dim=(0, 2, 3)).numpy(), 0, atol=1e-3)
    np.testing.assert_allclose(images_BCHW.std(dim=(0, 2, 3), correction=0).numpy(), 1, rtol=1e-3)


def test_images_count_alike_whatever_their_size() -> None:
    source = ArraySource([np.full((2, 2, 1), 0.0, np.float32), np.full((30, 20, 1), 10.0, np.float32)])
    assert measured(source, in_chans=1) == NormalizeConfig(mean=(5.0,), std=(5.0,))


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_measures_the_same_bits(workers: int) -> None:
    source = PictureSource(11, broken=(3, 7))
    alone = SkippedImages()
    expected = measured(source, skipped=alone, num_threads=1)
    shared = [SkippedImages() for _ in range(workers)]
    assert by_workers(workers, lambda world: measured(source, world=world, skipped=shared[world.rank])) == [expected] * workers
    assert sorted(alone.take_new()) == ["picture-3", "picture-7"]
    assert sorted(key for skipped in shared for key in skipped.take_new()) == ["picture-3", "picture-7"]


def test_unreadable_images_are_left_out() -> None:
    images: list[Any] = [np.asarray(picture(index)) for index in range(3)]
    assert measured(ArraySource([images[0], None, *images[1:], None])) == measured(ArraySource(images))


def test_members_alone_are_measured_evenly_spread_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_MAX_IMAGES", 4)
    source = ArraySource([np.asarray(picture(index)) for index in range(30)])
    measured(source, members=list(range(10, 22)))
    assert sorted(source.asked) == [10, 13, 16, 19]


def test_the_digits() -> None:
    found = measured(DigitsSource(), in_chans=1, members=list(range(100)))
    assert 0.2 < found.mean[0] < 0.4
    assert 0.3 < found.std[0] < 0.45


@pytest.mark.parametrize("value", [0.0, 0.1, 255.0])
def test_a_constant_channel_is_named_with_what_to_write(value: float) -> None:
    images = [np.random.default_rng(index).normal(3, 1, (8, 8, 3)).astype(np.float32) for index in range(4)]
    for image in images:
        image[:, :, 1] = value
    with pytest.raises(DataError, match=r"channel\(s\) 1, counted from 0, are constant in all of 4 images") as caught:
        measured(ArraySource(images))
    written = re.search(rf"\{{mean: \[\S+, {value:g}, \S+\], std: \[\S+, 1, \S+\]\}}$", str(caught.value))
    assert written is not None


def test_no_image_to_measure() -> None:
    def both(world: World) -> str:
        with pytest.raises(DataError, match="none of 3 training images can be read") as caught:
            measured(ArraySource([None] * 3), world=world)
        return str(caught.value)

    assert len(set(by_workers(2, both))) == 1
