"""A picture of what the model reconstructs: for some images the input, what it sees, what it predicts, and both put together."""

import torch
from PIL import Image
from torch import Tensor

from mae_core.data.loader import SkippedImages, measured_batches
from mae_core.data.source import ImageSource
from mae_core.data.transforms import normalise
from mae_core.loop import autocast
from mae_core.mae import MaskedAutoencoder
from mae_core.options import NormalizeConfig
from mae_core.patches import patch_statistics, patchify, unpatchify
from mae_core.randomness import Stream, uniform

_MIN_TILE = 96  # pixels; smaller images are enlarged by a whole factor
_GAP = 4
_GREY = 0.5


@torch.inference_mode()
def reconstruct(mae: MaskedAutoencoder, images_BCHW: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor]:
    """(prediction_BCHW in the units of `images_BCHW`, mask_BCHW: 1 where masked).

    A model that predicts normalised pixels says nothing of a patch's mean and deviation; the target patch's own are put back.
    """
    model = mae.encoder.model
    with autocast(images_BCHW.device):
        output = mae(images_BCHW, noise_BL)
    prediction_BLP = output.prediction_BLP.float()
    if mae.norm_pix:
        mean, std = patch_statistics(patchify(images_BCHW, model.patch_size))
        prediction_BLP = prediction_BLP * std + mean
    mask_BLP = output.mask_BL[..., None].expand_as(prediction_BLP)
    return tuple(unpatchify(x, patch_size=model.patch_size, grid=model.grid) for x in (prediction_BLP, mask_BLP))  # type: ignore[return-value]


def reconstruction_grid(
    mae: MaskedAutoencoder, source: ImageSource, members: list[int], *, normalize: NormalizeConfig, seed: int
) -> Image.Image | None:
    """A row for each image: input, visible patches, prediction, prediction with the visible patches pasted in.

    None where none of the images can be read.
    """
    model, device = mae.encoder.model, mae.mask_token.device
    batches = measured_batches(source, members, size=model.image_size, batch_size=len(members), num_threads=1, skipped=SkippedImages())
    batch = next(batches, None)
    if batch is None:
        return None
    images = normalise(batch.pixels_BHWC.to(device), normalize)
    noise = uniform(seed=seed, epoch=0, stream=Stream.MASK, samples=batch.samples_B.to(device), count=model.num_patches)
    prediction, mask = reconstruct(mae, images, noise)

    mean = torch.tensor(normalize.mean, device=device)[:, None, None]
    std = torch.tensor(normalize.std, device=device)[:, None, None]
    shown, predicted = (images * std + mean), (prediction * std + mean)
    columns = [shown, shown * (1 - mask) + _GREY * mask, predicted, shown * (1 - mask) + predicted * mask]
    return _paste([[_tile(column[row]) for column in columns] for row in range(len(images))])


def _tile(image_CHW: Tensor) -> Image.Image:
    channels = image_CHW[:3] if image_CHW.shape[0] >= 3 else image_CHW[:1].expand(3, -1, -1)
    pixels = (channels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    tile = Image.fromarray(pixels)
    factor = max(1, -(-_MIN_TILE // min(tile.size)))
    return tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)


def _paste(rows: list[list[Image.Image]]) -> Image.Image:
    width, height = rows[0][0].size
    picture = Image.new("RGB", ((width + _GAP) * len(rows[0]) + _GAP, (height + _GAP) * len(rows) + _GAP), "white")
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            picture.paste(tile, (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP)))
    return picture
