"""The series of a run: what reports brought, read back as one curve for each name."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.jsonable import jsonable
from service.models import MetricBatchRow
from service.views import Series
from workers.contract import Points

DEFAULT_MAX_POINTS = 1000
MAX_MAX_POINTS = 20_000
_PER_BUCKET = 4  # minimum, maximum, last, and one that is not finite


def append(session: Session, job_id: str, *, attempt: int, incarnation: int, sequence: int, points: Points | None) -> bool:
    """Keep a report's points. False where this report was here before: nothing is changed then."""
    key = (job_id, attempt, incarnation, sequence)
    if session.get(MetricBatchRow, key) is not None:
        return False
    steps = points.steps if points is not None else []
    session.add(
        MetricBatchRow(
            job_id=job_id,
            attempt=attempt,
            incarnation=incarnation,
            sequence=sequence,
            points=jsonable(points.model_dump()) if points is not None and steps else None,
            first_step=min(steps, default=None),
            last_step=max(steps, default=None),
        )
    )
    return True


def read(session: Session, job_id: str, *, names: Sequence[str] | None = None, max_points: int = DEFAULT_MAX_POINTS) -> dict[str, Series]:
    """Each series in the order of its steps, at most `max_points` of them."""
    batches = session.scalars(
        select(MetricBatchRow.points)
        .where(MetricBatchRow.job_id == job_id, MetricBatchRow.points.is_not(None))
        .order_by(MetricBatchRow.attempt, MetricBatchRow.incarnation, MetricBatchRow.sequence)
    )
    return {name: downsample(by_step, max_points=max_points) for name, by_step in sorted(merge(batches, names=names).items())}


def merge(batches: Iterable[dict[str, Any] | None], *, names: Sequence[str] | None = None) -> dict[str, dict[int, float]]:
    """Value by step for each name. Batches come oldest first and later ones win, so steps that were rolled back do not double."""
    series: dict[str, dict[int, float]] = {}
    for batch in batches:
        if batch is None:
            continue
        for name, values in batch["series"].items():
            if names is not None and name not in names:
                continue
            by_step = series.setdefault(name, {})
            for step, value in zip(batch["steps"], values, strict=True):
                if value is not None:
                    by_step[step] = float(value)
    return series


def downsample(by_step: dict[int, float], *, max_points: int) -> Series:
    """At most `max_points`: of each bucket of neighbours the lowest, the highest and the last, so that no spike and no NaN is lost."""
    steps = sorted(by_step)
    if len(steps) > max_points:
        num_buckets = max(max_points // _PER_BUCKET, 1)
        bounds = [index * len(steps) // num_buckets for index in range(num_buckets + 1)]
        steps = [step for low, high in pairwise(bounds) for step in _keep(steps[low:high], by_step)]
    return Series(steps=steps, values=[by_step[step] for step in steps])


def _keep(steps: list[int], by_step: dict[int, float]) -> list[int]:
    finite = [step for step in steps if math.isfinite(by_step[step])]
    kept = {steps[-1], *[step for step in steps if not math.isfinite(by_step[step])][:1]}
    if finite:
        kept |= {min(finite, key=by_step.__getitem__), max(finite, key=by_step.__getitem__)}
    return sorted(kept)
