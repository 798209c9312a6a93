"""Who is sharded by FSDP2. Its classes take half a second to import: where nobody has, nothing is."""

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_shard(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each worker holds a part of `tensor`."""
    return _is_a("torch.distributed.tensor", "DTensor", tensor)


def is_sharded(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether the parameters of `module` are shards."""
    return _is_a("torch.distributed.fsdp", "FSDPModule", module)


def _is_a(library: str, name: str, value: object) -> bool:
    loaded = sys.modules.get(library)
    return isinstance(value, getattr(loaded, name, ()))  # (): a thread may just be importing it
