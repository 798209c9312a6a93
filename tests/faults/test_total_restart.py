"""The whole service dies at once, with jobs everywhere, and starts again: each goes on where it was."""

from collections.abc import Callable

import pytest

from tests.conftest import LiveService
from tests.faults.checks import check_job, check_nothing_left
from tests.faults.moments import BY_ONE_WORKER, ENDLESS, TRAINING, go_on, reach, start
from tests.integration.runs import Json, probe_spec, train_workers, wait_for

Undisturbed = Callable[[Json], dict[int, float]]
FAULT = "kill -9 of API and dispatcher together"


def kill_and_start(service: LiveService) -> None:
    service.kill_dispatcher()
    service.kill_api()
    service.start_api()
    service.start_dispatcher()


@pytest.mark.fault(FAULT, "starting", ci=True)
@pytest.mark.fault(FAULT, "running", ci=True)
def test_at_work(live_service: LiveService, undisturbed: Undisturbed) -> None:
    """One is paused, one runs, one waits for its encoder, one for devices, one starts."""
    client = live_service.client
    paused = start(live_service, "stopping")
    wait_for(lambda: client.job(paused)["status"] == "paused", seconds=120, what="the pause")
    running = start(live_service, "running")
    [worker] = train_workers(live_service.run)
    worker.suspend()  # or it may be over before all are at their places
    child = client.submit(probe_spec({"job": running}, name="waits for a job", resources={"num_workers": 1}))["id"]
    waiting = client.submit(TRAINING | {"name": "waits for devices"})["id"]
    wait_for(lambda: client.job(waiting)["reason"] == "waiting_for_resources", seconds=60, what="one that waits for devices")
    starting = client.submit(BY_ONE_WORKER | {"name": "starts"})["id"]
    reach(live_service, starting, "starting")
    jobs = {paused: "paused", running: "running", child: "queued", waiting: "queued", starting: "starting"}
    assert {job: client.job(job)["status"] for job in jobs} == jobs

    worker.resume()
    kill_and_start(live_service)
    client.resume(paused)
    check_job(live_service, paused, attempts=2, undisturbed=undisturbed(BY_ONE_WORKER))
    check_job(live_service, running, attempts=1, undisturbed=undisturbed(BY_ONE_WORKER))
    check_job(live_service, child, attempts=1)
    check_job(live_service, waiting, attempts=1, undisturbed=undisturbed(TRAINING))
    check_job(live_service, starting, attempts=1, undisturbed=undisturbed(BY_ONE_WORKER))
    assert {name.rpartition("-")[0] for name in live_service.submissions()} >= set(jobs)


@pytest.mark.fault(FAULT, "saving")
@pytest.mark.fault(FAULT, "stopping")
def test_while_they_stop(live_service: LiveService, undisturbed: Undisturbed) -> None:
    """One saves for its pause, one is being cancelled."""
    client = live_service.client
    cancelled = start(live_service, "running", ENDLESS)
    pausing = start(live_service, "stopping")
    client.cancel(cancelled)
    kill_and_start(live_service)
    go_on(live_service, pausing, "stopping")
    check_job(live_service, cancelled, status="cancelled", reason="cancelled_by_user", attempts=1)
    check_job(live_service, pausing, attempts=2, undisturbed=undisturbed(BY_ONE_WORKER))
    check_nothing_left(live_service, pausing)
