"""What the model reconstructs of some images: the input, what it sees, what it predicts, both put together; as a picture and as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_core.data.loader import measured_batches
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import ImageSource
from mae_core.data.transforms import normalise
from mae_core.mae import MaskedAutoencoder
from mae_core.options import NormalizeConfig
from mae_core.patches import patch_statistics, patchify, unpatchify
from mae_core.randomness import Stream, uniform
from mae_core.world import autocast

_MIN_TILE = 96  # pixels; smaller images are enlarged by a whole factor
_GAP = 4
_GREY = 0.5


@dataclass(frozen=True)
class Reconstructions:
    """Some images and their reconstructions, float32 on the CPU, in the units of the images as they were read ([0, 1] for integer ones).

    input, prediction, pasted: (B, C, H, W), pasted has the visible patches of the input. mask: (B, 1, H, W), 1 where masked.
    keys: which images they are.
    """

    input: Tensor
    mask: Tensor
    prediction: Tensor
    pasted: Tensor
    keys: list[str]

    def write_png(self, path: Path | BinaryIO) -> None:
        """A row for each image: input, visible patches, prediction, prediction with the visible patches pasted in.

        Values outside of [0, 1] are scaled by the input's own range, channel by channel.
        """
        low, high = self.input.amin(dim=(2, 3), keepdim=True).clamp(max=0), self.input.amax(dim=(2, 3), keepdim=True).clamp(min=1)
        columns = [self.input, self.input * (1 - self.mask) + (low + _GREY * (high - low)) * self.mask, self.prediction, self.pasted]
        shown = [(column - low) / (high - low) for column in columns]
        _paste([[_tile(column[row]) for column in shown] for row in range(len(self.input))]).save(path, format="PNG")

    def write_arrays(self, path: Path) -> None:
        """An `.npz` of input, mask, prediction, pasted and keys, as they are."""
        arrays = {name: getattr(self, name).numpy() for name in ("input", "mask", "prediction", "pasted")}
        np.savez_compressed(path, keys=np.array(self.keys), **arrays)


@torch.no_grad()
def reconstruct(mae: MaskedAutoencoder, images_BCHW: Tensor, numbers_BX: Tensor) -> tuple[Tensor, Tensor]:
    """(prediction_BCHW in the units of `images_BCHW`, mask_B1HW: 1 where masked), of the first mask of each image.

    A model that predicts normalised pixels says nothing of a patch's mean and deviation; the target patch's own are put back.
    """
    model, first = mae.encoder.model, slice(None, None, mae.masking.num_masks)
    with autocast(images_BCHW.device):
        output = mae(images_BCHW, numbers_BX, predict_all=True)
    prediction_BLP = output.prediction_VQP[first].float()
    if mae.norm_pix:
        mean, std = patch_statistics(patchify(images_BCHW, model.patch_size))
        prediction_BLP = prediction_BLP * std + mean
    mask_BLP = output.mask_VL[first, :, None].expand(-1, -1, model.patch_size**2)
    return tuple(unpatchify(x, patch_size=model.patch_size, grid=model.grid) for x in (prediction_BLP, mask_BLP))  # type: ignore[return-value]


def reconstructions_of(
    mae: MaskedAutoencoder, source: ImageSource, members: Sequence[int], *, normalize: NormalizeConfig, seed: int
) -> Reconstructions | None:
    """What `mae` makes of the images `members`, each always under the same mask; None where none of them can be read.

    To be called by all workers. The module's mode stays what it is: nothing in it depends on that.
    """
    model, device = mae.encoder.model, mae.decoder_pos_embed.device
    batches = measured_batches(source, members, size=model.image_size, batch_size=len(members), num_threads=1, skipped=SkippedImages())
    batch = next(batches, None)
    if batch is None:  # the others may have images, and a sharded forward is a collective
        empty = torch.zeros(1, model.in_chans, *model.image_size, device=device)
        reconstruct(mae, empty, torch.zeros(1, mae.num_numbers, device=device))
        return None
    images = normalise(batch.pixels_BHWC.to(device), normalize)
    numbers = uniform(seed=seed, epoch=0, stream=Stream.MASK, samples=batch.samples_B.to(device), count=mae.num_numbers)
    prediction, mask = reconstruct(mae, images, numbers)

    mean = torch.tensor(normalize.mean, device=device)[:, None, None]
    std = torch.tensor(normalize.std, device=device)[:, None, None]
    shown, predicted = images * std + mean, prediction * std + mean
    pasted = shown * (1 - mask) + predicted * mask
    return Reconstructions(
        input=shown.cpu(),
        mask=mask.cpu(),
        prediction=predicted.cpu(),
        pasted=pasted.cpu(),
        keys=[source.keys[sample] for sample in batch.samples_B.tolist()],
    )


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
