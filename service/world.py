"""What a dispatcher sees of Ray and object storage in one round. What did not answer once is not asked again in that round."""

import contextlib
from dataclasses import replace
from datetime import datetime

from sqlalchemy import and_, func, or_, select

from service.admission import Admission, Budget, InLine, Needs, admit
from service.db import Database
from service.errors import RayUnreachable, StorageUnreachable
from service.leases import IN_LINE
from service.models import AttemptRow, JobRow
from service.policy import IN_LINE_SECONDS, Wait
from service.ray_jobs import ClusterResources, RayJob, RayJobs
from service.settings import Settings
from service.storage import Storage
from workers.contract import Reason


class World:
    """One round's view, as of `now`. Answers are taken when first asked for."""

    def __init__(self, database: Database, storage: Storage, ray: RayJobs, settings: Settings, *, now: datetime) -> None:
        self._database = database
        self._storage = storage
        self._ray = ray
        self._settings = settings
        self._now = now
        self._ray_problem: RayUnreachable | None = None
        self._ray_jobs: dict[str, RayJob] | None = None
        self._admission: Wait | Admission | None = None

    def look_at_all(self) -> None:
        """One answer for all runs, before many of them are asked for. Where Ray is too slow for that, each is asked for."""
        with contextlib.suppress(RayUnreachable):
            self._ray_jobs = self._ray.list()

    def info(self, submission_id: str) -> RayJob | None:
        if self._ray_problem is not None:
            raise self._ray_problem
        if self._ray_jobs is not None and submission_id in self._ray_jobs:
            return self._ray_jobs[submission_id]
        try:
            return self._ray.info(submission_id)
        except RayUnreachable as error:
            self._ray_problem = error
            raise

    def parent(self, job: JobRow) -> JobRow | None:
        """The job whose result `job` waits for; None where it waits for none, or has taken it up."""
        if job.waits_for is None:
            return None
        with self._database.read() as session:
            return session.get_one(JobRow, job.waits_for)

    def admission(self) -> Wait | Admission:
        """Why nothing can be launched now; or who of those in line may be."""
        if self._admission is None:
            self._admission = self._admit()
        return self._admission

    def _admit(self) -> Wait | Admission:
        try:
            self._storage.check()
            if self._ray_problem is not None:
                raise self._ray_problem
            cluster = self._ray.resources()
        except StorageUnreachable as error:
            return Wait(Reason.STORAGE_UNREACHABLE, error.detail, IN_LINE_SECONDS)
        except RayUnreachable as error:
            self._ray_problem = error
            return Wait(Reason.RAY_UNREACHABLE, error.detail, IN_LINE_SECONDS)
        released = Needs() if cluster.at is None else self._needs_of_attempts(ended_after=cluster.at)
        budget = Budget(self._grown(cluster), reserved=self._needs_of_attempts(ended_after=None), released=released)
        columns = (JobRow.id, JobRow.num_cpus, JobRow.num_gpus, JobRow.max_cpus, JobRow.max_gpus, JobRow.waiting_since)
        comes = and_(IN_LINE, JobRow.due_at <= self._now)
        waits = and_(IN_LINE, JobRow.waiting_since.is_not(None))
        query = select(*columns).where(or_(waits, comes)).order_by(JobRow.priority.desc(), JobRow.created_at, JobRow.id)
        with self._database.read() as session:
            rows = session.execute(query).yield_per(200)
            line = (InLine(row.id, Needs(row.num_cpus, row.num_gpus), Needs(row.max_cpus, row.max_gpus), row.waiting_since) for row in rows)
            return admit(line, budget, now=self._now, patience_seconds=self._settings.line_patience_seconds)

    def _grown(self, cluster: ClusterResources) -> ClusterResources:
        """What the autoscaler would make of it: it adds machines only for runs that ask Ray for them, so these have to be let in first."""
        num_cpus, num_gpus = self._settings.autoscaled_cpus, self._settings.autoscaled_gpus
        return replace(cluster, num_cpus=max(cluster.num_cpus, num_cpus), num_gpus=max(cluster.num_gpus, num_gpus))

    def _needs_of_attempts(self, *, ended_after: datetime | None) -> Needs:
        """Of all that have not ended; or of those that ended after a time."""
        condition = AttemptRow.ended_at.is_(None) if ended_after is None else AttemptRow.ended_at > ended_after
        with self._database.read() as session:
            sums = session.execute(select(func.sum(AttemptRow.num_cpus), func.sum(AttemptRow.num_gpus)).where(condition)).one()
        return Needs(float(sums[0] or 0), float(sums[1] or 0))
