"""`maestro tokens`: who may use the service."""

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from service.client_errors import Json
from service.client_names import TokenRole
from service.console import JsonOption, connect, print_json, print_table, say
from service.wording import clean

app = typer.Typer(help="Make, list and revoke users' tokens (for admins).", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is, or what for.")],
    role: Annotated[TokenRole, typer.Option(help="reader looks at jobs, submitter also submits and ends them, admin may do all.")],
    project: Annotated[str | None, typer.Option(help="Whose jobs alone it sees; else `default`. An admin's sees all.")] = None,
    expires_in_days: Annotated[float | None, typer.Option(help="How long it is good; else until it is revoked.", min=0)] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a token, and print it: it cannot be shown again."""
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days is not None else None
    with connect() as client:
        made = client.create_token(name, role=role, project=project, expires_at=expires_at)
    if as_json:
        print_json(made)
        return
    say(f"a token of the role {made['role']} for {_where(made)}; keep it, it is not shown again:")
    typer.echo(made["token"])


@app.command(name="list")
def list_tokens(as_json: JsonOption = False) -> None:
    """List tokens, newest first."""
    with connect() as client:
        found = client.tokens()
    if as_json:
        print_json(found)
        return
    rows = [("ID", "TOKEN", "NAME", "ROLE", "PROJECT", "EXPIRES", "LAST USED", "REVOKED")]
    for token in found:
        times = [(token[name] or "")[:16] for name in ("expires_at", "last_used_at", "revoked_at")]
        rows.append((token["id"], f"{token['prefix']}…", token["name"], token["role"], token["project"] or "(all)", *times))
    print_table(rows, shrinks=("NAME",), drops=("TOKEN", "LAST USED", "EXPIRES"))


@app.command()
def revoke(token: Annotated[str, typer.Argument(help="The token's id.")], as_json: JsonOption = False) -> None:
    """Make a token worthless, from the next request on."""
    with connect() as client:
        view = client.revoke_token(token)
    if as_json:
        print_json(view)
    else:
        typer.echo(f"token {view['prefix']}… ({clean(view['name'])}) is revoked")


def _where(token: Json) -> str:
    return f"the project {token['project']}" if token["project"] else "all projects"
