"""A training that is to go on with another number of workers: it saves, stops without a word to the service, and goes on where it was."""

from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from mae_core.loop import Progress
from mae_core.world import World
from tests.unit.core_fixtures import image_folder, pretrain_spec
from tests.unit.folder_store import FolderStore
from tests.unit.scripted_server import Answer, Request, scripted_server
from workers import train_loop
from workers.contract import DesiredState, Report, StorageRef, WorkOrder
from workers.signals import Signals
from workers.train_loop import Leader, Seat, Stop


class Led(Leader):
    """Rank 0, told by the driver to regroup after a step, once it knows what the service wants."""

    regroups_after: int | None = None

    def tell(self, progress: Progress) -> None:
        super().tell(progress)
        self.losses |= {step: values["loss"] for step, values in progress.points}
        self.signs.append(self.signals.sign())
        if progress.step == self.regroups_after:
            self.signals.regroups = True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(train_loop, "ObjectStore", lambda *_: FolderStore(tmp_path / "s3"))
    image_folder(tmp_path / "images")
    return tmp_path


def led(folder: Path, url: str, *, regroups_after: int | None = None, wanted: str = "run") -> tuple[Stop | None, Led]:
    """A start of one worker, in the folder's job."""
    with ExitStack() as stack:
        worker = started(folder, url, stack)
        worker.regroups_after = regroups_after
        worker.reporter.desired_state = DesiredState(wanted)  # as the last answer said
        return worker.train(), worker


def started(folder: Path, url: str, stack: ExitStack) -> Any:
    order = WorkOrder(
        job="job1",
        attempt=1,
        spec=pretrain_spec(folder / "images", optim={"epochs": 8}, checkpoint={"every_steps": 1000}),
        token="t",
        service_url=url,
        storage=StorageRef(endpoint="http://127.0.0.1:1", bucket="none"),
        prefix="jobs/job1/",
    )
    worker: Any = Led(order, Seat(World(), 0, 0), stack, Signals(), {"workers_placed_at": datetime.now(UTC).isoformat()})
    worker.losses, worker.signs = {}, []
    return worker


def answer(request: Request) -> Answer:
    return Answer(body=b'{"desired_state": "run", "may_grow": true}')


def events_of(requests: list[Request]) -> list[str]:
    return [str(event.type) for request in requests for event in Report.model_validate_json(request.body).events]


def test_it_goes_on_at_the_exact_step_and_the_service_sees_no_stop(folder: Path) -> None:
    with scripted_server(answer) as server:
        _, undisturbed = led(folder, server.url)
        (folder / "s3").rename(folder / "s3 of the undisturbed")
        server.requests.clear()
        stop, first = led(folder, server.url, regroups_after=5)
        told = events_of(server.requests)
        ended, second = led(folder, server.url)
    assert (stop, ended) == (Stop.REGROUP, None)
    assert sorted(first.losses) == [1, 2, 3, 4, 5, 6]  # it heard of it in the step after
    assert min(second.losses) == 7
    assert first.losses | second.losses == undisturbed.losses
    assert "run_stopped" not in told
    assert told[-1] == "training_state_committed"


def test_a_training_shows_its_steps_and_whether_it_may_be_regrouped(folder: Path) -> None:
    with scripted_server(lambda _: Answer(body=b'{"desired_state": "run"}')) as server:
        _, worker = led(folder, server.url)
    last = worker.last.step
    due = [sign.step for sign in worker.signs if sign is not None]
    assert list(dict.fromkeys(due)) == list(range(1, last))
    assert worker.signs[len(due) :] == [None] * (len(worker.signs) - len(due))  # the last step: what follows has other limits
    assert not any(sign.can_regroup for sign in worker.signs if sign is not None)  # the service does not say so


@pytest.mark.parametrize(("wanted", "stop"), [("pause", Stop.PAUSE), ("cancel", Stop.CANCEL)])
def test_what_the_user_wants_goes_first(folder: Path, wanted: str, stop: Stop) -> None:
    with scripted_server(lambda _: Answer(body=b'{"desired_state": "%s"}' % wanted.encode())) as server:
        found, _ = led(folder, server.url, regroups_after=1, wanted=wanted)
    assert found is stop
    saved = list((folder / "s3").rglob("training_state/*/manifest.json"))
    assert len(saved) == (stop is Stop.PAUSE)
    assert "run_stopped" in events_of(server.requests)


def test_a_first_step_is_one_that_was_taken(folder: Path) -> None:
    """Not the evaluation that was due at the step from which a run goes on."""
    with scripted_server(answer) as server, ExitStack() as stack:
        worker = started(folder, server.url, stack)
        worker.tell(Progress(step=5, num_steps=8, epoch=1.0, evaluated={"probe_accuracy": 0.5}))
        worker.tell(Progress(step=6, num_steps=8, epoch=1.2, points=[(6, {"loss": 1.0})]))
        worker.tell(Progress(step=7, num_steps=8, epoch=1.4, points=[(7, {"loss": 1.0})]))
        worker.reporter.close(5.0)
    found = [event for request in server.requests for event in Report.model_validate_json(request.body).events]
    assert [(str(event.type), event.data["step"]) for event in found] == [("evaluated", 5), ("first_step_taken", 6)]
