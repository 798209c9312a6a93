"""The log of our processes: to stderr, one line a fact, for people or (MAESTRO_LOG_FORMAT=json) for programs.

Each line says of which request, job and attempt it tells, as far as that is known where it is written: `about(...)`.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]
_about: ContextVar[Mapping[str, str | int]] = ContextVar("about", default={})  # noqa: B039 (nobody changes it)


@contextmanager
def about(**known: str | int | None) -> Iterator[None]:
    """What is logged in the block tells of this request, job or attempt; None: not known."""
    token = _about.set({**_about.get(), **{name: value for name, value in known.items() if value is not None}})
    try:
        yield
    finally:
        _about.reset(token)


def configure_logging(log_format: LogFormat = "text") -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "botocore", "alembic"):  # they tell of every request
        logging.getLogger(name).setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """For people: what it is about in brackets at the end of the first line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        told = " ".join(f"{name}={value}" for name, value in _about.get().items())
        return super().formatMessage(record) + (f" [{told}]" if told else "")


class JsonFormatter(logging.Formatter):
    """One JSON object a line, whatever the message has in it."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_about.get(),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)
