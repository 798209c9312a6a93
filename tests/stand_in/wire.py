"""As much of an HTTP/1.1 server as the stand-in needs: one task for each connection, and answers that can be withheld."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 500: "Internal Server Error"}
_MAX_CONNECTIONS = 1024


class NoAnswer(Exception):
    """The connection is closed without a word."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """Text, or what becomes JSON."""

    status: int
    content: Any

    def encoded(self) -> bytes:
        text = isinstance(self.content, str)
        body = (self.content if text else json.dumps(self.content)).encode()
        kind = "text/plain; charset=utf-8" if text else "application/json"
        head = f"HTTP/1.1 {self.status} {_REASONS[self.status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


Handler = Callable[[Request], Awaitable[Answer]]


async def listen(handler: Handler, *, port: int) -> asyncio.Server:
    """A server on the loopback interface; `handler` may raise NoAnswer."""
    return await asyncio.start_server(partial(_serve, handler), "127.0.0.1", port, backlog=_MAX_CONNECTIONS)


async def _serve(handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while (request := await _read(reader)) is not None:
            writer.write((await handler(request)).encoded())
            await writer.drain()
    except (NoAnswer, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader) -> Request | None:
    """None: the other side has hung up between two requests."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Request(method, unquote(urlsplit(target).path), headers, body)
