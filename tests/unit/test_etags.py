"""ETags: whoever has what there is, is told just that; and nothing that is shown changes without them."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from service import changes, etags
from service.db import utc_now
from service.models import AttemptRow, JobRow
from tests.unit.service_fixtures import Service
from tests.unit.test_listing import statements
from workers.contract import EventType

Change = Callable[[Service, str], object]


def set_columns(**values: Any) -> Change:
    def change(service: Service, job_id: str) -> None:
        with service.database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == job_id).values(values))

    return change


def silence(service: Service, job_id: str) -> None:
    """So long that the job has a condition, which no row says."""
    with service.database.write() as session:
        session.execute(update(AttemptRow).values(last_report_at=utc_now() - timedelta(hours=1)))


SHOWN: dict[str, Change] = {
    "progress": set_columns(progress={"step": 2, "num_steps": 9, "epoch": 0.1}),
    "metrics": set_columns(metrics={"loss": "NaN"}),
    "detail": set_columns(detail="another"),
    "reason": set_columns(reason="worker_died"),
    "result": set_columns(result_uri="s3://maestro/x/"),
    "attempt": set_columns(attempt=0),
    "started": set_columns(started_at=utc_now()),
    "finished": set_columns(finished_at=utc_now()),
    "version": set_columns(version=99),
    "name": set_columns(name="other"),
    "labels": set_columns(labels={"a": "b"}),
    "priority": set_columns(priority=1),
    "notes": set_columns(notes="n"),
    "a wish": lambda service, job_id: service.pause(job_id),
    "a condition told": lambda service, job_id: service.report(job_id, EventType.UPLOAD_DELAYED, sequence=5, message="away"),
    "a condition seen": silence,
}


@pytest.mark.parametrize("what", SHOWN)
def test_a_job_has_another_tag_when_anything_that_it_shows_is_another(client: TestClient, service: Service, what: str) -> None:
    job_id = service.start()
    first = client.get(f"/v1/jobs/{job_id}")
    same = client.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": first.headers["etag"]})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", first.headers["etag"])
    SHOWN[what](service, job_id)
    changed = client.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": first.headers["etag"]})
    assert changed.status_code == 200
    assert changed.headers["etag"] != first.headers["etag"]
    assert changed.json() != first.json() or what in ("finished", "attempt")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_all_that_a_job_shows_is_in_its_tag_or_never_changes(client: TestClient, service: Service) -> None:
    """A field that is added must be thought of: `etags._SHOWN`."""
    shown = set(client.get(f"/v1/jobs/{service.submit()}").json())
    never_change = {"id", "project", "kind", "created_at", "retry_of"}
    with_others = {"spec": "version", "reason_message": "reason"}
    assert shown == {*etags._SHOWN, *etags.EDITABLE, "conditions", *never_change, *with_others}
    assert set(changes.JobChange.model_fields) == set(etags.EDITABLE)


def test_an_unchanged_job_costs_one_query_without_its_spec(client: TestClient, service: Service) -> None:
    job_id = service.start()
    tag = client.get(f"/v1/jobs/{job_id}").headers["etag"]
    with statements(client.app.state.database) as told:  # type: ignore[attr-defined]
        assert client.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": tag}).status_code == 304
    [(sql, _)] = told
    assert "jobs.spec" not in sql


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_ways_to_name_a_tag(client: TestClient, service: Service) -> None:
    path = f"/v1/jobs/{service.submit()}"
    tag = client.get(path).headers["etag"]
    for known in (tag, f"W/{tag}", f'"x", {tag}', "*", f'"x",W/{tag} ,"y"'):
        assert client.get(path, headers={"If-None-Match": known}).status_code == 304, known
    for known in ("", '"x"', tag.strip('"'), tag[:-2] + '"', "W/", ",,,", '"' * 4000, "\xff"):
        assert client.get(path, headers={"If-None-Match": known.encode("latin-1")}).status_code == 200, known
    assert client.get(path, headers={"If-None-Match": "x" * 4001}).status_code == 422


def test_a_list_has_a_tag_too(client: TestClient, service: Service) -> None:
    job_id = service.start()
    first = client.get("/v1/jobs")
    tag = first.headers["etag"]
    assert client.get("/v1/jobs", headers={"If-None-Match": tag}).status_code == 304
    assert client.get("/v1/jobs", params={"limit": 7}, headers={"If-None-Match": tag}).status_code == 304  # it shows the same
    assert client.get("/v1/jobs", params={"fields": "id"}, headers={"If-None-Match": tag}).status_code == 200
    SHOWN["progress"](service, job_id)
    changed = client.get("/v1/jobs", headers={"If-None-Match": tag})
    assert (changed.status_code, changed.json()["jobs"][0]["progress"]["step"]) == (200, 2)
    service.submit()
    assert client.get("/v1/jobs", headers={"If-None-Match": changed.headers["etag"]}).status_code == 200


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_head_is_get_without_the_body(client: TestClient, service: Service) -> None:
    for path in (f"/v1/jobs/{service.submit()}", "/v1/jobs"):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.headers["etag"]) == (200, got.headers["etag"])
        assert head.headers["content-length"] == str(len(got.content))
        assert client.head(path, headers={"If-None-Match": got.headers["etag"]}).status_code == 304
    assert client.head("/v1/jobs/none").status_code == 404
