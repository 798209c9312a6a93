from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from mae_core.masking import random_masking
from mae_core.options import MaskingConfig
from mae_core.randomness import Stream, uniform


@pytest.mark.parametrize(("num_patches", "ratio", "kept"), [(100, 0.8, 20), (196, 0.75, 49), (100, 0.9, 10), (10, 0.7, 3), (3, 0.75, 0)])
def test_known_kept_counts(num_patches: int, ratio: float, kept: int) -> None:
    assert MaskingConfig(ratio=ratio).num_keep(num_patches) == kept


def test_the_kept_count_is_exact() -> None:
    """Against fractions; in floats int(100 * (1 - 0.8)) is 19."""
    ratios = [*(f"{percent / 100:.2f}" for percent in range(1, 100)), "0.333", "0.0625", "0.999", "1e-3"]
    for written in ratios:
        masking = MaskingConfig(ratio=float(written))
        for num_patches in (1, 2, 3, 4, 7, 10, 16, 49, 64, 100, 196, 256, 576, 1000, 1024, 3136):
            assert masking.num_keep(num_patches) == num_patches * (1 - Fraction(Decimal(written))) // 1, (num_patches, written)


def test_restore_undoes_the_shuffle() -> None:
    noise = torch.rand(3, 10, generator=torch.Generator().manual_seed(0))
    keep, restore, _ = random_masking(noise, 4)
    masked = noise.argsort(dim=1)[:, 4:]
    assert torch.equal(torch.cat([keep, masked], dim=1).gather(1, restore), torch.arange(10).expand(3, 10))


def test_the_patches_of_smallest_noise_stay_and_the_mask_is_1_where_one_is_removed() -> None:
    keep, _, mask = random_masking(torch.tensor([[0.5, 0.1, 0.9, 0.2]]), 2)
    assert keep.tolist() == [[1, 3]]
    assert mask.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_equal_noise_keeps_the_first_patches() -> None:
    keep, restore, _ = random_masking(torch.full((2, 300), 0.25), 7)
    assert keep.tolist() == [list(range(7))] * 2
    assert restore.tolist() == [list(range(300))] * 2


def test_each_patch_is_equally_likely_to_stay() -> None:
    num_images, num_patches, num_keep = 8000, 16, 4
    noise = uniform(seed=0, epoch=0, stream=Stream.MASK, samples=torch.arange(num_images), count=num_patches)
    mask = random_masking(noise, num_keep).mask_BL
    assert torch.equal((1 - mask).sum(dim=1), torch.full((num_images,), float(num_keep)))
    kept = (1 - mask).sum(dim=0)
    share = num_keep / num_patches
    deviation = (num_images * share * (1 - share)) ** 0.5
    assert ((kept - num_images * share).abs() < 4 * deviation).all(), kept
    both_kept = (1 - mask).T @ (1 - mask)  # pairs: no patch prefers the company of another
    pair_share = share * (num_keep - 1) / (num_patches - 1)
    pairs = both_kept[~torch.eye(num_patches, dtype=torch.bool)]
    assert ((pairs - num_images * pair_share).abs() < 5 * (num_images * pair_share) ** 0.5).all()
