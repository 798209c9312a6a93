"""RandAugment (Cubuk et al. 2019) as the authors of MAE use it through timm: rand-m9-mstd0.5-inc1, all of its operations stronger with
the magnitude. Written with Pillow, because every library's draws from a global generator; here the numbers are given.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from mae_core.options import RandAugmentConfig

_NUMBERS_PER_OP = 4  # which operation, whether it is applied, how strongly, to which side
_APPLY_PROBABILITY = 0.5
_MAX_MAGNITUDE = 10.0
_FILL_RGB = (124, 116, 104)  # ImageNet's mean, as in the authors' code
_FILL_L = 117  # its luma
_HALF_STEP = 2.0**-25  # numbers are multiples of 2**-24; in the middle of their bins, none is 0, where a normal number has no end
_NORMAL = NormalDist()

# (image, strength in [0, 1], side: -1.0 or 1.0) → image
_Operation = Callable[[Image.Image, float, float], Image.Image]


def numbers_per_augment(config: RandAugmentConfig) -> int:
    """Uniform numbers that one image needs."""
    return _NUMBERS_PER_OP * config.num_ops


def rand_augment(image: Image.Image, config: RandAugmentConfig, uniform: NDArray[np.float32]) -> Image.Image:
    """`image` after up to `num_ops` operations drawn with replacement, each applied with probability 0.5.

    Args:
        image: 8 bits, L or RGB.
        uniform: numbers in [0, 1), (numbers_per_augment(config),).
    """
    for which, whether, magnitude, side in uniform.reshape(config.num_ops, _NUMBERS_PER_OP).tolist():
        if whether < _APPLY_PROBABILITY:
            operation = _OPERATIONS[int(which * len(_OPERATIONS))]
            image = operation(image, _strength(config, magnitude), 1.0 if side < 0.5 else -1.0)
    return image


def _strength(config: RandAugmentConfig, uniform: float) -> float:
    """A normal magnitude, cut to [0, 10], as a share of 10."""
    magnitude = config.magnitude + config.magnitude_std * _NORMAL.inv_cdf(uniform + _HALF_STEP)
    return max(0.0, min(magnitude, _MAX_MAGNITUDE)) / _MAX_MAGNITUDE


def _fill(image: Image.Image) -> int | tuple[int, int, int]:
    return _FILL_RGB if image.mode == "RGB" else _FILL_L


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=_fill(image))


def _auto_contrast(image: Image.Image, strength: float, side: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, strength: float, side: float) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, strength: float, side: float) -> Image.Image:
    return ImageOps.invert(image)


def _rotate(image: Image.Image, strength: float, side: float) -> Image.Image:
    return image.rotate(side * strength * 30, Image.Resampling.BICUBIC, fillcolor=_fill(image))


def _posterize(image: Image.Image, strength: float, side: float) -> Image.Image:
    kept = 256 - (1 << (4 + int(strength * 4)))  # of the bits; none at full strength: black, where today's ImageOps.posterize fails
    return image.point([value & kept for value in range(256)] * len(image.getbands()))


def _solarize(image: Image.Image, strength: float, side: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(strength * 256))


def _solarize_add(image: Image.Image, strength: float, side: float) -> Image.Image:
    added = int(strength * 110)
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * len(image.getbands()))


def _enhancement(strength: float, side: float) -> float:
    """A factor of Pillow's enhancers: 1 changes nothing."""
    return max(0.1, 1.0 + side * (strength * 0.9))


def _color(image: Image.Image, strength: float, side: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_enhancement(strength, side))


def _contrast(image: Image.Image, strength: float, side: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_enhancement(strength, side))


def _brightness(image: Image.Image, strength: float, side: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_enhancement(strength, side))


def _sharpness(image: Image.Image, strength: float, side: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_enhancement(strength, side))


def _shear_x(image: Image.Image, strength: float, side: float) -> Image.Image:
    return _affine(image, 1, side * strength * 0.3, 0, 0, 1, 0)


def _shear_y(image: Image.Image, strength: float, side: float) -> Image.Image:
    return _affine(image, 1, 0, 0, side * strength * 0.3, 1, 0)


def _translate_x(image: Image.Image, strength: float, side: float) -> Image.Image:
    return _affine(image, 1, 0, side * strength * 0.45 * image.width, 0, 1, 0)


def _translate_y(image: Image.Image, strength: float, side: float) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, side * strength * 0.45 * image.height)


_OPERATIONS: tuple[_Operation, ...] = (
    _auto_contrast,
    _equalize,
    _invert,
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _color,
    _contrast,
    _brightness,
    _sharpness,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
