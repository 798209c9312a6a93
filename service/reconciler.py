"""Ray jobs of ours that nobody wants any more: found and stopped. The other way, jobs that Ray has lost, is each look's own."""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import select

from service.counters import Count, Tally
from service.db import Database
from service.errors import RayUnreachable
from service.launches import DEPLOYMENT, deployment_of
from service.models import AttemptRow
from service.ray_jobs import RayJobs
from service.settings import Settings

log = logging.getLogger(__name__)

SWEEP_SECONDS = 30.0


class Reconciler:
    """Compares what runs in Ray with the attempts that are under way. Another service's Ray jobs have another label."""

    def __init__(self, database: Database, ray: RayJobs, settings: Settings, *, tally: Tally, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._tally = tally
        self._ray = ray
        self._deployments = {deployment_of(key) for key in settings.secret_keys}
        self._clock = clock
        self._due_at = clock()
        self._suspects: set[str] = set()
        self.num_known = 0  # Ray jobs, also those that are over, at the last sweep

    def sweep_when_due(self) -> None:
        now = self._clock()
        if now < self._due_at:
            return
        self._due_at = now + timedelta(seconds=SWEEP_SECONDS)
        try:
            self._sweep()
        except RayUnreachable as error:
            log.info("no sweep: %s", error)

    def _sweep(self) -> None:
        """Stops what had no attempt under way at the last sweep, either: a run that ends by itself has that long for it."""
        known = self._ray.list()
        self.num_known = len(known)
        runs = {name for name, job in known.items() if not job.status.is_over and job.metadata.get(DEPLOYMENT) in self._deployments}
        with self._database.read() as session:  # after Ray's answer: an attempt is there before its run
            orphans = runs - set(session.scalars(select(AttemptRow.submission_id).where(AttemptRow.ended_at.is_(None))))
        for name in sorted(orphans & self._suspects):
            log.warning("stopping %s: it runs in Ray, and no attempt is under way for it", name)
            self._ray.stop(name)
            self._tally.add(Count.ORPHANS_STOPPED)
        self._suspects = orphans
