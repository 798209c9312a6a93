"""The workers' voice: in order, idempotent, never raising, through a service that is away, refuses, or has moved on."""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from mae_core.reconstruct import Reconstructions
from tests.unit.scripted_server import Answer, Request, scripted_server
from workers import reporter as reporter_module
from workers.contract import DesiredState, EventType, Origin, Report, ReportAnswer, RunProgress, StorageRef, WorkOrder
from workers.objects import ObjectStore
from workers.reconstructions import ReconstructionUploads
from workers.reporter import Reporter, shorten

SPEC = {
    "kind": "pretrain",
    "name": "x",
    "model": {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1},
    "data": {"source": "digits"},
}


def order(url: str) -> WorkOrder:
    storage = StorageRef(bucket="maestro")
    return WorkOrder(job="job1", attempt=2, spec=SPEC, token="attempt-token", service_url=url, storage=storage, prefix="jobs/job1/")  # type: ignore[arg-type]


STALE = b'{"type": "urn:maestro:stale-attempt", "status": 409}'


def answer(desired: DesiredState = DesiredState.RUN) -> Answer:
    return Answer(body=ReportAnswer(desired_state=desired).model_dump_json().encode())


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"maestro-spool-{os.getuid()}" / "job1-a2"


def reports(requests: list[Request]) -> list[Report]:
    return [Report.model_validate_json(request.body) for request in requests]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_everything_told_arrives_once_and_in_order(spool: Path) -> None:
    with scripted_server(lambda _: answer()) as server:
        reporter = Reporter(order(server.url), incarnation=7)
        reporter.event(EventType.WORKERS_STARTED, num_workers=2)
        reporter.points([(step, {"loss": 1 / step}) for step in range(1, 2501)])
        reporter.points([(2500, {"val_accuracy": 0.5})])
        reporter.progress(RunProgress(step=2500, num_steps=5000, epoch=1.0))
        assert reporter.close(10)
        sent = reports(server.requests)
    assert {request.path for request in server.requests} == {"/v1/jobs/job1/attempts/2/reports"}
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer attempt-token"}
    assert [report.sequence for report in sent] == [0, 1, 2]
    assert {report.incarnation for report in sent} == {7}
    points = [(step, report.points.series) for report in sent if report.points for step in report.points.steps]
    assert [step for step, _ in points] == [*range(1, 2501), 2500]
    assert sent[-1].points is not None
    assert sent[-1].points.series["val_accuracy"][-1] == 0.5
    assert sent[-1].points.series["loss"][-1] is None
    assert [event.data for report in sent for event in report.events] == [{"num_workers": 2}]
    assert not spool.exists()


def test_outage_is_ridden_out_and_a_repeat_keeps_its_sequence() -> None:
    broken = True
    with scripted_server(lambda _: Answer(status=0) if broken else answer()) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.points([(1, {"loss": 1.0})])
        wait_for(lambda: len(server.requests) >= 2)
        reporter.points([(2, {"loss": 2.0})])
        broken = False
        assert reporter.close(10)
        sent = reports(server.requests)
    assert [report.sequence for report in sent[:2]] == [0, 0]
    steps = {report.sequence: report.points.steps for report in sent if report.points}
    assert steps == {0: [1], 1: [2]}


def test_what_a_dead_process_left_is_sent_by_the_next(spool: Path) -> None:
    with scripted_server(lambda _: Answer(status=503)) as server:
        dying = Reporter(order(server.url), incarnation=1)
        dying.points([(1, {"loss": 1.0})])
        assert not dying.close(1)
        assert [path.name for path in spool.glob("*.json")] == ["0000000000000001-00000000.json"]
    with scripted_server(lambda _: answer()) as server:
        reporter = Reporter(order(server.url), incarnation=2)
        reporter.points([(5, {"loss": 5.0})])
        assert reporter.close(10)
        sent = reports(server.requests)
    assert [(report.incarnation, report.sequence) for report in sent] == [(1, 0), (2, 0)]


def test_what_an_earlier_attempt_could_not_send_is_told_by_the_next(spool: Path) -> None:
    """Its points: the run goes on behind them. Its events were that attempt's, of which the service hears nothing more."""
    earlier, others = (order("http://127.0.0.1:9").model_copy(update=update) for update in ({"attempt": 1}, {"job": "job1-a1"}))
    for given in (earlier, others):
        dying = Reporter(given, incarnation=1)
        dying.points([(step, {"loss": 1.0}) for step in range(1500)])
        dying.event(EventType.FIRST_STEP_TAKEN, step=1)
        dying.spool()
        assert dying._steps == []
        dying._closing.set()
    with scripted_server(lambda _: answer()) as server:
        reporter = Reporter(order(server.url), incarnation=2)
        reporter.points([(1500, {"loss": 5.0})])
        assert reporter.close(10)
        sent = reports(server.requests)
    assert {request.path for request in server.requests} == {"/v1/jobs/job1/attempts/2/reports"}
    assert [(report.incarnation, report.sequence) for report in sent] == [(2, 0), (2, 1), (2, 2)]
    assert [report.origin for report in sent] == [*(Origin(attempt=1, incarnation=1, sequence=number) for number in range(2)), None]
    assert [step for report in sent if report.points for step in report.points.steps] == list(range(1501))
    assert [report.events for report in sent] == [[], [], []]
    assert [folder.name for folder in spool.parent.iterdir()] == ["job1-a1-a2"]


def test_what_was_left_twice_is_still_the_first_ones() -> None:
    first = Reporter(order("http://127.0.0.1:9").model_copy(update={"attempt": 1}), incarnation=1)
    first.points([(1, {"loss": 1.0})])
    first.spool()
    first._closing.set()
    with scripted_server(lambda _: Answer(status=503)) as server:
        assert not Reporter(order(server.url), incarnation=2).close(1)
    with scripted_server(lambda _: answer()) as server:
        assert Reporter(order(server.url).model_copy(update={"attempt": 3}), incarnation=3).close(10)
    assert [report.origin for report in reports(server.requests)] == [Origin(attempt=1, incarnation=1, sequence=0)]


def test_cancel_and_a_newer_attempt_are_heard() -> None:
    with scripted_server(lambda _: answer(DesiredState.CANCEL)) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.points([(1, {"loss": 1.0})])
        assert reporter.close(10)
    assert (reporter.desired_state, reporter.is_stale) == (DesiredState.CANCEL, False)
    with scripted_server(lambda _: Answer(status=409, body=STALE)) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.points([(1, {"loss": 1.0})])
        assert reporter.close(10)
    assert reporter.is_stale


def test_a_service_of_another_version_does_not_end_the_training() -> None:
    conflict = True
    with scripted_server(lambda _: Answer(status=409, body=b'{"type": "urn:maestro:conflict"}') if conflict else answer()) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.points([(1, {"loss": 1.0})])
        wait_for(lambda: len(server.requests) >= 1)
        conflict = False
        assert reporter.close(10)
    assert not reporter.is_stale


def test_a_run_that_has_ended_does_not_wait_a_day_for_a_service_that_refuses_it(monkeypatch: pytest.MonkeyPatch, spool: Path) -> None:
    monkeypatch.setattr("workers.reporter._REFUSED_SECONDS", 0.2)
    with scripted_server(lambda _: Answer(401, b"{}")) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.event(EventType.FIRST_STEP_TAKEN, step=1)
        assert not reporter.close(60)
    assert not reporter._thread.is_alive()
    assert list(spool.glob("*.json")), "it stays where it was"


def test_a_refused_report_is_dropped_and_the_next_is_sent() -> None:
    with scripted_server(lambda request: Answer(status=422, body=b"{}") if b'"sequence":0' in request.body else answer()) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.points([(1, {"loss": 1.0})])
        wait_for(lambda: len(server.requests) == 1)
        reporter.points([(2, {"loss": 2.0})])
        assert reporter.close(10)
        assert [report.sequence for report in reports(server.requests)] == [0, 1]


def test_a_kill_while_the_service_is_away_loses_nothing_that_was_told_before(spool: Path) -> None:
    """All of it is on disk, however fast the steps come: full reports and the rest."""
    with scripted_server(lambda _: Answer(status=503)) as server:
        dying = Reporter(order(server.url), incarnation=1)
        dying.points([(step, {"loss": 1.0}) for step in range(12_345)])
        dying.event(EventType.FIRST_STEP_TAKEN, step=1)
        wait_for(lambda: len(list(spool.glob("*.json"))) == 13)
        assert dying._steps == []
    with scripted_server(lambda _: answer()) as server:
        assert Reporter(order(server.url), incarnation=2).close(10)
        sent = reports(server.requests)
    assert [step for report in sent if report.points for step in report.points.steps] == list(range(12_345))
    assert [event.type for report in sent for event in report.events] == [EventType.FIRST_STEP_TAKEN]
    dying._closing.set()


@pytest.mark.parametrize(
    "lost",
    [
        Answer(status=0),
        Answer(body=answer().body, cut_at=5),
        Answer(status=503, body=b"{}", headers={"Retry-After": "5"}),
        Answer(status=502, body=b"<html>"),
        Answer(status=429, body=b"{}", headers={"Retry-After": "1"}),
        Answer(body=b"<html>a proxy's own page"),
    ],
    ids=["no answer", "cut in its middle", "503", "502", "429", "not ours"],
)
def test_a_report_whose_answer_is_lost_is_sent_again_unchanged(lost: Answer) -> None:
    """The service may have recorded it: by its number it knows the repeat."""
    answers = iter([lost, lost])
    with scripted_server(lambda _: next(answers, answer(DesiredState.CANCEL))) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.event(EventType.FIRST_STEP_TAKEN, step=1)
        assert reporter.close(20)
        first, second, third = [request.body for request in server.requests]
    assert first == second == third
    assert reporter.desired_state is DesiredState.CANCEL


def test_who_has_nothing_to_tell_says_so_and_hears_of_a_cancel(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter_module, "_SILENCE_SECONDS", 0.0)
    with scripted_server(lambda _: answer(DesiredState.CANCEL)) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        wait_for(lambda: reporter.desired_state is DesiredState.CANCEL)
        monkeypatch.undo()
        reporter.event(EventType.FIRST_STEP_TAKEN, step=1)
        assert reporter.close(10)
        empty, told = (reports(server.requests)[place] for place in (0, -1))
    assert (empty.points, empty.events, empty.progress) == (None, [], None)
    assert told.sequence == 0, "what says nothing counts for nothing"


def test_a_spool_that_has_grown_too_large_loses_the_oldest_points_and_no_event(spool: Path) -> None:
    with scripted_server(lambda _: Answer(status=503)) as server:
        dying = Reporter(order(server.url), incarnation=1)
        dying.event(EventType.FIRST_STEP_TAKEN, step=1)
        dying.points([(step, {"loss": 1.0}) for step in range(10_000)])
        wait_for(lambda: len(list(spool.glob("*.json"))) == 10)
        dying._closing.set()
    size = sum(path.stat().st_size for path in spool.glob("*.json"))
    shorten(spool, max_bytes=size // 2)
    assert sum(path.stat().st_size for path in spool.glob("*.json")) <= size // 2 + 1000
    with scripted_server(lambda _: answer()) as server:
        assert Reporter(order(server.url), incarnation=2).close(10)
        sent = reports(server.requests)
    assert [event.type for report in sent for event in report.events] == [EventType.FIRST_STEP_TAKEN]
    steps = [step for report in sent if report.points for step in report.points.steps]
    assert steps == list(range(10_000 - len(steps), 10_000))
    assert 4_000 <= len(steps) <= 5_000


def test_not_a_number_travels() -> None:
    with scripted_server(lambda _: answer()) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.points([(1, {"loss": float("nan"), "lr": float("inf")})])
        assert reporter.close(10)
        assert b'"NaN"' in server.requests[0].body
        assert b'"Infinity"' in server.requests[0].body


def test_what_json_cannot_say_is_dropped_and_the_rest_arrives() -> None:
    with scripted_server(lambda _: answer(DesiredState.CANCEL)) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.event(EventType.IMAGES_SKIPPED, images={"cat/\udcff.png": "broken"})
        reporter.event(EventType.FIRST_STEP_TAKEN, step=1)
        assert reporter.close(10)
        assert [event.type for report in reports(server.requests) for event in report.events] == [EventType.FIRST_STEP_TAKEN]
    assert reporter.desired_state is DesiredState.CANCEL


def test_points_that_no_report_can_carry_are_not_tried_for_ever() -> None:
    with scripted_server(lambda _: answer()) as server:
        reporter = Reporter(order(server.url), incarnation=1)
        reporter.points([(1, {f"series {number}": 1.0 for number in range(65)})])
        assert reporter.close(10)
        assert server.requests == []


def test_reconstructions_that_are_stuck_do_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, made = threading.Event(), threading.Event(), cast(Reconstructions, None)

    def upload(*_: object) -> None:
        begun.set()
        go_on.wait(60)

    monkeypatch.setattr(ReconstructionUploads, "_upload", upload)
    uploads = ReconstructionUploads(order("http://127.0.0.1:1"), cast(ObjectStore, None), cast(Reporter, None))
    uploads.add(0, made)
    assert begun.wait(60)
    for step in range(1, 20):
        uploads.add(step, made)
    closing = threading.Thread(target=uploads.close, args=(0.01,), daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    go_on.set()
    uploads.close(60)
