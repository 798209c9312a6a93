"""Saves and commits over a real S3 server that is refused, slow, full, cut at random, or fails after it has committed."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mae_core.state_files import read_state
from mae_core.world import World
from service.local import Seaweedfs
from tests.faults.proxy import ChaosProxy, Faults
from tests.integration.runs import wait_for
from tests.unit.saving import PREFIX, Saving, saving
from workers import objects, uploads
from workers.contract import StorageRef
from workers.objects import ObjectStore

NUM_VALUES = 3_000_000  # 12 MB: uploaded in two parts


@pytest.fixture
def proxy(seaweedfs: Seaweedfs) -> Iterator[ChaosProxy]:
    proxy = ChaosProxy(int(seaweedfs.endpoint.rpartition(":")[2]), seed=3)
    yield proxy
    proxy.close()


@pytest.fixture
def store(seaweedfs: Seaweedfs, proxy: ChaosProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)
    monkeypatch.setattr(objects, "_RETRY_SECONDS", (0.1,))
    monkeypatch.setattr(uploads, "_TRY_SECONDS", 0.3)
    monkeypatch.setattr(uploads, "_PAUSE_SECONDS", 0.1)
    return ObjectStore(StorageRef(endpoint=proxy.url, bucket=bucket))


@pytest.fixture
def parts(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Saving]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parts = saving(World(), tmp_path, store)
    yield parts
    parts.uploads.close(60)


def save(parts: Saving, step: int) -> None:
    parts.saver.save(step, {"module.weight": torch.full((NUM_VALUES,), float(step)), "step": torch.tensor(step)})
    parts.saver.wait()


def steps_told(parts: Saving, kind: str) -> list[int]:
    return [data["step"] for told, data in parts.told.events if told == kind]


@pytest.mark.parametrize("faults", [Faults(refuse=True), Faults(write_status=507)], ids=["down", "full"])
def test_what_storage_does_not_take_comes_later(proxy: ChaosProxy, store: ObjectStore, parts: Saving, faults: Faults) -> None:
    with proxy.having(faults):
        for step in (3, 6):
            save(parts, step)
            wait_for(lambda step=step: step in steps_told(parts, "upload_delayed"), seconds=60, what="that it waits")  # type: ignore[misc]
        assert proxy.num_faults > 0
    assert parts.uploads.wait(60)
    assert steps_told(parts, "training_state_committed") == [6]
    assert "upload_recovered" in parts.told.kinds()
    check_newest(store, 6)


@pytest.mark.parametrize(
    "faults",
    [Faults(chunk_seconds=0.002), Faults(lose_answers=0.5), Faults(cut_within_bytes=20_000_000)],
    ids=["slow", "answers lost", "cut"],
)
def test_what_storage_takes_badly_is_whole(proxy: ChaosProxy, store: ObjectStore, parts: Saving, faults: Faults) -> None:
    with proxy.having(faults):
        for step in range(1, 6):
            save(parts, step)
            assert parts.uploads.wait(120)
        check_newest(store, 5)
    assert steps_told(parts, "training_state_committed") == [1, 2, 3, 4, 5]
    assert faults.chunk_seconds or proxy.num_faults > 0


def check_newest(store: ObjectStore, step: int) -> None:
    newest = store.training_states(PREFIX)[0]
    assert f"step={step:010d}-" in newest
    with tempfile.TemporaryDirectory() as folder:
        store.fetch_training_state(newest, Path(folder))
        into = {"module.weight": torch.zeros(NUM_VALUES), "step": torch.tensor(0)}
        read_state(into, Path(folder), None)
    assert torch.equal(into["module.weight"], torch.full((NUM_VALUES,), float(step)))
