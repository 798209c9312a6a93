"""The files of a training state: safetensors written by torch.distributed.checkpoint, read back by any number of workers.

Each worker writes one file, whose header says where its tensors lie in the whole. So a state can be read by another number of workers,
and a sharded one into whole tensors and the other way round. Nothing here reads a pickle from a file.

Takes half a second to import: a run does so at its first save, beside the training.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
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
from torch.futures import Future

from mae_core.checkpoint import Group, State, gather
from mae_core.errors import EncoderError
from mae_core.export import check_tensors

_FILE = "state-{rank:05d}.safetensors"


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


@contextmanager
def _told_to_all(kind: type[Exception], what: str) -> Iterator[None]:
    """torch tells all workers what went wrong on one, by an exception that nobody catches."""
    try:
        yield
    except CheckpointException as error:
        told = "; ".join(f"worker {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
        raise kind(f"{what}: {told}") from error
