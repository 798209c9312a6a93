"""`MaestroClient`: the HTTP interface from a user's program. Loads neither torch nor FastAPI nor SQLAlchemy.

Calls that change nothing, and those that a repeat does not change, are repeated while the service is away (it restarts in seconds).
"""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx

from mae_core.exports.formats import FOLDERS, ExportFormat
from service.client_errors import ApiError, DownloadError, Json, MaestroError, Unreachable
from service.client_logs import LogPart, follow
from workers.stored import DRIVER, MANIFEST, EncoderManifest, result_prefix

__all__ = ["ApiError", "DownloadError", "Json", "MaestroClient", "MaestroError", "Message", "TokenRole", "Unreachable"]

TokenRole = Literal["reader", "submitter", "admin"]
T = TypeVar("T")
_AWAY = (httpx.TransportError,)
_AWAY_STATUS = frozenset({429, 502, 503, 504})
_STREAM_TIMEOUT = httpx.Timeout(30.0, read=60.0)  # a stream that says nothing for a minute is opened anew


@dataclass(frozen=True)
class Message:
    """One message of a job's stream: an event (with its `id`), a `progress`, or the `end`."""

    event: str
    data: Json
    id: int | None = None


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
        self.url = url.rstrip("/")
        self._patience_seconds = patience_seconds
        self._sleep = sleep
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")  # a proxy in the environment is not for these
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=timeout_seconds,
            trust_env=not local,
            follow_redirects=False,
        )
        self._storage = httpx.Client(timeout=timeout_seconds, trust_env=not local)  # without our token: presigned URLs carry their own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()
        self._storage.close()

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None, project: str | None = None) -> Json:
        """Submit a spec. Safe to repeat: every try carries the same key, so that one job comes of it. project: an admin may choose."""
        key = idempotency_key or uuid.uuid4().hex
        params = {} if project is None else {"project": project}
        return self._json("POST", "/v1/jobs", json=dict(spec), params=params, headers={"Idempotency-Key": key})

    def jobs(
        self, *, status: str | None = None, kind: str | None = None, project: str | None = None, limit: int | None = None
    ) -> Iterator[Json]:
        """Jobs, newest first; all of them, or `limit`."""
        wanted = {"status": status, "kind": kind, "project": project}
        params: dict[str, str | int] = {name: value for name, value in wanted.items() if value is not None}
        left = limit
        while left is None or left > 0:
            page = self._json("GET", "/v1/jobs", params={**params, "limit": 200 if left is None else min(left, 200)})
            yield from page["jobs"]
            if page.get("next_cursor") is None:
                return
            left = None if left is None else left - len(page["jobs"])
            params["cursor"] = page["next_cursor"]

    def job(self, job: str) -> Json:
        return self._json("GET", _path(job))

    def pause(self, job: str) -> Json:
        """Has it save its training state and release its devices; `resume` goes on there."""
        return self._json("POST", _path(job, "pause"))

    def resume(self, job: str) -> Json:
        return self._json("POST", _path(job, "resume"))

    def cancel(self, job: str) -> Json:
        return self._json("POST", _path(job, "cancel"))

    def events(self, job: str, *, after: int = 0) -> Iterator[Json]:
        """All events of a job until now."""
        while True:
            page = self._json("GET", _path(job, "events"), params={"after": after})
            yield from page["events"]
            if not page["events"] or page["next_after"] in (None, after):
                return
            after = page["next_after"]

    def stream(self, job: str, *, after: int | None = None, patience_seconds: float = 300.0) -> Iterator[Message]:
        """A job's events and progress as they happen, until its `end`. A lost connection is taken up after the last event seen."""
        seen_at = time.monotonic()
        while True:
            headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": str(after)})
            trouble: Exception | None = None
            try:
                with self._http.stream("GET", _path(job, "events"), headers=headers, timeout=_STREAM_TIMEOUT) as response:
                    for message in parse_stream(self._check(response).iter_lines()):
                        after = message.id if message.id is not None else after
                        yield message
                        seen_at = time.monotonic()
                        if message.event == "end":
                            return
                seen_at = time.monotonic()
            except _AWAY as error:
                trouble = error
            except ApiError as error:
                if error.status not in _AWAY_STATUS:
                    raise
                trouble = error
            if trouble is not None and time.monotonic() - seen_at > patience_seconds:
                raise self._unreachable(trouble) from trouble
            self._sleep(1.0)

    def metrics(
        self,
        job: str,
        *,
        names: Sequence[str] = (),
        max_points: int | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
    ) -> Json:
        """`{name: {"steps": […], "values": […]}}`."""
        limits = {"max_points": max_points, "from_step": from_step, "to_step": to_step}
        params = ({"names": ",".join(names)} if names else {}) | {name: str(limit) for name, limit in limits.items() if limit is not None}
        series: Json = self._json("GET", _path(job, "metrics"), params=params)["series"]
        return series

    def logs(self, job: str, *, attempt: int | None = None, worker: str = DRIVER) -> str:
        """What a process of an attempt (the newest) has printed so far: the driver, which repeats its workers, or a worker by its rank."""
        return "".join(follow(self, job, attempt=attempt, worker=worker, waits=False))

    def follow_logs(self, job: str, *, attempt: int | None = None, worker: str = DRIVER, tail: int | None = None) -> Iterator[str]:
        """The same as it grows, until the job (or the attempt, where one is given) has ended; the last `tail` lines first."""
        return follow(self, job, attempt=attempt, worker=worker, tail=tail, sleep=self._sleep)

    def log_part(self, job: str, *, attempt: int | None, worker: str, offset: int, tail: int | None) -> LogPart:
        asked = {"attempt": attempt, "worker": worker, "offset": offset, "tail": tail}
        answer = self._request("GET", _path(job, "logs"), params={name: value for name, value in asked.items() if value is not None})
        told = answer.headers
        return LogPart(
            text=answer.content,
            attempt=int(told["Maestro-Log-Attempt"]),
            next_offset=int(told["Maestro-Log-Next-Offset"]),
            is_end=told["Maestro-Log-End"] == "true",
        )

    def artifacts(self, job: str) -> list[Json]:
        artifacts: list[Json] = self._json("GET", _path(job, "artifacts"))["artifacts"]
        return artifacts

    def create_token(self, name: str, *, role: TokenRole, project: str | None = None, expires_at: datetime | None = None) -> Json:
        """Make a user's token (as an admin); `token` in the answer is its text. Never repeated: a second would be made."""
        content = {"name": name, "role": role, "project": project, "expires_at": expires_at.isoformat() if expires_at else None}
        try:
            made: Json = self._check(self._http.post("/v1/tokens", json=content)).json()
        except _AWAY as error:
            raise self._unreachable(error) from error
        return made

    def tokens(self) -> list[Json]:
        tokens: list[Json] = self._json("GET", "/v1/tokens")["tokens"]
        return tokens

    def revoke_token(self, token: str) -> Json:
        """By its id."""
        return self._json("DELETE", f"/v1/tokens/{quote(token, safe='')}")

    def download(self, job: str, name: str, to: Path, *, sha256: str | None = None) -> Path:
        """Download one artifact to the file `to`, going on where an earlier try was broken off, and check its sha256."""
        if to.exists() and sha256 is not None and file_sha256(to) == sha256:
            return to
        to.parent.mkdir(parents=True, exist_ok=True)
        partial = to.with_name(f".{to.name}.partial")
        for last_try in (False, True):
            self._download(job, name, partial)
            found = file_sha256(partial)
            if sha256 is None or found == sha256:
                partial.replace(to)
                return to
            partial.unlink()  # perhaps the rest of another file: once more, from its beginning
            if last_try:
                raise DownloadError(f"{name} of job {job} has sha256 {found}, not {sha256}: it is damaged in the object store")
        raise AssertionError

    def download_result(self, job: str, to: Path, *, format: ExportFormat = "timm") -> tuple[EncoderManifest, Path]:
        """Download a job's committed result (an encoder, a probe) into the folder `to`, by its manifest, which is written last.

        Of an encoder only the files of `format`. A repeat goes on where an earlier call was broken off. Raises DownloadError.
        """
        view = self.job(job)
        if view.get("result_uri") is None:
            raise DownloadError(f"job {job} has no committed result (it is {view['status']})")
        prefix = result_prefix("", view["kind"])
        partial = to / f".{MANIFEST}"
        self.download(job, prefix + MANIFEST, partial)
        manifest = EncoderManifest.model_validate_json(partial.read_bytes())
        for name in files_of(manifest, format):
            path = to / safe_path(name.removeprefix(FOLDERS[format]))
            self.download(job, prefix + name, path, sha256=manifest.files[name].sha256)
        partial.replace(to / MANIFEST)
        return manifest, to

    def _download(self, job: str, name: str, partial: Path) -> None:
        def once() -> None:
            url = self._request("GET", _path(job, "artifacts", *name.split("/"))).headers["location"]
            have = partial.stat().st_size if partial.exists() else 0
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
            with self._storage.stream("GET", url, headers=headers) as response:
                if response.status_code == 416:  # all of it is here already, or it is another file: the checksum tells
                    return
                if response.status_code not in (200, 206):
                    raise DownloadError(f"{name} of job {job}: the object store answered {response.status_code}")
                with partial.open("ab" if response.status_code == 206 else "wb") as output:
                    for chunk in response.iter_bytes():
                        output.write(chunk)

        self._patiently(once)

    def _json(self, method: str, path: str, **options: Any) -> Json:
        answer: Json = self._request(method, path, **options).json()
        return answer

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._patiently(lambda: self._check(self._http.request(method, path, **options)))

    def _patiently(self, call: Callable[[], T]) -> T:
        deadline = time.monotonic() + self._patience_seconds
        pause = 0.2
        while True:
            try:
                return call()
            except _AWAY as error:
                if time.monotonic() + pause > deadline:
                    raise self._unreachable(error) from error
            except ApiError as error:
                pause = max(pause, error.retry_after_seconds if error.status == 429 else 0.0)
                if error.status not in _AWAY_STATUS or time.monotonic() + pause > deadline:
                    raise
            self._sleep(pause)
            pause = min(pause * 2, 2.0)

    def _check(self, response: httpx.Response) -> httpx.Response:
        if response.status_code >= 400:
            response.read()
            raise ApiError(response)
        return response

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(f"no answer from {self.url} ({error}); is the service running there (`maestro up`)?")


def parse_stream(lines: Iterator[str]) -> Iterator[Message]:
    """Server-sent events. Comments, which keep a connection alive, are left out."""
    fields: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
            continue
        if "data" in fields or "event" in fields:
            data = json.loads("\n".join(fields.get("data", [])) or "{}")
            number = fields.get("id", [""])[-1]
            yield Message(event=fields.get("event", ["message"])[-1], data=data, id=int(number) if number else None)
        fields = {}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(manifest: EncoderManifest, format: ExportFormat) -> list[str]:
    """Names of the files of one format of a result. Raises DownloadError where it has none, and says which there are."""
    if manifest.kind not in ("pretrain", "finetune"):
        if format != "timm":
            raise DownloadError(f"job {manifest.job} is of kind {manifest.kind}, which is not written as {format}; leave the format out")
        return list(manifest.files)
    by_folder: dict[str, list[str]] = {}
    for name in manifest.files:
        folder, slash, _ = name.partition("/")
        by_folder.setdefault(folder + slash if slash else "", []).append(name)
    if FOLDERS[format] in by_folder:
        return by_folder[FOLDERS[format]]
    there = ", ".join(name for name, folder in FOLDERS.items() if folder in by_folder)
    outcome = manifest.exports.get(format)
    why = outcome.left_out if outcome is not None else None
    raise DownloadError(f"job {manifest.job} was not written as {format}{f' ({why})' if why else ''}; there are {there}")


def safe_path(name: str) -> Path:
    """A manifest's file name as a path that stays inside its folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DownloadError(f"the manifest names the file {name!r}, which would lie outside its folder")
    return Path(*path.parts)


def _path(job: str, *rest: str) -> str:
    return "/".join(["/v1/jobs", *(quote(part, safe="") for part in (job, *rest))])
