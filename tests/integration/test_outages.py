"""One worker's whole run, without Ray, while a real S3 server is away: what it does at its end, for a pause, for a cancel, and killed."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mae_core.config import RUN_SPEC
from mae_core.world import World
from service.local import Seaweedfs
from tests.faults.proxy import ChaosProxy, Faults
from tests.integration.runs import pretrain_spec, wait_for
from tests.unit.forked import Forked
from tests.unit.saving import work_on
from tests.unit.scripted_server import Answer, Request, scripted_server
from workers import train_loop
from workers.contract import DesiredState, Event, EventType, Report, ReportAnswer, StorageRef, WorkOrder
from workers.seat import Seat
from workers.signals import Signals
from workers.stored import MANIFEST
from workers.train_loop import Leader

PREFIX = "jobs/job1/"
DOWN = Faults(refuse=True)
NUM_STEPS = 22


@dataclass
class Desk:
    """What stands for the service: keeps what the worker tells, and answers what is wanted."""

    url: str = ""
    wanted: DesiredState = DesiredState.RUN
    events: list[Event] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)

    def answer(self, request: Request) -> Answer:
        report = Report.model_validate_json(request.body)
        self.events += report.events
        if report.points is not None:
            values = zip(report.points.steps, report.points.series["loss"], strict=True)
            self.losses |= {step: loss for step, loss in values if loss is not None}
        return Answer(body=ReportAnswer(desired_state=self.wanted).model_dump_json().encode())

    def told(self, kind: EventType) -> list[dict[str, Any]]:
        return [event.data for event in self.events if event.type is kind]


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    with scripted_server(desk.answer) as server:
        desk.url = server.url
        yield desk


@dataclass
class Place:
    """Where a worker runs: its machine's folder, its storage through a proxy, and beside it."""

    folder: Path
    seaweedfs: Seaweedfs
    bucket: str
    proxy: ChaosProxy

    def has(self, key: str) -> bool:
        return bool(self.seaweedfs.client().list_objects_v2(Bucket=self.bucket, Prefix=key)["KeyCount"])

    def order(self, desk: Desk, **changes: Any) -> WorkOrder:
        optim = {"epochs": 2, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 1}
        spec = pretrain_spec(resources={"num_workers": 1}, optim=optim, checkpoint={"every_steps": 3}, evaluation={"every_epochs": 2})
        storage = StorageRef(endpoint=self.proxy.url, bucket=self.bucket)
        given = {"job": "job1", "attempt": 1, "token": "t", "service_url": desk.url, "storage": storage, "prefix": PREFIX}
        return WorkOrder(spec=RUN_SPEC.validate_python(spec | changes), **given)

    def start(self, order: WorkOrder, *, hold_at: tuple[int, ...] = ()) -> Forked:
        return Forked(work, 1, self.folder, order, self.folder / "machine", self.seaweedfs.access_key, self.seaweedfs.secret_key, hold_at)


@pytest.fixture
def place(seaweedfs: Seaweedfs, bucket: str, tmp_path: Path) -> Iterator[Place]:
    proxy = ChaosProxy(int(seaweedfs.endpoint.rpartition(":")[2]), seed=1)
    yield Place(tmp_path, seaweedfs, bucket, proxy)
    proxy.close()


def work(_: World, tell: Callable[[Any], None], order: WorkOrder, machine: Path, key: str, secret: str, hold_at: tuple[int, ...]) -> None:
    """Trains; at the steps of `hold_at` it waits for the test."""
    os.environ |= {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1"}
    train_loop._FINAL_SAVE_SECONDS = 1.0  # its pictures are waited for
    work_on(machine)

    class Held(Leader):
        def tell(self, progress: Any) -> None:
            super().tell(progress)
            if progress.step in hold_at:
                tell("held")

    with ExitStack() as stack:
        Held(order, Seat(World(), 0, 0), stack, Signals(), {"workers_placed_at": datetime.now(UTC).isoformat()}).train()
    tell("ended")


@pytest.fixture
def undisturbed(place: Place, desk: Desk) -> dict[int, float]:
    other = Desk(url=desk.url)
    with place.start(place.order(desk).model_copy(update={"prefix": "jobs/undisturbed/", "job": "undisturbed"})) as worker:
        assert worker.told(0) == "ended"
    other.losses, desk.losses = desk.losses, {}
    desk.events.clear()
    assert sorted(other.losses) == list(range(1, NUM_STEPS + 1))
    return other.losses


def test_a_run_goes_on_and_its_result_waits(place: Place, desk: Desk, undisturbed: dict[int, float]) -> None:
    with place.start(place.order(desk), hold_at=(4,)) as worker:
        wait_for(lambda: desk.told(EventType.FIRST_STEP_TAKEN), seconds=60, what="its first step")
        with place.proxy.having(DOWN):
            assert worker.told(0) == "held"
            wait_for(lambda: desk.told(EventType.TRAINING_ENDED), seconds=60, what="its last step")
            wait_for(lambda: desk.told(EventType.UPLOAD_DELAYED), seconds=60, what="that it waits")
            assert not place.has(f"{PREFIX}encoder/")
        assert worker.told(0) == "ended"
    assert place.has(f"{PREFIX}encoder/{MANIFEST}")
    assert desk.told(EventType.SAVE_FAILED) == []
    assert len(desk.told(EventType.RESULT_COMMITTED)) == 1
    assert desk.losses == undisturbed
    assert list((place.folder / "machine").rglob("*.safetensors")) == []


def test_killed_while_storage_is_away_it_goes_on_from_its_disk(place: Place, desk: Desk, undisturbed: dict[int, float]) -> None:
    order = place.order(desk)
    with place.start(order, hold_at=(1,)) as worker:
        wait_for(lambda: desk.told(EventType.FIRST_STEP_TAKEN), seconds=60, what="its first step")
        place.proxy.set(DOWN)
        assert worker.told(0) == "held"
        wait_for(lambda: list((place.folder / "machine").rglob("step=0000000003-*/manifest.json")), seconds=60, what="a state on disk")
    with place.proxy.having(DOWN):
        with place.start(order):  # the first was killed with its block
            wait_for(lambda: desk.told(EventType.TRAINING_ENDED), seconds=120, what="its last step")
        first, second = desk.told(EventType.WORKERS_STARTED)
        assert first["resumed_from"] is None
        with place.start(order) as worker:
            wait_for(lambda: len(desk.told(EventType.WORKERS_STARTED)) == 3, seconds=120, what="another start")
            third = desk.told(EventType.WORKERS_STARTED)[2]["resumed_from"]
            assert not place.has(third)
            place.proxy.set(Faults())
            assert worker.told(0) == "ended"
    assert int(second["resumed_from"].split("step=")[1][:10]) >= 3
    assert "step=0000000021-" in third
    assert desk.losses == undisturbed


def test_a_pause_waits_for_storage_to_have_its_state(place: Place, desk: Desk, undisturbed: dict[int, float]) -> None:
    order = place.order(desk)
    with place.proxy.having(Faults(write_status=507)), place.start(order, hold_at=(1,)) as worker:
        desk.wanted = DesiredState.PAUSE
        assert worker.told(0) == "held"
        wait_for(lambda: desk.told(EventType.UPLOAD_DELAYED), seconds=60, what="that it waits")
        assert desk.told(EventType.RUN_STOPPED) == []
        place.proxy.set(Faults())
        assert worker.told(0) == "ended"
    [stopped] = desk.told(EventType.RUN_STOPPED)
    desk.wanted = DesiredState.RUN
    with place.start(order) as worker:
        assert worker.told(0) == "ended"
    resumed_from = desk.told(EventType.WORKERS_STARTED)[1]["resumed_from"]
    assert f"step={stopped['step']:010d}-" in resumed_from
    assert desk.losses == undisturbed


@pytest.mark.parametrize("moment", ["pausing", "finalizing"])
def test_a_cancel_ends_the_wait(place: Place, desk: Desk, moment: str) -> None:
    with place.proxy.having(Faults(write_status=507)), place.start(place.order(desk), hold_at=(1,)) as worker:
        desk.wanted = DesiredState.PAUSE if moment == "pausing" else DesiredState.RUN
        assert worker.told(0) == "held"
        wait_for(lambda: desk.told(EventType.UPLOAD_DELAYED), seconds=60, what="that it waits")
        if moment == "finalizing":
            wait_for(lambda: desk.told(EventType.TRAINING_ENDED), seconds=60, what="its last step")
        desk.wanted = DesiredState.CANCEL
        assert worker.told(0) == "ended"
    assert [told["desired_state"] for told in desk.told(EventType.RUN_STOPPED)] == ["cancel"]
    assert list((place.folder / "machine").rglob("*.safetensors")) == []
