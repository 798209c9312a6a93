"""A service over a real SQLite file, with Ray and object storage in memory, and a clock that stands until told."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from mae_core.config import RUN_SPEC
from service import jobs, reports
from service.app import create_app
from service.db import Database, utc_now
from service.dispatcher import Dispatcher
from service.migrations.schema import upgrade
from service.models import AttemptRow, EventRow, JobRow
from service.projects import DEFAULT_PROJECT
from service.settings import Settings
from service.views import JobView
from tests.postgres import Postgres
from tests.unit.fake_ray import FakeRay
from tests.unit.fake_storage import FakeStorage
from workers.contract import Event, EventType, Report, submission_id
from workers.stored import EncoderManifest, result_prefix

API_TOKEN = "test-api-token-of-enough-length"
PRETRAIN: dict[str, Any] = {
    "kind": "pretrain",
    "name": "digits",
    "model": {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 1},
    "data": {"source": "digits"},
    "optim": {"epochs": 2, "batch_size": 64, "warmup_epochs": 1},
}
PROBE: dict[str, Any] = {
    "kind": "probe",
    "name": "digits-probe",
    "data": {"source": "digits", "validation_fraction": 0.2},
    "optim": {"epochs": 2, "batch_size": 64, "warmup_epochs": 1},
}


def make_settings(folder: Path, **changes: Any) -> Settings:
    values = {
        "database_url": f"sqlite:///{folder}/maestro.db",
        "secret_key": "k" * 32,
        "api_token": API_TOKEN,
        "service_url": "http://127.0.0.1:8000",
        "ray_url": "http://127.0.0.1:8265",
        "ray_token": "ray",
        "s3_endpoint": "http://127.0.0.1:9000",
        "s3_bucket": "maestro",
        "rate_limit": 10_000,  # tests ask faster than people
    }
    return Settings.model_validate(values | changes)


def manifest_for(job: JobView, *, attempt: int = 1, **changes: Any) -> EncoderManifest:
    spec = job.spec
    values = {
        "job": job.id,
        "attempt": attempt,
        "kind": job.kind,
        "created_at": datetime.now(UTC),
        "model": spec["model"],
        "normalize": {"mean": [0.5], "std": [0.5]},
        "spec": spec,
        "metrics": {"loss": 0.25},
        "versions": {"torch": "2"},
        "git_revision": None,
        "files": {"model.safetensors": {"bytes": 10, "sha256": "a" * 64}},
    }
    return EncoderManifest.model_validate(values | changes)


@dataclass
class Service:
    """All parts of one service, and what a test does to them."""

    settings: Settings
    database: Database
    storage: FakeStorage = field(default_factory=FakeStorage)
    ray: FakeRay = field(default_factory=FakeRay)
    now: datetime = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        self.dispatcher = self.new_dispatcher()

    def new_dispatcher(self) -> Dispatcher:
        return Dispatcher(self.database, self.storage, self.ray, self.settings, clock=lambda: self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def tick(self, seconds: float = 0.0) -> int:
        """Some time later, a round."""
        self.now = max(self.now, utc_now()) + timedelta(seconds=seconds)
        return self.dispatcher.tick()

    def expire_leases(self) -> None:
        """As if their time had passed: leases go by the database's own clock."""
        with self.database.write() as session:
            session.execute(update(JobRow).where(JobRow.lease_token.is_not(None)).values(lease_expires_at=utc_now() - timedelta(seconds=1)))

    def submit(self, spec: dict[str, Any] | None = None, *, project: str = DEFAULT_PROJECT, **changes: Any) -> str:
        parsed = RUN_SPEC.validate_python((spec or PRETRAIN) | changes)
        return jobs.submit(self.database, self.storage, self.settings, parsed, idempotency_key=None, project=project).job.id

    def job(self, job_id: str) -> JobView:
        with self.database.read() as session:
            return jobs.get(session, job_id)

    def attempt(self, job_id: str, number: int = 1) -> AttemptRow:
        with self.database.read() as session:
            return session.get_one(AttemptRow, (job_id, number))

    def events(self, job_id: str) -> list[EventRow]:
        with self.database.read() as session:
            return list(session.query(EventRow).filter(EventRow.job_id == job_id).order_by(EventRow.id))

    def row(self, job_id: str) -> JobRow:
        with self.database.read() as session:
            return session.get_one(JobRow, job_id)

    def pause(self, job_id: str) -> JobView:
        with self.database.write() as session:
            return jobs.request_pause(session, job_id)[0]

    def resume(self, job_id: str) -> JobView:
        with self.database.write() as session:
            return jobs.request_resume(session, job_id)[0]

    def cancel(self, job_id: str) -> JobView:
        with self.database.write() as session:
            return jobs.request_cancel(session, job_id)[0]

    def report(self, job_id: str, *types: EventType, attempt: int = 1, sequence: int = 0, incarnation: int = 1, **data: Any) -> None:
        events = [Event(type=type, at=datetime.now(UTC), data=data) for type in types]
        message = Report(incarnation=incarnation, sequence=sequence, events=events)
        reports.record(self.database, job_id, attempt, message, bucket=self.storage.bucket)

    def commit_result(self, job_id: str, *, attempt: int = 1, **changes: Any) -> None:
        job = self.job(job_id)
        key = result_prefix(f"jobs/{job_id}/", job.kind) + "manifest.json"
        self.storage.put_bytes(key, manifest_for(job, attempt=attempt, **changes).model_dump_json().encode())

    def start(self, **changes: Any) -> str:
        """A job whose workers have begun."""
        job_id = self.submit(**changes)
        self.tick()
        self.ray.run(submission_id(job_id, 1))
        self.report(job_id, EventType.WORKERS_STARTED)
        return job_id


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database's file, to copy: migrating takes longer than most tests."""
    folder = tmp_path_factory.mktemp("database")
    migrate(make_settings(folder).database_url.get_secret_value())
    return folder / "maestro.db"


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> str:
    """The name of a migrated database, to copy."""
    name = postgres.create()
    migrate(postgres.url(name))
    return name


def migrate(url: str) -> None:
    database = Database(url)
    upgrade(database)
    database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a new database of each kind: every test of the database runs on both."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated"), tmp_path)
        yield make_settings(tmp_path).database_url.get_secret_value()
        return
    server = request.getfixturevalue("postgres")
    name = server.create(template=request.getfixturevalue("migrated_postgres"))
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def service(tmp_path: Path, database_url: str) -> Iterator[Service]:
    settings = make_settings(tmp_path, database_url=database_url)
    database = Database(settings.database_url.get_secret_value())
    yield Service(settings, database)
    database.close()


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    app = create_app(service.settings, storage=service.storage, ray=service.ray)
    with TestClient(app, headers={"Authorization": f"Bearer {API_TOKEN}"}, raise_server_exceptions=False) as client:
        yield client
