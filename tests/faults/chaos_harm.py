"""What befalls a service in a chaos run: seeded, in several rhythms at once, and mended after a while."""

import contextlib
import logging
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

import psutil

from service.processes import RUN_VARIABLE, Child
from service.up import Installation
from tests.faults.checks import drivers
from tests.integration.runs import train_workers
from tests.postgres import Postgres
from tests.stand_in.stage import Stage

log = logging.getLogger(__name__)
Harm = Callable[[], object]


class Rhythm(NamedTuple):
    """One harm of these after the other, with pauses between a least and a most number of seconds."""

    pause_seconds: tuple[float, float]
    harms: list[tuple[str, Harm]]


class Harmer:
    """Does harm in every rhythm at once until told to stop; then everything is whole again. `done`: how often what was done."""

    def __init__(self, rhythms: list[Rhythm], *, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(len(rhythms))
        self._work = [self._pool.submit(self._follow, each, random.Random(f"{seed} {number}")) for number, each in enumerate(rhythms)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Raises what a harm raised: then the run says nothing."""
        self._stopping.set()
        self._pool.shutdown()
        for each in self._work:
            each.result()

    def _follow(self, rhythm: Rhythm, drawn: random.Random) -> None:
        while not self._stopping.wait(drawn.uniform(*rhythm.pause_seconds)):
            name, harm = drawn.choice(rhythm.harms)
            log.info(name)
            harm()
            self.done[name] += 1


def kill(*children: Child, seconds: float) -> None:
    """kill -9, and started again after so long."""
    for child in children:
        child.kill()
    time.sleep(seconds)
    for child in children:
        child.start()


@contextlib.contextmanager
def supervised(*children: Child) -> Iterator[None]:
    """Starts again what ends by itself, as whoever runs a service does: one that starts while its database is away says so and ends."""
    stopping = threading.Event()

    def watch() -> None:
        while not stopping.wait(0.5):
            for child in children:
                if child.exit_code not in (None, -signal.SIGKILL):  # what was killed is started by who has killed it
                    log.info("%s has ended with exit code %s and is started again", child.name, child.exit_code)
                    child.start()

    watcher = threading.Thread(target=watch, name="supervisor")
    watcher.start()
    try:
        yield
    finally:
        stopping.set()
        watcher.join()


def harm_to_stage(stage: Stage, *, seed: int) -> list[Rhythm]:
    """Processes and the database; Ray and object storage; rarely, Ray's head."""
    drawn = random.Random(seed)

    def killed(*children: Child) -> Harm:
        return lambda: kill(*children, seconds=drawn.uniform(0.2, 3.0))

    def kill_one_dispatcher() -> None:
        kill(drawn.choice(stage.dispatchers), seconds=drawn.uniform(0.2, 3.0))

    def freeze_dispatcher() -> None:
        """For longer than its leases last."""
        with frozen(drawn.choice(stage.dispatchers)):
            time.sleep(drawn.uniform(6.0, 8.0))

    def amiss(**faults: float | bool) -> Harm:
        def harm() -> None:
            stage.ray.faults(**faults)
            time.sleep(drawn.uniform(2.0, 8.0))
            stage.ray.faults()

        return harm

    def kill_storage() -> None:
        stage.storage.child.kill()
        time.sleep(drawn.uniform(0.5, 4.0))
        stage.storage.start()

    def freeze_storage() -> None:
        with frozen(stage.storage.child):
            time.sleep(drawn.uniform(1.0, 5.0))

    def stopped_database(postgres: Postgres, mode: str) -> Harm:
        def harm() -> None:
            postgres.stop(mode=mode)
            time.sleep(drawn.uniform(0.2, 3.0))
            postgres.start()

        return harm

    processes: list[tuple[str, Harm]] = [
        ("kill -9 of the API", killed(stage.api)),
        ("kill -9 of a dispatcher", kill_one_dispatcher),
        ("kill -9 of API and dispatchers", killed(stage.api, *stage.dispatchers)),
        ("a dispatcher frozen", freeze_dispatcher),
    ]
    if stage.postgres is not None:
        processes += [
            ("PostgreSQL crashed", stopped_database(stage.postgres, "immediate")),
            ("PostgreSQL restarted", stopped_database(stage.postgres, "fast")),
        ]
    others: list[tuple[str, Harm]] = [
        ("Ray's answers lost", amiss(lost_answers=0.5)),
        ("Ray's answers late", amiss(stalls=0.1)),
        ("Ray answers 500", amiss(errors=0.5)),
        ("Ray away", amiss(away=True)),
        ("kill -9 of object storage", kill_storage),
        ("object storage frozen", freeze_storage),
    ]
    head: list[tuple[str, Harm]] = [("Ray's head restarted", stage.ray.forget)]
    return [Rhythm((1.0, 10.0), processes), Rhythm((1.0, 10.0), others), Rhythm((15.0, 60.0), head)]


def harm_to_installation(installation: Installation, *, seed: int) -> list[Rhythm]:
    """Our own processes, and those of the runs."""
    drawn = random.Random(seed)
    run = installation.api.child.environment[RUN_VARIABLE]

    def killed(*children: Child) -> Harm:
        return lambda: kill(*children, seconds=drawn.uniform(0.2, 3.0))

    def kill_one(of: Callable[[], list[psutil.Process]]) -> None:
        if found := of():
            with contextlib.suppress(psutil.Error):
                drawn.choice(found).kill()

    api, dispatcher = installation.api.child, installation.dispatcher.child
    own: list[tuple[str, Harm]] = [
        ("kill -9 of the API", killed(api)),
        ("kill -9 of the dispatcher", killed(dispatcher)),
        ("kill -9 of API and dispatcher", killed(api, dispatcher)),
    ]
    of_runs: list[tuple[str, Harm]] = [
        ("kill -9 of a driver", lambda: kill_one(lambda: drivers(run))),
        ("kill -9 of a worker", lambda: kill_one(lambda: train_workers(run))),
    ]
    return [Rhythm((2.0, 20.0), own), Rhythm((10.0, 40.0), of_runs)]


@contextlib.contextmanager
def frozen(child: Child) -> Iterator[None]:
    """SIGSTOP, then SIGCONT: alive, and silent."""
    pid = child.pid
    assert pid is not None
    process = psutil.Process(pid)
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
