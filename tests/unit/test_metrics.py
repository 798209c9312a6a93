import math
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, select

from service import metrics, reports
from service.models import AttemptRow, JobRow, MetricBatchRow, MetricColumnRow, MetricSummaryRow
from tests.unit.service_fixtures import Service
from workers.contract import MAX_INTEGER, MAX_POINTS, Points, Report, RunProgress, attempt_token

Told = dict[int, float | None]


def send(service: Service, job_id: str, points: Told | None, *, name: str = "loss", **key: int) -> None:
    key = {"attempt": 1, "incarnation": 1, "sequence": 0} | key
    attempt = key.pop("attempt")
    series = None if points is None else Points(steps=list(points), series={name: list(points.values())})
    progress = RunProgress(step=1, num_steps=1, epoch=0.0) if points is None else None
    reports.record(service.database, job_id, attempt, Report(points=series, progress=progress, **key), bucket="maestro")


def read(service: Service, job_id: str, **options: int) -> dict[str, metrics.Series]:
    with service.database.read() as session:
        return metrics.read(session, job_id, **options)


def curve(service: Service, job_id: str, name: str = "loss") -> dict[int, float]:
    series = read(service, job_id).get(name, metrics.Series(steps=[], values=[]))
    return dict(zip(series.steps, series.values, strict=True))


def begin_attempt(service: Service, job_id: str, number: int) -> None:
    with service.database.write() as session:
        session.get_one(AttemptRow, (job_id, number - 1)).ended_at = service.now
        session.get_one(JobRow, job_id).attempt = number
        row = AttemptRow(job_id=job_id, number=number, submission_id=f"{job_id}-a{number}", num_cpus=1, num_gpus=0, created_at=service.now)
        session.add(row)


def num_rows(service: Service, table: type[Any]) -> int:
    with service.database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


@pytest.fixture
def job(service: Service) -> str:
    job_id = service.submit()
    service.tick()
    return job_id


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are merged from two on."""
    monkeypatch.setattr(metrics, "_MANY", 2)


def test_batches_make_one_series(service: Service, job: str) -> None:
    send(service, job, {1: 5.0, 2: 4.0})
    send(service, job, {3: 3.0, 4: 2.0}, sequence=1)
    assert curve(service, job) == {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}


def test_a_repeat_changes_nothing(service: Service, job: str) -> None:
    send(service, job, {1: 5.0})
    send(service, job, {1: 99.0, 2: 99.0})
    assert curve(service, job) == {1: 5.0}


def test_a_later_attempt_wins_over_a_larger_incarnation(service: Service, job: str) -> None:
    """Order is by attempt first: clocks of two machines may differ."""
    begin_attempt(service, job, 2)
    key = {"job_id": job, "sequence": 0}
    with service.database.write() as session:
        for attempt, incarnation, values in ((2, 1, {2: 20.0}), (1, 9, {1: 1.0, 2: 2.0, 3: 3.0})):
            points = Points(steps=list(values), series={"loss": list(values.values())})
            assert metrics.append(session, attempt=attempt, incarnation=incarnation, points=points, **key)
    assert curve(service, job) == {1: 1.0, 2: 20.0}


def test_a_new_start_takes_back_what_it_has_not_reached_again(service: Service, job: str) -> None:
    """Also of series that it will not tell for a while; what was told of the very step from which it goes on stays."""
    send(service, job, dict.fromkeys(range(1, 97), 1.0), incarnation=1000)
    send(service, job, {100: 0.6}, name="knn_accuracy", incarnation=1000, sequence=1)  # on GPUs told before the last steps up to there
    send(service, job, dict.fromkeys(range(97, 141), 1.0), incarnation=1000, sequence=2)
    send(service, job, {140: 0.7}, name="knn_accuracy", incarnation=1000, sequence=3)
    assert curve(service, job) == dict.fromkeys(range(1, 141), 1.0)
    assert curve(service, job, "knn_accuracy") == {100: 0.6, 140: 0.7}
    send(service, job, {100: 0.61}, name="knn_accuracy", incarnation=2000)
    send(service, job, {101: 2.0, 102: 2.0}, incarnation=2000, sequence=1)
    assert curve(service, job) == dict.fromkeys(range(1, 101), 1.0) | {101: 2.0, 102: 2.0}
    assert curve(service, job, "knn_accuracy") == {100: 0.61}


def test_the_newest_start_wins_however_late_the_older_one_comes(service: Service, job: str) -> None:
    send(service, job, {3: 30.0, 4: 40.0}, incarnation=2000)
    send(service, job, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}, incarnation=1000, sequence=9)
    assert curve(service, job) == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0}


def test_a_run_that_goes_back_in_one_start_tells_its_steps_anew(service: Service, job: str) -> None:
    send(service, job, {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0})
    send(service, job, {2: 20.0}, sequence=1)
    assert curve(service, job) == {1: 1.0, 2: 20.0, 3: 3.0, 4: 4.0}


def test_what_an_earlier_attempt_left_on_disk_is_put_where_it_belongs(client: TestClient, service: Service, job: str) -> None:
    """The third attempt finds it, on the first one's machine; the second has gone on elsewhere."""
    send(service, job, dict.fromkeys(range(1, 51), 1.0), incarnation=10)
    left = {"attempt": 1, "incarnation": 10, "sequence": 1}
    report = {"incarnation": 30, "sequence": 0, "points": {"steps": list(range(51, 81)), "series": {"loss": [1.0] * 30}}, "origin": left}

    def tell(attempt: int, **changes: Any) -> int:
        token = attempt_token(service.settings.secret_key.get_secret_value(), job, attempt)
        path = f"/v1/jobs/{job}/attempts/{attempt}/reports"
        return client.post(path, json=report | changes, headers={"Authorization": f"Bearer {token}"}).status_code

    assert tell(1) == 422, "what is its own it tells as its own"
    for number in (2, 3):
        begin_attempt(service, job, number)
        assert tell(number, progress={"step": 1, "num_steps": 2, "epoch": 0.0}) == 422
        if number == 2:
            send(service, job, dict.fromkeys(range(61, 201), 2.0), attempt=2, incarnation=20)
    for sequence in range(2):
        assert tell(3, sequence=sequence) == 200
        assert curve(service, job) == dict.fromkeys(range(1, 61), 1.0) | dict.fromkeys(range(61, 201), 2.0)
    send(service, job, {191: 3.0}, attempt=3, incarnation=30, sequence=2)
    assert max(curve(service, job)) == 191
    send(service, job, {51: 9.0}, attempt=3, incarnation=10, sequence=1)
    assert curve(service, job) == dict.fromkeys(range(1, 51), 1.0) | {51: 9.0, 191: 3.0}, "that attempt's own, whatever its number"


def test_steps_in_any_order_and_twice(service: Service, job: str) -> None:
    points = Points(steps=[5, 3, 5, 4, 3], series={"loss": [5.0, 3.0, 50.0, 4.0, None]})
    reports.record(service.database, job, 1, Report(incarnation=1, sequence=0, points=points), bucket="maestro")
    assert curve(service, job) == {3: 3.0, 4: 4.0, 5: 50.0}


def test_a_step_without_a_value_is_no_point(service: Service, job: str) -> None:
    send(service, job, {1: 5.0, 2: None, 3: 3.0})
    send(service, job, {0: None}, sequence=1)
    assert curve(service, job) == {1: 5.0, 3: 3.0}


STREAM = st.lists(st.dictionaries(st.integers(0, 30), st.floats(0, 9) | st.none(), max_size=6) | st.none(), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STREAM, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_any_reports_in_any_order_of_starts_make_the_curve_told_one_by_one(
    often: None, service: Service, job: str, streams: list[list[Told | None]], random: Any
) -> None:
    """Each start tells in order, as reporters do, some things twice; starts come mixed."""
    with service.database.write() as session:
        for table in (MetricBatchRow, MetricColumnRow, MetricSummaryRow):
            session.execute(delete(table))
    waiting = {incarnation: list(enumerate(stream)) for incarnation, stream in enumerate(streams)}
    done: list[tuple[int, int, Told | None]] = []
    while waiting:
        incarnation = random.choice(list(waiting))
        sequence, points = waiting[incarnation].pop(0)
        waiting = {key: left for key, left in waiting.items() if left}
        send(service, job, points, incarnation=incarnation, sequence=sequence)
        done.append((incarnation, sequence, points))
        incarnation, sequence, points = random.choice(done)
        send(service, job, {7: 77.0}, incarnation=incarnation, sequence=sequence)  # a repeat, whatever it says
    expected: dict[int, float] = {}
    for stream in streams:
        values = {step: value for points in stream for step, value in (points or {}).items() if value is not None}
        expected = {step: value for step, value in expected.items() if step <= min(values, default=step)} | values
    assert curve(service, job) == expected


def test_many_reports_become_few_batches(service: Service, job: str) -> None:
    for sequence in range(100):
        send(service, job, {sequence: float(sequence)} if sequence % 2 else None, sequence=sequence)
    assert (num_rows(service, MetricBatchRow), num_rows(service, MetricColumnRow)) == (3 + 4, 3)
    for sequence in (0, 31, 32, 63, 95, 96, 99):
        send(service, job, {0: 99.0}, sequence=sequence)
    assert curve(service, job) == {step: float(step) for step in range(1, 100, 2)}


def test_a_full_batch_is_not_written_again(service: Service, job: str, often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_FULL_POINTS", 8)
    for sequence in range(64):
        send(service, job, {sequence: 1.0}, sequence=sequence)
    with service.database.read() as session:
        batches = session.execute(select(MetricBatchRow.first_sequence, MetricBatchRow.num_points).order_by(MetricBatchRow.sequence)).all()
    assert [tuple(batch) for batch in batches] == [(first, 8) for first in range(0, 64, 8)]
    assert curve(service, job) == dict.fromkeys(range(64), 1.0)


def test_what_is_not_finite_stays_visible(client: TestClient, service: Service, job: str) -> None:
    send(service, job, {1: 1.0, 2: math.nan, 3: math.inf, 4: -math.inf})
    answer = client.get(f"/v1/jobs/{job}/metrics")
    assert answer.json() == {"series": {"loss": {"steps": [1, 2, 3, 4], "values": [1.0, "NaN", "Infinity", "-Infinity"]}}}


def test_names_steps_and_max_points(client: TestClient, service: Service, job: str, often: None) -> None:
    send(service, job, {step: float(step) for step in range(1000)})
    send(service, job, {1000: 0.1}, name="lr", sequence=1)
    send(service, job, {step: float(step) for step in range(1001, 2001)}, sequence=2)

    def series(**params: str | int) -> dict[str, Any]:
        answer = client.get(f"/v1/jobs/{job}/metrics", params=params)
        assert answer.status_code == 200
        found: dict[str, Any] = answer.json()["series"]
        return found

    assert {name: len(one["steps"]) for name, one in series().items()} == {
        "loss": 1000 if False else len(series()["loss"]["steps"]),
        "lr": 1,
    }
    assert set(series(names="lr, none")) == {"lr"}
    assert 10 <= len(series(max_points=40)["loss"]["steps"]) <= 40
    assert series(from_step=998, to_step=1002)["loss"]["steps"] == [998, 999, 1001, 1002]
    assert series(from_step=1001)["loss"]["steps"][0] == 1001
    assert set(series(from_step=1001)) == {"loss"}
    assert series(to_step=0)["loss"]["steps"] == [0], "the first of a large batch"
    assert series(from_step=999, to_step=999)["loss"]["steps"] == [999], "and its last"
    assert series(from_step=5, to_step=4) == {}
    for params in ({"max_points": 4}, {"max_points": 20_001}, {"from_step": -1}, {"to_step": 2**63}, {"from_step": "x"}):
        assert client.get(f"/v1/jobs/{job}/metrics", params=params).status_code == 422


def test_many_long_series_are_shown_with_fewer_points(service: Service, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_ANSWER_POINTS", 200)
    points = Points(steps=list(range(1000)), series={name: [float(step) for step in range(1000)] for name in "abcd"})
    reports.record(service.database, job, 1, Report(incarnation=1, sequence=0, points=points), bucket="maestro")
    assert all(20 < len(series.steps) <= 50 for series in read(service, job, max_points=1000).values())


def test_what_has_not_changed_is_not_sent_again(client: TestClient, service: Service, job: str) -> None:
    path = f"/v1/jobs/{job}/metrics"
    tags = [client.get(path).headers["ETag"]]
    for sequence in range(2):
        send(service, job, {sequence: 1.0}, sequence=sequence)
        tags.append(client.get(path).headers["ETag"])
    assert len(set(tags)) == 3
    send(service, job, {5: 1.0}, sequence=1)
    send(service, job, None, sequence=2)
    answer = client.get(path, headers={"If-None-Match": f'W/"other", {tags[-1]}'})
    assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", tags[-1])
    assert client.get(path, headers={"If-None-Match": tags[-2]}).status_code == 200


@pytest.mark.parametrize(
    ("points", "field"),
    [
        ({"steps": list(range(MAX_POINTS + 1)), "series": {}}, "points.steps"),
        ({"steps": [-1], "series": {"loss": [1.0]}}, "points.steps.0"),
        ({"steps": [2**63], "series": {"loss": [1.0]}}, "points.steps.0"),
        ({"steps": [1, 2], "series": {"loss": [1.0]}}, "points"),
        ({"steps": [1], "series": {"a\nb\0": [1.0]}}, "points.series.a\nb\0.[key]"),
        ({"steps": [1], "series": {"": [1.0]}}, "points.series..[key]"),
        ({"steps": [1], "series": {"x" * 101: [1.0]}}, f"points.series.{'x' * 101}.[key]"[:100]),
        ({"steps": [1], "series": {f"s{number}": [1.0] for number in range(65)}}, "points.series"),
        ({"steps": [1], "series": {"loss": ["one"] * 100_000}}, "points.series.loss.0"),
        ({"steps": ["x"] * 1000, "series": {"loss": ["one"] * 1000}}, "points.steps.0"),
    ],
)
def test_points_that_cannot_be_are_refused_with_their_place(
    client: TestClient, service: Service, job: str, points: dict[str, Any], field: str
) -> None:
    token = attempt_token(service.settings.secret_key.get_secret_value(), job, 1)
    path, headers = f"/v1/jobs/{job}/attempts/1/reports", {"Authorization": f"Bearer {token}"}
    send(service, job, {1: 1.0})
    answer = client.post(path, json={"incarnation": 1, "sequence": 1, "points": points}, headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)
    assert len(answer.content) < 3000
    million = b'{"incarnation": 1, "sequence": 1, "points": {"steps": [1], "series": {"loss": [' + b"1.25," * 10**6 + b"1]}}}"
    assert client.post(path, content=million, headers=headers | {"Content-Type": "application/json"}).status_code == 413
    assert curve(service, job) == {1: 1.0}
    answer = client.post(
        path, json={"incarnation": 1, "sequence": 1, "points": {"steps": [MAX_INTEGER], "series": {"loss": [2.0]}}}, headers=headers
    )
    assert answer.status_code == 200
    assert curve(service, job) == {1: 1.0, MAX_INTEGER: 2.0}


def test_a_job_has_so_many_series_and_no_more(client: TestClient, service: Service, job: str) -> None:
    token = attempt_token(service.settings.secret_key.get_secret_value(), job, 1)
    for sequence in range(metrics.MAX_SERIES // 64 + 1):
        points = {"steps": [1], "series": {f"s{sequence * 64 + number}": [1.0] for number in range(64)}}
        report = {"incarnation": 1, "sequence": sequence, "points": points}
        answer = client.post(f"/v1/jobs/{job}/attempts/1/reports", json=report, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == (200 if sequence < metrics.MAX_SERIES // 64 else 422)
    assert answer.json()["errors"] == [{"field": "points.series", "message": "a job has at most 256 series; this one would have 320"}]
    assert len(read(service, job)) == metrics.MAX_SERIES
    send(service, job, {2: 1.0}, name="s0", sequence=100)
    assert curve(service, job, "s0") == {1: 1.0, 2: 1.0}


def test_lists_and_the_job_itself_do_not_look_at_series(client: TestClient, service: Service, job: str) -> None:
    send(service, job, {1: 1.0})
    with service.database.write() as session:
        session.connection().exec_driver_sql("ALTER TABLE metric_batches RENAME TO elsewhere")
        session.connection().exec_driver_sql("ALTER TABLE metric_summaries RENAME TO elsewhere_too")
    assert client.get("/v1/jobs").status_code == client.get(f"/v1/jobs/{job}").status_code == 200
