"""How things are said on a terminal: short, aligned, and never with characters that would steer it."""

import re
import unicodedata
from collections.abc import Iterable
from datetime import UTC, datetime
from math import isfinite

_BARS = "▁▂▃▄▅▆▇█"
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")
_UNKNOWN = "�"
_JOINER = "\u200d"  # of emoji


def clean(text: object) -> str:
    """In one line, without what steers a terminal or turns the direction of writing: a name may come from anybody."""
    return "".join(_shown(character) for character in str(text))


def clean_log(text: str) -> str:
    """What a process has printed, for a terminal: lines, tabs and colours stay, whatever else steers it goes."""
    parts = _COLOURS.split(text)
    return "".join(part if place % 2 else "".join(c if c in "\n\t\r" else _shown(c) for c in part) for place, part in enumerate(parts))


def _shown(character: str) -> str:
    if character.isprintable() or character == _JOINER:
        return character
    return " " if character.isspace() else _UNKNOWN


def width(text: str) -> int:
    """Columns of a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) or c == _JOINER else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shortened(text: str, columns: int) -> str:
    """Its beginning, where it is wider."""
    if width(text) <= columns:
        return text
    kept = ""
    for character in text:
        if width(kept + character) > columns - 1:
            break
        kept += character
    return f"{kept}…"


def duration(seconds: float | None) -> str:
    """`0:21`, `1:02:05`, `3 d 4 h`."""
    if seconds is None or not 0 <= seconds < 1e9:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def age(at: str | None, *, now: datetime | None = None) -> str:
    """`3 min ago`, of a time of the API; by this machine's clock."""
    if at is None:
        return ""
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(at)).total_seconds()
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "now"


def between(start: str | None, end: str | None) -> float | None:
    """Seconds between two times of the API; until now where there is no end yet, None where there was no start."""
    if start is None:
        return None
    until = datetime.fromisoformat(end) if end is not None else datetime.now(UTC)
    return (until - datetime.fromisoformat(start)).total_seconds()


def size(num_bytes: float) -> str:
    """`1.4 GB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"


def number(value: object) -> str:
    """Four digits of a real number; of a list of many, how many there are."""
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} values"
    if isinstance(value, list):
        return ", ".join(map(number, value))
    return f"{value:.4g}" if isinstance(value, float) else clean(value)


def sparkline(course: Iterable[float], *, columns: int = 20) -> str:
    """The course of some values in `columns` characters, the mean of each part. A part without a finite one is a gap."""
    values = list(course)
    columns = min(columns, len(values))
    means = [_mean(values[len(values) * part // columns : len(values) * (part + 1) // columns]) for part in range(columns)]
    there = [mean for mean in means if mean is not None]
    if not there:
        return " " * columns
    low, high = min(there), max(there)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if mean is None else _BARS[round((mean - low) * scale)] for mean in means)


def _mean(values: Iterable[float]) -> float | None:
    finite = [value for value in values if isfinite(value)]
    return sum(finite) / len(finite) if finite else None
