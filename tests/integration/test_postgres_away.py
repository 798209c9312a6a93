"""PostgreSQL crashes, is away and comes back: what was acknowledged is kept, and everything goes on by itself."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.db import Database
from service.dispatcher import Dispatcher
from service.ray_jobs import RayStatus
from tests.integration.runs import wait_for
from tests.postgres import Postgres
from tests.unit.service_fixtures import API_TOKEN, PRETRAIN, Service, make_settings, manifest_for, migrate
from workers.contract import EventType, JobStatus


@pytest.fixture
def server(run_mark: str) -> Iterator[Postgres]:
    """One of this test's own: others go on while it is away."""
    server = Postgres(run=run_mark)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def service(server: Postgres, tmp_path: Path) -> Iterator[Service]:
    url = server.url(server.create())
    migrate(url)
    database = Database(url)
    yield Service(make_settings(tmp_path, database_url=url), database)
    database.close()


@pytest.fixture
def dispatching(service: Service) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(service.database, service.storage, service.ray, service.settings)
    thread = threading.Thread(target=dispatcher.run)
    thread.start()
    yield dispatcher
    dispatcher.stop()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_a_job_goes_on_behind_the_databases_absence(server: Postgres, service: Service, dispatching: Dispatcher, mode: str) -> None:
    app = create_app(service.settings, storage=service.storage, ray=service.ray)
    with TestClient(app, headers={"Authorization": f"Bearer {API_TOKEN}"}, raise_server_exceptions=False) as client:
        job_id = client.post("/v1/jobs", json=PRETRAIN).json()["id"]
        wait_for(lambda: f"{job_id}-a1" in service.ray.jobs, seconds=30, what="the submission")
        wait_for(lambda: service.attempt(job_id).submitted_at, seconds=30, what="its note")
        service.ray.run(f"{job_id}-a1")
        service.report(job_id, EventType.WORKERS_STARTED)
        job = service.job(job_id)

        server.stop(mode=mode)
        for method, path in (("GET", f"/v1/jobs/{job_id}"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs")):
            answer = client.request(method, path, json=PRETRAIN if method == "POST" else None)
            assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json"), path
            assert answer.headers["retry-after"]
            assert "postgres" not in answer.text
        assert client.get("/livez").status_code == 200
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["missing"]) == (503, {"database": "The database does not answer."})
        service.storage.put_bytes(
            f"jobs/{job_id}/encoder/manifest.json", manifest_for(job).model_dump_json().encode()
        )  # the training went on, and ended
        service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)

        server.start()
        wait_for(lambda: client.get(f"/v1/jobs/{job_id}").json().get("status") == "succeeded", seconds=60, what="the end of the job")
        assert service.ray.num_submitted == {f"{job_id}-a1": 1}
        told = [event.data["to"] for event in service.events(job_id) if event.type == EventType.STATUS_CHANGED]
        assert told == [JobStatus.STARTING, JobStatus.RUNNING, JobStatus.FINALIZING, JobStatus.SUCCEEDED]
