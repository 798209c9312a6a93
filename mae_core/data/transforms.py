"""From a decoded image to the pixels the model sees: random resized crops and flips to train, a centre crop to measure.

Shapes: B images, H and W pixels, C channels.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mae_core.options import NormalizeConfig, TransformConfig

_TRIES = 10
_LOG_RATIO = math.log(4 / 3)
NUMBERS_PER_CROP = 4 * _TRIES + 1  # uniform numbers that one training image needs


def random_resized_crop(
    image: Image.Image, size: tuple[int, int], transform: TransformConfig, uniform: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """A crop of random area and shape, resized bicubically to `size` = (height, width), maybe flipped: (H, W, C).

    As in torchvision, ten draws are tried before the whole image is taken; unlike there, the draws are given: `uniform`, in [0, 1),
    (NUMBERS_PER_CROP,).
    """
    box = _crop_box(image.width, image.height, transform.crop_scale, uniform)
    height, width = size
    # Cropped before it is resized: `resize(box=…)` would mix in pixels from outside of the box.
    pixels = _pixels(image.crop(box).resize((width, height), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if transform.flip and uniform[-1] < 0.5 else pixels


def _crop_box(width: int, height: int, scale: tuple[float, float], uniform: NDArray[np.float32]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom)."""
    low, high = scale
    for area_u, ratio_u, top_u, left_u in uniform[:-1].reshape(_TRIES, 4).tolist():
        area = width * height * (low + (high - low) * area_u)
        ratio = math.exp((2 * ratio_u - 1) * _LOG_RATIO)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left_u * (width - w + 1)), int(top_u * (height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


def centre_crop(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of the image at `size` = (height, width): (H, W, C).

    An image of another size is first resized to cover 8/7 of it (authors: resize 256, crop 224; whole above 224).
    """
    height, width = size
    if (image.width, image.height) != (width, height):
        zoom = (8 / 7 if max(size) <= 224 else 1.0) * max(width / image.width, height / image.height)
        middle_x, middle_y = image.width / 2, image.height / 2
        half_w, half_h = width / zoom / 2, height / zoom / 2
        box = (middle_x - half_w, middle_y - half_h, middle_x + half_w, middle_y + half_h)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return _pixels(image)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


@lru_cache(maxsize=8)
def _statistics(normalize: NormalizeConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once: a copy to the device in every step would wait for it."""
    with torch.inference_mode(False):  # the first use may be an evaluation
        return torch.tensor(normalize.mean, device=device), torch.tensor(normalize.std, device=device)


def normalise(pixels_BHWC: Tensor, normalize: NormalizeConfig) -> Tensor:
    """uint8 pixels → float32 (B, C, H, W), each channel with the given mean and deviation."""
    mean, std = _statistics(normalize, pixels_BHWC.device)
    return ((pixels_BHWC.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
