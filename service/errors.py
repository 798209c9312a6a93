"""What can go wrong in the service, and how it is told: RFC 9457 problem+json.

Problem
├── BadRequest            400
├── MethodNotAllowed      405
├── BodyTooSlow           408
├── ContentTooLarge       413
├── UnsupportedMediaType  415
├── Invalid               422  a field of the request; names it and the remedy
├── NotAuthenticated      401
├── Forbidden             403
├── NotFound              404
│   ├── NoSuchJob              also where it is another project's
│   └── NoSuchWebhook          the same
├── NotAcceptable         406
├── Conflict              409
│   └── StaleAttempt           a report of an attempt that is not the job's current one
├── PreconditionFailed    412  the thing was changed since it was read
├── PreconditionRequired  428  a change says what it was based on
├── TooManyRequests       429  of one token, or of one address without a good one
└── Unavailable           503  something we need does not answer; try again
    ├── StorageUnreachable
    │   └── StorageRefuses     it answers, and refuses us
    └── RayUnreachable
"""

import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from mae_core.config import EmbedSpec, EvaluateSpec, FinetuneSpec, PretrainSpec, ProbeSpec

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 5
_SHOWN = 100  # characters of what was sent, where an error tells it


class Problem(Exception):
    """An error of MAEstro itself. See the API's log, and report it with that.

    Subclasses are errors with an answer of their own. docs/reference/problems.md has each docstring: what it means, and what to do.
    """

    status = 500
    type = "internal-error"
    title = "Internal error"

    def __init__(self, detail: str, *, errors: Sequence[Mapping[str, str]] = (), headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


class Invalid(Problem):
    """The request cannot be carried out as it is. Mend the fields in `errors`."""

    status, type, title = 422, "invalid-request", "The request is not valid"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", errors=[{"field": field, "message": message}])


class NotAuthenticated(Problem):
    """No token, a wrong one, or one that has expired or was revoked. Send one that is good."""

    status, type, title = 401, "not-authenticated", "A valid token is needed"

    def __init__(self, detail: str = "Send the header `Authorization: Bearer <token>` with a valid token.") -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(Problem):
    """The token is good, but not for this. Use one of another role or project."""

    status, type, title = 403, "forbidden", "The token is not good for this"


class NotFound(Problem):
    """There is no such thing, or not in the token's project."""

    status, type, title = 404, "not-found", "Not found"


class NoSuchJob(NotFound):
    """There is no such job in the caller's project."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job {job_id[:_SHOWN]}.")


class NoSuchWebhook(NotFound):
    """There is no such webhook in the caller's project."""

    def __init__(self, webhook_id: str) -> None:
        super().__init__(f"There is no webhook {webhook_id}.")


class NotAcceptable(Problem):
    """It is a stream of events alone. Send `Accept: text/event-stream`."""

    status, type, title = 406, "not-acceptable", "Not in this form"

    def __init__(self) -> None:
        super().__init__("This is a stream of events: send the header `Accept: text/event-stream`.")


class Conflict(Problem):
    """The thing is not in a state that allows this. The detail says which state would."""

    status, type, title = 409, "conflict", "Not possible now"


class StaleAttempt(Conflict):
    """(Workers.) The attempt is not the job's current one, or has ended: stop."""

    type, title = "stale-attempt", "The attempt is over"


class PreconditionFailed(Problem):
    """Somebody changed it since it was read. Read it again, and send its new ETag."""

    status, type, title = 412, "precondition-failed", "Changed meanwhile"


class PreconditionRequired(Problem):
    """A change says what it is based on. Send the ETag that was read as `If-Match`."""

    status, type, title = 428, "precondition-required", "If-Match is needed"


class TooManyRequests(Problem):
    """The caller asks more often than it may. Wait `Retry-After` seconds."""

    status, type, title = 429, "too-many-requests", "Too many requests"

    def __init__(self, seconds: int) -> None:
        super().__init__(f"Wait {seconds} s, and ask less often.", headers={"Retry-After": str(seconds)})


class Unavailable(Problem):
    """Something that the service needs does not answer. Try again after `Retry-After` seconds."""

    status, type, title = 503, "unavailable", "Not available now"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


class StorageUnreachable(Unavailable):
    """Object storage does not answer, or refuses us. Try again after `Retry-After` seconds."""

    type, title = "storage-unreachable", "Object storage does not answer"


class StorageRefuses(StorageUnreachable):
    """It answers, but not to us: keys, rights or a clock are wrong."""


class RayUnreachable(Unavailable):
    """The Ray cluster does not answer, or refuses us: what it does is unknown. Try again after `Retry-After` seconds."""

    type, title = "ray-unreachable", "The Ray cluster does not answer"


class BadRequest(Problem):
    """The request cannot be read. Send JSON."""

    status, type, title = 400, "bad-request", "The request cannot be read"


class MethodNotAllowed(Problem):
    """There is no such method here. `Allow` has those that there are."""

    status, type, title = 405, "method-not-allowed", "This address has no such method"


class BodyTooSlow(Problem):
    """The body did not come. Send it again: it has a minute."""

    status, type, title = 408, "body-too-slow", "The body did not come"


class UnsupportedMediaType(Problem):
    """The body is in no form that is read here. Send it without `Content-Encoding`."""

    status, type, title = 415, "unsupported-media-type", "The body is in no form that is read here"


class ContentTooLarge(Problem):
    """The body is too large. Send less."""

    status, type, title = 413, "content-too-large", "The body is too large"


# what the framework refuses before a route is asked
_OF_HTTP: dict[int, type[Problem]] = {
    kind.status: kind for kind in (BadRequest, NotFound, MethodNotAllowed, BodyTooSlow, ContentTooLarge, UnsupportedMediaType)
}


def all_problems() -> dict[str, type[Problem]]:
    """Every `type` that an answer may have, without `urn:maestro:`, and the first of the classes that have it."""
    kinds, found = [Problem], dict[str, type[Problem]]()
    while kinds:
        kind = kinds.pop(0)
        kinds += kind.__subclasses__()
        found.setdefault(kind.type, kind)
    return found


def install(app: FastAPI) -> None:
    """Make every error of this app a problem+json."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    for away in (OperationalError, InterfaceError, PoolTimeout):
        app.add_exception_handler(away, _on_database)


def spec_errors(errors: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Pydantic's errors as (field, message), the field as a user writes it: `model.image_size`."""
    return [_spec_error(error) for error in errors]


def _spec_error(error: Mapping[str, Any]) -> dict[str, str]:
    kind, message = error["type"], str(error["msg"]).removeprefix("Value error, ")
    path = [str(part) for part in error["loc"] if part not in ("body", "query", "path", "header")]
    if path and path[0] in _KINDS:
        path = path[1:]
    field = ".".join(path)[:_SHOWN]
    if kind == "json_invalid":
        return {"field": "body", "message": f"the body is not JSON: {error.get('ctx', {}).get('error', message)}"}
    if kind.startswith("union_tag"):
        return {"field": "kind", "message": f"write one of {', '.join(_KINDS)}"}
    if kind == "extra_forbidden":
        near = get_close_matches(field, _FIELDS, n=1)
        return {"field": field, "message": "there is no such field here" + (f"; did you mean {near[0]}?" if near else "")}
    field = _named_field(field, message)
    return {"field": field or "body", "message": message.removeprefix(f"{field.rpartition('.')[2]}: ").removeprefix(f"{field}: ")}


def _named_field(path: str, message: str) -> str:
    """A check over several fields is told of the section; its message begins with the field it means."""
    match = re.match(r"[a-z_]+(\.[a-z_]+)*", message)
    lead = match[0] if match else ""
    return next((name for name in (f"{path}.{lead}".lstrip("."), lead) if name in _FIELDS), path)


def _field_paths(model: type[BaseModel], prefix: str = "") -> set[str]:
    paths = set()
    for name, field in model.model_fields.items():
        paths.add(prefix + name)
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                paths |= _field_paths(part, f"{prefix}{name}.")
    return paths


_KINDS: dict[str, type[BaseModel]] = {
    "pretrain": PretrainSpec,
    "probe": ProbeSpec,
    "finetune": FinetuneSpec,
    "evaluate": EvaluateSpec,
    "embed": EmbedSpec,
}
_FIELDS = set[str]().union(*(_field_paths(spec) for spec in _KINDS.values()))


def _problem(
    *, status: int, type: str, title: str, detail: str, errors: Sequence[Mapping[str, str]] = (), headers: Any = None
) -> JSONResponse:
    body: dict[str, Any] = {"type": f"urn:maestro:{type}", "title": title, "status": status, "detail": detail}
    if errors:
        body["errors"] = list(errors)
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE, headers=headers)


def answer_of(error: Problem) -> JSONResponse:
    """For whoever stands outside of the routes."""
    return _problem(
        status=error.status, type=error.type, title=error.title, detail=error.detail, errors=error.errors, headers=error.headers
    )


def _on_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return answer_of(error)


def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = spec_errors(error.errors())
    detail = "; ".join(f"{item['field']}: {item['message']}" for item in errors)
    return _problem(status=Invalid.status, type=Invalid.type, title=Invalid.title, detail=detail, errors=errors)


def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = _OF_HTTP.get(error.status_code, Problem)
    detail = f"{request.method} {request.url.path[:_SHOWN]}: {error.detail}"
    return _problem(status=error.status_code, type=kind.type, title=kind.title, detail=detail, headers=error.headers)


def _on_database(request: Request, error: Exception) -> JSONResponse:
    log.error("the database does not answer: %s", error)
    return _on_problem(request, Unavailable("The database does not answer now; try again."))


def unreadable() -> JSONResponse:
    """The answer to what is no HTTP."""
    return answer_of(BadRequest("This is no HTTP request, or its address and headers have more than 64 kB."))


def unexpected() -> JSONResponse:
    """The answer to an error of our own: nothing of it is for the client."""
    return _problem(status=500, type=Problem.type, title=Problem.title, detail="An error in MAEstro itself; it is in the API's log.")
