"""Runs in Ray for which no attempt is under way are stopped; all others are left alone."""

import pytest

from service.counters import Tally
from service.launches import deployment_of
from service.ray_jobs import RayStatus
from service.reconciler import SWEEP_SECONDS, Reconciler
from tests.unit.service_fixtures import Service
from workers.contract import JobStatus


def sweep(service: Service, reconciler: Reconciler) -> None:
    service.pass_time(SWEEP_SECONDS)
    reconciler.sweep_when_due()


@pytest.fixture
def reconciler(service: Service) -> Reconciler:
    return Reconciler(service.database, service.ray, service.settings, tally=Tally(), clock=lambda: service.now)


def run_in_ray(service: Service, name: str, **metadata: str) -> None:
    service.ray.submit(name, entrypoint="sleep", env_vars={}, metadata=metadata)
    service.ray.run(name)


def test_an_orphan_is_stopped_at_the_second_sight(service: Service, reconciler: Reconciler) -> None:
    """Such as an attempt whose end was recorded while Ray did not know it, and which is there again."""
    job_id = service.start()
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(1)
    assert service.job(job_id).status is JobStatus.RECOVERING
    service.ray.run(f"{job_id}-a1")
    sweep(service, reconciler)
    assert service.ray.stopped == []
    reconciler.sweep_when_due()  # not due: that is no second sight
    assert service.ray.stopped == []
    sweep(service, reconciler)
    assert service.ray.stopped == [f"{job_id}-a1"]
    sweep(service, reconciler)
    assert service.ray.stopped == [f"{job_id}-a1"]  # it is over


def test_what_is_wanted_or_not_ours_is_left_alone(service: Service, reconciler: Reconciler) -> None:
    service.start()
    run_in_ray(service, "raysubmit_of-a-user")
    run_in_ray(service, "theirs-a1", job="theirs", attempt="1", deployment="another service")
    run_in_ray(service, "lost-a1", job="lost", attempt="1", deployment=deployment_of(service.settings.secret_keys[0]))
    for _ in range(3):
        sweep(service, reconciler)
    assert service.ray.stopped == ["lost-a1"]
    assert reconciler.num_known == len(service.ray.jobs) == 4


def test_a_ray_that_is_away_is_asked_again(service: Service, reconciler: Reconciler) -> None:
    run_in_ray(service, "lost-a1", job="lost", attempt="1", deployment=deployment_of(service.settings.secret_keys[0]))
    sweep(service, reconciler)
    service.ray.is_down = True
    sweep(service, reconciler)
    service.ray.is_down = False
    sweep(service, reconciler)
    assert service.ray.stopped == ["lost-a1"]


def test_the_loop_sweeps(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = []
    monkeypatch.setattr(Reconciler, "sweep_when_due", lambda self: (swept.append(1), service.dispatcher.stop()))
    service.dispatcher.run()
    assert swept == [1]
