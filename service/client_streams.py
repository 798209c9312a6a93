"""Events as they happen, over server-sent events. A connection that is lost is taken up after the last event seen."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx

from service.client_errors import ApiError, Json
from service.client_http import Http

_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Message:
    """One message of a stream: an event (with its `id`), a `progress`, or the `end` of a job's."""

    event: str
    data: Json
    id: int | None = None


def follow(
    http: Http,
    path: str,
    *,
    params: dict[str, str],
    after: int | None,
    patience_seconds: float,
    on_away: Callable[[Exception], None] | None = None,
) -> Iterator[Message]:
    """Messages until an `end`, or for ever. on_away: told each time that the service does not answer."""
    heard_at = time.monotonic()

    def heard(lines: Iterator[str]) -> Iterator[str]:
        """Comments too, with which a service that has nothing to tell says that it is there."""
        nonlocal heard_at
        for line in lines:
            heard_at = time.monotonic()
            yield line

    while True:
        headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": str(after)})
        trouble: Exception | None = None
        try:
            with http.stream(path, headers=headers, params=params) as response:
                for message in parse_stream(heard(response.iter_lines())):
                    after = message.id if message.id is not None else after
                    yield message
                    heard_at = time.monotonic()
                    if message.event == "end":
                        return
            heard_at = time.monotonic()
        except httpx.TransportError as error:
            trouble = error
        except ApiError as error:
            if not error.is_away:
                raise
            trouble = error
        if trouble is not None:
            if time.monotonic() - heard_at > patience_seconds:
                raise http.unreachable(trouble) from trouble
            if on_away is not None:
                on_away(trouble)
        http.sleep(_PAUSE_SECONDS)


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
