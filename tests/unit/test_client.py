import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import pytest

from mae_core.config import PretrainSpec
from mae_core.exports.formats import ExportOutcome
from mae_core.options import ModelConfig
from service.client import ApiError, DownloadError, MaestroClient, Message, Unreachable
from service.client_downloads import safe_path
from service.client_errors import StorageAway
from service.client_streams import parse_stream
from tests.unit.scripted_server import Answer, Request, ScriptedServer, scripted_server
from workers.stored import EncoderManifest, FileEntry

TOKEN = "t" * 32


def answer_json(content: Any, *, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


@contextmanager
def client_of(answer: Callable[[Request], Answer], *, patience_seconds: float = 5.0) -> Iterator[tuple[MaestroClient, ScriptedServer]]:
    with (
        scripted_server(answer) as server,
        MaestroClient(server.url, TOKEN, patience_seconds=patience_seconds, sleep=lambda _: None) as client,
    ):
        yield client, server


def test_a_submission_is_repeated_with_the_same_key_until_it_is_answered() -> None:
    answers = iter([Answer(status=0), Answer(status=503), answer_json({"id": "j1"}, status=201)])
    with client_of(lambda _: next(answers)) as (client, server):
        assert client.submit({"kind": "pretrain"}) == {"id": "j1"}
    keys = {request.headers["idempotency-key"] for request in server.requests}
    assert len(server.requests) == 3
    assert len(keys) == 1
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {TOKEN}"}


def test_a_token_is_not_made_a_second_time() -> None:
    with client_of(lambda _: Answer(status=0)) as (client, server), pytest.raises(Unreachable):
        client.create_token("n", role="reader")
    assert len(server.requests) == 1


def test_two_submissions_have_different_keys() -> None:
    with client_of(lambda _: answer_json({"id": "j1"}, status=201)) as (client, server):
        client.submit({})
        client.submit({})
    first, second = server.requests
    assert first.headers["idempotency-key"] != second.headers["idempotency-key"]


def test_series_are_asked_for_by_name_and_step() -> None:
    with client_of(lambda _: answer_json({"series": {"loss": {}}})) as (client, server):
        assert client.metrics("j") == {"loss": {}}
        client.metrics("j", names=["loss", "lr"], from_step=0, to_step=9, max_points=5)
    asked = "/v1/jobs/j/metrics?names=loss%2Clr&max_points=5&from_step=0&to_step=9"
    assert [request.path for request in server.requests] == ["/v1/jobs/j/metrics", asked]


def test_an_error_carries_the_problem() -> None:
    problem = {"type": "urn:maestro:invalid-spec", "title": "Invalid", "status": 422, "detail": "The spec is not valid."}
    fields = [{"field": "optim.epochs", "message": "must be at least 1"}]
    answer = answer_json(problem | {"errors": fields}, status=422)
    with client_of(lambda _: answer) as (client, server), pytest.raises(ApiError, match=r"optim\.epochs: must be at least 1") as caught:
        client.submit({})
    assert (caught.value.status, caught.value.type, caught.value.detail) == (422, "urn:maestro:invalid-spec", "The spec is not valid.")
    assert len(server.requests) == 1  # a refusal is not repeated


def test_an_answer_that_is_no_problem_json_is_an_error_too() -> None:
    with client_of(lambda _: Answer(404, b"<html>nothing here</html>")) as (client, _), pytest.raises(ApiError, match="nothing here"):
        client.job("j1")


def test_a_service_that_is_not_there_is_named_with_the_remedy() -> None:
    with (
        MaestroClient("http://127.0.0.1:1", TOKEN, patience_seconds=0, sleep=lambda _: None) as client,
        pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:1 .*maestro up"),
    ):
        client.job("j1")


def test_jobs_follow_the_cursor_up_to_the_limit() -> None:
    pages = {None: {"jobs": [{"id": "a"}, {"id": "b"}], "next_cursor": "c1"}, "c1": {"jobs": [{"id": "c"}], "next_cursor": None}}

    def answer(request: Request) -> Answer:
        return answer_json(pages["c1" if "cursor=c1" in request.path else None])

    with client_of(answer) as (client, server):
        assert [job["id"] for job in client.jobs(status="running")] == ["a", "b", "c"]
        assert [job["id"] for job in client.jobs(limit=2)] == ["a", "b"]
    assert "status=running" in server.requests[1].path
    assert len(server.requests) == 3


def test_events_are_paged() -> None:
    pages = iter([{"events": [{"id": 4}, {"id": 7}], "next_after": 7}, {"events": [], "next_after": 7}])
    with client_of(lambda _: answer_json(next(pages))) as (client, server):
        assert [event["id"] for event in client.events("j1", after=3)] == [4, 7]
    assert [request.path.partition("after=")[2] for request in server.requests] == ["3", "7"]


def sse(*messages: str) -> bytes:
    return "".join(f"{message}\n\n" for message in messages).encode()


def test_messages_of_a_stream() -> None:
    lines = iter(
        ["", ": ping", "event: event", "id: 7", 'data: {"type":', 'data: "x"}', "", "event: end", "data: {}", "", "event: cut off"]
    )
    assert list(parse_stream(lines)) == [Message("event", {"type": "x"}, 7), Message("end", {})]


def test_a_broken_stream_is_taken_up_after_the_last_event() -> None:
    first = sse('event: event\nid: 1\ndata: {"n": 1}', 'event: progress\ndata: {"step": 5}')
    rest = sse('event: event\nid: 2\ndata: {"n": 2}', 'event: end\ndata: {"status": "succeeded"}')
    answers = iter([Answer(body=first + b"event: ev", cut_at=len(first) + 5), Answer(status=0), Answer(status=503), Answer(body=rest)])
    with client_of(lambda _: next(answers)) as (client, server):
        messages = list(client.stream("j1"))
    assert [(message.event, message.id) for message in messages] == [("event", 1), ("progress", None), ("event", 2), ("end", None)]
    assert [request.headers.get("last-event-id") for request in server.requests] == [None, "1", "1", "1"]


def test_a_quiet_stream_is_heard_of_as_long_as_it_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, *[1000.0] * 99])  # it was quiet for long, and breaks off
    monkeypatch.setattr("service.client_streams.time", SimpleNamespace(monotonic=lambda: next(times)))
    answers = iter([Answer(body=b": ping\n\n", headers={"Content-Length": "99"}), Answer(body=sse("event: end\ndata: {}"))])
    with client_of(lambda _: next(answers)) as (client, _):
        assert [message.event for message in client.stream("j1")] == ["end"]


def test_a_stream_of_an_unknown_job_is_an_error() -> None:
    with (
        client_of(lambda _: answer_json({"detail": "There is no job j1."}, status=404)) as (client, _),
        pytest.raises(ApiError, match="no job j1"),
    ):
        list(client.stream("j1"))


CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def storage(content: bytes = CONTENT, *, cuts: Iterator[int | None] | None = None) -> Callable[[Request], Answer]:
    """A service that redirects to a store which knows Range, and may break off."""
    cuts = cuts or iter(lambda: None, 1)

    def answer(request: Request) -> Answer:
        if request.path.startswith("/v1/"):
            return Answer(307, headers={"Location": f"http://{request.headers['host']}/store"})
        start = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return Answer(416)
        return Answer(206 if start else 200, content[start:], cut_at=next(cuts))

    return answer


def test_a_download_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    with client_of(storage(cuts=iter([5000, 2000, None]))) as (client, server):
        file = client.download("j1", "encoder/model.safetensors", tmp_path / "deep" / "model", sha256=SHA256)
    assert file.read_bytes() == CONTENT
    assert [request.headers.get("range") for request in server.requests if request.path == "/store"] == [None, "bytes=5000-", "bytes=7000-"]
    assert not any("authorization" in request.headers for request in server.requests if request.path == "/store")
    assert [path.name for path in file.parent.iterdir()] == ["model"]


def test_an_earlier_programs_partial_file_is_used_and_a_whole_one_is_not_loaded_again(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").write_bytes(CONTENT[:6000])
    with client_of(storage()) as (client, server):
        client.download("j1", "model", tmp_path / "model", sha256=SHA256)
        assert server.requests[-1].headers["range"] == "bytes=6000-"
        num_requests = len(server.requests)
        client.download("j1", "model", tmp_path / "model", sha256=SHA256)
        assert len(server.requests) == num_requests


def test_a_partial_file_of_something_else_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").write_bytes(b"something else")
    with client_of(storage()) as (client, _):
        client.download("j1", "model", tmp_path / "model", sha256=SHA256)
    assert (tmp_path / "model").read_bytes() == CONTENT


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    with client_of(storage(b"damaged")) as (client, _), pytest.raises(DownloadError, match="damaged in the object store"):
        client.download("j1", "model", tmp_path / "model", sha256=SHA256)
    assert list(tmp_path.iterdir()) == []


def manifest_of(files: dict[str, bytes], **changes: Any) -> bytes:
    model = ModelConfig(arch="vit_tiny_patch2", image_size=8, in_chans=1)
    spec = PretrainSpec.model_validate({"kind": "pretrain", "name": "x", "model": model.model_dump(), "data": {"source": "digits"}})
    manifest = EncoderManifest(
        job="j1",
        attempt=1,
        kind="pretrain",
        created_at=datetime.now(UTC),
        model=model,
        normalize=spec.data.normalize_for(1),
        spec=spec,
        metrics={},
        versions={},
        git_revision=None,
        files={name: FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()) for name, content in files.items()},
    )
    return manifest.model_copy(update=changes).model_dump_json().encode()


def result_store(files: dict[str, bytes]) -> Callable[[Request], Answer]:
    def answer(request: Request) -> Answer:
        if request.path == "/v1/jobs/j1":
            return answer_json({"id": "j1", "kind": "pretrain", "status": "succeeded", "result_uri": "s3://b/jobs/j1/encoder/"})
        if request.path.startswith("/v1/jobs/j1/artifacts/encoder/"):
            return Answer(307, headers={"Location": f"http://{request.headers['host']}/{request.path.rpartition('encoder/')[2]}"})
        return Answer(body=files[request.path.removeprefix("/")])

    return answer


def test_a_result_is_downloaded_by_its_manifest(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": CONTENT}
    with client_of(result_store(files | {"manifest.json": manifest_of(files)})) as (client, _):
        manifest, folder = client.download_result("j1", tmp_path / "to")
    assert set(manifest.files) == set(files)
    assert {path.name for path in folder.iterdir()} == {*files, "manifest.json"}


def test_a_result_that_does_not_fit_its_manifest_leaves_no_manifest(tmp_path: Path) -> None:
    files = {"config.json": b"{}"}
    with client_of(result_store({"config.json": b"[]", "manifest.json": manifest_of(files)})) as (client, _), pytest.raises(DownloadError):
        client.download_result("j1", tmp_path)
    assert not (tmp_path / "manifest.json").exists()


FORMATS = {
    "config.json": b"{}",
    "model.safetensors": CONTENT,
    "hf/config.json": b"{1}",
    "hf/model.safetensors": CONTENT[::-1],
    "torch_export/model.pt2": b"2",
}


def test_one_format_is_downloaded_and_a_broken_download_goes_on(tmp_path: Path) -> None:
    store = result_store(FORMATS | {"manifest.json": manifest_of(FORMATS)})

    def breaking(request: Request) -> Answer:
        return Answer(body=CONTENT[::-1], cut_at=5) if request.path == "/hf/model.safetensors" else store(request)

    with client_of(breaking, patience_seconds=0.0) as (client, _), pytest.raises(Unreachable):
        client.download_result("j1", tmp_path, format="hf")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", ".model.safetensors.partial", ".manifest.json"}

    def going_on(request: Request) -> Answer:
        if request.path == "/hf/model.safetensors" and request.headers.get("range") == "bytes=5-":
            return Answer(206, CONTENT[::-1][5:])
        return store(request)

    with client_of(going_on) as (client, server):
        client.download_result("j1", tmp_path, format="hf")
    assert (tmp_path / "config.json").read_bytes() == b"{1}"
    assert (tmp_path / "model.safetensors").read_bytes() == CONTENT[::-1]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "manifest.json"}
    assert "/hf/config.json" not in [request.path for request in server.requests]  # it was whole


def test_a_format_that_is_not_there(tmp_path: Path) -> None:
    exports = {"onnx": ExportOutcome(left_out="it is not among export.formats of the spec")}
    files = FORMATS | {"manifest.json": manifest_of(FORMATS, exports=exports)}
    says = r"not written as onnx \(it is not among export\.formats of the spec\); there are timm, hf, torch-export$"
    with client_of(result_store(files)) as (client, _), pytest.raises(DownloadError, match=says):
        client.download_result("j1", tmp_path, format="onnx")
    with client_of(result_store(files)) as (client, _), pytest.raises(DownloadError, match=r"not written as torch; there are timm, hf"):
        client.download_result("j1", tmp_path, format="torch")


def test_what_is_no_encoder_has_no_formats(tmp_path: Path) -> None:
    files = {"manifest.json": manifest_of(FORMATS, kind="probe")}
    with (
        client_of(result_store(files)) as (client, _),
        pytest.raises(DownloadError, match="is of kind probe, which is not written as hf; leave"),
    ):
        client.download_result("j1", tmp_path, format="hf")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "", "a\\b"])
def test_a_manifest_cannot_write_outside_its_folder(name: str) -> None:
    with pytest.raises(DownloadError, match="outside its folder"):
        safe_path(name)


def test_patience_ends() -> None:
    with client_of(lambda _: Answer(status=503), patience_seconds=0.0) as (client, server), pytest.raises(ApiError):
        client.job("j1")
    assert len(server.requests) == 1


class Clock:
    """The client's: it goes on where a test says so, and in pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("service.client_http.time", SimpleNamespace(monotonic=lambda: self.now))

    def go_on(self, seconds: float) -> None:
        self.now += seconds

    def slowly(self, answer: Callable[[Request], Answer], *, seconds: float) -> Callable[[Request], Answer]:
        """Each answer takes so long."""

        def slow(request: Request) -> Answer:
            self.go_on(seconds)
            return answer(request)

        return slow

    @contextmanager
    def client_of(self, answer: Callable[[Request], Answer]) -> Iterator[tuple[MaestroClient, ScriptedServer]]:
        with scripted_server(answer) as server, MaestroClient(server.url, TOKEN, patience_seconds=15.0, sleep=self.go_on) as client:
            yield client, server


def test_patience_begins_with_the_first_failure_not_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    answers = iter([Answer(status=0), answer_json({"id": "j1"})])
    with clock.client_of(clock.slowly(lambda _: next(answers), seconds=30)) as (client, _):
        assert client.job("j1") == {"id": "j1"}
    with clock.client_of(clock.slowly(lambda _: Answer(status=0), seconds=30)) as (client, server), pytest.raises(Unreachable):
        client.job("j1")
    assert len(server.requests) == 2
    started_at = clock.now
    with clock.client_of(lambda _: Answer(status=503)) as (client, _), pytest.raises(ApiError):
        client.job("j1")
    assert 10 < clock.now - started_at <= 15


def test_a_long_download_goes_on_as_long_as_bytes_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    with clock.client_of(clock.slowly(storage(cuts=iter([3000, 3000, 3000, None])), seconds=20)) as (client, _):
        client.download("j1", "model", tmp_path / "model", sha256=SHA256)
    with clock.client_of(clock.slowly(storage(cuts=iter([3000, *[0] * 9])), seconds=5)) as (client, server), pytest.raises(StorageAway):
        client.download("j1", "other", tmp_path / "other", sha256=SHA256)
    assert len([request for request in server.requests if request.path == "/store"]) == 3, "the first, and two that brought nothing"


def test_a_service_that_is_away_during_a_download_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    with clock.client_of(lambda _: Answer(status=0)) as (client, _), pytest.raises(Unreachable, match="is the service running there"):
        client.download("j1", "model", tmp_path / "model")
    assert clock.now <= 15


class Printing:
    """The scripted log of a job: attempt 1 fails, attempt 2 prints on and succeeds. Three bytes in an answer, and every third is lost."""

    def __init__(self) -> None:
        self.texts = {1: "éins\n".encode(), 2: b"two\nend\n"}
        self.asked = 0

    def answer(self, request: Request) -> Answer:
        self.asked += 1
        attempt = 1 if self.asked < 10 else 2
        if not request.path.startswith("/v1/jobs/j1/logs"):
            return answer_json({"status": "running" if self.asked < 30 else "succeeded", "attempt": attempt})
        if self.asked % 3 == 0:
            return Answer(status=0)
        query = dict(parse_qsl(request.path.partition("?")[2]))
        number, offset = int(query.get("attempt", attempt)), int(query["offset"])
        text = self.texts[number][offset : offset + 3]
        is_end = (number < attempt or self.asked >= 30) and offset + len(text) == len(self.texts[number])
        told = {"Attempt": number, "Next-Offset": offset + len(text), "End": str(is_end).lower()}
        return Answer(body=text, headers={f"Maestro-Log-{name}": str(value) for name, value in told.items()})


def test_a_log_is_followed_through_lost_answers_and_attempts() -> None:
    with client_of(Printing().answer) as (client, _):
        assert "".join(client.follow_logs("j1")) == "éins\ntwo\nend\n"


def test_a_log_of_one_attempt_ends_with_it() -> None:
    with client_of(Printing().answer) as (client, _):
        assert "".join(client.follow_logs("j1", attempt=1)) == "éins\n"


def test_a_log_is_printed_as_far_as_it_goes() -> None:
    with client_of(Printing().answer) as (client, server):
        assert client.logs("j1") == "éins\n"
    assert "attempt" not in server.requests[1].path
    assert "attempt=1" in server.requests[-1].path


@pytest.mark.parametrize(("waits", "patience"), [("3", 5.0), ("60", 5.0)])
def test_whoever_asks_too_often_waits_as_long_as_it_is_told(waits: str, patience: float) -> None:
    pauses: list[float] = []
    answers = iter([Answer(status=429, headers={"Retry-After": waits}), answer_json({"id": "j1"}, status=201)])
    with (
        scripted_server(lambda _: next(answers)) as server,
        MaestroClient(server.url, TOKEN, patience_seconds=patience, sleep=pauses.append) as client,
    ):
        if float(waits) < patience:
            assert client.submit({}) == {"id": "j1"}
            assert pauses == [3.0]
        else:
            with pytest.raises(ApiError) as caught:
                client.submit({})
            assert (caught.value.status, pauses) == (429, [])
