"""The interface's description: what FastAPI makes of the routes, with names that stay and the errors' one form."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from service.views import ProblemView

DESCRIPTION = """Every error is `application/problem+json` (RFC 9457); its `type` says which, and stays the same."""


def operation_id(route: APIRoute) -> str:
    """The function's own name: what generated clients call the operation."""
    return route.name


def install(app: FastAPI) -> None:
    """Have the app describe itself so."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, description=DESCRIPTION, routes=app.routes)
            _, definitions = models_json_schema([(ProblemView, "serialization")], ref_template="#/components/schemas/{model}")
            schema["components"]["schemas"] |= definitions["$defs"]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
