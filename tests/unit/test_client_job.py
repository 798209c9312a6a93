"""A job as a program holds it, and what the client asks of the API."""

import importlib.machinery
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.client import ApiError, DownloadError, JobFailed, LibraryMissing, MaestroClient, MaestroError, Unreachable, WaitTimeout
from service.client_errors import BadJobId, NotMaestro, StorageAway
from tests.unit.scripted_server import Answer, Request, scripted_server
from tests.unit.test_client import CONTENT, answer_json, client_of, manifest_of, result_store, storage
from workers.names import JobStatus

JOB = {"id": "j1", "name": "n", "kind": "pretrain", "status": "running", "labels": {}, "result_uri": None}


def states(*statuses: str) -> Callable[[Request], Answer]:
    """A job that has another status at each look."""
    left: Iterator[str] = iter(statuses)
    return lambda _: answer_json(JOB | {"status": next(left)})


def test_a_job_is_its_fields_and_its_calls() -> None:
    with client_of(states("queued", "running", "cancelled")) as (client, server):
        job = client.submit({"kind": "pretrain"})
        assert (job["name"], job.id, job.status) == ("n", "j1", JobStatus.QUEUED)
        assert job.refresh().status == JobStatus.RUNNING
        assert json.loads(json.dumps(job)) == job
        assert job.cancel() is job
        assert job["status"] == "cancelled"
    assert [(request.method, request.path) for request in server.requests] == [
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs/j1"),
        ("POST", "/v1/jobs/j1/cancel"),
    ]


def test_waiting_for_a_job() -> None:
    with client_of(states("running", "queued", "running", "succeeded")) as (client, server):
        assert client.job("j1").wait().status == JobStatus.SUCCEEDED
    assert len(server.requests) == 4
    with client_of(states("running", "failed")) as (client, _), pytest.raises(JobFailed, match="job j1 failed") as caught:
        client.job("j1").wait()
    assert caught.value.job["status"] == "failed"
    with client_of(states("running", "running")) as (client, _), pytest.raises(WaitTimeout, match="has not ended in 0 s; it is running"):
        client.job("j1").wait(timeout_seconds=0)


@pytest.mark.parametrize(("status", "error"), [(0, Unreachable), (502, ApiError), (503, ApiError), (504, ApiError)])
def test_a_service_that_is_away_for_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch, status: int, error: type[MaestroError]) -> None:
    answers = iter([answer_json(JOB), *[Answer(status)] * 3, answer_json(JOB | {"status": "succeeded"})])
    with client_of(lambda _: next(answers), patience_seconds=0.0) as (client, _):
        assert client.job("j1").wait().status == JobStatus.SUCCEEDED
    answers = iter([answer_json(JOB), Answer(status)])
    monkeypatch.setattr("service.client_job.AWAY_SECONDS", -1.0)
    with client_of(lambda _: next(answers), patience_seconds=0.0) as (client, _), pytest.raises(error):
        client.job("j1").wait()


def test_a_job_that_may_not_be_seen_is_not_waited_for() -> None:
    answers = iter([answer_json(JOB), Answer(401)])
    with client_of(lambda _: next(answers)) as (client, _), pytest.raises(ApiError):
        client.job("j1").wait()


def test_series_are_arrays_and_nan_stays() -> None:
    series = {"loss": {"steps": [1, 2, 3], "values": [0.5, "NaN", "Infinity"]}, "lr": {"steps": [], "values": []}}

    def answer(request: Request) -> Answer:
        return answer_json({"series": series} if "metrics" in request.path else JOB)

    with client_of(answer) as (client, server):
        curves = client.job("j1").metrics("loss", "lr", from_step=1)
    assert server.requests[-1].path == "/v1/jobs/j1/metrics?names=loss%2Clr&from_step=1"
    steps, values = curves["loss"]
    assert (steps.dtype, values.dtype) == ("int64", "float64")
    assert steps.tolist() == [1, 2, 3]
    assert values[0] == 0.5
    assert math.isnan(values[1])
    assert math.isinf(values[2])
    assert len(curves["lr"].values) == 0


class FakeTimm(types.ModuleType):
    """Remembers what it was asked for, and what lay there."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.__spec__ = importlib.machinery.ModuleSpec("timm", None)
        self.seen: list[Any] = []

    def create_model(self, name: str, *, pretrained: bool) -> Any:
        folder = Path(name.removeprefix("local-dir:"))
        self.seen.append((pretrained, {file.name for file in folder.iterdir()}))
        return types.SimpleNamespace(eval=lambda: "model")


def test_an_encoder_is_loaded_by_its_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timm = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", timm)
    files = {"config.json": b"{}", "model.safetensors": CONTENT}
    with client_of(result_store(files | {"manifest.json": manifest_of(files)})) as (client, server):
        job = client.job("j1")
        assert job.encoder("timm") == "model"
        assert job.encoder(to=tmp_path / "kept") == "model"
        num_requests = len(server.requests)
        job.encoder(to=tmp_path / "kept")
        assert len(server.requests) - num_requests == 3  # the job and its manifest, by an address: the files are there
    assert timm.seen == [(True, {*files, "manifest.json"})] * 3


def test_a_library_that_is_not_installed_is_told_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with client_of(lambda _: answer_json(JOB)) as (client, server):
        job = client.job("j1")
        for format, package in (("timm", "timm"), ("hf", "transformers")):
            with pytest.raises(LibraryMissing, match=rf"pip install {package}$"):
                job.encoder(format)  # type: ignore[arg-type]
        with pytest.raises(DownloadError, match="nothing loads 'onnx' here"):
            job.encoder("onnx")  # type: ignore[arg-type]
    assert len(server.requests) == 1


def test_a_change_says_what_it_is_based_on() -> None:
    def answer(request: Request) -> Answer:
        return Answer(200, json.dumps(JOB | {"name": "new"}).encode(), {"ETag": '"b-2"' if request.method == "PATCH" else '"a-1"'})

    with client_of(answer) as (client, server):
        job = client.job("j1")
        job.change(name="new", notes=None)
        job.change(priority=3)
        client.change("j1", labels={"a": "b"})
        assert next(client.jobs(limit=0), None) is None
    sent = [(request.headers["if-match"], json.loads(request.body)) for request in server.requests if request.method == "PATCH"]
    assert sent == [('"a-1"', {"name": "new", "notes": None}), ('"b-2"', {"priority": 3}), ("*", {"labels": {"a": "b"}})]


def test_a_change_whose_answer_was_lost_is_no_conflict() -> None:
    def answer(request: Request) -> Answer:
        return answer_json({"detail": "changed"}, status=412) if request.method == "PATCH" else answer_json(JOB | {"name": "mine"})

    with client_of(answer) as (client, _):
        assert client.change("j1", if_match='"a-1"', name="mine")["name"] == "mine"
        with pytest.raises(ApiError, match="changed"):
            client.change("j1", if_match='"a-1"', name="another")


def test_a_deletion_whose_answer_was_lost_is_done_and_one_of_nothing_is_an_error() -> None:
    answers = iter([Answer(status=0), answer_json({"detail": "There is no job j1."}, status=404)])
    with client_of(lambda _: next(answers)) as (client, _):
        client.delete("j1")
    with client_of(lambda _: answer_json({"detail": "There is no job j1."}, status=404)) as (client, _), pytest.raises(ApiError):
        client.delete("j1")


def test_a_retry_carries_one_key() -> None:
    answers = iter([Answer(status=0), answer_json(JOB | {"id": "j2"}, status=201)])
    with client_of(lambda _: next(answers)) as (client, server):
        assert client.retry("j1").id == "j2"
    first, second = (request.headers["idempotency-key"] for request in server.requests)
    assert first == second


def test_who_asks_too_often_waits_as_long_as_is_asked_for() -> None:
    answers = iter([Answer(429, b"{}", {"Retry-After": "3"}), answer_json(JOB)])
    pauses: list[float] = []
    with scripted_server(lambda _: next(answers)) as server, MaestroClient(server.url, "t", sleep=pauses.append) as client:
        client.job("j1")
    assert pauses == [3.0]
    with (
        scripted_server(lambda _: Answer(429, b"{}", {"Retry-After": "60"})) as server,
        MaestroClient(server.url, "t", sleep=pauses.append) as client,
        pytest.raises(ApiError) as caught,
    ):
        client.job("j1")
    assert (caught.value.retry_after_seconds, caught.value.exit_code, pauses) == (60.0, 3, [3.0])


def test_webhooks() -> None:
    pages = iter([{"deliveries": [{"event_id": 9}], "next_before": 9}, {"deliveries": [{"event_id": 2}], "next_before": None}])

    def answer(request: Request) -> Answer:
        if "deliveries?" in request.path:
            return answer_json(next(pages))
        if request.method == "DELETE":
            return Answer(204)
        return answer_json({"webhooks": [{"id": "w"}], "id": "w"})

    with client_of(answer) as (client, server):
        client.webhooks.create("https://x", events="all", project="p")
        assert client.webhooks.list(project="p") == [{"id": "w"}]
        client.webhooks.get("w")
        client.webhooks.change("w", enabled=False)
        assert [each["event_id"] for each in client.webhooks.deliveries("w", status="dead")] == [9, 2]
        client.webhooks.redeliver("w", 9)
        client.webhooks.delete("w")
    assert [(request.method, request.path) for request in server.requests] == [
        ("POST", "/v1/webhooks"),
        ("GET", "/v1/webhooks?project=p"),
        ("GET", "/v1/webhooks/w"),
        ("PATCH", "/v1/webhooks/w"),
        ("GET", "/v1/webhooks/w/deliveries?status=dead"),
        ("GET", "/v1/webhooks/w/deliveries?status=dead&before=9"),
        ("POST", "/v1/webhooks/w/deliveries/9/redeliver"),
        ("DELETE", "/v1/webhooks/w"),
    ]
    assert [json.loads(server.requests[place].body) for place in (0, 3)] == [
        {"url": "https://x", "events": "all", "project": "p"},
        {"enabled": False},
    ]


def test_the_events_of_all_jobs_go_on_after_the_last_one_seen() -> None:
    answers = iter([Answer(body=b'event: event\nid: 7\ndata: {"job_id": "a"}\n\n'), Answer(body=b"event: event\nid: 8\ndata: {}\n\n")])
    with client_of(lambda _: next(answers)) as (client, server):
        stream = client.stream_all(project="p")
        assert [next(stream).id, next(stream).id] == [7, 8]
    assert [(request.path, request.headers.get("last-event-id")) for request in server.requests] == [
        ("/v1/events?project=p", None),
        ("/v1/events?project=p", "7"),
    ]


def test_what_cannot_be_a_job_a_service_or_a_token() -> None:
    with client_of(lambda _: Answer(307, headers={"Location": "/login"})) as (client, server):
        for wrong in ("", "..", "a/b", "A", "x" * 41, "a b"):
            with pytest.raises(BadJobId):
                client.job(wrong)
        assert server.requests == []
        with pytest.raises(NotMaestro):
            client.job("j1")
    with pytest.raises(MaestroError, match="write it as http://host:port"):
        MaestroClient("maestro.example.com", "t")


def test_an_object_store_that_is_away_is_named_without_the_signature(tmp_path: Path) -> None:
    def answer(request: Request) -> Answer:
        return Answer(307, headers={"Location": "http://127.0.0.1:1/b/k?X-Amz-Signature=secret"})

    with client_of(answer, patience_seconds=0.0) as (client, _), pytest.raises(StorageAway) as caught:
        client.download("j1", "n", tmp_path / "n")
    assert "http://127.0.0.1:1 " in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").symlink_to("/dev/full")
    with (
        client_of(storage()) as (client, _),
        pytest.raises(DownloadError, match=r"model cannot be written: No space left on device; a repeat"),
    ):
        client.download("j1", "model", tmp_path / "model", sha256="0" * 64)
