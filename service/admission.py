"""Who of those that wait may start now: pure decisions over what is free and the line of waiting jobs."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from service.models import JobRow
from service.ray_jobs import ClusterResources


@dataclass(frozen=True)
class Needs:
    """Devices of a run."""

    num_cpus: float = 0.0
    num_gpus: float = 0.0

    @classmethod
    def of(cls, job: JobRow) -> "Needs":
        return cls(job.num_cpus, job.num_gpus)

    @classmethod
    def at_most(cls, job: JobRow) -> "Needs":
        """What an elastic run takes where it finds it; until its workers have said how many they are, all of this counts as its own."""
        return cls(job.max_cpus, job.max_gpus)

    @classmethod
    def of_workers(cls, job: JobRow, num_workers: int) -> "Needs":
        resources = job.spec["resources"]
        return cls(num_workers * resources["cpus_per_worker"], num_workers * resources["gpus_per_worker"])

    def less(self, other: "Needs") -> "Needs":
        """What is left of these; never less than nothing."""
        return Needs(max(self.num_cpus - other.num_cpus, 0.0), max(self.num_gpus - other.num_gpus, 0.0))

    def fits(self, room: "Needs") -> bool:
        return self.num_cpus <= room.num_cpus and self.num_gpus <= room.num_gpus


@dataclass(frozen=True)
class InLine:
    """A job that waits for its turn."""

    job_id: str
    needs: Needs
    at_most: Needs
    waiting_since: datetime | None


class Budget:
    """What is free in the cluster, less what was launched since.

    Ray's figures are up to 5 s old. So our own unended attempts (`reserved`) count as using all they asked for, whatever Ray says,
    and what those of ours used that ended since Ray's figures were taken (`released`) counts as free.
    """

    def __init__(self, cluster: ClusterResources, *, reserved: Needs, released: Needs) -> None:
        self.total = Needs(cluster.num_cpus, cluster.num_gpus)
        used = Needs(cluster.used_cpus, cluster.used_gpus).less(released)
        self.ours = self.total.less(used.less(reserved))  # but for what others use, who may keep it for ever
        self.free = self.total.less(Needs(max(used.num_cpus, reserved.num_cpus), max(used.num_gpus, reserved.num_gpus)))


@dataclass(frozen=True)
class Admission:
    """Who may start; and for whom devices are kept as they become free."""

    budget: Budget
    admitted: frozenset[str] = frozenset()
    keeps: tuple[str, ...] = ()

    def why_not(self, job: JobRow) -> str:
        """What a job that was not admitted needs, and what is free."""
        needs, free, total = Needs.of(job), self.budget.free, self.budget.total
        for kind, need, has, of in (
            ("CPUs", needs.num_cpus, free.num_cpus, total.num_cpus),
            ("GPUs", needs.num_gpus, free.num_gpus, total.num_gpus),
        ):
            if need > of:
                return f"needs {need:g} {kind}, more than the whole cluster has ({of:.1f}); it starts when the cluster has grown"
            if need > has:
                own = "; what becomes free is kept for it" if job.id in self.keeps else ""
                return f"needs {need:g} {kind}, {has:.1f} of {of:.1f} free{own}"
        before = "a job that has waited long" if self.keeps else "jobs before it"  # unnamed: it may be of another project
        return f"needs {_said(needs)}; what is free goes to {before}"


def admit(line: Iterable[InLine], budget: Budget, *, now: datetime, patience_seconds: float) -> Admission:
    """Goes down the line, in its order (priority, then age), and lets start who fits into what those before leave.

    So a small job passes a large one that has no room yet, at first. Once the large one has waited for `patience_seconds`, what is free is
    kept for it, and only those pass that fit beside it: it starts when enough of the runs have ended. One that needs more than the cluster
    has without what others use keeps nothing.
    """
    left = budget.free
    admitted: set[str] = set()
    keeps: list[str] = []
    patience = timedelta(seconds=patience_seconds)
    for one in line:
        if left.num_cpus < 1:  # every run needs a CPU
            break
        if one.needs.fits(left):
            left = left.less(one.at_most)
            admitted.add(one.job_id)
        elif one.needs.fits(budget.ours) and one.waiting_since is not None and now - one.waiting_since >= patience:
            left = left.less(one.needs)
            keeps.append(one.job_id)
    return Admission(budget, frozenset(admitted), tuple(keeps))


def _said(needs: Needs) -> str:
    return f"{needs.num_cpus:g} CPUs" + (f" and {needs.num_gpus:g} GPUs" if needs.num_gpus else "")
