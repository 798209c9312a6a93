"""Carrying out what `policy` decided: network first, then one transaction under the lease."""

from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

from pydantic import ValidationError
from sqlalchemy import update
from sqlalchemy.orm import Session

from service import endings, launches, leases, lifecycle, logs, policy, submission
from service.db import Database
from service.errors import Invalid, RayUnreachable, StorageUnreachable
from service.leases import Claimed, LeaseLost
from service.lifecycle import Outcome, Overtaken
from service.models import AttemptRow, JobRow
from service.ray_jobs import RayJobs, RayRefused
from service.settings import Settings
from service.storage import Storage
from workers.contract import JobStatus, Reason

_SECONDS_PER_JOB = 0.02  # between two looks, for each of the jobs looked at together

Apply = Callable[[Session, datetime], None]


class Actions:
    """What can be done to a claimed job. Each ends the lease, or raises LeaseLost; that of a job left as it was ends with the round."""

    def __init__(self, database: Database, storage: Storage, ray: RayJobs, settings: Settings, *, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._storage = storage
        self._ray = ray
        self._settings = settings
        self._clock = clock
        self._unchanged: list[tuple[Claimed, float]] = []

    def carry_out(self, claimed: Claimed, decision: policy.Decision) -> None:
        match decision:
            case policy.Wait():
                self._wait(claimed, decision)
            case policy.TakeUp(result_uri):
                self._take_up(claimed, result_uri)
            case policy.Launch():
                self._launch(claimed)
            case policy.Submit():
                assert claimed.attempt is not None
                self._submit(claimed, claimed.attempt)
            case policy.BeginStop(status, reason):
                changes = {"desired_since": self._clock()} if reason is Reason.TIME_LIMIT_REACHED else {}
                self.apply(claimed, self._transition(claimed, status, reason=reason, detail=None, **changes), seconds=0.0)
            case policy.Kill():
                self._kill(claimed)
            case policy.Succeed(result):
                self._succeed(claimed, result)
            case policy.Recover(reason, detail, seconds, failures):
                apply = self._transition(claimed, JobStatus.RECOVERING, reason=reason, detail=detail, **asdict(failures))
                self._finish(claimed, apply, reason=reason, detail=detail, seconds=seconds)
            case policy.End(status, reason, detail, cause):
                apply = self._transition(claimed, status, reason=reason, detail=detail)
                self._finish(claimed, apply, reason=cause or reason, detail=detail, seconds=None)
            case policy.Inspect():
                raise AssertionError("an inspection is part of deciding")

    def apply(self, claimed: Claimed, apply: Apply, *, seconds: float | None) -> None:
        """One transaction under the lease, which ends with it; the next look comes in `seconds` (None: never)."""
        with self._database.write() as session:
            leases.hold(session, claimed)
            now = self._clock()
            apply(session, now)
            session.flush()
            leases.release(session, claimed, due_at=None if seconds is None else now + timedelta(seconds=seconds), now=now)

    def renew(self, claimed: Claimed) -> None:
        """Before something that may take long, when a good part of the lease has gone."""
        if monotonic() - claimed.since > self._settings.lease_seconds / 3:
            with self._database.write() as session:
                leases.renew(session, claimed, seconds=self._settings.lease_seconds)

    def _wait(self, claimed: Claimed, wait: policy.Wait) -> None:
        job = claimed.job
        in_line = job.status in (JobStatus.QUEUED, JobStatus.RECOVERING) and wait.reason is not Reason.WAITING_FOR_JOB
        if (job.reason, job.detail) == (wait.reason, wait.detail) and in_line == (job.waiting_since is not None) and wait.seconds:
            self._unchanged.append((claimed, wait.seconds))
            return

        def apply(session: Session, now: datetime) -> None:
            lifecycle.set_reason(session, job.id, reason=wait.reason, detail=wait.detail, now=now, lease=claimed.token)
            place = update(JobRow).where(JobRow.id == job.id)
            if in_line:  # unless it was launched meanwhile
                session.execute(place.where(leases.IN_LINE).values(waiting_since=job.waiting_since or now))
            else:
                session.execute(place.values(waiting_since=None))

        self.apply(claimed, apply, seconds=wait.seconds)

    def begin_round(self) -> None:
        """What a round that failed has left is not this one's."""
        self._unchanged = []

    def release_unchanged(self) -> None:
        """End the leases of a round's jobs at which there was nothing to do. Of many, each is looked at less often."""
        unchanged, self._unchanged = self._unchanged, []
        by_seconds = dict[float, list[Claimed]]()
        for claimed, seconds in unchanged:
            by_seconds.setdefault(max(seconds, len(unchanged) * _SECONDS_PER_JOB), []).append(claimed)
        if not unchanged:
            return
        with self._database.write() as session:
            now = self._clock()
            for seconds, ones in by_seconds.items():
                leases.release_unchanged(session, ones, due_at=now + timedelta(seconds=seconds), now=now)

    def _take_up(self, claimed: Claimed, result_uri: str) -> None:
        """The result of the job that it waited for, into its spec; the next look, at once, launches it."""
        try:
            spec = submission.freeze_parent(self._storage, claimed.job.spec, result_uri)
        except StorageUnreachable as error:
            self._wait(claimed, policy.Wait(Reason.STORAGE_UNREACHABLE, error.detail, policy.UNREACHABLE_SECONDS))
            return
        except (Invalid, ValidationError) as error:
            detail = error.detail if isinstance(error, Invalid) else str(error)[:500]
            self.carry_out(claimed, policy.End(JobStatus.FAILED, Reason.ENCODER_ERROR, detail))
            return

        def apply(session: Session, now: datetime) -> None:
            session.execute(update(JobRow).where(JobRow.id == claimed.job.id).values(spec=spec, waits_for=None, version=JobRow.version + 1))
            lifecycle.set_reason(session, claimed.job.id, reason=None, detail=None, now=now, lease=claimed.token)

        self.apply(claimed, apply, seconds=0.0)

    def _launch(self, claimed: Claimed) -> None:
        with self._database.write() as session:
            leases.hold(session, claimed)
            attempt = launches.create_attempt(session, claimed, now=self._clock())
        self._submit(claimed, attempt)

    def _submit(self, claimed: Claimed, attempt: AttemptRow) -> None:
        try:
            launches.ensure_submitted(self._ray, claimed.job, attempt, self._settings)
        except RayUnreachable as error:
            self._wait(claimed, policy.Wait(Reason.RAY_UNREACHABLE, error.detail, policy.UNREACHABLE_SECONDS))
            return
        except RayRefused as error:
            detail = f"Ray refuses the job: {error}"
            end = policy.End(JobStatus.FAILED, Reason.INTERNAL_ERROR, detail)
            self.carry_out(Claimed(claimed.job, attempt, claimed.token, claimed.since), end)
            return

        def apply(session: Session, now: datetime) -> None:
            session.get_one(AttemptRow, (attempt.job_id, attempt.number)).submitted_at = now
            lifecycle.set_reason(session, claimed.job.id, reason=None, detail=None, now=now, lease=claimed.token)

        self.apply(claimed, apply, seconds=policy.ACTIVE_SECONDS)

    def _kill(self, claimed: Claimed) -> None:
        attempt = claimed.attempt
        assert attempt is not None
        try:
            self._ray.stop(attempt.submission_id)
        except RayUnreachable as error:
            self._wait(claimed, policy.Wait(Reason.RAY_UNREACHABLE, error.detail, policy.UNREACHABLE_SECONDS))
            return

        def apply(session: Session, now: datetime) -> None:
            session.get_one(AttemptRow, (attempt.job_id, attempt.number)).stop_requested_at = now

        self.apply(claimed, apply, seconds=policy.ACTIVE_SECONDS)

    def _succeed(self, claimed: Claimed, result: policy.CommittedResult) -> None:
        def apply(session: Session, now: datetime) -> None:
            endings.succeed(session, claimed, result, bucket=self._storage.bucket, now=now)

        self._finish(claimed, apply, reason=None, detail=None, seconds=None)

    def _transition(self, claimed: Claimed, to: JobStatus, *, reason: Reason, detail: str | None, **changes: Any) -> Apply:
        def apply(session: Session, now: datetime) -> None:
            lease = claimed.token
            outcome = lifecycle.transition(session, claimed.job.id, to=to, now=now, reason=reason, detail=detail, lease=lease, **changes)
            if outcome is Outcome.LOST_LEASE:
                raise LeaseLost(claimed.job.id)
            if outcome is not Outcome.DONE:
                raise Overtaken(f"job {claimed.job.id} cannot become {to} any more")

        return apply

    def _finish(self, claimed: Claimed, apply: Apply, *, reason: Reason | None, detail: str | None, seconds: float | None) -> None:
        """Close the attempt, if one is open, and `apply` in the same transaction."""
        attempt = claimed.attempt
        log = None
        if attempt is not None and attempt.ended_at is None:
            self.renew(claimed)
            log = logs.complete(self._ray, self._storage, attempt)

        def apply_both(session: Session, now: datetime) -> None:
            if attempt is not None:
                endings.end_attempt(session, attempt, now=now, reason=reason, message=detail, log=log, bucket=self._storage.bucket)
            apply(session, now)

        self.apply(claimed, apply_both, seconds=seconds)
