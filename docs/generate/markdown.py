"""Markdown, as GitHub shows it."""

import inspect
import re
from collections.abc import Iterable, Sequence

BANNER = "<!-- Made by `make docs` from the code: change it there. -->"


def page(title: str, *parts: str) -> str:
    """The parts, with a line between them."""
    return "\n\n".join([BANNER, f"# {title}", *(part.strip("\n") for part in parts if part)]) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Without columns that have nothing to say; empty where there are no rows."""
    cells = [[_cell(text) for text in row] for row in rows]
    shown = [place for place in range(len(heads)) if any(row[place] for row in cells)]
    lines = [[row[place] for place in shown] for row in [list(heads), ["---"] * len(heads), *cells]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if cells else ""


def _cell(text: str) -> str:
    """A line's end becomes one inside the cell."""
    return plain(text).replace("|", "\\|").replace("\n", "<br>")


def plain(text: str) -> str:
    """Without HTML: `<` stands for itself, outside of code too."""
    return "".join(part if place % 2 else part.replace("<", "&lt;") for place, part in enumerate(re.split(r"(`[^`]*`)", text)))


def code(text: object) -> str:
    return f"`{text}`"


def anchor(heading: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def docstring(thing: object) -> str:
    return prose(inspect.getdoc(thing) or "")


def prose(text: str) -> str:
    """A docstring's paragraphs, each in one line."""
    return "\n\n".join(plain(" ".join(paragraph.split())) for paragraph in re.split(r"\n\s*\n", text.strip()))


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?:" else ".")
