"""The command line `maestro`: all its commands, and how their errors are told.

A command loads what it needs when it runs: the lists and shows of jobs start in a fraction of a second.
"""

import json
from typing import Any

import typer
from typer.core import TyperGroup

from service import (
    checkpoint_commands,
    cluster_commands,
    console,
    data_commands,
    installation_commands,
    job_commands,
    resource_commands,
    run_commands,
    token_commands,
    webhook_commands,
)
from service.client_errors import ApiError, JobFailed
from service.user_errors import EXIT_CODES, INTERRUPTED, UserError
from service.wording import clean

NOT_AUTHENTICATED = 401
_EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."


class _ErrorsInOneLine(TyperGroup):
    """Says what is wrong and what to do, without a traceback, and exits with its code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if console.prints_json(ctx):
                typer.echo(json.dumps(_as_json(error)), err=True)
            else:
                typer.echo("error: " + "\n".join(clean(line) for line in _text(error).split("\n")), err=True)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(INTERRUPTED) from error


def _text(error: UserError) -> str:
    if isinstance(error, ApiError) and error.status == NOT_AUTHENTICATED:
        return "the service refuses the token: it is wrong, revoked or expired; set MAESTRO_TOKEN to another (`maestro tokens create`)"
    return str(error)


def _as_json(error: UserError) -> dict[str, Any]:
    """`type`, `status` and `errors` are those of the service's problem, where it is one."""
    told: dict[str, Any] = {"error": _text(error), "exit_code": error.exit_code}
    if isinstance(error, ApiError):
        told |= {"type": error.type, "status": error.status, "errors": error.errors}
    if isinstance(error, JobFailed):
        told |= {"job": dict(error.job)}
    return told


app = typer.Typer(
    cls=_ErrorsInOneLine,
    help="MAEstro: train masked autoencoders as jobs. MAESTRO_URL and MAESTRO_TOKEN name the service; else it is the one of this machine.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (job_commands, run_commands, checkpoint_commands, resource_commands, installation_commands):
    for command in module.COMMANDS:
        app.command()(command)
cluster_commands.app.command(name="show")(resource_commands.show_cluster)
app.add_typer(cluster_commands.app, name="cluster")
app.add_typer(data_commands.app, name="data")
app.add_typer(token_commands.app, name="tokens")
app.add_typer(webhook_commands.app, name="webhooks")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
