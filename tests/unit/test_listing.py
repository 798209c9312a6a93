"""Lists of jobs: what filters find, what pages cover, and what the databases do for it."""

import base64
import random
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, update

from service import listing
from service.db import Database
from service.errors import Invalid
from service.listing import Filters
from service.models import JobRow
from service.views import JobSummary
from tests.many_jobs import APART, FIRST, fill
from tests.unit.service_fixtures import PROBE, Service
from workers.contract import JobStatus


def listed(client: TestClient, **params: Any) -> list[str]:
    answer = client.get("/v1/jobs", params=params)
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["jobs"]]


def refused(client: TestClient, **params: Any) -> dict[str, str]:
    answer = client.get("/v1/jobs", params=params)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:maestro:invalid-request"), answer.text
    [error] = answer.json()["errors"]
    return dict(error)


def test_several_statuses_are_any_of_them(client: TestClient, service: Service) -> None:
    first, second, third, fourth = (service.submit() for _ in range(4))
    service.cancel(second)
    service.pause(third)
    assert listed(client, status=["cancelled", "paused"]) == [third, second]
    assert listed(client, status=["queued", "paused", "queued"]) == [fourth, third, first]
    assert listed(client, status="cancelled", kind="pretrain") == [second]
    assert refused(client, status=["queued", "done"])["field"] == "status.1"


def test_labels_by_key_and_value_or_by_key(client: TestClient, service: Service) -> None:
    both = service.submit(labels={"team": "cells", "stage": "final"})
    other = service.submit(labels={"team": "roads", "a:b": "x:y", "empty": ""})
    service.submit()
    assert listed(client, label="team:cells") == [both]
    assert listed(client, label="team") == [other, both]
    assert listed(client, label=["team", "stage:final"]) == [both]
    assert listed(client, label=["team:roads", "stage"]) == []
    assert listed(client, label="a:b:x:y") == listed(client, label="a:b") == listed(client, label="empty:") == [other]
    assert listed(client, label="Team:cells") == listed(client, label="tea") == []
    assert refused(client, label=["x"] * 9)["field"] == "label"


def test_text_is_beginnings_of_words_of_name_and_id(client: TestClient, service: Service) -> None:
    cells = service.submit(name="Cells/ViT-base_2026 (again)")
    snow = service.submit(name="Straße 東京タワー 50%")
    for text in ("cells", "CEL", "vit", "base 2026", "again cells", "(2026)", "cells\0", cells, cells[:9].upper()):
        assert cells in listed(client, text=text), text
    for text in ("strasse", "STRASSE", "東京", "50%"):
        assert listed(client, text=text) == [snow], text
    for text in ("ells", "cells roads", "京", "%q", "q_", "x" * 65):
        assert listed(client, text=text) == [], text
    for text in ("%", "_", "\0", " ", "--"):
        assert refused(client, text=text)["field"] == "text"
    assert refused(client, text="x" * 201)["field"] == "text"


def test_times_of_submission(client: TestClient, service: Service) -> None:
    fill(service.database, 5)
    first, second, third, fourth, fifth = reversed(listed(client))
    after, before = FIRST + APART, FIRST + 4 * APART
    assert listed(client, created_after=after.isoformat()) == [fifth, fourth, third]
    assert listed(client, created_before=before.isoformat()) == [fourth, third, second, first]
    assert listed(client, created_after=after.isoformat(), created_before=before.isoformat()) == [fourth, third]
    assert listed(client, created_after="9999-12-31T23:59:59Z") == []
    for text in ("yesterday", "2026-01-01T00:00:00", "9999-12-31T23:59:59-12:00x"):  # without a zone it could mean any
        assert refused(client, created_after=text)["field"] == "created_after"


def test_times_at_which_they_ended(client: TestClient, service: Service) -> None:
    jobs = fill(service.database, 5, seed=1)
    assert all(job["finished_at"] for job in jobs)
    service.submit()
    ids = [job["id"] for job in reversed(jobs)]
    after, before = FIRST + 2 * APART, FIRST + 5 * APART
    assert listed(client, finished_after=after.isoformat()) == ids[:3]
    assert listed(client, finished_before=before.isoformat()) == ids[1:]
    assert listed(client, finished_after=after.isoformat(), finished_before=before.isoformat()) == ids[1:3]
    assert listed(client, finished_before="9999-12-31T23:59:59Z") == ids
    assert listed(client, finished_before=before.isoformat(), created_before=(FIRST + APART).isoformat()) == ids[-1:]
    assert refused(client, finished_after="2026-01-01")["field"] == "finished_after"


def test_what_ended_before_it_was_submitted_by_another_clock_is_found(client: TestClient, service: Service) -> None:
    [job] = fill(service.database, 1, seed=1)
    with service.database.write() as session:
        session.execute(update(JobRow).values(finished_at=FIRST - timedelta(hours=1)))
    assert listed(client, finished_before=FIRST.isoformat()) == [job["id"]]


def test_only_the_fields_asked_for(client: TestClient, service: Service) -> None:
    job_id = service.start(labels={"a": "b"})
    with service.database.write() as session:
        session.execute(update(JobRow).values(progress={"step": 1, "num_steps": 2, "epoch": 0.5, "loss": "NaN"}))
    whole = client.get("/v1/jobs").json()["jobs"]
    assert list(whole[0]) == list(JobSummary.model_fields)
    assert whole[0]["progress"] == {"step": 1, "num_steps": 2, "epoch": 0.5, "images_per_second": None, "eta_seconds": None, "loss": "NaN"}
    assert whole[0] == {name: value for name, value in client.get(f"/v1/jobs/{job_id}").json().items() if name in whole[0]}
    found = client.get("/v1/jobs", params={"fields": "status, name ,progress"}).json()["jobs"]
    assert found == [{name: whole[0][name] for name in ("status", "name", "progress")}]
    for fields in ("spec", "id,spec", "", "id,,name", "id;name", "_sa_instance_state"):
        error = refused(client, fields=fields)
        assert error["field"] == "fields"
        assert "there are id, project, name, kind," in error["message"]


def test_a_list_reads_neither_specs_nor_series(client: TestClient, service: Service) -> None:
    service.start()
    with statements(client.app.state.database) as told:  # type: ignore[attr-defined]
        client.get("/v1/jobs")
        client.get("/v1/jobs", params={"fields": "name", "text": "digits", "kind": "pretrain"})
    of_jobs = [sql for sql, _ in told]
    assert len(of_jobs) == 3
    assert not any(column in sql for sql in of_jobs for column in ("jobs.spec", "jobs.metrics", "jobs.notes", "metric_batches", "events"))
    assert "jobs.labels" not in of_jobs[-1]


@pytest.mark.parametrize(
    "cursor",
    [
        *("", "x", "%%%", "ä", "\0", "MjAyNi0wMS0wMXw=", "a" * 201, "\ud7ff" * 50),
        *(
            base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
            for text in ("newest|1|", "newest|x|a", "oldest|1|a", "newest|-1|a", "newest|1|a|b", "newest|1|'", "newest|1|\0", "newest|²|a")
        ),
        base64.urlsafe_b64encode(b"newest|" + b"9" * 18 + b"|a").decode(),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_cursor_that_no_page_gave(client: TestClient, cursor: str) -> None:
    assert refused(client, cursor=cursor)["field"] == "cursor"


def test_a_cursor_at_the_end_of_time(client: TestClient, service: Service) -> None:
    job_id = service.submit()
    last = base64.urlsafe_b64encode(b"newest|" + b"9" * 17 + b"|" + b"z" * 40).decode()
    assert listed(client, cursor=last) == [job_id]
    assert listed(client, cursor=last.rstrip("=")) == [job_id]


def everything(database: Database, filters: Filters, *, limit: int) -> list[str]:
    """By pages, none of which is longer than asked for."""
    found, cursor = list[str](), None
    while True:
        with database.read() as session:
            page = listing.list_jobs(session, filters, columns=["id"], limit=limit, cursor=cursor)
        assert len(page.rows) <= limit
        found += [row.id for row in page.rows]
        if page.next_cursor is None:
            return found
        assert page.next_cursor != cursor
        cursor = page.next_cursor


def fits(job: dict[str, Any], filters: Filters) -> bool:
    labels = {text for key, value in job["labels"].items() for text in (key, f"{key}:{value}")}
    return (
        filters.project in (None, job["project"])
        and (not filters.statuses or job["status"] in filters.statuses)
        and filters.kind in (None, job["kind"])
        and labels.issuperset(filters.labels)
        and all(any(own.startswith(word) for own in job["words"].split()) for word in (filters.text or "").split())
        and (filters.created_after is None or job["created_at"] > filters.created_after)
        and (filters.created_before is None or job["created_at"] < filters.created_before)
        and (filters.finished_after is None or (job["finished_at"] is not None and job["finished_at"] > filters.finished_after))
        and (filters.finished_before is None or (job["finished_at"] is not None and job["finished_at"] < filters.finished_before))
    )


def random_filters(chance: random.Random) -> Filters:
    def maybe(*values: Any) -> Any:
        return chance.choice([None, *values])

    return Filters(
        project=maybe("default", "cells", "rare", "none"),
        statuses=maybe([JobStatus.FAILED], [JobStatus.FAILED, JobStatus.CANCELLED], [JobStatus.PAUSED], list(JobStatus)) or (),
        kind=maybe("pretrain", "probe", "evaluate"),
        labels=maybe(["team:cells"], ["team"], ["sweep:1", "team:roads"], ["none"]) or (),
        text=maybe("cel", "vit run1", "run17", "glass", "none"),
        created_after=maybe(FIRST + 100 * APART),
        created_before=maybe(FIRST + 300 * APART),
        finished_after=maybe(FIRST + 150 * APART),
        finished_before=maybe(FIRST + 160 * APART, FIRST + 350 * APART),
    )


def test_pages_cover_what_fits_once_newest_first_whatever_is_asked(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = list(reversed(fill(service.database, 400)))
    chance = random.Random(1)
    for most in (7, 2000):
        monkeypatch.setattr(listing, "MAX_SEEN", most)
        for _ in range(40):
            filters = random_filters(chance)
            expected = [job["id"] for job in jobs if fits(job, filters)]
            assert everything(service.database, filters, limit=chance.choice([1, 10, 200])) == expected, filters


FILTERS = {
    "none": Filters(),
    "project": Filters(project="cells"),
    "status": Filters(statuses=[JobStatus.FAILED]),
    "status in a project": Filters(project="cells", statuses=[JobStatus.SUCCEEDED]),
    "statuses": Filters(statuses=[JobStatus.FAILED, JobStatus.PAUSED]),
    "kind": Filters(kind="probe"),
    "kind in a project": Filters(project="cells", kind="evaluate"),
    "label": Filters(labels=["team:cells"]),
    "label in a project": Filters(project="cells", labels=["team:cells"]),
    "key": Filters(labels=["team"]),
    "labels": Filters(labels=["team:cells", "sweep:7"]),
    "rare word": Filters(text="run17"),
    "rare word in a project": Filters(project="cells", text="run17"),
    "common word": Filters(text="vit"),
    "times": Filters(created_after=FIRST + 900 * APART, created_before=FIRST + 1200 * APART),
    "ended in an hour": Filters(finished_after=FIRST + 900 * APART, finished_before=FIRST + 960 * APART),
    "ended in a project": Filters(project="cells", finished_after=FIRST + 900 * APART, finished_before=FIRST + 960 * APART),
    "ended since": Filters(finished_after=FIRST + 900 * APART),
    "ended before": Filters(finished_before=FIRST + 1200 * APART, kind="probe"),
    "all": Filters("cells", [JobStatus.FAILED], "probe", ["team:cells"], "vit", FIRST, FIRST + timedelta(days=900)),
}


# the others may sort the jobs that they look at, which are no more than MAX_SEEN
SORTED_BY_THEIR_INDEX = (
    set(FILTERS)
    - {"labels", "rare word", "rare word in a project", "common word", "all"}
    - {name for name in FILTERS if name.startswith("ended")}
)


@pytest.mark.parametrize("deep", [False, True], ids=["first", "deep"])
def test_every_filter_goes_by_its_index(service: Service, monkeypatch: pytest.MonkeyPatch, deep: bool) -> None:
    """No table is read as a whole, and none is sorted."""
    fill(service.database, 2000)
    monkeypatch.setattr(listing, "MAX_SEEN", 150)
    cursor = listing._cursor(listing.Place(FIRST + 1500 * APART, "m")) if deep else None
    for name, filters in FILTERS.items():
        with statements(service.database) as told, service.database.read() as session:
            page = listing.list_jobs(session, filters, columns=list(JobSummary.model_fields), limit=20, cursor=cursor)
        assert page.rows or name in ("kind in a project", "all", "labels", "ended before"), name
        assert len(told) <= 7, name
        for sql, parameters in told:
            plan = explain(service.database, sql, parameters)
            assert "Seq Scan" not in plan, (name, plan)
            reads = [line for line in plan.splitlines() if line.startswith(("SCAN job", "SEARCH job"))]
            assert all("USING" in line for line in reads), (name, plan)
            assert "SCAN jobs" not in plan or "USING INDEX ix_jobs" in plan, (name, plan)
            if name in SORTED_BY_THEIR_INDEX:
                assert "TEMP B-TREE" not in plan, (name, plan)
                assert "Sort" not in plan, (name, plan)


def explain(database: Database, sql: str, parameters: Any) -> str:
    is_sqlite = database.engine.dialect.name == "sqlite"
    prefix = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
    with database.engine.connect() as connection:
        if not is_sqlite:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # of so few rows it would read all
        return "\n".join(str(row[-1]) for row in connection.exec_driver_sql(f"{prefix} {sql}", parameters))


class statements:
    """The SELECTs that a database is asked inside the block, with their parameters."""

    def __init__(self, database: Database) -> None:
        self._engine = database.engine
        self._told: list[tuple[str, Any]] = []

    def __enter__(self) -> list[tuple[str, Any]]:
        event.listen(self._engine, "before_cursor_execute", self._note)
        return self._told

    def __exit__(self, *exc_info: object) -> None:
        event.remove(self._engine, "before_cursor_execute", self._note)

    def _note(self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if "FROM job" in statement:
            self._told.append((statement, parameters))


def test_a_text_without_a_word(service: Service) -> None:
    with pytest.raises(Invalid), service.database.read() as session:
        listing.list_jobs(session, Filters(text="-", kind="probe"), columns=["id"], limit=1)


def test_a_job_is_found_by_what_it_starts_from_and_as_before(service: Service) -> None:
    parent = service.submit()
    child = service.submit(PROBE | {"encoder": {"job": parent}})
    assert (service.row(parent).encoder_job, service.row(child).encoder_job) == (None, parent)
