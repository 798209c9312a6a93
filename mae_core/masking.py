"""Which patches stay visible (paper, section 3, "Masking", and Table 1f).

Every strategy gives each patch a score, and the patches of the smallest scores stay visible: so each keeps exactly as many as it is asked
to, and a mask is a pure function of the uniform numbers it is given.

Shapes: B images, L patches, K kept (visible) patches, M = L - K masked patches, R rectangles.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Strategy = Literal["random", "block", "grid"]
_NUM_RECTANGLES = 32
_AREA = (0.08, 0.4)  # of all patches; BEiT's rectangles have at least 16 of 196
_MAX_LOG_ASPECT = math.log(1 / 0.3)  # BEiT's


class Masking(NamedTuple):
    """keep_BK: indices of the visible patches, in the order the encoder sees them. masked_BM: those of the masked ones. restore_BL: where
    each patch is in [visible, masked]."""

    keep_BK: Tensor
    masked_BM: Tensor
    restore_BL: Tensor

    @property
    def mask_BL(self) -> Tensor:
        """1 where a patch is masked, else 0."""
        return (self.restore_BL >= self.keep_BK.shape[1]).to(torch.float32)


def num_numbers(strategy: Strategy, num_patches: int) -> int:
    """Uniform numbers in [0, 1) that one mask needs."""
    return {"random": num_patches, "block": 4 * _NUM_RECTANGLES, "grid": 2}[strategy]


def draw_masking(numbers_BX: Tensor, *, strategy: Strategy, grid: tuple[int, int], num_keep: int) -> Masking:
    """The masks that `numbers_BX` stand for, each with `num_keep` visible patches of `grid` = (patches down, patches across).

    The sorts are stable, so equal scores cannot make a run differ from its repeat.
    """
    if strategy == "random":
        score_BL = numbers_BX
    elif strategy == "block":
        score_BL = _block_score(numbers_BX, grid)
    else:
        score_BL = _grid_score(numbers_BX, grid)
    shuffle_BL = torch.argsort(score_BL, dim=1, stable=True)
    restore_BL = torch.argsort(shuffle_BL, dim=1, stable=True)
    return Masking(shuffle_BL[:, :num_keep], shuffle_BL[:, num_keep:], restore_BL)


def _block_score(numbers_BX: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rectangles are laid one after the other (as BEiT does, Bao et al. 2021); the later a patch is covered, the sooner it stays visible.

    So the masked patches are those of the first rectangles, the last of them cut off row by row where enough are masked.
    """
    rows, columns = grid
    area_BR, aspect_BR, top_BR, left_BR = numbers_BX.reshape(-1, 4, _NUM_RECTANGLES).unbind(1)
    area_BR = (_AREA[0] + (_AREA[1] - _AREA[0]) * area_BR) * rows * columns
    aspect_BR = torch.exp((2 * aspect_BR - 1) * _MAX_LOG_ASPECT)
    height_BR = (area_BR * aspect_BR).sqrt().round().clamp(1, rows)
    width_BR = (area_BR / aspect_BR).sqrt().round().clamp(1, columns)
    top_BR, left_BR = (top_BR * (rows - height_BR + 1)).floor(), (left_BR * (columns - width_BR + 1)).floor()

    place_L = torch.arange(rows * columns, device=numbers_BX.device)
    row_L, column_L = place_L // columns, place_L % columns
    covered_BRL = (row_L >= top_BR[..., None]) & (row_L < (top_BR + height_BR)[..., None])
    covered_BRL &= (column_L >= left_BR[..., None]) & (column_L < (left_BR + width_BR)[..., None])
    never = torch.ones_like(covered_BRL[:, :1])
    first_BL = torch.cat([covered_BRL, never], dim=1).int().argmax(dim=1)  # _NUM_RECTANGLES where no rectangle covers the patch
    return (_NUM_RECTANGLES - first_BL) * (rows * columns) - place_L


def _grid_score(numbers_BX: Tensor, grid: tuple[int, int]) -> Tensor:
    """The order of Bayer's dither matrix, shifted at random: any number of its first patches lie evenly spread, one of four as a grid of
    every second row and column."""
    order = _bayer(max(grid), numbers_BX.device)
    size = len(order)
    shift_B2 = (numbers_BX * size).floor().long()
    rows_BH = (torch.arange(grid[0], device=order.device) + shift_B2[:, :1]) % size
    columns_BW = (torch.arange(grid[1], device=order.device) + shift_B2[:, 1:]) % size
    return order[rows_BH[:, :, None], columns_BW[:, None, :]].flatten(1)


@lru_cache(maxsize=8)
def _bayer(at_least: int, device: torch.device) -> Tensor:
    """Bayer's matrix of the next power of two: each of 0 … n * n - 1 once (Bayer 1973)."""
    with torch.inference_mode(False):  # the first use may be an evaluation
        order = torch.zeros(1, 1, dtype=torch.long, device=device)
        while len(order) < at_least:
            order = torch.cat([torch.cat([4 * order, 4 * order + 2], dim=1), torch.cat([4 * order + 3, 4 * order + 1], dim=1)])
        return order
