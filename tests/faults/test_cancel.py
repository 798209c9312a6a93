"""Cancel reaches a job wherever it is; afterwards nothing of it lives, and its devices are free."""

from collections.abc import Callable

import psutil
import pytest

from tests.conftest import LiveService
from tests.faults.checks import check_job, check_nothing_left, drivers
from tests.faults.moments import ENDLESS, start
from tests.faults.services import dispatched_by
from tests.integration.runs import events_of, train_workers, wait_for


def check_cancelled(service: LiveService, job: str, *, attempts: int, ray_forgot: bool = False) -> None:
    check_job(service, job, status="cancelled", reason="cancelled_by_user", attempts=attempts, ray_forgot=ray_forgot)
    check_nothing_left(service, job)


@pytest.mark.parametrize(
    "moment",
    [pytest.param(moment, marks=pytest.mark.fault("cancelled", moment)) for moment in ("starting", "running", "saving", "stopping")],
)
def test_a_run(live_service: LiveService, moment: str) -> None:
    """`stopping`: one that is pausing."""
    job = start(live_service, moment, ENDLESS)
    live_service.client.cancel(job)
    check_cancelled(live_service, job, attempts=1)
    if moment != "starting":
        assert len(events_of(live_service.client, job, "run_stopped")) == 1  # its workers heard it


@pytest.mark.fault("cancelled with no dispatcher", "starting")
def test_in_the_queue(live_service: LiveService) -> None:
    live_service.kill_dispatcher()
    try:
        job = live_service.client.submit(ENDLESS)["id"]
        assert live_service.client.cancel(job)["status"] == "cancelled"
    finally:
        live_service.start_dispatcher()
    check_cancelled(live_service, job, attempts=0)


@pytest.mark.fault("cancelled in its back-off", "starting")
def test_between_two_attempts(live_service: LiveService) -> None:
    with dispatched_by(live_service, retry_backoff_seconds="60"):
        job = start(live_service, "running", ENDLESS)
        [driver] = drivers(live_service.run, job)
        driver.kill()
        wait_for(lambda: live_service.client.job(job)["status"] == "recovering", seconds=60, what="the back-off")
        live_service.client.cancel(job)
        check_cancelled(live_service, job, attempts=1)


@pytest.mark.fault("cancelled with its Ray head lost", "running")
def test_orphaned(live_service: LiveService) -> None:
    job = start(live_service, "running", ENDLESS)
    live_service.kill_of_ray("gcs_server")
    child = live_service.installation.cluster.child
    try:
        wait_for(lambda: child.exit_code is not None, seconds=60, what="the end of the head's other processes")
        live_service.client.cancel(job)
        wait_for(lambda: live_service.client.job(job)["status"] == "stopping", seconds=60, what=f"{job} to be stopping")
    finally:
        live_service.start_ray()
    check_cancelled(live_service, job, attempts=1, ray_forgot=True)


def driver_of(service: LiveService, job: str) -> list[psutil.Process]:
    return drivers(service.run, job)


def all_of(service: LiveService, job: str) -> list[psutil.Process]:
    return [*drivers(service.run, job), *train_workers(service.run)]


@pytest.mark.parametrize(
    ("who", "hang"),
    [
        pytest.param("driver", driver_of, marks=pytest.mark.fault("cancelled with a driver that hangs", "stopping", ci=True)),
        pytest.param("driver and workers", all_of, marks=pytest.mark.fault("cancelled with a run that hangs", "stopping")),
    ],
)
def test_that_hangs(live_service: LiveService, who: str, hang: Callable[[LiveService, str], list[psutil.Process]]) -> None:
    """Softly, then, after the deadline, hard."""
    with dispatched_by(live_service, stop_grace_seconds="2"):
        job = start(live_service, "running", ENDLESS)
        for process in hang(live_service, job):
            process.suspend()
        live_service.client.cancel(job)
        check_cancelled(live_service, job, attempts=1)
