"""What runs on every worker of an attempt: data, resume, the core's generator, reports, saves, the result."""

import dataclasses
import logging
import platform
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from mae_core.checkpoint import saving_group
from mae_core.errors import DivergedError, EncoderError
from mae_core.loop import Progress
from mae_core.provenance import provenance
from mae_core.run import Run
from mae_core.runs import open_run
from mae_core.world import World
from workers.contract import (
    DesiredState,
    EncoderManifest,
    EventType,
    FileEntry,
    WorkOrder,
    result_prefix,
)
from workers.failures import StaleAttemptError
from workers.group import Post
from workers.logs import configure_logging
from workers.objects import ObjectStore
from workers.pace import Pace
from workers.parts import S3Parts
from workers.process_group import join
from workers.reconstructions import ReconstructionUploads
from workers.reporter import Reporter
from workers.saver import Saver
from workers.scratch import scratch_folder
from workers.signals import Signals

logger = logging.getLogger(__name__)

_FINAL_REPORT_SECONDS = 600.0  # a finished run waits so long for a service that is away
_FINAL_SAVE_SECONDS = 60.0
_SAVE_TIMEOUT = timedelta(hours=1)  # for a worker that hangs in a save: longer than one waits for storage while another has uploaded
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


class Seat(NamedTuple):
    """Where a worker sits: among all, on which machine, and among those of its machine."""

    world: World
    machine: int
    local_rank: int


class Follower:
    """A worker that trains along. It says nothing: whatever it has to tell, rank 0 learns by the training's own exchange."""

    reporter: Reporter | None = None
    goes_on = False  # whether another start of the workers goes on where this one ends
    last: Progress | None = None  # the newest that this start of the run has yielded

    def __init__(self, order: WorkOrder, seat: Seat, stack: ExitStack, signals: Signals) -> None:
        self.order, self.seat, self.world, self.signals = order, seat, seat.world, signals
        self.store = ObjectStore(order.storage, self.storage_delayed)
        self.scratch = stack.enter_context(scratch_folder(order.job, order.attempt, self.world.rank))
        self._group = saving_group(self.world, timeout=_SAVE_TIMEOUT)
        self._stack = stack
        self._saved_step: int | None = None  # of the newest save; the same on all workers
        self._encoder: Path | None = None  # where the one that the spec names was downloaded to

    def train(self) -> Stop | None:
        """Trains to the end, or until all stop. Where the loss is not finite for too long, all workers go back to the newest training
        state, once."""
        if self.committed_before():
            return None
        run, taken_up = self.open_run()
        self._stack.callback(lambda: self.saver.wait(_FINAL_SAVE_SECONDS))  # of whichever saver is the last
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
                self._save_last(self.last.step, run)
        self.ended(run, stop)
        return stop

    def committed_before(self) -> bool:
        """Whether the result is there already: an earlier start of the workers died between its commit and its end."""
        found = self.world.rank == 0 and self.store.is_committed(result_prefix(self.order.prefix, self.order.spec.kind))
        return self.world.gather(found)[0]

    def open_run(self) -> tuple[Run, str | None]:
        """The run, taken up from the newest training state, and that state's prefix: the same one on all workers."""
        parts = S3Parts(self.store, result_prefix(self.order.prefix, self.order.spec.kind), self.scratch)
        spec = self.order.spec
        run = open_run(spec, world=self.world, encoder_folder=self._fetch_encoder(), parts=parts)
        taken_up = self._restore(run) if run.resumes else None
        self.goes_on = run.resumes or spec.kind == "embed"  # whose parts are kept as they are done
        incarnation = self.world.gather(time.time_ns() // 1_000_000)[0]
        self.saver = Saver(
            *(self.order, self.store, self.world, self._group), incarnation=incarnation, scratch=self.scratch, reporter=self.reporter
        )
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

    def storage_delayed(self, message: str) -> None:
        logger.warning(message)

    def _save_last(self, step: int, run: Run) -> None:
        """Saves the state after the last step, and waits for it. A save that fails costs the steps since the one before."""
        self.saver.wait()
        self.saver.check()
        if self._saved_step != step:  # else it was due at this step anyway: its folder is committed, or is to stay without a manifest
            self.saver.save(step, run.training_state())
            self.saver.wait()

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
        self.saver.check()
        run, taken_up = self.open_run()
        self.went_back(why, taken_up)
        return run

    def _restore(self, run: Run) -> str | None:
        """Takes up the newest training state that is whole; its prefix, None where there is none."""
        known = self.store.training_states(self.order.prefix) if self.world.rank == 0 else []
        return next((prefix for prefix in self.world.gather(known)[0] if self._take_up(run, prefix)), None)

    def _take_up(self, run: Run, prefix: str) -> bool:
        """Takes up one training state; False, on all workers, where it is damaged. One worker of each machine downloads it."""
        from mae_core.state_files import read_state  # half a second

        with tempfile.TemporaryDirectory(prefix="maestro-state-", dir=self.scratch) as folder:
            fault = None
            if self.seat.local_rank == 0:
                try:
                    self.store.fetch_training_state(prefix, Path(folder))
                except EncoderError as error:
                    fault = str(error)
            told = self.world.gather((self.seat.machine, self.seat.local_rank, folder, fault))
            if faults := [fault for *_, fault in told if fault]:
                logger.warning("%s; going back to the one before", faults[0])
                return False
            [place] = [folder for machine, local_rank, folder, _ in told if (machine, local_rank) == (self.seat.machine, 0)]
            state = run.training_state()
            try:
                read_state(state, Path(place), self._group)
            except EncoderError as error:  # on all workers alike
                logger.warning("%s; going back to the one before", error)
                return False
            run.load_training_state(state)
            return True

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
        self.incarnation = time.time_ns() // 1_000_000
        self.reporter = Reporter(order, self.incarnation)
        stack.callback(self.reporter.close, 5.0)  # after a failure; a run that ends well has closed it before
        super().__init__(order, seat, stack, signals)
        self._uploads = ReconstructionUploads(order, self.store, self.reporter)
        stack.callback(self._uploads.close, _FINAL_SAVE_SECONDS)
        self._pace = Pace()

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

    def storage_delayed(self, message: str) -> None:
        super().storage_delayed(message)
        self.reporter.event(EventType.UPLOAD_DELAYED, message=message[:500])

    def tell(self, progress: Progress) -> None:
        self.signals.can_regroup = self.goes_on and self.reporter.may_grow
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
        if self.last is None:
            self.reporter.event(EventType.FIRST_STEP_TAKEN, step=progress.step)

    def ended(self, run: Run, stop: Stop | None) -> None:
        if stop is None:
            self._finish(run)
        elif stop is not Stop.REGROUP:  # of which the service hears when the others start
            assert self.last is not None
            self._stopped(self.last.step)

    def _stopped(self, step: int) -> None:
        if self.reporter.is_stale:
            raise StaleAttemptError(f"attempt {self.order.attempt} of job {self.order.job} is not the current one")
        self.reporter.event(EventType.RUN_STOPPED, step=step, desired_state=self.reporter.desired_state)
        self.reporter.close(_FINAL_REPORT_SECONDS)

    def _finish(self, run: Run) -> None:
        """Uploads the result and commits it. From here on the attempt has succeeded, whatever becomes of this process."""
        self.reporter.event(EventType.TRAINING_ENDED, step=self.last.step if self.last is not None else 0)
        self._uploads.close(_FINAL_SAVE_SECONDS)
        self.saver.wait(_FINAL_SAVE_SECONDS)
        order, folder = self.order, self.scratch / "result"
        folder.mkdir()
        run.write_result(folder)
        made_by = provenance(order.job, libraries=("ray",))
        exports = dict(run.write_exports(folder, made_by))
        prefix = result_prefix(order.prefix, order.spec.kind)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files = {name: self.store.put_file(prefix + name, folder / name) for name in names}
        files |= {name: FileEntry(bytes=stored.bytes, sha256=stored.sha256) for name, stored in run.stored.items()}
        manifest = EncoderManifest(
            job=order.job,
            attempt=order.attempt,
            kind=order.spec.kind,
            created_at=datetime.now(UTC),
            model=run.model,
            normalize=run.normalize,
            spec=order.spec,
            metrics=run.metrics,
            versions=made_by.versions,
            git_revision=made_by.git_revision,
            files=files,
            exports=exports,
        )
        self.store.commit(prefix, manifest)
        left_out = {name: outcome.left_out for name, outcome in exports.items() if outcome.left_out is not None}
        uri = f"s3://{order.storage.bucket}/{prefix}"
        self.reporter.event(EventType.RESULT_COMMITTED, uri=uri, metrics=run.metrics, left_out=left_out)
        self.reporter.close(_FINAL_REPORT_SECONDS)
