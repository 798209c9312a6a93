"""`MaestroClient`: the HTTP interface from a user's program. Loads neither torch nor numpy nor FastAPI nor SQLAlchemy nor pydantic.

Calls that change nothing, and those that a repeat does not change, are repeated while the service is away (it restarts in seconds).
"""

import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack
from urllib.parse import quote

from mae_core.exports.names import ExportFormat
from service.client_errors import (
    ApiError,
    BadJobId,
    DownloadError,
    JobFailed,
    Json,
    LibraryMissing,
    MaestroError,
    Unreachable,
    WaitTimeout,
)
from service.client_http import Http
from service.client_job import Curve, Job, JobChanges
from service.client_logs import LogPart, follow
from service.client_names import JobKind, TokenRole
from service.client_streams import Message
from service.client_streams import follow as follow_events
from service.client_webhooks import Webhooks
from workers.names import DRIVER

if TYPE_CHECKING:
    from service.client_downloads import Tell
    from workers.stored import EncoderManifest

__all__ = [
    "ApiError",
    "BadJobId",
    "Curve",
    "DownloadError",
    "Job",
    "JobFailed",
    "Json",
    "LibraryMissing",
    "MaestroClient",
    "MaestroError",
    "Message",
    "TokenRole",
    "Unreachable",
    "WaitTimeout",
]

Texts = str | Sequence[str]


class MaestroClient:
    """One service. `patience_seconds` is how long a call waits for a service that is away."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        patience_seconds: float = 15.0,
        timeout_seconds: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.sleep = sleep
        self._http = Http(url, token, patience_seconds=patience_seconds, timeout_seconds=timeout_seconds, sleep=sleep)
        self.url, self.token = self._http.url, token
        self.webhooks = Webhooks(self._http)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None, project: str | None = None) -> Job:
        """Submit a spec. Safe to repeat: every try carries the same key, so that one job comes of it. project: an admin may choose."""
        return self._job("POST", "/v1/jobs", json=dict(spec), params=_given(project=project), headers=_key(idempotency_key))

    def jobs(
        self,
        *,
        status: Texts | None = None,
        kind: JobKind | None = None,
        label: Texts | None = None,
        text: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        finished_after: datetime | None = None,
        finished_before: datetime | None = None,
        project: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Job]:
        """Jobs, newest first; all of them, or `limit`. status: any of several. label: `key:value`, or `key`; of several all.

        text: beginnings of words of name or id. Times have a zone.
        """
        times = {
            "created_after": created_after,
            "created_before": created_before,
            "finished_after": finished_after,
            "finished_before": finished_before,
        }
        told = {name: time.isoformat() for name, time in times.items() if time is not None}
        params = _given(status=status, kind=kind, label=label, text=text, project=project) | told
        left = limit
        while left is None or left > 0:
            page = self._http.json("GET", "/v1/jobs", params={**params, "limit": 200 if left is None else min(left, 200)})
            yield from (Job(fields, client=self) for fields in page["jobs"])
            if page.get("next_cursor") is None:
                return
            left = None if left is None else left - len(page["jobs"])
            params["cursor"] = page["next_cursor"]

    def job(self, job: str) -> Job:
        return self._job("GET", _path(job))

    def change(self, job: str, *, if_match: str = "*", **changes: Unpack[JobChanges]) -> Job:
        """Change name, labels, priority, notes or keep. if_match: the `etag` of the job as read; ApiError 412 if one was changed since."""
        try:
            return self._job("PATCH", _path(job), json=dict(changes), headers={"If-Match": if_match})
        except ApiError as error:
            if error.status != 412:
                raise
            there = self.job(job)  # perhaps it was our own change, whose answer was lost
            if any(there.get(name) != value for name, value in changes.items()):
                raise
            return there

    def pause(self, job: str) -> Job:
        """Has it save its training state and release its devices; `resume` goes on there."""
        return self._job("POST", _path(job, "pause"))

    def resume(self, job: str) -> Job:
        return self._job("POST", _path(job, "resume"))

    def cancel(self, job: str) -> Job:
        return self._job("POST", _path(job, "cancel"))

    def retry(self, job: str, *, idempotency_key: str | None = None) -> Job:
        """Submit the spec of a job that has failed or was cancelled anew, as the job that is answered. Safe to repeat, as `submit`."""
        return self._job("POST", _path(job, "retry"), headers=_key(idempotency_key))

    def delete(self, job: str) -> None:
        """Delete a job that has ended, and all that it left."""
        self._http.delete(_path(job))

    def deletion(self, job: str) -> Json:
        """What `delete` would take away (num_objects, bytes); ApiError where it would be refused. Nothing is deleted."""
        return self._http.json("DELETE", _path(job), params={"dry_run": "true"})

    def events(self, job: str, *, after: int = 0) -> Iterator[Json]:
        """All events of a job until now."""
        while True:
            page = self._http.json("GET", _path(job, "events"), params={"after": after})
            yield from page["events"]
            if not page["events"] or page["next_after"] in (None, after):
                return
            after = page["next_after"]

    def stream(
        self,
        job: str,
        *,
        after: int | None = None,
        patience_seconds: float = 300.0,
        on_away: Callable[[Exception], None] | None = None,
    ) -> Iterator[Message]:
        """A job's events and progress as they happen, until its `end`. A lost connection is taken up after the last event seen.

        on_away: told each time that the service does not answer, until it has been away for `patience_seconds`: Unreachable.
        """
        path = _path(job, "events")
        return follow_events(self._http, path, params={}, after=after, patience_seconds=patience_seconds, on_away=on_away)

    def stream_all(self, *, after: int | None = None, project: str | None = None, patience_seconds: float = 300.0) -> Iterator[Message]:
        """The events of all jobs of the project as they happen, from now or from an event on, without an end."""
        return follow_events(self._http, "/v1/events", params=_given(project=project), after=after, patience_seconds=patience_seconds)

    def metrics(
        self,
        job: str,
        *,
        names: Sequence[str] = (),
        max_points: int | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
    ) -> Json:
        """`{name: {"steps": […], "values": […]}}`. NaN and infinity are strings; `Job.metrics` makes arrays."""
        named = {"names": ",".join(names)} if names else {}
        params = named | _given(max_points=max_points, from_step=from_step, to_step=to_step)
        series: Json = self._http.json("GET", _path(job, "metrics"), params=params)["series"]
        return series

    def logs(self, job: str, *, attempt: int | None = None, worker: str = DRIVER) -> str:
        """What a process of an attempt (the newest) has printed so far: the driver, which repeats its workers, or a worker by its rank."""
        return "".join(follow(self, job, attempt=attempt, worker=worker, waits=False))

    def follow_logs(self, job: str, *, attempt: int | None = None, worker: str = DRIVER, tail: int | None = None) -> Iterator[str]:
        """The same as it grows, until the job (or the attempt, where one is given) has ended; the last `tail` lines first."""
        return follow(self, job, attempt=attempt, worker=worker, tail=tail, sleep=self.sleep)

    def log_part(self, job: str, *, attempt: int | None, worker: str, offset: int, tail: int | None) -> LogPart:
        params = _given(attempt=attempt, worker=worker, offset=offset, tail=tail)
        answer = self._http.request("GET", _path(job, "logs"), params=params)
        told = answer.headers
        return LogPart(
            text=answer.content,
            attempt=int(told["Maestro-Log-Attempt"]),
            next_offset=int(told["Maestro-Log-Next-Offset"]),
            is_end=told["Maestro-Log-End"] == "true",
        )

    def artifacts(self, job: str) -> list[Json]:
        artifacts: list[Json] = self._http.json("GET", _path(job, "artifacts"))["artifacts"]
        return artifacts

    def checkpoints(self, job: str, *, keep: Mapping[str, Any] | None = None) -> Json:
        """A job's training states, newest first, and what keeps each. keep: another policy, as in a spec, and what that would do; nothing
        is changed: `change(job, keep=…)` does that."""
        policy = dict(keep or {})
        best = policy.pop("best", None) or {}
        params = _given(**policy) | {f"best_{name}": value for name, value in best.items()}
        found = self._http.json("GET", _path(job, "checkpoints"), params=params)
        while found["next_cursor"] is not None:
            page = self._http.json("GET", _path(job, "checkpoints"), params=params | {"cursor": found["next_cursor"]})
            found = page | {"checkpoints": found["checkpoints"] + page["checkpoints"]}
        return found

    def pin(self, job: str, name: str) -> Json:
        """Keep an artifact whatever the policy for training states is, and the job as long as it is pinned."""
        return self._http.json("PUT", _path(job, "artifacts", *name.split("/"), "pin"))

    def unpin(self, job: str, name: str) -> Json:
        return self._http.json("DELETE", _path(job, "artifacts", *name.split("/"), "pin"))

    def download(self, job: str, name: str, to: Path, *, sha256: str | None = None) -> Path:
        """Download one artifact to the file `to`, going on where an earlier try was broken off, and check its sha256."""
        from service.client_downloads import Downloads

        return Downloads(self._http, job, _path(job, "artifacts")).file(name, to, sha256=sha256)

    def download_result(
        self, job: str, to: Path, *, format: ExportFormat = "timm", tell: "Tell | None" = None
    ) -> "tuple[EncoderManifest, Path]":
        """Download a job's committed result (an encoder, a probe) into the folder `to`, by its manifest, which is written last.

        Of an encoder only the files of `format`. A repeat goes on where an earlier call was broken off. Raises DownloadError.
        """
        from service.client_downloads import Downloads

        view = self.job(job)
        if view.get("result_uri") is None:
            raise DownloadError(f"job {job} has no committed result (it is {view['status']})")
        return Downloads(self._http, job, _path(job, "artifacts"), tell=tell).result(to, kind=view["kind"], format=format)

    def estimate(self, spec: Mapping[str, Any], *, num_images: int | None = None, project: str | None = None) -> Json:
        """Check a spec as `submit` would, and say what its run would take and whether the cluster has room. Nothing is submitted."""
        return self._http.json("POST", "/v1/estimates", json=dict(spec), params=_given(num_images=num_images, project=project))

    def cluster(self, *, project: str | None = None) -> Json:
        """Machines, devices, and the runs that hold them."""
        return self._http.json("GET", "/v1/cluster", params=_given(project=project))

    def recipes(self) -> list[Json]:
        """What a spec has where its user says nothing."""
        recipes: list[Json] = self._http.json("GET", "/v1/recipes")["recipes"]
        return recipes

    def create_token(self, name: str, *, role: TokenRole, project: str | None = None, expires_at: datetime | None = None) -> Json:
        """Make a user's token (as an admin); `token` in the answer is its text. Never repeated: a second would be made."""
        content = {"name": name, "role": role, "project": project, "expires_at": expires_at.isoformat() if expires_at else None}
        return self._http.decode(self._http.request_once("POST", "/v1/tokens", json=content))

    def tokens(self) -> list[Json]:
        tokens: list[Json] = self._http.json("GET", "/v1/tokens")["tokens"]
        return tokens

    def revoke_token(self, token: str) -> Json:
        """By its id."""
        return self._http.json("DELETE", f"/v1/tokens/{quote(token, safe='')}")

    def _job(self, method: str, path: str, **options: Any) -> Job:
        response = self._http.request(method, path, **options)
        return Job(self._http.decode(response), client=self, etag=response.headers.get("ETag"))


def _path(job: str, *rest: str) -> str:
    if not re.fullmatch(r"[a-z0-9]{1,40}", job):
        raise BadJobId(job)
    return "/".join(["/v1/jobs", *(quote(part, safe="") for part in (job, *rest))])


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _key(given: str | None) -> dict[str, str]:
    return {"Idempotency-Key": given or uuid.uuid4().hex}
