"""The app's routes with their audiences, and tokens of every sort."""

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from starlette.routing import BaseRoute

from service import tokens
from service.auth import ADMINS, Audience, require_attempt_token, require_scraper
from service.db import utc_now
from service.models import TokenRow
from service.routes import dashboard
from service.tokens import Role
from tests.unit.service_fixtures import Service

DASHBOARD = {"/", "/favicon.ico", "/dashboard/{digest}/{file:path}"}
PUBLIC = {"/livez", "/readyz", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", *DASHBOARD}
WORKERS = "workers"


class Route(NamedTuple):
    """audience None: it is open to all."""

    method: str
    path: str
    audience: Audience | str | None

    def filled(self, job_id: str) -> str:
        """Its address; a parameter that is not known here is a route that this test must learn about."""
        others = {"attempt": 1, "name": "encoder/a.txt", "token_id": "none", "webhook_id": "none", "event_id": 1}
        files = {"digest": dashboard.version(), "file": "app.js"}
        return self.path.replace(":path}", "}").format(job_id=job_id, **others, **files)


def routes_of(routes: Iterable[BaseRoute]) -> Iterator[Route]:
    """All that an app answers. Raises LookupError for a route that does not say whom it is for."""
    for context in iter_route_contexts(routes):
        path = str(context.path)
        for method in sorted(context.methods or ()):
            yield Route(method, path, None if path in PUBLIC else _audience(f"{method} {path}", getattr(context, "dependant", None)))


def routes(client: TestClient) -> list[Route]:
    assert isinstance(client.app, FastAPI)
    found = list(routes_of(client.app.routes))
    assert len(found) > 20
    answer_nothing = [route for route in found if route.method == "HEAD" and route.path not in PUBLIC]
    assert {route._replace(method="GET") for route in answer_nothing} <= set(found), "HEAD is for whom GET is"
    return [route for route in found if route not in answer_nothing]


def _audience(shown: str, dependant: Dependant | None) -> Audience | str:
    calls = [item.call for item in dependant.dependencies] if dependant is not None else []
    audiences = {ADMINS if call is require_scraper else call for call in calls if isinstance(call, Audience) or call is require_scraper}
    if require_attempt_token in calls and not audiences:
        return WORKERS
    if require_attempt_token in calls or len(audiences) != 1:
        raise LookupError(f"{shown} does not say whom it is for: include its router with an Audience in service/app.py")
    return audiences.pop()


def make_token(service: Service, role: Role, project: str | None = None) -> str:
    with service.database.write() as session:
        return tokens.create(session, name="test", role=role, project=project, now=utc_now())[1]


def token_id(token: str) -> str:
    return token.split("_")[1]


def revoked(service: Service, role: Role = Role.ADMIN) -> str:
    token = make_token(service, role)
    with service.database.write() as session:
        tokens.revoke(session, token_id(token), now=utc_now())
    return token


def expired(service: Service, role: Role = Role.ADMIN) -> str:
    token = make_token(service, role)
    with service.database.write() as session:
        session.get_one(TokenRow, token_id(token)).expires_at = utc_now() - timedelta(seconds=1)
    return token


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
