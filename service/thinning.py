"""What becomes of the series of jobs that ended long ago: the points that show their course are kept, the others go."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import select

from service import metrics
from service.db import Database
from service.models import JobRow, MetricSummaryRow
from service.settings import Settings

log = logging.getLogger(__name__)

SWEEP_SECONDS = 10.0  # one job each time: the queue waits no longer for it than that takes


class Thinning:
    """One job at a time, by the day of its newest points. Two dispatchers may be at it: one of them finds the job locked, or it done."""

    def __init__(self, database: Database, settings: Settings, *, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._days = settings.metrics_whole_days
        self._clock = clock
        self._due_at = clock()

    def sweep_when_due(self) -> None:
        now = self._clock()
        if now < self._due_at:
            return
        self._due_at = now + timedelta(seconds=SWEEP_SECONDS)
        before = now.date() - timedelta(days=self._days)
        summary = MetricSummaryRow
        oldest = (
            select(summary.job_id)
            .join(JobRow, JobRow.id == summary.job_id)
            .where(summary.is_whole, summary.changed_on < before, JobRow.finished_at.is_not(None), JobRow.deleted_at.is_(None))
            .order_by(summary.changed_on)
            .limit(1)
        )
        with self._database.read() as session:
            job_id = session.scalar(oldest)
        if job_id is not None:
            self._thin(job_id)

    def _thin(self, job_id: str) -> None:
        lock = select(JobRow.id).where(JobRow.id == job_id, JobRow.deleted_at.is_(None)).with_for_update(skip_locked=True)
        with self._database.write() as session:
            if session.scalar(lock) is None:
                return
            metrics.thin(session, job_id)
        log.info("job %s: its series are thinned, as nothing came for %d days", job_id, self._days)
