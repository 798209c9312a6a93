"""Two dispatchers on one job, a dispatcher that dies between its calls and its notes, and calls that succeeded but timed out.

A proxy between dispatcher and Ray holds them at exactly that point.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from service.up import Server
from tests.conftest import LiveService
from tests.faults.checks import check_job, check_nothing_left, drivers
from tests.faults.http_proxy import proxy_of
from tests.faults.moments import BY_ONE_WORKER, go_on, start
from tests.faults.services import LEASE_SECONDS, also_dispatched_by, dispatched_by
from tests.integration.runs import Json, events_of, wait_for, wait_for_end, wait_for_step

Undisturbed = Callable[[Json], dict[int, float]]
SUBMIT, INFO, STOP = ("POST", r"/api/jobs/$"), ("GET", r"/api/jobs/[^/]+$"), ("POST", r"/api/jobs/[^/]+/stop$")
SQLITE, POSTGRESQL = "live_service", "postgres_service"
TWO, KILLED, TIMED_OUT = "two dispatchers on one job", "kill -9 of the dispatcher", "a call that succeeded but timed out"
LEASE = {"lease_seconds": str(LEASE_SECONDS)}


@pytest.fixture
def service(request: pytest.FixtureRequest) -> LiveService:
    """On the database that the parameter says."""
    found: LiveService = request.getfixturevalue(request.param)
    return found


@contextmanager
def asleep(dispatcher: Server) -> Iterator[psutil.Process]:
    """Stopped (SIGSTOP), until its lease has gone and others have done its work; then it goes on."""
    process = psutil.Process(dispatcher.child.pid)
    process.suspend()
    try:
        yield process
    finally:
        process.resume()


def knows_its_lease_is_lost(dispatcher: Server, job: str) -> bool:
    return f"job {job}: the lease was lost" in dispatcher.child.log.read_text()


@pytest.mark.parametrize(
    ("service", "answer"),
    [
        pytest.param(SQLITE, True, marks=pytest.mark.fault(f"{TWO} (SQLite)", "starting")),
        pytest.param(POSTGRESQL, False, marks=pytest.mark.fault(f"{TWO} (PostgreSQL)", "starting", ci=True)),
        pytest.param(POSTGRESQL, True, marks=pytest.mark.fault(f"{TWO} (PostgreSQL)", "starting")),
    ],
    indirect=["service"],
)
def test_one_sleeps_while_it_submits(service: LiveService, undisturbed: Undisturbed, answer: bool) -> None:
    """Ray has its request already (`answer`), or gets it when the other has submitted the job long since."""
    with proxy_of(service.installation.cluster.url) as proxy, dispatched_by(service, ray_url=proxy.url, **LEASE) as sleeper:
        held = proxy.hold(*SUBMIT, answer=answer)
        job = service.client.submit(BY_ONE_WORKER | {"name": "two dispatchers"})["id"]
        held.wait()
        with also_dispatched_by(service, "other", **LEASE):
            with asleep(sleeper):
                wait_for_step(service.client, job, 1)
                held.let_go()
            wait_for(lambda: knows_its_lease_is_lost(sleeper, job), seconds=60, what="the sleeper to notice")
            check_job(service, job, attempts=1, undisturbed=undisturbed(BY_ONE_WORKER))


@pytest.mark.parametrize(
    ("service", "moment"),
    [
        pytest.param(service, moment, marks=pytest.mark.fault(f"{TWO} ({name})", moment))
        for service, name, moment in (
            (SQLITE, "SQLite", "stopping"),
            *((POSTGRESQL, "PostgreSQL", moment) for moment in ("running", "saving", "stopping")),
        )
    ],
    indirect=["service"],
)
def test_one_sleeps_while_it_looks(service: LiveService, undisturbed: Undisturbed, moment: str) -> None:
    """It wakes when the other has brought the job to its end, or paused it and begun another attempt, and hears that the run is over."""
    with proxy_of(service.installation.cluster.url) as proxy, dispatched_by(service, ray_url=proxy.url, **LEASE) as sleeper:
        job = start(service, moment)
        held = proxy.hold(*INFO)
        held.wait()
        with also_dispatched_by(service, "other", **LEASE):
            with asleep(sleeper):
                go_on(service, job, moment)
                wait_for_end(service.client, job) if moment != "stopping" else wait_for(
                    lambda: service.client.job(job)["attempt"] == 2, seconds=120, what="the second attempt"
                )
                held.let_go()
            wait_for(lambda: knows_its_lease_is_lost(sleeper, job), seconds=60, what="the sleeper to notice")
            check_job(service, job, attempts=2 if moment == "stopping" else 1, undisturbed=undisturbed(BY_ONE_WORKER))


@pytest.mark.parametrize("answer", [False, pytest.param(True, marks=pytest.mark.fault(KILLED, "starting", ci=True))])
@pytest.mark.fault(KILLED, "starting")
def test_killed_between_a_submission_and_its_note(live_service: LiveService, undisturbed: Undisturbed, answer: bool) -> None:
    with proxy_of(live_service.installation.cluster.url) as proxy:
        with dispatched_by(live_service, ray_url=proxy.url, **LEASE) as doomed:
            held = proxy.hold(*SUBMIT, answer=answer)
            job = live_service.client.submit(BY_ONE_WORKER | {"name": "killed dispatcher"})["id"]
            held.wait()
            doomed.child.kill()
            held.let_go()  # a request that it had sent may arrive after its death
        check_job(live_service, job, attempts=1, undisturbed=undisturbed(BY_ONE_WORKER))


@pytest.mark.fault(TIMED_OUT, "starting", ci=True)
def test_a_submission_that_timed_out(live_service: LiveService, undisturbed: Undisturbed) -> None:
    """And the question whether it arrived, too."""
    with proxy_of(live_service.installation.cluster.url) as proxy, dispatched_by(live_service, ray_url=proxy.url):
        held = proxy.hold(*SUBMIT, answer=True)
        job = live_service.client.submit(BY_ONE_WORKER | {"name": "timed out"})["id"]
        held.wait()
        asked = proxy.cut(*INFO)
        held.let_go(cut=True)
        asked.wait()
        check_job(live_service, job, attempts=1, undisturbed=undisturbed(BY_ONE_WORKER))
        assert {"ray_unreachable"} <= {event["reason"] for event in events_of(live_service.client, job, "reason_changed")}


@pytest.mark.fault(TIMED_OUT, "running")
def test_a_look_that_timed_out(live_service: LiveService, undisturbed: Undisturbed) -> None:
    with proxy_of(live_service.installation.cluster.url) as proxy, dispatched_by(live_service, ray_url=proxy.url):
        job = start(live_service, "running")
        proxy.cut(*INFO).wait()
        check_job(live_service, job, attempts=1, undisturbed=undisturbed(BY_ONE_WORKER))


@pytest.mark.fault(TIMED_OUT, "stopping")
def test_a_stop_that_timed_out(live_service: LiveService) -> None:
    with proxy_of(live_service.installation.cluster.url) as proxy, dispatched_by(live_service, ray_url=proxy.url):
        stop = proxy.cut(*STOP)
        job = start(live_service, "starting")
        [driver] = drivers(live_service.run, job)
        driver.suspend()  # its workers do not begin, so nobody but Ray can stop the run
        live_service.client.cancel(job)
        stop.wait()
        check_job(live_service, job, status="cancelled", reason="cancelled_by_user", attempts=1)
        check_nothing_left(live_service, job)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("training_state/.*/manifest.json", marks=pytest.mark.fault(TIMED_OUT, "saving")),
        pytest.param("encoder/manifest.json", marks=pytest.mark.fault(TIMED_OUT, "running")),
    ],
)
def test_a_commit_that_timed_out(live_service: LiveService, undisturbed: Undisturbed, key: str) -> None:
    """Of a training state and of the result: the workers find what they have written already."""
    with proxy_of(live_service.installation.storage.endpoint) as proxy, dispatched_by(live_service, s3_endpoint=proxy.url):
        cut = proxy.cut("PUT", key)
        job = live_service.client.submit(BY_ONE_WORKER | {"name": "timed out"})["id"]
        cut.wait(240)
        check_job(live_service, job, attempts=1, undisturbed=undisturbed(BY_ONE_WORKER))
