"""The workers' way in. Their tokens are their attempt's own."""

from fastapi import APIRouter, Depends

from service import reports
from service.auth import require_attempt_token
from service.routes.answers import PROBLEMS, problems
from service.routes.state import DatabaseDep, StorageDep, TelemetryDep
from workers.contract import Report, ReportAnswer

router = APIRouter(prefix="/jobs", tags=["workers"], responses=PROBLEMS, dependencies=[Depends(require_attempt_token)])


@router.post("/{job_id}/attempts/{attempt}/reports", responses=problems(409))
def add_report(
    job_id: str, attempt: int, report: Report, database: DatabaseDep, storage: StorageDep, telemetry: TelemetryDep
) -> ReportAnswer:
    """Points, events and progress of an attempt; a repeat changes nothing. 409 `stale-attempt`: the attempt is over, stop."""
    said = reports.record(database, job_id, attempt, report, bucket=storage.bucket)
    telemetry.ingested(report.points, report.events)
    return said
