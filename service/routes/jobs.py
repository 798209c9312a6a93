"""Jobs: submit, list, get, change, cancel, pause, resume, retry, delete."""

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Response

from mae_core.config import RunSpec
from service import changes, deletion, etags, jobs, listing
from service.auth import USERS, Caller
from service.changes import JobChange
from service.db import utc_now
from service.errors import Invalid
from service.projects import DEFAULT_PROJECT, ProjectName
from service.routes.answers import NOT_MODIFIED, PROBLEMS, IfNoneMatch, answer, problems, unchanged
from service.routes.state import DatabaseDep, SettingsDep, StorageDep
from service.views import DeletionView, JobPage, JobSummary, JobView
from workers.contract import JobStatus, Time

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=PROBLEMS)
MAX_LIMIT = 200
MAX_LABELS = 8  # in one filter
FIELDS = tuple(JobSummary.model_fields)
CallerDep = Annotated[Caller, Depends(USERS)]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=200)]
Label = Annotated[str, Query(min_length=1, max_length=264)]


@router.post(
    "",
    response_model=JobView,
    status_code=201,
    responses={200: {"model": JobView, "description": "A repeat: the same job"}, **problems(503)},
)
def submit_job(
    spec: RunSpec,
    caller: CallerDep,
    database: DatabaseDep,
    storage: StorageDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyKey = None,
    project: Annotated[ProjectName | None, Query(description="of an admin: where the job belongs; else the token's own")] = None,
) -> Response:
    """Submit a spec. A repeat with the same `Idempotency-Key` and body answers the same job."""
    place = caller.project_of(project) or DEFAULT_PROJECT
    submitted = jobs.submit(database, storage, settings, spec, idempotency_key=idempotency_key, project=place)
    return _submitted(submitted)


@router.get("", response_model=JobPage, responses=NOT_MODIFIED)
@router.head("", include_in_schema=False)
def list_jobs(
    database: DatabaseDep,
    caller: CallerDep,
    project: Annotated[ProjectName | None, Query(description="of an admin: of this project alone")] = None,
    status: Annotated[list[JobStatus] | None, Query(description="any of several", max_length=len(JobStatus))] = None,
    kind: Literal["pretrain", "probe", "finetune", "evaluate", "embed"] | None = None,
    label: Annotated[list[Label] | None, Query(description="`key:value`, or `key` alone; of several all", max_length=MAX_LABELS)] = None,
    text: Annotated[str | None, Query(description="beginnings of words of name or id, all of them", min_length=1, max_length=200)] = None,
    created_after: Time | None = None,
    created_before: Time | None = None,
    finished_after: Annotated[Time | None, Query(description="of those that have ended")] = None,
    finished_before: Time | None = None,
    fields: Annotated[str | None, Query(description="of each job only these, comma-separated", max_length=1000)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before", max_length=200)] = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Jobs of the token's project, of an admin of all, newest first.

    A page of several filters may have fewer jobs than `limit`, even none: there are more as long as it has a `next_cursor`.
    """
    wanted = _fields(fields)
    filters = listing.Filters(
        project=caller.project_of(project),
        statuses=status or (),
        kind=kind,
        labels=list(dict.fromkeys(label or ())),
        text=text,
        created_after=created_after,
        created_before=created_before,
        finished_after=finished_after,
        finished_before=finished_before,
    )
    with database.read() as session:
        page = listing.list_jobs(session, filters, columns=wanted, limit=limit, cursor=cursor)
    tag = etags.of_values([*map(tuple, page.rows), page.next_cursor, wanted])
    if etags.has(if_none_match, tag):
        return unchanged(tag)
    content = JobPage.json_of(page.rows, fields=wanted, next_cursor=page.next_cursor)
    return Response(content, headers={"ETag": tag}, media_type="application/json")


def _fields(given: str | None) -> Sequence[str]:
    wanted = set(FIELDS if given is None else (name.strip() for name in given.split(",")))
    if unknown := wanted.difference(FIELDS):
        raise Invalid("fields", f"a list has no field {sorted(unknown)[0][:100]!r}; there are {', '.join(FIELDS)}")
    return [name for name in FIELDS if name in wanted]


@router.get("/{job_id}", response_model=JobView, responses=NOT_MODIFIED)
@router.head("/{job_id}", include_in_schema=False)
def get_job(job_id: str, database: DatabaseDep, if_none_match: IfNoneMatch = None) -> Response:
    """One job, and its ETag. With `If-None-Match` 304 while nothing that it shows is different."""
    with database.read() as session:
        view, tag = jobs.get_if_changed(session, job_id, known=if_none_match)
    return unchanged(tag) if view is None else answer(view, headers={"ETag": tag})


@router.patch("/{job_id}", response_model=JobView, responses=problems(412, 428))
def change_job(
    job_id: str,
    change: JobChange,
    caller: CallerDep,
    database: DatabaseDep,
    if_match: Annotated[str | None, Header(max_length=4000, description="the job's ETag as it was read, or `*`; needed")] = None,
) -> Response:
    """Change name, labels, priority, notes, or which training states stay, also of a job that has ended.

    412: somebody else changed one of these meanwhile.
    """
    with database.write() as session:
        now = utc_now()
        row = changes.change(session, job_id, change, if_match=if_match, by=caller.name, now=now)
        return answer(JobView.of(row), headers={"ETag": etags.of_job(row, now=now)})


@router.delete(
    "/{job_id}",
    status_code=204,
    responses={200: {"model": DeletionView, "description": "With `dry_run`: nothing is deleted"}, **problems(409)},
)
def delete_job(
    job_id: str,
    database: DatabaseDep,
    storage: StorageDep,
    dry_run: Annotated[bool, Query(description="say only how much would be deleted")] = False,
) -> Response:
    """Delete a job that has ended, with all that it left. It is gone at once (404, also for a repeat); its objects follow. 409: it goes on,
    another job starts from its result, or something of it is pinned."""
    if dry_run:
        with database.read() as session:
            deletion.check(session, jobs.find(session, job_id))
        return answer(deletion.count(storage, job_id))
    with database.write() as session:
        deletion.request(session, job_id, now=utc_now())
    return Response(status_code=204)


@router.post(
    "/{job_id}/retry",
    response_model=JobView,
    status_code=201,
    responses={200: {"model": JobView, "description": "A repeat: the same job"}, **problems(409, 503)},
)
def retry_job(
    job_id: str, database: DatabaseDep, storage: StorageDep, settings: SettingsDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """Submit the spec of a job that has failed or was cancelled again, as a new job (`retry_of`), which starts anew."""
    return _submitted(jobs.retry(database, storage, settings, job_id, idempotency_key=idempotency_key))


def _submitted(submitted: jobs.Submitted) -> Response:
    return answer(submitted.job, status_code=201 if submitted.is_new else 200, headers={"Location": f"/v1/jobs/{submitted.job.id}"})


@router.post(
    "/{job_id}/cancel",
    response_model=JobView,
    status_code=202,
    responses={200: {"model": JobView, "description": "Already cancelled"}, **problems(409)},
)
def cancel_job(job_id: str, database: DatabaseDep) -> Response:
    """Ask for a job's end. 202: it will be cancelled; 200: it is cancelled already; 409: it has ended otherwise."""
    with database.write() as session:
        view, was_cancelled = jobs.request_cancel(session, job_id)
    return answer(view, status_code=200 if was_cancelled else 202)


@router.post(
    "/{job_id}/pause",
    response_model=JobView,
    status_code=202,
    responses={200: {"model": JobView, "description": "Already paused"}, **problems(409)},
)
def pause_job(job_id: str, database: DatabaseDep) -> Response:
    """Ask a job to save its training state and release its devices. 202: it will; 200: it is paused already; 409: it has ended."""
    with database.write() as session:
        view, was_paused = jobs.request_pause(session, job_id)
    return answer(view, status_code=200 if was_paused else 202)


@router.post(
    "/{job_id}/resume",
    response_model=JobView,
    status_code=202,
    responses={200: {"model": JobView, "description": "It was not paused"}, **problems(409)},
)
def resume_job(job_id: str, database: DatabaseDep) -> Response:
    """Queue a paused job again; it goes on at the exact step. 409: it is still being paused, or has ended."""
    with database.write() as session:
        view, was_running = jobs.request_resume(session, job_id)
    return answer(view, status_code=200 if was_running else 202)
