"""The figures of an API process for Prometheus: its own, and those of the whole service, which lie in the database.

Labels have few values: routes as they are declared, statuses, kinds of events; never a job, a project or an address.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service import counters
from service.db import Database, utc_now
from service.models import DeliveryRow, JobRow
from workers.contract import WORKER_EVENTS, Event, JobStatus, Points

FRESH_SECONDS = 5.0  # whoever scrapes more often reads the same again
_METHODS = {"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"}


class Telemetry:
    """One for each app."""

    def __init__(self, database: Database) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Stored(database))
        self._requests = Histogram(
            "maestro_request_seconds",
            "Until an answer begins; of POST /v1/jobs: submissions",
            ["method", "route", "status"],
            registry=registry,
        )
        self._batches = Counter("maestro_ingest_batches", "Reports of workers that were taken", registry=registry)
        self._points = Counter("maestro_ingest_points", "Points of metric series in them", registry=registry)
        self._events = Counter("maestro_worker_events", "Events in them: upload_delayed, save_failed, …", ["type"], registry=registry)
        for kind in sorted(WORKER_EVENTS):
            self._events.labels(kind.value)  # from 0 on: Prometheus sees no increase in the first sample of a series
        self.limited = Counter("maestro_requests_limited", "Answered 429: of a token, or of an address without", ["of"], registry=registry)
        self.streams = Gauge("maestro_stream_clients", "Open streams of events", registry=registry)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method if method in _METHODS else "other", route, f"{status // 100}xx").observe(seconds)

    def ingested(self, points: Points | None, events: Iterable[Event]) -> None:
        self._batches.inc()
        series = points.series.values() if points is not None else ()
        self._points.inc(sum(len(values) - values.count(None) for values in series))
        for event in events:
            self._events.labels(event.type.value).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Stored(Collector):
    """What the database knows. No scrape reads a job's row: all is counted in small indices, and at most every few seconds."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._known: list[Metric] = []
        self._at = float("-inf")

    def describe(self) -> list[Metric]:
        return []  # else the registry would ask the database at once

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if time.monotonic() - self._at >= FRESH_SECONDS:
                self._known, self._at = self._look(), time.monotonic()
            yield from self._known

    def _look(self) -> list[Metric]:
        try:
            with self._database.read() as session:
                found = list(_of_jobs(session, utc_now())) + list(_of_dispatchers(session))
        except SQLAlchemyError:
            found = []
        return [*found, GaugeMetricFamily("maestro_database_up", "Whether the database answers", value=float(bool(found)))]


def _of_jobs(session: Session, now: datetime) -> Iterator[Metric]:
    known = {
        row[0]: row[1]
        for row in session.execute(select(JobRow.status, func.count()).where(JobRow.deleted_at.is_(None)).group_by(JobRow.status))
    }
    jobs = GaugeMetricFamily("maestro_jobs", "Jobs by status", labels=["status"])
    for status in JobStatus:
        jobs.add_metric([status], known.get(status, 0))
    yield jobs
    line = session.execute(
        select(func.min(JobRow.waiting_since), func.count(JobRow.waiting_since)).where(JobRow.waiting_since.is_not(None))
    ).one()
    yield GaugeMetricFamily("maestro_queue_jobs", "Jobs that wait for devices", value=line[1])
    yield GaugeMetricFamily("maestro_queue_age_seconds", "How long the first of them has waited", value=_age(line[0], now))
    due = session.scalar(select(func.min(JobRow.due_at)).where(JobRow.due_at.is_not(None)))
    yield GaugeMetricFamily(
        "maestro_dispatch_lag_seconds", "For how long a job waits to be looked at by a dispatcher", value=_age(due, now)
    )
    pending = session.scalar(select(func.count()).select_from(DeliveryRow).where(DeliveryRow.due_at.is_not(None)))
    yield GaugeMetricFamily("maestro_webhook_pending", "Deliveries that wait to be sent", value=pending or 0)


def _of_dispatchers(session: Session) -> Iterator[Metric]:
    known = counters.read(session)
    for count in counters.Count:
        yield CounterMetricFamily(f"maestro_{count}", counters.MEANINGS[count], value=known.get(count, 0))


def _age(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else max((now - since).total_seconds(), 0.0)
