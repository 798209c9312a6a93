"""Logs and artifacts over HTTP."""

from fastapi.testclient import TestClient

from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import Service


def end(service: Service, job_id: str, *, attempt: int = 1, status: RayStatus = RayStatus.SUCCEEDED) -> None:
    if status is RayStatus.SUCCEEDED:
        service.commit_result(job_id, attempt=attempt)
    service.ray.end(f"{job_id}-a{attempt}", status)
    service.tick(2)


def test_logs_come_from_ray_and_afterwards_from_storage(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    path = f"/v1/jobs/{job_id}/logs"
    assert (client.get(path).status_code, client.get(path).text) == (200, "")
    service.tick()
    answer = client.get(path)
    assert answer.text == f"log of {job_id}-a1\n"
    assert answer.headers["content-type"].startswith("text/plain")
    end(service, job_id)
    service.ray.forget()
    service.ray.is_down = True
    assert client.get(path).text == f"log of {job_id}-a1\n"


def test_logs_of_an_earlier_attempt(client: TestClient, service: Service) -> None:
    job_id = service.start()
    end(service, job_id, status=RayStatus.FAILED)
    service.tick(10)
    path = f"/v1/jobs/{job_id}/logs"
    assert client.get(path).text == f"log of {job_id}-a2\n"
    assert client.get(path, params={"attempt": 1}).text == f"log of {job_id}-a1\n"
    assert client.get(path, params={"attempt": 3}).status_code == 404


def test_logs_that_nobody_has(client: TestClient, service: Service) -> None:
    job_id = service.start()
    service.ray.forget()
    assert client.get(f"/v1/jobs/{job_id}/logs").text == ""
    service.ray.is_down = True
    answer = client.get(f"/v1/jobs/{job_id}/logs")
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:maestro:ray-unreachable")


def test_artifacts_of_a_result(client: TestClient, service: Service) -> None:
    job_id = service.start()
    assert client.get(f"/v1/jobs/{job_id}/artifacts").json() == {"artifacts": []}
    end(service, job_id)
    found = {item["name"]: item for item in client.get(f"/v1/jobs/{job_id}/artifacts").json()["artifacts"]}
    assert set(found) == {"encoder/manifest.json", "encoder/model.safetensors", "logs/attempt-1.txt"}
    assert found["encoder/model.safetensors"]["sha256"] == "a" * 64
    assert found["encoder/manifest.json"]["bytes"] > 100
    assert found["encoder/model.safetensors"]["uri"] == f"s3://maestro/jobs/{job_id}/encoder/model.safetensors"


def test_an_artifact_is_fetched_by_a_presigned_address(client: TestClient, service: Service) -> None:
    job_id = service.start()
    end(service, job_id)
    answer = client.get(f"/v1/jobs/{job_id}/artifacts/encoder/model.safetensors", follow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["location"].startswith(f"http://public.example/maestro/jobs/{job_id}/encoder/model.safetensors?")
    for name in ("encoder", "encoder/", "nope", "../x", "encoder/../../secret", ""):
        answer = client.get(f"/v1/jobs/{job_id}/artifacts/{name}", follow_redirects=False)
        assert answer.status_code in (404, 307), name
        assert "location" not in answer.headers or "public.example" not in answer.headers["location"], name
