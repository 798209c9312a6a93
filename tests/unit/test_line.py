"""Jobs that wait in line: their order, who passes whom, and what a look at many of them costs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event

from service.db import utc_now
from service.dispatcher import LINE_SECONDS
from service.policy import IN_LINE_SECONDS
from service.ray_jobs import ClusterResources, RayStatus
from tests.unit.service_fixtures import PROBE, Service
from workers.contract import JobStatus, Reason


def wants(num_workers: int, *, priority: int = 0) -> dict[str, object]:
    optim = {"epochs": 2, "batch_size": 64 * num_workers, "warmup_epochs": 1}
    return {"resources": {"num_workers": num_workers}, "optim": optim, "priority": priority}


def end(service: Service, job_id: str) -> None:
    """It succeeds, and Ray's figures know."""
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.ray.cluster = ClusterResources(service.ray.cluster.num_cpus, 0, at=utc_now())
    service.tick(1)
    assert service.job(job_id).status is JobStatus.SUCCEEDED


def waiting(service: Service, ids: list[str]) -> list[str]:
    return [job_id for job_id in ids if service.job(job_id).status is JobStatus.QUEUED]


@contextmanager
def statements(service: Service) -> Iterator[list[str]]:
    found: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        found.append(statement)

    event.listen(service.database.engine, "before_cursor_execute", note)
    yield found
    event.remove(service.database.engine, "before_cursor_execute", note)


def test_a_higher_priority_starts_first_and_the_older_of_the_same(service: Service) -> None:
    service.ray.cluster = ClusterResources(2, 0)
    runs = service.submit(**wants(2))
    service.tick()
    low, first, second, high = (service.submit(**wants(2, priority=priority)) for priority in (-1, 0, 0, 5))
    service.tick()
    for expected in (high, first, second, low):
        end(service, runs)
        service.tick(LINE_SECONDS)
        runs = expected
        assert service.job(expected).status is JobStatus.STARTING, [low, first, second, high].index(expected)
        assert sum(service.job(job_id).status is JobStatus.STARTING for job_id in (low, first, second, high)) == 1


def test_whose_turn_it_is_starts_at_once_and_not_with_its_next_look(service: Service) -> None:
    service.ray.cluster = ClusterResources(2, 0)
    runs = service.submit(**wants(2))
    service.tick()
    waits = service.submit(**wants(1))
    service.tick()
    end(service, runs)
    service.tick(LINE_SECONDS)
    assert LINE_SECONDS < IN_LINE_SECONDS
    assert service.job(waits).status is JobStatus.STARTING


def test_small_jobs_pass_a_large_one_but_do_not_starve_it(service: Service) -> None:
    service.ray.cluster = ClusterResources(4, 0)
    small = [service.submit(**wants(1)) for _ in range(2)]
    service.tick()
    large = service.submit(**wants(4))
    service.tick()
    small.append(service.submit(**wants(1)))
    service.tick()
    assert waiting(service, [large, *small]) == [large]  # it passed
    service.tick(service.settings.line_patience_seconds)
    late = [service.submit(**wants(1)) for _ in range(3)]
    service.tick()
    assert waiting(service, [large, *late]) == [large, *late]  # one CPU is free, and kept
    assert "what becomes free is kept for it" in (service.job(large).detail or "")
    assert "goes to a job that has waited long" in (service.job(late[0]).detail or "")
    assert large not in (service.job(late[0]).detail or "")  # of another project, perhaps
    for job_id in small:
        end(service, job_id)
        service.tick(LINE_SECONDS)
    assert waiting(service, [large, *late]) == late
    end(service, large)
    service.tick(LINE_SECONDS)
    assert waiting(service, late) == []


def test_a_launch_that_ray_does_not_answer_is_not_in_line_any_more(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.submit(**wants(1))

    def fail(*args: object, **kwargs: object) -> None:
        service.ray.is_down = True
        service.ray._reach()

    monkeypatch.setattr(service.ray, "submit", fail)
    service.tick()
    row = service.row(job_id)
    assert (row.status, row.reason, row.waiting_since) == (JobStatus.STARTING, Reason.RAY_UNREACHABLE, None)


def test_what_a_broken_round_has_looked_at_is_not_the_next_ones(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.start()

    def fail() -> None:
        raise OSError("the database is away")

    monkeypatch.setattr(service.dispatcher._actions, "release_unchanged", fail)
    with pytest.raises(OSError, match="away"):
        service.tick(1)
    monkeypatch.undo()
    service.expire_leases()
    service.tick(1)
    assert service.row(job_id).lease_token is None


def test_a_paused_or_resumed_job_begins_to_wait_anew(service: Service) -> None:
    service.ray.cluster = ClusterResources(1, 0)
    job_id = service.submit(**wants(2))
    service.tick()
    assert service.row(job_id).waiting_since == service.now
    service.pause(job_id)
    assert (service.job(job_id).status, service.row(job_id).waiting_since) == (JobStatus.PAUSED, None)


def test_a_child_is_looked_at_as_soon_as_its_parent_has_ended(service: Service) -> None:
    parent = service.start()
    child = service.submit(PROBE | {"encoder": {"job": parent}})
    service.tick()
    assert service.job(child).reason is Reason.WAITING_FOR_JOB
    end(service, parent)
    service.tick()  # takes the encoder up
    service.tick()
    assert service.job(child).status is JobStatus.STARTING


@pytest.mark.parametrize("num_jobs", [20, 60])
def test_a_look_at_many_costs_no_statement_for_each(service: Service, num_jobs: int) -> None:
    """Runs that go on, and jobs that wait."""
    service.ray.cluster = ClusterResources(num_jobs, 0)
    running = [service.start(**wants(1)) for _ in range(num_jobs)]
    queued = [service.submit(**wants(2)) for _ in range(num_jobs)]
    service.tick()
    asked: list[str] = []
    real = service.ray.info
    service.ray.info = lambda submission_id: (asked.append(submission_id), real(submission_id))[1]  # type: ignore[method-assign, func-returns-value]
    with statements(service) as found:
        assert service.tick(IN_LINE_SECONDS + 10) == 2 * num_jobs
    assert len(found) < 25, found
    assert asked == []
    assert waiting(service, queued) == queued
    assert {service.job(job_id).status for job_id in running} == {JobStatus.RUNNING}


@pytest.mark.parametrize(("num_known", "each"), [(0, False), (120, False), (130, True)])
def test_a_few_runs_among_many_old_ones_are_asked_for_one_by_one(service: Service, num_known: int, each: bool) -> None:
    """Ray's answer for all has every run that it ever had."""
    service.ray.cluster = ClusterResources(20, 0)
    running = [service.start(**wants(1)) for _ in range(12)]
    asked: list[str] = []
    real = service.ray.info
    service.ray.info = lambda submission_id: (asked.append(submission_id), real(submission_id))[1]  # type: ignore[method-assign, func-returns-value]
    service.dispatcher._reconciler.num_known = num_known
    service.tick(10)
    assert sorted(asked) == (sorted(f"{job_id}-a1" for job_id in running) if each else [])
