"""The state folder of an installation on one machine: `$MAESTRO_HOME`, or `~/.maestro`.

maestro.db  s3/  logs/        the database, the objects, a log for each process
secrets.json  client.json     keys, made once; where clients find the service, and their token
up.lock  run.json             held while `maestro up` runs; what it runs
"""

import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from service.installed import CLIENT_FILE, default_folder
from service.installed import HomeError as HomeError
from service.processes import ProcessId


class Secrets(BaseModel):
    """Keys of this installation. SeaweedFS's must stay the same for as long as its objects."""

    secret_key: str
    api_token: str
    ray_token: str
    s3_access_key: str
    s3_secret_key: str

    @classmethod
    def generate(cls) -> "Secrets":
        return cls(
            secret_key=secrets.token_hex(32),
            api_token=secrets.token_urlsafe(32),
            ray_token=secrets.token_hex(32),
            s3_access_key=f"maestro{secrets.token_hex(6)}",
            s3_secret_key=secrets.token_hex(24),
        )


class Run(BaseModel):
    """What one `maestro up` runs. `run` is the mark in the environment of all its processes."""

    run: str
    pid: int
    started_at: float
    ready: bool = False
    url: str
    s3_endpoint: str
    ray_url: str
    ray_temp_dir: str
    s3_ports: list[int]
    pids: dict[str, int | None] = {}

    def is_alive(self) -> bool:
        return ProcessId(self.pid, self.started_at).is_alive()


class Home:
    """One state folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self._lock: int | None = None

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.path / 'maestro.db'}"

    @property
    def client_file(self) -> Path:
        return self.path / CLIENT_FILE

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def prepare(self) -> None:
        """Make the folder, for its owner only."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
            (self.path / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise HomeError(f"the state folder {self.path} cannot be made: {error.strerror}; set MAESTRO_HOME to another one") from error

    def lock(self) -> None:
        """Hold this home until we end. HomeError when another `maestro up` holds it."""
        lock = os.open(self.path / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            run = self.read_run()
            where = f" (pid {run.pid}, {run.url})" if run is not None else ""
            raise HomeError(f"maestro is already up in {self.path}{where}; use it, or stop it with `maestro down`") from error
        self._lock = lock

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_locked(self) -> bool:
        """Whether a `maestro up` is at work here."""
        try:
            lock = os.open(self.path / "up.lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def secrets(self) -> Secrets:
        """This home's keys, made on the first call."""
        file = self.path / "secrets.json"
        if not file.exists():
            write_private(file, Secrets.generate().model_dump())
        try:
            return Secrets.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise HomeError(f"{file} is damaged; restore it, or move {self.path} away to begin anew") from error

    def write_client(self, *, url: str, token: str) -> None:
        write_private(self.client_file, {"url": url, "token": token})

    def read_run(self) -> Run | None:
        try:
            return Run.model_validate_json(self.run_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write_run(self, run: Run) -> None:
        write_private(self.run_file, run.model_dump())


def write_private(file: Path, content: dict[str, Any]) -> None:
    """Write JSON that only its owner may read, whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as output:
        json.dump(content, output, indent=2)
    partial.replace(file)


def default_home() -> Home:
    return Home(default_folder())
