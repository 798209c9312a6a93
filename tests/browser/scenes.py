"""Jobs as a service has them after days: written through its own functions, at times of their own, with curves, pictures and logs."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any
from unittest.mock import patch

import numpy as np
from sqlalchemy import update

from mae_core.config import RUN_SPEC
from service import events, jobs, lifecycle, metrics, reports
from service.artifacts import job_prefix
from service.db import Database, utc_now
from service.models import AttemptRow, JobRow
from service.settings import Settings
from service.storage import S3Storage
from tests.stand_in.stage import Stage
from workers.contract import Event, EventType, JobStatus, Points, Reason, Report, RunProgress, submission_id
from workers.stored import log_chunk, log_prefix, reconstructions_prefix, result_prefix

MODEL = {"arch": "vit_small_patch16", "image_size": 224}
PRETRAIN: dict[str, Any] = {
    "kind": "pretrain",
    "model": MODEL,
    "data": {"source": "/data/cells"},
    "optim": {"epochs": 200, "batch_size": 1024, "warmup_epochs": 10},
    "resources": {"num_workers": 4, "cpus_per_worker": 8},
}
PROBE: dict[str, Any] = {"kind": "probe", "data": {"source": "/data/labelled", "validation_fraction": 0.2}}
FINETUNE: dict[str, Any] = {"kind": "finetune", "data": {"source": "/data/labelled", "validation_fraction": 0.2}}
_BATCH = 1000  # points of a report


class Scenes:
    """Writes into the database and the bucket of a stage."""

    def __init__(self, stage: Stage) -> None:
        values = {
            name.removeprefix("MAESTRO_").lower(): value for name, value in stage.api.environment.items() if name.startswith("MAESTRO_")
        }
        self.settings = Settings.model_validate({name: values[name] for name in values if name in Settings.model_fields})
        self.database = Database(stage.database_url)
        self.bucket = self.settings.s3_bucket
        self.objects = stage.storage.client()
        with patch.dict("os.environ", {"AWS_ACCESS_KEY_ID": stage.storage.access_key, "AWS_SECRET_ACCESS_KEY": stage.storage.secret_key}):
            self.storage = S3Storage.of(self.settings)
            self.storage.check()

    def close(self) -> None:
        self.database.close()

    def submit(self, spec: dict[str, Any], *, name: str, ago: float = 0.0, project: str = "default", **changes: Any) -> str:
        """`ago`: hours."""
        with _at(utc_now() - timedelta(hours=ago)):
            parsed = RUN_SPEC.validate_python(spec | {"name": name} | changes)
            return jobs.submit(self.database, self.storage, self.settings, parsed, idempotency_key=None, project=project).job.id

    def move(self, job_id: str, *statuses: JobStatus, ago: float, reason: Reason | None = None, detail: str | None = None) -> None:
        at = utc_now() - timedelta(hours=ago)
        with self.database.write() as session:
            for status in statuses:
                last = {"reason": reason, "detail": detail} if status is statuses[-1] else {}
                assert lifecycle.transition(session, job_id, to=status, now=at, due_at=None, **last) is lifecycle.Outcome.DONE  # type: ignore[arg-type]

    def attempt(self, job_id: str, number: int = 1, *, ago: float) -> None:
        """Another attempt, whose workers have begun."""
        at = utc_now() - timedelta(hours=ago)
        with self.database.write() as session:
            row = session.get_one(JobRow, job_id)
            lifecycle.transition(session, job_id, to=JobStatus.STARTING, now=at, attempt=number, due_at=None)
            own = {"job_id": job_id, "number": number, "submission_id": submission_id(job_id, number)}
            times = {"created_at": at, "submitted_at": at, "started_at": at}
            session.add(AttemptRow(**own, num_cpus=row.num_cpus, num_gpus=row.num_gpus, **times))
            events.append(session, job_id, EventType.ATTEMPT_CREATED, {"submission_id": own["submission_id"]}, at=at, attempt=number)
        with _at(at + timedelta(seconds=20)):
            self.tell(job_id, number, EventType.WORKERS_STARTED, ago=ago - 20 / 3600, num_workers=4, resumed_from=None)

    def end_attempt(self, job_id: str, number: int = 1, *, ago: float, reason: Reason | None = None, message: str | None = None) -> None:
        at = utc_now() - timedelta(hours=ago)
        with self.database.write() as session:
            row = session.get_one(AttemptRow, (job_id, number))
            row.ended_at, row.reason, row.message = at, reason, message
            events.append(session, job_id, EventType.ATTEMPT_ENDED, {"reason": reason, "message": message}, at=at, attempt=number)

    def tell(self, job_id: str, number: int, type: EventType, *, ago: float, **data: Any) -> None:
        event = Event(type=type, at=utc_now() - timedelta(hours=ago), data=data)
        self._report(job_id, number, events=[event])

    def beat(self, job_id: str, number: int = 1) -> None:
        """Its workers live."""
        self._report(job_id, number)

    def train(self, job_id: str, *, upto: float = 1.0, num_steps: int = 4000, number: int = 1, **shape: Any) -> None:
        """Curves of a pretraining up to a share of its steps, and how far it is. `shape`: see `curves`."""
        with self.database.read() as session:
            epochs = session.get_one(JobRow, job_id).spec["optim"]["epochs"]
        last = max(int(num_steps * upto), 1)
        series = curves(num_steps, last, **shape)
        steps = list(range(1, last + 1))
        for begin in range(0, last, _BATCH):
            part = {name: values[begin : begin + _BATCH] for name, values in series.items()}
            self._report(job_id, number, points=Points(steps=steps[begin : begin + _BATCH], series=part))
        speed = float(series["images_per_second"][-1])  # type: ignore[arg-type]
        loss = next(value for value in reversed(series["loss"]) if value is not None)
        progress = RunProgress(
            step=last,
            num_steps=num_steps,
            epoch=epochs * upto,
            images_per_second=speed,
            eta_seconds=(num_steps - last) * 1024 / speed,
            loss=loss,
        )
        self._report(job_id, number, progress=progress)

    def points(self, job_id: str, steps: list[int], series: dict[str, list[float | None]], *, number: int = 1) -> None:
        self._report(job_id, number, points=Points(steps=steps, series=series))

    def evaluate(self, job_id: str, *, steps: list[int], ago: float, best: float = 0.71, number: int = 1) -> None:
        for place, step in enumerate(steps):
            share = 1 - np.exp(-3 * (place + 1) / len(steps))
            found = {"knn_accuracy": round(best * 0.86 * share, 4), "probe_accuracy": round(best * share, 4)}
            self.points(job_id, [step], {name: [value] for name, value in found.items()}, number=number)
            self.tell(job_id, number, EventType.EVALUATED, ago=ago * (1 - place / len(steps)), step=step, metrics=found)

    def pictures(self, job_id: str, *, steps: list[int], ago: float, number: int = 1) -> None:
        for place, step in enumerate(steps):
            body = picture((place + 1) / len(steps))
            key = f"{reconstructions_prefix(job_prefix(job_id))}step={step:010d}.png"
            self.objects.put_object(Bucket=self.bucket, Key=key, Body=body, ContentType="image/png")
            at = ago * (1 - place / len(steps))
            self.tell(job_id, number, EventType.RECONSTRUCTIONS_WRITTEN, ago=at, step=step, key=key, bytes=len(body), sha256="0" * 64)

    def log(self, job_id: str, text: str, *, worker: str = "driver", offset: int = 0, number: int = 1) -> int:
        """A chunk of what a process has printed; where the next begins."""
        body = text.encode()
        self.objects.put_object(Bucket=self.bucket, Key=log_chunk(log_prefix(job_prefix(job_id), number, worker), offset), Body=body)
        return offset + len(body)

    def succeed(self, job_id: str, *, ago: float, metrics: dict[str, Any] | None = None, number: int = 1) -> None:
        uri = f"s3://{self.bucket}/{result_prefix(job_prefix(job_id), self.kind(job_id))}"
        self.tell(job_id, number, EventType.TRAINING_ENDED, ago=ago + 0.01, step=1)
        self.tell(job_id, number, EventType.RESULT_COMMITTED, ago=ago, uri=uri, metrics=metrics or {"loss": 0.41}, left_out={})
        self.end_attempt(job_id, number, ago=ago)
        self.move(job_id, JobStatus.SUCCEEDED, ago=ago)

    def adopt(self, job_id: str, parent: str) -> None:
        """As if the job had been submitted with the other's encoder, which was never stored."""
        with self.database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == job_id).values(encoder_job=parent))

    def kind(self, job_id: str) -> str:
        with self.database.read() as session:
            return session.get_one(JobRow, job_id).kind

    def delete(self, job_id: str) -> None:
        with self.database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == job_id).values(deleted_at=utc_now()))

    def _report(self, job_id: str, number: int, **content: Any) -> None:
        with self.database.read() as session:
            sequence = metrics.version(session, job_id) + self._count(job_id)
        report = Report(incarnation=number, sequence=sequence, **content)
        reports.record(self.database, job_id, number, report, bucket=self.bucket)

    def _count(self, job_id: str) -> int:
        self._sequences = getattr(self, "_sequences", {})
        self._sequences[job_id] = self._sequences.get(job_id, 0) + 1000
        return int(self._sequences[job_id])


@contextmanager
def _at(moment: datetime) -> Iterator[None]:
    with patch.object(jobs, "utc_now", lambda: moment), patch.object(reports, "utc_now", lambda: moment):
        yield


def curves(
    num_steps: int, last: int, *, seed: int = 0, floor: float = 0.38, noise: float = 0.012, drift: float = 0.0, batch: int = 1024
) -> dict[str, list[float | None]]:
    """What a pretraining tells of each step. `drift`: how much the loss rises in the second half."""
    chance = np.random.default_rng(seed)
    place = np.arange(1, last + 1) / num_steps
    warm = np.minimum(place / 0.05, 1.0)
    lr = 6e-4 * np.where(place < 0.05, warm, 0.5 * (1 + np.cos(np.pi * (place - 0.05) / 0.95)))
    loss = floor + (1.02 - floor) * np.exp(-7 * place**0.72) + chance.normal(0, noise, last) * (0.6 + np.exp(-4 * place))
    loss = loss + drift * np.clip(place - 0.45, 0, None)
    norm = 0.4 + 2.4 * np.exp(-14 * place) + np.abs(chance.normal(0, 0.05, last))
    norm[chance.integers(0, last, max(last // 700, 1))] += chance.uniform(1, 3, max(last // 700, 1))
    speed = 2150 + chance.normal(0, 24, last) - 320 * (np.sin(place * 40) > 0.985)
    wait = np.clip(0.03 + chance.normal(0, 0.008, last) + 0.12 * (np.sin(place * 40) > 0.985), 0, 1)
    found = {"loss": loss, "lr": lr, "grad_norm": norm, "images_per_second": speed, "data_wait": wait}
    return {name: [float(f"{value:.6g}") for value in values] for name, values in found.items()}


def picture(progress: float, *, num_images: int = 4, size: int = 96) -> bytes:
    """Reconstructions of drawn cells, as workers write them; the nearer `progress` is to 1 the sharper they are."""
    import torch

    from mae_core.reconstruct import Reconstructions

    images = torch.from_numpy(np.stack([_cells(number, size) for number in range(num_images)])).float()
    chance = np.random.default_rng(7)
    grid = size // 16
    masked = np.stack([(chance.permutation(grid * grid) < 0.75 * grid * grid).reshape(grid, grid) for _ in range(num_images)])
    mask = torch.from_numpy(masked).float()[:, None].repeat_interleave(16, 2).repeat_interleave(16, 3)
    radius = int(1 + 22 * (1 - progress) ** 1.6)
    blurred = torch.nn.functional.avg_pool2d(images, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
    out = io.BytesIO()
    Reconstructions(images, mask, blurred, images * (1 - mask) + blurred * mask, [str(n) for n in range(num_images)]).write_png(out)
    return out.getvalue()


def _cells(seed: int, size: int) -> np.ndarray[Any, Any]:
    """(3, size, size) in [0, 1]: round cells with bright nuclei on a dark ground."""
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size]
    image = np.stack([np.full((size, size), value) for value in (0.05, 0.06, 0.12)])
    for _ in range(9):
        cx, cy, r = chance.uniform(0, size), chance.uniform(0, size), chance.uniform(size / 11, size / 6)
        distance = np.hypot(x - cx, (y - cy) * chance.uniform(0.8, 1.25)) / r
        body, core = 1 / (1 + np.exp(9 * (distance - 1))), 1 / (1 + np.exp(12 * (distance - 0.42)))
        tint = np.array([0.10, chance.uniform(0.45, 0.75), chance.uniform(0.35, 0.6)])
        image = image * (1 - body * 0.85) + tint[:, None, None] * body * 0.85
        image = image * (1 - core) + np.array([0.92, 0.78, 0.42])[:, None, None] * core
    return np.clip(image + chance.normal(0, 0.012, image.shape), 0, 1)
