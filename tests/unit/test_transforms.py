from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.data.transforms import NUMBERS_PER_CROP, _crop_box, centre_crop, normalise, random_resized_crop
from mae_core.options import NormalizeConfig, TransformConfig
from tests.unit.core_fixtures import picture

BICUBIC = Image.Resampling.BICUBIC
UNFLIPPED = TransformConfig(crop_scale=(0.2, 1.0), flip=False)


def draws(num_crops: int) -> Iterator[np.ndarray]:
    yield from np.random.default_rng(0).random((num_crops, NUMBERS_PER_CROP), dtype=np.float32)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_training_crop_is_pils_crop_and_resize(mode: str) -> None:
    image = picture(0, width=50, height=34, mode=mode)
    for uniform in draws(20):
        box = _crop_box(50, 34, (0.2, 1.0), uniform)
        expected = np.asarray(image.crop(box).resize((12, 8), BICUBIC))
        pixels = random_resized_crop(image, (8, 12), UNFLIPPED, uniform)
        assert pixels.shape == (8, 12, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
        assert np.array_equal(pixels, expected.reshape(pixels.shape))


def test_nothing_outside_of_the_crop_is_seen() -> None:
    image = picture(0, width=40, height=40)
    for uniform in draws(20):
        box = _crop_box(40, 40, (0.2, 0.5), uniform)
        surroundings = Image.new("RGB", (40, 40), "white")
        surroundings.paste(image.crop(box), box[:2])
        transform = TransformConfig(crop_scale=(0.2, 0.5))
        assert np.array_equal(
            random_resized_crop(image, (8, 8), transform, uniform), random_resized_crop(surroundings, (8, 8), transform, uniform)
        )


def test_crops_lie_inside_with_area_and_shape_in_range() -> None:
    boxes = np.array([_crop_box(120, 90, (0.3, 0.6), uniform) for uniform in draws(2000)])
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


def test_where_no_draw_fits_the_whole_image_is_taken() -> None:
    assert _crop_box(1000, 4, (0.2, 1.0), next(draws(1))) == (0, 0, 1000, 4)


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
