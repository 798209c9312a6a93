"""Several dispatchers at once, on one database, over the same Ray: nothing is started twice, nothing is lost."""

import threading

import pytest
from sqlalchemy import update

from service import leases
from service.db import utc_now
from service.dispatcher import Dispatcher
from service.models import JobRow
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import Service
from workers.contract import EventType, JobStatus

NUM_JOBS = 30


def all_done(service: Service, ids: list[str]) -> bool:
    return all(service.job(job_id).status.is_terminal for job_id in ids)


def play_ray(service: Service, ids: list[str], stop: threading.Event) -> None:
    """Workers begin, commit and end."""
    while not stop.wait(0.01) and not all_done(service, ids):
        for job_id in ids:
            submission = service.ray.jobs.get(f"{job_id}-a1")
            status = service.job(job_id).status
            if submission is None or status is JobStatus.QUEUED:
                continue
            if submission.status is RayStatus.PENDING:
                service.ray.run(f"{job_id}-a1")
                service.report(job_id, EventType.WORKERS_STARTED)
            elif submission.status is RayStatus.RUNNING:
                service.commit_result(job_id)
                service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)


def hurry(service: Service, stop: threading.Event, *, expires: bool) -> None:
    """All jobs are due at once; and with `expires` whoever holds a lease may find it gone, as if it had been too slow."""
    values = {"due_at": utc_now()} | ({"lease_expires_at": utc_now()} if expires else {})
    while not stop.wait(0.05):
        with service.database.write() as session:
            leases.lock(session, JobRow.due_at.is_not(None))
            session.execute(update(JobRow).where(JobRow.due_at.is_not(None)).values(values))


def dispatch(dispatcher: Dispatcher, service: Service, ids: list[str], errors: list[BaseException]) -> None:
    try:
        for _ in range(2000):
            dispatcher.tick()
            if all_done(service, ids):
                return
    except BaseException as error:
        errors.append(error)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("expires", [False, True])
def test_several_dispatchers(service: Service, expires: bool) -> None:
    ids = [service.submit() for _ in range(NUM_JOBS)]
    errors: list[BaseException] = []
    stop = threading.Event()
    dispatchers = [Dispatcher(service.database, service.storage, service.ray, service.settings) for _ in range(4)]
    threads = [threading.Thread(target=dispatch, args=(each, service, ids, errors)) for each in dispatchers]
    around = [
        threading.Thread(target=play_ray, args=(service, ids, stop)),
        threading.Thread(target=hurry, args=(service, stop), kwargs={"expires": expires}),
    ]
    for thread in (*threads, *around):
        thread.start()
    for thread in threads:
        thread.join(120)
    stop.set()
    for thread in around:
        thread.join(10)
    assert errors == []
    assert {service.job(job_id).status for job_id in ids} == {JobStatus.SUCCEEDED}
    assert service.ray.num_submitted == {f"{job_id}-a1": 1 for job_id in ids}
    for job_id in ids:
        told = [event.data["to"] for event in service.events(job_id) if event.type == EventType.STATUS_CHANGED]
        assert told == ["starting", "running", "finalizing", "succeeded"]
