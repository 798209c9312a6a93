"""Entity tags: what an answer shows, in a few characters, so that who has it already is told just that (304).

A job's tag is `"<editable>-<all>"`: the part before the dash covers what `PATCH` changes, the whole all that is shown. `If-Match` compares
the first part alone: a run's progress is no reason to refuse a change of its name.
"""

import hashlib
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pydantic_core import to_json

from service import conditions
from service.models import JobRow

EDITABLE = ("name", "labels", "priority", "notes", "keep")
# of what is shown; the spec, which is large, is never changed without the version
_SHOWN = (
    *("version", "progress", "metrics", "reason", "detail", "status", "desired_state", "attempt", "result_uri"),
    *("started_at", "finished_at"),
)


def of_job(job: JobRow, *, now: datetime) -> str:
    """Of a row of an open session, whose spec is not read."""
    editable = _digest(getattr(job, name) for name in EDITABLE)
    return f'"{editable}-{_digest([editable, *(getattr(job, name) for name in _SHOWN), conditions.read(job, now=now)])}"'


def of_values(values: Iterable[Any]) -> str:
    return f'"{_digest(values)}"'


def has(header: str | None, tag: str) -> bool:
    """Whether a header `If-None-Match` names the tag. A proxy that compresses makes tags weak (`W/`): they are as good here."""
    return header is not None and any(given in ("*", tag) for given in _given(header))


def is_edited_since(header: str, tag: str) -> bool:
    """Whether what can be edited is no longer as in any of the tags of a header `If-Match`."""
    editable = tag.partition("-")[0]
    return not any(given == "*" or given.partition("-")[0] == editable for given in _given(header))


def _given(header: str) -> list[str]:
    return [part.strip().removeprefix("W/") for part in header.split(",")]


def _digest(values: Iterable[Any]) -> str:
    return hashlib.blake2b(to_json(list(values), inf_nan_mode="strings"), digest_size=8).hexdigest()
