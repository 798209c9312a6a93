"""Every benchmark runs at its smallest size, and says what it should."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import (
    cheap_pretraining,
    checkpoint_stall,
    cifar10,
    dispatch,
    embed,
    export,
    hour,
    images,
    ingest,
    list_jobs,
    packed,
    reattach,
    recover,
    resume_at,
    series,
    start_up,
    stream,
    submit,
    told,
    train_step,
    watchers,
)
from mae_core.options import ARCH_SIZES, ModelConfig
from service.local import Seaweedfs, storage_environment
from tests.conftest import LiveService
from tests.stand_in.stage import Stage, stage
from tests.unit.core_fixtures import SHALLOW
from workers.contract import StorageRef
from workers.remote import CACHE_FOLDER_VARIABLE


def test_cifar10(live_service: LiveService, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "DATA", data_dir)
    folders = cifar10.prepare(tmp_path, num_train=8, num_labelled=4, num_test=4)
    assert {name: len(list(folder.rglob("*.jpg"))) for name, folder in folders.items()} == {"train": 80, "labelled": 40, "test": 40}
    jobs = cifar10.compare(live_service.client, folders, epochs=2, finetune_epochs=2, batch_size=16)
    accuracy = cifar10.line(jobs)
    assert accuracy["ours"] == jobs["finetune"]["metrics"]["val_accuracy"]
    assert accuracy["peer"] == jobs["scratch"]["metrics"]["val_accuracy"]


def test_checkpoint_stall(seaweedfs: Seaweedfs, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.secret_key)
    storage = StorageRef(endpoint=seaweedfs.endpoint, bucket=bucket)
    smallest = {"arch": "vit_tiny_patch16", "image_size": 32, "batch_size": 2, "threads": 1, "num_saves": 1, "steps_per_save": 2}
    line = checkpoint_stall.measure(tmp_path, storage, **smallest)  # type: ignore[arg-type]
    assert (line["num_saves"], line["steps_per_save"]) == (1, 2)
    assert line["bytes"] > 50_000_000
    assert line["ratio"] == line["ours"] / line["peer"]
    assert 0 < line["wait_seconds_per_save"]["beside"]["max"] < line["save_seconds"]["beside"]["max"]
    assert (
        len(seaweedfs.client().list_objects_v2(Bucket=bucket)["Contents"]) == 6
    )  # three states, each of a file and a manifest: workers delete none


def test_embed(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "DATA", data_dir)
    model = ModelConfig(arch="vit_tiny_patch16", image_size=32)
    (tmp_path / "encoder").mkdir()
    line = embed.compare(tmp_path / "encoder", model=model, batch_size=2, rounds=2)
    assert line["ratio"] == line["ours"] / line["peer"]
    assert line["cpu"]["ratio"] == line["cpu"]["ours"] / line["cpu"]["peer"]
    whole = embed.whole_path(embed.photos(tmp_path / "photos", 5), tmp_path / "parts", model=model, batch_size=2)
    assert whole["images"] == 5
    assert (tmp_path / "parts" / "part-00000.parquet").exists()


def test_images(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "DATA", data_dir)
    line = images.measure(images.unpacked(tmp_path, num_images=4), num_rounds=1)
    assert line["ratio"] == line["ours"] / line["peer"]
    assert {"ours", line["peer_name"], *line["others"]} == set(images.WAYS)
    assert min(line["others"].values()) > 0
    assert line["differences"]["ours"]["worst"] < line["differences"][line["peer_name"]]["mean"]


def test_start_up(live_service: LiveService, tmp_path: Path) -> None:
    line = start_up.measure(live_service.installation, live_service.client, tmp_path, num_workers=1, repeats=1, num_unmeasured=0)
    assert line["ratio"] == line["ours"] / line["peer"]
    for side, stages in line["stages"].items():
        seconds = list(stages.values())
        assert seconds == sorted(seconds)
        assert 0 < seconds[0] < seconds[-1] == line[side]
    assert list(line["stages"]["ours"]) == list(start_up.STAGES)


def test_recover(live_service: LiveService, tmp_path: Path) -> None:
    line = recover.worker_killed(live_service.installation, live_service.client, tmp_path, num_workers=1, repeats=1, num_unmeasured=0)
    assert line["ratio"] == line["ours"] / line["peer"]
    assert min(line["ours"], line["peer"]) > 0
    lost = recover.machine_lost(live_service.installation, live_service.client, repeats=1)
    assert lost["value"] > 0
    assert lost["seconds"] == [lost["value"]]


def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)
    line = export.measure(tmp_path, model=ModelConfig(arch="vit_tiny_patch16", image_size=32), batch_size=2, rounds=2)
    assert line["ratio"] == line["ours"] / line["peer"]
    assert line["others"].keys() == {"onnx", "torch-export", "hf"}
    assert set(line["max_difference"]) == {"ours", "timm", *line["others"]}


def test_train_step() -> None:
    line = train_step.measure(arch="vit_tiny_patch16", image_size=32, batch_size=2, threads=1, steps=1, turns=1, device="cpu")
    assert line["ratio"] == line["ours"] / line["peer"]
    assert set(line["details"]) == {"ours", "peer", "peer_with_our_allocator"}
    assert all(side["of_matmul"] > 0 and side["peak_mib"] > 0 for side in line["details"].values())


def test_cheap_pretraining(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "DATA", data_dir)
    folders = cifar10.prepare(tmp_path / "data", num_train=16, num_labelled=26, num_test=2)
    model = ModelConfig(arch="vit_tiny_patch16", image_size=32)
    lines = cheap_pretraining.measure(folders, tmp_path / "runs", epochs=1, seeds=1, model=model, batch_size=2, turns=1)
    assert [line["way"] for line in lines] == ["cross, all", "cross, half", "cross, quarter"]
    for line in lines:
        assert line["ratio"] == line["ours"] / line["peer"]
        assert line["step"]["ratio"] == line["step"]["ours"] / line["step"]["peer"]
        assert [len(each) for each in line["probe"].values()] == [1, 1]


@pytest.fixture(params=["sqlite", "postgresql"])
def on_stand_in(request: pytest.FixtureRequest, seaweedfs: Seaweedfs, run_mark: str, tmp_path: Path) -> Iterator[Stage]:
    """A service on the stand-in of Ray's Jobs API."""
    postgres = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    with stage(
        tmp_path, storage=seaweedfs, postgres=postgres, run=run_mark, num_cpus=dispatch.NUM_CPUS, secret_key=told.SECRET_KEY
    ) as made:
        yield made


def test_reattach(on_stand_in: Stage) -> None:
    line = reattach.measure(on_stand_in, num_jobs=12, repeats=1)
    assert (line["num_jobs"], line["database"], line["repeats"]) == (12, on_stand_in.database, [line["value"]])
    assert 0 < line["first_job"] <= line["value"]


def test_dispatch(on_stand_in: Stage) -> None:
    line = dispatch.measure(on_stand_in, num_waiting=3, num_jobs=3)
    assert (line["num_jobs"], line["num_waiting"], line["database"]) == (3, 3, on_stand_in.database)
    assert 0 < line["from_attempt_created"]["p95"] < line["value"]
    assert line["p50"] <= line["value"]
    assert len(on_stand_in.ray.history()) == 3  # those that do not fit were not submitted


def test_watchers(on_stand_in: Stage) -> None:
    line = watchers.measure(on_stand_in, num_clients=6, num_events=20, per_second=50)
    assert (line["num_clients"], line["num_messages"], line["database"]) == (6, 3 * 20 + 3, on_stand_in.database)
    assert 0 < line["p50"] <= line["value"] <= line["max"]
    assert 0 < line["rss_mib"]["without_clients"] <= line["rss_mib"]["value"]


def test_ingest(on_stand_in: Stage) -> None:
    line = ingest.measure(on_stand_in, num_steps=2, num_reports=33)
    assert (line["points_per_report"], line["num_reports"], line["database"]) == (10, 4 * 33, on_stand_in.database)
    assert line["value"] == pytest.approx(10 * line["reports_per_second"], rel=0.01)
    assert 0 < line["seconds_per_report"]["p50"] <= line["seconds_per_report"]["p95"]


def test_series(on_stand_in: Stage) -> None:
    line = series.measure(on_stand_in, num_reports=2, num_reads=2, max_points=100)
    assert (line["num_points"], line["num_series"], line["database"]) == (2000, 5, on_stand_in.database)
    assert 0 < line["p50"] <= line["value"]
    assert line["bytes"] < 100 * 40


def test_list_jobs(on_stand_in: Stage) -> None:
    first, second = list_jobs.measure(on_stand_in, sizes=(60, 120), repeats=2)
    assert (first["num_jobs"], second["num_jobs"], first["database"]) == (60, 120, on_stand_in.database)
    assert {"first page", "next page", "text: one job", "all together", "an unchanged job (304)"} <= set(first["questions"])
    assert first["value"] == max(each["p95"] for each in first["questions"].values())
    assert 1000 < first["bytes"] < list_jobs.GOAL_BYTES


def test_hour(on_stand_in: Stage) -> None:
    line = hour.measure(on_stand_in, seconds=10, num_long_jobs=2)
    assert (line["num_jobs"], line["num_requests_of_users"], line["database"]) == (3, 2 + 1 + 3 * 3 * 5 + 10, on_stand_in.database)
    for process in ("api", "dispatcher"):
        assert min(line[process]["before"], line[process]["after"]) > 0


def test_submit(on_stand_in: Stage) -> None:
    line = submit.measure(on_stand_in, seconds=0.1, rates=[60])
    assert (line["num_jobs"], line["database"], list(line["p95_per_rate"])) == (5, on_stand_in.database, [60])
    assert 0 < line["p50"] <= line["value"]


def test_packed(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "DATA", data_dir)
    (tmp_path / "photographs").mkdir()
    images.unpacked(tmp_path / "photographs", num_images=3)
    line = packed.measure(tmp_path / "photographs", tmp_path / "packed", resize=256, num_rounds=1)
    assert line["num_images"] == 3
    assert line["ratio"] == line["ours"] / line["peer"]
    assert 0 < line["differences"]["mean"] <= line["differences"]["worst"] < 20
    assert line["bytes_per_image"] < line["bytes_per_photograph"]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # WebDataset leaves pipes open
def test_stream(seaweedfs: Seaweedfs, bucket: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "DATA", data_dir)
    for name in (*storage_environment(seaweedfs), CACHE_FOLDER_VARIABLE):
        monkeypatch.setenv(name, "set by the benchmark")
    line = stream.measure(tmp_path / "data", seaweedfs, bucket, num_photographs=4, copies=1, threads=1, num_rounds=1)
    assert (line["num_images"], line["num_shards"]) == (4, 1)
    assert line["ratio"] == line["ours"] / line["peer"]
    assert min(line[name] for name in ("ours", "warm", "local", "peer")) > 0
    gc.collect()


def test_resume_at(tmp_path: Path) -> None:
    line = resume_at.measure(tmp_path / "index", 10_000, peer_up_to=10_000)
    assert line["samples"] == 100 * 4096
    assert line["ratio"] == line["peer"] / line["ours"]
