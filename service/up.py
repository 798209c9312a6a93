"""`maestro up`: the object store, the Ray head, the API and the dispatcher on this machine, watched until told to stop.

What dies is started again, with growing pauses. SIGTERM and Ctrl-C stop everything in order. If this process itself is killed, its
children go on (a training is not lost with its watcher), and the next `up` or `down` finds them by their mark and clears them away.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import httpx

from service.home import Home, HomeError, Run
from service.local import LOOPBACK, REGION, RayHead, Seaweedfs, remove_weed_sockets, storage_environment
from service.processes import Child, ProcessId, StartError, child_environment, exempt_loopback_from_proxies, free_ports, is_free, sweep

DEFAULT_PORT = 8470
BUCKET = "maestro"
STABLE_SECONDS = 60.0
Say = Callable[[str], None]


class Part(Protocol):
    """Something that `up` keeps running."""

    child: Child

    def launch(self) -> None: ...
    def stop(self) -> None: ...


@dataclass
class Server:
    """One of our own processes: API or dispatcher."""

    child: Child

    def launch(self) -> None:
        self.child.start()

    def stop(self) -> None:
        self.child.stop(grace_seconds=10)


class Keeper:
    """Starts a part again when it has ended: at once the first time, then after pauses that double up to 30 s."""

    def __init__(self, part: Part, *, say: Say) -> None:
        self.part = part
        self._say = say
        self._num_failures = 0
        self._due_at: float | None = None
        self._launched_at = 0.0

    def tick(self, now: float) -> bool:
        """Whether the part was started again."""
        child = self.part.child
        if child.exit_code is None:
            return False
        if self._due_at is None:
            if now - self._launched_at > STABLE_SECONDS:
                self._num_failures = 0
            pause = restart_pause(self._num_failures)
            self._num_failures += 1
            self._due_at = now + pause
            soon = f" in {pause:g} s" if pause else ""
            self._say(f"{child.name} ended with exit code {child.exit_code}; starting it again{soon} (log: {child.log})")
        if now < self._due_at:
            return False
        self._due_at = None
        self._launched_at = now
        self.part.launch()
        return True


def restart_pause(num_failures: int) -> float:
    """Seconds to wait before the next start, after this many failures in a row."""
    return 0.0 if num_failures == 0 else min(2.0 ** (num_failures - 1), 30.0)


class Installation:
    """All parts of one home."""

    def __init__(self, home: Home, *, port: int | None, say: Say, num_cpus: int | None = None) -> None:
        self.home = home
        self._say = say
        self._keys = home.secrets()
        self._mark = secrets.token_hex(8)
        self.port = choose_port(port)
        self.url = f"http://{LOOPBACK}:{self.port}"
        keys = self._keys
        self.storage = Seaweedfs(
            home.path / "s3", run=self._mark, log=home.log("seaweedfs"), access_key=keys.s3_access_key, secret_key=keys.s3_secret_key
        )
        self.cluster = RayHead(
            run=self._mark, log=home.log("ray"), token=keys.ray_token, environment=storage_environment(self.storage), num_cpus=num_cpus
        )
        environment = child_environment(self._mark, **self._settings())
        self.api = Server(
            Child("API", [sys.executable, "-m", "service.app"], environment=environment, log=home.log("api"), is_ready=self._api_answers)
        )
        self.dispatcher = Server(
            Child(
                "dispatcher",
                [sys.executable, "-m", "service.dispatcher"],
                environment=environment,
                log=home.log("dispatcher"),
                is_ready=lambda: True,
            )
        )
        self.parts: list[Part] = [self.storage, self.cluster, self.api, self.dispatcher]

    def _settings(self) -> dict[str, str]:
        settings = {
            "HOME": str(self.home.path),
            "DATABASE_URL": self.home.database_url,
            "SECRET_KEY": self._keys.secret_key,
            "API_TOKEN": self._keys.api_token,
            "HOST": LOOPBACK,
            "PORT": str(self.port),
            "SERVICE_URL": self.url,
            "RAY_URL": self.cluster.url,
            "RAY_TOKEN": self._keys.ray_token,
            "S3_ENDPOINT": self.storage.endpoint,
            "S3_PUBLIC_ENDPOINT": self.storage.endpoint,
            "S3_REGION": REGION,
            "S3_BUCKET": BUCKET,
            "MAX_WORKERS_PER_JOB": str(self.cluster.num_cpus),
            "SOURCES_ARE_LOCAL": "true",
            "WORKER_PYTHON": sys.executable,
        }
        return {f"MAESTRO_{name}": value for name, value in settings.items()} | storage_environment(self.storage)

    def start(self) -> None:
        """Start all parts and wait until they answer. The cluster takes longest and is started beside the others."""
        self.write_run(ready=False)
        self.cluster.launch()
        self.storage.start()
        self.storage.create_bucket(BUCKET)
        self._migrate()
        self.api.launch()
        self.dispatcher.launch()
        self.api.child.wait_ready(timeout_seconds=60)
        self.cluster.child.wait_ready(timeout_seconds=120)
        if self.dispatcher.child.exit_code is not None:
            self.dispatcher.child.wait_ready(timeout_seconds=0)
        self.home.write_client(url=self.url, token=self._keys.api_token)
        self.write_run(ready=True)

    def _migrate(self) -> None:
        command = [sys.executable, "-m", "service.migrations"]
        done = subprocess.run(command, env=self.api.child.environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise StartError(f"the database {self.home.database_url} could not be brought up to date:\n{done.stderr.strip()[-1500:]}")

    def keep(self, stopping: threading.Event) -> None:
        """Watch the parts until told to stop."""
        keepers = [Keeper(part, say=self._say) for part in self.parts]
        while not stopping.wait(0.2):
            restarted = [keeper.tick(time.monotonic()) for keeper in keepers]
            if any(restarted):
                self.write_run(ready=True)

    def stop(self) -> None:
        """Stop all parts in order, the users of others first; then whatever carries our mark."""
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(lambda part: part.stop(), [self.api, self.dispatcher]))
        self.cluster.stop()
        self.storage.stop()
        sweep(self._mark)
        self.home.run_file.unlink(missing_ok=True)

    def write_run(self, *, ready: bool) -> None:
        me = ProcessId.of(os.getpid())
        self.home.write_run(
            Run(
                run=self._mark,
                pid=me.pid,
                started_at=me.started_at,
                ready=ready,
                url=self.url,
                s3_endpoint=self.storage.endpoint,
                ray_url=self.cluster.url,
                ray_temp_dir=str(self.cluster.temp_dir),
                s3_ports=self.storage.ports,
                pids={part.child.name: part.child.pid for part in self.parts},
            )
        )

    def _api_answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/livez", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False


def choose_port(port: int | None) -> int:
    """The port asked for; else the usual one, or any other when that is taken."""
    if port is None:
        return DEFAULT_PORT if is_free(DEFAULT_PORT) else free_ports(1)[0]
    if not is_free(port):
        raise StartError(f"port {port} is in use; leave --port out, or give another")
    return port


@contextlib.contextmanager
def running(home: Home, *, port: int | None = None, say: Say, num_cpus: int | None = None) -> Iterator[Installation]:
    """Everything up inside the block, and nothing left of it afterwards, however the block ends."""
    exempt_loopback_from_proxies(os.environ)
    home.prepare()
    home.lock()
    try:
        clear_leftovers(home, say=say)
        installation = Installation(home, port=port, say=say, num_cpus=num_cpus)
        try:
            installation.start()
            yield installation
        finally:
            with signals_ignored():
                installation.stop()
    finally:
        home.unlock()


def run_until_stopped(home: Home, *, port: int | None, say: Say, on_ready: Callable[[Installation], None]) -> None:
    """`maestro up`: returns after SIGINT, SIGTERM or SIGHUP, when everything is stopped."""
    with interruptible(), contextlib.suppress(KeyboardInterrupt), running(home, port=port, say=say) as installation:
        on_ready(installation)
        installation.keep(threading.Event())


def start_detached(home: Home, *, port: int | None, timeout_seconds: float = 180) -> Run:
    """`maestro up --detach`: start a process that does it, and wait until it is ready."""
    home.prepare()
    if home.is_locked():
        home.lock()  # says who holds it
    command = [sys.executable, "-m", "service.cli", "up", "--home", str(home.path), *(["--port", str(port)] if port else [])]
    log = home.log("up")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + timeout_seconds
    try:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StartError(log.read_text(errors="replace").strip() or f"maestro up ended with exit code {process.returncode}")
            run = home.read_run()
            if run is not None and run.ready and run.pid == process.pid:
                return run
            time.sleep(0.1)
        raise StartError(f"maestro up is not ready after {timeout_seconds:g} s; see {log}")
    except BaseException:
        process.terminate()
        raise


class Down(NamedTuple):
    """What `maestro down` did: whether there was anything to stop, and in words."""

    stopped: bool
    detail: str


def stop_detached(home: Home, *, timeout_seconds: float = 60) -> Down:
    """`maestro down`: stop what runs in this home, or what a crash left of it."""
    run = home.read_run()
    if not home.is_locked():
        num_left = clear_leftovers(home, say=lambda _: None)
        if not num_left:
            return Down(False, f"nothing is up in {home.path}")
        return Down(True, f"cleared away {num_left} process(es) that a killed `maestro up` had left")
    if run is None or not run.is_alive():
        raise HomeError(f"maestro is just starting or stopping in {home.path}; try again in a moment")
    os.kill(run.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_seconds
    while home.is_locked():
        if time.monotonic() > deadline:
            os.kill(run.pid, signal.SIGKILL)
            time.sleep(0.5)
            clear_leftovers(home, say=lambda _: None)
            return Down(True, f"killed (it did not stop within {timeout_seconds:g} s)")
        time.sleep(0.1)
    return Down(True, "stopped")


def clear_leftovers(home: Home, *, say: Say) -> int:
    """Stop and remove what a killed `up` or a crash of the machine left. Answers how many processes that were."""
    run = home.read_run()
    if run is None:
        return 0
    num_killed = sweep(run.run)
    if num_killed:
        say(f"cleared away {num_killed} process(es) that a killed `maestro up` had left")
    if Path(run.ray_temp_dir).name.startswith("maestro-ray-"):
        shutil.rmtree(run.ray_temp_dir, ignore_errors=True)
    remove_weed_sockets(run.s3_ports)
    home.run_file.unlink(missing_ok=True)
    return num_killed


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """A second Ctrl-C does not break off the stopping."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
