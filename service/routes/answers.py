"""Answers that carry NaN as strings: FastAPI's own serialization would make it null."""

from fastapi import Response
from pydantic import BaseModel

PROBLEMS: dict[int | str, dict[str, object]] = {
    401: {"description": "No valid token"},
    403: {"description": "The token is not good for this"},
    404: {"description": "There is no such thing"},
    422: {"description": "The request is not valid: `application/problem+json` with `errors: [{field, message}]`"},
}
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def answer(view: BaseModel, *, status_code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(view.model_dump_json(), status_code=status_code, headers=headers, media_type="application/json")
