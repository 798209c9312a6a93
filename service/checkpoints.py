"""A job's training states, what keeps each, and what another policy would keep. `pruning` deletes the others."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from mae_core.config import RUN_SPEC
from mae_core.options import KeepConfig
from service import metrics
from service.artifacts import TRAINING_STATE
from service.errors import Conflict, Invalid
from service.models import ArtifactRow, JobRow
from service.retention import State, Why, decide
from service.views import CheckpointPage, CheckpointView
from workers.state_names import age, is_of_state

_BEST = "best_"  # begins the parameters that are of a BestConfig


def policy_of(job: JobRow) -> KeepConfig:
    """Which of its states stay."""
    return KeepConfig.model_validate(job.keep or {})


def check(job: JobRow, keep: KeepConfig, *, field: str) -> None:
    """Invalid where the job's states cannot be kept so; `field`: where the policy stands in the request. Conflict for a spec of old."""
    try:
        spec = RUN_SPEC.validate_python(job.spec)
    except ValidationError:
        raise Conflict(f"The spec of job {job.id} is not one of this version any more; its states stay as they are kept now.") from None
    if not spec.ranked_by():
        raise Invalid(field, f"a job of kind {job.kind} such as this saves no training states")
    try:
        spec.check_keep(keep)
    except ValueError as error:
        raise Invalid(f"{field}.best.metric", str(error).partition(": ")[2]) from None


def rows_of(session: Session, job_id: str) -> Sequence[ArtifactRow]:
    """The states that there are and that are not about to be deleted."""
    table = ArtifactRow
    return session.scalars(select(table).where(table.job_id == job_id, table.kind == TRAINING_STATE, table.deleted_at.is_(None))).all()


def states_of(session: Session, rows: Sequence[ArtifactRow], keep: KeepConfig) -> list[State]:
    """As a policy sees them; the series that it goes by is read once."""
    known = [row for row in rows if is_of_state(row.name)]
    ages = [age(row.name) for row in known]
    values: list[float | None] = [None] * len(known)
    if keep.best is not None and known:
        values = metrics.values_at(session, known[0].job_id, keep.best.metric, [step for *_, step in ages])
    return [
        State(row.name, (attempt, incarnation), step, row.pinned_at is not None, value)
        for row, (attempt, incarnation, step), value in zip(known, ages, values, strict=True)
    ]


def page(session: Session, job: JobRow, keep: KeepConfig, *, limit: int, cursor: str | None) -> CheckpointPage:
    """The newest first: what this policy keeps of the job's states, and what it would delete."""
    rows = {row.name: row for row in rows_of(session, job.id)}
    states = sorted(states_of(session, list(rows.values()), keep), key=lambda state: state.age, reverse=True)
    why = decide(states, keep)
    going = [rows[state.name] for state in states if not why[state.name]]
    if cursor is not None:
        if not is_of_state(cursor):
            raise Invalid("cursor", "it is none of ours; take next_cursor from an answer, or leave it out")
        attempt, incarnation, step = age(cursor)
        states = [state for state in states if state.age < ((attempt, incarnation), step)]
    shown = states[:limit]
    return CheckpointPage(
        keep=keep,
        num_deleted=len(going),
        bytes_deleted=sum(row.bytes for row in going),
        checkpoints=[_view(rows[state.name], state, why[state.name]) for state in shown],
        next_cursor=shown[-1].name if len(states) > limit else None,
    )


def _view(row: ArtifactRow, state: State, why: list[Why]) -> CheckpointView:
    return CheckpointView(
        name=row.name,
        step=state.step,
        attempt=state.start[0],
        bytes=row.bytes,
        created_at=row.created_at,
        uri=row.uri,
        pinned=state.is_pinned,
        value=state.value,
        kept_because=why,
    )


def other_policy(job: JobRow, given: Mapping[str, Any]) -> KeepConfig:
    """Of a query's parameters (None: left out) a policy to be tried, or the job's own where there are none. Raises Invalid."""
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return policy_of(job)
    best = {name.removeprefix(_BEST): asked.pop(name) for name in list(asked) if name.startswith(_BEST)}
    try:
        keep = KeepConfig.model_validate(asked | ({"best": best} if best else {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise Invalid("_".join(map(str, first["loc"])), first["msg"]) from None
    check(job, keep, field="keep")
    return keep


def tombstone(session: Session, job: JobRow, *, now: datetime) -> int:
    """Mark as deleted what the policy does not keep, of a job whose row is locked; how many."""
    rows, keep = rows_of(session, job.id), policy_of(job)
    why = decide(states_of(session, rows, keep), keep)
    going = [row for row in rows if why.get(row.name) == []]
    for row in going:
        row.deleted_at = now
    return len(going)
