"""What a job's run tells: events, metrics, logs."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from service import etags, events, jobs, lineage, logs, metrics, streams
from service.auth import USERS, Credentials
from service.columns import MIN_MAX_POINTS
from service.errors import NotFound
from service.lineage import Lineage
from service.models import AttemptRow
from service.routes.answers import NOT_MODIFIED, PROBLEMS, STREAM_HEADERS, IfNoneMatch, answer, unchanged
from service.routes.state import DatabaseDep, FeedDep, RayDep, StorageDep
from service.views import EventPage, LogList, LogView, MetricsView
from workers.contract import MAX_INTEGER
from workers.stored import DRIVER

_LOG_HEADERS: dict[str, Any] = {
    "Maestro-Log-Attempt": {"description": "the attempt; 0: there is none yet", "schema": {"type": "integer"}},
    "Maestro-Log-Offset": {"description": "where the answer begins", "schema": {"type": "integer"}},
    "Maestro-Log-Next-Offset": {"description": "where the next begins", "schema": {"type": "integer"}},
    "Maestro-Log-End": {"description": "whether this is the end of the log", "schema": {"type": "boolean"}},
}
router = APIRouter(prefix="/jobs/{job_id}", tags=["runs"], responses=PROBLEMS)


@router.get("/events", response_model=EventPage, responses={200: {"content": {"text/event-stream": {}}}})
async def list_events(
    job_id: str,
    request: Request,
    credentials: Credentials,
    database: DatabaseDep,
    feed: FeedDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_INTEGER)] = None,
) -> Response:
    """Events after an id; with `Accept: text/event-stream` as they happen, until the job has ended."""
    if "text/event-stream" in request.headers.get("accept", ""):
        after = after if last_event_id is None else last_event_id
        await run_in_threadpool(events.look, database, job_id, after=after, limit=1)  # a 404 before the stream begins
        stream = streams.of_job(feed, job_id, after=after, authorize=partial(USERS, request, credentials))
        return EventSourceResponse(stream, headers=STREAM_HEADERS)
    return await run_in_threadpool(_event_page, database, job_id, after, limit)


def _event_page(database: DatabaseDep, job_id: str, after: int, limit: int) -> Response:
    with database.read() as session:
        jobs.find(session, job_id)
        found = events.list_after(session, job_id, after=after, limit=limit)
    return answer(EventPage(events=found, next_after=found[-1].id if found else after))


@router.get("/metrics", response_model=MetricsView, responses=NOT_MODIFIED)
def read_metrics(
    job_id: str,
    database: DatabaseDep,
    names: Annotated[str | None, Query(description="comma-separated; all where it is left out")] = None,
    from_step: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0,
    to_step: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = MAX_INTEGER,
    max_points: Annotated[int, Query(ge=MIN_MAX_POINTS, le=metrics.MAX_MAX_POINTS)] = metrics.DEFAULT_MAX_POINTS,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The series of the run, each at most `max_points` long, with no spike and no NaN lost. NaN and infinity are strings."""
    wanted = None if names is None else {name.strip() for name in names.split(",")}
    with database.read() as session:
        jobs.find(session, job_id)
        tag = f'"{metrics.version(session, job_id)}"'
        if etags.has(if_none_match, tag):
            return unchanged(tag)
        series = metrics.read(session, job_id, names=wanted, from_step=from_step, to_step=to_step, max_points=max_points)
    return answer(MetricsView(series=series), headers={"ETag": tag})


@router.get("/logs", response_class=PlainTextResponse, responses={200: {"headers": _LOG_HEADERS}})
def read_logs(
    job_id: str,
    database: DatabaseDep,
    storage: StorageDep,
    ray: RayDep,
    attempt: Annotated[int | None, Query(ge=1, le=MAX_INTEGER, description="the newest where it is left out")] = None,
    worker: Annotated[
        str, Query(pattern=r"^(driver|0|[1-9][0-9]{0,5})$", description="driver (who repeats what the workers print), or a rank")
    ] = DRIVER,
    offset: Annotated[
        int, Query(ge=0, le=MAX_INTEGER, description="the byte to begin at: Maestro-Log-Next-Offset of the answer before")
    ] = 0,
    tail: Annotated[int | None, Query(ge=1, le=logs.MAX_TAIL_LINES, description="so many last lines, whatever the offset")] = None,
) -> Response:
    """What a process of an attempt has printed, up to 1 MiB in one answer; it is seconds old. Nothing follows once
    `Maestro-Log-End` is true: an answer that breaks off is no end."""
    row = _attempt(database, job_id, attempt)
    if row is None:
        part, number = logs.LogPart(b"", 0, 0, is_end=False), 0
    else:
        part, number = logs.read(storage, ray, row, worker, offset=offset, tail=tail), row.number
    told = (number, part.offset, part.next_offset, str(part.is_end).lower())
    headers = {name: str(value) for name, value in zip(_LOG_HEADERS, told, strict=True)}
    return Response(part.text, media_type="text/plain; charset=utf-8", headers=headers)


@router.get("/logs/workers", response_model=LogList)
def list_logs(
    job_id: str, database: DatabaseDep, storage: StorageDep, attempt: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None
) -> Response:
    """Whose logs there are of an attempt (the newest), and how many bytes are kept of each."""
    row = _attempt(database, job_id, attempt)
    kept = logs.list_workers(storage, row) if row is not None else {}
    return answer(
        LogList(attempt=row.number if row is not None else None, workers=[LogView(worker=name, bytes=size) for name, size in kept.items()])
    )


def _attempt(database: DatabaseDep, job_id: str, number: int | None) -> AttemptRow | None:
    """An attempt, or the newest, if there is any yet."""
    with database.read() as session:
        job = jobs.find(session, job_id)
        row = session.get(AttemptRow, (job_id, number or job.attempt))
    if row is None and number is not None:
        raise NotFound(f"Job {job_id} has no attempt {number}.")
    return row


@router.get("/lineage", response_model=Lineage)
def read_lineage(job_id: str, database: DatabaseDep) -> Response:
    """The jobs from whose results this one starts, eldest first, and those that start from its, as far as there are not too many."""
    with database.read() as session:
        return answer(lineage.of(session, jobs.find(session, job_id)))
