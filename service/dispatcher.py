"""`python -m service.dispatcher`: claims due jobs, looks, decides and acts outside any transaction, and applies under the lease."""

import logging
import signal
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import select

from service import endings, leases, policy
from service.actions import Actions
from service.counters import Count, Tally
from service.db import Database, utc_now
from service.errors import RayUnreachable, StorageUnreachable
from service.housekeeping import Housekeeper
from service.leases import Claimed, LeaseLost
from service.lifecycle import Overtaken
from service.models import AttemptRow, JobRow
from service.processlog import about, configure_logging
from service.ray_jobs import HttpRayJobs, RayJobs
from service.reconciler import Reconciler
from service.sender import Sender
from service.settings import Settings, load_settings
from service.startup import open_database, require_rights
from service.storage import S3Storage, Storage
from service.thinning import Thinning
from service.world import World
from workers.contract import STORAGE_PATIENCE_SECONDS, Condition, DesiredState, JobStatus, Reason

log = logging.getLogger(__name__)

ERROR_SECONDS = 10.0
_MANY = 10  # runs, from which on one answer for all is cheaper than one for each: or a tenth of all that Ray knows, old ones too
STORE_SECONDS = 10.0  # between two looks at what was counted
LINE_SECONDS = 1.0  # between two looks at those who wait for devices


class Dispatcher:
    """Drives every job from queued to its end. Any number may run: what two of them do is the same, or is refused to one."""

    def __init__(
        self, database: Database, storage: Storage, ray: RayJobs, settings: Settings, *, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._database = database
        self._storage = storage
        self._ray = ray
        self._settings = settings
        self._clock = clock
        self._actions = Actions(database, storage, ray, settings, clock=clock)
        self.tally = Tally()
        self._reconciler = Reconciler(database, ray, settings, tally=self.tally, clock=clock)
        self._thinning = Thinning(database, settings, clock=clock)
        self._owner = leases.owner_name(self)
        self._line_at = self._store_at = clock()
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End after the job at hand."""
        self._stopping.set()

    def run(self) -> None:
        """Until `stop()`. The database's absence is waited out: trainings go on without us."""
        pause, has_begun = self._settings.poll_seconds, False
        while not self._stopping.is_set():
            try:
                if not has_begun:
                    self._release_dead()
                    has_begun = True
                self.tick()
                self._reconciler.sweep_when_due()
                self._thinning.sweep_when_due()
                self._store_counts_when_due()
                pause = self._settings.poll_seconds
            except Exception:
                pause = min(pause * 2, ERROR_SECONDS)
                log.exception("a round failed; the next one comes in %.1f s", pause)
            self._stopping.wait(pause)
        with self._database.write() as session:
            leases.release_all(session, self._owner)
        self.tally.store(self._database)

    def _store_counts_when_due(self) -> None:
        now = self._clock()
        if now >= self._store_at:
            self._store_at = now + timedelta(seconds=STORE_SECONDS)
            self.tally.store(self._database)

    def _release_dead(self) -> None:
        with self._database.write() as session:
            leases.release_dead(session)

    def tick(self) -> int:
        """One round over all due jobs; answers how many there were."""
        now = self._clock()
        with self._database.read() as session:
            work = leases.find_work(session, now)
        looks_at_line = work.is_new_in_line or (work.waits_in_line and now >= self._line_at)
        if not work.is_due and not looks_at_line:
            return 0
        self._actions.begin_round()
        world = World(self._database, self._storage, self._ray, self._settings, now=now)
        admitted: frozenset[str] = frozenset()
        if looks_at_line:
            self._line_at = now + timedelta(seconds=LINE_SECONDS)
            admission = world.admission()
            admitted = frozenset() if isinstance(admission, policy.Wait) else admission.admitted
        with self._database.write() as session:
            claimed = leases.claim(session, owner=self._owner, now=now, seconds=self._settings.lease_seconds, also=admitted)
        if sum(one.attempt is not None and one.attempt.ended_at is None for one in claimed) >= max(_MANY, self._reconciler.num_known // 10):
            world.look_at_all()
        self.tally.add(Count.CLAIMS, len(claimed))
        for one in claimed:
            if self._stopping.is_set():
                break  # `run` releases the other leases
            with about(job=one.job.id, attempt=one.job.attempt or None):
                self._drive(one, world)
        self._actions.release_unchanged()
        return len(claimed)

    def _drive(self, claimed: Claimed, world: World) -> None:
        job_id = claimed.job.id
        try:
            try:
                self._actions.renew(claimed)
                self._actions.carry_out(claimed, self._decide(claimed, world))
            except LeaseLost:
                raise
            except Overtaken as error:
                log.info("%s; looking again", error)
                self._actions.apply(claimed, lambda session, now: None, seconds=0.0)
            except Exception:  # one job's trouble must not stop the others
                log.exception("job %s: this look failed; the next one comes in %.0f s", job_id, ERROR_SECONDS)
                self._actions.apply(claimed, lambda session, now: None, seconds=ERROR_SECONDS)
        except LeaseLost as error:
            self.tally.add(Count.LEASES_LOST)
            log.warning("job %s: the lease was lost, what was done is discarded: %s", job_id, error)

    def _decide(self, claimed: Claimed, world: World) -> policy.Decision:
        job, attempt = claimed.job, claimed.attempt
        wish = policy.heed_wish(job, attempt)
        if wish is not None:
            return wish
        if job.status in (JobStatus.QUEUED, JobStatus.RECOVERING):
            parent = world.parent(job)
            return policy.before_launch(job, world.admission()) if parent is None else policy.await_parent(parent)
        assert attempt is not None, f"job {job.id} is {job.status} without an attempt"
        if job.status == JobStatus.STARTING and attempt.submitted_at is None:
            return policy.Submit()
        try:
            ray_job = world.info(attempt.submission_id)
        except RayUnreachable as error:
            return policy.Wait(Reason.RAY_UNREACHABLE, error.detail, policy.UNREACHABLE_SECONDS)
        saves = job.desired_state != DesiredState.CANCEL
        grace_seconds = self._settings.pause_grace_seconds if saves else self._settings.stop_grace_seconds
        if saves and Condition.UPLOAD_DELAYED in (job.conditions or {}):
            grace_seconds += STORAGE_PATIENCE_SECONDS  # the workers wait for storage
        decision = policy.during(job, attempt, ray_job, now=self._clock(), grace_seconds=grace_seconds)
        if not isinstance(decision, policy.Inspect):
            return decision
        try:
            result = endings.read_result(self._storage, job.id, job.kind)
        except StorageUnreachable as error:
            return policy.Wait(Reason.STORAGE_UNREACHABLE, error.detail, policy.UNREACHABLE_SECONDS)
        except endings.ManifestInvalid as error:
            return policy.End(JobStatus.FAILED, Reason.CONTRACT_MISMATCH, str(error))
        with self._database.read() as session:  # its workers' last words may have come since the lease began
            attempt = session.get_one(AttemptRow, (attempt.job_id, attempt.number))
            desired_now = session.scalar(select(JobRow.desired_state).where(JobRow.id == job.id))
        if desired_now != job.desired_state:  # they may have ended because of that
            return policy.Wait(Reason(job.reason) if job.reason else None, job.detail, 0.0)
        backoff_seconds = self._settings.retry_backoff_seconds
        return policy.after(job, attempt, ray_job, result, now=self._clock(), backoff_seconds=backoff_seconds)


def main() -> None:
    settings = load_settings()
    configure_logging(settings.log_format)
    database = open_database(settings)
    storage = S3Storage.of(settings)
    require_rights(storage)
    ray = HttpRayJobs(settings.ray_url, token=settings.ray_token.get_secret_value())
    dispatcher = Dispatcher(database, storage, ray, settings)
    sender = Sender(database, settings, tally=dispatcher.tally)
    housekeeper = Housekeeper(database, storage, tally=dispatcher.tally)
    beside = [threading.Thread(target=sender.run, name="webhooks"), threading.Thread(target=housekeeper.run, name="housekeeping")]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: dispatcher.stop())
    log.info("dispatching for %s", settings.ray_url)
    for thread in beside:
        thread.start()
    try:
        dispatcher.run()
    finally:
        sender.stop()
        housekeeper.stop()
    for thread in beside:
        thread.join()
    ray.close()
    database.close()


if __name__ == "__main__":
    main()
