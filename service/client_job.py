"""A job as a program holds it: what the API told last, and what can be done with it."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypedDict, Unpack

from mae_core.exports.names import ExportFormat
from service.client_errors import ApiError, JobFailed, Json, Unreachable, WaitTimeout
from service.client_names import ModelLibrary
from workers.names import DRIVER, JobStatus

if TYPE_CHECKING:
    from numpy import float64, int64
    from numpy.typing import NDArray

    from service.client import MaestroClient
    from service.client_streams import Message

AWAY_SECONDS = 300.0  # so long may a service be away while a job is waited for
_POLL_SECONDS = 2.0


class JobChanges(TypedDict, total=False):
    """What may be changed of a job at any time. `labels` and `keep` are replaced as a whole; `notes` None: none."""

    name: str
    labels: dict[str, str]
    priority: int
    notes: str | None
    keep: Mapping[str, Any]


class Curve(NamedTuple):
    """One series: its values at its steps, of a long one so many that no spike is lost. NaN and infinity are themselves."""

    steps: "NDArray[int64]"
    values: "NDArray[float64]"


class Job(Json):
    """The fields that the API tells of a job (`job["status"]`, `job["spec"]`), as of the last call, and its calls.

    Jobs of a list have fewer fields; `refresh` reads them all. Each call brings the fields up to date, where its answer has them.
    """

    def __init__(self, fields: Json, *, client: "MaestroClient", etag: str | None = None) -> None:
        super().__init__(fields)
        self._client = client
        self.etag = etag

    @property
    def id(self) -> str:
        return str(self["id"])

    @property
    def status(self) -> JobStatus:
        return JobStatus(self["status"])

    def refresh(self) -> Self:
        return self._become(self._client.job(self.id))

    def wait(self, *, timeout_seconds: float | None = None) -> Self:
        """Until it has ended. Raises JobFailed unless it has succeeded, WaitTimeout, and after minutes without the service Unreachable, or
        the ApiError of a proxy before it."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        heard_at = time.monotonic()
        while True:
            try:
                self.refresh()
                heard_at = time.monotonic()
            except (Unreachable, ApiError) as error:
                if not error.is_away or time.monotonic() - heard_at > AWAY_SECONDS:
                    raise
            if self.status == JobStatus.SUCCEEDED:
                return self
            if self.status.is_terminal:
                raise JobFailed(self)
            left = _POLL_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"job {self.id} has not ended in {timeout_seconds:g} s; it is {self.status}")
            self._client.sleep(min(left, _POLL_SECONDS))

    def metrics(
        self, *names: str, max_points: int | None = None, from_step: int | None = None, to_step: int | None = None
    ) -> dict[str, Curve]:
        """Its series, all or those named, as arrays."""
        import numpy

        found = self._client.metrics(self.id, names=names, max_points=max_points, from_step=from_step, to_step=to_step)
        return {
            name: Curve(
                numpy.asarray(series["steps"], numpy.int64), numpy.asarray([float(value) for value in series["values"]], numpy.float64)
            )
            for name, series in found.items()
        }

    def encoder(self, library: ModelLibrary = "timm", *, to: Path | None = None) -> Any:
        """The trained model, loaded by its library; of a fine-tuning with its head. Raises LibraryMissing and DownloadError.

        to: a folder that keeps the files, so that they are downloaded once.
        """
        from service import client_models

        client_models.require(library)
        if to is not None:
            return client_models.load(self.download(to, format=library), library)
        with tempfile.TemporaryDirectory(prefix="maestro-") as folder:
            return client_models.load(self.download(Path(folder), format=library), library)

    def download(self, to: Path, *, format: ExportFormat = "timm") -> Path:
        """Its result, into the folder `to`, checked. A repeat goes on where an earlier call was broken off."""
        return self._client.download_result(self.id, to, format=format)[1]

    def cancel(self) -> Self:
        return self._become(self._client.cancel(self.id))

    def pause(self) -> Self:
        return self._become(self._client.pause(self.id))

    def resume(self) -> Self:
        return self._become(self._client.resume(self.id))

    def change(self, **changes: Unpack[JobChanges]) -> Self:
        """Raises ApiError (412) where somebody has changed one of these since this was read: `refresh`, and look."""
        if self.etag is None:
            self.refresh()
        return self._become(self._client.change(self.id, if_match=self.etag or "*", **changes))

    def retry(self) -> "Job":
        """Submit it anew, as another job, which is answered."""
        return self._client.retry(self.id)

    def delete(self) -> None:
        """With all that it left. It must have ended."""
        self._client.delete(self.id)

    def events(self, *, after: int = 0) -> Iterator[Json]:
        return self._client.events(self.id, after=after)

    def stream(self, *, after: int | None = None) -> "Iterator[Message]":
        """Events and progress as they happen, until the `end`."""
        return self._client.stream(self.id, after=after)

    def logs(self, *, attempt: int | None = None, worker: str = DRIVER) -> str:
        return self._client.logs(self.id, attempt=attempt, worker=worker)

    def artifacts(self) -> Sequence[Json]:
        return self._client.artifacts(self.id)

    def checkpoints(self, *, keep: Mapping[str, Any] | None = None) -> Json:
        """Its training states and what keeps each; or what another policy would do with them."""
        return self._client.checkpoints(self.id, keep=keep)

    def pin(self, name: str) -> Json:
        return self._client.pin(self.id, name)

    def unpin(self, name: str) -> Json:
        return self._client.unpin(self.id, name)

    def _become(self, other: "Job") -> Self:
        self.update(other)
        self.etag = other.etag or self.etag
        return self
