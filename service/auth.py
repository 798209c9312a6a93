"""Who may call: users by their token's role and project, an attempt's workers with the attempt's own token."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import select

from service import tokens
from service.db import Database, utc_now
from service.errors import Forbidden, NoSuchJob, NoSuchWebhook, NotAuthenticated
from service.models import JobRow, WebhookRow
from service.ratelimit import note_known
from service.settings import Settings
from service.tokens import Role
from workers.contract import attempt_token

_bearer = HTTPBearer(auto_error=False, description="A user's token, or for reports the attempt's own")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


@dataclass(frozen=True)
class Caller:
    """A user, known by a token. project None: all of them. name: the token's prefix, for the record."""

    name: str
    shown: str
    role: Role
    project: str | None

    def project_of(self, asked: str | None) -> str | None:
        """The project to work in: the token's own, or for all projects' tokens the one that was asked for, if any."""
        if self.project is not None and asked not in (None, self.project):
            raise Forbidden(f"{self.shown} is good for the project {self.project} alone; leave out which, or use a token of {asked}.")
        return self.project or asked


class Audience:
    """The users that a group of routes is for: the role it takes to read there, and to write. Jobs of other projects do not exist."""

    def __init__(self, *, reading: Role, writing: Role) -> None:
        self._reading, self._writing = reading, writing

    def __call__(self, request: Request, credentials: Credentials) -> Caller:
        if credentials is None:
            raise NotAuthenticated
        caller = _caller(request, credentials.credentials)
        note_known(request)
        needed = self.role_for(request.method)
        if not caller.role.includes(needed):
            raise Forbidden(f"This takes a token of the role {needed}, and {caller.shown} is a {caller.role}'s.")
        if caller.project is not None:
            _require_own(request, caller.project)
        return caller

    def role_for(self, method: str) -> Role:
        return self._reading if method in ("GET", "HEAD") else self._writing


USERS = Audience(reading=Role.READER, writing=Role.SUBMITTER)
WEBHOOK_OWNERS = Audience(reading=Role.SUBMITTER, writing=Role.SUBMITTER)  # receivers' addresses are often secrets
ADMINS = Audience(reading=Role.ADMIN, writing=Role.ADMIN)


def _caller(request: Request, token: str) -> Caller:
    settings: Settings = request.app.state.settings
    if same_secret(token, settings.api_token.get_secret_value()):
        return Caller("installation", "The installation's own token", Role.ADMIN, None)
    database: Database = request.app.state.database
    now = utc_now()
    with database.read() as session:
        row = tokens.recognise(session, token, now=now)
    tokens.note_use(database, row, now=now)
    return Caller(tokens.prefix_of(row.id), f"The token {tokens.prefix_of(row.id)}…", Role(row.role), row.project)


def _require_own(request: Request, project: str) -> None:
    """What the path names belongs to the project. Here, so that no route can forget it. Nothing ever changes its project."""
    database: Database = request.app.state.database
    for name, table, error in (("job_id", JobRow, NoSuchJob), ("webhook_id", WebhookRow, NoSuchWebhook)):
        named = request.path_params.get(name)
        if named is None:
            continue
        with database.read() as session:
            query = select(table.project).where(table.id == named)
            found = session.scalar(query.where(JobRow.deleted_at.is_(None)) if table is JobRow else query)
        if found != project:
            raise error(named)


def require_scraper(request: Request, credentials: Credentials) -> None:
    """Who may read the figures for Prometheus: the token that a setting names, and admins."""
    settings: Settings = request.app.state.settings
    expected = settings.metrics_token
    if credentials is None or expected is None or not same_secret(credentials.credentials, expected.get_secret_value()):
        ADMINS(request, credentials)
    note_known(request)


def same_secret(given: str, expected: str) -> bool:
    """Constant-time, also in the length of what is given."""
    return hmac.compare_digest(hashlib.sha256(given.encode()).digest(), hashlib.sha256(expected.encode()).digest())


def require_attempt_token(request: Request, credentials: Credentials, job_id: str, attempt: int) -> None:
    settings: Settings = request.app.state.settings
    good = [attempt_token(key, job_id, attempt) for key in settings.secret_keys]
    if credentials is None or not any(same_secret(credentials.credentials, token) for token in good):
        raise NotAuthenticated("Reports carry the token of their own attempt.")
    note_known(request)
