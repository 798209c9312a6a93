"""The command line `maestro`.

Exit codes: 0 done; 1 it could not be done, or the watched job did not succeed; 2 wrong usage; 130 interrupted.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from mae_core.exports.formats import ExportFormat
from service import client_logs, cluster_commands, token_commands
from service import watch as terminal
from service.client import Json, MaestroClient, MaestroError, files_of
from service.console import connect, print_json, print_table
from service.demo import run_demo
from service.home import Home, HomeError, default_home
from service.processes import StartError
from service.spec_file import SpecFileError, load_spec
from service.up import Installation, run_until_stopped, start_detached, stop_detached
from workers.contract import JobStatus
from workers.stored import DRIVER

_KNOWN_ERRORS = (MaestroError, SpecFileError, HomeError, StartError)


class _ErrorsInOneLine(TyperGroup):
    """Says what is wrong and what to do, without a traceback, and exits 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _KNOWN_ERRORS as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_ErrorsInOneLine,
    help="MAEstro: train masked autoencoders as jobs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(token_commands.app, name="tokens")
app.add_typer(cluster_commands.app, name="cluster")
JobArgument = Annotated[str, typer.Argument(help="The job's id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HomeOption = Annotated[Path | None, typer.Option("--home", help="State folder; else $MAESTRO_HOME, else ~/.maestro.")]


def main() -> None:
    app()


@app.command()
def up(
    home: HomeOption = None,
    port: Annotated[int | None, typer.Option(help="Port of the API; else 8470, or any free one.", min=1, max=65535)] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running; `maestro down` stops it.")] = False,
) -> None:
    """Start everything on this machine: object store, Ray, API and dispatcher."""
    place = Home(home) if home is not None else default_home()
    if detach:
        run = start_detached(place, port=port)
        _tell_where(place, url=run.url, s3_endpoint=run.s3_endpoint, ray_url=run.ray_url)
        typer.echo("stop it with `maestro down`" + (f" --home {place.path}" if home else ""))
        return

    def tell(installation: Installation) -> None:
        _tell_where(place, url=installation.url, s3_endpoint=installation.storage.endpoint, ray_url=installation.cluster.url)
        typer.echo("Ctrl-C stops it")

    typer.echo("starting the object store, Ray, the API and the dispatcher …")
    run_until_stopped(place, port=port, say=typer.echo, on_ready=tell)
    typer.echo("stopped")


def _tell_where(home: Home, *, url: str, s3_endpoint: str, ray_url: str) -> None:
    typer.echo(f"API        {url}")
    typer.echo(f"token      in {home.client_file}")
    typer.echo(f"S3         {s3_endpoint} (keys in {home.path / 'secrets.json'})")
    typer.echo(f"Ray        {ray_url} (its token too)")
    typer.echo(f"logs       {home.path / 'logs'}")


@app.command()
def down(home: HomeOption = None) -> None:
    """Stop what `maestro up` started."""
    typer.echo(stop_detached(Home(home) if home is not None else default_home()))


@app.command()
def submit(
    spec: Annotated[Path, typer.Argument(help="A spec in YAML. Relative paths in it start from the current folder.")],
    project: Annotated[str | None, typer.Option(help="Of an admin: where the job belongs; else the token's own.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show the job until it has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a job."""
    content = load_spec(spec, folder=Path.cwd())
    with connect() as client:
        job = client.submit(content, project=project)
        if as_json:
            print_json(job)
        else:
            typer.echo(f"job {job['id']} ({job['name']}) {job['status']}")
        if watch:
            _watch(client, job, console=Console(stderr=as_json))


@app.command()
def jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs of this status.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only pretrain, probe, finetune, evaluate or embed.")] = None,
    project: Annotated[str | None, typer.Option(help="Of an admin: only this project's.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, newest first.", min=1)] = 50,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    with connect() as client:
        found = list(client.jobs(status=status, kind=kind, project=project, limit=limit))
    if as_json:
        print_json(found)
        return
    rows = [("ID", "NAME", "KIND", "STATUS", "STEP", "CREATED")]
    for job in found:
        status_text = f"{job['status']} ({job['reason']})" if job.get("reason") else job["status"]
        progress = job.get("progress")
        steps = f"{progress['step']}/{progress['num_steps']}" if progress else ""
        rows.append((job["id"], job["name"], job["kind"], status_text, steps, job["created_at"][:19]))
    print_table(rows)


@app.command()
def show(job: JobArgument, as_json: JsonOption = False) -> None:
    """Show one job."""
    with connect() as client:
        view = client.job(job)
    if as_json:
        print_json(view)
        return
    for name, condition in view.pop("conditions").items():
        typer.echo(f"{'condition':<15} {name} since {condition['since'][:19]}: {condition['message']} {condition['detail']}")
    for name, value in view.items():
        if value not in (None, {}, []):
            typer.echo(f"{name:<15} {json.dumps(value) if isinstance(value, dict | list) else value}")


@app.command()
def watch(job: JobArgument) -> None:
    """Show a job's progress until it has ended. Exits 1 when it did not succeed."""
    with connect() as client:
        _watch(client, client.job(job), console=Console())


def _watch(client: MaestroClient, job: Json, *, console: Console) -> None:
    [ended] = terminal.watch(client, [job], console=console)
    line = terminal.outcome_line(ended)
    if ended["status"] != JobStatus.SUCCEEDED:
        typer.echo(f"error: {line}", err=True)
        raise typer.Exit(1)
    typer.echo(line, err=console.stderr)


@app.command()
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    attempt: Annotated[int | None, typer.Option(help="Of this attempt; else of the newest.", min=1)] = None,
    worker: Annotated[str, typer.Option(help="driver, who repeats what the workers print, or a worker's rank.")] = DRIVER,
    tail: Annotated[int | None, typer.Option(help="Only so many last lines.", min=1, max=10_000)] = None,
) -> None:
    """Print a job's log."""
    with connect() as client:
        for text in client_logs.follow(client, job, attempt=attempt, worker=worker, tail=tail, waits=follow):
            sys.stdout.write(text)
            sys.stdout.flush()


@app.command()
def cancel(job: JobArgument) -> None:
    """Cancel a job."""
    with connect() as client:
        view = client.cancel(job)
    typer.echo(f"job {job} {view['status']}" + ("" if view["status"] == JobStatus.CANCELLED else ", will be cancelled"))


@app.command()
def pause(job: JobArgument) -> None:
    """Have a job save its training state and release its devices."""
    with connect() as client:
        view = client.pause(job)
    typer.echo(f"job {job} {view['status']}" + ("" if view["status"] == JobStatus.PAUSED else ", will be paused"))


@app.command()
def resume(job: JobArgument) -> None:
    """Let a paused job go on where it was."""
    with connect() as client:
        view = client.resume(job)
    typer.echo(f"job {job} {view['status']}")


@app.command()
def fetch(
    job: JobArgument,
    format: Annotated[ExportFormat, typer.Option("--format", help="Of an encoder: for which library.")] = "timm",
    to: Annotated[Path | None, typer.Option("--to", help="Folder for the files; else one named like the job, and the format.")] = None,
) -> None:
    """Download a job's result and check it. A repeat goes on with what was broken off."""
    place = to or Path(job if format == "timm" else f"{job}-{format}")
    with connect() as client:
        manifest, folder = client.download_result(job, place.absolute(), format=format)
    typer.echo(f"{len(files_of(manifest, format))} file(s) with the right sha256 in {folder}")
    if manifest.kind in ("pretrain", "finetune") and format == "timm":
        typer.echo(f'load it with: timm.create_model("local-dir:{folder}", pretrained=True)')
    elif manifest.kind in ("pretrain", "finetune"):
        typer.echo(f"{folder / 'README.md'} says how to load it")
    if manifest.kind == "embed":
        typer.echo(f'read it with: pandas.read_parquet(sorted(pathlib.Path("{folder}").glob("*.parquet")))')


@app.command()
def demo(home: HomeOption = None) -> None:
    """Pretrain on the handwritten digits, and probe the encoder against a random one. Starts and stops all it needs."""
    raise typer.Exit(run_demo(Home(home or Path(".maestro/demo"))))


if __name__ == "__main__":
    main()
