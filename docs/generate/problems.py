"""The page of errors that the HTTP interface answers."""

from docs.generate import markdown
from service.errors import MEDIA_TYPE, Problem, all_problems

INTRODUCTION = f"""Every error of the HTTP interface is `{MEDIA_TYPE}` (RFC 9457): `{{type, title, status, detail, errors?: [{{field,
message}}]}}`. Its `type` is `urn:maestro:` and one of these names, which stay. Let programs look at the type, show people the detail."""


def page() -> str:
    return markdown.page("Problems", INTRODUCTION, *(_section(name, kind) for name, kind in sorted(all_problems().items())))


def _section(name: str, kind: type[Problem]) -> str:
    meaning, _, _ = markdown.docstring(kind).partition("\n\n")
    return f"## {name}\n\nStatus {kind.status}: {kind.title}.\n\n{meaning}"
