"""kill -9 of each process of a run and of the service, at each moment; what is killed is started again by whom it is for."""

from collections.abc import Callable

import pytest

from tests.conftest import LiveService
from tests.faults.checks import check_job, drivers
from tests.faults.moments import BY_ONE_WORKER, TRAINING, go_on, going_on, start, worker_of_rank
from tests.faults.outcome import MOMENTS
from tests.integration.runs import Json, events_of, train_workers, wait_for

Undisturbed = Callable[[Json], dict[int, float]]


def cells(fault: str, *, ci: str = "") -> pytest.MarkDecorator:
    """One test for each moment; of the CI subset is the one of `ci`."""
    return pytest.mark.parametrize(
        "moment", [pytest.param(moment, marks=pytest.mark.fault(fault, moment, ci=moment == ci)) for moment in MOMENTS]
    )


@cells("kill -9 of the API")
def test_the_api(live_service: LiveService, undisturbed: Undisturbed, moment: str) -> None:
    """The run goes on without it, and what it had to tell comes later."""
    job = start(live_service, moment)
    goes_on = going_on(live_service, job, moment)
    live_service.kill_api()
    try:
        wait_for(goes_on, seconds=240, what="another training state, with no API")
    finally:
        live_service.start_api()
    go_on(live_service, job, moment)
    check_job(live_service, job, attempts=2 if moment == "stopping" else 1, undisturbed=undisturbed(BY_ONE_WORKER))


@cells("kill -9 of the dispatcher")
def test_the_dispatcher(live_service: LiveService, undisturbed: Undisturbed, moment: str) -> None:
    job = start(live_service, moment)
    goes_on = going_on(live_service, job, moment)
    live_service.kill_dispatcher()
    try:
        wait_for(goes_on, seconds=240, what="another training state, with no dispatcher")
    finally:
        live_service.start_dispatcher()
    go_on(live_service, job, moment)
    check_job(live_service, job, attempts=2 if moment == "stopping" else 1, undisturbed=undisturbed(BY_ONE_WORKER))


@cells("kill -9 of the driver", ci="running")
def test_the_driver(live_service: LiveService, undisturbed: Undisturbed, moment: str) -> None:
    """Ray ends its workers, and the service makes another attempt."""
    job = start(live_service, moment, TRAINING)
    for process in drivers(live_service.run, job):
        process.kill()
    go_on(live_service, job, moment)
    check_job(live_service, job, attempts=2, undisturbed=undisturbed(TRAINING))
    assert ends_of(live_service, job) == ["driver_died" if moment != "stopping" else "paused_by_user", None]


@pytest.mark.parametrize(
    ("rank", "moment"),
    [
        pytest.param(
            rank, moment, marks=pytest.mark.fault(f"kill -9 of the worker of rank {rank}", moment, ci=(rank, moment) == (0, "saving"))
        )
        for rank in (0, 1)
        for moment in MOMENTS
    ],
)
def test_a_worker(live_service: LiveService, undisturbed: Undisturbed, moment: str, rank: int) -> None:
    """The driver starts all workers again, in the same attempt."""
    job = start(live_service, moment, TRAINING)
    if moment == "starting":
        wait_for(lambda: len(train_workers(live_service.run)) == 2, seconds=120, what="both workers")
        worker = train_workers(live_service.run)[rank]
    else:
        worker = worker_of_rank(live_service, rank)
    worker.kill()
    go_on(live_service, job, moment)
    check_job(live_service, job, attempts=2 if moment == "stopping" else 1, undisturbed=undisturbed(TRAINING))


@pytest.mark.parametrize(
    ("program", "moment"),
    [
        pytest.param(program, moment, marks=pytest.mark.fault(f"kill -9 of the {name}", moment))
        for program, name in (("gcs_server", "Ray head (gcs_server)"), ("raylet", "raylet"))
        for moment in MOMENTS
    ],
)
def test_ray(live_service: LiveService, undisturbed: Undisturbed, moment: str, program: str) -> None:
    """The new head does not know the run: it is lost, and another attempt goes on."""
    job = start(live_service, moment, TRAINING)
    live_service.kill_of_ray(program)
    child = live_service.installation.cluster.child
    try:
        wait_for(lambda: child.exit_code is not None, seconds=60, what="the end of the head's other processes")
    finally:
        live_service.start_ray()
    go_on(live_service, job, moment)
    check_job(live_service, job, attempts=2, undisturbed=undisturbed(TRAINING), ray_forgot=True)
    assert ends_of(live_service, job) == ["ray_job_lost" if moment != "stopping" else "paused_by_user", None]


def ends_of(service: LiveService, job: str) -> list[str | None]:
    """Why its attempts ended."""
    return [event["reason"] for event in events_of(service.client, job, "attempt_ended")]
