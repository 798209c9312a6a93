"""`maestro submit | jobs | show | edit | cancel | pause | resume | retry | delete`: jobs as a whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from service.client_errors import Json
from service.client_job import JobChanges
from service.console import (
    JobArgument,
    JsonOption,
    connect,
    painted,
    parse_time,
    print_fields,
    print_json,
    print_table,
    prints_json,
    say,
)
from service.user_errors import UserError
from service.wording import age, between, clean, duration, number, size
from workers.names import JobStatus

_TIME = "A time, or how long ago: 2026-05-01, 2026-05-01T12:30, 90min, 6h, 3d, 2w."
SpecArgument = Annotated[Path, typer.Argument(help="A spec in YAML. Relative paths in it start from the current folder.")]


def submit(
    spec: SpecArgument,
    project: Annotated[str | None, typer.Option(help="Of an admin: where the job belongs; else the token's own.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show the job until it has ended. Exits 5 unless it succeeds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a job. Every wrong field of the spec is told, with its line."""
    from service.spec_file import load_spec

    content = load_spec(spec, folder=Path.cwd())
    with connect() as client:
        job = client.submit(content, project=project)
        if as_json:
            print_json(job)
        else:
            typer.echo(f"job {job['id']} ({clean(job['name'])}) {painted(job['status'])}")
        if watch:
            from service.watch import watch_one

            watch_one(client, job, to_stderr=as_json)


def jobs(
    status: Annotated[list[JobStatus] | None, typer.Option(help="Only jobs of this status; several: of any of them.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only pretrain, probe, finetune, evaluate or embed.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only with this label, `key:value` or `key`; several: with all.")] = None,
    text: Annotated[str | None, typer.Option(help="Only with words in name or id that begin so.")] = None,
    created_after: Annotated[str | None, typer.Option(help=_TIME)] = None,
    created_before: Annotated[str | None, typer.Option(help="The same.")] = None,
    finished_after: Annotated[str | None, typer.Option(help="The same, of those that have ended.")] = None,
    finished_before: Annotated[str | None, typer.Option(help="The same.")] = None,
    project: Annotated[str | None, typer.Option(help="Of an admin: only this project's.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, newest first.", min=1)] = 50,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    times: dict[str, Any] = {
        "created_after": parse_time(created_after),
        "created_before": parse_time(created_before),
        "finished_after": parse_time(finished_after),
        "finished_before": parse_time(finished_before),
    }
    wanted: dict[str, Any] = {"status": status, "kind": kind, "label": label, "text": text, "project": project}
    with connect() as client:
        found = list(client.jobs(limit=limit, **wanted, **times))
    if as_json:
        print_json(found)
        return
    rows: list[tuple[str, ...]] = [("ID", "NAME", "KIND", "STATUS", "STEP", "ETA", "CREATED")]
    rows += [_row(job) for job in found]
    print_table(rows, shrinks=("NAME", "STATUS"), drops=("ETA", "KIND", "CREATED", "STEP"))
    if len(found) == limit:
        say(f"the newest {limit}; --limit shows more")
    elif not found:
        say("no jobs" + (" like that" if any([*wanted.values(), *times.values()]) else ": `maestro submit` makes one"))


def _row(job: Json) -> tuple[str, ...]:
    status = f"{job['status']} ({job['reason']})" if job.get("reason") else job["status"]
    progress = job.get("progress")
    steps = f"{progress['step']}/{progress['num_steps']}" if progress else ""
    goes_on = progress is not None and progress.get("eta_seconds") is not None and not JobStatus(job["status"]).is_terminal
    eta = duration(float(progress["eta_seconds"])) if progress is not None and goes_on else ""
    return job["id"], job["name"], job["kind"], status, steps, eta, age(job["created_at"])


def show(job: JobArgument, as_json: JsonOption = False) -> None:
    """Show one job: how it is, what is amiss, its results and its whole spec."""
    with connect() as client:
        view = client.job(job)
    if as_json:
        print_json(view)
        return
    print_fields(_fields(view))


def _fields(view: Json) -> list[tuple[str, str]]:
    import yaml

    fields = [
        ("condition", f"{name} since {condition['since'][:19]}: {condition['message']} {condition['detail'] or ''}")
        for name, condition in (view.get("conditions") or {}).items()
    ]
    for name, value in view.items():
        if name in ("conditions", "spec") or value in (None, {}, []):
            continue
        if name.endswith("_at"):
            value = f"{value} ({age(value)})"
        elif isinstance(value, dict):
            value = "\n".join(f"{key}: {number(each)}" for key, each in value.items())
        fields.append((name, str(value)))
    if (seconds := between(view.get("started_at"), view.get("finished_at"))) is not None:
        fields.append(("duration", duration(seconds)))
    spec = yaml.safe_dump(view.get("spec") or {}, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None).rstrip()
    return [*fields, ("spec", spec if view.get("spec") else "")]


def edit(
    job: JobArgument,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Set a label, `key:value`; several times for several.")] = None,
    remove_label: Annotated[list[str] | None, typer.Option(help="Take a label away, by its key.")] = None,
    priority: Annotated[int | None, typer.Option(help="Of one that waits: higher ones start first.", min=-1000, max=1000)] = None,
    notes: Annotated[str | None, typer.Option(help="Free text in place of its notes; an empty one takes them away.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Change a job's name, labels, priority or notes, also when it has ended. What others have changed meanwhile is left alone."""
    changes: JobChanges = {}
    if name is not None:
        changes["name"] = name
    if priority is not None:
        changes["priority"] = priority
    if notes is not None:
        changes["notes"] = notes or None
    if not changes and not label and not remove_label:
        raise typer.BadParameter("say what to change: --name, --label, --remove-label, --priority or --notes")
    with connect() as client:
        view = client.job(job)
        if label or remove_label:
            changes["labels"] = _edited(view["labels"], label or [], remove_label or [])
        view.change(**changes)
    _tell(view, as_json=as_json, text=f"job {job} changed: {', '.join(changes)}")


def _edited(labels: dict[str, str], given: Sequence[str], removed: Sequence[str]) -> dict[str, str]:
    new = {key: value for key, value in labels.items() if key not in removed}
    for text in given:
        key, colon, value = text.partition(":")
        if not key or not colon:
            raise typer.BadParameter(f"{text!r} is no label; write key:value")
        new[key] = value
    return new


def cancel(job: JobArgument, as_json: JsonOption = False) -> None:
    """Cancel a job."""
    with connect() as client:
        view = client.cancel(job)
    end = "" if view["status"] == JobStatus.CANCELLED else ", will be cancelled"
    _tell(view, as_json=as_json, text=f"job {job} {view['status']}{end}")


def pause(job: JobArgument, as_json: JsonOption = False) -> None:
    """Have a job save its training state and release its devices."""
    with connect() as client:
        view = client.pause(job)
    end = "" if view["status"] == JobStatus.PAUSED else ", will be paused"
    _tell(view, as_json=as_json, text=f"job {job} {view['status']}{end}")


def resume(job: JobArgument, as_json: JsonOption = False) -> None:
    """Let a paused job go on where it was."""
    with connect() as client:
        view = client.resume(job)
    _tell(view, as_json=as_json, text=f"job {job} {view['status']}")


def retry(job: JobArgument, as_json: JsonOption = False) -> None:
    """Submit the spec of a job that has failed or was cancelled anew, as a new job."""
    with connect() as client:
        view = client.retry(job)
    _tell(view, as_json=as_json, text=f"job {view['id']} ({clean(view['name'])}) {view['status']}, in place of {job}")


def delete(
    context: typer.Context,
    job: JobArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a job that has ended, and all that it left: result, checkpoints, pictures, logs, series. Shows what goes, and asks."""
    with connect() as client:
        view = client.job(job)
        goes = client.deletion(job)
        if not yes:
            if prints_json(context):
                raise UserError(f"--json does not ask: delete job {job} with --yes")
            typer.echo(f"job {job} ({clean(view['name'])}), {view['status']}, {age(view['created_at'])}")
            more = "" if goes["is_complete"] else " and more"
            result = f"; its result in {view['result_uri']}" if view.get("result_uri") else ""
            typer.echo(f"{goes['num_objects']} objects, {size(goes['bytes'])}{more}{result}")
            if not typer.confirm("delete all of it for good?"):
                raise UserError("nothing was deleted")
        client.delete(job)
    if as_json:
        print_json({"id": job, "deleted": True, "num_objects": goes["num_objects"], "bytes": goes["bytes"]})
    else:
        typer.echo(f"job {job} is deleted")


def _tell(view: Json, *, as_json: bool, text: str) -> None:
    if as_json:
        print_json(view)
    else:
        typer.echo(text)


COMMANDS = (submit, jobs, show, edit, cancel, pause, resume, retry, delete)
