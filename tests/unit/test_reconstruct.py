import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mae_core.data.transforms import centre_crop, normalise
from mae_core.mae import MaeOutput, MaskedAutoencoder
from mae_core.options import ARCH_SIZES, DecoderConfig, MaskingConfig, ModelConfig, NormalizeConfig, TargetConfig
from mae_core.patches import patchify
from mae_core.reconstruct import Reconstructions, reconstruct, reconstructions_of
from mae_core.run import Run
from mae_core.vit import Encoder, initialise
from tests.unit.core_fixtures import SHALLOW, PictureSource, corrupt, image_folder, opened, pretrain_spec

MODEL = ModelConfig(arch="vit_tiny_patch4", image_size=(8, 12))
NORMALIZE = NormalizeConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
GAP, FACTOR = 4, 12  # 8 pixels are enlarged to 96


class Oracle(MaskedAutoencoder):
    """Predicts its target exactly."""

    def forward(self, images_BCHW: Tensor, numbers_BX: Tensor, *, predict_all: bool = False) -> MaeOutput:
        output = super().forward(images_BCHW, numbers_BX, predict_all=predict_all)
        return output._replace(prediction_VQP=self.target(patchify(images_BCHW, self.encoder.model.patch_size)))


def autoencoder(*, oracle: bool, norm_pix: bool, model: ModelConfig = MODEL) -> MaskedAutoencoder:
    kind = Oracle if oracle else MaskedAutoencoder
    mae = kind(
        Encoder(model), masking=MaskingConfig(ratio=0.5), decoder=DecoderConfig(depth=1, width=32), target=TargetConfig(norm_pix=norm_pix)
    )
    initialise(mae, torch.Generator().manual_seed(0))
    return mae.eval()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_perfect_prediction_is_the_input(norm_pix: bool) -> None:
    images = 0.3 + 2 * torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    prediction, mask = reconstruct(autoencoder(oracle=True, norm_pix=norm_pix), images, torch.rand(3, 6))
    torch.testing.assert_close(prediction, images, rtol=0, atol=1e-5)
    assert mask.shape == (3, 1, 8, 12)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask.mean(dim=(1, 2, 3)) == 0.5).all()


def test_the_mask_covers_whole_patches_where_the_noise_says() -> None:
    noise = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.7, 0.3]])
    _, mask = reconstruct(autoencoder(oracle=False, norm_pix=True), torch.randn(1, 3, 8, 12), noise)
    assert torch.equal(mask[0, 0, ::4, ::4], torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
    assert torch.equal(patchify(mask, 4).std(dim=-1), torch.zeros(1, 6))


def made_of(mae: MaskedAutoencoder, *, members: list[int], broken: tuple[int, ...] = ()) -> Reconstructions:
    made = reconstructions_of(mae, PictureSource(8, broken=broken, size=20), members, normalize=NORMALIZE, seed=3)
    assert made is not None
    return made


def grid_of(mae: MaskedAutoencoder, *, members: list[int], broken: tuple[int, ...] = ()) -> np.ndarray:
    file = io.BytesIO()
    made_of(mae, members=members, broken=broken).write_png(file)
    return np.asarray(Image.open(file))


def tile(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    """A tile of the grid at the model's own size: every pixel of it stands FACTOR x FACTOR times."""
    height, width = 8 * FACTOR, 12 * FACTOR
    top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
    enlarged = picture[top : top + height, left : left + width]
    small = enlarged[::FACTOR, ::FACTOR]
    assert np.array_equal(enlarged, small.repeat(FACTOR, 0).repeat(FACTOR, 1))
    return small


def test_the_grid_has_a_row_of_four_for_each_image() -> None:
    picture = grid_of(autoencoder(oracle=False, norm_pix=True), members=[1, 4, 6])
    assert picture.shape == (3 * (96 + GAP) + GAP, 4 * (144 + GAP) + GAP, 3)
    for row, member in enumerate([1, 4, 6]):
        assert np.array_equal(tile(picture, row, 0), centre_crop(PictureSource(8, size=20).read(member), (8, 12)))


def test_visible_patches_are_pasted_bit_for_bit_and_masked_ones_predicted() -> None:
    picture = grid_of(autoencoder(oracle=False, norm_pix=True), members=[0, 1])
    for row in range(2):
        shown, seen, predicted, pasted = (tile(picture, row, column) for column in range(4))
        hidden = (seen == 128).all(axis=2)
        assert hidden.mean() == 0.5
        assert np.array_equal(seen[~hidden], shown[~hidden])
        assert np.array_equal(pasted[~hidden], shown[~hidden])
        assert np.array_equal(pasted[hidden], predicted[hidden])
        assert not np.array_equal(predicted[~hidden], shown[~hidden])


def test_a_perfect_prediction_is_shown_as_the_input() -> None:
    picture = grid_of(autoencoder(oracle=True, norm_pix=True), members=[2])
    shown, _, predicted, pasted = (tile(picture, 0, column).astype(int) for column in range(4))
    assert abs(predicted - shown).max() <= 1
    assert abs(pasted - shown).max() <= 1


def test_unreadable_images_have_no_row() -> None:
    mae = autoencoder(oracle=False, norm_pix=False)
    assert np.array_equal(grid_of(mae, members=[0, 1, 2], broken=(1,)), grid_of(mae, members=[0, 2]))
    assert reconstructions_of(mae, PictureSource(2, broken=(0, 1)), [0, 1], normalize=NORMALIZE, seed=3) is None


def pictures_of(run: Run) -> Reconstructions | None:
    return next(each for each in run.progress(lambda: False) if each.step == 4 and not each.points).reconstructions


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (4, "RGBA")])
def test_grey_and_four_channels_are_shown(in_chans: int, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)
    folder = image_folder(tmp_path / "images", per_class=8, mode=mode)
    run = opened(pretrain_spec(folder, model={"in_chans": in_chans}))
    made = pictures_of(run)
    assert made is not None
    made.write_png(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.mode == "RGB"
        assert picture.height == 8 * (96 + GAP) + GAP
        first = np.asarray(picture)[GAP : GAP + 96, GAP : GAP + 96]
    pixels = centre_crop(run._source.read(0), (8, 8))[..., :3]  # type: ignore[attr-defined]
    assert np.array_equal(first[::12, ::12], np.broadcast_to(pixels, (8, 8, 3)))


def test_a_run_whose_shown_images_cannot_be_read_makes_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)
    folder = image_folder(tmp_path / "images")
    run = opened(pretrain_spec(folder, data={"validation_fraction": 0.3}))
    for key in [run._source.keys[member] for member in run._shown]:  # type: ignore[attr-defined]
        corrupt(folder / key)
    seen = list(run.progress(lambda: False))
    assert seen[-1].step == seen[-1].num_steps
    assert all(each.reconstructions is None for each in seen)


def test_arrays_are_what_the_picture_shows(tmp_path: Path) -> None:
    made = made_of(autoencoder(oracle=False, norm_pix=True), members=[1, 4])
    made.write_arrays(tmp_path / "arrays.npz")
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays["keys"].tolist() == ["picture-1", "picture-4"]
        assert arrays["input"].shape == arrays["prediction"].shape == arrays["pasted"].shape == (2, 3, 8, 12)
        pixels = centre_crop(PictureSource(8, size=20).read(1), (8, 12)).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(arrays["input"][0], pixels, atol=1e-5)
        hidden = np.broadcast_to(arrays["mask"] == 1, arrays["input"].shape)
        assert hidden.mean() == 0.5
        np.testing.assert_array_equal(arrays["pasted"][hidden], arrays["prediction"][hidden])
        np.testing.assert_array_equal(arrays["pasted"][~hidden], arrays["input"][~hidden])
        assert (arrays["prediction"][~hidden] != arrays["input"][~hidden]).mean() > 0.99


def test_images_beyond_0_to_1_are_shown_by_their_own_range(tmp_path: Path) -> None:
    values = torch.linspace(-50, 150, 8 * 8).reshape(1, 1, 8, 8)
    Reconstructions(values, torch.zeros(1, 1, 8, 8), values, values, ["x"]).write_png(tmp_path / "picture.png")
    shown = np.asarray(Image.open(tmp_path / "picture.png"))[GAP : GAP + 96 : 12, GAP : GAP + 96 : 12, 0]
    np.testing.assert_array_equal(shown.ravel(), np.rint(np.linspace(0, 255, 64)))


def test_what_is_shown_is_what_is_normalised_back() -> None:
    pixels = torch.arange(192, dtype=torch.uint8).reshape(1, 8, 8, 3)
    images = normalise(pixels, NORMALIZE)
    mean, std = (torch.tensor(each)[:, None, None] for each in (NORMALIZE.mean, NORMALIZE.std))
    assert torch.equal(((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1), pixels)
