"""The database: engine, transactions and its clock. All SQL that differs between databases is here."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, String, Text, cast, create_engine, event, func, select
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

_WRITES = "maestro_writes"
_SQLITE_CONNECT: dict[str, Any] = {"check_same_thread": False, "timeout": 30.0}
_POSTGRES_CONNECT: dict[str, Any] = {  # nothing waits for ever: not for a lock, nor for a server that has gone
    "connect_timeout": 5,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "options": "-c lock_timeout=30s -c statement_timeout=60s -c idle_in_transaction_session_timeout=60s -c timezone=UTC",
}


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, always UTC; SQLite keeps no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "a naive datetime has no place in the database"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class CleanString(TypeDecorator[str]):
    """Text without NUL, which PostgreSQL cannot hold: what a user or a dying process sends is kept all the same."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value.replace("\0", "\ufffd") if value is not None else None


class CleanText(CleanString):
    """The same of any length."""

    impl = Text
    cache_ok = True


class JsonValue(TypeDecorator[Any]):
    """JSON in which None is SQL's NULL."""

    impl = JSON(none_as_null=True)
    cache_ok = True


class db_now(FunctionElement[datetime]):
    """The database's clock, some seconds on: machines disagree about the time, so leases go by this one alone."""

    type = UtcDateTime()
    inherit_cache = False

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = float(seconds)
        super().__init__()


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    # six digits of fraction, as SQLAlchemy stores datetimes: they are compared as text
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', '{element.seconds:+.3f} seconds')"


@compiles(db_now)
def _standard_now(element: db_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"clock_timestamp() + interval '{element.seconds:.3f} seconds'"


class Database:
    """Sessions on one database: `read()` sees a snapshot, `write()` is one transaction, committed at its end."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        self.engine = create_engine(
            parsed if is_sqlite else parsed.set(drivername="postgresql+psycopg"),
            connect_args=_SQLITE_CONNECT if is_sqlite else _POSTGRES_CONNECT,
            pool_size=20,
            max_overflow=30,
            pool_timeout=30,
            pool_pre_ping=not is_sqlite,  # a server that was restarted costs a reconnect, not an error
            json_serializer=_strict_json,
            hide_parameters=True,
        )
        if is_sqlite:
            event.listen(self.engine, "connect", _sqlite_connect)
            event.listen(self.engine, "begin", _sqlite_begin)
        reads: dict[str, Any] = {} if is_sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        self._reader = self.engine.execution_options(**reads)
        self.writer = self.engine.execution_options(**{_WRITES: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self._reader) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        with Session(self.writer, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()


def ended_before(session: Session) -> int:
    """All transactions with a lower number had ended when this session's snapshot was taken. SQLite has one writer: 0."""
    if session.get_bind().dialect.name == "sqlite":
        return 0
    return int(session.execute(select(cast(func.pg_snapshot_xmin(func.pg_current_snapshot()), Text))).scalar_one())


def next_transaction(session: Session) -> int:
    """A number above those of all transactions that have written anything until now. A snapshot's upper bound is none: it counts those that
    have ended."""
    if session.get_bind().dialect.name == "sqlite":
        return 0
    return int(session.execute(select(cast(func.pg_current_xact_id(), Text))).scalar_one())


def utc_now() -> datetime:
    return datetime.now(UTC)


def _strict_json(value: Any) -> str:
    # NaN is not JSON: PostgreSQL refuses it, and so would every client of ours
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _sqlite_connect(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver begins no transaction of its own
    for pragma in ("journal_mode=WAL", "busy_timeout=30000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: Connection) -> None:
    # A deferred BEGIN that reads and then writes fails with SQLITE_BUSY_SNAPSHOT, whatever the time-out: writers lock first.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
