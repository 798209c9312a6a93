"""Bodies that are too large, too slow or packed are refused before they fill the memory."""

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2**20
MAX_REPORT_BYTES = 4 * 2**20
MAX_BODY_SECONDS = 60.0  # 70 kB/s for the largest


class BodyLimit:
    """Counts what is received; the length that a client announces is believed only where it is too much."""

    def __init__(self, app: ASGIApp, *, max_seconds: float = MAX_BODY_SECONDS) -> None:
        self._app = app
        self._max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = MAX_REPORT_BYTES if scope["path"].endswith("/reports") else MAX_BODY_BYTES
        received, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._max_seconds

        async def limited() -> Message:
            nonlocal received, is_whole
            _check_head(headers, limit)
            try:
                async with asyncio.timeout_at(None if is_whole else deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body has not come in {self._max_seconds:g} s; send it again, or in smaller parts") from None
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, limited, send)


def _check_head(headers: Headers, limit: int) -> None:
    announced = headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
        raise _too_large(limit)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "bodies are read as they are; send it without Content-Encoding", {"Accept-Encoding": "identity"})


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"a body may have {limit // 2**20} MiB here; send less, or in parts")
