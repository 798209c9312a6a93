"""`python -m workers.main`: the driver of one attempt. Order in, workers started and watched, exit code out.

Dead workers are started again inside the attempt, up to `retry.max_failures` times; what that cannot mend ends the attempt at once.
Loads neither torch nor the training: whoever submits waits for every import.
"""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime

import psutil
import ray
from pydantic import ValidationError

from mae_core.provenance import versions
from workers.contract import CONTRACT_VERSION, ORDER_VARIABLE, EventType, Reason, WorkOrder, submission_id
from workers.failures import RunFailedError, may_restart
from workers.group import WorkerGroup
from workers.logs import configure_logging
from workers.reporter import Reporter

logger = logging.getLogger("maestro.driver")
_STARTED_AT = datetime.fromtimestamp(psutil.Process().create_time(), UTC)
_FINAL_REPORT_SECONDS = 600.0


def main() -> int:
    configure_logging()
    text = os.environ.get(ORDER_VARIABLE, "")
    try:
        order = WorkOrder.model_validate_json(text)
    except ValidationError as error:
        return _refuse(text, error)
    if order.contract != CONTRACT_VERSION:
        return _fail(order, _mismatch(order.contract))
    try:
        fit(order)
    except RunFailedError as failure:
        return _fail(order, failure)
    logger.info("attempt %s is over", submission_id(order.job, order.attempt))
    return 0


def fit(order: WorkOrder) -> None:
    """Trains to the end, or raises RunFailedError."""
    ray.init(logging_level=logging.WARNING)
    num_restarts = 0
    while True:
        workers = WorkerGroup(order.spec.resources)
        try:
            return workers.train(order, {"driver_started_at": _STARTED_AT.isoformat()})
        except RunFailedError as failure:
            if not may_restart(failure) or num_restarts == order.spec.retry.max_failures:
                raise
            num_restarts += 1
            logger.warning("worker %d failed: %s; all workers start again", failure.rank, failure.message)
        finally:
            workers.stop()


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
    reporter = Reporter(order, incarnation=time.time_ns() // 1_000_000)
    reporter.event(EventType.RUN_FAILED, reason=failure.reason, message=failure.message, rank=failure.rank)
    reporter.close(_FINAL_REPORT_SECONDS)
    return 1


if __name__ == "__main__":
    sys.exit(main())
