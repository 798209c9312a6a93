"""What the cluster has, and who holds it: Ray's own figures beside our attempts that are under way."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.models import AttemptRow, JobRow
from service.ray_jobs import RayNode
from service.views import View

MAX_RUNS = 1000  # told one by one


class Devices(View):
    """CPUs and GPUs."""

    num_cpus: float
    num_gpus: float


class RunView(Devices):
    """An attempt that is under way, and what it holds, or is to get where its workers have not come up yet."""

    job: str
    name: str
    attempt: int
    since: datetime


class ClusterView(View):
    """`used` is Ray's figure, seconds old, of all who use the cluster. `runs` are the project's; `other_runs` hold the rest of ours."""

    total: Devices
    used: Devices
    nodes: Sequence[RayNode]
    runs: list[RunView]
    other_runs: Devices
    num_waiting: int


def runs_of(session: Session, project: str | None) -> tuple[list[RunView], Devices]:
    """The runs of a project (None: of all), those that began first, first; and what all others hold together."""
    query = (
        select(AttemptRow, JobRow.name)
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .where(AttemptRow.ended_at.is_(None), *([] if project is None else [JobRow.project == project]))
        .order_by(AttemptRow.created_at, AttemptRow.job_id)
        .limit(MAX_RUNS)
    )
    runs = [
        RunView(job=row.job_id, name=name, attempt=row.number, since=row.created_at, num_cpus=row.num_cpus, num_gpus=row.num_gpus)
        for row, name in session.execute(query)
    ]
    sums = select(func.sum(AttemptRow.num_cpus), func.sum(AttemptRow.num_gpus)).where(AttemptRow.ended_at.is_(None))
    cpus, gpus = (float(value or 0) for value in session.execute(sums).one())
    others = Devices(num_cpus=cpus - sum(run.num_cpus for run in runs), num_gpus=gpus - sum(run.num_gpus for run in runs))
    return runs, others


def num_waiting(session: Session, project: str | None) -> int:
    """Jobs that wait in line for devices."""
    query = select(func.count()).select_from(JobRow).where(JobRow.waiting_since.is_not(None))
    return session.scalar(query if project is None else query.where(JobRow.project == project)) or 0
