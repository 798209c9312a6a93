"""What the driver does when its workers fail, hang, or find more room. The workers and their room are stand-ins."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from workers import attempt
from workers.attempt import Attempt
from workers.contract import EventType, Reason, StorageRef, WorkOrder
from workers.failures import RunFailedError
from workers.pulse import HungError
from workers.signals import Sign

DIED = RunFailedError(Reason.WORKER_DIED, "ActorDiedError: killed", 1)
HUNG = HungError(Sign(7, 900.0, 1.0, 2.0, True), 1, {0: "in all_reduce", 1: "x" * 10_000})
HOUR = 3600.0


class Room:
    """Holds as many workers as were asked for last."""

    lost_next: tuple[int, set[str]] = (0, set())

    def __init__(self, resources: object) -> None:
        self.num_workers = 0
        Room.asked: list[tuple[int, set[str]]] = []
        Room.given_back = 0

    def find(self, counts: Sequence[int], *, at_most: int, avoid: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        Room.asked.append((at_most, set(avoid)))
        self.num_workers = max([count for count in counts if count <= at_most], default=counts[0])

    def lost(self) -> tuple[int, set[str]]:
        return Room.lost_next

    def give_back(self) -> None:
        Room.given_back += 1
        self.num_workers = 0


class Workers:
    """Each start ends as the next of `ends` says: after so many seconds with a failure, or with whether others go on."""

    ends: list[tuple[float, RunFailedError | bool]]
    sizes: list[int]

    def __init__(self, resources: object, room: Any) -> None:
        Workers.sizes.append(room.num_workers)
        self._room = room
        self._seconds, self._end = Workers.ends.pop(0)

    def train(self, order: WorkOrder, times: object, *, take_more: Callable[[bool], bool]) -> bool:
        if isinstance(self._end, RunFailedError):
            raise self._end
        if self._end:
            self._room.num_workers *= 2
        return self._end

    def trained_seconds(self) -> float:
        return self._seconds

    def stop(self) -> None:
        pass


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds waited before each start after the first."""
    pauses: list[float] = []
    monkeypatch.setattr(attempt, "WorkerGroup", Workers)
    monkeypatch.setattr(attempt, "Room", Room)
    monkeypatch.setattr(attempt, "free_workers", lambda resources: 4)
    monkeypatch.setattr(attempt.time, "sleep", pauses.append)
    Workers.sizes, Room.lost_next = [], (0, set())
    return pauses


def train(ends: list[tuple[float, RunFailedError | bool]], *, num_workers: object = 2) -> list[tuple[EventType, dict[str, Any]]]:
    """What was told of an attempt whose starts end so."""
    Workers.ends = ends
    spec = {
        "kind": "pretrain",
        "name": "x",
        "model": {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1},
        "data": {"source": "digits"},
        "optim": {"epochs": 1, "batch_size": 8, "warmup_epochs": 0},
        "retry": {"max_failures": 3},
        "resources": {"num_workers": num_workers},
    }
    settings = {"job": "job1", "attempt": 1, "spec": spec, "token": "t", "service_url": "http://localhost", "prefix": "jobs/job1/"}
    order = WorkOrder.model_validate(settings | {"storage": StorageRef(bucket="b")})
    told: list[tuple[EventType, dict[str, Any]]] = []
    Attempt(order, lambda kind, **data: told.append((kind, data))).train()
    return told


def test_dead_workers_start_again_at_once_then_after_growing_pauses(pauses: list[float]) -> None:
    told = train([(10.0, DIED)] * 3 + [(10.0, False)])
    assert pauses == [0.0, 2.0, 4.0]
    assert Workers.sizes == [2] * 4
    assert told == [
        (
            EventType.WORKERS_FAILED,
            {
                "reason": Reason.WORKER_DIED,
                "message": "ActorDiedError: killed",
                "rank": 1,
                "num_workers_before": 2,
                "restart": restart,
                "max_restarts": 3,
            },
        )
        for restart in (1, 2, 3)
    ]


def test_one_failure_too_many_ends_the_attempt(pauses: list[float]) -> None:
    with pytest.raises(RunFailedError) as failed:
        train([(10.0, DIED)] * 4)
    assert failed.value is DIED
    assert len(pauses) == 3
    assert Room.given_back == 4


def test_failures_are_forgotten_when_the_run_went_well_for_long(pauses: list[float]) -> None:
    told = train([(10.0, DIED), (10.0, DIED), (HOUR, DIED), (10.0, DIED), (10.0, False)])
    assert [data["restart"] for _, data in told] == [1, 2, 1, 2]
    assert pauses == [0.0, 2.0, 0.0, 2.0]


def test_hanging_is_no_time_in_which_it_went_well(pauses: list[float]) -> None:
    told = train([(10.0, DIED), (HOUR + 899.0, HUNG), (10.0, False)])
    assert [data["restart"] for kind, data in told if kind is EventType.WORKERS_FAILED] == [1, 2]


@pytest.mark.parametrize("reason", [Reason.DATA_ERROR, Reason.STALE_ATTEMPT, Reason.OUT_OF_MEMORY, Reason.INTERNAL_ERROR])
def test_what_a_restart_cannot_mend_ends_the_attempt(pauses: list[float], reason: Reason) -> None:
    with pytest.raises(RunFailedError):
        train([(10.0, RunFailedError(reason, "x", 1))])
    assert (pauses, Room.given_back) == ([], 1)


def test_where_the_workers_hang_is_told(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    told = train([(1000.0, HUNG), (10.0, False)])
    kind, data = told[0]
    assert (kind, data["rank"], data["step"], data["seconds"]) == (EventType.RUN_HUNG, 1, 7, 900.0)
    assert data["stacks"]["0"] == "in all_reduce"
    assert len(data["stacks"]["1"]) == 4000
    assert "x" * 10_000 in caplog.text
    assert [(kind, data["reason"]) for kind, data in told[1:]] == [(EventType.WORKERS_FAILED, Reason.HUNG)]


def test_an_elastic_run_takes_what_is_free_and_goes_on_with_what_is_left(pauses: list[float]) -> None:
    Room.lost_next = (3, {"b"})
    train([(10.0, DIED), (10.0, True), (10.0, False)], num_workers={"min": 1, "max": 8})
    assert Workers.sizes == [4, 1, 2]
    assert Room.asked == [(4, set()), (1, {"b"})]  # it grew into the room that it held already


def test_growing_is_no_failure(pauses: list[float]) -> None:
    assert train([(10.0, True)] * 5 + [(10.0, False)], num_workers={"min": 1, "max": 8}) == []
    assert pauses == []
