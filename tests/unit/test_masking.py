from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from mae_core.masking import Masking, Strategy, draw_masking, num_numbers
from mae_core.options import MaskingConfig
from mae_core.randomness import Stream, uniform


def random_masking(noise_BL: torch.Tensor, num_keep: int) -> Masking:
    return draw_masking(noise_BL, strategy="random", grid=(1, noise_BL.shape[1]), num_keep=num_keep)


def masks_of(strategy: Strategy, *, grid: tuple[int, int], ratio: float, num_images: int = 500) -> torch.Tensor:
    """1 where masked: (images, down, across)."""
    num_patches = grid[0] * grid[1]
    numbers = uniform(seed=0, epoch=0, stream=Stream.MASK, samples=torch.arange(num_images), count=num_numbers(strategy, num_patches))
    num_keep = MaskingConfig(ratio=ratio).num_keep(num_patches)
    return draw_masking(numbers, strategy=strategy, grid=grid, num_keep=num_keep).mask_BL.reshape(num_images, *grid)


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
    keep, masked, restore = random_masking(noise, 4)
    assert torch.equal(masked, noise.argsort(dim=1)[:, 4:])
    assert torch.equal(torch.cat([keep, masked], dim=1).gather(1, restore), torch.arange(10).expand(3, 10))


def test_the_patches_of_smallest_noise_stay_and_the_mask_is_1_where_one_is_removed() -> None:
    masking = random_masking(torch.tensor([[0.5, 0.1, 0.9, 0.2]]), 2)
    assert masking.keep_BK.tolist() == [[1, 3]]
    assert masking.mask_BL.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_equal_noise_keeps_the_first_patches() -> None:
    keep, _, restore = random_masking(torch.full((2, 300), 0.25), 7)
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


@pytest.mark.parametrize("strategy", ["random", "block", "grid"])
@pytest.mark.parametrize("grid", [(14, 14), (3, 7), (4, 4), (1, 9), (16, 5)])
@pytest.mark.parametrize("ratio", [0.1, 0.333, 0.5, 0.75, 0.8, 0.95])
def test_every_strategy_keeps_the_exact_count_at_any_ratio(strategy: Strategy, grid: tuple[int, int], ratio: float) -> None:
    masks = masks_of(strategy, grid=grid, ratio=ratio, num_images=20)
    num_keep = MaskingConfig(ratio=ratio).num_keep(grid[0] * grid[1])
    assert torch.equal((1 - masks).sum(dim=(1, 2)), torch.full((20,), float(num_keep)))


@pytest.mark.parametrize("strategy", ["block", "grid"])
def test_other_strategies_mask_every_patch_of_some_image(strategy: Strategy) -> None:
    masks = masks_of(strategy, grid=(6, 6), ratio=0.5)
    assert masks.amin(dim=0).max() == 0
    assert masks.amax(dim=0).min() == 1
    assert len(masks.flatten(1).unique(dim=0)) > (300 if strategy == "block" else 1)  # a chess board has two colours


def test_a_grid_of_three_quarters_keeps_one_of_each_two_by_two() -> None:
    """Table 1f: "grid-wise sampling regularly keeps one of every four patches"."""
    visible = 1 - masks_of("grid", grid=(14, 14), ratio=0.75, num_images=50)
    for each in visible:
        rows, columns = each.nonzero().unbind(1)
        assert (rows % 2).unique().numel() == 1
        assert (columns % 2).unique().numel() == 1
        assert len(rows) == 49


def edges(masks: torch.Tensor) -> float:
    """Neighbours of which one is masked and the other is not, as a share of all pairs of neighbours."""
    across, down = (masks.diff(dim=dim).abs().mean().item() for dim in (1, 2))
    return (across + down) / 2


def test_blocks_hang_together_more_than_random_patches_and_grids_less() -> None:
    shares = {name: edges(masks_of(name, grid=(14, 14), ratio=0.5)) for name in ("block", "random", "grid")}
    assert shares["random"] == pytest.approx(0.5, abs=0.02)
    assert shares["block"] < 0.2
    assert shares["grid"] == 1.0  # at one half: a chess board


def test_a_block_mask_is_its_first_rectangle_cut_off_row_by_row() -> None:
    numbers = torch.full((1, num_numbers("block", 100)), 0.5)  # 24 of 100 patches, square, in the middle: 5 x 5 from (3, 3)
    mask = draw_masking(numbers, strategy="block", grid=(10, 10), num_keep=76).mask_BL.reshape(10, 10)
    assert mask.nonzero().tolist() == [[row, column] for row in range(3, 8) for column in range(3, 8)][:24]
