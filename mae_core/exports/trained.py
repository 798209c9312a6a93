"""What a run hands over to be exported.

Shapes: B images, C channels, H and W pixels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mae_core.classifier import Classifier
from mae_core.config import FinetuneSpec, PretrainSpec
from mae_core.data.decode import JpegImage, UnreadableImage
from mae_core.data.loader import stacked
from mae_core.data.source import ImageSource
from mae_core.data.transforms import centre_crop, normalise
from mae_core.errors import DataError
from mae_core.mae import MaskedAutoencoder
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.vit import Encoder

_NUM_IMAGES = 3


class Sample(NamedTuple):
    """Some of the run's images, on the CPU, as the model takes them; and whether any had to be resized for that."""

    images_BCHW: Tensor
    resized: bool


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, whole, on any device. `mae`: of a pretraining, with the same encoder. `classes`: of a fine-tune."""

    spec: PretrainSpec | FinetuneSpec
    module: Encoder | Classifier
    mae: MaskedAutoencoder | None
    classes: list[str]
    normalize: NormalizeConfig
    sample: Sample
    num_images: int
    metrics: dict[str, float | list[float]]

    @property
    def model(self) -> ModelConfig:
        return self.module.model if isinstance(self.module, Encoder) else self.module.encoder.model


def sample_of(source: ImageSource, members: Iterable[int], *, model: ModelConfig, normalize: NormalizeConfig) -> Sample:
    """The first images of `members` that can be read. Raises DataError where none can."""
    images: list[Tensor] = []
    resized = False
    for member in members:
        try:
            image = source.read(member)
            pixels_HWC = centre_crop(image, model.image_size)
        except UnreadableImage:
            continue
        width, height = image.size if isinstance(image, Image.Image | JpegImage) else image.shape[1::-1]
        resized |= (height, width) != model.image_size
        images.append(normalise(stacked([pixels_HWC]), normalize))
        if len(images) == _NUM_IMAGES:
            break
    if not images:
        raise DataError("none of the images can be read any more, with which the trained model would be tested; is the source still there?")
    return Sample(torch.cat(images).contiguous(), resized)
