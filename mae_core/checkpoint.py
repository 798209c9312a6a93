"""Training state on disk: staged in memory, written as safetensors by torch.distributed.checkpoint, read back by any number of workers.

A state is a flat dictionary of tensors: plain ones, which all workers hold alike (DDP), and DTensors, of which each holds a shard (FSDP2).
Each worker writes one file, whose header says where its tensors lie in the whole. So a state can be read by another number of workers,
and a sharded one into whole tensors and the other way round. Nothing here reads a pickle from a file.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from mae_core.errors import EncoderError
from mae_core.export import check_tensors
from mae_core.world import World

T = TypeVar("T")
State = dict[str, Tensor]
Group = dist.ProcessGroup | None  # None: one worker alone

_FILE = "state-{rank:05d}.safetensors"


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
        mine = {name: tensor.detach() for name, tensor in state.items() if isinstance(tensor, DTensor) or name in share}
        staged = {name: self._copy(name, tensor) for name, tensor in mine.items()}
        if self._world.device.type == "cuda":
            torch.cuda.current_stream(self._world.device).synchronize()
        return staged

    def _share(self, state: Mapping[str, Tensor]) -> set[str]:
        """Names of the plain tensors that this worker writes: the largest first, each to whoever has the least so far."""
        plain = {name: tensor.nbytes for name, tensor in state.items() if not isinstance(tensor, DTensor)}
        loads, shares = [0] * self._world.size, [set[str]() for _ in range(self._world.size)]
        for name in sorted(plain, key=lambda name: (-plain[name], name)):
            rank = loads.index(min(loads))
            loads[rank] += plain[name]
            shares[rank].add(name)
        return shares[self._world.rank]

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = self._buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        buffer.copy_(local, non_blocking=True)
        if not isinstance(tensor, DTensor):
            return buffer
        # from_local would bring the copy back to the devices of the mesh
        return cast(Tensor, DTensor(buffer, tensor._spec, requires_grad=False))  # type: ignore[no-untyped-call]


def write_state(staged: State, folder: Path, group: Group) -> None:
    """Writes this worker's file of a state into `folder`. Collective over `group`; raises OSError on all workers where one cannot write."""
    # torch's own save() warns of one worker alone, and a thread cannot silence a warning without the other threads
    with _told_to_all(OSError, f"the training state cannot be written to {folder}"):
        _save_state_dict(
            staged,
            _Writer(str(folder), save_distributed=True),
            process_group=group,
            no_dist=group is None,
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )


def read_state(into: State, folder: Path, group: Group) -> None:
    """Fills the tensors of `into` with the state in `folder`, of all workers' files. Collective over `group`.

    Raises EncoderError, on all workers at once, where a file is damaged or missing, or tensors differ in name, shape or type.
    """
    where = f"the training state in {folder}"
    faults = [fault for fault in gather(_fault(into, folder, where=where), group) if fault]
    if faults:
        raise EncoderError(faults[0])
    with _told_to_all(EncoderError, f"{where} cannot be read"):
        _load_state_dict(
            into,
            HuggingFaceStorageReader(str(folder)),
            process_group=group,
            no_dist=group is None,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )


class _Writer(HuggingFaceStorageWriter):
    """torch's, but one that writes tensors from where they lie: its own copies the whole file in one call that stops all threads."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        if plan.items:
            assert isinstance(planner, DefaultSavePlanner)
            tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)).contiguous() for item in plan.items}
            assert len(tensors) == len(plan.items), "a worker has one shard of a tensor"
            offsets = {item.index.fqn: {SAVED_OFFSETS_KEY: list(_offsets(item))} for item in plan.items}
            rank = plan.storage_data["shard_index"] - 1
            save_file(
                tensors, Path(self.path) / _FILE.format(rank=rank), metadata={"format": "pt", CUSTOM_METADATA_KEY: json.dumps(offsets)}
            )
        written.set_result([])
        return written


def _offsets(item: WriteItem) -> torch.Size:
    assert item.tensor_data is not None, "a state has nothing but tensors"
    return item.tensor_data.chunk.offsets


def _fault(into: State, folder: Path, *, where: str) -> str | None:
    """What keeps the files in `folder` from being read into `into`, by their headers."""
    try:
        found = cast(dict[str, TensorStorageMetadata], HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
        given = {name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for name, entry in found.items()}
        check_tensors(given, into, where=where)
    except EncoderError as error:
        return str(error)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        return f"{where} cannot be read: {error}"
    holes = [f"{name} is not whole" for name, entry in found.items() if _num_saved(entry) != math.prod(entry.size)]
    return f"{where} is damaged: {'; '.join(holes[:8])}" if holes else None


def _num_saved(entry: TensorStorageMetadata) -> int:
    return sum(math.prod(chunk.sizes) for chunk in entry.chunks)


def gather(value: T, group: Group) -> list[T]:
    """Every worker's `value`, in order of rank, over the saving group. It pickles, from worker to worker."""
    if group is None:
        return [value]
    gathered: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return cast(list[T], gathered)


@contextmanager
def _told_to_all(kind: type[Exception], what: str) -> Iterator[None]:
    """torch tells all workers what went wrong on one, by an exception that nobody catches."""
    try:
        yield
    except CheckpointException as error:
        told = "; ".join(f"worker {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise kind(f"{what}: {told}") from error
