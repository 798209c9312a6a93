"""An attempt that was taken for dead comes back while its successor trains: it is told to stop, and harms nothing."""

from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from tests.conftest import LiveService
from tests.faults.checks import check_job, drivers
from tests.faults.moments import BY_ONE_WORKER, start, states
from tests.integration.runs import Json, events_of, train_workers, wait_for
from workers.state_names import age, newest_first
from workers.stored import MANIFEST, EncoderManifest

Undisturbed = Callable[[Json], dict[int, float]]


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=pytest.mark.fault("a stale attempt comes back", moment, ci=moment == "running"))
        for moment in ("starting", "running", "saving")
    ],
)
def test_it_stops(live_service: LiveService, undisturbed: Undisturbed, moment: str) -> None:
    job = start(live_service, moment)
    family = freeze(live_service, job)
    try:
        wait_for(lambda: has_begun(live_service, job, attempt=2), seconds=180, what="the first step of the second attempt")
    finally:
        for process in family:
            process.resume()
    wait_for(lambda: not any(process.is_running() for process in family), seconds=120, what="the end of the stale attempt")
    check_job(live_service, job, attempts=2, undisturbed=undisturbed(BY_ONE_WORKER))
    assert [event["reason"] for event in events_of(live_service.client, job, "attempt_ended")] == ["driver_died", None]
    check_heard_no_more(live_service, job, attempt=1)
    folder = live_service.installation.storage.client().get_object(Bucket="maestro", Key=f"jobs/{job}/encoder/{MANIFEST}")
    assert EncoderManifest.model_validate_json(folder["Body"].read()).attempt == 2
    assert age(newest_first(states(live_service, job)[1])[0])[0] == 2


def freeze(service: LiveService, job: str) -> list[psutil.Process]:
    """Stops (SIGSTOP) all that belongs to the run, and kills Ray's own supervisor of it: for Ray, and so for the service, it is dead."""
    [driver] = drivers(service.run, job)
    supervisor = next(parent for parent in driver.parents() if "JobSupervisor" in parent.name() + "".join(parent.cmdline()))
    family = []
    for process in (*supervisor.children(recursive=True), *train_workers(service.run)):
        with suppress(psutil.NoSuchProcess):  # a shell command of a library's, which has ended meanwhile
            process.suspend()
            family.append(process)
    supervisor.kill()
    return family


def has_begun(service: LiveService, job: str, *, attempt: int) -> bool:
    return any(event["type"] == "first_step_taken" and event["attempt"] == attempt for event in service.client.events(job))


def check_heard_no_more(service: LiveService, job: str, *, attempt: int) -> None:
    """Nothing that an attempt told came after its end."""
    of_attempt = [event["type"] for event in service.client.events(job) if event["attempt"] == attempt]
    ended = of_attempt.index("attempt_ended")
    assert set(of_attempt[ended + 1 :]) <= {"status_changed"}
