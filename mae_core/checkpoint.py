"""Training state in memory, staged for the files of `state_files`, which are written beside the training.

A state is a flat dictionary of tensors: plain ones, which all workers hold alike (DDP), and DTensors, of which each holds a shard (FSDP2).
"""

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mae_core.sharded import is_shard
from mae_core.world import World

T = TypeVar("T")
State = dict[str, Tensor]
Group = dist.ProcessGroup | None  # None: one worker alone


def saving_group(world: World, *, timeout: timedelta) -> Group:
    """The group in which states are saved beside the training, whose own collectives go on meanwhile. Made by all workers at once."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout)) if world.size > 1 else None


class SavesBeside:
    """Saves states in a thread, one at a time: the training waits until a state is staged, never for a disk or the network.

    `write(step, staged)` runs in the thread and raises nothing. Where it is collective, all workers begin a save together, and only when
    none of them is busy with the last one: the training's exchange agrees on that by `is_ready`.
    """

    def __init__(self, world: World, write: Callable[[int, State], None]) -> None:
        self._stager = Stager(world)
        self._write = write
        self._thread: threading.Thread | None = None

    def is_ready(self) -> bool:
        """Whether no save is under way here."""
        return self._thread is None or not self._thread.is_alive()

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Begins to save `state`, which may change as soon as this returns."""
        assert self.is_ready(), "its buffers are being written"
        staged = self._stager.stage(state)
        self._thread = threading.Thread(target=self._write, args=(step, staged), name="saver", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Waits up to `seconds` (None: as long as it takes) for a save that is under way."""
        if self._thread is not None:
            self._thread.join(seconds)


class Stager:
    """Copies states into memory of the host that is kept and used again: this copy is all that a training step waits for."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._buffers: State = {}

    def stage(self, state: Mapping[str, Tensor]) -> State:
        """This worker's part of `state`: its shards, and its share of what all hold alike. Valid until the next call."""
        share = self._share(state)
        mine = {name: tensor.detach() for name, tensor in state.items() if is_shard(tensor) or name in share}
        staged = {name: self._copy(name, tensor) for name, tensor in mine.items()}
        if self._world.device.type == "cuda":
            torch.cuda.current_stream(self._world.device).synchronize()
        return staged

    def _share(self, state: Mapping[str, Tensor]) -> set[str]:
        """Names of the plain tensors that this worker writes: the largest first, each to whoever has the least so far."""
        plain = {name: tensor.nbytes for name, tensor in state.items() if not is_shard(tensor)}
        loads, shares = [0] * self._world.size, [set[str]() for _ in range(self._world.size)]
        for name in sorted(plain, key=lambda name: (-plain[name], name)):
            rank = loads.index(min(loads))
            loads[rank] += plain[name]
            shares[rank].add(name)
        return shares[self._world.rank]

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if is_shard(tensor) else tensor
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = self._buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        buffer.copy_(local, non_blocking=True)
        if not is_shard(tensor):
            return buffer
        # from_local would bring the copy back to the devices of the mesh
        return cast(Tensor, type(tensor)(buffer, tensor._spec, requires_grad=False))


def gather(value: T, group: Group) -> list[T]:
    """Every worker's `value`, in order of rank, over the saving group. It pickles, from worker to worker."""
    if group is None:
        return [value]
    gathered: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return cast(list[T], gathered)
