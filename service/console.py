"""What the commands of `maestro` share: the service that they speak to, and how they print."""

import json
import os
from collections.abc import Sequence
from typing import Any

import typer

from service.client import MaestroClient
from service.home import Home, HomeError, default_home


def connect(home: Home | None = None) -> MaestroClient:
    """The service of MAESTRO_URL and MAESTRO_TOKEN; else the one of this machine."""
    url, token = os.environ.get("MAESTRO_URL"), os.environ.get("MAESTRO_TOKEN")
    if url and token:
        return MaestroClient(url, token)
    if url or token:
        raise HomeError(f"{'MAESTRO_TOKEN' if url else 'MAESTRO_URL'} is not set: set both, or neither to use the service of this machine")
    file = (home or default_home()).client_file
    try:
        content = json.loads(file.read_bytes())
        return MaestroClient(content["url"], content["token"])
    except FileNotFoundError as error:
        raise HomeError(
            f"no service known: start one with `maestro up`, or set MAESTRO_URL and MAESTRO_TOKEN ({file} is not there)"
        ) from error
    except (ValueError, KeyError) as error:
        raise HomeError(f"{file} is damaged; `maestro up` writes it anew") from error


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns under their headings, the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
