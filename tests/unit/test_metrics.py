import math
import random

import pytest
from fastapi.testclient import TestClient

from service import metrics, reports
from tests.unit.service_fixtures import Service
from workers.contract import Points, Report


def send(service: Service, job_id: str, points: dict[int, float | None], *, name: str = "loss", **key: int) -> None:
    key = {"attempt": 1, "incarnation": 1, "sequence": 0} | key
    attempt = key.pop("attempt")
    report = Report(points=Points(steps=list(points), series={name: list(points.values())}), **key)
    reports.record(service.database, job_id, attempt, report, bucket="maestro")


def read(service: Service, job_id: str, **options: int) -> dict[str, metrics.Series]:
    with service.database.read() as session:
        return metrics.read(session, job_id, **options)


@pytest.fixture
def job(service: Service) -> str:
    job_id = service.submit()
    service.tick()
    return job_id


def test_batches_make_one_series(service: Service, job: str) -> None:
    send(service, job, {1: 5.0, 2: 4.0})
    send(service, job, {3: 3.0, 4: 2.0}, sequence=1)
    series = read(service, job)["loss"]
    assert (series.steps, series.values) == ([1, 2, 3, 4], [5.0, 4.0, 3.0, 2.0])


def test_a_repeat_changes_nothing(service: Service, job: str) -> None:
    send(service, job, {1: 5.0})
    send(service, job, {1: 99.0, 2: 99.0})
    assert read(service, job)["loss"].values == [5.0]


def test_the_newest_incarnation_wins_however_late_the_older_comes(service: Service, job: str) -> None:
    send(service, job, {3: 30.0, 4: 40.0}, incarnation=2000)
    send(service, job, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}, incarnation=1000, sequence=9)
    series = read(service, job)["loss"]
    assert (series.steps, series.values) == ([1, 2, 3, 4, 5], [1.0, 2.0, 30.0, 40.0, 5.0])


def test_a_later_attempt_wins_over_a_larger_incarnation() -> None:
    """Order is by attempt first: clocks of two machines may differ."""
    batches = [{"steps": [1, 2], "series": {"loss": [1.0, 2.0]}}, {"steps": [2], "series": {"loss": [20.0]}}]
    assert metrics.merge(batches) == {"loss": {1: 1.0, 2: 20.0}}


def test_a_step_without_a_value_is_no_point(service: Service, job: str) -> None:
    send(service, job, {1: 5.0, 2: None, 3: 3.0})
    assert read(service, job)["loss"].steps == [1, 3]


def test_what_is_not_finite_stays_visible(client: TestClient, service: Service, job: str) -> None:
    send(service, job, {1: 1.0, 2: math.nan, 3: math.inf, 4: -math.inf})
    answer = client.get(f"/v1/jobs/{job}/metrics")
    assert answer.json() == {"series": {"loss": {"steps": [1, 2, 3, 4], "values": [1.0, "NaN", "Infinity", "-Infinity"]}}}


def test_names_and_max_points(client: TestClient, service: Service, job: str) -> None:
    send(service, job, {step: float(step) for step in range(1000)})
    send(service, job, {1: 0.1}, name="lr", sequence=1)
    assert set(client.get(f"/v1/jobs/{job}/metrics").json()["series"]) == {"loss", "lr"}
    assert set(client.get(f"/v1/jobs/{job}/metrics", params={"names": "lr, none"}).json()["series"]) == {"lr"}
    series = client.get(f"/v1/jobs/{job}/metrics", params={"max_points": 40}).json()["series"]["loss"]
    assert 20 <= len(series["steps"]) <= 40
    assert client.get(f"/v1/jobs/{job}/metrics", params={"max_points": 0}).status_code == 422


def test_no_spike_and_no_nan_is_lost() -> None:
    generator = random.Random(0)
    values = {step: generator.random() for step in range(10_000)}
    values |= {777: 50.0, 4321: -50.0, 6000: math.nan, 9000: math.inf}
    for max_points in (4, 10, 100, 1000):
        series = metrics.downsample(values, max_points=max_points)
        assert len(series.steps) <= max_points
        assert series.steps == sorted(set(series.steps))
        assert series.steps[-1] == 9999
        assert {777, 4321} <= set(series.steps)
        assert any(not math.isfinite(value) for value in series.values)
        assert all(values[step] == value or math.isnan(value) for step, value in zip(series.steps, series.values, strict=True))


def test_a_short_series_is_left_alone() -> None:
    values = {step: float(step) for step in range(50)}
    assert metrics.downsample(values, max_points=50).steps == list(range(50))
