"""What a call of `MaestroClient` may raise.

MaestroError
├── Unreachable      no answer, after some patience
├── ApiError         the service refused: its problem+json, with `status`, `type`, `detail` and `errors`
└── DownloadError    bytes that do not have the checksum they should
"""

import contextlib
from typing import Any

import httpx

Json = dict[str, Any]


class MaestroError(Exception):
    """Something between this program and the service went wrong."""


class Unreachable(MaestroError):
    """The service does not answer."""


class DownloadError(MaestroError):
    """A file could not be downloaded as it should be."""


class ApiError(MaestroError):
    """The service refused a request."""

    def __init__(self, response: httpx.Response) -> None:
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
        fields = [f"{error.get('field')}: {error.get('message')}" for error in self.errors]
        super().__init__("; ".join(fields) if fields else self.detail)
