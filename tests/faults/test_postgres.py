"""PostgreSQL stops, crashes and is away for a minute, under an API, a dispatcher and a run."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tests.faults.checks import check_job
from tests.faults.moments import BY_ONE_WORKER, go_on, start
from tests.faults.outcome import MOMENTS
from tests.faults.services import OnPostgres
from tests.integration.runs import Json, wait_for

Undisturbed = Callable[[Json], dict[int, float]]


@pytest.mark.parametrize(
    ("mode", "moment"),
    [
        pytest.param(
            mode, moment, marks=pytest.mark.fault(f"PostgreSQL restarted ({mode})", moment, ci=(mode, moment) == ("immediate", "stopping"))
        )
        for mode in ("fast", "immediate")
        for moment in MOMENTS
    ],
)
def test_restart(postgres_service: OnPostgres, undisturbed: Undisturbed, mode: str, moment: str) -> None:
    job = start(postgres_service, moment)
    postgres_service.server.stop(mode=mode)
    postgres_service.server.start()
    go_on(postgres_service, job, moment)
    check_job(postgres_service, job, attempts=2 if moment == "stopping" else 1, undisturbed=undisturbed(BY_ONE_WORKER))


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=pytest.mark.fault("PostgreSQL away for a minute", moment)) for moment in MOMENTS]
)
def test_absence(postgres_service: OnPostgres, undisturbed: Undisturbed, moment: str) -> None:
    """The API says so, and the run goes on."""
    job = start(postgres_service, moment)
    postgres_service.server.stop(mode="immediate")
    until = datetime.now(UTC) + timedelta(seconds=60)

    def is_over() -> bool:
        answer = httpx.get(f"{postgres_service.url}/readyz", timeout=60, trust_env=False)
        assert (answer.status_code, list(answer.json()["missing"])) == (503, ["database"])
        return datetime.now(UTC) >= until

    try:
        wait_for(is_over, seconds=120, what="the end of the absence")
    finally:
        postgres_service.server.start()
    go_on(postgres_service, job, moment)
    check_job(postgres_service, job, attempts=2 if moment == "stopping" else 1, undisturbed=undisturbed(BY_ONE_WORKER))
