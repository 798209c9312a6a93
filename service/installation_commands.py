"""`maestro up | down | demo | doctor`: the installation itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.console import HomeOption, JsonOption, print_json, say
from service.installed import default_folder

if TYPE_CHECKING:
    from service.home import Home
    from service.up import Installation


def up(
    home: HomeOption = None,
    port: Annotated[int | None, typer.Option(help="Port of the API; else 8470, or any free one.", min=1, max=65535)] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running; `maestro down` stops it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start everything on this machine: object store, Ray, API and dispatcher."""
    if as_json and not detach:
        raise typer.BadParameter("--json goes with --detach")
    from service.up import run_until_stopped, start_detached

    place = _home(home)
    if detach:
        run = start_detached(place, port=port)
        if as_json:
            addresses = {"url": run.url, "dashboard": f"{run.url}/", "s3_endpoint": run.s3_endpoint, "ray_url": run.ray_url}
            print_json(addresses | {"home": str(place.path)})
            return
        _tell_where(place, url=run.url, s3_endpoint=run.s3_endpoint, ray_url=run.ray_url)
        typer.echo("stop it with `maestro down`" + (f" --home {place.path}" if home else ""))
        return

    def tell(installation: "Installation") -> None:
        _tell_where(place, url=installation.url, s3_endpoint=installation.storage.endpoint, ray_url=installation.cluster.url)
        typer.echo("Ctrl-C stops it")

    typer.echo("starting the object store, Ray, the API and the dispatcher …")
    run_until_stopped(place, port=port, say=typer.echo, on_ready=tell)
    typer.echo("stopped")


def _home(folder: Path | None) -> "Home":
    from service.home import Home

    return Home(folder if folder is not None else default_folder())


def _tell_where(home: "Home", *, url: str, s3_endpoint: str, ray_url: str) -> None:
    typer.echo(f"API        {url}")
    typer.echo(f"token      in {home.client_file}")
    typer.echo(f"S3         {s3_endpoint} (keys in {home.path / 'secrets.json'})")
    typer.echo(f"Ray        {ray_url} (its token too)")
    typer.echo(f"logs       {home.path / 'logs'}")


def down(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Stop what `maestro up` started."""
    from service.up import stop_detached

    done = stop_detached(_home(home))
    if as_json:
        print_json(done._asdict())
    else:
        typer.echo(done.detail)


def demo(home: HomeOption = None) -> None:
    """Pretrain on the handwritten digits, and probe the encoder against a random one. Starts and stops all it needs."""
    from service.demo import run_demo

    raise typer.Exit(run_demo(_home(home or Path(".maestro/demo"))))


def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check the service and all that it stands on: each part is ok, warn or fail, with what to do. Exits 1 where one fails.

    Of the settings in the environment (MAESTRO_DATABASE_URL …, or MAESTRO_SECRETS_DIR), on a machine of the service; else of what
    `maestro up` runs on this machine; else, with MAESTRO_URL and MAESTRO_TOKEN alone, of the service as its users reach it.
    """
    from service.doctor import examine, print_report

    checks = examine(_home(home), is_given=home is not None)
    failed = [check for check in checks if check.status == "fail"]
    if as_json:
        print_json({"ok": not failed, "checks": [check._asdict() for check in checks]})
    else:
        print_report(checks)
    if failed:
        if not as_json:
            say(f"{len(failed)} of {len(checks)} checks failed")
        raise typer.Exit(1)


COMMANDS = (up, down, demo, doctor)
