"""Features of all images of a source under one frozen encoder, on every worker.

Shapes: N images, D width.
"""

import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mae_core.data.skipped import SkippedImages
from mae_core.data.source import ImageSource
from mae_core.errors import EncoderError
from mae_core.loop import check_skipped
from mae_core.options import NormalizeConfig
from mae_core.rounds import Round, measured_rounds
from mae_core.sharded import is_sharded
from mae_core.vit import Encoder, pool
from mae_core.world import World

_NUMBERS_IN_CACHE = 600_000  # tokens times width: half to twice as many are as fast; whole batches take up to a half longer


class Features(NamedTuple):
    """Of the readable images, in order. features_ND: float32. labels_N: int64."""

    features_ND: Tensor
    labels_N: Tensor


def features_of(encoder: Encoder, pooling: str) -> Callable[[Tensor], Tensor]:
    """Images (B, C, H, W) to what `vit.pool` makes of their tokens: on CPUs a few images at a time, whose activations stay in the caches.

    A sharded encoder (FSDP2) takes all at once: its forward is a collective, which all workers must call equally often.
    """
    model = encoder.model
    few = max(1, _NUMBERS_IN_CACHE // ((1 + model.num_patches) * model.width))

    def features(images_BCHW: Tensor) -> Tensor:
        if images_BCHW.device.type != "cpu" or is_sharded(encoder):
            return pool(encoder(images_BCHW), pooling)
        parts = torch.tensor_split(images_BCHW, math.ceil(len(images_BCHW) / few))  # even ones: a single image is slow
        return torch.cat([pool(encoder(part_BCHW), pooling) for part_BCHW in parts])

    return features


def encode_features(
    encoder: Encoder,
    source: ImageSource,
    members: Sequence[int],
    *,
    pooling: str,
    normalize: NormalizeConfig,
    world: World,
    num_threads: int,
    skipped: SkippedImages,
    max_corrupt_fraction: float,
    section: str = "data",
) -> Generator[Round, None, Features]:
    """Encodes each image of `members` once, centre-cropped, the workers taking turns; yields after each round.

    The encoder is in eval mode afterwards; its parameters are never touched, only its forward. The features are the same on all workers
    and, bit for bit, for any number of them. Raises DataError where too many images are unreadable and EncoderError where features are
    not finite, on all workers at once. `section` of the spec says where the images come from.
    """
    encoder.eval()
    features_ND = torch.zeros(len(members), encoder.model.width, device=world.device)
    readable_N = torch.zeros(len(members), dtype=torch.int32, device=world.device)
    for measured in measured_rounds(
        features_of(encoder, pooling),
        source,
        members,
        model=encoder.model,
        normalize=normalize,
        world=world,
        num_threads=num_threads,
        skipped=skipped,
    ):
        features_ND[measured.places_B] = measured.outputs
        readable_N[measured.places_B] = 1
        yield Round(measured.wait_seconds)
    features_ND, readable_N = world.sum(features_ND), world.sum(readable_N)
    num_unread = len(members) - int(readable_N.sum())
    check_skipped(num_unread, of=len(members), max_fraction=max_corrupt_fraction, example="see the images_skipped events", section=section)
    if not features_ND.isfinite().all():
        raise EncoderError("the encoder's features are not finite numbers; its weights are damaged, name another")
    labels_N = torch.tensor([source.labels[member] for member in members], device=world.device)
    return Features(features_ND[readable_N.bool()], labels_N[readable_N.bool()])
