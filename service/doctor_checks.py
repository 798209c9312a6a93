"""What `maestro doctor` looks at, but for object storage: the API, the database, Ray, disks, versions."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import httpx
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from service.db import Database
from service.errors import RayUnreachable
from service.migrations.schema import current_revision, head_revision
from service.ray_jobs import HttpRayJobs, RayNode
from service.wording import size

Status = Literal["ok", "warn", "fail"]
SKEW_WARNING_SECONDS = 5.0
SKEW_LIMIT_SECONDS = 300.0  # S3 refuses signatures that are a quarter of an hour off
LOW_DISK_BYTES = 10e9
NO_DISK_BYTES = 1e9


class Check(NamedTuple):
    """One look: what was found, and what to do where it is not ok."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def api(url: str, token: str, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> list[Check]:
    """Reachable, with a good token, all behind it ready, and on the same time."""
    local = httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
    try:
        with httpx.Client(base_url=url, timeout=10.0, trust_env=not local) as client:
            alive = client.get("/livez")
            answered_at = clock()
            if alive.status_code != 200:
                return [Check("API", "fail", f"{url} answers {alive.status_code}", "check the address, and any proxy before it")]
            asked = client.get("/v1/jobs", params={"limit": 1, "fields": "id"}, headers={"Authorization": f"Bearer {token}"})
            ready = client.get("/readyz")
    except httpx.HTTPError as error:
        return [
            Check("API", "fail", f"no answer from {url} ({error})", "start it (`maestro up`), or check MAESTRO_URL, network and firewall")
        ]
    return [Check("API", "ok", f"{url} answers"), _token(asked), *_ready(ready), _clock(alive, answered_at)]


def _token(asked: httpx.Response) -> Check:
    if asked.status_code == 200:
        return Check("token", "ok", "it is good for jobs")
    remedy = "get another from an admin (`maestro tokens create`); this one is wrong, revoked or expired"
    return Check("token", "fail", f"the API refuses it ({asked.status_code})", remedy)


def _ready(ready: httpx.Response) -> list[Check]:
    try:
        missing = dict(ready.json()["missing"])
    except (ValueError, KeyError, TypeError):
        return [Check("readiness", "fail", f"the API answers {ready.status_code} without saying what it has", "check MAESTRO_URL")]
    if not missing:
        return [Check("readiness", "ok", "the API reaches its database, object storage and Ray")]
    return [
        Check(f"API → {name}", "fail", str(detail), "see the check of that part, where there is one, or the API's log")
        for name, detail in missing.items()
    ]


def _clock(answer: httpx.Response, at: datetime) -> Check:
    try:
        skew = abs((parsedate_to_datetime(answer.headers["Date"]).replace(tzinfo=UTC) - at).total_seconds())  # it is always GMT
    except (KeyError, ValueError):
        return Check("clock", "warn", "the API tells no time", "a proxy takes its Date header away")
    if skew <= SKEW_WARNING_SECONDS:
        return Check("clock", "ok", "within seconds of the API's")
    status: Status = "fail" if skew > SKEW_LIMIT_SECONDS else "warn"
    return Check("clock", status, f"{skew:.0f} s off the API's", "have both machines keep time by NTP (`timedatectl set-ntp true`)")


def database(url: str) -> Check:
    """It answers, and has this version's schema. A SQLite file that is not there is not made."""
    parsed = make_url(url)
    shown = parsed.render_as_string(hide_password=True)
    is_file = parsed.get_backend_name() == "sqlite"
    if is_file and not os.access(parsed.database or "", os.R_OK | os.W_OK):
        return Check(
            "database", "fail", f"{shown}: there is no such file, or it may not be written", "python -m service.migrations makes it"
        )
    opened = Database(url)
    try:
        found, needed = current_revision(opened), head_revision()
    except SQLAlchemyError as error:
        why = type(error.__cause__ or error).__name__
        return Check("database", "fail", f"{shown} does not answer ({why})", "check that it runs, its address, user and password")
    finally:
        opened.close()
    if found != needed:
        remedy = "python -m service.migrations brings it up to date"
        return Check("database", "fail", f"{shown} has the schema {found or 'of no version'}, this version needs {needed}", remedy)
    return Check("database", "ok", f"{shown}, schema {found}")


def ray(url: str, token: str) -> list[Check]:
    """It answers with our token and with none other, has our version, and its devices."""
    cluster = HttpRayJobs(url, token=token)
    try:
        cluster.check()
        nodes = cluster.nodes()
        theirs = cluster.version()
    except RayUnreachable as error:
        return [Check("Ray", "fail", error.detail, "start its head (`ray start --head`), and check MAESTRO_RAY_URL and MAESTRO_RAY_TOKEN")]
    finally:
        cluster.close()
    ours = _installed("ray")
    cpus = sum(node.num_cpus for node in nodes)
    found = Check("Ray", "ok", f"{url}, {len(nodes)} machines with {cpus:g} CPUs, version {theirs}")
    if ours is not None and ours != theirs:
        found = Check("Ray", "warn", f"the cluster has version {theirs}, this machine {ours}", "install the same version on all machines")
    return [found, _gpus(nodes)]


def _gpus(nodes: Sequence[RayNode]) -> Check:
    of_ray = sum(node.num_gpus for node in nodes)
    here = _gpus_here()
    if here and not of_ray:
        remedy = "start Ray where it sees them (CUDA_VISIBLE_DEVICES), or with --num-gpus"
        return Check("GPUs", "warn", f"this machine has {len(here)} ({', '.join(sorted(set(here)))}), Ray none", remedy)
    if not of_ray:
        return Check("GPUs", "ok", "none: jobs train on CPUs")
    return Check("GPUs", "ok", f"{of_ray:g} in Ray" + (f"; here {len(here)} ({', '.join(sorted(set(here)))})" if here else ""))


def _gpus_here() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def disks(home: Path) -> list[Check]:
    """Where the installation keeps its state, and where temporary files go."""
    places = {"disk": home if home.exists() else Path.home(), "temporary files": Path(tempfile.gettempdir())}
    return [_disk(name, place) for name, place in places.items()]


def _disk(name: str, place: Path) -> Check:
    free = shutil.disk_usage(place).free
    status: Status = "fail" if free < NO_DISK_BYTES else "warn" if free < LOW_DISK_BYTES else "ok"
    return Check(name, status, f"{size(free)} free in {place}", "delete old jobs (`maestro delete`), or move it to a larger disk")


def versions(*, is_local: bool) -> list[Check]:
    """Of Python and the libraries. is_local: `maestro up` trains on this machine; else it may be the service's or a user's alone."""
    found = {name: _installed(name) for name in ("maestro-mae", "torch", "ray", "timm")}
    shown = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    checks = [Check("versions", "ok", f"Python {'.'.join(map(str, sys.version_info[:3]))}, {shown}")]
    checks += [_no_worker(name, is_local=is_local) for name in ("torch", "ray") if found[name] is None]
    if found["timm"] is None:
        checks.append(Check("timm", "warn", "not installed here", "only where encoders are loaded with it: pip install timm"))
    return checks


def _no_worker(name: str, *, is_local: bool) -> Check:
    """What a library means that only workers need: the image of the service, for one, is without."""
    if is_local:
        return Check(name, "fail", "not installed here, where `maestro up` trains", "pip install 'maestro-mae[local]'")
    if _gpus_here():
        return Check(name, "warn", "not installed on this machine with GPUs", "where it is to train: pip install 'maestro-mae[workers]'")
    return Check(name, "ok", "not installed here; only machines that train need it")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
