"""Jobs: submit, list, get, cancel, pause, resume."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Response

from mae_core.config import RunSpec
from service import jobs
from service.auth import USERS, Caller
from service.projects import DEFAULT_PROJECT, ProjectName
from service.routes.answers import PROBLEMS, answer
from service.routes.state import DatabaseDep, SettingsDep, StorageDep
from service.views import JobPage, JobView
from workers.contract import JobStatus

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=PROBLEMS)
MAX_LIMIT = 200
CallerDep = Annotated[Caller, Depends(USERS)]


@router.post("", response_model=JobView, status_code=201, responses={200: {"model": JobView, "description": "A repeat: the same job"}})
def submit_job(
    spec: RunSpec,
    caller: CallerDep,
    database: DatabaseDep,
    storage: StorageDep,
    settings: SettingsDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    project: Annotated[ProjectName | None, Query(description="of an admin: where the job belongs; else the token's own")] = None,
) -> Response:
    """Submit a spec. A repeat with the same `Idempotency-Key` and body answers the same job."""
    place = caller.project_of(project) or DEFAULT_PROJECT
    submitted = jobs.submit(database, storage, settings, spec, idempotency_key=idempotency_key, project=place)
    return answer(submitted.job, status_code=201 if submitted.is_new else 200, headers={"Location": f"/v1/jobs/{submitted.job.id}"})


@router.get("", response_model=JobPage)
def list_jobs(
    database: DatabaseDep,
    caller: CallerDep,
    project: Annotated[ProjectName | None, Query(description="of an admin: of this project alone")] = None,
    status: JobStatus | None = None,
    kind: Literal["pretrain", "probe", "finetune", "evaluate", "embed"] | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 50,
    cursor: str | None = None,
) -> Response:
    """Jobs of the token's project, of an admin of all, newest first."""
    project = caller.project_of(project)
    with database.read() as session:
        return answer(jobs.list_page(session, project=project, status=status, kind=kind, limit=limit, cursor=cursor))


@router.get("/{job_id}", response_model=JobView)
def get_job(job_id: str, database: DatabaseDep) -> Response:
    with database.read() as session:
        return answer(jobs.get(session, job_id))


@router.post(
    "/{job_id}/cancel", response_model=JobView, status_code=202, responses={200: {"model": JobView, "description": "Already cancelled"}}
)
def cancel_job(job_id: str, database: DatabaseDep) -> Response:
    """Ask for a job's end. 202: it will be cancelled; 200: it is cancelled already; 409: it has ended otherwise."""
    with database.write() as session:
        view, was_cancelled = jobs.request_cancel(session, job_id)
    return answer(view, status_code=200 if was_cancelled else 202)


@router.post(
    "/{job_id}/pause", response_model=JobView, status_code=202, responses={200: {"model": JobView, "description": "Already paused"}}
)
def pause_job(job_id: str, database: DatabaseDep) -> Response:
    """Ask a job to save its training state and release its devices. 202: it will; 200: it is paused already; 409: it has ended."""
    with database.write() as session:
        view, was_paused = jobs.request_pause(session, job_id)
    return answer(view, status_code=200 if was_paused else 202)


@router.post(
    "/{job_id}/resume", response_model=JobView, status_code=202, responses={200: {"model": JobView, "description": "It was not paused"}}
)
def resume_job(job_id: str, database: DatabaseDep) -> Response:
    """Queue a paused job again; it goes on at the exact step. 409: it is still being paused, or has ended."""
    with database.write() as session:
        view, was_running = jobs.request_resume(session, job_id)
    return answer(view, status_code=200 if was_running else 202)
