"""Request ids, and what the log says of which request, job and attempt."""

import json
import logging
import sys
from datetime import datetime

import pytest
from fastapi.testclient import TestClient

from service import jobs
from service.processlog import JsonFormatter, TextFormatter, about
from tests.unit.service_fixtures import API_TOKEN, PRETRAIN, Service


class Lines(logging.Handler):
    """What is logged, as JSON, in the order in which it is."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(JsonFormatter())
        self.found: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(json.loads(self.format(record)))


@pytest.fixture
def lines() -> object:
    handler, root = Lines(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/none", "/nowhere", "/livez"])
def test_a_sane_id_is_echoed_and_any_other_replaced(client: TestClient, path: str) -> None:
    assert client.get(path, headers={"X-Request-Id": "abc.DEF-1_2"}).headers["x-request-id"] == "abc.DEF-1_2"
    made = {client.get(path, headers={"X-Request-Id": given}).headers["x-request-id"] for given in ("", "a b", "x" * 65, 'a"b', "a\n b")}
    assert len(made) == 5
    assert all(len(each) == 16 and each.isalnum() for each in made)
    assert len(client.post("/v1/jobs", content=b"x" * 2**21).headers["x-request-id"]) == 16  # also what no route sees


def test_what_changes_something_has_a_line_with_its_ids(client: TestClient, service: Service, lines: Lines) -> None:
    job_id = service.submit()
    client.get(f"/v1/jobs/{job_id}")
    client.post(f"/v1/jobs/{job_id}/cancel", headers={"X-Request-Id": "mine"})
    [line] = [each for each in lines.found if each["logger"] == "service.requestlog"]
    assert (line["request"], line["job"], line["level"]) == ("mine", job_id, "info")
    assert str(line["message"]).startswith(f"POST /v1/jobs/{job_id}/cancel: 202 in ")
    assert datetime.fromisoformat(str(line["at"])).tzinfo is not None


def test_an_error_of_ours_is_logged_with_the_id_that_the_client_has(
    client: TestClient, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **named: object) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(jobs, "get_if_changed", fail)
    answer = client.get("/v1/jobs/x")
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:maestro:internal-error")
    first, second = [each for each in lines.found if each["logger"] == "service.requestlog"]
    assert first["request"] == second["request"] == answer.headers["x-request-id"]
    assert "RuntimeError: inside" in str(first["exception"])
    assert "500" in str(second["message"])


def test_what_the_dispatcher_logs_names_the_job(service: Service, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.start()

    def fail(*args: object) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(type(service.dispatcher), "_decide", fail)
    service.tick(2)
    [line] = [each for each in lines.found if each["level"] == "error"]
    assert (line["job"], line["attempt"]) == (job_id, 1)


def test_no_secret_is_logged(client: TestClient, service: Service, lines: Lines) -> None:
    client.post("/v1/jobs", json=PRETRAIN)
    made = client.post("/v1/tokens", json={"name": "n", "role": "reader"}).json()["token"]
    secret = client.post("/v1/webhooks", json={"url": "https://example.com/hidden-path"}).json()["secret"]
    service.tick()
    told = json.dumps(lines.found)
    assert lines.found
    for hidden in (API_TOKEN, made, secret, "hidden-path", service.settings.secret_key.get_secret_value()):
        assert hidden not in told


def test_a_line_is_one_line_for_programs_and_short_for_people() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("service.jobs", logging.ERROR, __file__, 1, "it is %s", ("so\nso",), sys.exc_info())
    with about(request="r", job="j", attempt=None), about(attempt=2):
        as_json, as_text = JsonFormatter().format(record), TextFormatter().format(record)
    assert "\n" not in as_json
    told = json.loads(as_json)
    assert (told["message"], told["request"], told["job"], told["attempt"]) == ("it is so\nso", "r", "j", 2)
    assert "ValueError" in told["exception"]
    assert "ERROR service.jobs: it is so\nso [request=r job=j attempt=2]\nTraceback" in as_text
    assert "[" not in TextFormatter().format(logging.LogRecord("a", logging.INFO, __file__, 1, "m", (), None))
