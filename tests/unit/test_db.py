import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import insert, literal, select, text
from sqlalchemy.exc import IntegrityError, InternalError, StatementError

from service import jobs, lifecycle
from service.db import Database, db_now, utc_now
from service.lifecycle import transition
from service.models import ArtifactRow, JobRow
from tests.unit.service_fixtures import Service
from workers.contract import JobStatus

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
POSTGRES = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@SQLITE
def test_pragmas(service: Service) -> None:
    with service.database.read() as session:
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert session.execute(text("PRAGMA foreign_keys")).scalar() == 1
        assert session.execute(text("PRAGMA busy_timeout")).scalar() == 30000


def test_writers_queue_up_instead_of_failing_after_a_read(service: Service) -> None:
    """Each reads and then writes: in SQLite's deferred transactions all but one would fail with SQLITE_BUSY_SNAPSHOT, and without
    PostgreSQL's lock of the row what another has written would be lost."""
    job_id = service.submit()
    barrier = threading.Barrier(8)
    errors: list[BaseException] = []

    def add_one() -> None:
        barrier.wait()
        try:
            for _ in range(10):
                with service.database.write() as session:
                    row = jobs.find(session, job_id, lock=True)
                    row.attempt += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=add_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert service.job(job_id).attempt == 80


def test_a_reader_goes_on_while_somebody_writes(service: Service) -> None:
    job_id = service.submit()
    with service.database.write() as session:
        transition(session, job_id, to=JobStatus.CANCELLED, now=utc_now())
        assert service.job(job_id).status is JobStatus.QUEUED
    assert service.job(job_id).status is JobStatus.CANCELLED


def test_an_error_rolls_back(service: Service) -> None:
    job_id = service.submit()

    def fail() -> None:
        with service.database.write() as session:
            transition(session, job_id, to=JobStatus.CANCELLED, now=utc_now())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert service.job(job_id).status is JobStatus.QUEUED
    assert [event.type for event in service.events(job_id)] == ["job_queued"]


def test_foreign_keys_hold(service: Service) -> None:
    with pytest.raises(IntegrityError), service.database.write() as session:
        session.execute(insert(ArtifactRow).values(job_id="nope", name="n", kind="k", attempt=1, bytes=1, uri="u", created_at=utc_now()))


def test_text_with_nul_is_kept_without_it(service: Service) -> None:
    job_id = service.submit(name="a\0b")
    assert service.job(job_id).name == "a\ufffdb"
    with service.database.write() as session:
        lifecycle.set_reason(session, job_id, reason=None, detail="exit\0", now=utc_now())
        assert session.get(JobRow, "\0") is None
    assert service.job(job_id).detail == "exit\ufffd"


def test_datetimes_come_back_aware_and_in_utc(service: Service) -> None:
    job_id = service.submit()
    at = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    with service.database.write() as session:
        session.get_one(JobRow, job_id).started_at = at
    started_at = service.job(job_id).started_at
    assert started_at == at
    assert started_at is not None
    assert started_at.tzinfo == UTC
    with pytest.raises((AssertionError, StatementError)), service.database.write() as session:
        session.get_one(JobRow, job_id).started_at = datetime(2026, 1, 1)  # noqa: DTZ001


def test_the_databases_clock(service: Service) -> None:
    with service.database.read() as session:
        now, later = session.execute(select(db_now(), db_now(90.5))).one()
        assert abs(now - utc_now()) < timedelta(seconds=2)
        assert timedelta(seconds=90) < later - now < timedelta(seconds=91)
        assert session.scalar(select(db_now() < literal(utc_now() + timedelta(seconds=5), type_=db_now.type)))
        assert not session.scalar(select(db_now() < literal(utc_now() - timedelta(seconds=5), type_=db_now.type)))


@SQLITE
def test_the_claim_uses_its_index(service: Service) -> None:
    with service.database.read() as session:
        query = "EXPLAIN QUERY PLAN SELECT id FROM jobs WHERE due_at <= '2026-01-01' AND (lease_expires_at IS NULL) LIMIT 1"
        assert "ix_jobs_due_at" in str(session.execute(text(query)).all())


@POSTGRES
def test_the_claim_uses_its_index_in_postgresql(service: Service) -> None:
    with service.database.read() as session:
        session.execute(text("SET LOCAL enable_seqscan = off"))  # of so few rows it would read all
        query = "EXPLAIN SELECT id FROM jobs WHERE due_at <= '2026-01-01' AND (lease_expires_at IS NULL) LIMIT 1"
        assert "ix_jobs_due_at" in str(session.execute(text(query)).all())


@POSTGRES
def test_readers_see_a_snapshot_and_cannot_write(service: Service) -> None:
    job_id = service.submit()
    with service.database.read() as session:
        assert session.get_one(JobRow, job_id).status == JobStatus.QUEUED
        service.cancel(job_id)
        assert session.scalar(select(JobRow.status).where(JobRow.id == job_id)) == JobStatus.QUEUED
        with pytest.raises(InternalError, match="read-only transaction"):
            session.execute(text("DELETE FROM events"))


@POSTGRES
def test_nothing_waits_for_ever(service: Service) -> None:
    with service.database.write() as session:
        found = {name: session.scalar(text(f"SHOW {name}")) for name in ("lock_timeout", "statement_timeout", "timezone")}
    assert found == {"lock_timeout": "30s", "statement_timeout": "1min", "timezone": "UTC"}


def test_nothing_of_the_database_is_made_before_it_is_used(tmp_path: Path) -> None:
    Database(f"sqlite:///{tmp_path}/new.db").close()
    assert not (tmp_path / "new.db").exists()
