import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from service import leases
from service.db import utc_now
from service.dispatcher import Dispatcher
from service.leases import Claimed, LeaseLost, Work
from service.models import JobRow
from tests.integration.runs import wait_for
from tests.unit.service_fixtures import Service
from workers.contract import JobStatus


def find_work(service: Service, *, later: float = 0.0) -> Work:
    with service.database.read() as session:
        return leases.find_work(session, utc_now() + timedelta(seconds=later))


def claim(service: Service, owner: str = "me", *, later: float = 0.0, also: tuple[str, ...] = ()) -> list[Claimed]:
    with service.database.write() as session:
        return leases.claim(session, owner=owner, now=utc_now() + timedelta(seconds=later), seconds=30, also=also)


def set_columns(service: Service, job_id: str, **values: object) -> None:
    with service.database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(**values))


def dead_owner(service: Service) -> str:
    """The name of a dispatcher of this machine whose process has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return leases.owner_name(service).replace(f":{os.getpid()}:", f":{ended.pid}:")


def test_a_job_is_claimed_once(service: Service) -> None:
    job_id = service.submit()
    [claimed] = claim(service)
    assert claimed.job.id == job_id
    assert claim(service, "you") == []


def test_racing_dispatchers_share_the_jobs(service: Service) -> None:
    ids = [service.submit() for _ in range(20)]
    barrier = threading.Barrier(6)
    found: list[str] = []

    def take(owner: str) -> None:
        barrier.wait()
        found.extend(claimed.job.id for claimed in claim(service, owner))

    threads = [threading.Thread(target=take, args=(str(number),)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(ids)


def test_only_what_is_due(service: Service) -> None:
    job_id = service.submit()
    set_columns(service, job_id, due_at=utc_now() + timedelta(seconds=60))
    assert find_work(service) == Work(False, False, False)
    assert find_work(service, later=61) == Work(True, True, False)
    assert claim(service) == []
    assert len(claim(service, later=61)) == 1
    assert find_work(service, later=61) == Work(False, False, False)  # held
    set_columns(service, job_id, due_at=None, lease_expires_at=None)
    assert claim(service, later=10_000) == []


def test_an_expired_lease_goes_to_the_next_and_the_first_is_told(service: Service) -> None:
    service.submit()
    [first] = claim(service)
    service.expire_leases()
    [second] = claim(service, "you")
    assert second.token != first.token
    for act in (leases.hold, lambda session, one: leases.renew(session, one, seconds=30)):
        with pytest.raises(LeaseLost), service.database.write() as session:
            act(session, first)
    with service.database.write() as session:
        leases.hold(session, second)


def test_renewing_prolongs(service: Service) -> None:
    service.submit()
    [claimed] = claim(service)
    service.expire_leases()
    with service.database.write() as session:
        leases.renew(session, claimed, seconds=30)
    assert claim(service, "you") == []


def test_release_gives_it_back_with_its_next_time(service: Service) -> None:
    job_id = service.submit()
    [claimed] = claim(service)
    now = utc_now()
    with service.database.write() as session:
        leases.release(session, claimed, due_at=now + timedelta(seconds=60), now=now)
    assert claim(service) == []
    assert len(claim(service, later=61)) == 1
    with pytest.raises(LeaseLost), service.database.write() as session:
        leases.release(session, claimed, due_at=now, now=now)
    with service.database.read() as session:
        assert session.scalar(select(JobRow.lease_token).where(JobRow.id == job_id)) is not None


def test_a_cancel_that_came_meanwhile_does_not_wait(service: Service) -> None:
    job_id = service.submit()
    [claimed] = claim(service)
    service.cancel(job_id)
    now = utc_now()
    with service.database.write() as session:
        leases.release(session, claimed, due_at=now + timedelta(seconds=60), now=now)
    assert len(claim(service)) == 1


def test_an_owner_that_goes_releases_all_its_own(service: Service) -> None:
    service.submit()
    claim(service, "me")
    service.submit()
    claim(service, "you")
    with service.database.write() as session:
        leases.release_all(session, "me")
    assert len(claim(service, "they")) == 1


def test_what_dead_dispatchers_of_this_machine_held_is_free_at_once(service: Service) -> None:
    dead = dead_owner(service)
    owners = [leases.owner_name(service), dead, dead.replace(socket.gethostname(), "elsewhere"), f"{socket.gethostname()}:of another form"]
    for owner in owners:
        service.submit()
        claim(service, owner)
    with service.database.write() as session:
        leases.release_dead(session)
    with service.database.read() as session:
        assert set(session.scalars(select(JobRow.lease_owner))) == {None, *owners} - {dead}


def test_a_dispatcher_that_begins_does_not_wait_for_its_predecessor(service: Service) -> None:
    dead = dead_owner(service)
    job_id = service.submit()
    claim(service, dead)
    dispatcher = Dispatcher(service.database, service.storage, service.ray, service.settings)
    running = threading.Thread(target=dispatcher.run)
    running.start()
    try:
        wait_for(lambda: service.job(job_id).status == JobStatus.STARTING, seconds=20, what="a launch")
    finally:
        dispatcher.stop()
        running.join()


def test_who_is_admitted_is_claimed_before_it_is_due(service: Service) -> None:
    admitted, waits, started = service.submit(), service.submit(), service.submit()
    later = utc_now() + timedelta(seconds=60)
    for job_id in (admitted, waits):
        set_columns(service, job_id, due_at=later, waiting_since=utc_now())
    set_columns(service, started, due_at=later, status=JobStatus.STARTING)  # by another dispatcher, since we looked
    assert find_work(service) == Work(False, False, True)
    assert [claimed.job.id for claimed in claim(service, also=(admitted, started))] == [admitted]


def test_what_was_only_looked_at_is_given_back_together(service: Service) -> None:
    ids = [service.submit() for _ in range(4)]
    claimed = claim(service)
    service.cancel(ids[1])
    set_columns(service, ids[2], lease_token="another's")
    now = utc_now()
    with service.database.write() as session:
        leases.release_unchanged(session, claimed, due_at=now + timedelta(seconds=60), now=now)
    assert [one.job.id for one in claim(service, "you")] == [ids[1]]  # what its user wants is looked at without delay
    assert {one.job.id for one in claim(service, "you", later=61)} == {ids[0], ids[3]}
