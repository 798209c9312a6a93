"""The processes of one run, and the few words they exchange outside of the gradients."""

from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among the run's workers. With one worker no process group is needed."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's `values`, on all ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in order of rank. For rare, small things: it pickles."""
        if self.size == 1:
            return [value]
        gathered: list[T | None] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered  # type: ignore[return-value]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device has it, else float32. Never float16: its range makes ViT-H's attention overflow."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocasts(device))


def autocasts(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by itself."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
