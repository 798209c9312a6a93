"""Which patches stay visible (paper, section 3, "Masking").

Shapes: B images, L patches, K kept (visible) patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """keep_BK: indices of the visible patches, in the order the encoder sees them. restore_BL: where each patch is in
    [visible, masked]. mask_BL: 1 where a patch is masked, else 0."""

    keep_BK: Tensor
    restore_BL: Tensor
    mask_BL: Tensor


def random_masking(noise_BL: Tensor, num_keep: int) -> Masking:
    """Uniform random masking: the `num_keep` patches of the smallest noise stay visible.

    The sort is stable, so equal noise cannot make a run differ from its repeat.
    """
    shuffle_BL = torch.argsort(noise_BL, dim=1, stable=True)
    restore_BL = torch.argsort(shuffle_BL, dim=1, stable=True)
    return Masking(shuffle_BL[:, :num_keep], restore_BL, (restore_BL >= num_keep).to(torch.float32))
