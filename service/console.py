"""What the commands of `maestro` share: the service that they speak to, their options, and how they print."""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.installed import CLIENT_FILE, HomeError, default_folder
from service.wording import clean, shortened, width

if TYPE_CHECKING:
    from service.client import MaestroClient

_JSON = "maestro.json"  # in a command's context: whether it prints JSON
COMPLETION_SECONDS = 1.0  # so long a shell waits
_LISTED = 50  # jobs that a shell completes
_NARROWEST = 8
_COLOURS = {
    "succeeded": "green",
    "ok": "green",
    "delivered": "green",
    "failed": "red",
    "fail": "red",
    "dead": "red",
    "cancelled": "yellow",
    "warn": "yellow",
    "recovering": "yellow",
    "stopping": "yellow",
    "paused": "magenta",
    "pausing": "magenta",
    "running": "cyan",
    "starting": "cyan",
    "finalizing": "cyan",
}
_SECONDS = {"m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def connect(*, patience_seconds: float = 15.0, timeout_seconds: float = 30.0) -> "MaestroClient":
    """The service of MAESTRO_URL and MAESTRO_TOKEN; else the one of this machine."""
    from service.client import MaestroClient

    url, token = os.environ.get("MAESTRO_URL"), os.environ.get("MAESTRO_TOKEN")
    if bool(url) != bool(token):
        raise HomeError(f"{'MAESTRO_TOKEN' if url else 'MAESTRO_URL'} is not set: set both, or neither to use the service of this machine")
    if not (url and token):
        url, token = _of_this_machine()
    return MaestroClient(url, token, patience_seconds=patience_seconds, timeout_seconds=timeout_seconds)


def _of_this_machine() -> tuple[str, str]:
    file = default_folder() / CLIENT_FILE
    try:
        content = json.loads(file.read_bytes())
        return str(content["url"]), str(content["token"])
    except FileNotFoundError as error:
        raise HomeError(
            f"no service known: start one with `maestro up`, or set MAESTRO_URL and MAESTRO_TOKEN ({file} is not there)"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise HomeError(f"{file} is damaged; `maestro up` writes it anew") from error
    except OSError as error:
        raise HomeError(f"{file} cannot be read: {error.strerror}; set MAESTRO_URL and MAESTRO_TOKEN") from error


def complete_jobs(incomplete: str) -> list[tuple[str, str]]:
    """Ids of the newest jobs, for a shell. Nothing where the service does not answer at once."""
    try:
        with connect(patience_seconds=0.0, timeout_seconds=COMPLETION_SECONDS) as client:
            found = list(client.jobs(limit=_LISTED))
    except Exception:  # a shell's line is no place for an error
        return []
    return [(job["id"], clean(f"{job['name']} ({job['status']})")) for job in found if job["id"].startswith(incomplete)]


def _note_json(context: typer.Context, wanted: bool) -> bool:
    context.meta[_JSON] = wanted
    return wanted


def prints_json(context: Any) -> bool:
    """Whether the command of this context was asked for JSON."""
    return bool(context.meta.get(_JSON))


JobArgument = Annotated[str, typer.Argument(help="The job's id.", autocompletion=complete_jobs, show_default=False)]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON alone, on stdout; an error is JSON, too, on stderr.", callback=_note_json)
]
ProjectOption = Annotated[str | None, typer.Option(help="Of an admin: of this project; else the token's own, or all.")]
HomeOption = Annotated[Path | None, typer.Option("--home", help="State folder; else $MAESTRO_HOME, else ~/.maestro.")]


def parse_time(text: str | None) -> datetime | None:
    """A time (`2026-05-01`, `2026-05-01T12:30`; in this machine's zone, unless it names one), or how long ago (`6h`, `3d`, `2w`)."""
    if text is None:
        return None
    if match := re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]+)?) ?(m|min|h|d|w)", text.strip()):
        return datetime.now(UTC) - timedelta(seconds=float(match[1]) * _SECONDS[match[2]])
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time; write 2026-05-01, 2026-05-01T12:30, or how long ago: 90min, 6h, 3d, 2w") from None
    return time if time.tzinfo is not None else time.astimezone()


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def print_json_line(value: Any) -> None:
    """One of many, each in a line of its own."""
    typer.echo(json.dumps(value))


def say(text: str) -> None:
    """A line for a person, beside JSON or a file on stdout."""
    typer.echo(text, err=True)


def has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, *, by: str | None = None) -> str:
    """A status in its colour, on a terminal that has colours."""
    colour = _COLOURS.get((by or text).partition(" ")[0])
    return typer.style(text, fg=colour) if colour is not None and has_colours() else text


def print_table(rows: Sequence[Sequence[str]], *, shrinks: Sequence[str] = (), drops: Sequence[str] = ()) -> None:
    """Columns under their headings, the first row. On a narrow terminal `shrinks` are shortened, then `drops` left out."""
    table = [[clean(cell) for cell in row] for row in rows]
    columns = dict(zip(table[0], zip(*table, strict=True), strict=True))
    widths = {heading: max(map(width, cells)) for heading, cells in columns.items()}
    if sys.stdout.isatty():
        _fit(widths, shutil.get_terminal_size().columns, shrinks=shrinks, drops=drops)
    for place in range(len(table)):
        cells = []
        for heading, columns_wide in widths.items():
            text = shortened(columns[heading][place], columns_wide)
            padding = " " * (columns_wide - width(text))
            cells.append((painted(text) if heading == "STATUS" and place else text) + padding)
        typer.echo("  ".join(cells).rstrip())


def _fit(widths: dict[str, int], available: int, *, shrinks: Sequence[str], drops: Sequence[str]) -> None:
    def excess() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - available

    for heading in shrinks:
        if heading in widths:
            widths[heading] = max(min(widths[heading], _NARROWEST), widths[heading] - max(excess(), 0))
    for heading in drops:
        if excess() > 0:
            widths.pop(heading, None)
    for heading in shrinks:  # what the columns left out have made room for is nobody's to waste, but a line too long is worse
        if heading in widths and excess() > 0:
            widths[heading] = max(_NARROWEST, widths[heading] - excess())


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Names and values, in two columns; empty ones are left out. Of a value in several lines each is indented."""
    for name, value in fields:
        if value:
            first, *others = value.split("\n")
            shown = painted(clean(first)) if name == "status" else clean(first)
            typer.echo("\n".join([f"{name:<15} {shown}", *(f"{'':<15} {clean(line)}" for line in others)]))
