import io
import json
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from service.client import MaestroClient, Message
from service.watch import _Bars, _Figures, watch
from service.watched_events import event_line, outcome_line, progress_figures
from service.wording import duration
from tests.unit.scripted_server import Answer, Request, scripted_server

PROGRESS = {"step": 120, "num_steps": 400, "epoch": 3.0, "images_per_second": 811.6, "eta_seconds": 21.4, "loss": 0.47114}
JOB = {
    "id": "j1",
    "name": "digits",
    "kind": "pretrain",
    "status": "succeeded",
    "metrics": {"loss": 0.25},
    "result_uri": "s3://b/jobs/j1/encoder/",
}


def event(type: str, **data: Any) -> dict[str, Any]:
    return {"id": 1, "type": type, "at": "2026-01-01T00:00:00Z", "attempt": 1, "data": data}


def test_progress_in_figures() -> None:
    assert progress_figures(PROGRESS) == "step 120/400  loss 0.4711  812 images/s  ETA 0:21"
    assert progress_figures({"step": 0, "num_steps": 400, "loss": None}) == "step 0/400"
    assert progress_figures({"step": 1, "num_steps": 2, "loss": "NaN"}) == "step 1/2  loss nan"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 61, 3725, float("inf"), float("nan"))] == ["0:00", "1:01", "1:02:05", "unknown", "unknown"]


def test_events_for_a_person() -> None:
    assert event_line(event("status_changed", to="running")) == "running"
    assert event_line(event("status_changed", to="failed", reason="data_error", detail="no images")) == "failed (data_error: no images)"
    assert event_line(event("reason_changed", reason="waiting_for_resources", detail=None)) == "waiting (waiting_for_resources)"
    assert event_line(event("reason_changed", reason=None)) == ""
    assert event_line(event("training_state_committed", step=5)) == ""
    assert event_line(event("images_skipped", num_skipped=3)) == "images skipped: num_skipped 3"
    assert event_line(event("evaluated", step=400, metrics={"knn_accuracy": 0.81254, "probe_accuracy": "NaN"})) == (
        "evaluated: step 400, knn_accuracy 0.8125, probe_accuracy NaN"
    )
    steps = [{"step": 7, "rank": 1, "images": ["a.png"], "loss": "nan"}, {"step": 9, "rank": None, "images": ["b.png"], "loss": "inf"}]
    assert event_line(event("steps_dropped", count=2, steps=steps)) == "steps dropped: count 2, step 7, rank 1, loss nan"
    hung = event_line(event("run_hung", rank=0, step=7, seconds=901.26, stacks={"0": "thread trainer:"}))
    assert hung == "run hung: rank 0, step 7, seconds 901.3"
    assert event_line(event("of a later version")) == ""


def test_outcomes() -> None:
    assert outcome_line(JOB) == "job j1 succeeded: loss 0.25; result in s3://b/jobs/j1/encoder/"
    failed = JOB | {"status": "failed", "reason": "diverged", "detail": "at step 5", "reason_message": "The loss is not finite."}
    assert outcome_line(failed) == "job j1 failed: diverged; at step 5; The loss is not finite."


def stream_of(request: Request) -> Answer:
    if request.path.endswith("/events"):
        messages = [
            f"event: event\nid: 1\ndata: {json.dumps(event('status_changed', to='running'))}",
            f"event: progress\ndata: {json.dumps(PROGRESS)}",
            'event: end\ndata: {"status": "succeeded"}',
        ]
        return Answer(body="".join(f"{message}\n\n" for message in messages).encode())
    if "/metrics" in request.path:
        return Answer(body=json.dumps({"series": {"loss": {"steps": [1, 2], "values": [8.0, "NaN"]}}}).encode())
    return Answer(body=json.dumps(JOB).encode())


def watched(*, terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160, color_system=None)
    with scripted_server(stream_of) as server, MaestroClient(server.url, "token") as client:
        jobs = [{"id": "j1", "name": "digits"}, {"id": "j2", "name": "[b]x"}]
        assert watch(client, jobs, console=console) == [JOB, JOB]
    return output.getvalue()


def test_two_jobs_in_plain_lines() -> None:
    lines = watched(terminal=False).splitlines()
    for name in ("digits", "[b]x"):
        assert f"{name}: running" in lines
        assert f"{name}: step 120/400  loss 0.4711  812 images/s  ETA 0:21" in lines


def test_two_jobs_in_bars() -> None:
    text = watched(terminal=True)
    for shown in ("digits: running", "digits succeeded", "[b]x succeeded", "step 120/400  loss 0.4711  812 images/s  █ ▁"):
        assert shown in text


def test_a_service_that_is_away_is_told_once_and_waited_for() -> None:
    answers = iter([Answer(status=0), Answer(503), stream_of])

    def answer(request: Request) -> Answer:
        if not request.path.endswith("/events"):
            return stream_of(request)
        given = next(answers)
        return given if isinstance(given, Answer) else given(request)

    output = io.StringIO()
    with scripted_server(answer) as server, MaestroClient(server.url, "token", sleep=lambda _: None) as client:
        watch(client, [{"id": "j1", "name": "x\x1b[2J"}], console=Console(file=output, width=160))
    lines = output.getvalue().splitlines()
    assert lines[:2] == ["x\ufffd[2J: the service does not answer; trying again", "x\ufffd[2J: running"]


def test_the_time_left_counts_down_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("service.watch.time.monotonic", lambda: now)
    progress = Progress(console=Console(file=io.StringIO()))
    bars = _Bars({"j1": "x"}, progress=progress, losses={"j1": [2.0, 1.0]})
    bars.show("j1", Message("progress", PROGRESS))
    [task] = progress.tasks
    figures = _Figures("")
    assert figures.render(task).plain == "step 120/400  loss 0.4711  812 images/s  █▃▁  ETA 0:21"
    now += 15
    bars.show("j1", Message("away", {}))
    assert figures.render(task).plain.endswith("ETA 0:06")
    assert "does not answer" in task.fields["status"]
    bars.show("j1", Message("progress", PROGRESS | {"eta_seconds": None, "loss": "NaN"}))
    assert (figures.render(task).plain, task.fields["status"]) == ("step 120/400  loss nan  812 images/s  █▃▁ ", "")
