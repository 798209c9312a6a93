"""`maestro cluster head | join`: machines become one Ray cluster, each by a command that is shown and then run in its place.

Ray's token and the keys of object storage come from the environment and go on in it; neither is shown.
"""

import os
import shlex
import socket
from typing import Annotated

import typer

from service.console import JsonOption, print_json
from service.installed import StartError

GCS_PORT, DASHBOARD_PORT = 6379, 8265
CONNECT_SECONDS = 5.0
# How the head finds out that a machine is cut off: asked so often, with such patience, given up after so many silent answers.
_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}

app = typer.Typer(help="Make one cluster of several machines.", no_args_is_help=True, rich_markup_mode=None)
AddressOption = Annotated[str | None, typer.Option(help="This machine's address among the others; else that which leads to the head.")]
CpusOption = Annotated[int | None, typer.Option("--num-cpus", help="CPUs to offer; else all.", min=0)]
GpusOption = Annotated[int | None, typer.Option("--num-gpus", help="GPUs to offer; else all.", min=0)]
PrintOption = Annotated[bool, typer.Option("--print", help="Only show the command.")]


@app.command()
def head(
    address: Annotated[str, typer.Option(help="This machine's address, as the others and the service reach it.")],
    num_cpus: CpusOption = None,
    num_gpus: GpusOption = None,
    print_only: PrintOption = False,
    as_json: JsonOption = False,
) -> None:
    """Start the cluster's head here, which the others join. MAESTRO_RAY_URL of the service is http://ADDRESS:8265 then."""
    _check_json(as_json, print_only=print_only)
    options = ["--head", f"--port={GCS_PORT}", f"--dashboard-host={address}", f"--dashboard-port={DASHBOARD_PORT}"]
    _start(address, [*options, *_devices(num_cpus, num_gpus)], settings=_HEALTH_CHECKS, print_only=print_only, as_json=as_json)


@app.command()
def join(
    head: Annotated[str, typer.Argument(metavar="HEAD", help="The head's address, such as 10.0.0.2 or 10.0.0.2:6379.")],
    address: AddressOption = None,
    num_cpus: CpusOption = None,
    num_gpus: GpusOption = None,
    print_only: PrintOption = False,
    as_json: JsonOption = False,
) -> None:
    """Let this machine join the cluster of a head, until it is interrupted."""
    _check_json(as_json, print_only=print_only)
    host, port = _head_of(head)
    if not print_only:
        _check_answers(host, port)
    options = [f"--address={host}:{port}", *_devices(num_cpus, num_gpus)]
    _start(address or _address_towards(host, port), options, settings={}, print_only=print_only, as_json=as_json)


def _check_json(as_json: bool, *, print_only: bool) -> None:
    """What this process becomes prints as it likes."""
    if as_json and not print_only:
        raise typer.BadParameter("--json goes with --print")


def _start(address: str, options: list[str], *, settings: dict[str, str], print_only: bool, as_json: bool) -> None:
    """This process becomes `ray start`."""
    _check_is_ours(address)
    settings = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", **settings}
    command = ["ray", "start", "--block", f"--node-ip-address={address}", *options, "--disable-usage-stats"]
    if as_json:
        print_json({"environment": settings, "command": command})
    else:
        typer.echo(" ".join([*(f"{name}={value}" for name, value in settings.items()), shlex.join(command)]))
    if print_only:
        return
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        raise StartError("the cluster needs its token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it, alike on all machines")
    if not os.environ.get("AWS_ACCESS_KEY_ID"):
        typer.echo("AWS_ACCESS_KEY_ID is not set: workers here reach object storage by this machine's role, or not at all", err=True)
    from service.local import find_program

    os.execvpe(find_program("ray"), command, {**os.environ, **settings})


def _check_is_ours(address: str) -> None:
    import psutil

    ours = [each.address for addresses in psutil.net_if_addrs().values() for each in addresses if each.family == socket.AF_INET]
    if address not in ours:
        raise StartError(f"no network interface of this machine has the address {address}; it has {', '.join(sorted(ours))}")


def _head_of(text: str) -> tuple[str, int]:
    host, _, port = text.partition(":")
    if not host or (port and not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16)):
        raise StartError(f"{text!r} is no address of a head: write HOST or HOST:PORT, such as 10.0.0.2:{GCS_PORT}")
    return host, int(port or GCS_PORT)


def _check_answers(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        remedy = "start it there with `maestro cluster head`, and open all ports between the machines"
        raise StartError(f"no head answers at {host}:{port} ({error}): {remedy}") from None


def _address_towards(host: str, port: int) -> str:
    """This machine's own address on the way there. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))
        except OSError as error:
            raise StartError(f"no network of this machine leads to {host}: {error}") from None
        return str(probe.getsockname()[0])


def _devices(num_cpus: int | None, num_gpus: int | None) -> list[str]:
    given = {"num-cpus": num_cpus, "num-gpus": num_gpus}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]
