"""`maestro data`: packs images into shards, shows and verifies them. What needs the core or S3 runs as a child process."""

import json
import os
import subprocess
import sys
from typing import Annotated

import typer

app = typer.Typer(help="Pack images into shards that are streamed, show and verify them.", no_args_is_help=True, rich_markup_mode=None)

PlaceArgument = Annotated[str, typer.Argument(help="A folder, or s3://bucket/prefix/.")]


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="Images: a folder, s3://bucket/prefix/, or a list (.csv, .parquet: path, label).")],
    dest: Annotated[str, typer.Argument(help="An empty folder, or s3://bucket/prefix/.")],
    resize: Annotated[int | None, typer.Option(help="Shorter side of larger images (JPEGs at quality 90).", min=1)] = None,
    channels: Annotated[int, typer.Option(help="Of the model that will be trained.", min=1)] = 3,
    processes: Annotated[int | None, typer.Option(help="That pack at once; else one for each processor.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print progress as JSON lines.")] = False,
) -> None:
    """Pack images. The same command again goes on where it was broken off."""
    options = ["--channels", str(channels), *(["--resize", str(resize)] if resize else [])]
    options += ["--processes", str(processes)] if processes else []
    arguments = ["pack", source, dest, *options, "--json"]
    if as_json:
        _run(arguments)
    else:
        _show_progress(arguments)


def _show_progress(arguments: list[str]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TextColumn("{task.fields[images]}"), TimeRemainingColumn())
    with (
        _child(arguments, stdout=subprocess.PIPE) as child,
        Progress(*columns, console=console, transient=True) as bar,
    ):
        task = bar.add_task("packing", total=None, images="")
        assert child.stdout is not None
        for line in child.stdout:
            done = json.loads(line)
            bad = f", {done['unreadable']} unreadable" if done["unreadable"] else ""
            bar.update(task, completed=done["shards"], total=done["num_shards"], images=f"{done['images']} images{bad}")
    _end_as(child)


@app.command()
def show(place: PlaceArgument, as_json: Annotated[bool, typer.Option("--json", help="Print the index.")] = False) -> None:
    """Say what is packed there."""
    _run(["show", place, *(["--json"] if as_json else [])])


@app.command()
def verify(place: PlaceArgument, as_json: Annotated[bool, typer.Option("--json", help="Print what was found.")] = False) -> None:
    """Read all files, and compare their checksums. Exits 1 where one is damaged."""
    _run(["verify", place, *(["--json"] if as_json else [])])


def _run(arguments: list[str]) -> None:
    """With what it prints as what we print."""
    with _child(arguments) as child:
        pass
    _end_as(child)


def _child(arguments: list[str], *, stdout: int | None = None) -> subprocess.Popen[str]:
    """The core's command; that of the workers, who speak S3, where a place is in object storage."""
    from mae_core.packed import is_remote

    uses_s3 = any(is_remote(argument) for argument in arguments)
    environment = {**os.environ, **(_storage_of_this_machine() if uses_s3 else {})}
    module = "workers.data" if uses_s3 else "mae_core.data"
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, stdout=stdout, text=True)


def _storage_of_this_machine() -> dict[str, str]:
    """Address and keys of what `maestro up` runs here; nothing where the user has others, or uses another service."""
    from service.home import default_home
    from service.local import s3_environment

    home = default_home()
    run = home.read_run()
    if run is None or not run.is_alive() or {"AWS_ACCESS_KEY_ID", "AWS_PROFILE", "MAESTRO_URL"} & os.environ.keys():
        return {}
    keys = home.secrets()
    return s3_environment(run.s3_endpoint, keys.s3_access_key, keys.s3_secret_key)


def _end_as(child: subprocess.Popen[str]) -> None:
    if child.returncode:
        raise typer.Exit(child.returncode if child.returncode > 0 else 1)
