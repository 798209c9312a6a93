"""The interface's description: what FastAPI makes of the routes, with names that stay and the errors' one form."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from service.views import ProblemView

DESCRIPTION = """Every error is `application/problem+json` (RFC 9457); its `type` says which, and stays the same."""


_PRETRAIN: dict[str, Any] = {
    "kind": "pretrain",
    "name": "my cells",
    "labels": {"team": "cells"},
    "model": {"arch": "vit_tiny_patch16", "image_size": 224},
    "data": {"source": "/data/cells"},
    "optim": {"epochs": 100, "batch_size": 256},
    "resources": {"num_workers": 2},
}
_SPECS = {
    "pretrain": {"summary": "Pretrain an encoder on images without labels", "value": _PRETRAIN},
    "probe": {
        "summary": "Measure an encoder by a linear probe",
        "value": {
            "kind": "probe",
            "name": "probe of my cells",
            "encoder": {"init": "random"},
            "model": _PRETRAIN["model"],
            "data": {"source": "/data/labelled", "validation_fraction": 0.2},
        },
    },
    "elastic": {
        "summary": "Go on with the machines that are left",
        "value": _PRETRAIN | {"resources": {"num_workers": {"min": 1, "max": 8}}, "priority": 10},
    },
}
EXAMPLES: dict[tuple[str, str], dict[str, Any]] = {
    ("/v1/jobs", "post"): _SPECS,
    ("/v1/estimates", "post"): _SPECS,
    ("/v1/jobs/{job_id}", "patch"): {
        "labels": {"summary": "Other labels, in place of all there are", "value": {"labels": {"team": "cells", "stage": "final"}}},
        "priority": {"summary": "Before the others", "value": {"priority": 100, "notes": "for Friday"}},
    },
    ("/v1/tokens", "post"): {
        "submitter": {"summary": "For a person", "value": {"name": "Ada's laptop", "role": "submitter", "project": "cells"}}
    },
}


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
            for (path, method), examples in EXAMPLES.items():
                schema["paths"][path][method]["requestBody"]["content"]["application/json"]["examples"] = examples
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
