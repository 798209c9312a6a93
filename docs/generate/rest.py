"""The page of the HTTP interface, from its OpenAPI description."""

from typing import Any

from docs.generate import markdown, schema
from docs.generate.markdown import anchor, code, prose, sentence, table
from mae_core import config, options
from mae_core.exports import formats
from service.app import create_app
from service.settings import Settings

INTRODUCTION = """JSON over HTTP, below `/v1`, with `Authorization: Bearer <token>`. A running service shows the same as `/docs`, and its
description in OpenAPI as `/openapi.json`; operation ids stay, so that clients can be generated from it. Errors are
[problems](problems.md). [ARCHITECTURE.md](../../ARCHITECTURE.md#who-may-do-what) says which token may do what, and [how to use the HTTP
interface](../how-to/http.md) shows it at work."""
# What is needed to make the app. It is never started, nothing of these is looked at.
_SETTINGS = {
    "database_url": "sqlite:////nowhere/maestro.db",
    "secret_key": "-" * 32,
    "api_token": "-" * 32,
    "service_url": "http://127.0.0.1:1",
    "ray_url": "http://127.0.0.1:1",
    "ray_token": "-",
    "s3_bucket": "nowhere",
}
_ELSEWHERE = {"JobStatus": "[status](reasons.md#statuses)", "Reason": "[reason](reasons.md#reasons)", "EventType": "[type](events.md)"}
_METHODS = ("get", "post", "patch", "put", "delete")


def description() -> dict[str, Any]:
    return create_app(Settings.model_validate(_SETTINGS)).openapi()


def page() -> str:
    told = description()
    fields = told["components"]["schemas"]
    shown = {name for name, node in fields.items() if "properties" in node and not _is_of_spec(name)}

    def name_of(name: str) -> str:
        if name in shown:
            return f"[{name}](#{anchor(name)})"
        if name in _ELSEWHERE:
            return _ELSEWHERE[name]
        node = fields[name]
        return schema.in_words(node, name_of) if "enum" in node else "[spec](spec.md)"

    operations = [
        _operation(method, path, methods[method], name_of)
        for path, methods in told["paths"].items()
        for method in _METHODS
        if method in methods
    ]
    bodies = [_schema(name, fields[name], name_of) for name in sorted(shown)]
    return markdown.page("HTTP interface", INTRODUCTION, *operations, "# Bodies", *bodies)


def _is_of_spec(name: str) -> bool:
    """They have a page of their own."""
    return any(hasattr(module, name.partition("-")[0]) for module in (config, options, formats))


def _operation(method: str, path: str, operation: dict[str, Any], name_of: schema.Shown) -> str:
    parts = [f"## {method.upper()} {path}", prose(operation.get("description", ""))]
    parameters = [
        (code(given["name"]), given["in"], schema.in_words(given["schema"], name_of), sentence(given.get("description", "")))
        for given in operation.get("parameters", ())
        if given["in"] != "path" or "description" in given
    ]
    parts.append(table(["parameter", "in", "value", "meaning"], parameters))
    if body := operation.get("requestBody"):
        content = next(iter(body["content"].values()))
        parts.append(f"Body: {schema.in_words(content['schema'], name_of)}.")
    answers = [
        (status, _body(answer, name_of), sentence(answer["description"].removeprefix("Successful Response")))
        for status, answer in operation["responses"].items()
        if int(status) < 400
    ]
    refusals = [code(status) for status in sorted(operation["responses"]) if int(status) >= 400]
    parts.append(table(["answer", "body", "meaning"], answers))
    if refusals:
        parts.append(f"Problems: {', '.join(refusals)}. Operation: {code(operation['operationId'])}.")
    return "\n\n".join(filter(None, parts))


def _body(answer: dict[str, Any], name_of: schema.Shown) -> str:
    content = answer.get("content")
    if not content:
        return ""
    kind, inside = next(iter(content.items()))
    return schema.in_words(inside["schema"], name_of) if inside.get("schema") else kind


def _schema(name: str, node: schema.Node, name_of: schema.Shown) -> str:
    required = set(node.get("required", ()))
    rows = [
        (code(field), schema.in_words(inner, name_of), sentence(inner.get("description", "")), "" if field in required else "optional")
        for field, inner in node["properties"].items()
    ]
    return "\n\n".join(filter(None, [f"## {name}", prose(node.get("description", "")), table(["field", "value", "meaning", ""], rows)]))
