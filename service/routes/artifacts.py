"""What a job's run leaves in object storage: artifacts, training states, reconstructions; and what of it is pinned."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import RedirectResponse

from service import artifacts, checkpoints, jobs
from service.db import utc_now
from service.routes.answers import PROBLEMS, answer, problems
from service.routes.state import DatabaseDep, StorageDep
from service.views import ArtifactLink, ArtifactList, ArtifactView, CheckpointPage, ReconstructionsPage
from workers.contract import MAX_INTEGER

router = APIRouter(prefix="/jobs/{job_id}", tags=["artifacts"], responses=PROBLEMS)
Limit = Annotated[int, Query(ge=1, le=1000)]
Number = Annotated[int | None, Query(ge=1, le=1000)]


@router.get("/artifacts", response_model=ArtifactList)
def list_artifacts(job_id: str, database: DatabaseDep) -> Response:
    """What the job has left in object storage: its result, pictures, the training states that are kept, and logs."""
    with database.read() as session:
        jobs.find(session, job_id)
        return answer(ArtifactList(artifacts=artifacts.list_all(session, job_id)))


@router.get(
    "/artifacts/{name:path}",
    status_code=307,
    response_class=RedirectResponse,
    responses={200: {"model": ArtifactLink, "description": "With `redirect=false`"}},
)
def get_artifact(
    job_id: str,
    name: str,
    database: DatabaseDep,
    storage: StorageDep,
    redirect: Annotated[bool, Query(description="false: tell the address, for who cannot send a token along, as pictures in pages")] = True,
) -> Response:
    """The object itself, by a presigned address, which is good for an hour."""
    with database.read() as session:
        jobs.find(session, job_id)
        key = artifacts.object_key(session, job_id, name)
    url = storage.presign(key)
    return RedirectResponse(url, status_code=307) if redirect else answer(ArtifactLink(url=url), headers={"Cache-Control": "no-store"})


@router.put("/artifacts/{name:path}/pin", response_model=ArtifactView, responses=problems(409))
def pin_artifact(job_id: str, name: str, database: DatabaseDep) -> Response:
    """Keep it, whatever the policy for training states is, and the job as long as it is pinned. 409: a log."""
    with database.write() as session:
        return answer(artifacts.pin(session, jobs.find(session, job_id, lock=True), name, now=utc_now()))


@router.delete("/artifacts/{name:path}/pin", response_model=ArtifactView)
def unpin_artifact(job_id: str, name: str, database: DatabaseDep) -> Response:
    """Have it be as all others: a training state that the policy does not keep is deleted soon."""
    with database.write() as session:
        return answer(artifacts.unpin(session, jobs.find(session, job_id, lock=True), name, now=utc_now()))


@router.get("/checkpoints", response_model=CheckpointPage)
def list_checkpoints(
    job_id: str,
    database: DatabaseDep,
    last: Number = None,
    every_steps: Annotated[int | None, Query(ge=1, le=MAX_INTEGER)] = None,
    best_metric: Annotated[str | None, Query(min_length=1, max_length=100)] = None,
    best_mode: Literal["max", "min"] | None = None,
    best_number: Number = None,
    limit: Limit = 200,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before", max_length=200)] = None,
) -> Response:
    """Training states, the newest first, and what keeps each. With any of the policy's parameters: what that policy would keep and delete;
    nothing is changed. `PATCH` of the job's `keep` changes it."""
    asked = {"last": last, "every_steps": every_steps, "best_metric": best_metric, "best_mode": best_mode, "best_number": best_number}
    with database.read() as session:
        job = jobs.find(session, job_id)
        keep = checkpoints.other_policy(job, asked)
        return answer(checkpoints.page(session, job, keep, limit=limit, cursor=cursor))


@router.get("/reconstructions", response_model=ReconstructionsPage)
def list_reconstructions(
    job_id: str, database: DatabaseDep, after: Annotated[int, Query(ge=-1, le=MAX_INTEGER)] = -1, limit: Limit = 200
) -> Response:
    """The steps after one of which there are reconstructions, the lowest first."""
    with database.read() as session:
        jobs.find(session, job_id)
        found = artifacts.list_reconstructions(session, job_id, after=after, limit=limit)
    return answer(ReconstructionsPage(reconstructions=found, next_after=found[-1].step if len(found) == limit else None))
