"""`maestro checkpoints | pin | unpin`: the training states of a job, and which of them stay."""

from typing import Annotated, Any, Literal

import typer

from service.client_errors import Json
from service.console import JobArgument, JsonOption, connect, print_json, print_table
from service.wording import age, number, size

NameArgument = Annotated[str, typer.Argument(help="Of a training state or another artifact, as `checkpoints` and the dashboard show it.")]


def checkpoints(
    job: JobArgument,
    last: Annotated[int | None, typer.Option(help="Of another policy: keep so many of the newest.", min=1)] = None,
    every_steps: Annotated[int | None, typer.Option(help="Also the first of each so many steps.", min=1)] = None,
    best: Annotated[str | None, typer.Option(help="Also those at which this series was best, as val_accuracy.", metavar="SERIES")] = None,
    best_mode: Annotated[Literal["max", "min"], typer.Option(help="Of --best: whether a high value is good, or a low one.")] = "max",
    best_number: Annotated[int, typer.Option(help="Of --best: how many.", min=1)] = 1,
    apply: Annotated[bool, typer.Option("--apply", help="Make that policy the job's: what it does not keep is deleted soon.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List a job's training states and why each stays; or what another policy would keep, which nothing but --apply puts into force."""
    keep = {name: value for name, value in {"last": last, "every_steps": every_steps}.items() if value is not None}
    chosen: dict[str, Any] = keep | ({"best": {"metric": best, "mode": best_mode, "number": best_number}} if best is not None else {})
    if apply and not chosen:
        raise typer.BadParameter("--apply needs a policy: --last, --every-steps or --best")
    with connect() as client:
        if apply:
            client.change(job, keep=chosen)
        found = client.checkpoints(job, keep=None if apply else chosen)
    if as_json:
        print_json(found)
        return
    rows: list[tuple[str, ...]] = [("NAME", "STEP", "SIZE", "VALUE", "SAVED", "STAYS")]
    rows += [_row(state) for state in found["checkpoints"]]
    print_table(rows, shrinks=("NAME",), drops=("VALUE", "SAVED"))
    if found["num_deleted"]:
        when = "would be deleted" if chosen and not apply else "about to be deleted"
        typer.echo(f"{when}: {found['num_deleted']} ({size(found['bytes_deleted'])})")


def _row(state: Json) -> tuple[str, ...]:
    value = "" if state["value"] is None else number(state["value"])
    return (
        state["name"],
        str(state["step"]),
        size(state["bytes"]),
        value,
        age(state["created_at"]),
        ", ".join(state["kept_because"]) or "no",
    )


def pin(job: JobArgument, name: NameArgument, as_json: JsonOption = False) -> None:
    """Keep an artifact of a job whatever the policy is, and the job as long as it is pinned."""
    with connect() as client:
        found = client.pin(job, name)
    _tell(found, as_json=as_json, text=f"{name} stays")


def unpin(job: JobArgument, name: NameArgument, as_json: JsonOption = False) -> None:
    """Have an artifact be as all others: a training state that the policy does not keep is deleted soon."""
    with connect() as client:
        found = client.unpin(job, name)
    _tell(found, as_json=as_json, text=f"{name} is no longer pinned")


def _tell(found: Json, *, as_json: bool, text: str) -> None:
    if as_json:
        print_json(found)
    else:
        typer.echo(text)


COMMANDS = (checkpoints, pin, unpin)
