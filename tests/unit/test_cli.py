import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import app
from tests.unit.scripted_server import Answer, Request, ScriptedServer, scripted_server

SPEC = "kind: pretrain\nname: cells\nmodel: {arch: vit_tiny_patch2, image_size: 8, in_chans: 1}\ndata: {source: images}\n"
JOB: dict[str, Any] = {
    "id": "j1",
    "name": "cells [x]",
    "kind": "pretrain",
    "status": "running",
    "reason": None,
    "progress": {"step": 1, "num_steps": 4, "loss": 0.5},
    "created_at": "2026-01-01T00:00:00Z",
    "metrics": None,
    "result_uri": None,
    "conditions": {},
}
TOKEN: dict[str, Any] = {
    "id": "abc",
    "prefix": "mst_abc",
    "name": "Ada's",
    "role": "submitter",
    "project": "cells",
    "expires_at": None,
    "last_used_at": "2026-01-01T10:11:12Z",
    "revoked_at": None,
}
FAILED = JOB | {"status": "failed", "reason": "data_error", "detail": "no images in /x", "reason_message": "The data cannot be used."}


class Service:
    """What the scripted service knows of its one job."""

    def __init__(self) -> None:
        self.job = JOB
        self.submitted: Any = None

    def answer(self, request: Request) -> Answer:
        path = request.path.partition("?")[0]
        if request.method == "POST" and path == "/v1/jobs":
            self.submitted = json.loads(request.body)
            return Answer(201, json.dumps(self.job).encode())
        if path == "/v1/jobs":
            return Answer(body=json.dumps({"jobs": [self.job], "next_cursor": None}).encode())
        if path in ("/v1/jobs/j1", "/v1/jobs/j1/cancel"):
            return Answer(body=json.dumps(self.job).encode())
        if path == "/v1/jobs/j1/events":
            return Answer(body=f'event: end\ndata: {{"status": "{self.job["status"]}"}}\n\n'.encode())
        if path == "/v1/tokens" and request.method == "POST":
            self.submitted = json.loads(request.body)
            return Answer(201, json.dumps(TOKEN | self.submitted | {"token": "mst_abc_secret"}).encode())
        if path == "/v1/tokens":
            return Answer(body=json.dumps({"tokens": [TOKEN]}).encode())
        if path == "/v1/tokens/abc" and request.method == "DELETE":
            return Answer(body=json.dumps(TOKEN).encode())
        if path == "/v1/jobs/j1/logs":
            text = b"line one\nline two\n"[int(request.path.rpartition("offset=")[2]) :]
            told = {"Attempt": "1", "Offset": "0", "Next-Offset": "18", "End": "true"}
            return Answer(body=text, headers={f"Maestro-Log-{name}": value for name, value in told.items()})
        return Answer(404, b'{"title": "Not found", "detail": "There is no such job."}')


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def server(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ScriptedServer]:
    monkeypatch.chdir(tmp_path)
    with scripted_server(service.answer) as server:
        monkeypatch.setenv("MAESTRO_URL", server.url)
        monkeypatch.setenv("MAESTRO_TOKEN", "token")
        yield server


def maestro(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.usefixtures("server")
def test_submit_sends_the_spec_with_paths_from_the_current_folder(service: Service, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "spec.yaml").write_text(SPEC)
    code, out, _ = maestro("submit", "below/spec.yaml")
    assert (code, out) == (0, "job j1 (cells [x]) running\n")
    assert service.submitted["data"]["source"] == str(tmp_path / "images")


def test_a_wrong_spec_is_not_submitted(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC + "sede: 1\n")
    code, out, err = maestro("submit", "spec.yaml")
    assert (code, out, err) == (1, "", "error: spec.yaml:5: sede: is not a known field here; check its spelling\n")
    assert server.requests == []


@pytest.mark.usefixtures("server")
def test_watching_a_job_that_failed_exits_5_with_the_reason(service: Service, tmp_path: Path) -> None:
    service.job = FAILED
    (tmp_path / "spec.yaml").write_text(SPEC)
    for arguments in (["watch", "j1"], ["submit", "spec.yaml", "--watch"]):
        code, _, err = maestro(*arguments)
        assert code == 5
        assert "data_error; no images in /x; The data cannot be used." in err


@pytest.mark.usefixtures("server")
def test_lists_and_shows(service: Service) -> None:
    code, out, _ = maestro("jobs")
    assert code == 0
    assert "cells [x]" in out
    assert "  1/4  " in out
    assert json.loads(maestro("jobs", "--json")[1]) == [service.job]
    assert json.loads(maestro("show", "j1", "--json")[1]) == service.job
    code, out, _ = maestro("show", "j1")
    assert "status          running\n" in out
    assert "reason" not in out
    assert "condition" not in out
    amiss = {"since": "2026-01-01T00:00:05.5Z", "detail": "no answer", "message": "Storage is away."}
    service.job = JOB | {"conditions": {"upload_delayed": amiss}}
    assert maestro("show", "j1")[1].startswith("condition       upload_delayed since 2026-01-01T00:00:05: Storage is away. no answer\n")


@pytest.mark.usefixtures("server")
def test_logs_and_cancel() -> None:
    assert maestro("logs", "j1") == (0, "line one\nline two\n", "")
    assert maestro("cancel", "j1") == (0, "job j1 running, will be cancelled\n", "")


@pytest.mark.usefixtures("server")
def test_a_new_token_alone_is_on_stdout(service: Service) -> None:
    code, out, err = maestro("tokens", "create", "Ada's", "--role", "submitter", "--project", "cells", "--expires-in-days", "0.5")
    assert (code, out) == (0, "mst_abc_secret\n")
    assert "a token of the role submitter for the project cells" in err
    expires_at = datetime.fromisoformat(service.submitted.pop("expires_at"))
    assert service.submitted == {"name": "Ada's", "role": "submitter", "project": "cells"}
    assert timedelta(hours=11) < expires_at - datetime.now(UTC) < timedelta(hours=13)
    assert maestro("tokens", "create", "Ada's", "--role", "owner")[0] == 2


@pytest.mark.usefixtures("server")
def test_tokens_are_listed_and_revoked() -> None:
    code, out, _ = maestro("tokens", "list")
    assert code == 0
    assert out.splitlines()[1].split() == ["abc", "mst_abc…", "Ada's", "submitter", "cells", "2026-01-01T10:11"]
    assert json.loads(maestro("tokens", "list", "--json")[1]) == [TOKEN]
    assert maestro("tokens", "revoke", "abc") == (0, "token mst_abc… (Ada's) is revoked\n", "")


def test_an_admin_chooses_a_project(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    assert maestro("submit", "spec.yaml", "--project", "cells")[0] == 0
    assert maestro("jobs", "--project", "cells")[0] == 0
    assert [request.path for request in server.requests] == ["/v1/jobs?project=cells", "/v1/jobs?project=cells&limit=50"]


@pytest.mark.usefixtures("server")
def test_what_the_service_refuses_is_one_line() -> None:
    assert maestro("show", "j2") == (4, "", "error: There is no such job.\n")
    code, _, err = maestro("fetch", "j1")
    assert (code, err) == (1, "error: job j1 has no committed result (it is running)\n")


@pytest.mark.usefixtures("server")
def test_wrong_usage_exits_2() -> None:
    assert maestro("jobs", "--colour")[0] == 2
    assert maestro("jobs", "--status", "asleep")[0] == 2
    assert maestro("show")[0] == 2


def test_without_a_service_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MAESTRO_URL", raising=False)
    monkeypatch.delenv("MAESTRO_TOKEN", raising=False)
    monkeypatch.setenv("MAESTRO_HOME", str(tmp_path))
    code, _, err = maestro("jobs")
    assert code == 1
    assert "`maestro up`" in err
    monkeypatch.setenv("MAESTRO_URL", "http://127.0.0.1:1")
    assert "MAESTRO_TOKEN is not set" in maestro("jobs")[2]


def test_the_service_of_this_machine_is_found_by_its_client_file(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MAESTRO_URL")
    monkeypatch.delenv("MAESTRO_TOKEN")
    monkeypatch.setenv("MAESTRO_HOME", str(tmp_path))
    (tmp_path / "client.json").write_text(json.dumps({"url": server.url, "token": "of the file"}))
    assert maestro("jobs")[0] == 0
    assert server.requests[0].headers["authorization"] == "Bearer of the file"
    (tmp_path / "client.json").write_text("{")
    assert "is damaged" in maestro("jobs")[2]
