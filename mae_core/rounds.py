"""Measuring in rounds: what a module makes of each image of a list, shared between the workers, who can stop or tell after every round.

Shapes: B images, C channels, H and W pixels.
"""

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mae_core.data.loader import measured_batches
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import ImageSource
from mae_core.data.transforms import normalise
from mae_core.loop import Progress, Training, WantsStop
from mae_core.options import ModelConfig, NormalizeConfig
from mae_core.world import World, autocast

T = TypeVar("T")

_MAX_BATCH = 256
_MAX_TOKENS = 65_536  # of a batch, so that large images do not need more memory than many small ones


class Measured(NamedTuple):
    """One worker's part of a round. places_B: positions in the list of images, int64. outputs: float32, a row for each.

    wait_seconds: how long the module waited for the images.
    """

    places_B: Tensor
    outputs: Tensor
    wait_seconds: float


class Round(NamedTuple):
    """What is told of a round. wait_seconds: how long this worker waited for its images. scored: scores_BK and labels_B, if any."""

    wait_seconds: float
    scored: tuple[Tensor, Tensor] | None = None


def batch_size(model: ModelConfig) -> int:
    """Images that a worker takes in one round. It depends on nothing but the model: rounding does, too."""
    return max(1, min(_MAX_BATCH, _MAX_TOKENS // model.num_patches))


def num_rounds(num_images: int, model: ModelConfig, world: World) -> int:
    """Rounds that `num_images` need."""
    return math.ceil(num_images / (batch_size(model) * world.size))


def measured_rounds(
    forward: Callable[[Tensor], Tensor],
    source: ImageSource,
    members: Sequence[int],
    *,
    model: ModelConfig,
    normalize: NormalizeConfig,
    world: World,
    num_threads: int,
    skipped: SkippedImages,
    at_once: int | None = None,
) -> Generator[Measured]:
    """What `forward` makes of the images `members` of `source`, each once, centre-cropped; unreadable ones are left out.

    Batches are the same for any number of workers, who take them in turn, and so their outputs are equal bit for bit. Every worker calls
    `forward` once in each round, even where it has no image: the forward of a sharded module (FSDP2) is a collective.

    Args:
        forward: images (B, C, H, W) to a tensor of B rows; called without gradients, in bfloat16 where the device has it.
        skipped: gets the unreadable images that this worker met.
        at_once: images of a batch; None: as `batch_size` says.
    """
    size = at_once or batch_size(model)
    starts = range(world.rank * size, len(members) + world.rank * size, size * world.size)
    shares = [range(start, min(start + size, len(members))) for start in starts]  # places of each round; in the last one perhaps none
    own = [members[place] for places in shares for place in places]
    with closing(
        measured_batches(source, own, size=model.image_size, batch_size=size, num_threads=num_threads, skipped=skipped)
    ) as batches:
        for places in shares:
            started = time.monotonic()
            batch = next(batches, None)
            wait_seconds = time.monotonic() - started
            if batch is not None:
                images_BCHW = normalise(batch.pixels_BHWC.to(world.device), normalize)
            else:
                images_BCHW = torch.zeros(1, model.in_chans, *model.image_size, device=world.device)
            with torch.no_grad(), autocast(world.device):
                outputs = forward(images_BCHW).float()
            place_of = {members[place]: place for place in places}
            found = [place_of[sample] for sample in batch.samples_B.tolist()] if batch is not None else []
            yield Measured(torch.tensor(found, dtype=torch.int64, device=world.device), outputs[: len(found)], wait_seconds)


def newly_skipped(skipped: SkippedImages, world: World) -> dict[str, str]:
    """Unreadable images that any worker has met since the last call, and why; the same on all workers, who all must call."""
    return {key: why for worker in world.gather(skipped.take_new()) for key, why in worker.items()}


def stop_agreed(wants_stop: WantsStop, world: World) -> bool:
    """Whether any worker wants to stop; the same on all workers, who all must call."""
    return stop_and_wait(wants_stop, 0.0, world)[0]


def stop_and_wait(wants_stop: WantsStop, wait_seconds: float, world: World) -> tuple[bool, float]:
    """Whether any worker wants to stop, and the mean of their `wait_seconds`; the same on all workers, who all must call."""
    stops, waited = world.sum(torch.tensor([float(wants_stop()), wait_seconds], device=world.device)).tolist()
    return stops > 0, waited / world.size


def told_in_rounds(
    measuring: Generator[Round | None, None, T], training: Training, wants_stop: WantsStop
) -> Generator[Progress, None, T | None]:
    """What `measuring` finds between two steps of `training`; None where the workers agreed to stop before. Tells progress by the round."""
    epoch = training.step / training.loader.steps_per_epoch
    while True:
        try:
            next(measuring)
        except StopIteration as done:
            found: T = done.value
            return found
        stop = stop_agreed(wants_stop, training.world)
        yield Progress(training.step, training.num_steps, epoch, stop_agreed=stop)
        if stop:
            return None
