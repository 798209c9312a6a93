"""From a decoded image to the pixels the model sees: random resized crops and flips to train, a centre crop to measure.

Shapes: B images, H and W pixels, C channels.

Images are PIL images or arrays (H, W, C), and both go through Pillow's resampling, arrays channel by channel: 8 bits stay 8 bits, 16 bits
become float32 in [0, 1], and floats keep their own units.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mae_core.data.decode import PixelArray, Pixels
from mae_core.options import NormalizeConfig, TransformConfig

ModelPixels = NDArray[np.uint8 | np.float32]  # (H, W, C): uint8, or float32 as it goes into `normalise`
Box = tuple[float, float, float, float]  # left, top, right, bottom

_TRIES = 10
_RATIO = 4 / 3
NUMBERS_PER_CROP = 4 * _TRIES + 1  # uniform numbers that one training image needs


def random_resized_crop(image: Pixels, size: tuple[int, int], transform: TransformConfig, uniform: NDArray[np.float32]) -> ModelPixels:
    """A crop of random area and shape, resized bicubically to `size` = (height, width), maybe flipped: (H, W, C).

    Crops are torchvision's (`resized`), or those of BYOL (`clamped`); unlike there, the draws are given: `uniform`, in [0, 1),
    (NUMBERS_PER_CROP,).
    """
    draws = uniform[:-1].reshape(_TRIES, 4).tolist()
    box_of = _clamped_box if transform.crop == "clamped" else _resized_box
    left, top, right, bottom = box_of(*_width_and_height(image), transform.crop_scale, draws)
    # Cropped before it is resized: `resize(box=…)` would mix in pixels from outside of the box.
    if isinstance(image, Image.Image):
        image = image.crop((left, top, right, bottom))
    else:
        image = image[top:bottom, left:right]
    pixels = _resize(image, size)
    return pixels[:, ::-1] if transform.flip and uniform[-1] < 0.5 else pixels


def _resized_box(width: int, height: int, scale: tuple[float, float], draws: Sequence[Sequence[float]]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), as torchvision: where no draw fits, the middle of the image in the nearest shape allowed."""
    for area_u, ratio_u, top_u, left_u in draws:
        w, h = _drawn_sides(width * height, scale, area_u, ratio_u)
        if 0 < w <= width and 0 < h <= height:
            return _placed(width, height, w, h, left_u, top_u)
    w, h = min(width, round(height * _RATIO)), min(height, round(width * _RATIO))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _clamped_box(width: int, height: int, scale: tuple[float, float], draws: Sequence[Sequence[float]]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of one draw whose sides are cut to those of the image, as BYOL and the paper's linear probe."""
    area_u, ratio_u, top_u, left_u = draws[0]
    w, h = _drawn_sides(width * height, scale, area_u, ratio_u)
    return _placed(width, height, max(1, min(w, width)), max(1, min(h, height)), left_u, top_u)


def _drawn_sides(area: int, scale: tuple[float, float], area_u: float, ratio_u: float) -> tuple[int, int]:
    """Width and height of a part of `area`."""
    low, high = scale
    part = area * (low + (high - low) * area_u)
    ratio = math.exp((2 * ratio_u - 1) * math.log(_RATIO))
    return round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))


def _placed(width: int, height: int, w: int, h: int, left_u: float, top_u: float) -> tuple[int, int, int, int]:
    left, top = int(left_u * (width - w + 1)), int(top_u * (height - h + 1))
    return left, top, left + w, top + h


def centre_crop(image: Pixels, size: tuple[int, int]) -> ModelPixels:
    """The middle of the image at `size` = (height, width): (H, W, C).

    An image of another size is first resized to cover 8/7 of it (authors: resize 256, crop 224; whole above 224).
    """
    height, width = size
    image_width, image_height = _width_and_height(image)
    if (image_width, image_height) == (width, height):
        return _pixels(image)
    zoom = (8 / 7 if max(size) <= 224 else 1.0) * max(width / image_width, height / image_height)
    middle_x, middle_y = image_width / 2, image_height / 2
    half_w, half_h = width / zoom / 2, height / zoom / 2
    left, top = max(0.0, middle_x - half_w), max(0.0, middle_y - half_h)  # rounding may take a whole side out of the image
    right, bottom = min(float(image_width), middle_x + half_w), min(float(image_height), middle_y + half_h)
    return _resize(image, size, (left, top, right, bottom))


def as_floats(pixels: PixelArray) -> NDArray[np.float32]:
    """Integers scaled to [0, 1]; floats as they are."""
    if pixels.dtype == np.float32:
        return pixels  # type: ignore[return-value]
    return np.divide(pixels, 255 if pixels.dtype == np.uint8 else 65535, dtype=np.float32)


def _width_and_height(image: Pixels) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _resize(image: Pixels, size: tuple[int, int], box: Box | None = None) -> ModelPixels:
    """The `box` of the image, or all of it, resized bicubically to `size` = (height, width): (H, W, C)."""
    height, width = size
    if isinstance(image, Image.Image):
        return _pixels(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
    pixels = _pixels(image)
    planes = [
        np.asarray(Image.fromarray(pixels[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC, box=box))
        for channel in range(pixels.shape[2])
    ]
    resized: ModelPixels = np.stack(planes, axis=2)
    return resized.clip(0, 1) if image.dtype == np.uint16 else resized  # bicubic weights overshoot; Pillow clips 8 bits itself


def _pixels(image: Pixels) -> ModelPixels:
    """(H, W, C) with 16 bits as floats."""
    if isinstance(image, Image.Image):
        pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels
    return as_floats(image) if image.dtype == np.uint16 else image  # type: ignore[return-value]


@lru_cache(maxsize=8)
def _statistics(normalize: NormalizeConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once: a copy to the device in every step would wait for it."""
    with torch.inference_mode(False):  # the first use may be an evaluation
        return torch.tensor(normalize.mean, device=device), torch.tensor(normalize.std, device=device)


def normalise(pixels_BHWC: Tensor, normalize: NormalizeConfig) -> Tensor:
    """Pixels → float32 (B, C, H, W), each channel with the given mean and deviation: uint8 scaled to [0, 1], float32 as it is."""
    mean, std = _statistics(normalize, pixels_BHWC.device)
    scaled_BHWC = pixels_BHWC.to(torch.float32) / 255 if pixels_BHWC.dtype == torch.uint8 else pixels_BHWC
    return ((scaled_BHWC - mean) / std).permute(0, 3, 1, 2).contiguous()
