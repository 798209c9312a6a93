"""HTTP as `MaestroClient` speaks it: what does not answer is asked again for a while, what refuses is an error with its problem.

Only what a repeat does not change is asked again: reads, changes that say the state to be in, and what carries an `Idempotency-Key`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from service.client_errors import TOO_MANY, ApiError, Json, MaestroError, NotMaestro, StorageAway, Unreachable

T = TypeVar("T")
_STREAM_TIMEOUT = httpx.Timeout(30.0, read=60.0)  # a stream that says nothing for a minute is opened anew
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 2.0
GONE = 404
_STORAGE_AWAY = frozenset({500, 502, 503, 504})


class Http:
    """One service, and the object store that it sends to. `patience_seconds` is how long a call asks one that is away again."""

    def __init__(self, url: str, token: str, *, patience_seconds: float, timeout_seconds: float, sleep: Callable[[float], None]) -> None:
        self.url = _checked_url(url)
        self.sleep = sleep
        self._patience_seconds = patience_seconds
        if not (token.isascii() and token.isprintable() and token.strip() == token):
            raise MaestroError("the token has characters that no token has; copy it again")
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")  # a proxy in the environment is not for these
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=timeout_seconds,
            trust_env=not local,
            follow_redirects=False,
        )
        self._storage = httpx.Client(timeout=timeout_seconds, trust_env=not local)  # without our token: presigned URLs carry their own

    def close(self) -> None:
        self._http.close()
        self._storage.close()

    def json(self, method: str, path: str, **options: Any) -> Json:
        return self.decode(self.request(method, path, **options))

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.patiently(lambda: self.check(self._http.request(method, path, **options)))

    def request_once(self, method: str, path: str, **options: Any) -> httpx.Response:
        """What a repeat would do a second time, or what is repeated as a part of something else."""
        try:
            return self.check(self._http.request(method, path, **options))
        except httpx.TransportError as error:
            raise self.unreachable(error) from error

    def delete(self, path: str) -> None:
        """ApiError 404 where there is no such thing, unless an earlier try, whose answer was lost, has deleted it."""
        tries = 0

        def once() -> httpx.Response:
            nonlocal tries
            tries += 1
            return self.check(self._http.request("DELETE", path))

        try:
            self.patiently(once)
        except ApiError as error:
            if error.status != GONE or tries == 1:
                raise

    @contextmanager
    def stream(self, path: str, *, headers: dict[str, str], params: dict[str, str]) -> Iterator[httpx.Response]:
        with self._http.stream("GET", path, headers=headers, params=params, timeout=_STREAM_TIMEOUT) as response:
            yield self.check(response)

    @contextmanager
    def stored(self, url: str, *, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """An answer of the object store. StorageAway where there is none."""
        try:
            with self._storage.stream("GET", url, headers=headers) as response:
                if response.status_code in _STORAGE_AWAY:
                    raise StorageAway(f"object storage at {_host(url)} answered {response.status_code}; try again later")
                yield response
        except httpx.TransportError as error:
            raise StorageAway(
                f"no answer from object storage at {_host(url)} ({error}); if it can never be reached under this name, the service's "
                "MAESTRO_S3_PUBLIC_ENDPOINT is to be another"
            ) from error

    def patiently(self, call: Callable[[], T], *, progress: Callable[[], int] = lambda: 0) -> T:
        """`call`, again and again where who is asked is away. progress: how far it has come; who brings it further is not away."""
        patience = _Patience(self._patience_seconds)
        while True:
            try:
                return call()
            except httpx.TransportError as error:
                wait = patience.pause(progress())
                if wait is None:
                    raise self.unreachable(error) from error
            except (ApiError, Unreachable) as error:
                asked_for = error.retry_after_seconds if isinstance(error, ApiError) and error.status == TOO_MANY else 0.0
                wait = patience.pause(progress(), at_least=asked_for) if error.is_away else None
                if wait is None:
                    raise
            self.sleep(wait)

    def check(self, response: httpx.Response) -> httpx.Response:
        if response.status_code >= 400:
            response.read()
            raise ApiError(response)
        return response

    def decode(self, response: httpx.Response) -> Json:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise NotMaestro(self.url)
        return answer

    def unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(f"no answer from {self.url} ({error}); is the service running there (`maestro up`)?")


class _Patience:
    """With one that is away: from the first of a row of failures on, however long the calls before and between take."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: float | None = None
        self._furthest = 0
        self._pause = _FIRST_PAUSE_SECONDS

    def pause(self, progress: int, *, at_least: float = 0.0) -> float | None:
        """After a failure: how long to wait before the next try. None: it has been away for too long."""
        now = time.monotonic()
        if self._until is None or progress > self._furthest:
            self._until, self._furthest, self._pause = now + self._seconds, progress, _FIRST_PAUSE_SECONDS
        wait = max(self._pause, at_least)
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        return wait if now + wait <= self._until else None


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or not url.isprintable():
        raise MaestroError(f"{url[:200]!r} is no service's address; write it as http://host:port")
    return url.rstrip("/")


def _host(url: str) -> str:
    """Without the signature that follows."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
