"""Child processes of an installation on one machine.

Each runs in a session of its own, so that a Ctrl-C reaches only us, and carries `MAESTRO_RUN` in its environment, which all its
descendants inherit: that is how even those that left their process group, or lost their parent, are found and stopped. Ray's own
`ray stop` is never used: it would stop every cluster of the machine.
"""

import contextlib
import os
import random
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from service.installed import StartError as StartError

RUN_VARIABLE = "MAESTRO_RUN"
PART_VARIABLE = "MAESTRO_PART"
MAX_LOG_BYTES = 20_000_000
_CLOCK_TOLERANCE_SECONDS = 1.0


@dataclass(frozen=True)
class ProcessId:
    """A process known by more than its number, which the system uses again."""

    pid: int
    started_at: float

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        return cls(pid, psutil.Process(pid).create_time())

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started_at) < _CLOCK_TOLERANCE_SECONDS
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


class Child:
    """One process that we start, watch and stop. `is_ready` says whether it does its work; it may raise OSError for "not yet"."""

    def __init__(self, name: str, command: list[str], *, environment: dict[str, str], log: Path, is_ready: Callable[[], bool]) -> None:
        self.name = name
        self.command = command
        self.environment = {**environment, PART_VARIABLE: name}
        self.log = log
        self.is_ready = is_ready
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > MAX_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".1.log"))
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, *, timeout_seconds: float) -> None:
        """StartError when the process ends, or does not answer in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            if self.exit_code is not None:
                raise StartError(
                    f"{self.name} ended with exit code {self.exit_code} while starting; its log {self.log} ends:\n{self.log_tail()}"
                )
            with contextlib.suppress(OSError):
                if self.is_ready():
                    return
            if time.monotonic() > deadline:
                raise StartError(f"{self.name} did not answer within {timeout_seconds:g} s; its log {self.log} ends:\n{self.log_tail()}")
            time.sleep(0.1)

    def stop(self, *, grace_seconds: float = 10) -> None:
        """SIGTERM to the process, then SIGKILL to all that is left of it and its descendants."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            self._process.terminate()
            self._process.wait(grace_seconds)
        self._process.kill()
        self._process.wait()
        self.sweep()

    def sweep(self) -> int:
        """SIGKILL to the process and its descendants."""
        return sweep(self.environment[RUN_VARIABLE], part=self.name)

    def kill(self) -> None:
        """SIGKILL to the process alone, as a crash would do."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def log_tail(self, *, num_lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])
        return "(no log)"


def kill(processes: Iterable[psutil.Process], *, timeout_seconds: float = 10) -> None:
    doomed = list(processes)
    for process in doomed:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(doomed, timeout=timeout_seconds)


def processes_of_run(run: str, *, part: str | None = None) -> list[psutil.Process]:
    """All processes that carry the mark of this run (and part), whatever became of their parents."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            marked = environment.get(RUN_VARIABLE) == run and part in (None, environment.get(PART_VARIABLE))
            if marked and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def sweep(run: str, *, part: str | None = None) -> int:
    """SIGKILL to whatever is left of a run, or of one part of it. Answers how many processes that were."""
    num_killed = 0
    for _ in range(5):
        left = processes_of_run(run, part=part)
        if not left:
            break
        num_killed += len(left)
        kill(left)
    return num_killed


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on, below the range from which outgoing connections take theirs."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 2_000):
        if len(ports) == count:
            return ports
        if is_free(port):
            ports.append(port)
    raise StartError("no free ports between 20000 and 32000")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's TIME_WAIT does not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def exempt_loopback_from_proxies(environment: MutableMapping[str, str]) -> None:
    """A proxy of the machine is not for what we start on it: HTTP clients (httpx, boto3) ask it even for 127.0.0.1, unless told."""
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, [environment.get(name), "127.0.0.1", "localhost"]))


def child_environment(run: str, **extra: str) -> dict[str, str]:
    """Our environment without what would lead a child to another cluster or another's keys, and with the run's mark."""
    foreign = ("RAY_ADDRESS", "RAY_AUTH", "RAY_JOB", "RAY_NAMESPACE", "RAY_TMPDIR", "AWS_", "MAESTRO_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    # SPT_NOENV: Ray's process titles would otherwise overwrite the environment that we find its processes by.
    exempt_loopback_from_proxies(kept)
    return {**kept, "SPT_NOENV": "1", "PYTHONUNBUFFERED": "1", RUN_VARIABLE: run, **extra}


def raise_open_files() -> None:
    """As many connections as the system lets us have: 1,024 open files are the usual default, and each stream is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
