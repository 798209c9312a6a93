"""Images to patches and back, and the fixed positions of patches.

Shapes: B images, C channels, H and W pixels, L patches (row by row), P = p * p * C numbers in a patch, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Patches (B, L, P); inside a patch the order is row, column, channel, as in the authors' code."""
    B, C, H, W = images_BCHW.shape
    rows, columns = H // patch_size, W // patch_size
    split = images_BCHW.reshape(B, C, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(B, rows * columns, patch_size * patch_size * C)


def unpatchify(patches_BLP: Tensor, *, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W): the inverse of `patchify` for `grid` = (patches down, patches across)."""
    B, _, P = patches_BLP.shape
    rows, columns = grid
    C = P // patch_size**2
    split = patches_BLP.reshape(B, rows, columns, patch_size, patch_size, C)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(B, C, rows * patch_size, columns * patch_size)


def patch_statistics(patches_BLP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, both (B, L, 1); the variance is unbiased and 1e-6 is added to it (authors' code)."""
    variance, mean = torch.var_mean(patches_BLP, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, 1 + L, D), zeros for the class token (Vaswani et al. 2017, in 2-D).

    Each row is [sin(x), cos(x), sin(y), cos(y)] of D/4 frequencies 10000^(-4i/D): across comes first, the authors' layout.
    Computed in float64, returned in float32.
    """
    assert width % 4 == 0, width
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij")
    angles_x, angles_y = x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies
    patches_LD = torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches_LD])[None].float()


def resize_positions(positions_1ND: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Positions (1, 1 + L, D) for another grid of patches: bicubic and antialiased in both directions, the class token's apart.

    Learned positions are interpolated as fixed ones are; as the authors do for 448 pixels, and timm.
    """
    if from_grid == to_grid:
        return positions_1ND
    own, grid_1LD = positions_1ND[:, :1], positions_1ND[:, 1:].float()
    image_1DHW = grid_1LD.reshape(1, *from_grid, -1).permute(0, 3, 1, 2)
    resized_1DHW = F.interpolate(image_1DHW, size=to_grid, mode="bicubic", antialias=True)
    return torch.cat([own, resized_1DHW.permute(0, 2, 3, 1).flatten(1, 2).to(positions_1ND.dtype)], dim=1)
