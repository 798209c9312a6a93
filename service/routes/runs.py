"""What a job's run tells and leaves: events, metrics, logs, artifacts."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from fastapi.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from service import artifacts, events, jobs, metrics
from service.auth import USERS, Credentials
from service.columns import MIN_MAX_POINTS
from service.errors import NotFound
from service.models import AttemptRow
from service.routes.answers import PROBLEMS, answer
from service.routes.state import DatabaseDep, RayDep, StorageDep
from service.storage import ObjectNotFound
from service.views import ArtifactList, EventPage, MetricsView
from workers.contract import MAX_INTEGER

router = APIRouter(prefix="/jobs/{job_id}", tags=["runs"], responses=PROBLEMS)


@router.get("/events", response_model=EventPage, responses={200: {"content": {"text/event-stream": {}}}})
async def list_events(
    job_id: str,
    request: Request,
    credentials: Credentials,
    database: DatabaseDep,
    after: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_INTEGER)] = None,
) -> Response:
    """Events after an id; with `Accept: text/event-stream` as they happen, until the job has ended."""
    if "text/event-stream" in request.headers.get("accept", ""):
        after = after if last_event_id is None else last_event_id
        await run_in_threadpool(events.look, database, job_id, after=after)  # a 404 before the stream begins
        authorize = partial(USERS, request, credentials)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return EventSourceResponse(events.stream(database, job_id, after=after, authorize=authorize), headers=headers)
    return await run_in_threadpool(_event_page, database, job_id, after, limit)


def _event_page(database: DatabaseDep, job_id: str, after: int, limit: int) -> Response:
    with database.read() as session:
        jobs.find(session, job_id)
        found = events.list_after(session, job_id, after=after, limit=limit)
    return answer(EventPage(events=found, next_after=found[-1].id if found else after))


@router.get("/metrics", response_model=MetricsView, responses={304: {"description": "The series are those of `If-None-Match`"}})
def read_metrics(
    job_id: str,
    database: DatabaseDep,
    names: Annotated[str | None, Query(description="comma-separated; all where it is left out")] = None,
    from_step: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = 0,
    to_step: Annotated[int, Query(ge=0, le=MAX_INTEGER)] = MAX_INTEGER,
    max_points: Annotated[int, Query(ge=MIN_MAX_POINTS, le=metrics.MAX_MAX_POINTS)] = metrics.DEFAULT_MAX_POINTS,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The series of the run, each at most `max_points` long, with no spike and no NaN lost. NaN and infinity are strings."""
    wanted = None if names is None else {name.strip() for name in names.split(",")}
    with database.read() as session:
        jobs.find(session, job_id)
        headers = {"ETag": f'W/"{metrics.version(session, job_id)}"'}
        if headers["ETag"] in [tag.strip() for tag in (if_none_match or "").split(",")]:
            return Response(status_code=304, headers=headers)
        series = metrics.read(session, job_id, names=wanted, from_step=from_step, to_step=to_step, max_points=max_points)
    return answer(MetricsView(series=series), headers=headers)


@router.get("/logs", response_class=PlainTextResponse)
def read_logs(
    job_id: str, database: DatabaseDep, storage: StorageDep, ray: RayDep, attempt: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None
) -> str:
    """The driver's and workers' text of an attempt (the newest): from Ray while it runs, from object storage afterwards."""
    with database.read() as session:
        job = jobs.find(session, job_id)
        number = attempt or job.attempt
        row = session.get(AttemptRow, (job_id, number)) if number else None
    if row is None and attempt is not None:
        raise NotFound(f"Job {job_id} has no attempt {attempt}.")
    if row is None:
        return ""
    if row.log_key is not None:
        try:
            return storage.read_text(row.log_key)
        except ObjectNotFound:
            return ""
    return ray.logs(row.submission_id) or ""


@router.get("/artifacts", response_model=ArtifactList)
def list_artifacts(job_id: str, database: DatabaseDep) -> Response:
    with database.read() as session:
        jobs.find(session, job_id)
        return answer(ArtifactList(artifacts=artifacts.list_all(session, job_id)))


@router.get("/artifacts/{name:path}", status_code=307, response_class=RedirectResponse)
def get_artifact(job_id: str, name: str, database: DatabaseDep, storage: StorageDep) -> RedirectResponse:
    """The object itself, by a presigned address."""
    with database.read() as session:
        jobs.find(session, job_id)
        key = artifacts.object_key(session, job_id, name)
    return RedirectResponse(storage.presign(key), status_code=307)
