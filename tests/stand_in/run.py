"""One simulated attempt: it trains nothing, but reports, saves, stops, resumes and commits as the workers do, in real HTTP and real S3."""

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpx

from mae_core.options import NormalizeConfig
from tests.stand_in.reporter import SimulatedReporter
from tests.stand_in.script import Script, Way, loss_at
from workers.contract import DesiredState, EventType, Reason, StorageRef, WorkOrder
from workers.objects import ObjectStore
from workers.state_names import state_name, state_prefix
from workers.stored import EncoderManifest, TrainingStateManifest, result_prefix

log = logging.getLogger(__name__)
_last_incarnation = 0


class Ended(NamedTuple):
    """How the driver ended."""

    exit_code: int
    message: str


class Killed(Exception):
    """kill -9 of the driver."""


class WorkerDied(Exception):
    """kill -9 of a worker."""


class Failed(Exception):
    """The workers give a reason for their failure."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class SimulatedRun:
    """`took_first_step(incarnation)` is called at the first step of each start of the workers."""

    def __init__(
        self, order: WorkOrder, http: httpx.AsyncClient, pool: Executor, *, report_seconds: float, took_first_step: Callable[[int], None]
    ) -> None:
        self._order = order
        self._script = Script.of(order.spec)
        self._http = http
        self._pool = pool
        self._report_seconds = report_seconds
        self._took_first_step = took_first_step
        self._reporter: SimulatedReporter | None = None

    async def drive(self) -> Ended:
        """The driver: workers that died are started again. Raises Killed, and CancelledError when Ray stops it."""
        try:
            for num_restarts in range(self._order.spec.retry.max_failures + 1):
                try:
                    return await self._train(num_restarts)
                except WorkerDied:
                    self._abandon()
            return await self._fail(Reason.WORKER_DIED)
        except Failed as failure:
            return await self._fail(failure.reason)
        finally:
            self._abandon()

    async def _train(self, num_restarts: int) -> Ended:
        """One start of the workers."""
        order, script = self._order, self._script
        await asyncio.sleep(script.start_seconds)
        prefix = result_prefix(order.prefix, order.spec.kind)
        if await self._stored(lambda store: store.is_committed(prefix)):
            return Ended(0, "the result was there already")
        self._reporter = reporter = self._new_reporter()
        newest = next(iter(await self._stored(lambda store: store.training_states(order.prefix))), None)
        saved = int(newest.partition("step=")[2].partition("-")[0]) if newest else 0
        reporter.event(
            EventType.WORKERS_STARTED, incarnation=reporter.incarnation, num_workers=order.spec.worker_counts()[0], resumed_from=newest
        )
        for step in range(saved + 1, script.num_steps + 1):
            await asyncio.sleep(script.step_seconds)
            reporter.step(step, script.num_steps, loss_at(order.spec.seed, step))
            if step == saved + 1:
                self._took_first_step(reporter.incarnation)
                reporter.event(EventType.FIRST_STEP_TAKEN, step=step)
            self._die(script.death(order.attempt, step), num_restarts)
            if reporter.is_stale:
                return Ended(1, "a newer attempt has taken over")
            pauses = reporter.desired_state is DesiredState.PAUSE
            if pauses or step % order.spec.checkpoint.every_steps == 0:  # type: ignore[union-attr]
                await self._save(step)
            if reporter.desired_state is not DesiredState.RUN:
                reporter.event(EventType.RUN_STOPPED, step=step, desired_state=reporter.desired_state)
                await reporter.close()
                return Ended(0, "stopped")
        return await self._finish(prefix)

    def _die(self, way: Way | None, num_restarts: int) -> None:
        match way:
            case Way.DRIVER:
                raise Killed
            case Way.WORKER if num_restarts == 0:
                raise WorkerDied
            case Way.DATA_ERROR | Way.OUT_OF_MEMORY:
                raise Failed(Reason(way))

    async def _save(self, step: int) -> None:
        assert self._reporter is not None
        order, incarnation = self._order, self._reporter.incarnation
        prefix = state_prefix(order.prefix, state_name(step=step, attempt=order.attempt, incarnation=incarnation))
        manifest = TrainingStateManifest(
            job=order.job, attempt=order.attempt, incarnation=incarnation, step=step, files={}, created_at=datetime.now(UTC)
        )
        await self._stored(lambda store: store.commit(prefix, manifest))
        self._reporter.event(EventType.TRAINING_STATE_COMMITTED, step=step, key=prefix, bytes=0)

    async def _finish(self, prefix: str) -> Ended:
        assert self._reporter is not None
        order, script, reporter = self._order, self._script, self._reporter
        last = script.death(order.attempt, script.num_steps + 1)
        reporter.event(EventType.TRAINING_ENDED, step=script.num_steps)
        if last is Way.SILENT:
            return Ended(0, "it says that it is well")
        metrics: dict[str, Any] = {"loss": loss_at(order.spec.seed, script.num_steps)}
        manifest = EncoderManifest(
            job=order.job,
            attempt=order.attempt,
            kind=order.spec.kind,
            created_at=datetime.now(UTC),
            model=order.spec.model,  # type: ignore[arg-type]
            normalize=NormalizeConfig(mean=[0.5], std=[0.5]),
            spec=order.spec,
            metrics=metrics,
            versions={},
            git_revision=None,
            files={},
        )
        await self._stored(lambda store: store.commit(prefix, manifest))
        if last is Way.COMMITTED:
            raise Killed
        reporter.event(EventType.RESULT_COMMITTED, uri=f"s3://{order.storage.bucket}/{prefix}", metrics=metrics, left_out={})
        await reporter.close()
        return Ended(0, "")

    async def _fail(self, reason: Reason) -> Ended:
        """The driver's last words."""
        self._abandon()
        self._reporter = reporter = self._new_reporter()
        reporter.event(EventType.RUN_FAILED, reason=reason, message="as its script says", rank=0)
        await reporter.close()
        return Ended(1, str(reason))

    def _new_reporter(self) -> SimulatedReporter:
        global _last_incarnation
        _last_incarnation = max(_last_incarnation + 1, time.time_ns() // 1_000_000)
        return SimulatedReporter(self._http, self._order, incarnation=_last_incarnation, interval_seconds=self._report_seconds)

    def _abandon(self) -> None:
        if self._reporter is not None:
            self._reporter.abandon()

    async def _stored(self, call: Callable[[ObjectStore], Any]) -> Any:
        """A call to object storage, beside the others."""
        store = _store(self._order.storage.model_dump_json())
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, store)


@functools.cache
def _store(storage: str) -> ObjectStore:
    return ObjectStore(StorageRef.model_validate_json(storage))
