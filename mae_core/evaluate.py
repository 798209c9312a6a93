"""Accuracy on held-back images, shared between the workers."""

import torch
from torch import nn

from mae_core.data.loader import SkippedImages, measured_batches
from mae_core.data.source import LabelledData
from mae_core.data.transforms import normalise
from mae_core.errors import DataError
from mae_core.loop import autocast
from mae_core.options import NormalizeConfig
from mae_core.world import World

_BATCH = 256


@torch.inference_mode()
def accuracy(
    module: nn.Module, data: LabelledData, *, normalize: NormalizeConfig, world: World, num_threads: int, skipped: SkippedImages
) -> dict[str, float]:
    """`val_accuracy` in [0, 1] of `module`'s logits over the readable validation images, each seen once, centre-cropped.

    `skipped` gets the unreadable ones that this worker met.
    """
    counts = torch.zeros(2, dtype=torch.float64, device=world.device)
    batches = measured_batches(
        data.validation_source,
        data.validation[world.rank :: world.size],
        size=module.encoder.model.image_size,  # type: ignore[union-attr, arg-type]
        batch_size=_BATCH,
        num_threads=num_threads,
        skipped=skipped,
    )
    for batch in batches:
        with autocast(world.device):
            logits = module(normalise(batch.pixels_BHWC.to(world.device), normalize))
        hits = (logits.argmax(dim=1) == batch.labels_B.to(world.device)).sum()
        counts += torch.stack([hits, torch.tensor(len(batch.labels_B), device=world.device)])
    hits_, seen = world.sum(counts).tolist()
    if not seen:
        raise DataError("data: no validation image can be read")
    return {"val_accuracy": hits_ / seen}
