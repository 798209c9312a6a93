"""Commits, checksums and pruning on a real S3 server."""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from botocore.exceptions import ClientError

from mae_core.config import RUN_SPEC
from mae_core.errors import EncoderError
from mae_core.options import ModelConfig, NormalizeConfig
from service.local import Seaweedfs
from tests.integration.runs import Json, pretrain_spec, wait_for
from workers import objects
from workers.contract import MANIFEST, EncoderManifest, EventType, StorageRef, TrainingStateManifest, WorkOrder
from workers.failures import StorageError
from workers.objects import ObjectStore, state_folder
from workers.reporter import Reporter
from workers.saver import Saver

PREFIX = "jobs/job1/"


@pytest.fixture
def store(seaweedfs: Seaweedfs, bucket: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)
    return ObjectStore(StorageRef(endpoint=seaweedfs.endpoint, bucket=bucket))


def order(bucket: str) -> WorkOrder:
    spec = RUN_SPEC.validate_python(pretrain_spec())
    return WorkOrder(
        job="job1", attempt=1, spec=spec, token="t", service_url="http://127.0.0.1:1", storage=StorageRef(bucket=bucket), prefix=PREFIX
    )


def keys(seaweedfs: Seaweedfs, bucket: str) -> list[str]:
    return [item["Key"] for item in seaweedfs.client().list_objects_v2(Bucket=bucket).get("Contents", [])]


def encoder_manifest(**files: objects.FileEntry) -> EncoderManifest:
    model = ModelConfig(arch="vit_tiny_patch4", image_size=8, in_chans=1)  # type: ignore[arg-type]
    return EncoderManifest(
        job="job1",
        attempt=1,
        kind="pretrain",
        created_at=datetime.now(UTC),
        model=model,
        normalize=NormalizeConfig(mean=(0.5,), std=(0.5,)),
        spec=RUN_SPEC.validate_python(pretrain_spec()),
        metrics={},
        versions={},
        git_revision=None,
        files=files,
    )


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[EventType, Json]] = []

    def event(self, kind: EventType, **data: Any) -> None:
        self.events.append((kind, data))


def test_saved_states_come_back_bit_for_bit_and_old_ones_go(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> None:
    told = Told()
    saver = Saver(order(bucket), store, cast(Reporter, told), 5)
    for step in (3, 10, 200):
        (tmp_path / "picture.png").write_bytes(b"PNG")
        tensor = torch.randn(1000, generator=torch.Generator().manual_seed(step))
        saver.save(step, {"module.weight": tensor, "step": torch.tensor(step)}, tmp_path / "picture.png")
        wait_for(lambda step=step: (told.events or [(None, {"step": 0})])[-1][1]["step"] == step, seconds=30, what=f"save {step}")
        wait_for(lambda: told.events[-1][0] is EventType.RECONSTRUCTIONS_WRITTEN, seconds=30, what="its picture")
    saver.close(10)
    newest = state_folder(PREFIX, step=200, attempt=1, incarnation=5)
    found = store.newest_training_state(PREFIX)
    assert found is not None
    assert found[0] == newest
    assert torch.equal(found[1]["module.weight"], tensor)
    assert torch.equal(store.load_training_state(newest)["module.weight"], tensor)
    states = [key for key in keys(seaweedfs, bucket) if "/training_state/" in key]
    committed = [f"{state_folder(PREFIX, step=step, attempt=1, incarnation=5)}{MANIFEST}" for step in (10, 200)]
    assert [key for key in states if key.endswith(MANIFEST)] == committed
    assert len(states) == 4
    assert len(keys(seaweedfs, bucket)) == 4 + 3

    seaweedfs.client().put_object(Bucket=bucket, Key=newest + objects.STATE_FILE, Body=b"damaged")
    found = store.newest_training_state(PREFIX)
    assert found is not None
    assert found[0] == state_folder(PREFIX, step=10, attempt=1, incarnation=5)


def test_a_save_that_fails_is_not_heard_by_the_training(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr(objects, "_RETRY_SECONDS", ())
    told = Told()
    saver = Saver(order(bucket), ObjectStore(StorageRef(endpoint="http://127.0.0.1:9", bucket=bucket)), cast(Reporter, told), 5)
    saver.save(1, {"step": torch.tensor(1)})
    wait_for(lambda: "training state of step 1 could not be saved; training goes on" in caplog.text, seconds=60, what="the failure")
    saver.close(30)
    assert told.events == []


def test_a_state_without_manifest_does_not_exist(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"half")
    store.put_file(state_folder(PREFIX, step=9, attempt=1, incarnation=1) + objects.STATE_FILE, tmp_path / "state")
    assert store.newest_training_state(PREFIX) is None


def test_of_many_who_commit_one_wins(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str) -> None:
    manifest = TrainingStateManifest(job="job1", attempt=1, incarnation=1, step=1, files={}, created_at=datetime.now(UTC))
    won: list[bool] = []
    threads = [threading.Thread(target=lambda: won.append(store.commit("jobs/job1/x/", manifest))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, False, True]
    assert store.is_committed("jobs/job1/x/")
    assert not store.is_committed("jobs/job1/y/")


def test_damaged_encoder_is_refused(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    entry = store.put_file("jobs/job1/encoder/model.safetensors", tmp_path / "model.safetensors")
    assert store.commit("jobs/job1/encoder/", encoder_manifest(**{"model.safetensors": entry}))
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    store.fetch_encoder(f"s3://{bucket}/jobs/job1/encoder/", fetched)
    assert (fetched / "model.safetensors").read_bytes() == b"weights"
    seaweedfs.client().put_object(Bucket=bucket, Key="jobs/job1/encoder/model.safetensors", Body=b"w3ights")
    with pytest.raises(EncoderError, match=r"model.safetensors is damaged"):
        store.fetch_encoder(f"s3://{bucket}/jobs/job1/encoder", fetched)


def test_missing_encoder_names_what_is_missing(store: ObjectStore, seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"has no manifest.json"):
        store.fetch_encoder(f"s3://{bucket}/jobs/none/encoder/", tmp_path)
    seaweedfs.client().put_object(Bucket=bucket, Key="jobs/odd/encoder/manifest.json", Body=json.dumps({"a": 1}).encode())
    with pytest.raises(EncoderError, match=r"is not an encoder's"):
        store.fetch_encoder(f"s3://{bucket}/jobs/odd/encoder/", tmp_path)


def test_storage_that_does_not_answer_is_waited_for_then_given_up(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr(objects, "_RETRY_SECONDS", (0, 0))
    delays: list[str] = []
    away = ObjectStore(StorageRef(endpoint="http://127.0.0.1:9", bucket=bucket), delays.append)
    with pytest.raises(StorageError, match="list training states"):
        away.newest_training_state(PREFIX)
    assert len(delays) == 2


def test_a_refusal_is_not_repeated(store: ObjectStore, seaweedfs: Seaweedfs) -> None:
    other = ObjectStore(StorageRef(endpoint=seaweedfs.endpoint, bucket="no-such-bucket"), lambda _: pytest.fail("repeated"))
    with pytest.raises(ClientError, match="NoSuchBucket"):
        other.newest_training_state(PREFIX)
