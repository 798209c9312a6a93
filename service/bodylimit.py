"""Bodies above a limit are answered 413 before they fill the memory."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2**20
MAX_REPORT_BYTES = 4 * 2**20


class BodyLimit:
    """Counts what is received; the length that a client announces is believed only where it is too much."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = MAX_REPORT_BYTES if scope["path"].endswith("/reports") else MAX_BODY_BYTES
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        received = 0

        async def limited() -> Message:
            nonlocal received
            if announced.isdigit() and int(announced) > limit:
                raise HTTPException(413, "Content Too Large")
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, "Content Too Large")
            return message

        await self._app(scope, limited, send)
