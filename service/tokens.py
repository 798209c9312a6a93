"""Users' tokens: made, listed, revoked, recognised. A token is `mst_<id>_<secret>`: the id is public, of the whole only a hash is kept.

SHA-256 and no slow hash: the secret has 256 random bits, so that there is nothing to guess, and each request computes it.
"""

import hashlib
import hmac
import logging
import secrets
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from service.db import Database
from service.errors import Invalid, NotAuthenticated, NotFound
from service.ids import chance
from service.models import TokenRow
from service.projects import DEFAULT_PROJECT

log = logging.getLogger(__name__)

_KIND = "mst"
_ID_LENGTH = 10
_USED_SECONDS = 60.0  # a token's last use is noted no more often


class Role(StrEnum):
    """What a user may do; each may also do what those before it may."""

    READER = "reader"  # look at the project's jobs
    SUBMITTER = "submitter"  # submit, cancel, pause and resume them
    ADMIN = "admin"  # all of that in all projects, and tokens

    def includes(self, other: "Role") -> bool:
        roles = list(Role)
        return roles.index(self) >= roles.index(other)


def create(
    session: Session, *, name: str, role: Role, project: str | None = None, expires_at: datetime | None = None, now: datetime
) -> tuple[TokenRow, str]:
    """A new token, and its text, which nobody can be told again. Raises Invalid."""
    if role is Role.ADMIN and project is not None:
        raise Invalid("project", "an admin's token is good for all projects; leave it out")
    if expires_at is not None and expires_at <= now:
        raise Invalid("expires_at", "this is in the past; give a later time, or leave it out for a token that does not expire")
    token_id = chance(_ID_LENGTH)
    token = f"{_KIND}_{token_id}_{secrets.token_urlsafe(32)}"
    row = TokenRow(
        id=token_id,
        name=name,
        role=role,
        project=None if role is Role.ADMIN else project or DEFAULT_PROJECT,
        sha256=_sha256(token),
        created_at=now,
        expires_at=expires_at,
    )
    session.add(row)
    session.flush()
    log.info("token %s made: %s %s of project %s", prefix_of(token_id), role, name, row.project or "(all)")
    return row, token


def list_all(session: Session) -> list[TokenRow]:
    """Newest first, also those that are good no more."""
    return list(session.scalars(select(TokenRow).order_by(TokenRow.created_at.desc(), TokenRow.id)))


def revoke(session: Session, token_id: str, *, now: datetime) -> TokenRow:
    """Makes a token worthless, from the next request on; a repeat changes nothing."""
    row = session.get(TokenRow, token_id, with_for_update=True)
    if row is None:
        raise NotFound(f"There is no token {token_id}.")
    if row.revoked_at is None:
        row.revoked_at = now
        log.info("token %s revoked", prefix_of(token_id))
    return row


def recognise(session: Session, token: str, *, now: datetime) -> TokenRow:
    """The row of a token that is good. Raises NotAuthenticated; that a token has ended is told to those alone who have all of it."""
    kind, _, rest = token.partition("_")
    row = session.get(TokenRow, rest.partition("_")[0]) if kind == _KIND else None
    if row is None or not hmac.compare_digest(row.sha256, _sha256(token)):
        raise NotAuthenticated
    for verb, since in (("was revoked", row.revoked_at), ("has expired", row.expires_at)):
        if since is not None and since <= now:
            raise NotAuthenticated(f"The token {prefix_of(row.id)}… {verb} ({since:%Y-%m-%d %H:%M} UTC); ask an admin for a new one.")
    return row


def note_use(database: Database, row: TokenRow, *, now: datetime) -> None:
    """Remembers when a token was last used, to the minute: reading is not to become writing."""
    before = now - timedelta(seconds=_USED_SECONDS)
    if row.last_used_at is not None and row.last_used_at > before:
        return
    unnoted = or_(TokenRow.last_used_at.is_(None), TokenRow.last_used_at <= before)
    with database.write() as session:
        session.execute(update(TokenRow).where(TokenRow.id == row.id, unnoted).values(last_used_at=now))


def prefix_of(token_id: str) -> str:
    """What is shown of a token."""
    return f"{_KIND}_{token_id}"


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
