"""Metrics and events → the service: collected in memory, written to a spool folder, sent in order, never raising into the training.

While the service is away, reports wait in the spool; the next incarnation of the same attempt on this machine sends what is left. A spool
that has grown too large loses the oldest points, and no event. Who has nothing to tell says so now and then: the answer may be a cancel.
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from workers.contract import (
    MAX_EVENTS,
    MAX_POINTS,
    STALE_ATTEMPT_TYPE,
    DesiredState,
    Event,
    EventType,
    Origin,
    Points,
    Report,
    ReportAnswer,
    RunProgress,
    WorkOrder,
    submission_id,
)

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS = 0.5
_REFUSED_SECONDS = 600.0  # a run that has ended does not wait longer for a service that is there, but does not want it
_MAX_PAUSE_SECONDS = 5.0
_MAX_WAITING_POINTS = 1_000_000  # steps kept in memory while the service is away; the oldest go first
_MAX_SPOOLED_BYTES = 512 * 2**20  # an hour of a step each millisecond are 360 MB
_CHECK_EVERY = 100  # reports, for the spool's size
_SILENCE_SECONDS = 10.0  # after which an empty report says that this process lives


class Reporter:
    """Rank 0's (or the driver's) voice. `desired_state`, `may_grow` and `is_stale` are what the service last answered."""

    def __init__(self, order: WorkOrder, incarnation: int) -> None:
        self.desired_state = DesiredState.RUN
        self.may_grow = False
        self.is_stale = False
        self._incarnation = incarnation
        self._sequence = 0
        self._order = order
        self._lock = threading.Lock()  # of what was told and is not on disk: nobody holds it for long
        self._spooling = threading.Lock()  # of the spool and its numbers
        self._steps: list[tuple[int, dict[str, float]]] = []
        self._events: list[Event] = []
        self._progress: RunProgress | None = None
        self._closing = threading.Event()
        self._heard_at = time.monotonic()
        self._refused_since: float | None = None
        self._spool = spools() / submission_id(order.job, order.attempt)
        self._client = httpx.Client(
            base_url=order.service_url, headers={"Authorization": f"Bearer {order.token}"}, timeout=httpx.Timeout(10, connect=5)
        )
        self._path = f"/v1/jobs/{order.job}/attempts/{order.attempt}/reports"
        self._thread = threading.Thread(target=self._work, name="reporter", daemon=True)
        self._thread.start()

    def points(self, points: list[tuple[int, dict[str, float]]]) -> None:
        """Points of the metric series, as (step, {series: value})."""
        with self._lock:
            self._steps += points
            del self._steps[:-_MAX_WAITING_POINTS]

    def progress(self, progress: RunProgress) -> None:
        """How far the run is; only the newest is sent."""
        with self._lock:
            self._progress = progress

    def event(self, kind: EventType, **data: Any) -> None:
        """A fact, with its time. One that JSON cannot say is dropped, before others share a report with it."""
        event = Event(type=kind, at=datetime.now(UTC), data=data)
        try:
            event.model_dump_json().encode()
        except ValueError:
            logger.exception("an event %s cannot be written as JSON and is dropped", kind)
            return
        with self._lock:
            self._events.append(event)

    def spool(self) -> None:
        """Has the disk hold all that was told so far: before a training state says that its steps need not be taken again."""
        try:
            while self._spool_next():
                pass
        except OSError:
            logger.exception("reports could not be written; they wait in memory")

    def close(self, timeout: float) -> bool:
        """Sends what is left, for up to `timeout` seconds. False where something could not be sent (it stays in the spool)."""
        self._closing.set()
        self._thread.join(timeout)
        return not self._thread.is_alive() and self._refused_since is None

    def _work(self) -> None:
        try:
            self._take_over()
        except OSError:
            logger.exception("what earlier attempts have told could not be taken over")
        pause = _INTERVAL_SECONDS
        while True:
            closing = self._closing.wait(pause)
            try:
                sent = self._send_spooled()
                while sent and self._spool_next():
                    sent = self._send_spooled()
                if sent and time.monotonic() - self._heard_at > _SILENCE_SECONDS:
                    sent = self._post(Report(incarnation=self._incarnation, sequence=self._sequence).model_dump_json().encode())
                while not sent and self._spool_next():  # a kill then loses what came in the last pause, and no more
                    pass
            except Exception:  # a full disk, say: monitoring must not end training
                logger.exception("reports could not be written or sent; trying again")
                sent = False
            if closing and sent:
                self._client.close()
                with contextlib.suppress(OSError):  # another process of the attempt may write there
                    self._spool.rmdir()
                return
            pause = _INTERVAL_SECONDS if sent else min(pause * 2, _MAX_PAUSE_SECONDS)
            if closing and self._refused_since is not None and time.monotonic() - self._refused_since > _REFUSED_SECONDS:
                logger.error("the service refuses the reports, which stay in %s", self._spool)
                self._client.close()
                return
            if closing:
                time.sleep(pause)

    def _take_over(self) -> None:
        """Tells the points that earlier attempts could not send from this machine: of an old attempt the service hears nothing more."""
        for folder in spools().glob(f"{self._order.job}-a*"):
            number = folder.name.removeprefix(f"{self._order.job}-a")
            if not number.isdigit() or int(number) >= self._order.attempt:
                continue
            for path in sorted(folder.glob("*.json")):
                with contextlib.suppress(ValidationError):
                    report = Report.model_validate_json(path.read_bytes())
                    with self._spooling:
                        told_by = report.origin or Origin(attempt=int(number), incarnation=report.incarnation, sequence=report.sequence)
                        own = {
                            "incarnation": self._incarnation,
                            "sequence": self._sequence,
                            "events": [],
                            "progress": None,
                            "origin": told_by,
                        }
                        if report.points is not None:
                            self._write(report.model_copy(update=own).model_dump_json().encode())
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _write(self, report: bytes) -> None:
        self._spool.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._spool / f"{self._incarnation:016d}-{self._sequence:08d}.json"
        path.with_suffix(".new").write_bytes(report)
        path.with_suffix(".new").rename(path)
        self._sequence += 1

    def _spool_next(self) -> bool:
        """Writes the next report to the spool; False where there is nothing to say."""
        with self._spooling:
            return self._spool_one()

    def _spool_one(self) -> bool:
        with self._lock:
            if not (self._steps or self._events or self._progress):
                return False
            steps, events, progress = self._steps[:MAX_POINTS], self._events[:MAX_EVENTS], self._progress
        if (content := self._report(steps, events, progress)) is not None:
            self._write(content)
        with self._lock:  # only what is written, or never can be, is forgotten
            del self._steps[: len(steps)], self._events[: len(events)]
            self._progress = None if self._progress is progress else self._progress
        if self._sequence % _CHECK_EVERY == 0:
            shorten(self._spool, max_bytes=_MAX_SPOOLED_BYTES)
        return True

    def _report(self, steps: list[tuple[int, dict[str, float]]], events: list[Event], progress: RunProgress | None) -> bytes | None:
        """The next report as JSON. What JSON cannot say is dropped: trying it again for ever would be the end of all reports."""
        try:
            points = _columns(steps) if steps else None
            report = Report(incarnation=self._incarnation, sequence=self._sequence, points=points, events=events, progress=progress)
            return report.model_dump_json().encode()
        except ValueError:
            logger.exception("a report of %d step(s) and %d event(s) cannot be written as JSON and is dropped", len(steps), len(events))
            return None

    def _send_spooled(self) -> bool:
        """Sends the spool, oldest first. False where the service is away."""
        for path in sorted(self._spool.glob("*.json")):
            if not self.is_stale and not self._post(path.read_bytes()):
                return False
            path.unlink(missing_ok=True)
        return True

    def _post(self, report: bytes) -> bool:
        """Sends one report. False where the service is away: whether it has taken it is not known, and it is sent again."""
        try:
            answer = self._client.post(self._path, content=report, headers={"Content-Type": "application/json"})
        except httpx.HTTPError as error:
            logger.warning("the service does not answer (%s); reports wait in %s", error, self._spool)
            return False
        if answer.status_code == 409 and STALE_ATTEMPT_TYPE in answer.text:
            self.is_stale = True
        elif answer.status_code in (400, 413, 422):
            logger.error("the service refused a report, which is dropped: %s %s", answer.status_code, answer.text[:500])
        elif answer.is_success:
            told = ReportAnswer.model_validate_json(answer.content)
            self.desired_state, self.may_grow = told.desired_state, told.may_grow
        else:
            is_away = answer.status_code >= 500 or answer.status_code == 429
            self._refused_since = None if is_away else self._refused_since or time.monotonic()
            logger.warning("the service answered %s; reports wait in %s", answer.status_code, self._spool)
            return False
        self._refused_since = None
        self._heard_at = time.monotonic()
        return True


def spools() -> Path:
    """Where this user's attempts have their spools on this machine."""
    return Path(tempfile.gettempdir()) / f"maestro-spool-{os.getuid()}"


def shorten(spool: Path, *, max_bytes: int) -> None:
    """Takes the points out of the oldest reports of a spool that has grown too large; what has events keeps them."""
    sizes = {path: path.stat().st_size for path in sorted(spool.glob("*.json"))}
    too_much = sum(sizes.values()) - max_bytes
    for path, num_bytes in sizes.items():
        if too_much <= 0:
            return
        try:
            report = Report.model_validate_json(path.read_bytes())
        except ValidationError:  # torn by a crash of the machine
            path.unlink()
            continue
        if report.points is None:
            continue
        if report.events:
            path.with_suffix(".new").write_bytes(report.model_copy(update={"points": None}).model_dump_json().encode())
            path.with_suffix(".new").rename(path)
        else:
            path.unlink()
        too_much -= num_bytes


def _columns(steps: list[tuple[int, dict[str, float]]]) -> Points:
    names = sorted({name for _, values in steps for name in values})
    return Points(steps=[step for step, _ in steps], series={name: [values.get(name) for _, values in steps] for name in names})
