import math
from datetime import timedelta

import pytest
from fastapi.testclient import TestClient

from service import metrics
from service.models import AttemptRow, JobRow, MetricBatchRow, MetricColumnRow
from service.thinning import SWEEP_SECONDS, Thinning
from tests.unit.service_fixtures import Service
from workers.contract import JobStatus, Points


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty points of a thinned series are kept."""
    monkeypatch.setattr(metrics, "KEPT_POINTS", 40)


@pytest.fixture
def thinning(service: Service) -> Thinning:
    return Thinning(service.database, service.settings, clock=lambda: service.now)


def told(service: Service, *, has_ended: bool = True) -> str:
    """A job that told of 2,000 steps, with a spike and a NaN among them."""
    job_id = service.submit()
    with service.database.write() as session:
        session.add(AttemptRow(job_id=job_id, number=1, submission_id=job_id, num_cpus=1, num_gpus=0, created_at=service.now))
        session.flush()
        for sequence in range(2):
            steps = list(range(1000 * sequence, 1000 * sequence + 1000))
            values = [50.0 if step == 777 else math.nan if step == 1500 else float(step % 7) for step in steps]
            points = Points(steps=steps, series={"loss": values, "lr": values})
            metrics.append(session, job_id, attempt=1, incarnation=1, sequence=sequence, points=points)
        if has_ended:
            job = session.get_one(JobRow, job_id)
            job.status, job.finished_at = JobStatus.SUCCEEDED, service.now
    return job_id


def steps(service: Service, job_id: str) -> dict[str, list[int]]:
    with service.database.read() as session:
        return {name: series.steps for name, series in metrics.read(session, job_id, max_points=metrics.MAX_MAX_POINTS).items()}


def test_a_job_that_ended_long_ago_keeps_its_course(client: TestClient, service: Service, thinning: Thinning) -> None:
    job_id, goes_on = told(service), told(service, has_ended=False)
    path = f"/v1/jobs/{job_id}/metrics"
    tag = client.get(path).headers["ETag"]
    service.pass_time(90 * 86400)
    thinning.sweep_when_due()
    assert len(steps(service, job_id)["loss"]) == 2000, "not a day too soon"
    service.pass_time(86400)
    for _ in range(2):
        thinning.sweep_when_due()
        service.pass_time(SWEEP_SECONDS)
        kept = steps(service, job_id)
        assert {0, 777, 1500, 1999} <= set(kept["loss"]) == set(kept["lr"])
        assert len(kept["loss"]) <= 40
    assert len(steps(service, goes_on)["loss"]) == 2000
    assert client.get(path, headers={"If-None-Match": tag}).status_code == 200, "it is another now"
    with service.database.read() as session:
        assert session.query(MetricBatchRow).filter_by(job_id=job_id).count() == 1
        assert session.query(MetricColumnRow).filter_by(job_id=job_id).count() == 2


def test_one_job_at_a_time_the_oldest_first(service: Service, thinning: Thinning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "utc_now", lambda: service.now)
    jobs = []
    for _ in range(3):
        jobs.append(told(service))
        service.pass_time(86400)
    service.pass_time(91 * 86400)
    found = []
    for _ in jobs:
        thinning.sweep_when_due()
        thinning.sweep_when_due()  # not due again
        found.append([len(steps(service, job_id)["loss"]) <= 40 for job_id in jobs])
        service.pass_time(SWEEP_SECONDS)
    assert found == [[True, False, False], [True, True, False], [True, True, True]]


def test_a_deleted_job_is_let_go(service: Service, thinning: Thinning) -> None:
    job_id = told(service)
    with service.database.write() as session:
        session.get_one(JobRow, job_id).deleted_at = service.now
    service.pass_time(100 * 86400)
    thinning.sweep_when_due()
    assert len(steps(service, job_id)["loss"]) == 2000


def test_a_setting_says_how_long(service: Service) -> None:
    job_id = told(service)
    settings = service.settings.model_copy(update={"metrics_whole_days": 3})
    thinning = Thinning(service.database, settings, clock=lambda: service.now + timedelta(days=5))
    thinning.sweep_when_due()
    assert len(steps(service, job_id)["loss"]) <= 40


def test_the_dispatcher_does_it(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = told(service)
    service.pass_time(100 * 86400)
    dispatcher = service.new_dispatcher()
    monkeypatch.setattr(dispatcher, "tick", dispatcher.stop)
    dispatcher.run()
    assert len(steps(service, job_id)["loss"]) <= 40
