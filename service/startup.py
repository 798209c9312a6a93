"""What a process makes sure of before it begins, so that it never half starts: it does its work, or ends and says what to do.

Exit code 2: somebody has to do something first. 1: the database does not answer, and whoever watches the process may start it again.
Object storage and Ray may be away: those who are at work wait for them, too. But a bucket that answers and refuses us is a mistake.
"""

import logging
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from sqlalchemy import select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, OperationalError

from service.db import Database, db_now, utc_now
from service.errors import StorageRefuses, StorageUnreachable
from service.ids import chance
from service.migrations.schema import current_revision, head_revision, is_known
from service.settings import Settings
from service.storage import ObjectNotFound, Storage

log = logging.getLogger(__name__)

FREE_BYTES = 64 * 2**20  # of a SQLite database's disk
MAX_SKEW_SECONDS = 10.0  # between this machine's clock and the database's: half of the silence after which workers count as dead
_MIGRATE = "python -m service.migrations"


def stop(message: str, *, exit_code: int = 2) -> NoReturn:
    sys.stderr.write(f"The service cannot start: {message}\n")
    raise SystemExit(exit_code)


def open_database(settings: Settings, *, is_migration: bool = False) -> Database:
    """The database, when it answers, has this version's schema (before a migration: any that it knows), room, and about our time."""
    url = settings.database_url.get_secret_value()
    shown = make_url(url).render_as_string(hide_password=True)
    _require_room(url)
    database = Database(url)
    with ExitStack() as stack:
        stack.callback(database.close)
        try:
            _require_schema(database, is_migration=is_migration)
            _require_clock(database)
        except (OperationalError, InterfaceError) as error:
            why = str(error.orig).strip().splitlines()[0] if error.orig else type(error).__name__
            stop(f"the database {shown} does not answer: {why}. See that it runs, and that MAESTRO_DATABASE_URL is right.", exit_code=1)
        stack.pop_all()
    return database


def require_rights(storage: Storage) -> None:
    """We may write, read, list and delete in the bucket. Where storage does not answer, that is left open."""
    key = f"startup/{chance(12)}"
    doing = "write"
    try:
        storage.put_bytes(key, b"MAEstro may write here")
        doing = "read"
        storage.read_bytes(key, start=0, length=1)
        doing = "list"
        storage.list("startup/", limit=1)
        doing = "delete"
        storage.delete([key])
    except StorageRefuses as error:
        stop(
            f"we may not {doing} in the bucket {storage.bucket!r}: {error.detail} The keys (AWS_*) need s3:PutObject, s3:GetObject, "
            "s3:ListBucket and s3:DeleteObject."
        )
    except ObjectNotFound:
        stop(f"there is no bucket {storage.bucket!r}. Create it, or set MAESTRO_S3_BUCKET to one that there is.")
    except StorageUnreachable as error:
        log.warning("%s It is waited for.", error.detail)


def _require_room(url: str) -> None:
    path = make_url(url).database
    if not url.startswith("sqlite") or not path:
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        stop(f"the folder {folder} of the database does not exist. Create it, or set MAESTRO_DATABASE_URL to another one.")
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        stop(f"the disk of {folder} has {free // 2**20} MiB free, and the database needs {FREE_BYTES // 2**20}. Make room there.")


def _require_schema(database: Database, *, is_migration: bool) -> None:
    found = current_revision(database)
    if found is not None and not is_known(found):
        stop(
            f"the database's schema {found} is of a newer version than this one, which knows those up to {head_revision()}. "
            "Install the newer version again, or restore the backup from before the upgrade."
        )
    if found != head_revision() and not is_migration:
        stop(f"the database's schema is {found or 'empty'}, this version needs {head_revision()}. Upgrade it with: {_MIGRATE}")


def _require_clock(database: Database) -> None:
    before = utc_now()
    with database.read() as session:
        theirs = session.execute(select(db_now())).scalar_one()
    after = utc_now()
    skew = max((theirs - after).total_seconds(), (before - theirs).total_seconds())
    if skew > MAX_SKEW_SECONDS:
        side = "behind" if theirs > after else "ahead of"
        stop(f"this machine's clock is {skew:.0f} s {side} the database's. Set both by NTP: leases, tokens and time limits go by them.")
