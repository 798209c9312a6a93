"""What an elastic job holds of the cluster, as the dispatcher reckons."""

import pytest

from service import reports
from service.ray_jobs import ClusterResources
from tests.unit.service_fixtures import Service
from workers.contract import EventType, JobStatus, Reason, Report

ELASTIC = {
    "resources": {"num_workers": {"min": 2, "max": 6}, "cpus_per_worker": 2},
    "optim": {"epochs": 2, "batch_size": 48, "warmup_epochs": 1},
}
ONE = {"resources": {"num_workers": 1, "cpus_per_worker": 2}}


def test_it_starts_where_its_fewest_find_room(service: Service) -> None:
    service.ray.cluster = ClusterResources(8, 0, used_cpus=5)
    job_id = service.submit(**ELASTIC)
    service.tick()
    assert (service.job(job_id).status, service.job(job_id).reason) == (JobStatus.QUEUED, Reason.WAITING_FOR_RESOURCES)
    assert service.job(job_id).detail == "needs 4 CPUs, 3.0 of 8.0 free"
    service.ray.cluster = ClusterResources(8, 0, used_cpus=4)
    service.tick(2)
    assert service.job(job_id).status is JobStatus.STARTING


@pytest.mark.parametrize(("num_workers", "fits"), [(2, True), (4, False)])
def test_until_it_has_started_it_may_take_all_that_it_wants(service: Service, num_workers: int, fits: bool) -> None:
    """What its driver finds free it takes: another job that was given the same devices meanwhile would wait for its end."""
    service.ray.cluster = ClusterResources(8, 0)
    job_id, other = service.submit(**ELASTIC), service.submit(**ONE)
    for _ in range(2):
        service.tick(2)
    assert service.attempt(job_id).num_cpus == 12
    assert service.job(other).status is JobStatus.QUEUED
    service.report(job_id, EventType.WORKERS_STARTED, num_workers=num_workers)
    assert service.attempt(job_id).num_cpus == 2 * num_workers
    service.tick(2)
    assert (service.job(other).status is JobStatus.STARTING) is fits


def test_it_holds_what_its_newest_workers_hold(service: Service) -> None:
    job_id = service.submit(**ELASTIC)
    service.tick()
    held = []
    for incarnation, num_workers in [(10, 6), (20, 2), (30, 4), (20, 2), (40, None), (50, 64)]:  # late, silent, impossible
        told = {} if num_workers is None else {"num_workers": num_workers}
        service.report(job_id, EventType.WORKERS_STARTED, incarnation=incarnation, sequence=len(held), **told)
        held.append(service.attempt(job_id).num_cpus)
    assert held == [12, 4, 8, 8, 8, 8]


def answers_of(service: Service, job_id: str, *, sequence: int) -> bool:
    report = Report(incarnation=1, sequence=sequence)
    return reports.record(service.database, job_id, 1, report, bucket=service.storage.bucket).may_grow


def test_it_grows_while_no_job_waits_for_devices(service: Service) -> None:
    """What becomes free is kept for one that has waited long: it would never start otherwise."""
    service.ray.cluster = ClusterResources(8, 0)
    elastic, fixed = service.submit(**ELASTIC), service.submit(**ELASTIC | {"resources": {"num_workers": 2}})
    for job_id in (elastic, fixed):
        service.tick(2)
        service.ray.run(f"{job_id}-a1")
        service.report(job_id, EventType.WORKERS_STARTED, num_workers=2)
    assert answers_of(service, elastic, sequence=1)
    assert not answers_of(service, fixed, sequence=1)
    large = service.submit(resources={"num_workers": 8})
    service.tick(2)
    assert service.job(large).status is JobStatus.QUEUED
    assert not answers_of(service, elastic, sequence=2)
    service.cancel(large)
    service.tick(2)
    assert answers_of(service, elastic, sequence=3)
