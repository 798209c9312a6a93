"""From a decoded image to the pixels the model sees: random resized crops and flips to train, a centre crop to measure.

Shapes: B images, H and W pixels, C channels.

Crops of JPEGs are resized by torch, which takes a third of Pillow's time for the same bicubic and antialiased filter. Other images, PIL or
arrays (H, W, C), go through Pillow's resampling, arrays channel by channel: 8 bits stay 8 bits, 16 bits become float32 in [0, 1], and
floats keep their own units.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mae_core.data.decode import JpegImage, PixelArray, Pixels
from mae_core.data.jpeg import SHRINKS
from mae_core.options import NormalizeConfig, TransformConfig

ModelPixels = NDArray[np.uint8 | np.float32]  # (H, W, C): uint8, or float32 as it goes into `normalise`
Box = tuple[float, float, float, float]  # left, top, right, bottom

_KEPT = 1.5
_TRIES = 10
_RATIO = 4 / 3
NUMBERS_PER_CROP = 4 * _TRIES + 1  # uniform numbers that one training image needs


def random_resized_crop(image: Pixels, size: tuple[int, int], transform: TransformConfig, uniform: NDArray[np.float32]) -> ModelPixels:
    """A crop of random area and shape, resized bicubically to `size` = (height, width), maybe flipped: (H, W, C).

    Crops are torchvision's (`resized`), or those of BYOL (`clamped`); unlike there, the draws are given: `uniform`, in [0, 1),
    (NUMBERS_PER_CROP,).
    """
    box = left, top, right, bottom = crop_box(*_width_and_height(image), transform, uniform)
    flip = transform.flip and bool(uniform[-1] < 0.5)
    # Cropped before it is resized: `resize(box=…)` would mix in pixels from outside of the box.
    if isinstance(image, JpegImage):
        return _planar(_resize_jpeg(image, box, size), flip=flip)
    if isinstance(image, Image.Image):
        return _planar(_resize(image.crop(box), size), flip=flip)
    return _planar(_resize(image[top:bottom, left:right], size), flip=flip)


def crop_box(width: int, height: int, transform: TransformConfig, uniform: NDArray[np.float32]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the crop that `random_resized_crop` takes of an image of this size with the same `uniform`."""
    draws = uniform[:-1].reshape(_TRIES, 4).tolist()
    box_of = _clamped_box if transform.crop == "clamped" else _resized_box
    return box_of(width, height, transform.crop_scale, draws)


def _planar(pixels: ModelPixels, *, flip: bool) -> ModelPixels:
    """The same (H, W, C), maybe flipped, in memory channel by channel: as the model takes it, and flipped at no cost beside that."""
    planes_CHW = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(planes_CHW[:, :, ::-1] if flip else planes_CHW).transpose(1, 2, 0)


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
    if isinstance(image, JpegImage):
        image = image.whole()
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
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def _resize_jpeg(image: JpegImage, box: tuple[int, int, int, int], size: tuple[int, int]) -> ModelPixels:
    """The `box` of the image at `size`, decoded to no more than that needs. Large crops are shrunk by the decoder, then by Pillow."""
    shrink = _shrink(box, size)
    pixels = image.rows(box[3], shrink=shrink)
    if shrink == 1:
        return _resize_by_torch(np.ascontiguousarray(pixels[box[1] :, box[0] : box[2]]), size)
    left, top, right, bottom = (edge / shrink for edge in box)
    x, y = int(left), int(top)  # unlike torch, Pillow takes boxes that begin between two pixels
    return _resize(Image.fromarray(pixels[y:, x : math.ceil(right)]), size, (left - x, top - y, right - x, bottom - y))


def _shrink(box: tuple[int, int, int, int], size: tuple[int, int]) -> int:
    """How far a JPEG is shrunk while it is decoded: so that the crop stays 1.5 times as large as wanted, or not at all."""
    zoom = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    return next((shrink for shrink in SHRINKS if zoom >= _KEPT * shrink), 1)


def _resize_by_torch(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    image_1CHW = torch.from_numpy(pixels)[None].permute(
        0, 3, 1, 2
    )  # in this order torch sees that channels are last, and is a third faster
    resized_1CHW = torch.nn.functional.interpolate(image_1CHW, size, mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def _resize(image: Image.Image | PixelArray, size: tuple[int, int], box: Box | None = None) -> ModelPixels:
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


def _pixels(image: Image.Image | PixelArray) -> ModelPixels:
    """(H, W, C) with 16 bits as floats."""
    if isinstance(image, Image.Image):
        pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels
    return as_floats(image) if image.dtype == np.uint16 else image  # type: ignore[return-value]


@lru_cache(maxsize=8)
def _statistics(normalize: NormalizeConfig, device: torch.device, unit: int) -> tuple[Tensor, Tensor]:
    """What is subtracted from pixels in `unit`, and what they are multiplied by then, (C, 1, 1) both.

    Made once: a copy to the device in every step would wait for it.
    """
    with torch.inference_mode(False):  # the first use may be an evaluation
        mean, std = torch.tensor([normalize.mean, normalize.std], dtype=torch.float64)[:, :, None, None] * unit
        return mean.to(torch.float32).to(device), (1 / std).to(torch.float32).to(device)


def normalise(pixels_BHWC: Tensor, normalize: NormalizeConfig) -> Tensor:
    """Pixels → float32 (B, C, H, W), each channel with the given mean and deviation: uint8 scaled to [0, 1], float32 as it is.

    Where the pixels are: bytes go to the device, and become floats there. The same bits on every device.
    """
    subtracted, factor = _statistics(normalize, pixels_BHWC.device, 255 if pixels_BHWC.dtype == torch.uint8 else 1)
    pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).contiguous()  # nothing to do where the memory is planar
    images_BCHW = pixels_BCHW.to(torch.float32, copy=True)
    return images_BCHW.sub_(subtracted).mul_(factor)
