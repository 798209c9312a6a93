"""What every request has: an id, by which its lines in the log are found, a line where it changed something, its time in the figures."""

import logging
import re
import time

from fastapi.routing import iter_route_contexts
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import unexpected
from service.ids import chance
from service.processlog import about
from service.telemetry import Telemetry

log = logging.getLogger(__name__)

HEADER = "X-Request-Id"
_SANE = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_PATH = re.compile(r"/v1/jobs/([a-z0-9]{1,40})(?:/attempts/([0-9]{1,9})/)?")


class RequestLog:
    """The outermost part of the app: also what goes wrong in all others has its id."""

    def __init__(self, app: ASGIApp, *, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry
        self._templates: dict[int, str] = {}  # by route; a route itself knows no more than its router's part of the path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER.lower().encode(), b"")
        request_id = given.decode() if _SANE.fullmatch(given) else chance(16)
        named = _PATH.match(scope["path"])
        job, attempt = named.groups() if named else (None, None)
        with about(request=request_id, job=job, attempt=int(attempt) if attempt else None):
            await self._answer(scope, receive, send, request_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        began_at, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (HEADER.lower().encode(), request_id.encode())]
                self._note(scope, status, time.perf_counter() - began_at)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if status:
                raise  # half an answer is none: the connection breaks
            await unexpected()(scope, receive, noted)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """When the answer begins: a stream has no end of its own."""
        if not self._templates:
            self._templates = {id(context.original_route): str(context.path_format) for context in iter_route_contexts(scope["app"].routes)}
        route = self._templates.get(id(scope.get("route")), "none")
        self._telemetry.answered(scope["method"], route, status, seconds)
        changes = scope["method"] not in ("GET", "HEAD") and not route.endswith("/reports")
        if changes or status >= 500:
            log.info("%s %s: %d in %.0f ms", scope["method"], scope["path"], status, seconds * 1000)
