"""What a JSON schema says of a value, in a few words."""

import json
from collections.abc import Callable
from typing import Any

from workers.contract import MAX_INTEGER

Node = dict[str, Any]
Shown = Callable[[str], str]  # how a schema is named that another refers to

_NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null", "object": "object"}


def in_words(node: Node, shown: Shown) -> str:
    if "$ref" in node:
        return shown(node["$ref"].rpartition("/")[2])
    if "const" in node:
        return _code(node["const"])
    if "enum" in node:
        return ", ".join(map(_code, node["enum"]))
    for several in ("anyOf", "oneOf"):
        if several in node:
            return " or ".join(dict.fromkeys(in_words(part, shown) for part in node[several]))
    if "allOf" in node:
        return in_words(node["allOf"][0], shown)
    if node.get("type") == "array":
        return _array(node, shown)
    if isinstance(node.get("additionalProperties"), dict):
        return f"object of {in_words(node['additionalProperties'], shown)}"
    if node.get("format") == "date-time":
        return "time"
    return " ".join(filter(None, [_NAMES.get(node.get("type", ""), "any"), _limits(node)]))


def _array(node: Node, shown: Shown) -> str:
    if "prefixItems" in node:
        return f"[{', '.join(in_words(part, shown) for part in node['prefixItems'])}]"
    return f"list of {in_words(node.get('items', {}), shown)}"


def _limits(node: Node) -> str:
    limits = [
        f"{sign} {node[name]:g}" if isinstance(node[name], float) else f"{sign} {node[name]:,}"
        for name, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if name in node and node[name] != MAX_INTEGER
    ]
    if "multipleOf" in node:
        limits.append(f"a multiple of {node['multipleOf']:g}")
    if "maxLength" in node:
        limits.append(f"up to {node['maxLength']:,} characters")
    return ", ".join(limits)


def _code(value: object) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"
