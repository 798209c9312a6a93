"""The two processes as they are started."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.db import Database
from service.migrations.schema import upgrade
from service.processes import free_ports
from tests.unit.service_fixtures import API_TOKEN, Service, make_settings

ROOT = Path(__file__).parents[2]


def environment(folder: Path, port: int) -> dict[str, str]:
    values = {
        "DATABASE_URL": f"sqlite:///{folder}/maestro.db",
        "SECRET_KEY": "s" * 32,
        "API_TOKEN": API_TOKEN,
        "PORT": str(port),
        "SERVICE_URL": f"http://127.0.0.1:{port}",
        "RAY_URL": "http://127.0.0.1:9",
        "RAY_TOKEN": "r",
        "S3_ENDPOINT": "http://127.0.0.1:9",
        "S3_BUCKET": "maestro",
    }
    aws = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    return {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]} | {f"MAESTRO_{name}": value for name, value in values.items()} | aws


@contextlib.contextmanager
def process(module: str, folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", "-m", module]
    with subprocess.Popen(command, env=environment(folder, port), cwd=folder, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def test_neither_torch_nor_ray_is_loaded() -> None:
    code = "import service.app, service.dispatcher, sys; print(sorted({'torch', 'ray', 'mae_core.mae'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["service.app", "service.dispatcher"])
def test_an_old_database_is_refused(tmp_path: Path, module: str) -> None:
    with process(module, tmp_path, 1) as child:
        assert child.wait(60) == 2
        assert child.stderr is not None
        assert "python -m service.migrations" in child.stderr.read()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    settings = make_settings(tmp_path)
    database = Database(settings.database_url.get_secret_value())
    upgrade(database)
    yield Service(settings, database)
    database.close()


def test_the_api_serves_and_ends_on_sigterm_with_a_stream_open(tmp_path: Path, service: Service) -> None:
    [port] = free_ports(1)
    job_id = service.submit()
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {API_TOKEN}"}
    with process("service.app", tmp_path, port) as child, httpx.Client(base_url=url, headers=headers, trust_env=False) as http:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.ConnectError):
                if http.get("/livez").status_code == 200:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert http.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"
        ready = http.get("/readyz", timeout=30)
        assert (ready.status_code, set(ready.json()["missing"])) == (503, {"storage", "ray"})
        stream_headers = {"Accept": "text/event-stream"}
        with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=stream_headers, timeout=30) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: event"
            service.cancel(job_id)
            assert any("cancelled" in line for line in lines)
        other = service.submit()
        with http.stream("GET", f"/v1/jobs/{other}/events", headers=stream_headers, timeout=30) as stream:
            next(stream.iter_lines())
            child.send_signal(signal.SIGTERM)
            assert child.wait(20) in (0, -signal.SIGTERM)


def test_the_dispatcher_reacts_at_once_and_ends_on_sigterm(tmp_path: Path, service: Service) -> None:
    with process("service.dispatcher", tmp_path, 1) as child:
        assert child.stderr is not None
        assert any("dispatching for" in line for line in child.stderr)
        job_id = service.submit()
        deadline = time.monotonic() + 20
        while service.job(job_id).reason is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert service.job(job_id).reason == "storage_unreachable"
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0
