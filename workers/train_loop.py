"""What runs on every worker of an attempt: data, resume, the core's generator, reports, saves, the result."""

import dataclasses
import logging
import platform
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from pathlib import Path

from mae_core.checkpoint import saving_group
from mae_core.data.remote import Remote
from mae_core.errors import DivergedError
from mae_core.loop import Progress
from mae_core.run import Run
from mae_core.runs import open_run
from workers.contract import STORAGE_PATIENCE_SECONDS, DesiredState, EventType, WorkOrder
from workers.delays import Delays
from workers.failures import StaleAttemptError, StorageError, WaitEndedError
from workers.group import Post
from workers.local_states import LocalStates, local_states_folder
from workers.logs import configure_logging
from workers.objects import ObjectStore
from workers.pace import Pace
from workers.parts import S3Parts
from workers.process_group import join
from workers.reconstructions import ReconstructionUploads
from workers.remote import listings_folder, remote_of
from workers.reporter import Reporter, spools
from workers.restoring import SHORT_PATIENCE_SECONDS, Restoring
from workers.results import commit_result
from workers.saver import Saver
from workers.scratch import forget_untouched, scratch_folder
from workers.seat import Seat
from workers.signals import Signals
from workers.stored import result_prefix
from workers.uploads import Uploads

logger = logging.getLogger(__name__)

_FINAL_REPORT_SECONDS = 24 * 3600.0  # a finished run waits so long for a service that is away: it gives nobody its devices, either
_REGROUP_SECONDS = 600.0  # for storage to take the last state; without it the others go on from the one before
_READ_PATIENCE_SECONDS = 300.0  # for images in storage: then the run ends, and holds no devices while it waits
_LOOK_SECONDS = 2.0  # while storage is waited for, whether anybody still wants it
_FINAL_SAVE_SECONDS = 60.0
_SAVE_TIMEOUT = timedelta(hours=1)  # for a worker that hangs while it writes to its disk
_UPLOAD_TIMEOUT = timedelta(days=1)  # one may upload for long while the others have: who hangs or dies is known by the training
_MAX_SHOWN = 20  # images or steps in one event


class Stop(Enum):
    """Why all workers stop before the end."""

    CANCEL = auto()
    PAUSE = auto()
    REGROUP = auto()  # another number of workers goes on


def train_worker(post: Post, order: WorkOrder, times: Mapping[str, str], signals: Signals) -> bool:
    """One worker of one attempt, from the order to the committed result, or to where another number of workers goes on: then True.

    `times`: when the run got where, for the report of its start.
    """
    configure_logging()
    seat = Seat(join(post), post.machine, post.local_rank)
    with ExitStack() as stack:
        worker = Leader(order, seat, stack, signals, times) if seat.world.rank == 0 else Follower(order, seat, stack, signals)
        return worker.train() is Stop.REGROUP


class Follower:
    """A worker that trains along. It says nothing: whatever it has to tell, rank 0 learns by the training's own exchange."""

    reporter: Reporter | None = None
    goes_on = False  # whether another start of the workers goes on where this one ends
    last: Progress | None = None  # the newest that this start of the run has yielded

    def __init__(self, order: WorkOrder, seat: Seat, stack: ExitStack, signals: Signals) -> None:
        self.order, self.seat, self.world, self.signals = order, seat, seat.world, signals
        self.delays = Delays(self.reporter)
        self.store = ObjectStore(order.storage, self.delays)
        self.scratch = stack.enter_context(scratch_folder(order.job, order.attempt, self.world.rank))
        self._group = saving_group(self.world, timeout=_SAVE_TIMEOUT)
        self._born = self.world.gather(time.time_ns() // 1_000_000)[0]
        for kept in (local_states_folder(), spools(), listings_folder()):
            forget_untouched(kept)
        self.states = LocalStates(order.job, self.world.rank, born=self._born)
        group = saving_group(self.world, timeout=_UPLOAD_TIMEOUT)
        self.state_uploads = Uploads(order, self.store, self.world, group, self.states, delays=self.delays, reporter=self.reporter)
        stack.callback(self.state_uploads.close, 0.0)  # after a failure: what is on disk will be uploaded by the next start
        self._restoring = Restoring(order, self.store, self.states, seat, self._group, self.scratch)
        self._stack = stack
        self._remote: Remote = remote_of(self.store.patient(_READ_PATIENCE_SECONDS, gives_up=self.gives_up, delays=Delays()), order.prefix)
        self._saved_step: int | None = None  # of the newest save; the same on all workers
        self._encoder: Path | None = None  # where the one that the spec names was downloaded to

    def train(self) -> Stop | None:
        """Trains to the end, or until all stop. Where the loss is not finite for too long, all workers go back to the newest training
        state, once."""
        if self.committed_before():
            return None
        run, taken_up = self.open_run()
        self._stack.callback(lambda: self.saver.wait(_FINAL_SAVE_SECONDS))  # of whichever saver is the last
        begin = taken_up or "the beginning"
        logger.info(
            "worker %d of %d trains on %s of %s, from %s", self.world.rank, self.world.size, self.world.device, platform.node(), begin
        )
        self.started(taken_up)
        if (diverged := self._take_steps(run)) is not None:
            if not run.resumes:
                raise diverged
            del run  # its memory is needed
            run = self._go_back(diverged)
            if (again := self._take_steps(run)) is not None:
                raise again
        stop = None
        if self.last is not None and self.last.stop_agreed:
            stop = self.world.gather(self.why_stop())[0]
            if run.resumes and stop is not Stop.CANCEL:
                patience_seconds = _REGROUP_SECONDS if stop is Stop.REGROUP else STORAGE_PATIENCE_SECONDS
                self._save_last(self.last.step, run, patience_seconds=patience_seconds)
        self.saver.wait(_FINAL_SAVE_SECONDS)
        self.state_uploads.close(_FINAL_SAVE_SECONDS)
        self.ended(run, stop)
        return stop

    def committed_before(self) -> bool:
        """Whether the result is there already: an earlier start of the workers died between its commit and its end."""
        can_go_on = bool(self._restoring.local())
        found = False
        if self.world.rank == 0:
            store = self.store.patient(SHORT_PATIENCE_SECONDS) if can_go_on else self.store
            try:
                found = store.is_committed(result_prefix(self.order.prefix, self.order.spec.kind))
            except StorageError:
                if not can_go_on:
                    raise
        return self.world.gather(found)[0]

    def open_run(self) -> tuple[Run, str | None]:
        """The run, taken up from the newest training state, and that state's prefix: the same one on all workers."""
        parts = S3Parts(self.store, result_prefix(self.order.prefix, self.order.spec.kind), self.scratch)
        spec = self.order.spec
        run = open_run(spec, world=self.world, encoder_folder=self._fetch_encoder(), parts=parts, remote=self._remote)
        taken_up = self._restoring.take_up(run, self.state_uploads, born=self._born) if run.resumes else None
        self.goes_on = run.resumes or spec.kind == "embed"  # whose parts are kept as they are done
        incarnation = self.world.gather(time.time_ns() // 1_000_000)[0]
        self.saver = Saver(*(self.order, self.world, self._group, self.state_uploads), incarnation=incarnation, reporter=self.reporter)
        return run, taken_up

    def started(self, taken_up: str | None) -> None:
        """Told when the run is ready."""

    def tell(self, progress: Progress) -> None:
        """Told after each step."""

    def went_back(self, why: DivergedError, taken_up: str | None) -> None:
        """Told when the run goes on from an earlier state."""

    def ended(self, run: Run, stop: Stop | None) -> None:
        """Told when the last step was taken, or the run was stopped."""

    def wants_stop(self) -> bool:
        return False

    def why_stop(self) -> Stop:
        """Asked of all workers when they have agreed to stop. Rank 0 knows."""
        return Stop.CANCEL

    def gives_up(self) -> bool:
        """Whether nobody wants what the run still waits for. Rank 0 knows."""
        return False

    def _save_last(self, step: int, run: Run, *, patience_seconds: float = STORAGE_PATIENCE_SECONDS) -> None:
        """Saves the state after the last step, and waits until storage has it. A save that fails costs the steps since the one before."""
        self.saver.wait()
        self.saver.check()
        if self._saved_step != step:  # else it was due at this step anyway: its folder is committed, or is to stay without a manifest
            self.saver.save(step, run.training_state())
            self.saver.wait()
        self._await_uploads(patience_seconds)

    def _await_uploads(self, patience_seconds: float) -> None:
        """Waits until storage has all states, or has been away for too long, or until nobody wants them any more."""
        give_up_at = time.monotonic() + patience_seconds
        while True:
            is_done = self.state_uploads.wait(_LOOK_SECONDS)
            self.saver.check()
            told = self.world.gather((is_done, self.gives_up() or time.monotonic() > give_up_at))
            if all(is_done for is_done, _ in told) or told[0][1]:
                return

    def _take_steps(self, run: Run) -> DivergedError | None:
        """All steps that are left; the error where the training diverged, without the frames that hold the run."""
        try:
            for progress in run.progress(self.wants_stop, self.saver.is_ready):
                self._beat(progress)
                self.tell(progress)
                self.last = progress
                self.saver.check()
                if progress.save_agreed:
                    self._saved_step = progress.step
                    self.saver.save(progress.step, run.training_state())
        except DivergedError as error:
            return error.with_traceback(None)
        return None

    def _beat(self, progress: Progress) -> None:
        if progress.stop_agreed or progress.step == progress.num_steps:
            self.signals.rested()
        else:
            self.signals.stepped(progress.step)

    def _go_back(self, why: DivergedError) -> Run:
        logger.warning("%s; going back to the newest training state", why)
        self.signals.rested()
        self.saver.wait()
        self.state_uploads.wait(_FINAL_SAVE_SECONDS)
        self.saver.check()
        run, taken_up = self.open_run()
        self.went_back(why, taken_up)
        return run

    def _fetch_encoder(self) -> Path | None:
        spec = self.order.spec
        if spec.encoder is None or spec.encoder.init is not None:
            return None
        if spec.encoder.file is not None:
            return Path(spec.encoder.file)
        assert spec.encoder.artifact is not None, "the service resolves {job: …} at submission"
        folder = self.scratch / "encoder"
        if self._encoder is None:
            folder.mkdir()
            self._encoder = self.store.fetch_encoder(spec.encoder.artifact, folder)
        return self._encoder


class Leader(Follower):
    """Rank 0: trains, and reports, saves and commits."""

    reporter: Reporter

    def __init__(self, order: WorkOrder, seat: Seat, stack: ExitStack, signals: Signals, times: Mapping[str, str]) -> None:
        self._times = {**times, "worker_started_at": datetime.now(UTC).isoformat()}
        placed_at = datetime.fromisoformat(times["workers_placed_at"])  # by the driver's clock, which is that of all starts of an attempt
        self.incarnation = int(placed_at.timestamp() * 1000)
        self.reporter = Reporter(order, self.incarnation)
        stack.callback(self.reporter.close, 5.0)  # after a failure; a run that ends well has closed it before
        super().__init__(order, seat, stack, signals)
        self._uploads = ReconstructionUploads(order, self.store, self.reporter)
        stack.callback(self._uploads.close, _FINAL_SAVE_SECONDS)
        self._pace = Pace()
        self._has_stepped = False

    def started(self, taken_up: str | None) -> None:
        self.reporter.event(
            EventType.WORKERS_STARTED,
            incarnation=self.incarnation,
            num_workers=self.world.size,
            device=str(self.world.device),
            host=platform.node(),
            resumed_from=taken_up,
            **self._times,
        )

    def went_back(self, why: DivergedError, taken_up: str | None) -> None:
        step = self.last.step if self.last is not None else None
        self.reporter.event(EventType.WENT_BACK, step=step, resumed_from=taken_up, message=str(why)[:500])

    def wants_stop(self) -> bool:
        return self.signals.regroups or self.reporter.is_stale or self.reporter.desired_state is not DesiredState.RUN

    def why_stop(self) -> Stop:
        """What the user wants goes first."""
        if self.reporter.is_stale or self.reporter.desired_state is DesiredState.CANCEL:
            return Stop.CANCEL
        return Stop.PAUSE if self.reporter.desired_state is DesiredState.PAUSE else Stop.REGROUP

    def gives_up(self) -> bool:
        return self.reporter.is_stale or self.reporter.desired_state is DesiredState.CANCEL

    def tell(self, progress: Progress) -> None:
        self.signals.can_regroup = self.goes_on and self.reporter.may_grow and not self.delays.is_any()  # it would wait for storage
        self.reporter.points(progress.points)
        if progress.evaluated:
            self.reporter.points([(progress.step, progress.evaluated)])
            self.reporter.event(EventType.EVALUATED, step=progress.step, metrics=progress.evaluated)
        if progress.reconstructions is not None:
            self._uploads.add(progress.step, progress.reconstructions)
        if progress.skipped:
            shown = dict(list(progress.skipped.items())[:_MAX_SHOWN])
            self.reporter.event(EventType.IMAGES_SKIPPED, count=len(progress.skipped), images=shown)
        if progress.dropped:
            numbers_as_text = [
                {"loss": f"{step.loss:g}", "grad_norm": f"{step.grad_norm:g}"} for step in progress.dropped
            ]  # JSON has no NaN
            steps = [dataclasses.asdict(step) | text for step, text in zip(progress.dropped[:_MAX_SHOWN], numbers_as_text, strict=False)]
            self.reporter.event(EventType.STEPS_DROPPED, count=len(progress.dropped), steps=steps)
        self.reporter.progress(self._pace.progress(progress))
        if progress.points and not self._has_stepped:  # an evaluation that was due where the run is taken up comes before the step
            self._has_stepped = True
            self.reporter.event(EventType.FIRST_STEP_TAKEN, step=progress.step)

    def ended(self, run: Run, stop: Stop | None) -> None:
        if stop is Stop.REGROUP:  # of which the service hears when the others start
            return
        step = self.last.step if self.last is not None else 0
        if stop is not None:
            self._stopped(step)
            return
        try:
            self._finish(run)
        except WaitEndedError:
            self._stopped(step)

    def _stopped(self, step: int) -> None:
        if self.reporter.is_stale:
            raise StaleAttemptError(f"attempt {self.order.attempt} of job {self.order.job} is not the current one")
        if self.reporter.desired_state is DesiredState.CANCEL:
            self.states.clear()
        self.reporter.event(EventType.RUN_STOPPED, step=step, desired_state=self.reporter.desired_state)
        self.reporter.close(_FINAL_REPORT_SECONDS)

    def _finish(self, run: Run) -> None:
        """Uploads the result and commits it. From then on the attempt has succeeded, whatever becomes of this process.

        Raises WaitEndedError where storage is away and nobody wants it any more.
        """
        self.reporter.event(EventType.TRAINING_ENDED, step=self.last.step if self.last is not None else 0)
        self._uploads.close(_FINAL_SAVE_SECONDS)
        store = self.store.patient(STORAGE_PATIENCE_SECONDS, gives_up=self.gives_up)
        folder = self.scratch / "result"
        folder.mkdir()
        exports = commit_result(run, self.order, store, folder)
        self.states.clear()
        left_out = {name: outcome.left_out for name, outcome in exports.items() if outcome.left_out is not None}
        uri = f"s3://{self.order.storage.bucket}/{result_prefix(self.order.prefix, self.order.spec.kind)}"
        self.reporter.event(EventType.RESULT_COMMITTED, uri=uri, metrics=run.metrics, left_out=left_out)
        self.reporter.close(_FINAL_REPORT_SECONDS)
