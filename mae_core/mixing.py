"""What fine-tuning mixes into a batch on the device: mixup, cutmix and random erasing (paper, Table 9), after timm's pair and pixel modes.

What happens to which image is drawn on the CPU from the hash, so that nothing waits for the device, and is a function of (seed, epoch,
sample) alone. Pairs are neighbours in the batch: whole in every worker's part, as that is even.

Shapes: B images, P = B / 2 pairs, C channels, H and W pixels, K classes, E erased images, T tries.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_core.options import MixConfig
from mae_core.randomness import Stream, uniform

_NUMBERS_PER_PAIR = 4  # cutmix or mixup, lambda, the box's middle down and across
_CUTMIX_PROBABILITY = 0.5  # where both are on
_ERASED_AREA = (0.02, 1 / 3)
_LOG_ERASED_ASPECT = math.log(0.3)  # to its inverse
_ERASE_TRIES = 10
_NUMBERS_PER_ERASE = 1 + 4 * _ERASE_TRIES  # whether; area, aspect, top and left of each try
_STEP = 2.0**-24  # of uniform numbers

Size = tuple[int, int]
_Floats = NDArray[np.float64]


class MixPlan(NamedTuple):
    """How each pair is mixed; on the CPU.

    weight_P: share of an image outside of its box: lambda for mixup, 1 for cutmix. box_P4: top, bottom, left, right of what is taken from
    the other image, int64; empty for mixup. label_weight_P: share of an image's own label: lambda, for cutmix that of the true area.
    """

    weight_P: Tensor
    box_P4: Tensor
    label_weight_P: Tensor


def mix_plan(samples_B: Tensor, *, seed: int, epoch: int, mix: MixConfig, size: Size) -> MixPlan:
    """How to mix a batch of the images `samples_B` (int64, on the CPU, an even number) of `size` = (height, width).

    The first image of a pair decides. `mix` must be on.
    """
    from scipy.special import betaincinv  # a tenth of a second: only where images are mixed

    assert mix.is_on
    drawn = uniform(seed=seed, epoch=epoch, stream=Stream.MIX, samples=samples_B[::2], count=_NUMBERS_PER_PAIR).double().numpy()
    which, lambda_u, middle_y, middle_x = drawn.T
    is_cutmix = which < (_CUTMIX_PROBABILITY if mix.mixup > 0 else 1.0) if mix.cutmix > 0 else np.zeros(len(which), dtype=bool)
    alpha = np.where(is_cutmix, mix.cutmix, mix.mixup)
    lambda_P = betaincinv(alpha, alpha, lambda_u)
    box_P4 = _boxes(lambda_P, middle_y, middle_x, size) * is_cutmix[:, None]
    top, bottom, left, right = box_P4.T
    true_lambda = 1 - (bottom - top) * (right - left) / (size[0] * size[1])
    return MixPlan(
        torch.from_numpy(np.where(is_cutmix, 1.0, lambda_P)).float(),
        torch.from_numpy(box_P4),
        torch.from_numpy(np.where(is_cutmix, true_lambda, lambda_P)).float(),
    )


def _boxes(lambda_P: _Floats, middle_y: _Floats, middle_x: _Floats, size: Size) -> NDArray[np.int64]:
    """Boxes of the image's shape and 1 - lambda of its area round uniform middles, cut where they leave it: (P, 4)."""
    ratio = np.sqrt(1 - lambda_P)
    sides = []
    for length, middle_u in zip(size, (middle_y, middle_x), strict=True):
        cut = (length * ratio).astype(np.int64)
        middle = (middle_u * length).astype(np.int64)
        sides += [np.clip(middle - cut // 2, 0, length), np.clip(middle + (cut + 1) // 2, 0, length)]
    return np.stack(sides, axis=1)


def mix_batch(images_BCHW: Tensor, labels_B: Tensor, plan: MixPlan, *, num_classes: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Images mixed in pairs, and their soft labels (B, K), smoothed by `smoothing`; all on the device of the images."""
    device, (height, width) = images_BCHW.device, images_BCHW.shape[-2:]
    weight_P, box_P4, label_weight_P = (_moved(part, device) for part in plan)
    weight_PHW = torch.where(_inside(box_P4, (height, width)), 0.0, weight_P[:, None, None])
    off = smoothing / num_classes
    labels_BK = torch.full((len(labels_B), num_classes), off, device=device).scatter_(1, labels_B[:, None], 1 - smoothing + off)
    return _blended(images_BCHW, weight_PHW[:, None, None]), _blended(labels_BK, label_weight_P[:, None, None])


def _blended(batch: Tensor, weight: Tensor) -> Tensor:
    """Each row with its neighbour: `weight` of its own, 1 - weight of the other's. `weight` is broadcast to (P, 2, …)."""
    pairs = batch.reshape(-1, 2, *batch.shape[1:])
    return (pairs * weight + pairs.flip(1) * (1 - weight)).reshape(batch.shape)


def erase(images_BCHW: Tensor, samples_B: Tensor, *, seed: int, epoch: int, probability: float) -> Tensor:
    """`images_BCHW`, normalised, a box of each replaced by normal noise with `probability` (Zhong et al. 2017).

    Args:
        samples_B: the images' indices in the data set, int64, on the CPU.
    """
    device, (height, width) = images_BCHW.device, images_BCHW.shape[-2:]
    drawn = uniform(seed=seed, epoch=epoch, stream=Stream.ERASE, samples=samples_B, count=_NUMBERS_PER_ERASE).double().numpy()
    rows = np.flatnonzero(drawn[:, 0] < probability)
    if not len(rows):
        return images_BCHW
    boxes = _erased_boxes(drawn[rows, 1:].reshape(-1, _ERASE_TRIES, 4), (height, width))
    rows_E, box_E4 = _moved(torch.from_numpy(rows), device), _moved(torch.from_numpy(boxes), device)
    samples_E = _moved(samples_B[torch.from_numpy(rows)], device)
    chosen_ECHW = images_BCHW.index_select(0, rows_E)
    count = _NUMBERS_PER_ERASE + chosen_ECHW[0].numel()
    noise = uniform(seed=seed, epoch=epoch, stream=Stream.ERASE, samples=samples_E, count=count)[:, _NUMBERS_PER_ERASE:]
    erased_ECHW = torch.where(_inside(box_E4, (height, width))[:, None], _normal(noise).view_as(chosen_ECHW), chosen_ECHW)
    return images_BCHW.index_copy(0, rows_E, erased_ECHW)


def _erased_boxes(drawn_ET4: _Floats, size: Size) -> NDArray[np.int64]:
    """The first box of each image's tries that is smaller than the image; empty where none is: (E, 4)."""
    height, width = size
    area_u, aspect_u, top_u, left_u = np.moveaxis(drawn_ET4, 2, 0)
    low, high = _ERASED_AREA
    area = (low + (high - low) * area_u) * height * width
    aspect = np.exp((1 - 2 * aspect_u) * _LOG_ERASED_ASPECT)
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    top, left = np.floor(top_u * (height - h + 1)), np.floor(left_u * (width - w + 1))
    fits_ET = (h < height) & (w < width)
    first = fits_ET.argmax(axis=1)
    boxes: _Floats = np.stack([top, top + h, left, left + w], axis=2)[np.arange(len(first)), first]
    return np.where(fits_ET.any(axis=1)[:, None], boxes, 0).astype(np.int64)


def _inside(box_N4: Tensor, size: Size) -> Tensor:
    """Which pixels are in each box: (N, H, W)."""
    top, bottom, left, right = box_N4[:, :, None].unbind(1)
    y_H, x_W = (torch.arange(length, device=box_N4.device) for length in size)
    return ((top <= y_H) & (y_H < bottom))[:, :, None] & ((left <= x_W) & (x_W < right))[:, None, :]


def _normal(uniform: Tensor) -> Tensor:
    """Normal numbers. Taken from the middles of the uniform numbers' bins, in float32 exactly, as 0 has no end."""
    return (2 * uniform - (1 - _STEP)).erfinv() * math.sqrt(2)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: that takes pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
