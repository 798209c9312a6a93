"""docker-compose.yml as Compose reads it."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[2]
FILE = PROJECT / "docker-compose.yml"


class MissingVariable(Exception):
    """Compose refuses a file that asks for a variable which nobody has set."""


def read_compose(variables: dict[str, str]) -> dict[str, Any]:
    """The file with variables put in, anchors merged and `$$` as `$`."""
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    resolved: dict[str, Any] = _resolve(content, variables)
    return resolved


def _resolve(value: Any, variables: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, variables) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$(?:(\$)|\{(\w+)(?:(:[-?])([^}]*))?\})", lambda match: _variable(match, variables), value)
    return value


def _variable(match: re.Match[str], variables: dict[str, str]) -> str:
    escaped, name, operator, rest = match.groups()
    if escaped:
        return "$"
    if variables.get(name):
        return variables[name]
    if operator != ":-":
        raise MissingVariable(f"{name}: {rest}")
    return str(rest)


def command_of(service: dict[str, Any]) -> list[str]:
    """What the container runs, where the file says so."""
    entrypoint, command = service.get("entrypoint", []), service.get("command", [])
    return [part for value in (entrypoint, command) for part in (shlex.split(value) if isinstance(value, str) else value)]
