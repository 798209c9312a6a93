"""The page of specs, from their models and recipes: each section once, with what is another in some kinds."""

import functools
import json
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel

from docs.generate import markdown, schema
from docs.generate.markdown import anchor, code, docstring, sentence, table
from mae_core.config import EmbedSpec, EvaluateSpec, FinetuneSpec, PretrainSpec, ProbeSpec
from mae_core.options import Strict
from mae_core.recipes import recipe_fields

KINDS: dict[str, type[BaseModel]] = {
    "pretrain": PretrainSpec,
    "probe": ProbeSpec,
    "finetune": FinetuneSpec,
    "evaluate": EvaluateSpec,
    "embed": EmbedSpec,
}
INTRODUCTION = """A spec says what a job does: YAML for `maestro submit` and `python -m mae_core.train`, JSON over HTTP. A field that is
unknown, or that would change nothing, is an error. What is left out comes from a recipe, `paper` (the paper's tables 8, 9 and 10: base,
large and huge models get it) or `small` (tiny and small ones, and where the size is not known), and the job's own spec (`maestro show
JOB`) has every value. Tables, figures and sections cited are those of [He et al. 2021](https://arxiv.org/abs/2111.06377). `deploy/specs/`
has an example of each kind."""
_SIZES = ("large", "huge")
Node = schema.Node


@dataclass
class _Field:
    """A field as some kinds have it: what is said of it, and its default in each."""

    said: str
    meaning: str
    defaults: dict[str, str] = field(default_factory=dict)


def page() -> str:
    kinds = table(["kind", "what it does"], [(code(kind), docstring(model).partition("\n\n")[0]) for kind, model in KINDS.items()])
    sections = [_section(path, models) for path, models in models_by_path().items()]
    return markdown.page("Specs", INTRODUCTION, kinds, *sections)


def models_by_path() -> dict[str, dict[str, type[BaseModel]]]:
    """The model of each section, by its path and the kind."""
    found: dict[str, dict[str, type[BaseModel]]] = {"": dict(KINDS)}
    for kind, spec in KINDS.items():
        _walk(spec, "", kind, found)
    first = {path: place for place, path in enumerate(found)}
    return dict(sorted(found.items(), key=lambda item: (first[item[0].partition(".")[0]], item[0])))


def _walk(model: type[BaseModel], path: str, kind: str, found: dict[str, dict[str, type[BaseModel]]]) -> None:
    for name, info in model.model_fields.items():
        for part in sections_in(info.annotation):
            inner = f"{path}.{name}".lstrip(".")
            found.setdefault(inner, {})[kind] = part
            _walk(part, inner, kind, found)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections in a type: `X`, `X | None`, `Annotated[X, …] | …`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for argument in get_args(annotation) for part in sections_in(argument)]


def _section(path: str, models: dict[str, type[BaseModel]]) -> str:
    fields: dict[str, list[_Field]] = {}
    for kind, model in models.items():
        for name, node in _schema(model)["properties"].items():
            inner = f"{path}.{name}".lstrip(".")
            one = _Field(_value(inner, node, model), sentence(_meaning(node, model, name)))
            known = next((known for known in fields.setdefault(name, []) if (known.said, known.meaning) == (one.said, one.meaning)), None)
            if known is None:
                fields[name].append(known := one)
            known.defaults[kind] = _default(kind, inner, node, is_needed=name in _schema(model).get("required", ()))
    rows = [
        (code(name), one.said, _shown_defaults(one.defaults, among=models), one.meaning)
        for name, several in fields.items()
        for one in several
    ]
    heading = f"## {path}" if path else "## The fields of a spec"
    only = "" if len(models) == len(KINDS) else f"In specs of {_listed(models)}."
    return "\n\n".join(filter(None, [heading, only, *_texts(path, models), table(["field", "value", "default", "meaning"], rows)]))


def _texts(path: str, models: dict[str, type[BaseModel]]) -> list[str]:
    """The docstrings of the models and of what they derive from, each once, with the kinds that it is about where it is not about all."""
    if not path:
        return []
    about: dict[type, list[str]] = {}
    for kind, model in models.items():
        for base in reversed(model.__mro__):
            if issubclass(base, BaseModel) and base not in (BaseModel, Strict):
                about.setdefault(base, []).append(kind)
    return [(f"*{_listed(kinds)}:* " if len(kinds) < len(models) else "") + docstring(base) for base, kinds in about.items()]


def _listed(kinds: dict[str, Any] | list[str]) -> str:
    return ", ".join(kinds)


@functools.cache
def _schema(model: type[BaseModel]) -> Node:
    return model.model_json_schema()


def _value(path: str, node: Node, model: type[BaseModel]) -> str:
    if path == "kind":
        return ", ".join(map(code, KINDS))
    definitions: dict[str, Node] = _schema(model).get("$defs", {})

    def shown(name: str) -> str:
        return f"[section](#{anchor(path)})" if "properties" in definitions[name] else schema.in_words(definitions[name], shown)

    return schema.in_words(node, shown)


def _meaning(node: Node, model: type[BaseModel], name: str) -> str:
    if name == "kind":
        return "which kind of job"
    parts = sections_in(model.model_fields[name].annotation)
    return node.get("description") or (docstring(_oldest(parts[0])).partition("\n\n")[0] if parts else "")


def _oldest(model: type[BaseModel]) -> type[BaseModel]:
    """The section that all variants of a section derive from."""
    return next(base for base in reversed(model.__mro__) if issubclass(base, BaseModel) and base not in (BaseModel, Strict))


def _default(kind: str, path: str, node: Node, *, is_needed: bool) -> str:
    """In Markdown; empty for a section."""
    if is_needed:
        return "needed"
    if path == "recipe":  # its own description says it
        return ""
    by_recipe = {recipe: _of_recipe(recipe, kind, path) for recipe in ("paper", "small")}
    if any(isinstance(value, dict) for value in by_recipe.values()):
        return ""
    if all(value is _NOTHING for value in by_recipe.values()) and (isinstance(node.get("default"), dict) or "default" not in node):
        return ""
    sizes = {size: _of_recipe("paper", kind, path, size=size) for size in _SIZES}
    others = ", ".join(f"{size} {_json(value)}" for size, value in sizes.items() if value != by_recipe["paper"])
    told = {recipe: _json(node.get("default") if value is _NOTHING else value) for recipe, value in by_recipe.items()}
    if told["paper"] == told["small"] and not others:
        return told["paper"]
    return f"paper {told['paper']}{f' ({others})' if others else ''}, small {told['small']}"


_NOTHING: Any = object()


def _of_recipe(recipe: str, kind: str, path: str, *, size: str = "base") -> Any:
    value: Any = recipe_fields(recipe, kind=kind, size=size)
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            return _NOTHING
        value = value[name]
    return value


def _shown_defaults(defaults: dict[str, str], *, among: dict[str, Any]) -> str:
    """With their kinds, where they differ; and which kinds have the field, where it is not all."""
    by_default: dict[str, list[str]] = {}
    for kind, default in defaults.items():
        by_default.setdefault(default, []).append(kind)
    if len(by_default) == 1 and len(defaults) == len(among):
        return next(iter(by_default))
    return "\n".join(f"{_listed(kinds)}{f': {default}' if default else ''}" for default, kinds in by_default.items())


def _json(value: object) -> str:
    return code(value if isinstance(value, str) else json.dumps(value))
