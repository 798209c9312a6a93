"""What a call of `MaestroClient` may raise.

MaestroError
├── Unreachable      no answer, after some patience
│   └── StorageAway       of the object store, where files are downloaded from
├── NotMaestro       an answer, but of something else
├── ApiError         the service refused: its problem+json, with `status`, `type`, `detail` and `errors`
├── DownloadError    bytes that do not have the checksum they should, or that cannot be written
├── BadJobId         no job can have such an id
├── LibraryMissing   a model cannot be loaded without a library that is not installed
├── JobFailed        the job waited for has ended, but not by success; `job` is it
└── WaitTimeout      the job waited for has not ended in time; a TimeoutError, too
"""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from service.user_errors import JOB_FAILED, REFUSED, UNREACHABLE, WRONG_USAGE, UserError

if TYPE_CHECKING:
    import httpx

Json = dict[str, Any]
TOO_MANY = 429
AWAY_STATUS = frozenset({502, 503, 504})  # it, or something that it needs, may be back in seconds


class MaestroError(UserError):
    """Something between this program and the service went wrong."""


class Unreachable(MaestroError):
    """The service does not answer."""

    exit_code = UNREACHABLE
    is_away = True


class StorageAway(Unreachable):
    """The object store does not answer."""


class NotMaestro(MaestroError):
    """Something else than a service of ours answers."""

    exit_code = UNREACHABLE

    def __init__(self, url: str, *, what: str = "") -> None:
        super().__init__(f"what answers at {url} is not MAEstro{what}; check MAESTRO_URL")


class DownloadError(MaestroError):
    """A file could not be downloaded as it should be."""


class BadJobId(MaestroError):
    """A text that is no job's id."""

    exit_code = WRONG_USAGE

    def __init__(self, given: str) -> None:
        super().__init__(f"{given[:100]!r} is no job's id, which has small letters and digits; `maestro jobs` lists them")


class LibraryMissing(MaestroError):
    """A library that is needed is not installed."""


class JobFailed(MaestroError):
    """A job has ended, but not by success."""

    exit_code = JOB_FAILED

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        why = "; ".join(str(job[name]) for name in ("reason", "detail", "reason_message") if job.get(name))
        super().__init__(f"job {job['id']} {job['status']}{f': {why}' if why else ''}")


class WaitTimeout(MaestroError, TimeoutError):
    """A job has not ended in time."""


class ApiError(MaestroError):
    """The service refused a request. `retry_after_seconds`: when it asked for patience."""

    def __init__(self, response: "httpx.Response") -> None:
        problem: Json = {}
        with contextlib.suppress(ValueError):
            body = response.json()
            problem = body if isinstance(body, dict) else {}
        self.status = response.status_code
        after = response.headers.get("Retry-After", "")
        self.retry_after_seconds = float(after) if after.isdecimal() else 0.0
        self.type = str(problem.get("type", "about:blank"))
        self.detail = str(problem.get("detail") or problem.get("title") or response.text[:200] or response.reason_phrase)
        self.errors: list[Json] = problem.get("errors") or []
        self.exit_code = UNREACHABLE if self.is_away else REFUSED
        fields = [f"{error.get('field')}: {error.get('message')}" for error in self.errors]
        super().__init__("; ".join(fields) if fields else self.detail)

    @property
    def is_away(self) -> bool:
        """Whether the same request may be answered later."""
        return self.status in AWAY_STATUS or self.status == TOO_MANY
