"""Folders of this user's workers on this machine: a worker's scratch folder, and those that outlive it.

Scratch is gone with the worker or, where it was killed, when the next worker of its job starts on the machine.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workers.contract import submission_id

logger = logging.getLogger(__name__)

FORGET_SECONDS = 7 * 86400.0


def user_folder() -> Path:
    """The folder of this user's workers on this machine, that nobody else can read."""
    of_user = Path(tempfile.gettempdir()) / f"maestro-{os.getuid()}"
    of_user.mkdir(mode=0o700, exist_ok=True)
    of_user.chmod(0o700)  # refused where another user has made it
    return of_user


@contextmanager
def scratch_folder(job: str, attempt: int, rank: int) -> Iterator[Path]:
    """A new folder of this worker's own, below one of its user's own. It is locked while the worker lives, by which others know."""
    of_user = user_folder()
    with _locked(of_user):  # nobody takes a new folder for a dead worker's before it is locked
        for left in of_user.glob(f"{job}-a*-rank*"):
            _delete_unless_locked(left)
        folder = Path(tempfile.mkdtemp(prefix=f"{submission_id(job, attempt)}-rank{rank}-", dir=of_user))
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def forget_untouched(folder: Path, *, seconds: float = FORGET_SECONDS) -> None:
    """Deletes the folders in `folder` that nobody has touched for so long: of jobs that were killed, or went on elsewhere."""
    for left in folder.glob("*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > seconds:
                logger.warning("nobody has touched %s for %g days; it is deleted", left, seconds / 86400)
                shutil.rmtree(left)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _delete_unless_locked(folder: Path) -> None:
    """The system drops a process's locks when it dies, however it dies."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its worker has just ended
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
