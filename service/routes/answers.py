"""Answers that carry NaN as strings (FastAPI's own serialization would make it null), and what is documented of errors."""

from typing import Annotated, Any

from fastapi import Header, Response
from pydantic import BaseModel

from service.errors import MEDIA_TYPE
from service.views import ProblemView

_DESCRIPTIONS = {
    400: "The body cannot be read",
    401: "No valid token",
    403: "The token is not good for this",
    404: "There is no such thing",
    406: "It is a stream alone: `Accept: text/event-stream`",
    408: "The body did not come in a minute",
    409: "It is not in a state that allows this",
    412: "It was changed meanwhile",
    413: "The body is too large",
    415: "The body has a Content-Encoding",
    422: "The request is not valid; `errors` names the fields",
    428: "`If-Match` is needed",
    429: "More often than this token may ask; try again after `Retry-After` seconds",
    503: "Something that is needed does not answer; try again after `Retry-After` seconds",
}
_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
IfNoneMatch = Annotated[str | None, Header(max_length=4000, description="ETag of an answer that is at hand: 304 while it is the same")]
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "What `If-None-Match` names is still what there is"}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`."""
    content = {MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{ProblemView.__name__}"}}}
    told = {status: {"description": _DESCRIPTIONS[status], "content": content} for status in statuses}
    return {status: answer | ({"headers": _RETRY_AFTER} if status in (429, 503) else {}) for status, answer in told.items()}


PROBLEMS = problems(400, 401, 403, 404, 408, 413, 415, 422, 429, 503)


def answer(view: BaseModel, *, status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(view.model_dump_json(), status_code=status_code, headers=headers, media_type="application/json")


def unchanged(tag: str) -> Response:
    return Response(status_code=304, headers={"ETag": tag})
