"""`python -m workers.main`: the driver of one attempt. Order in, `TorchTrainer.fit()`, exit code out.

Ray restarts the workers inside an attempt, up to `retry.max_failures` times; what a restart cannot mend ends the attempt at once.
"""

import json
import logging
import os
import sys
import tempfile
import time
from datetime import UTC, datetime

import psutil
from pydantic import ValidationError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from workers.contract import CONTRACT_VERSION, ORDER_VARIABLE, EventType, Reason, WorkOrder, submission_id
from workers.failures import RunFailedError, classify, may_restart
from workers.provenance import versions
from workers.reporter import Reporter
from workers.train_loop import configure_logging, train_worker

logger = logging.getLogger("maestro.driver")
_STARTED_AT = datetime.fromtimestamp(psutil.Process().create_time(), UTC)
_FINAL_REPORT_SECONDS = 600.0


class StopOnPermanentFailure(UserCallback):
    """Ends the attempt where restarting the workers would meet the same error. Runs in Ray's controller."""

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        failure = classify(worker_exceptions)
        if not may_restart(failure):
            raise failure


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
    except TrainingFailedError as error:
        return _fail(order, _cause(error))
    logger.info("attempt %s is over", submission_id(order.job, order.attempt))
    return 0


def fit(order: WorkOrder) -> None:
    """Trains to the end, or raises TrainingFailedError."""
    resources = order.spec.resources
    needs = {"CPU": float(resources.cpus_per_worker)} | ({"GPU": 1.0} if resources.gpus_per_worker else {})
    # Ray's own storage is scratch: results and training states go to S3 by our own commit.
    with tempfile.TemporaryDirectory(prefix="maestro-ray-", ignore_cleanup_errors=True) as scratch:
        TorchTrainer(
            train_worker,
            train_loop_config={"order": order.model_dump(mode="json"), "driver_started_at": _STARTED_AT.isoformat()},
            torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers, use_gpu=bool(resources.gpus_per_worker), resources_per_worker=needs
            ),
            run_config=RunConfig(
                name=submission_id(order.job, order.attempt),
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=order.spec.retry.max_failures),
                callbacks=[StopOnPermanentFailure()],  # type: ignore[list-item]  # typed as Ray Train V1's
            ),
        ).fit()


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


def _cause(error: TrainingFailedError) -> RunFailedError:
    inner: BaseException = error
    while isinstance(inner, ControllerError):
        inner = inner.controller_failure
    if isinstance(inner, RunFailedError):
        return inner
    if isinstance(inner, WorkerGroupError) and inner.worker_failures:
        return classify(inner.worker_failures)
    return classify({-1: inner})


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
