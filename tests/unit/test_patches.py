import pytest
import torch

from mae_core.patches import patch_statistics, patchify, sincos_positions, unpatchify


@pytest.mark.parametrize(("channels", "height", "width", "patch"), [(3, 8, 8, 4), (1, 6, 15, 3), (5, 28, 7, 7), (4, 2, 6, 1)])
def test_patches_and_back(channels: int, height: int, width: int, patch: int) -> None:
    images = torch.randn(2, channels, height, width)
    patches = patchify(images, patch)
    assert patches.shape == (2, (height // patch) * (width // patch), patch * patch * channels)
    assert torch.equal(unpatchify(patches, patch_size=patch, grid=(height // patch, width // patch)), images)


def test_patches_go_row_by_row_and_inside_by_row_column_channel() -> None:
    images = torch.arange(1 * 2 * 4 * 6).reshape(1, 2, 4, 6)
    second_row_third_patch = patchify(images, 2)[0, 5]
    expected = [images[0, channel, row, column] for row in (2, 3) for column in (4, 5) for channel in (0, 1)]
    assert second_row_third_patch.tolist() == [int(value) for value in expected]


def test_statistics_are_unbiased_with_1e_6_added() -> None:
    patches = torch.tensor([[[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]]], dtype=torch.float64)
    mean, std = patch_statistics(patches)
    torch.testing.assert_close(mean[0, :, 0], torch.tensor([3.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(std[0, :, 0] ** 2, torch.tensor([14 / 3 + 1e-6, 1e-6], dtype=torch.float64), rtol=1e-12, atol=0)


def test_positions_are_sines_and_cosines_of_across_then_down() -> None:
    positions = sincos_positions(16, (3, 5))
    assert positions.shape == (1, 16, 16)
    assert positions.dtype == torch.float32
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    across, down = 4 * frequencies, 2 * frequencies
    expected = torch.cat([across.sin(), across.cos(), down.sin(), down.cos()]).float()
    assert torch.equal(positions[0, 1 + 2 * 5 + 4], expected)


def test_the_class_token_has_no_position() -> None:
    assert not sincos_positions(8, (2, 2))[0, 0].any()


def test_moving_across_changes_only_the_first_half() -> None:
    grid = sincos_positions(8, (4, 4))[0, 1:].reshape(4, 4, 8)
    assert torch.equal(grid[1, 0, 4:], grid[1, 3, 4:])
    assert torch.equal(grid[0, 2, :4], grid[3, 2, :4])
    assert not torch.equal(grid[1, 0, :4], grid[1, 3, :4])
