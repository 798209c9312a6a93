"""Training states on disk: every tensor comes back bit for bit, for any number of workers, whole or in shards."""

import json
import struct
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mae_core.checkpoint import Stager, State, saving_group
from mae_core.errors import EncoderError
from mae_core.state_files import read_state, write_state
from mae_core.world import World
from tests.unit.forked import in_workers

SHAPES = {"module.weight": (7, 5), "module.bias": (3,), "module.scale": (1, 1, 64), "optimizer.weight.exp_avg": (7, 5)}
TIMEOUT = timedelta(seconds=60)


def whole_state(*, fill: float | None = None) -> State:
    """Plain tensors, always the same; or all `fill`."""
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    state |= {"module.half": torch.randn(4, 4, generator=generator).bfloat16(), "optimizer.weight.step": torch.tensor(12.0)}
    state |= {"step": torch.tensor(2**40 + 1)}
    return state if fill is None else {name: torch.full_like(tensor, fill) for name, tensor in state.items()}


def sharded(state: State, world: World) -> State:
    """As FSDP2 has it: parameters and moments in shards of rows, counters plain."""
    mesh = init_device_mesh("cpu", (world.size,))
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() else tensor for name, tensor in state.items()}


def save(world: World, folder: Path, in_shards: bool) -> list[str]:
    """Saves from all workers; returns what this one wrote."""
    state = sharded(whole_state(), world) if in_shards else whole_state()
    group = saving_group(world, timeout=TIMEOUT)
    own = folder / str(world.rank)
    write_state(Stager(world).stage(state), own, group)
    [file] = own.iterdir()
    names = list(load_file(file))
    file.rename(folder / file.name)
    own.rmdir()
    world.gather(None)
    return names


def load(world: World, folder: Path, in_shards: bool) -> dict[str, Tensor]:
    """The state as read by this worker, in whole."""
    into = sharded(whole_state(fill=-1), world) if in_shards else whole_state(fill=-1)
    before = dict(into)
    read_state(into, folder, saving_group(world, timeout=TIMEOUT))
    assert all(into[name] is tensor for name, tensor in before.items()), "in place"
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in into.items()}


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])] == []


def saved_alone(folder: Path) -> Path:
    folder.mkdir()
    write_state(Stager(World()).stage(whole_state()), folder, None)
    return folder


@pytest.mark.parametrize(
    ("writers", "in_shards", "readers", "into_shards"), [(1, False, 3, True), (2, False, 1, False), (4, True, 2, True), (4, True, 2, False)]
)
def test_a_state_is_read_by_any_number_of_workers(tmp_path: Path, writers: int, in_shards: bool, readers: int, into_shards: bool) -> None:
    """The third of four workers has no row of the bias, the fourth none of the half one but the last."""
    written = in_workers(save, writers, tmp_path, tmp_path, in_shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == writers
    if not in_shards:
        assert sorted(name for names in written for name in names) == sorted(whole_state()), "each tensor is written once"
        assert all(written)
    for found in in_workers(load, readers, tmp_path, tmp_path, into_shards):
        assert_equal(found, whole_state())


def test_a_staged_state_does_not_change_and_its_memory_is_used_again() -> None:
    stager, state = Stager(World()), whole_state()
    staged = stager.stage(state)
    before = {name: tensor.data_ptr() for name, tensor in staged.items()}
    for tensor in state.values():
        tensor.zero_()
    assert_equal(staged, whole_state())
    again = stager.stage(state)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == before
    assert_equal(again, whole_state(fill=0))


def test_the_share_of_each_worker_is_about_equal() -> None:
    state = {f"weight {number}": torch.zeros(number + 1) for number in range(20)}
    shares = [Stager(World(rank, 3)).stage(state) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(state)
    sizes = [sum(tensor.numel() for tensor in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"module.weight": torch.zeros(7, 6)}, r"module.weight has shape \(7, 5\), not \(7, 6\)"),
        ({"module.extra": torch.zeros(2)}, r"module.extra is missing"),
        ({"module.bias": None}, r"module.bias is not part of this model"),
        ({"module.half": torch.zeros(4, 4)}, r"module.half is bfloat16, not float32"),
        ({"module.bias": torch.zeros(1), "step": None}, r"step is not part of this model; module.bias has shape \(3,\), not \(1,\)"),
    ],
)
def test_a_state_of_another_model_says_which_tensors_differ(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    into = {name: tensor for name, tensor in (whole_state(fill=0) | changes).items() if tensor is not None}
    with pytest.raises(EncoderError, match=rf"^the training state in .*state does not fit: {said}$"):
        read_state(into, saved_alone(tmp_path / "state"), None)
    assert all(not tensor.any() for tensor in into.values()), "nothing was read"


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    [file] = saved_alone(tmp_path / "state").iterdir()
    content = file.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"\xff" * 200, struct.pack("<Q", 4) + b"{}  "):
        file.write_bytes(damaged)
        with pytest.raises(EncoderError, match=r"the training state in .* (cannot be read|does not fit): "):
            read_state(whole_state(fill=0), tmp_path / "state", None)
    with pytest.raises(EncoderError, match="cannot be read"):
        read_state(whole_state(fill=0), tmp_path / "nowhere", None)


def test_a_file_that_is_missing_leaves_no_holes(tmp_path: Path) -> None:
    in_workers(save, 4, tmp_path, tmp_path, True)
    (tmp_path / "state-00002.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"module\.weight is not whole"):
        read_state(whole_state(fill=0), tmp_path, None)


def load_where_one_has_a_damaged_copy(world: World, folder: Path) -> str:
    into = whole_state(fill=0)
    try:
        read_state(into, folder / str(world.rank), saving_group(world, timeout=TIMEOUT))
    except EncoderError as error:
        return str(error)
    return "read"


def test_all_workers_learn_that_one_cannot_read(tmp_path: Path) -> None:
    for rank in range(2):
        saved_alone(tmp_path / str(rank))
    [file] = (tmp_path / "1").iterdir()
    file.write_bytes(b"short")
    first, second = in_workers(load_where_one_has_a_damaged_copy, 2, tmp_path, tmp_path)
    assert first == second
    assert "/1 cannot be read: " in first


def save_where_one_has_no_place(world: World, folder: Path) -> list[str]:
    """The first save fails, the second does not."""
    stager, group, said = Stager(world), saving_group(world, timeout=TIMEOUT), []
    (folder / "file").touch()
    for place in (folder / "file" if world.rank == 1 else folder / "0", folder / f"again-{world.rank}"):
        try:
            write_state(stager.stage(whole_state()), place, group)
            said.append("written")
        except OSError as error:
            said.append(str(error))
    return said


def test_all_workers_learn_that_one_cannot_write_and_the_next_save_succeeds(tmp_path: Path) -> None:
    for said in in_workers(save_where_one_has_no_place, 2, tmp_path, tmp_path):
        assert "worker 1: " in said[0]
        assert said[1] == "written"


def test_a_file_says_where_its_tensors_lie_and_can_be_read_by_anything(tmp_path: Path) -> None:
    in_workers(save, 2, tmp_path, tmp_path, True)
    with safe_open(tmp_path / "state-00001.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("module.weight"), whole_state()["module.weight"][4:])
        offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    assert offsets["module.weight"] == {"saved_offsets": [4, 0]}
