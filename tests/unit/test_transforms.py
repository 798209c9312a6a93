from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from mae_core.data.transforms import _TRIES, NUMBERS_PER_CROP, _clamped_box, _resized_box, centre_crop, normalise, random_resized_crop
from mae_core.options import NormalizeConfig, TransformConfig
from tests.torchvision_ops import import_torchvision
from tests.unit.core_fixtures import picture

BICUBIC = Image.Resampling.BICUBIC
UNFLIPPED = TransformConfig(crop_scale=(0.2, 1.0), flip=False)


def draws(num_crops: int) -> Iterator[np.ndarray]:
    yield from np.random.default_rng(0).random((num_crops, NUMBERS_PER_CROP), dtype=np.float32)


def resized_box(width: int, height: int, scale: tuple[float, float], uniform: np.ndarray) -> tuple[int, int, int, int]:
    return _resized_box(width, height, scale, uniform[:-1].reshape(_TRIES, 4).tolist())


def clamped_box(width: int, height: int, scale: tuple[float, float], uniform: np.ndarray) -> tuple[int, int, int, int]:
    return _clamped_box(width, height, scale, uniform[:-1].reshape(_TRIES, 4).tolist())


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_training_crop_is_pils_crop_and_resize(mode: str) -> None:
    image = picture(0, width=50, height=34, mode=mode)
    for uniform in draws(20):
        box = resized_box(50, 34, (0.2, 1.0), uniform)
        expected = np.asarray(image.crop(box).resize((12, 8), BICUBIC))
        pixels = random_resized_crop(image, (8, 12), UNFLIPPED, uniform)
        assert pixels.shape == (8, 12, {"L": 1, "RGB": 3}[mode])
        assert np.array_equal(pixels, expected.reshape(pixels.shape))


def test_nothing_outside_of_the_crop_is_seen() -> None:
    image = picture(0, width=40, height=40)
    for uniform in draws(20):
        box = resized_box(40, 40, (0.2, 0.5), uniform)
        surroundings = Image.new("RGB", (40, 40), "white")
        surroundings.paste(image.crop(box), box[:2])
        transform = TransformConfig(crop_scale=(0.2, 0.5))
        assert np.array_equal(
            random_resized_crop(image, (8, 8), transform, uniform), random_resized_crop(surroundings, (8, 8), transform, uniform)
        )


def test_crops_lie_inside_with_area_and_shape_in_range() -> None:
    boxes = np.array([resized_box(120, 90, (0.3, 0.6), uniform) for uniform in draws(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() == 0
    assert top.min() == 0
    assert right.max() == 120
    assert bottom.max() == 90
    width, height = right - left, bottom - top
    area = width * height / (120 * 90)
    assert 0.29 < area.min() < 0.31  # a pixel of rounding
    assert 0.59 < area.max() < 0.61
    assert 0.43 < area.mean() < 0.47
    assert (width / height).min() > 0.73
    assert (width / height).max() < 1.36
    assert abs(np.log(width / height).mean()) < 0.02


class GivenDraws:
    """torch as torchvision's crops use it, with numbers that are given, four to a try: area, ratio, top, left."""

    log = staticmethod(torch.log)
    tensor = staticmethod(torch.tensor)
    exp = staticmethod(torch.exp)

    def __init__(self, uniform: np.ndarray) -> None:
        self._draws = iter(uniform[:-1].reshape(_TRIES, 4).tolist())
        self._left: list[float] = []

    def empty(self, count: int) -> Any:
        if len(self._left) in (0, 2):  # a try that did not fit leaves its place undrawn
            self._left = next(self._draws)
        number, self._left = self._left[0], self._left[1:]
        return SimpleNamespace(uniform_=lambda low, high: torch.tensor(float(low) + float(high - low) * number, dtype=torch.float64))

    def randint(self, low: int, high: int, size: tuple[int]) -> Any:
        number, self._left = self._left[0], self._left[1:]
        return torch.tensor(int(number * high))


@pytest.mark.parametrize(("width", "height"), [(50, 34), (34, 50), (300, 20), (20, 300), (64, 64), (1000, 4), (3, 4)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (1.0, 1.0)])
def test_boxes_are_torchvisions(width: int, height: int, scale: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no draw fits too: then it is the middle of the image, in the nearest shape allowed."""
    import_torchvision()
    from torchvision.transforms import transforms as torchvisions

    for uniform in draws(100):
        monkeypatch.setattr(torchvisions, "torch", GivenDraws(uniform))
        top, left, h, w = torchvisions.RandomResizedCrop.get_params(torch.empty(3, height, width), list(scale), [3 / 4, 4 / 3])
        assert resized_box(width, height, scale, uniform) == (left, top, left + w, top + h)


def test_where_no_draw_fits_the_middle_is_taken_in_an_allowed_shape() -> None:
    assert resized_box(1000, 4, (0.2, 1.0), next(draws(1))) == (497, 0, 502, 4)
    assert resized_box(4, 1000, (0.2, 1.0), next(draws(1))) == (0, 497, 4, 502)


def boxes_of_the_authors_probe(width: int, height: int, scale: tuple[float, float], num_boxes: int) -> np.ndarray:
    """(num_boxes, 4). get_params of util/crop.py in facebookresearch/mae, line by line on whole arrays."""
    rng = np.random.default_rng(1)
    target_area = width * height * rng.uniform(*scale, num_boxes)
    aspect_ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), num_boxes))
    w = np.minimum(np.rint(np.sqrt(target_area * aspect_ratio)), width).astype(int)
    h = np.minimum(np.rint(np.sqrt(target_area / aspect_ratio)), height).astype(int)
    i, j = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    return np.stack([j, i, j + w, i + h], axis=1)


@pytest.mark.parametrize(("width", "height"), [(120, 90), (40, 160)])
def test_clamped_boxes_are_spread_as_the_authors(width: int, height: int) -> None:
    boxes = np.array([clamped_box(width, height, (0.08, 1.0), uniform) for uniform in draws(4000)])
    expected = boxes_of_the_authors_probe(width, height, (0.08, 1.0), 4000)
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= (width, height)).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    for shares in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.abs(np.quantile(boxes, shares, axis=0) - np.quantile(expected, shares, axis=0)).max() <= 0.04 * max(width, height)
    whole_width = [np.mean(found[:, 2] - found[:, 0] == width) for found in (boxes, expected)]
    assert abs(whole_width[0] - whole_width[1]) < 0.03


def test_a_clamped_box_is_never_empty() -> None:
    for uniform in draws(20):
        left, top, right, bottom = clamped_box(1000, 1, (1e-4, 1e-4), uniform)
        assert (right - left, top, bottom) == (1, 0, 1)


def test_the_transform_says_which_crop() -> None:
    image = picture(0, width=80, height=20)
    transform = TransformConfig(crop_scale=(0.9, 1.0), crop="clamped", flip=False)
    for uniform in draws(5):
        expected = image.crop(clamped_box(80, 20, (0.9, 1.0), uniform)).resize((8, 8), BICUBIC)
        assert np.array_equal(random_resized_crop(image, (8, 8), transform, uniform), np.asarray(expected))
        resized = random_resized_crop(image, (8, 8), transform.model_copy(update={"crop": "resized"}), uniform)
        assert not np.array_equal(resized, np.asarray(expected))


def test_an_array_of_8_bits_is_resized_as_the_image_it_is() -> None:
    image = picture(0, width=50, height=34)
    for uniform in draws(20):
        expected = random_resized_crop(image, (8, 12), TransformConfig(), uniform)
        assert np.array_equal(random_resized_crop(np.asarray(image), (8, 12), TransformConfig(), uniform), expected)
    assert np.array_equal(centre_crop(np.asarray(image), (8, 12)), centre_crop(image, (8, 12)))
    assert np.array_equal(centre_crop(np.asarray(image), (34, 50)), np.asarray(image))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_arrays_of_more_bits_agree_with_8_bits(dtype: type) -> None:
    """Within what Pillow's rounding after each direction makes of 8 bits, where no weight overshoots."""
    image = picture(0, width=50, height=34).resize((200, 136), BICUBIC)  # smooth
    array = np.asarray(image).astype(dtype) * dtype(257 if dtype is np.uint16 else 1)
    unit = 255 if dtype is np.uint16 else 1
    for uniform in draws(20):
        expected = random_resized_crop(image, (8, 12), TransformConfig(), uniform)
        pixels = random_resized_crop(array, (8, 12), TransformConfig(), uniform)
        assert pixels.dtype == np.float32
        assert np.abs(pixels * unit - expected).max() < 1.2
    assert np.abs(centre_crop(array, (8, 12)) * unit - centre_crop(image, (8, 12))).max() < 1.2


def test_crops_of_an_array_are_torchs_antialiased_bicubic() -> None:
    array = np.random.default_rng(0).normal(1000, 400, (30, 40, 5)).astype(np.float32)
    whole = TransformConfig(crop_scale=(1.0, 1.0), flip=False)
    uniform = np.full(NUMBERS_PER_CROP, 0.5, dtype=np.float32)
    left, top, right, bottom = resized_box(40, 30, (1.0, 1.0), uniform)
    cut_1CHW = torch.from_numpy(array[top:bottom, left:right].copy()).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(cut_1CHW, (8, 12), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(random_resized_crop(array, (8, 12), whole, uniform), expected.numpy(), rtol=1e-4)


def test_16_bits_become_numbers_from_0_to_1() -> None:
    steps = np.zeros((20, 20, 2), dtype=np.uint16)
    steps[:, 10:] = 65535
    for pixels in (
        centre_crop(steps, (20, 20)),
        centre_crop(steps, (40, 40)),
        random_resized_crop(steps, (40, 40), UNFLIPPED, next(draws(1))),
    ):
        assert pixels.dtype == np.float32
        assert pixels.min() == 0
        assert pixels.max() == 1


def test_colours_behind_a_transparent_alpha_are_kept() -> None:
    """Pillow resizes RGBA with its colours multiplied by alpha."""
    array = np.asarray(picture(0, width=16, height=16, mode="RGBA")).copy()
    array[:, :, 3] = 0
    pixels = centre_crop(array, (7, 7))
    assert np.array_equal(pixels[:, :, :3], centre_crop(np.ascontiguousarray(array[:, :, :3]), (7, 7)))
    assert pixels[:, :, :3].any()


def test_half_of_the_crops_are_flipped() -> None:
    image = picture(0, width=8, height=8)
    whole = TransformConfig(crop_scale=(1.0, 1.0))
    flips = 0
    for uniform in draws(2000):
        plain = random_resized_crop(image, (8, 8), whole.model_copy(update={"flip": False}), uniform)
        pixels = random_resized_crop(image, (8, 8), whole, uniform)
        flipped = np.array_equal(pixels, plain[:, ::-1])
        assert flipped or np.array_equal(pixels, plain)
        flips += flipped
    assert 900 < flips < 1100  # over four deviations


def test_the_numbers_alone_decide_a_crop() -> None:
    image, (first, second) = picture(0, width=30, height=20), list(draws(2))
    once, again, other = (random_resized_crop(image, (8, 8), UNFLIPPED, uniform) for uniform in (first, first, second))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


def test_measuring_leaves_an_image_of_the_right_size_as_it_is() -> None:
    image = picture(0, width=12, height=8)
    assert np.array_equal(centre_crop(image, (8, 12)), np.asarray(image))


def test_measuring_takes_seven_eighths_of_the_shorter_side() -> None:
    """64 x 128 at 56: the authors resize to 64 x 128 and crop the middle 56 x 56, here without a change of scale."""
    image = picture(0, width=128, height=64)
    assert np.array_equal(centre_crop(image, (56, 56)), np.asarray(image.crop((36, 4, 92, 60))))


def test_measuring_takes_the_whole_shorter_side_above_224() -> None:
    image = picture(0, width=300, height=240, mode="L")
    assert np.array_equal(centre_crop(image, (240, 240))[:, :, 0], np.asarray(image.crop((30, 0, 270, 240))))


def test_measuring_a_non_square_size() -> None:
    image = Image.new("L", (100, 100), 0)
    image.paste(255, (50, 0, 100, 100))
    pixels = centre_crop(image, (8, 32))
    assert pixels.shape == (8, 32, 1)
    assert (pixels[:, :14] == 0).all()
    assert (pixels[:, 18:] == 255).all()


def test_normalising() -> None:
    pixels = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).reshape(1, 1, 2, 2)
    images = normalise(pixels, NormalizeConfig(mean=(0.5, 0.2), std=(0.5, 0.1)))
    assert images.shape == (1, 2, 1, 2)
    torch.testing.assert_close(images, torch.tensor([[[[-1.0, -0.6]], [[8.0, 2.0]]]]))
    floats = normalise(torch.tensor([0.0, 1.0, 0.2, 0.4]).reshape(1, 1, 2, 2), NormalizeConfig(mean=(0.5, 0.2), std=(0.5, 0.1)))
    torch.testing.assert_close(floats, images)


@given(width=st.integers(1, 500), height=st.integers(1, 500), size=st.tuples(st.integers(1, 24), st.integers(1, 24)))
@example(width=98, height=256, size=(16, 16))
def test_measuring_takes_images_of_any_shape(width: int, height: int, size: tuple[int, int]) -> None:
    """Rounding must not take the box out of the image, which Pillow refuses: above 224 pixels a whole side is taken."""
    size = (16 * size[0], 16 * size[1])
    assert centre_crop(np.zeros((height, width, 1), np.uint8), size).shape == (*size, 1)
