"""`python -m workers.main`: the driver of one attempt. Order in, workers started and watched, exit code out.

Loads neither torch nor the training: whoever submits waits for every import.
"""

import itertools
import json
import logging
import os
import sys

import ray
from pydantic import ValidationError

from mae_core.provenance import versions
from workers.attempt import STARTED_AT, Attempt
from workers.contract import CONTRACT_VERSION, ORDER_VARIABLE, EventType, Reason, WorkOrder, submission_id
from workers.failures import RunFailedError
from workers.log_uploads import LogUploads
from workers.logs import configure_logging
from workers.reporter import Reporter
from workers.stored import DRIVER

logger = logging.getLogger("maestro.driver")
_FIRST_INCARNATION = int(STARTED_AT.timestamp() * 1000)
_times_told = itertools.count()
_FINAL_REPORT_SECONDS = 600.0
_LAST_LOG_SECONDS = 5.0


def main() -> int:
    configure_logging()
    text = os.environ.get(ORDER_VARIABLE, "")
    try:
        order = WorkOrder.model_validate_json(text)
    except ValidationError as error:
        return _refuse(text, error)
    if order.contract != CONTRACT_VERSION:
        return _fail(order, _mismatch(order.contract))
    uploads = LogUploads.start(order, DRIVER, num_workers=order.spec.worker_counts()[-1])
    try:
        return _run(order)
    finally:
        uploads.close(_LAST_LOG_SECONDS)


def _run(order: WorkOrder) -> int:
    try:
        ray.init(logging_level=logging.WARNING)
        Attempt(order, lambda kind, **data: _tell(order, kind, patience_seconds=0.0, **data)).train()
    except RunFailedError as failure:
        return _fail(order, failure)
    logger.info("attempt %s is over", submission_id(order.job, order.attempt))
    return 0


def _refuse(text: str, error: ValidationError) -> int:
    """An order of another version may have other fields; those that a report needs are in all of them."""
    try:
        order = WorkOrder.model_construct(**json.loads(text))
    except (ValueError, TypeError):
        logger.error("%s holds no order", ORDER_VARIABLE)
        return 2
    problem = error.errors()[0]
    logger.error("the order cannot be read: %s: %s", problem["loc"], problem["msg"])
    return _fail(order, _mismatch(order.contract))


def _mismatch(version: object) -> RunFailedError:
    message = f"the order has contract version {version}, this worker {CONTRACT_VERSION} of MAEstro {versions()['maestro-mae']}"
    return RunFailedError(Reason.CONTRACT_MISMATCH, message, -1)


def _fail(order: WorkOrder, failure: RunFailedError) -> int:
    logger.error("attempt %s failed: %s: %s", submission_id(order.job, order.attempt), failure.reason, failure.message)
    if failure.reason is Reason.STALE_ATTEMPT:
        return 1
    told = {"reason": failure.reason, "message": failure.message, "rank": failure.rank}
    _tell(order, EventType.RUN_FAILED, patience_seconds=_FINAL_REPORT_SECONDS, **told)
    return 1


def _tell(order: WorkOrder, kind: EventType, *, patience_seconds: float, **data: object) -> None:
    """Tells the service an event; what could not be sent within `patience_seconds` is sent beside what follows.

    Each time by a reporter of its own: rank 0's may send from the same folder, which should not happen all the time.
    """
    reporter = Reporter(order, incarnation=_FIRST_INCARNATION + next(_times_told))  # older than those of all workers, whose points count
    reporter.event(kind, **data)
    reporter.close(patience_seconds)


if __name__ == "__main__":
    sys.exit(main())
