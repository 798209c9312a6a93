"""What runs on every worker of an attempt: data, resume, the core's generator, reports, saves, the result."""

import importlib.metadata
import logging
import platform
import subprocess
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray.train
import torch

from mae_core.config import PretrainSpec
from mae_core.loop import Progress
from mae_core.run import Run
from mae_core.runs import open_run
from mae_core.world import World
from workers.contract import (
    DesiredState,
    EncoderManifest,
    EventType,
    RunProgress,
    WorkOrder,
    result_prefix,
)
from workers.failures import StaleAttemptError
from workers.objects import ObjectStore
from workers.reporter import Reporter
from workers.saver import Saver

_FINAL_REPORT_SECONDS = 600.0  # a finished run waits so long for a service that is away
_FINAL_SAVE_SECONDS = 60.0


def train_worker(config: dict[str, Any]) -> None:
    """One worker of one attempt, from the order to the committed result."""
    configure_logging()
    order = WorkOrder.model_validate(config["order"])
    context = ray.train.get_context()
    device = torch.device("cuda", torch.cuda.current_device()) if order.spec.resources.gpus_per_worker else torch.device("cpu")
    world = World(context.get_world_rank(), context.get_world_size(), device)
    with ExitStack() as stack:
        if world.rank == 0:
            Leader(order, world, stack, config["driver_started_at"]).train()
        else:
            Follower(order, world, stack).train()


class Follower:
    """A worker that trains along. It says nothing: whatever it has to tell, rank 0 learns by the training's own exchange."""

    def __init__(self, order: WorkOrder, world: World, stack: ExitStack) -> None:
        self.order, self.world = order, world
        self.store = ObjectStore(order.storage, self.storage_delayed)
        self._scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maestro-")))

    def train(self) -> None:
        if self.committed_before():
            return
        run = self.open_run()
        for _ in run.progress(self.wants_stop):
            pass

    def committed_before(self) -> bool:
        """Whether the result is there already: an earlier start of the workers died between its commit and its end."""
        found = self.world.rank == 0 and self.store.is_committed(result_prefix(self.order.prefix, self.order.spec.kind))
        return self.world.gather(found)[0]

    def open_run(self) -> Run:
        """The run, taken up from the newest training state (the same one on all workers)."""
        run = open_run(self.order.spec, world=self.world, encoder_folder=self._fetch_encoder())
        found = self.store.newest_training_state(self.order.prefix) if self.world.rank == 0 and run.resumes else None
        self.resumed_from = self.world.gather(found[0] if found else None)[0]
        if self.resumed_from is not None:
            run.load_training_state(found[1] if found else self.store.load_training_state(self.resumed_from))
        return run

    def wants_stop(self) -> bool:
        return False

    def storage_delayed(self, message: str) -> None:
        logging.getLogger(__name__).warning(message)

    def _fetch_encoder(self) -> Path | None:
        spec = self.order.spec
        if isinstance(spec, PretrainSpec) or spec.encoder.init is not None:
            return None
        if spec.encoder.file is not None:
            return Path(spec.encoder.file)
        assert spec.encoder.artifact is not None, "the service resolves {job: …} at submission"
        folder = self._scratch / "encoder"
        folder.mkdir()
        self.store.fetch_encoder(spec.encoder.artifact, folder)
        return folder


class Leader(Follower):
    """Rank 0: trains, and reports, saves and commits."""

    def __init__(self, order: WorkOrder, world: World, stack: ExitStack, driver_started_at: str) -> None:
        self._driver_started_at, self._started_at = driver_started_at, datetime.now(UTC)
        self.incarnation = time.time_ns() // 1_000_000
        self.reporter = Reporter(order, self.incarnation)
        stack.callback(self.reporter.close, 5.0)  # after a failure; a run that ends well has closed it before
        super().__init__(order, world, stack)
        self.saver = Saver(order, self.store, self.reporter, self.incarnation)
        stack.callback(self.saver.close, _FINAL_SAVE_SECONDS)
        self._pace = _Pace()

    def train(self) -> None:
        if self.committed_before():
            return
        run = self.open_run()
        self.reporter.event(
            EventType.WORKERS_STARTED,
            incarnation=self.incarnation,
            num_workers=self.world.size,
            device=str(self.world.device),
            host=platform.node(),
            resumed_from=self.resumed_from,
            driver_started_at=self._driver_started_at,
            worker_started_at=self._started_at.isoformat(),
        )
        for number, progress in enumerate(run.progress(self.wants_stop)):
            self._tell(progress)
            if number == 0:
                self.reporter.event(EventType.FIRST_STEP_TAKEN, step=progress.step)
            if progress.stop_agreed:
                self._stopped(progress)
                return
            if run.is_save_due(progress):
                self.saver.save(progress.step, run.training_state(), self._picture(run, progress.step))
        self._finish(run, progress.step)

    def wants_stop(self) -> bool:
        return self.reporter.is_stale or self.reporter.desired_state is not DesiredState.RUN

    def storage_delayed(self, message: str) -> None:
        super().storage_delayed(message)
        self.reporter.event(EventType.UPLOAD_DELAYED, message=message[:500])

    def _tell(self, progress: Progress) -> None:
        self.reporter.points(progress.points)
        if progress.evaluated:
            self.reporter.points([(progress.step, progress.evaluated)])
            self.reporter.event(EventType.EVALUATED, step=progress.step, metrics=progress.evaluated)
        if progress.skipped:
            shown = dict(list(progress.skipped.items())[:20])
            self.reporter.event(EventType.IMAGES_SKIPPED, count=len(progress.skipped), images=shown)
        self.reporter.progress(self._pace.progress(progress))

    def _stopped(self, progress: Progress) -> None:
        if self.reporter.is_stale:
            raise StaleAttemptError(f"attempt {self.order.attempt} of job {self.order.job} is not the current one")
        self.reporter.event(EventType.RUN_STOPPED, step=progress.step, desired_state=self.reporter.desired_state)
        self.reporter.close(_FINAL_REPORT_SECONDS)

    def _picture(self, run: Run, step: int) -> Path | None:
        path = self._scratch / f"reconstructions-{step}.png"
        try:
            return path if run.write_reconstructions(path) else None
        except Exception:  # a picture is worth much, but not a training
            logging.getLogger(__name__).exception("no picture of step %d", step)
            return None

    def _finish(self, run: Run, step: int) -> None:
        """Uploads the result and commits it. From here on the attempt has succeeded, whatever becomes of this process."""
        self.reporter.event(EventType.TRAINING_ENDED, step=step)
        self.saver.close(_FINAL_SAVE_SECONDS)
        if (picture := self._picture(run, step)) is not None:
            self.saver.upload_picture(step, picture)
        order, folder = self.order, self._scratch / "result"
        folder.mkdir()
        run.write_result(folder)
        prefix = result_prefix(order.prefix, order.spec.kind)
        files = {path.name: self.store.put_file(prefix + path.name, path) for path in sorted(folder.iterdir())}
        manifest = EncoderManifest(
            job=order.job,
            attempt=order.attempt,
            kind=order.spec.kind,
            created_at=datetime.now(UTC),
            model=run.model,
            normalize=run.normalize,
            spec=order.spec,
            metrics=run.metrics,
            versions=versions(),
            git_revision=git_revision(),
            files=files,
        )
        self.store.commit(prefix, manifest)
        self.reporter.event(EventType.RESULT_COMMITTED, uri=f"s3://{order.storage.bucket}/{prefix}", metrics=run.metrics)
        self.reporter.close(_FINAL_REPORT_SECONDS)


def configure_logging() -> None:
    """Our own words at INFO; of the libraries only what went wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for noisy in ("httpx", "botocore", "boto3", "s3transfer", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Pace:
    """Speed and time left, smoothed over the recent steps."""

    def __init__(self) -> None:
        self._images_per_second: float | None = None
        self._loss: float | None = None
        self._seconds_per_step: float | None = None
        self._last: tuple[int, float] | None = None

    def progress(self, progress: Progress) -> RunProgress:
        now = time.monotonic()
        if self._last is not None and progress.step > self._last[0]:
            seconds = (now - self._last[1]) / (progress.step - self._last[0])
            self._seconds_per_step = seconds if self._seconds_per_step is None else 0.9 * self._seconds_per_step + 0.1 * seconds
        self._last = (progress.step, now)
        if progress.points:
            values = progress.points[-1][1]
            self._images_per_second = values.get("images_per_second", self._images_per_second)
            self._loss = values.get("loss", self._loss)
        left = progress.num_steps - progress.step
        return RunProgress(
            step=progress.step,
            num_steps=progress.num_steps,
            epoch=progress.epoch,
            images_per_second=self._images_per_second,
            eta_seconds=None if self._seconds_per_step is None else self._seconds_per_step * left,
            loss=self._loss,
        )


def versions() -> dict[str, str]:
    """What made a result."""
    return {name: importlib.metadata.version(name) for name in ("maestro-mae", "torch", "ray")} | {"python": platform.python_version()}


def git_revision() -> str | None:
    """The commit of a source checkout, with -dirty where it was changed; None for an installed package."""
    here = Path(__file__)
    try:
        _git("ls-files", "--error-unmatch", here.name, folder=here.parent)  # another project's repository around us says nothing
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*", folder=here.parent)
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str, folder: Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
