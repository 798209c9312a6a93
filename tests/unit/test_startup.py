"""What is wrong before a process begins is told with the remedy, and the process ends. On both databases."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event, text

from service import startup
from service.db import Database, utc_now
from service.errors import StorageRefuses
from service.migrations.schema import downgrade, head_revision, upgrade
from service.processes import free_ports
from service.settings import Settings
from service.startup import open_database, require_rights
from tests.unit.fake_storage import FakeStorage
from tests.unit.service_fixtures import PRETRAIN, Service, make_settings

TELL = "The service cannot start: "


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return make_settings(tmp_path, database_url=database_url)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database_url.get_secret_value())
    yield database
    database.close()


def refusal(capsys: pytest.CaptureFixture[str], settings: Settings, *, exit_code: int = 2, is_migration: bool = False) -> str:
    """What is told when the database is opened."""
    with pytest.raises(SystemExit) as exit_:
        open_database(settings, is_migration=is_migration)
    told = capsys.readouterr().err
    assert exit_.value.code == exit_code
    assert told.startswith(TELL)
    return told.removeprefix(TELL)


def test_a_database_that_is_well_is_opened(settings: Settings) -> None:
    open_database(settings).close()
    open_database(settings, is_migration=True).close()


def test_an_older_schema(settings: Settings, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    downgrade(database, "0004")
    told = refusal(capsys, settings)
    assert "the database's schema is 0004" in told
    assert "python -m service.migrations" in told
    downgrade(database)
    assert "is empty" in refusal(capsys, settings)
    open_database(settings, is_migration=True).close()
    upgrade(database)
    open_database(settings).close()


@pytest.mark.parametrize("is_migration", [False, True])
def test_a_newer_schema(settings: Settings, database: Database, capsys: pytest.CaptureFixture[str], is_migration: bool) -> None:
    """A migration is refused, too: it does not know what it would change."""
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    told = refusal(capsys, settings, is_migration=is_migration)
    assert "schema 9999 is of a newer version" in told
    assert f"up to {head_revision()}" in told
    assert "python -m service.migrations" not in told


def test_a_server_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1: it may come back."""
    [port] = free_ports(1)
    settings = make_settings(tmp_path, database_url=f"postgresql://maestro:the-password@127.0.0.1:{port}/maestro")
    told = refusal(capsys, settings, exit_code=1)
    assert f"postgresql://maestro:***@127.0.0.1:{port}/maestro does not answer" in told
    assert "MAESTRO_DATABASE_URL" in told
    assert "the-password" not in told
    assert len(told.splitlines()) == 1


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make_settings(tmp_path / "nowhere")
    assert f"the folder {tmp_path / 'nowhere'} of the database does not exist" in refusal(capsys, settings)
    assert not (tmp_path / "nowhere").exists()


def test_a_disk_without_room(settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL's is another machine's."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 100, 3 * 2**20))  # type: ignore[attr-defined]
    if settings.database_url.get_secret_value().startswith("postgresql"):
        open_database(settings).close()
    else:
        assert "has 3 MiB free, and the database needs 64. Make room" in refusal(capsys, settings)


@pytest.mark.parametrize(("seconds", "side"), [(60, "ahead of"), (-60, "behind")])
def test_a_clock_that_goes_wrong(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: int, side: str
) -> None:
    monkeypatch.setattr(startup, "utc_now", lambda: utc_now() + timedelta(seconds=seconds / 10))
    open_database(settings).close()
    monkeypatch.setattr(startup, "utc_now", lambda: utc_now() + timedelta(seconds=seconds))
    assert f"clock is 60 s {side} the database's. Set both by NTP" in refusal(capsys, settings).replace("59 s", "60 s")


class Refusing(FakeStorage):
    """One that lets us do all but one thing."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method = method

    def _refuse(self, method: str) -> None:
        if method == self._method:
            raise StorageRefuses("Object storage refuses us (AccessDenied).")

    def put_bytes(self, key: str, body: bytes) -> None:
        self._refuse("write")
        super().put_bytes(key, body)

    def read_bytes(self, key: str, *, start: int, length: int) -> bytes:
        self._refuse("read")
        return super().read_bytes(key, start=start, length=length)

    def list(self, prefix: str, *, bucket: str | None = None, limit: int | None = None) -> Any:
        self._refuse("list")
        return super().list(prefix, bucket=bucket, limit=limit)

    def delete(self, keys: Sequence[str]) -> None:
        self._refuse("delete")
        super().delete(keys)


@pytest.mark.parametrize("method", ["write", "read", "list", "delete"])
def test_a_right_that_is_missing(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        require_rights(Refusing(method))
    told = capsys.readouterr().err
    assert exit_.value.code == 2
    assert f"we may not {method} in the bucket 'maestro'" in told
    assert "s3:DeleteObject" in told


def test_storage_that_is_well_keeps_nothing_of_it_and_one_that_is_away_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    storage = FakeStorage()
    require_rights(storage)
    assert storage.objects == {}
    storage.is_down = True
    with caplog.at_level(logging.WARNING):
        require_rights(storage)
    assert "It is waited for." in caplog.text


def test_a_disk_that_runs_full(service: Service, client: TestClient) -> None:
    """What cannot be written is refused as a whole, and taken when there is room again."""
    if service.database.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL's disk is its own")
    database: Database = client.app.state.database  # type: ignore[attr-defined]

    def limit(pages: int) -> None:
        database.engine.dispose()
        with database.engine.connect() as connection:
            used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        database.engine.dispose()
        event.listen(database.engine, "connect", lambda raw, record: raw.execute(f"PRAGMA max_page_count = {used + pages}"))

    limit(0)
    refused = [client.post("/v1/jobs", json=PRETRAIN) for _ in range(30)]
    assert {answer.status_code for answer in refused} <= {201, 503}
    assert refused[-1].status_code == 503
    assert refused[-1].json()["type"] == "urn:maestro:unavailable"
    taken = sum(answer.status_code == 201 for answer in refused)
    with service.database.read() as session:
        for table in ("jobs", "events"):
            assert session.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == taken
    limit(10_000)
    assert client.post("/v1/jobs", json=PRETRAIN).status_code == 201
