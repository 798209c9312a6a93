"""What a dispatcher sees of Ray and object storage in one round. What did not answer once is not asked again in that round."""

from datetime import datetime

from sqlalchemy import func, select

from service.db import Database
from service.errors import RayUnreachable, StorageUnreachable
from service.models import AttemptRow, JobRow
from service.policy import UNREACHABLE_SECONDS, Budget, Needs, Wait
from service.ray_jobs import RayJob, RayJobs
from service.storage import Storage
from workers.contract import Reason


class World:
    """One round's view. Answers are taken when first asked for."""

    def __init__(self, database: Database, storage: Storage, ray: RayJobs) -> None:
        self._database = database
        self._storage = storage
        self._ray = ray
        self._ray_problem: RayUnreachable | None = None
        self._readiness: Wait | Budget | None = None

    def info(self, submission_id: str) -> RayJob | None:
        if self._ray_problem is not None:
            raise self._ray_problem
        try:
            return self._ray.info(submission_id)
        except RayUnreachable as error:
            self._ray_problem = error
            raise

    def parent(self, job: JobRow) -> JobRow | None:
        """The job whose result `job` waits for; None where it waits for none, or has taken it up."""
        encoder = job.spec.get("encoder") or {}
        if encoder.get("job") is None:
            return None
        with self._database.read() as session:
            return session.get_one(JobRow, encoder["job"])

    def readiness(self) -> Wait | Budget:
        """Why nothing can be launched now, or what is free."""
        if self._readiness is None:
            self._readiness = self._look()
        return self._readiness

    def _look(self) -> Wait | Budget:
        try:
            self._storage.check()
            if self._ray_problem is not None:
                raise self._ray_problem
            cluster = self._ray.resources()
        except StorageUnreachable as error:
            return Wait(Reason.STORAGE_UNREACHABLE, error.detail, UNREACHABLE_SECONDS)
        except RayUnreachable as error:
            self._ray_problem = error
            return Wait(Reason.RAY_UNREACHABLE, error.detail, UNREACHABLE_SECONDS)
        released = Needs() if cluster.at is None else self._needs_of_attempts(ended_after=cluster.at)
        return Budget(cluster, reserved=self._needs_of_attempts(ended_after=None), released=released)

    def _needs_of_attempts(self, *, ended_after: datetime | None) -> Needs:
        """Of all that have not ended; or of those that ended after a time."""
        condition = AttemptRow.ended_at.is_(None) if ended_after is None else AttemptRow.ended_at > ended_after
        with self._database.read() as session:
            sums = session.execute(select(func.sum(AttemptRow.num_cpus), func.sum(AttemptRow.num_gpus)).where(condition)).one()
        return Needs(float(sums[0] or 0), float(sums[1] or 0))
