"""A user's spec: a YAML file, checked here so that an error can name its line, with relative paths made absolute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mae_core.config import RUN_SPEC, with_absolute_paths
from service.user_errors import UserError

_KINDS = ("pretrain", "probe", "finetune", "evaluate", "embed")


class SpecFileError(UserError):
    """A spec file cannot be used; the message names file and line."""


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently keep the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_spec(file: Path, *, folder: Path) -> dict[str, Any]:
    """The spec in `file`, valid, with paths relative to `folder` made absolute. SpecFileError otherwise."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise SpecFileError(f"{file}: cannot be read: {reason}") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise SpecFileError(f"{file}:{line}: {error.problem or 'is no YAML'}") from error
    except yaml.YAMLError as error:
        raise SpecFileError(f"{file}: is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecFileError(f"{file}:1: a spec is a mapping that begins with kind: {' | '.join(_KINDS)}")
    spec = with_absolute_paths(content, folder=folder)
    try:
        RUN_SPEC.validate_python(spec)
    except ValidationError as error:
        raise SpecFileError(explain(error, file=file, node=node)) from error
    return spec


def explain(error: ValidationError, *, file: Path, node: yaml.Node | None) -> str:
    """One line for each wrong field: file, line, field, what is wrong."""
    lines = []
    for item in error.errors(include_url=False):
        where = [part for part in item["loc"] if part not in _KINDS]
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "is not a known field here; check its spelling"
        elif item["type"].startswith("union_tag"):
            where, message = ["kind"], f"must be one of {', '.join(_KINDS)}"
        name = ".".join(str(part) for part in where)
        lines.append(f"{file}:{line_of(node, where)}: {f'{name}: ' if name else ''}{message}")
    return "\n".join(lines)


def line_of(node: yaml.Node | None, where: Sequence[str | int]) -> int:
    """The line of a field, or of the innermost section of its path that is there."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in where:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
