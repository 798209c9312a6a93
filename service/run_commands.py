"""`maestro watch | logs | events | metrics | fetch | compare`: what a job's run tells and leaves."""

import csv
import sys
from collections.abc import Iterator
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mae_core.exports.names import ExportFormat
from service import comparison
from service.client_errors import Json
from service.console import JobArgument, JsonOption, complete_jobs, connect, print_fields, print_json, print_json_line, print_table, say
from service.user_errors import UserError
from service.wording import clean, clean_log, number, size, sparkline
from workers.names import DRIVER

if TYPE_CHECKING:
    from service.client import MaestroClient


def watch(job: JobArgument, as_json: JsonOption = False) -> None:
    """Show a job's progress until it has ended: the course of its loss, and when it will be done. The service may be away in between.

    Exits 5 when it did not succeed. With --json each event and each progress is a line.
    """
    with connect() as client:
        view = client.job(job)
        if as_json:
            for message in client.stream(job):
                print_json_line({"event": message.event, "id": message.id, "data": message.data})
            comparison.require_success(client.job(job))
            return
        from service.watch import watch_one

        watch_one(client, view, to_stderr=False)


def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    attempt: Annotated[int | None, typer.Option(help="Of this attempt; else of the newest.", min=1)] = None,
    worker: Annotated[str, typer.Option(help="driver, who repeats what the workers print, or a worker's rank.")] = DRIVER,
    tail: Annotated[int | None, typer.Option(help="Only so many last lines.", min=1, max=10_000)] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a job's log. With --json each part of it is a line."""
    from service import client_logs

    for_terminal = sys.stdout.isatty()
    with connect() as client:
        for text in client_logs.follow(client, job, attempt=attempt, worker=worker, tail=tail, waits=follow):
            if as_json:
                if text:
                    print_json_line({"worker": worker, "text": text})
                continue
            sys.stdout.write(clean_log(text) if for_terminal else text)
            sys.stdout.flush()


def events(
    job: Annotated[str | None, typer.Argument(help="The job's id; else all jobs', as they happen.", autocompletion=complete_jobs)] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print what has happened to a job, or without a job what happens to all of the project, until it is interrupted.

    With --json each event is a line.
    """
    with connect() as client:
        found: Iterator[Json]
        if job is None:
            found = (message.data for message in client.stream_all())
        elif follow:
            found = (message.data for message in client.stream(job) if message.event == "event")
        else:
            found = client.events(job)
        for event in found:
            if as_json:
                print_json_line(event)
            else:
                typer.echo(_event_line(event))


def _event_line(event: Json) -> str:
    told = ", ".join(f"{name} {number(value)}" for name, value in (event.get("data") or {}).items() if value is not None)
    place = f"{event['job_id']}  " if "job_id" in event else ""
    return clean(f"{event['at'][:19]}  {place}{event['type']:<24} {told}").rstrip()


def metrics(
    job: JobArgument,
    key: Annotated[list[str] | None, typer.Option(help="Only this series, such as loss; several times for several.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV: a line for each step, a column for each series.")] = False,
    max_points: Annotated[int | None, typer.Option(help="At most so many of each; no spike is lost.", min=10, max=20_000)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a job's series: the course of each, its last value, its least and its greatest. With --json or --csv all of their points."""
    with connect() as client:
        series = client.metrics(job, names=key or (), max_points=max_points)
    if unknown := sorted(set(key or ()) - set(series)):
        say(f"job {job} has no series {', '.join(map(clean, unknown))} (yet)")
    if as_json:
        print_json(series)
    elif as_csv:
        _write_csv(series)
    else:
        rows: list[tuple[str, ...]] = [("SERIES", "POINTS", "LAST", "MIN", "MAX", "COURSE")]
        for name, curve in series.items():
            values = [float(value) for value in curve["values"]]
            finite = [value for value in values if isfinite(value)] or [nan]
            figures = map(number, (values[-1], min(finite), max(finite)))
            rows.append((name, str(len(values)), *figures, sparkline(values, columns=40)))
        print_table(rows, shrinks=("COURSE",), drops=("POINTS",))


def _write_csv(series: Json) -> None:
    """A step that a series has no value for is an empty cell, of one that it has twice the newest counts."""
    columns = {name: dict(zip(curve["steps"], curve["values"], strict=True)) for name, curve in series.items()}
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["step", *columns])
    for step in sorted(set().union(*columns.values())):
        table.writerow([step, *(column.get(step, "") for column in columns.values())])


def fetch(
    job: JobArgument,
    format: Annotated[ExportFormat, typer.Option("--format", help="Of an encoder: for which library.")] = "timm",
    to: Annotated[Path | None, typer.Option("--to", help="Folder for the files; else one named like the job, and the format.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a job's result and check it. A repeat goes on with what was broken off."""
    place = (to or Path(job if format == "timm" else f"{job}-{format}")).absolute()
    with connect() as client:
        try:
            _fetch(client, job, place, format=format, as_json=as_json)
        except KeyboardInterrupt:
            say("\ninterrupted; the same command goes on from here")
            raise


def _fetch(client: "MaestroClient", job: str, place: Path, *, format: ExportFormat, as_json: bool) -> None:
    from service.client_downloads import files_of

    manifest, folder = client.download_result(job, place, format=format, tell=_download_line if sys.stderr.isatty() else None)
    if sys.stderr.isatty():
        typer.echo("\r\x1b[K", err=True, nl=False)
    names = files_of(manifest, format)
    is_model = manifest.kind in ("pretrain", "finetune")
    if as_json:
        files = [{"name": name, **manifest.files[name].model_dump()} for name in names]
        print_json({"job": job, "folder": str(folder), "format": format if is_model else None, "files": files})
        return
    typer.echo(f"{len(names)} file(s) with the right sha256 in {folder}")
    if is_model and format == "timm":
        typer.echo(f'load it with: timm.create_model("local-dir:{folder}", pretrained=True)')
    elif is_model:
        typer.echo(f"{folder / 'README.md'} says how to load it")
    if manifest.kind == "embed":
        typer.echo(f'read it with: pandas.read_parquet(sorted(pathlib.Path("{folder}").glob("*.parquet")))')


def _download_line(name: str, num_bytes: int, of: int | None) -> None:
    """One line that is written over and over."""
    told = size(num_bytes) if of is None else f"{100 * num_bytes / max(of, 1):3.0f} % of {size(of)}"
    typer.echo(f"\r\x1b[K{clean(name)[-40:]}  {told}", err=True, nl=False)


def compare(
    first: Annotated[str, typer.Argument(help="A job's id.", autocompletion=complete_jobs)],
    second: Annotated[str, typer.Argument(help="Another's.", autocompletion=complete_jobs)],
    as_json: JsonOption = False,
) -> None:
    """Compare two jobs: the fields of their specs that differ, their final metrics side by side, how long and how fast they ran."""
    if first == second:
        raise UserError("name two jobs")
    with connect() as client:
        found = comparison.compare(client.job(first), client.job(second))
    if as_json:
        print_json(found._asdict())
        return
    print_fields([(job["id"], f"{clean(job['name'])} ({job['kind']}, {job['status']})") for job in found.jobs])
    rows = [("", *(job["id"] for job in found.jobs)), *comparison.rows(found)]
    print_table(rows, shrinks=tuple(job["id"] for job in found.jobs))


COMMANDS = (watch, logs, events, metrics, fetch, compare)
