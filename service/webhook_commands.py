"""`maestro webhooks`: where a project's events are sent."""

from itertools import islice
from typing import Annotated

import typer

from service.client_errors import Json
from service.client_names import DeliveryStatus, WebhookEvents
from service.console import JsonOption, ProjectOption, connect, print_json, print_table, say
from service.wording import age, clean

app = typer.Typer(help="Make, list, change and delete webhooks, and see what was sent.", no_args_is_help=True, rich_markup_mode=None)
WebhookArgument = Annotated[str, typer.Argument(help="The webhook's id.")]
EventsOption = Annotated[
    WebhookEvents, typer.Option("--events", help="ended: how jobs end; status: each change of status; all: every event.")
]


@app.command()
def create(
    url: Annotated[str, typer.Argument(help="Where messages are sent, by POST.")],
    events: EventsOption = "ended",
    project: ProjectOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a webhook, and print the secret with which its messages are signed: it cannot be shown again."""
    with connect() as client:
        made = client.webhooks.create(url, events=events, project=project)
    if as_json:
        print_json(made)
        return
    say(f"webhook {made['id']}; keep its secret, it is not shown again:")
    typer.echo(made["secret"])


@app.command(name="list")
def list_webhooks(project: ProjectOption = None, as_json: JsonOption = False) -> None:
    """List webhooks, newest first."""
    with connect() as client:
        found = client.webhooks.list(project=project)
    if as_json:
        print_json(found)
        return
    rows = [("ID", "URL", "EVENTS", "PROJECT", "ENABLED", "FAILING SINCE")]
    for hook in found:
        enabled = "yes" if hook["enabled"] else f"no ({hook['disabled_reason']})"
        rows.append((hook["id"], hook["url"], hook["events"], hook["project"] or "(all)", enabled, age(hook["failing_since"])))
    print_table(rows, shrinks=("URL", "ENABLED"), drops=("PROJECT",))


@app.command()
def change(
    webhook: WebhookArgument,
    url: Annotated[str | None, typer.Option(help="Another address.")] = None,
    events: Annotated[WebhookEvents | None, typer.Option(help="Other events: ended, status or all.")] = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Enabled again, it sends what it has missed for a day.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Change a webhook. What is left out stays as it is."""
    with connect() as client:
        view = client.webhooks.change(webhook, url=url, events=events, enabled=enabled)
    _tell(
        view, as_json=as_json, text=f"webhook {view['id']} {'sends' if view['enabled'] else 'is disabled; it would send'} {view['events']}"
    )


@app.command()
def delete(webhook: WebhookArgument, as_json: JsonOption = False) -> None:
    """Delete a webhook, with what waits for it."""
    with connect() as client:
        client.webhooks.delete(webhook)
    _tell({"id": webhook, "deleted": True}, as_json=as_json, text=f"webhook {webhook} is deleted")


@app.command()
def deliveries(
    webhook: WebhookArgument,
    status: Annotated[DeliveryStatus | None, typer.Option(help="Only pending, delivered or dead ones.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, newest first.", min=1)] = 50,
    as_json: JsonOption = False,
) -> None:
    """List what was sent to a webhook, or is to be."""
    with connect() as client:
        found = list(islice(client.webhooks.deliveries(webhook, status=status), limit))
    if as_json:
        print_json(found)
        return
    rows = [("EVENT", "JOB", "TYPE", "STATUS", "TRIES", "TRIED", "ANSWER")]
    for each in found:
        answer = " ".join(str(each[name]) for name in ("status_code", "detail") if each[name] is not None)
        rows.append(
            (str(each["event_id"]), each["job_id"], each["type"], each["status"], str(each["num_tries"]), age(each["tried_at"]), answer)
        )
    print_table(rows, shrinks=("ANSWER",), drops=("TRIED", "TRIES"))


@app.command()
def redeliver(
    webhook: WebhookArgument, event: Annotated[int, typer.Argument(help="The event's id.", min=0)], as_json: JsonOption = False
) -> None:
    """Send an event to a webhook again."""
    with connect() as client:
        view = client.webhooks.redeliver(webhook, event)
    _tell(view, as_json=as_json, text=f"event {event} is sent again to {clean(webhook)}")


def _tell(view: Json, *, as_json: bool, text: str) -> None:
    if as_json:
        print_json(view)
    else:
        typer.echo(text)
