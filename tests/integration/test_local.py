"""The local object store and Ray head: what they listen on, who may speak to them, and what is left of them."""

import contextlib
import ipaddress
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from service.local import RayHead, Seaweedfs
from service.processes import processes_of_run


def listeners(run: str) -> set[tuple[str, str, int]]:
    """(process, address, port) of every listening socket of a run's processes."""
    found = set()
    for process in processes_of_run(run):
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((process.name(), connection.laddr.ip, connection.laddr.port))
    return found


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def run_ray_job(head: RayHead, entrypoint: str, *, timeout_seconds: float = 120) -> str:
    """Runs a job through the Jobs API and answers its log."""
    with httpx.Client(base_url=head.url, headers={"Authorization": f"Bearer {head.token}"}, trust_env=False) as client:
        job = client.post("/api/jobs/", json={"entrypoint": entrypoint}).raise_for_status().json()["submission_id"]
        deadline = time.monotonic() + timeout_seconds
        status = "PENDING"
        while status in ("PENDING", "RUNNING") and time.monotonic() < deadline:
            status = client.get(f"/api/jobs/{job}").raise_for_status().json()["status"]
            time.sleep(0.2)
        log: str = client.get(f"/api/jobs/{job}/logs").raise_for_status().json()["logs"]
    assert status == "SUCCEEDED", log
    return log


def test_everything_listens_on_loopback_only(seaweedfs: Seaweedfs, ray_head: RayHead, run_mark: str) -> None:
    found = listeners(run_mark)
    assert {"weed", "raylet", "gcs_server"} <= {name for name, _, _ in found}
    assert {entry for entry in found if not is_loopback(entry[1])} == set()


@pytest.mark.parametrize("token", [None, "wrong" * 8])
def test_the_jobs_api_refuses_strangers(ray_head: RayHead, token: str | None) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    answer = httpx.post(f"{ray_head.url}/api/jobs/", headers=headers, json={"entrypoint": "true"}, trust_env=False)
    assert answer.status_code in (401, 403)
    if token is None:
        assert answer.status_code == 401


@pytest.mark.parametrize("token", [None, "wrong" * 8])
def test_no_port_of_ray_takes_a_strangers_job_or_tells_him_of_ours(
    ray_head: RayHead, run_mark: str, token: str | None, tmp_path: Path
) -> None:
    """Dashboard, its agents, whatever else speaks HTTP: each port of the cluster is asked."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    job, refused = {"entrypoint": f"touch {tmp_path}/started"}, set()
    asked = [
        ("POST", "/api/jobs/"),
        ("POST", "/api/job_agent/jobs/"),
        ("GET", "/api/jobs/"),
        ("GET", "/nodes?view=summary"),
        ("GET", "/api/v0/tasks"),
    ]
    for process, address, port in sorted(listeners(run_mark)):
        if process in ("weed", "postgres"):
            continue
        for method, path in asked:
            try:
                answer = httpx.request(method, f"http://{address}:{port}{path}", headers=headers, json=job, trust_env=False, timeout=2)
            except httpx.HTTPError:  # it speaks something else
                continue
            assert answer.status_code >= 400, (process, port, method, path)
            refused |= {(port, answer.status_code)} if answer.status_code in (401, 403) else set()
    assert len({port for port, _ in refused}) >= 2  # the dashboard, and its agent
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("token", ["", "wrong" * 8])
@pytest.mark.parametrize("port", ["port", "ray-client-server-port"])
def test_a_driver_without_the_clusters_token_cannot_join(ray_head: RayHead, port: str, token: str) -> None:
    scheme = "ray://" if port == "ray-client-server-port" else ""
    address = f"{scheme}127.0.0.1:{ray_head._ports[port]}"
    code = f"import ray; ray.init({address!r}, log_to_driver=False); print('joined', ray.cluster_resources())"
    environment = {"PATH": os.environ["PATH"], "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"PATH": os.environ["PATH"]}
    driver = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert driver.returncode != 0
    assert "joined" not in driver.stdout
    assert "UNAUTHENTICATED" in driver.stderr.upper() or "AUTHENTICATION" in driver.stderr.upper(), driver.stderr[-2000:]


def test_a_job_has_the_storage_keys_and_our_mark(ray_head: RayHead, seaweedfs: Seaweedfs, run_mark: str) -> None:
    log = run_ray_job(ray_head, "echo KEY=$AWS_ACCESS_KEY_ID AT=$AWS_ENDPOINT_URL MARK=$MAESTRO_RUN")
    assert f"KEY={seaweedfs.access_key} AT={seaweedfs.endpoint} MARK={run_mark}" in log


def test_seaweedfs_killed_and_started_again_keeps_its_objects(tmp_path: Path) -> None:
    server = Seaweedfs(tmp_path / "s3", run=secrets.token_hex(8), log=tmp_path / "log", access_key="key", secret_key="secret" * 4)
    try:
        server.start()
        server.create_bucket("kept")
        server.client().put_object(Bucket="kept", Key="a/b", Body=b"bytes")
        server.child.kill()
        server.start()
        server.create_bucket("kept")
        assert server.client().get_object(Bucket="kept", Key="a/b")["Body"].read() == b"bytes"
    finally:
        server.stop()
    ports = server.endpoint.rpartition(":")[2]
    assert list(Path("/tmp").glob(f"seaweedfs-*-{ports}.sock")) == []


def test_a_stopped_ray_head_leaves_nothing(tmp_path: Path) -> None:
    run = f"leaves-{secrets.token_hex(8)}"
    head = RayHead(run=run, log=tmp_path / "ray.log", token=secrets.token_hex(32), environment={})
    try:
        head.start()
        run_ray_job(head, "true")
        assert head.child.pid is not None
        family = psutil.Process(head.child.pid).children(recursive=True)
        assert {head.child.pid} < {process.pid for process in processes_of_run(run)}
    finally:
        head.stop()
    assert processes_of_run(run) == []
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not head.temp_dir.exists()
