"""Who starts when there is not room for all."""

from datetime import UTC, datetime, timedelta

import pytest

from service.admission import Admission, Budget, InLine, Needs, admit
from service.models import JobRow
from service.ray_jobs import ClusterResources

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PATIENCE_SECONDS = 600.0


def in_line(job_id: str, num_cpus: int, num_gpus: int = 0, *, waited: float = 0.0) -> InLine:
    return InLine(job_id, Needs(num_cpus, num_gpus), Needs(num_cpus, num_gpus), NOW - timedelta(seconds=waited))


def room(num_cpus: float, num_gpus: float = 0.0, *, of: tuple[float, float] = (8, 8)) -> Budget:
    used = Needs(of[0] - num_cpus, of[1] - num_gpus)
    return Budget(ClusterResources(*of, used.num_cpus, used.num_gpus), reserved=used, released=Needs())


def run(budget: Budget, *line: InLine) -> Admission:
    return admit(line, budget, now=NOW, patience_seconds=PATIENCE_SECONDS)


def job(job_id: str, num_cpus: int, num_gpus: int = 0) -> JobRow:
    return JobRow(id=job_id, num_cpus=num_cpus, num_gpus=num_gpus)


@pytest.mark.parametrize(
    ("cluster", "reserved", "released", "free"),
    [
        (ClusterResources(8, 0), Needs(), Needs(), 8),
        (ClusterResources(8, 0, used_cpus=2), Needs(), Needs(), 6),
        (ClusterResources(8, 0), Needs(6), Needs(), 2),  # Ray has not seen our last launch yet
        (ClusterResources(8, 0, used_cpus=6), Needs(6), Needs(), 2),  # what Ray sees is what we reserved: not twice
        (ClusterResources(8, 0, used_cpus=8), Needs(), Needs(8), 8),  # Ray has not seen our last end yet
        (ClusterResources(8, 0, used_cpus=8), Needs(4), Needs(4), 4),
        (ClusterResources(2, 0), Needs(9), Needs(), 0),
    ],
)
def test_what_is_free(cluster: ClusterResources, reserved: Needs, released: Needs, free: float) -> None:
    assert Budget(cluster, reserved=reserved, released=released).free.num_cpus == free


def test_the_first_in_line_come_first_until_the_room_is_spent() -> None:
    assert run(room(8, 2), in_line("a", 3, 1), in_line("b", 5, 1), in_line("c", 1)).admitted == {"a", "b"}


def test_a_small_one_passes_a_large_one_that_has_no_room_yet() -> None:
    assert run(room(4), in_line("large", 8, waited=599), in_line("small", 1)).admitted == {"small"}


def test_a_large_one_that_has_waited_long_is_not_starved() -> None:
    """Small ones that come and go for ever: the large one starts when those of today have ended."""
    free, running = 2, 6
    for _ in range(6):  # one that runs ends, two small ones come
        free, running = free + 1, running - 1
        found = run(room(free), in_line("large", 8, waited=600), in_line("small", 1), in_line("other", 1))
        assert found.admitted == ({"large"} if free == 8 else set())
        assert found.keeps == (() if free == 8 else ("large",))


def test_those_that_fit_beside_a_large_one_are_not_blocked_by_it() -> None:
    """It waits for GPUs: CPUs beyond its own are for others. One that can never start blocks nobody."""
    found = run(room(8, 0), in_line("large", 4, 8, waited=900), in_line("small", 4), in_line("late", 1))
    assert found.admitted == {"small"}
    assert run(room(8, 8), in_line("never", 9, waited=9000), in_line("small", 8)).admitted == {"small"}


def test_what_others_use_is_not_waited_for_at_the_cost_of_all() -> None:
    """Two of the eight CPUs are a stranger's, who may keep them for ever."""
    budget = Budget(ClusterResources(8, 0, used_cpus=4), reserved=Needs(2), released=Needs())
    assert run(budget, in_line("never", 7, waited=900), in_line("small", 1)).admitted == {"small"}
    assert run(budget, in_line("large", 6, waited=900), in_line("small", 1)).keeps == ("large",)


def test_two_large_ones_keep_room_in_their_order() -> None:
    found = run(room(6), in_line("first", 8, waited=900), in_line("second", 5, waited=700), in_line("small", 1))
    assert (found.admitted, found.keeps) == (frozenset(), ("first",))
    assert run(room(8), in_line("first", 8, waited=900), in_line("second", 5, waited=700)).admitted == {"first"}


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (job("x", 4), "needs 4 CPUs, 2.0 of 8.0 free"),
        (job("x", 1, 5), "needs 5 GPUs, 4.0 of 8.0 free"),
        (job("x", 9), "needs 9 CPUs, more than the whole cluster has (8.0); it starts when the cluster has grown"),
        (job("x", 2, 1), "needs 2 CPUs and 1 GPUs; what is free goes to jobs before it"),
    ],
)
def test_what_a_waiting_job_is_told(one: JobRow, says: str) -> None:
    assert run(room(2, 4), in_line("other", 2)).why_not(one) == says


def test_what_is_told_of_kept_devices() -> None:
    found = run(room(4), in_line("large", 8, waited=600), in_line("small", 1))
    assert found.why_not(job("large", 8)) == "needs 8 CPUs, 4.0 of 8.0 free; what becomes free is kept for it"
    assert found.why_not(job("small", 1)) == "needs 1 CPUs; what is free goes to a job that has waited long"
