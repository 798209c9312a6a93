"""The state of the stand-in: Ray jobs, the devices they hold, and what became of every one of them."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from service.ray_jobs import RayStatus
from tests.stand_in.run import Ended, Killed, SimulatedRun
from workers.contract import ORDER_VARIABLE, WorkOrder

DRIVER = "workers.main"  # an entrypoint with it is simulated, any other is run
STATUS_SECONDS = 5.0  # how old the figures of used devices may be, as Ray's
_STOP_SECONDS = 0.2  # from the wish to stop to the driver's end
_POOL_THREADS = 32


@dataclass
class Life:
    """One run, for the verdict. Times are seconds since the epoch; `first_steps` by incarnation; `is_forgotten`: the head has lost it."""

    submission_id: str
    metadata: dict[str, str]
    began_at: float
    ended_at: float | None = None
    is_forgotten: bool = False
    first_steps: list[int] = field(default_factory=list)


@dataclass
class Job:
    """One Ray job."""

    submission_id: str
    entrypoint: str
    env_vars: dict[str, str]
    metadata: dict[str, str]
    life: Life
    status: RayStatus = RayStatus.PENDING
    message: str | None = "Job has not started yet."
    exit_code: int | None = None
    log: str = ""
    task: asyncio.Task[None] | None = None

    def details(self) -> dict[str, Any]:
        """As Ray tells them."""
        life = self.life
        return {
            "type": "SUBMISSION",
            "job_id": None,
            "submission_id": self.submission_id,
            "driver_info": None,
            "status": str(self.status),
            "entrypoint": self.entrypoint,
            "message": self.message,
            "error_type": None,
            "start_time": int(life.began_at * 1000),
            "end_time": None if life.ended_at is None else int(life.ended_at * 1000),
            "metadata": self.metadata,
            "runtime_env": {"env_vars": self.env_vars},
            "driver_exit_code": self.exit_code,
        }


class Cluster:
    """Some CPUs, and the jobs on them."""

    def __init__(self, *, num_cpus: int, report_seconds: float, seed: int) -> None:
        self.num_cpus = num_cpus
        self.jobs: dict[str, Job] = {}
        self.lives: list[Life] = []
        self._used_cpus = 0
        self._told = (time.time(), 0)
        self._freed = asyncio.Condition()
        self._report_seconds = report_seconds
        self._random = random.Random(seed)
        self._pool = ThreadPoolExecutor(_POOL_THREADS)
        limits = httpx.Limits(max_connections=50, max_keepalive_connections=50)
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(30.0, connect=5.0, pool=None), limits=limits, trust_env=False)

    def submit(self, submission_id: str, entrypoint: str, env_vars: dict[str, str], metadata: dict[str, str]) -> bool:
        """False where there is one of this id."""
        if submission_id in self.jobs:
            return False
        life = Life(submission_id, metadata, time.time())
        job = self.jobs[submission_id] = Job(submission_id, entrypoint, env_vars, metadata, life)
        self.lives.append(life)
        job.task = asyncio.create_task(self._live(job))
        return True

    def stop(self, submission_id: str) -> bool:
        """Whether it was alive."""
        job = self.jobs[submission_id]
        if job.status.is_over:
            return False
        asyncio.get_running_loop().call_later(_STOP_SECONDS, self._cancel, job)
        return True

    def forget(self) -> int:
        """The head restarts: every run dies, and nothing is known of any. How many were alive."""
        alive = [job for job in self.jobs.values() if not job.status.is_over]
        for job in self.jobs.values():
            job.life.is_forgotten = True
        self.jobs = {}
        for job in alive:
            self._cancel(job)
        return len(alive)

    def usage(self) -> tuple[float, int]:
        """When it was told, and the CPUs used then."""
        if time.time() - self._told[0] >= STATUS_SECONDS:
            self._told = (time.time(), self._used_cpus)
        return self._told

    def history(self) -> list[dict[str, Any]]:
        return [asdict(life) for life in self.lives]

    def _cancel(self, job: Job) -> None:
        assert job.task is not None
        job.task.cancel()

    async def _live(self, job: Job) -> None:
        """From PENDING to its end. What is cancelled was stopped."""
        try:
            if DRIVER in job.entrypoint:
                ended = await self._simulate(job)
            else:
                ended = await self._execute(job)
        except Killed:
            self._over(job, RayStatus.FAILED, "Job entrypoint command failed with exit code -9", -9)
        except asyncio.CancelledError:
            self._over(job, RayStatus.STOPPED, "Job was intentionally stopped.", None)
        except Exception as error:
            self._over(job, RayStatus.FAILED, f"the stand-in failed: {error!r}", 1)
            raise
        else:
            failed = f"Job entrypoint command failed with exit code {ended.exit_code}, last available logs: {ended.message}"
            well = ended.exit_code == 0
            message = "Job finished successfully." if well else failed
            self._over(job, RayStatus.SUCCEEDED if well else RayStatus.FAILED, message, ended.exit_code)

    def _over(self, job: Job, status: RayStatus, message: str, exit_code: int | None) -> None:
        job.status, job.message, job.exit_code = status, message, exit_code
        job.life.ended_at = time.time()

    def _begin(self, job: Job) -> None:
        job.status, job.message = RayStatus.RUNNING, "Job is currently running."

    async def _simulate(self, job: Job) -> Ended:
        order = WorkOrder.model_validate_json(job.env_vars[ORDER_VARIABLE])
        await asyncio.sleep(self._random.uniform(0.05, 0.3))  # Ray starts a supervisor
        self._begin(job)
        job.log = f"maestro.driver: attempt {job.submission_id} begins\n"
        resources = order.spec.resources
        run = SimulatedRun(order, self._http, self._pool, report_seconds=self._report_seconds, took_first_step=job.life.first_steps.append)
        async with self._placed(resources.num_workers * resources.cpus_per_worker):
            return await run.drive()

    @contextlib.asynccontextmanager
    async def _placed(self, num_cpus: int) -> AsyncIterator[None]:
        """On devices of its own, as soon as they are free."""
        async with self._freed:
            await self._freed.wait_for(lambda: self._used_cpus + num_cpus <= self.num_cpus)
            self._used_cpus += num_cpus
        try:
            yield
        finally:
            self._used_cpus -= num_cpus
            async with self._freed:
                self._freed.notify_all()

    async def _execute(self, job: Job) -> Ended:
        """A real command."""
        environment = os.environ | job.env_vars
        process = await asyncio.create_subprocess_shell(
            job.entrypoint, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True
        )
        self._begin(job)
        try:
            output, _ = await process.communicate()
            job.log = output.decode(errors="replace")
        except asyncio.CancelledError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            raise
        assert process.returncode is not None
        return Ended(process.returncode, job.log[-200:])
