"""How many requests one caller may make: a token bucket for each token that is good, one for each address that shows none.

A request with a token that was good before counts for that token. Any other counts for its client's address, once it has shown to be
nobody's: whoever guesses is slowed down, before a body is read or the database is asked, and not who comes from there with a good token.
"""

import hashlib
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from math import ceil

from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import TooManyRequests, answer_of
from service.telemetry import Telemetry

BURST_SECONDS = 10.0  # of the rate may come at once
NOBODY = 0.1  # of the rate is for an address that shows no good token
MAX_CALLERS = 20_000  # some 5 MB
UNLIMITED = ("/livez", "/readyz", "/", "/favicon.ico")  # cheap; and whoever watches over this process must not take it for dead
UNLIMITED_FOLDER = "/dashboard/"  # its files lie in memory, and a page that begins needs some forty of them without a token


def note_known(request: Request) -> None:
    """Its token is good: `service.auth` says so."""
    request.state.is_caller_known = True


class Buckets:
    """Token buckets by caller. Beyond so many, those that were not used for longest are forgotten, as if they were full."""

    def __init__(self, rate: float, *, clock: Callable[[], float]) -> None:
        self._rate, self._burst = rate, rate * BURST_SECONDS
        self._clock = clock
        self._levels: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # what was left, and when

    def __contains__(self, caller: bytes) -> bool:
        return caller in self._levels

    def forget(self, caller: bytes) -> None:
        self._levels.pop(caller, None)

    def wait(self, caller: bytes) -> int:
        """Whole seconds until the caller may ask again; 0: it may now."""
        return ceil(max(1.0 - self._level(caller), 0.0) / self._rate)

    def take(self, caller: bytes) -> None:
        """Counts one request. Some that came at the same moment may be owed for."""
        self._levels[caller] = (self._level(caller) - 1.0, self._clock())
        self._levels.move_to_end(caller)
        if len(self._levels) > MAX_CALLERS:
            self._levels.popitem(last=False)

    def _level(self, caller: bytes) -> float:
        left, at = self._levels.get(caller, (self._burst, 0.0))
        return min(left + (self._clock() - at) * self._rate, self._burst)


class RateLimit:
    """429 with `Retry-After` before anything of a request is read."""

    def __init__(self, app: ASGIApp, *, rate: float, telemetry: Telemetry, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._telemetry = telemetry
        self._tokens = Buckets(rate, clock=clock)
        self._addresses = Buckets(rate * NOBODY, clock=clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNLIMITED or scope["path"].startswith(UNLIMITED_FOLDER):
            await self._app(scope, receive, send)
            return
        token, address = _token(scope), _address(scope)
        is_known = token in self._tokens
        wait = self._tokens.wait(token) if is_known else self._addresses.wait(address)
        if wait:
            self._telemetry.limited.labels("token" if is_known else "address").inc()
            await answer_of(TooManyRequests(wait))(scope, receive, send)
            return
        if is_known:
            self._tokens.take(token)
        state = scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 401:
                    self._tokens.forget(token)
                if state.get("is_caller_known") and not is_known:
                    self._tokens.take(token)
                elif message["status"] == 401 or not is_known:
                    self._addresses.take(address)
            await send(message)

        await self._app(scope, receive, noted)


def _token(scope: Scope) -> bytes:
    """The bearer's token as `service.auth` sees it, hashed: no secret is kept, and none is long."""
    scheme, token = get_authorization_scheme_param(Headers(scope=scope).get("authorization"))
    return hashlib.sha256(token.encode()).digest() if scheme.lower() == "bearer" else b""


def _address(scope: Scope) -> bytes:
    """The client's; of IPv6 the network that one customer has."""
    try:
        address = ipaddress.ip_address((scope.get("client") or ("",))[0])
    except ValueError:
        return b""
    return address.packed[:8] if address.version == 6 else address.packed
