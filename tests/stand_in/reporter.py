"""A simulated run's voice: as `workers.reporter`, in order and with repeats, but a thousand of them in one thread."""

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any

import httpx

from workers.contract import (
    MAX_POINTS,
    STALE_ATTEMPT_TYPE,
    DesiredState,
    Event,
    EventType,
    Points,
    Report,
    ReportAnswer,
    RunProgress,
    WorkOrder,
)

log = logging.getLogger(__name__)


class SimulatedReporter:
    """`desired_state` and `is_stale` are what the service last answered."""

    def __init__(self, http: httpx.AsyncClient, order: WorkOrder, *, incarnation: int, interval_seconds: float) -> None:
        self.desired_state = DesiredState.RUN
        self.is_stale = False
        self.incarnation = incarnation
        self._http = http
        self._url = f"{order.service_url}/v1/jobs/{order.job}/attempts/{order.attempt}/reports"
        self._headers = {"Authorization": f"Bearer {order.token}", "Content-Type": "application/json"}
        self._interval_seconds = interval_seconds
        self._points: list[tuple[int, float]] = []
        self._events: list[Event] = []
        self._progress: RunProgress | None = None
        self._sequence = 0
        self._spool: list[str] = []
        self._woken = asyncio.Event()
        self._sending = asyncio.Lock()
        self._task = asyncio.create_task(self._work())

    def event(self, type: EventType, **data: Any) -> None:
        self._events.append(Event(type=type, at=datetime.now(UTC), data=data))
        self._woken.set()

    def step(self, step: int, num_steps: int, loss: float) -> None:
        self._points.append((step, loss))
        self._progress = RunProgress(step=step, num_steps=num_steps, epoch=step / num_steps, loss=loss)
        self._woken.set()

    async def close(self) -> None:
        """Sends what is left, however long the service is away."""
        self.abandon()
        pause = self._interval_seconds
        while not await self._send():
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    def abandon(self) -> None:
        """As the death of the process: what was not sent is lost."""
        self._task.cancel()

    async def _work(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            if not await self._send():
                self._woken.set()
            await asyncio.sleep(self._interval_seconds)

    async def _send(self) -> bool:
        """False where the service is away."""
        async with self._sending:
            self._spool_next()
            while self._spool and not self.is_stale:
                try:
                    answer = await self._http.post(self._url, content=self._spool[0], headers=self._headers)
                except httpx.HTTPError:
                    return False
                if not self._took(answer):
                    return False
                del self._spool[0]
            return True

    def _took(self, answer: httpx.Response) -> bool:
        if answer.is_success:
            self.desired_state = ReportAnswer.model_validate_json(answer.content).desired_state
        elif answer.status_code == 409 and STALE_ATTEMPT_TYPE in answer.text:
            self.is_stale = True
        elif answer.status_code in (400, 409, 413, 422):
            log.error("the service refused a report, which is dropped: %s %s", answer.status_code, answer.text[:500])
        else:
            return False
        return True

    def _spool_next(self) -> None:
        if not (self._points or self._events or self._progress):
            return
        points, events, progress = self._points[:MAX_POINTS], self._events, self._progress
        self._points, self._events, self._progress = self._points[MAX_POINTS:], [], None
        columns = Points(steps=[step for step, _ in points], series={"loss": [loss for _, loss in points]}) if points else None
        report = Report(incarnation=self.incarnation, sequence=self._sequence, points=columns, events=events, progress=progress)
        self._sequence += 1
        self._spool.append(report.model_dump_json())
