"""Webhooks of a project, from a user's program."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from service.client_errors import Json
from service.client_http import Http
from service.client_names import DeliveryStatus, WebhookEvents


class Webhooks:
    """`client.webhooks`: for submitters in their project, for admins in all."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def create(self, url: str, *, events: WebhookEvents = "ended", project: str | None = None) -> Json:
        """`secret` in the answer, with which messages are signed, is nowhere else. Never repeated: a second would be made."""
        content = {"url": url, "events": events} | ({} if project is None else {"project": project})
        return self._http.decode(self._http.request_once("POST", "/v1/webhooks", json=content))

    def list(self, *, project: str | None = None) -> "list[Json]":
        webhooks: list[Json] = self._http.json("GET", "/v1/webhooks", params={} if project is None else {"project": project})["webhooks"]
        return webhooks

    def get(self, webhook: str) -> Json:
        return self._http.json("GET", _path(webhook))

    def change(self, webhook: str, *, url: str | None = None, events: WebhookEvents | None = None, enabled: bool | None = None) -> Json:
        """None: as it is."""
        wanted = {"url": url, "events": events, "enabled": enabled}
        return self._http.json("PATCH", _path(webhook), json={name: value for name, value in wanted.items() if value is not None})

    def delete(self, webhook: str) -> None:
        self._http.delete(_path(webhook))

    def deliveries(self, webhook: str, *, status: DeliveryStatus | None = None) -> Iterator[Json]:
        """Those that are kept, newest events first."""
        params: dict[str, Any] = {} if status is None else {"status": status}
        while True:
            page = self._http.json("GET", _path(webhook, "deliveries"), params=params)
            yield from page["deliveries"]
            if page.get("next_before") is None:
                return
            params["before"] = page["next_before"]

    def redeliver(self, webhook: str, event: int) -> Json:
        """Send an event again, under the same id."""
        return self._http.json("POST", _path(webhook, "deliveries", str(event), "redeliver"))


def _path(webhook: str, *rest: str) -> str:
    return "/".join(["/v1/webhooks", quote(webhook, safe=""), *rest])
