"""The dispatcher is killed at every point where a kill can matter: before and after each commit and each call of Ray and storage.

Whatever the point, its successor finishes the job, and nothing was started twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy.orm import Session

from service.db import Database
from service.dispatcher import Dispatcher
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import Service
from workers.contract import EventType, JobStatus


class Killed(BaseException):
    """kill -9: nothing after it runs."""


class Fuse:
    """Kills at the n-th point."""

    def __init__(self, num_points: int) -> None:
        self.num_left = num_points

    def point(self) -> None:
        self.num_left -= 1
        if self.num_left == 0:
            raise Killed


class FusedDatabase:
    def __init__(self, database: Database, fuse: Fuse) -> None:
        self._database, self._fuse = database, fuse
        self.read = database.read

    @contextmanager
    def write(self) -> Iterator[Session]:
        with self._database.write() as session:
            yield session
            self._fuse.point()  # before the commit
        self._fuse.point()


class FusedCalls:
    """Every call of Ray or storage, with a point before and after."""

    def __init__(self, target: Any, fuse: Fuse) -> None:
        self._target, self._fuse = target, fuse

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._fuse.point()
            answer = found(*args, **kwargs)
            self._fuse.point()
            return answer

        return call


def doomed(service: Service, fuse: Fuse) -> Dispatcher:
    database: Any = FusedDatabase(service.database, fuse)
    return Dispatcher(
        database, FusedCalls(service.storage, fuse), FusedCalls(service.ray, fuse), service.settings, clock=lambda: service.now
    )


def let_ray_go_on(service: Service, job_id: str, *, failures: int, cancel: bool) -> None:
    """What the workers do meanwhile: attempts up to `failures` die, the next one finishes."""
    for name, ray_job in list(service.ray.jobs.items()):
        number = int(name.rpartition("-a")[2])
        job = service.job(job_id)
        if ray_job.status is RayStatus.PENDING and job.attempt == number and job.status is JobStatus.STARTING:
            service.ray.run(name)
            service.report(job_id, EventType.WORKERS_STARTED, attempt=number)
            if cancel:
                service.cancel(job_id)
        elif ray_job.status is RayStatus.RUNNING and number <= failures:
            service.ray.end(name, RayStatus.FAILED)
        elif ray_job.status is RayStatus.RUNNING and not cancel:
            service.commit_result(job_id, attempt=number)
            service.ray.end(name, RayStatus.SUCCEEDED)


def run_with_a_kill(service: Service, *, at: int, failures: int, cancel: bool) -> tuple[str, bool]:
    """A job from its submission to its end; whether the kill came."""
    job_id = service.submit()
    fuse, was_killed = Fuse(at), False
    service.dispatcher = doomed(service, fuse)
    for _ in range(40):
        try:
            service.tick(5)
        except Killed:
            was_killed = True
            service.expire_leases()
            service.dispatcher = service.new_dispatcher()
        let_ray_go_on(service, job_id, failures=failures, cancel=cancel)
        if service.job(job_id).status.is_terminal:
            return job_id, was_killed
    raise AssertionError(f"killed at point {at}, the job hangs in {service.job(job_id).status}")


@pytest.mark.parametrize(
    ("failures", "cancel", "expected", "num_attempts", "min_points"),
    [(0, False, JobStatus.SUCCEEDED, 1, 30), (1, False, JobStatus.SUCCEEDED, 2, 50), (0, True, JobStatus.CANCELLED, 1, 25)],
)
def test_a_kill_at_any_point(
    service: Service, failures: int, cancel: bool, expected: JobStatus, num_attempts: int, min_points: int
) -> None:
    at = 0
    while True:
        at += 1
        service.ray.jobs.clear()
        service.ray.num_submitted.clear()
        job_id, was_killed = run_with_a_kill(service, at=at, failures=failures, cancel=cancel)
        assert service.job(job_id).status is expected, at
        assert service.ray.num_submitted == {f"{job_id}-a{number}": 1 for number in range(1, num_attempts + 1)}, at
        types = [event.type for event in service.events(job_id)]
        assert types.count(EventType.ATTEMPT_CREATED) == types.count(EventType.ATTEMPT_ENDED) == num_attempts, at
        if not was_killed:
            break
    assert at > min_points  # it did visit many
