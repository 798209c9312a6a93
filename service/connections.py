"""The wire below the routes: what is no HTTP is answered as a problem, and nobody keeps a connection by sending slowly."""

import asyncio
import contextlib

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.errors import unreadable

PATIENCE_SECONDS = 20.0  # for a request's head, and for the rest of a body that is answered already


class Connection(H11Protocol):
    """uvicorn's own, which has no such limits. Bodies that somebody reads have theirs in `service.bodylimit`."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        answer = unreadable()
        head = h11.Response(status_code=answer.status_code, headers=[*answer.raw_headers, (b"connection", b"close")], reason=b"Bad Request")
        with contextlib.suppress(h11.LocalProtocolError):  # another answer has begun: it breaks off
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _watch(self) -> None:
        """The time runs while there is no request to answer, and is not given anew for what comes of one."""
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._unwatch()
        elif self._limit is None:
            self._limit = self.loop.call_later(PATIENCE_SECONDS, self.timeout_keep_alive_handler)

    def _unwatch(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
