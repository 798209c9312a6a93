"""Logs over the API: by process and offset, while it grows and when the cluster is gone."""

from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service import logs
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import Service
from workers.contract import JobStatus
from workers.stored import log_chunk, log_prefix


def keep(service: Service, job_id: str, worker: str, *texts: tuple[int, bytes], attempt: int = 1) -> None:
    """What a process has uploaded."""
    for offset, text in texts:
        service.storage.put_bytes(log_chunk(log_prefix(f"jobs/{job_id}/", attempt, worker), offset), text)


def read(client: TestClient, job_id: str, **query: Any) -> httpx.Response:
    return client.get(f"/v1/jobs/{job_id}/logs", params=query)


def told(answer: httpx.Response) -> tuple[bytes, int, int, str]:
    """Text, offset, next offset, whether it is the end."""
    headers = answer.headers
    return answer.content, int(headers["Maestro-Log-Offset"]), int(headers["Maestro-Log-Next-Offset"]), headers["Maestro-Log-End"]


def end(service: Service, job_id: str) -> None:
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(2)


def test_a_log_is_read_on_from_any_byte_until_it_has_ended(service: Service, client: TestClient) -> None:
    job_id = service.submit()
    assert told(read(client, job_id)) == (b"", 0, 0, "false")
    assert read(client, job_id).headers["Maestro-Log-Attempt"] == "0"
    job_id = service.start()
    service.ray.texts[f"{job_id}-a1"] = "early\n"
    assert told(read(client, job_id)) == (b"early\n", 0, 6, "false")  # Ray's: nothing is uploaded yet
    assert told(read(client, job_id, offset=6)) == (b"", 6, 6, "false")
    keep(service, job_id, "driver", (0, b"early\n"), (6, b"middle\n"))
    assert told(read(client, job_id, offset=2)) == (b"rly\n", 2, 6, "false")
    assert told(read(client, job_id, offset=6)) == (b"middle\n", 6, 13, "false")
    assert told(read(client, job_id, offset=13)) == (b"", 13, 13, "false")
    service.ray.texts[f"{job_id}-a1"] = "early\nmiddle\nlast words\n"
    end(service, job_id)
    service.ray.is_down = True
    assert told(read(client, job_id, attempt=1, offset=13)) == (b"last words\n", 13, 24, "true")
    assert told(read(client, job_id, attempt=1, offset=24)) == (b"", 24, 24, "true")
    assert told(read(client, job_id, attempt=1, offset=10**9)) == (b"", 10**9, 10**9, "true")


def test_what_was_not_kept_is_said(service: Service, client: TestClient) -> None:
    job_id = service.start()
    keep(service, job_id, "1", (0, b"one\n"), (100, b"two\n"))
    assert told(read(client, job_id, worker="1", offset=4)) == ("[… 96 bytes were not kept …]\ntwo\n".encode(), 4, 104, "false")
    assert told(read(client, job_id, worker="1", offset=102)) == (b"o\n", 102, 104, "false")


def test_the_last_lines(service: Service, client: TestClient) -> None:
    job_id = service.start()
    keep(service, job_id, "0", (0, b"gone\n"), (50, b"one\ntwo\nth"), (60, b"ree\nfour\n"))
    assert told(read(client, job_id, worker="0", tail=2)) == (b"three\nfour\n", 58, 69, "false")
    assert told(read(client, job_id, worker="0", tail=1)) == (b"four\n", 64, 69, "false")
    assert told(read(client, job_id, worker="0", tail=100)) == (b"one\ntwo\nthree\nfour\n", 50, 69, "false")
    assert told(read(client, job_id, worker="3", tail=5)) == (b"", 0, 0, "false")


def test_an_answer_is_bounded(service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_BYTES", 10)
    job_id = service.start()
    keep(service, job_id, "driver", (0, b"0123456789abcdef\n"))
    assert told(read(client, job_id)) == (b"0123456789", 0, 10, "false")
    assert told(read(client, job_id, offset=10)) == (b"abcdef\n", 10, 17, "false")


def test_whose_logs_there_are(service: Service, client: TestClient) -> None:
    job_id = service.submit()
    assert client.get(f"/v1/jobs/{job_id}/logs/workers").json() == {"attempt": None, "workers": []}
    job_id = service.start()
    for worker in ("10", "2", "driver", "0"):
        keep(service, job_id, worker, (0, b"x"), (1, worker.encode()))
    found = client.get(f"/v1/jobs/{job_id}/logs/workers").json()
    assert found["attempt"] == 1
    assert [(log["worker"], log["bytes"]) for log in found["workers"]] == [("driver", 7), ("0", 2), ("2", 2), ("10", 3)]
    service.ray.texts[f"{job_id}-a1"] = "xdriver"
    end(service, job_id)
    assert read(client, job_id, worker="3", attempt=1).status_code == 404
    assert "no log of '3'" in read(client, job_id, worker="3", attempt=1).json()["detail"]


@pytest.mark.parametrize("query", [{"worker": "../0"}, {"worker": "01"}, {"offset": -1}, {"tail": 0}, {"attempt": 0}, {"offset": 2**63}])
def test_bad_questions(service: Service, client: TestClient, query: dict[str, Any]) -> None:
    answer = read(client, service.start(), **query)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == next(iter(query))


def test_only_the_end_of_a_long_log_is_completed(service: Service, client: TestClient) -> None:
    job_id = service.start()
    service.ray.texts[f"{job_id}-a1"] = "a\n" + "b" * logs.MAX_LAST_BYTES
    end(service, job_id)
    text, _, next_offset, _ = told(read(client, job_id, attempt=1))
    assert text.startswith("[… 2 bytes were not kept …]\nb".encode())
    assert next_offset == 2 + logs.MAX_BYTES


def test_logs_of_attempts_long_ago_are_deleted_and_the_others_are_artifacts(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "KEPT_ATTEMPTS", 1)
    job_id = service.start(retry={"max_failures": 3})
    keep(service, job_id, "0", (0, b"of rank 0\n"))
    end(service, job_id)
    artifact = client.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"][0]
    assert (artifact["name"], artifact["kind"], artifact["bytes"]) == ("logs/attempt-1/", "log", len(f"of rank 0\nlog of {job_id}-a1\n"))
    answer = client.get(f"/v1/jobs/{job_id}/artifacts/logs/attempt-1/", follow_redirects=False)
    assert answer.status_code == 404
    assert f"/v1/jobs/{job_id}/logs?attempt=1" in answer.json()["detail"]
    service.tick(60)
    service.tick(60)
    assert service.job(job_id).status is JobStatus.STARTING
    service.ray.end(f"{job_id}-a2", RayStatus.FAILED)
    service.tick(60)
    assert {found.key.split("/")[3] for found in service.storage.list(f"jobs/{job_id}/logs/")} == {"attempt-2"}
    assert [found["name"] for found in client.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"]] == ["logs/attempt-2/"]
    assert told(read(client, job_id, attempt=1))[0] == b""
