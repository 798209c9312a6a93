import json
import math
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import func, inspect, select, text
from sqlalchemy.orm import Session

from service import events, listing, metrics, search
from service.db import Database
from service.migrations.schema import current_revision, downgrade, head_revision, upgrade
from service.models import ArtifactRow, AttemptRow, Base, DeliveryRow, JobLabelRow, JobRow, JobWordRow, WebhookRow
from workers.contract import EventType, Points


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty one."""
    server = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    name = server.create() if server is not None else None
    database = Database(server.url(name) if server is not None else f"sqlite:///{tmp_path}/maestro.db")
    yield database
    database.close()
    if server is not None:
        server.drop(name)


def test_the_migrated_schema_is_the_models(database: Database) -> None:
    upgrade(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_down_and_up_again(database: Database) -> None:
    upgrade(database)
    downgrade(database)
    assert inspect(database.engine).get_table_names() == ["alembic_version"]
    upgrade(database)
    upgrade(database)
    assert current_revision(database) == head_revision() is not None


def test_jobs_survive_the_way_up_and_down(database: Database) -> None:
    """A job of the first schema, which has failed twice and is being cancelled; then paused, in the schema of today."""
    upgrade(database, "0001")
    columns = {
        "id": "'j'",
        "name": "'n'",
        "kind": "'pretrain'",
        "labels": "'{}'",
        "spec": """'{"resources":{"num_workers":4,"cpus_per_worker":2,"gpus_per_worker":1}}'""",
        "body_hash": "'h'",
        "status": "'running'",
        "desired_state": "'cancel'",
        "attempt": "3",
        "version": "9",
        "created_at": "'2026-01-01 00:00:00.000000'",
        "cancel_requested_at": "'2026-01-02 00:00:00.000000'",
    }
    with database.write() as session:
        connection = session.connection()
        connection.exec_driver_sql(f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({', '.join(columns.values())})")
        event = "INSERT INTO events (job_id, type, at, data) VALUES ('j', 'job_queued', '2026-01-01 00:00:00.000000', '{}')"
        session.execute(text(event))
    upgrade(database)
    with database.write() as session:
        row = session.get_one(JobRow, "j")
        assert (row.num_failures, row.attempt, row.version) == (2, 3, 9)
        assert row.desired_since == datetime(2026, 1, 2, tzinfo=UTC)
        assert (row.max_cpus, row.max_gpus) == (8, 4)
        assert (row.num_cpus, row.num_gpus, row.project, row.priority, row.waiting_since) == (8, 4, "default", 0, None)
        row.status, row.desired_state = "paused", "pause"
    downgrade(database, "0001")
    with database.read() as session:
        found = session.execute(text("SELECT status, desired_state, attempt, cancel_requested_at FROM jobs")).one()
        assert (found.status, found.desired_state, found.attempt) == ("queued", "run", 3)
        assert "2026-01-02" in str(found.cancel_requested_at)
        assert session.scalar(text("SELECT count(*) FROM events WHERE job_id = 'j'")) == 1
    upgrade(database)


def test_what_only_this_version_knows_is_said_in_the_older_ones_words(database: Database) -> None:
    """An elastic job that is stopped by its time limit, after a hang; and up again."""
    upgrade(database)
    spec = {
        "resources": {"num_workers": {"min": 2, "max": 4}, "cpus_per_worker": 3, "gpus_per_worker": 0},
        "retry": {"max_failures": 5, "max_user_failures": 1, "forgive_after_hours": 1.0, "hang_minutes": 15.0},
        "priority": 7,
        "time_limit_hours": 1.0,
        "name": "n",
    }
    at = datetime(2026, 1, 1, tzinfo=UTC)
    fixed = {"name": "n", "kind": "pretrain", "labels": {}, "body_hash": "h", "desired_state": "run", "version": 1, "created_at": at}
    with database.write() as session:
        needs = {"num_cpus": 6, "max_cpus": 12}
        session.add(JobRow(id="j", spec=spec, status="stopping", reason="time_limit_reached", attempt=1, **needs, **fixed))
        session.flush()
        session.add(AttemptRow(job_id="j", number=1, submission_id="j-a1", num_cpus=6, num_gpus=0, created_at=at, reason="hung"))
    downgrade(database, "0002")
    with database.read() as session:
        found = session.execute(text("SELECT status, reason, spec FROM jobs")).one()
        assert (found.status, found.reason) == ("running", "retries_exhausted")
        told = json.loads(found.spec) if isinstance(found.spec, str) else found.spec
        resources = {"num_workers": 2, "cpus_per_worker": 3, "gpus_per_worker": 0}
        assert told == {"resources": resources, "retry": {"max_failures": 5}, "name": "n"}
        assert session.scalar(text("SELECT reason FROM attempts")) == "worker_died"
    upgrade(database)
    with database.read() as session:
        assert (session.get_one(JobRow, "j").num_cpus, session.get_one(JobRow, "j").max_cpus) == (6, 6)


def test_idempotency_keys_survive_the_way_up_and_down(database: Database) -> None:
    """As long as they may be; of two projects with the same key, which the older schema cannot hold, the first one's remains."""
    upgrade(database, "0003")
    fixed = "name, kind, labels, spec, body_hash, status, desired_state, attempt, version, created_at"
    values = "'n', 'pretrain', '{}', '{}', 'h', 'queued', 'run', 0, 1, '2026-01-01 00:00:00.000000'"

    def insert(job_id: str, key: str | None, project: str) -> None:
        with database.write() as session:
            statement = f"INSERT INTO jobs (id, idempotency_key, project, {fixed}) VALUES (:id, :key, :project, {values})"
            session.execute(text(statement), {"id": job_id, "key": key, "project": project})
            session.execute(
                text("INSERT INTO events (job_id, type, at, data) VALUES (:id, 't', '2026-01-01 00:00:00.000000', '{}')"), {"id": job_id}
            )

    def keys() -> dict[str, str | None]:
        with database.read() as session:
            return {row.id: row.idempotency_key for row in session.execute(text("SELECT id, idempotency_key FROM jobs"))}

    before = {"a": "k" * 200, "b": "k", "c": "default:k", "d": None}
    for job_id, key in before.items():
        insert(job_id, key, "default")
    upgrade(database)
    assert keys() == {"a": "default\n" + "k" * 200, "b": "default\nk", "c": "default\ndefault:k", "d": None}
    insert("e", "x" * 64 + "\n" + "k" * 200, "x" * 64)
    downgrade(database, "0003")
    assert keys() == before | {"e": None}
    upgrade(database)


def insert(database: Database, table: str, **values: object) -> None:
    with database.write() as session:
        names = ", ".join(f":{name}" for name in values)
        session.execute(text(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({names})"), values)


def curves(session: Session) -> dict[str, dict[int, float]]:
    return {name: dict(zip(one.steps, one.values, strict=True)) for name, one in metrics.read(session, "j").items()}


def test_series_survive_the_way_up_and_down(database: Database) -> None:
    """Of JSON to columns: a run that was started again from an earlier step, with NaN; on the way back nothing changes but its form."""
    upgrade(database, "0004")
    told: list[tuple[int, int, list[int], dict[str, list[float | str | None]]]] = [
        (1, 0, [1, 2, 5], {"loss": [1.5, "NaN", None], "top1": [None, None, 0.5]}),
        (1, 1, [], {}),
        (1, 4, [3, 4, 6], {"loss": [0.1, 4.5, "-Infinity"], "top1": [0.3, None, None]}),
        (2, 0, [3, 4, 5], {"loss": [2.5, None, "Infinity"]}),
    ]
    at = "2026-01-01 00:00:00.000000"
    run = {"name": "n", "kind": "pretrain", "labels": "{}", "spec": "{}", "body_hash": "h", "status": "running", "desired_state": "run"}
    for job in ("j", "other"):
        insert(database, "jobs", id=job, attempt=2, version=1, created_at=at, **run)
        for number in (1, 2):
            insert(database, "attempts", job_id=job, number=number, submission_id=f"{job}-a{number}", num_cpus=1, num_gpus=0, created_at=at)
    for attempt, sequence, steps, series in told:
        points = json.dumps({"steps": steps, "series": series}) if steps else None
        key = {"job_id": "j", "attempt": attempt, "incarnation": 7, "sequence": sequence}
        insert(database, "metric_batches", **key, points=points, first_step=min(steps, default=None), last_step=max(steps, default=None))
    upgrade(database)
    expected = {"loss": {1: 1.5, 2: math.nan, 3: 2.5, 5: math.inf}, "top1": {3: 0.3}}
    with database.write() as session:
        assert repr(curves(session)) == repr(expected)
        assert metrics.read(session, "other") == {}
        for sequence, is_new in ((0, False), (1, False), (4, False), (5, True), (6, True)):
            points = Points(steps=[9 + sequence], series={"loss": [9.0]}) if sequence == 6 else None
            assert metrics.append(session, "j", attempt=1, incarnation=7, sequence=sequence, points=points) is is_new
    downgrade(database, "0004")
    with database.read() as session:
        found = session.execute(
            text("SELECT attempt, sequence, points, first_step, last_step FROM metric_batches ORDER BY attempt, sequence")
        )
        rows = [(*row[:2], json.loads(row.points) if isinstance(row.points, str) else row.points, *row[3:]) for row in found]
    first = {"loss": [1.5, "NaN", 0.1, 4.5, None, "-Infinity"], "top1": [None, None, 0.3, None, 0.5, None]}
    assert rows == [
        *((1, sequence, None, None, None) for sequence in range(4)),
        (1, 4, {"steps": [1, 2, 3, 4, 5, 6], "series": first}, 1, 6),
        (1, 5, None, None, None),
        (1, 6, {"steps": [15], "series": {"loss": [9.0]}}, 15, 15),
        (2, 0, {"steps": [3, 5], "series": {"loss": [2.5, "Infinity"]}}, 3, 5),
    ]
    upgrade(database)
    with database.read() as session:
        assert repr(curves(session)) == repr(expected)


def test_jobs_that_are_there_are_found_and_stay_when_it_goes_back(database: Database) -> None:
    """By words and labels, whatever is in them; one that is being deleted is there again in the older schema."""
    upgrade(database, "0004")
    jobs = {
        "a": ("Straße/ViT_1", {"team": "cells", "a:b": ""}, {"encoder": {"job": "p1"}}),
        "b": ("%--", {}, {"encoder": {"artifact": "s3://maestro/jobs/p2/encoder/"}}),
        "c": ("x" * 200, {"k" * 63: "v" * 200}, {"encoder": {"artifact": "s3://maestro/elsewhere/"}}),
        "d": ("n", {}, {"encoder": None}),
    }
    columns = [
        "id",
        "name",
        "labels",
        "spec",
        "project",
        "kind",
        "body_hash",
        "status",
        "desired_state",
        "attempt",
        "version",
        "created_at",
    ]
    insert = text(f"INSERT INTO jobs ({', '.join(columns)}) VALUES ({', '.join(f':{name}' for name in columns)})")
    fixed = {"kind": "probe", "body_hash": "h", "status": "failed", "desired_state": "run", "attempt": 0, "version": 1, "project": "cells"}
    with database.write() as session:
        for job_id, (name, labels, spec) in jobs.items():
            own = {"id": job_id, "name": name, "labels": json.dumps(labels), "spec": json.dumps(spec)}
            session.execute(insert, fixed | own | {"created_at": "2026-01-01 00:00:00.000000"})
    upgrade(database)
    with database.write() as session:
        assert {row.id: row.encoder_job for row in session.query(JobRow)} == {"a": "p1", "b": "p2", "c": None, "d": None}
        before = (
            [(row.word, row.job_id) for row in session.query(JobWordRow)],
            [(row.label, row.job_id) for row in session.query(JobLabelRow)],
        )
        said = {row.id: row.words for row in session.query(JobRow)}
        for row in session.query(JobRow):
            search.forget(session, row.id)
            search.index(session, row)
        session.flush()
        after = (
            [(row.word, row.job_id) for row in session.query(JobWordRow)],
            [(row.label, row.job_id) for row in session.query(JobLabelRow)],
        )
        assert [sorted(one) for one in before] == [sorted(one) for one in after], "as it is done for new jobs"
        assert said == {row.id: row.words for row in session.query(JobRow)}
        found = listing.list_jobs(session, listing.Filters("cells", text="strasse 1", labels=["a:b:", "team"]), columns=["id"], limit=9)
        assert [row.id for row in found.rows] == ["a"]
        session.get_one(JobRow, "d").deleted_at = datetime(2026, 1, 1, tzinfo=UTC)
    downgrade(database, "0004")
    with database.read() as session:
        assert session.scalars(text("SELECT id FROM jobs ORDER BY id")).all() == ["a", "b", "c", "d"]
    upgrade(database)


def test_webhooks_go_with_their_tables_and_events_stay(database: Database) -> None:
    upgrade(database)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    fixed = {"name": "n", "kind": "pretrain", "labels": {}, "spec": {}, "body_hash": "h", "desired_state": "run", "status": "queued"}
    with database.write() as session:
        session.add(WebhookRow(id="w", url="https://a.example", events="all", is_enabled=True, created_at=at))
        session.add(JobRow(id="j", created_at=at, **fixed))
        session.flush()
        events.append(session, "j", EventType.JOB_QUEUED, {}, at=at)
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(DeliveryRow)) == 1
    downgrade(database, "0004")
    assert not {"webhooks", "webhook_deliveries"} & set(inspect(database.engine).get_table_names())
    upgrade(database)
    with database.write() as session:
        assert session.scalar(text("SELECT count(*) FROM events")) == 1
        assert session.scalar(select(func.count()).select_from(DeliveryRow)) == 0
        events.append(session, "j", EventType.CANCEL_REQUESTED, {}, at=at)


def test_training_states_and_their_policies_survive_the_way_up_and_down(database: Database) -> None:
    """Steps are read from names; what older versions cannot know goes, from specs too."""
    upgrade(database, "0007")
    at = "2026-01-01 00:00:00.000000"
    fixed = {"name": "n", "labels": "{}", "body_hash": "h", "status": "failed", "desired_state": "run", "attempt": 1, "version": 1}
    for job, kind, spec in (("j", "pretrain", {"checkpoint": {"every_steps": 9}}), ("e", "embed", {"x": 1})):
        insert(database, "jobs", id=job, kind=kind, spec=json.dumps(spec), created_at=at, **fixed)
    names = {
        "training_state/step=0000000400-a1-7/": ("training_state", 400),
        "reconstructions/step=0000000600.png": ("reconstruction", 600),
        "reconstructions/step=0000000600.npz": ("reconstruction_arrays", 600),
        "encoder/model.safetensors": ("encoder", None),
    }
    for name, (kind, _) in names.items():
        insert(database, "artifacts", job_id="j", name=name, kind=kind, attempt=1, bytes=1, uri="s3://b/x", created_at=at)
    upgrade(database)
    keep = {"last": 2, "every_steps": None, "best": None}
    with database.write() as session:
        assert {row.name: row.step for row in session.query(ArtifactRow)} == {name: step for name, (_, step) in names.items()}
        assert {row.id: row.keep for row in session.query(JobRow)} == {"j": keep, "e": None}
        row = session.get_one(JobRow, "j")
        row.spec = {"checkpoint": {"every_steps": 9, "keep": keep}, "seed": 3}
        session.get_one(ArtifactRow, ("j", "training_state/step=0000000400-a1-7/")).deleted_at = row.created_at
    downgrade(database, "0007")
    with database.read() as session:
        found = {
            row.id: json.loads(row.spec) if isinstance(row.spec, str) else row.spec for row in session.execute(text("SELECT * FROM jobs"))
        }
        assert found == {"j": {"checkpoint": {"every_steps": 9}, "seed": 3}, "e": {"x": 1}}
        assert session.scalar(text("SELECT count(*) FROM artifacts")) == 3
    upgrade(database)


def test_the_command_runs_from_anywhere(tmp_path: Path) -> None:
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MAESTRO_DATABASE_URL": f"sqlite:///{tmp_path}/maestro.db",
        "MAESTRO_SECRET_KEY": "s" * 32,
        "MAESTRO_API_TOKEN": "t" * 20,
        "MAESTRO_SERVICE_URL": "http://127.0.0.1:1",
        "MAESTRO_RAY_URL": "http://127.0.0.1:1",
        "MAESTRO_RAY_TOKEN": "r",
        "MAESTRO_S3_BUCKET": "maestro",
    }
    subprocess.run([sys.executable, "-m", "service.migrations"], cwd=tmp_path, env=environment, check=True, timeout=60)
    database = Database(environment["MAESTRO_DATABASE_URL"])
    assert current_revision(database) == head_revision()
    database.close()
