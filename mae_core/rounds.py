"""Measuring in rounds: what a module makes of each image of a list, shared between the workers, who can stop or tell after every round.

Shapes: B images, C channels, H and W pixels.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mae_core.data.loader import SkippedImages, measured_batches
from mae_core.data.source import ImageSource
from mae_core.data.transforms import normalise
from mae_core.loop import WantsStop
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.world import World, autocast

_MAX_BATCH = 256
_MAX_TOKENS = 65_536  # of a batch, so that large images do not need more memory than many small ones


class Measured(NamedTuple):
    """One worker's part of a round. places_B: positions in the list of images, int64. outputs: float32, a row for each."""

    places_B: Tensor
    outputs: Tensor


def batch_size(model: ModelConfig) -> int:
    """Images that a worker takes in one round. It depends on nothing but the model: rounding does, too."""
    return max(1, min(_MAX_BATCH, _MAX_TOKENS // model.num_patches))


def num_rounds(num_images: int, model: ModelConfig, world: World) -> int:
    """Rounds that `num_images` need."""
    return math.ceil(num_images / (batch_size(model) * world.size))


def measured_rounds(
    forward: Callable[[Tensor], Tensor],
    source: ImageSource,
    members: list[int],
    *,
    model: ModelConfig,
    normalize: NormalizeConfig,
    world: World,
    num_threads: int,
    skipped: SkippedImages,
) -> Iterator[Measured]:
    """What `forward` makes of the images `members` of `source`, each once, centre-cropped; unreadable ones are left out.

    Batches are the same for any number of workers, who take them in turn, and so their outputs are equal bit for bit. Every worker calls
    `forward` once in each round, even where it has no image: the forward of a sharded module (FSDP2) is a collective.

    Args:
        forward: images (B, C, H, W) to a tensor of B rows; called without gradients, in bfloat16 where the device has it.
        skipped: gets the unreadable images that this worker met.
    """
    size = batch_size(model)
    for first in range(0, len(members), size * world.size):
        start = first + world.rank * size
        places = range(start, min(start + size, len(members)))
        place_of = {members[place]: place for place in places}
        batches = list(  # one, or none
            measured_batches(source, list(place_of), size=model.image_size, batch_size=size, num_threads=num_threads, skipped=skipped)
        )
        if batches:
            images_BCHW = normalise(batches[0].pixels_BHWC.to(world.device), normalize)
        else:
            images_BCHW = torch.zeros(1, model.in_chans, *model.image_size, device=world.device)
        with torch.no_grad(), autocast(world.device):
            outputs = forward(images_BCHW).float()
        found = [place_of[sample] for batch in batches for sample in batch.samples_B.tolist()]
        yield Measured(torch.tensor(found, dtype=torch.int64, device=world.device), outputs[: len(found)])


def newly_skipped(skipped: SkippedImages, world: World) -> dict[str, str]:
    """Unreadable images that any worker has met since the last call, and why; the same on all workers, who all must call."""
    return {key: why for worker in world.gather(skipped.take_new()) for key, why in worker.items()}


def stop_agreed(wants_stop: WantsStop, world: World) -> bool:
    """Whether any worker wants to stop; the same on all workers, who all must call."""
    return world.sum(torch.tensor([float(wants_stop())], device=world.device)).item() > 0
