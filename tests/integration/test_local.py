"""The local object store and Ray head: what they listen on, who may speak to them, and what is left of them."""

import contextlib
import ipaddress
import secrets
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
def test_no_port_of_ray_takes_a_strangers_job_or_tells_of_ours(ray_head: RayHead, run_mark: str, token: str | None, tmp_path: Path) -> None:
    """The dashboard, its agent, and whatever else speaks HTTP: each port of the cluster is asked."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    job = {"entrypoint": f"touch {tmp_path}/started"}
    asked = [("POST", path) for path in ("/api/jobs/", "/api/job_agent/jobs/")]
    asked += [("GET", path) for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/tasks", "/api/v0/logs")]
    ports, refusing = ray_head._ports, set()
    for port in {port for process, _, port in listeners(run_mark) if process not in ("weed", "postgres")}:
        for method, path in asked:
            try:
                answer = httpx.request(method, f"http://127.0.0.1:{port}{path}", headers=headers, json=job, trust_env=False, timeout=2)
            except httpx.HTTPError:  # it speaks something else
                break
            is_metrics = method == "GET" and port == ports["metrics-export-port"]  # Prometheus's figures, whatever the path
            assert answer.status_code >= 400 or is_metrics, (port, method, path)
            refusing |= {port} if answer.status_code in (401, 403) else set()
    assert refusing >= {ports["dashboard-port"], ports["dashboard-agent-listen-port"]}
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("port", "call"),
    [
        ("port", "NodeInfoGcsService/GetAllNodeInfo"),
        ("node-manager-port", "NodeManagerService/GetSystemConfig"),
        ("ray-client-server-port", "RayletDriver/ClusterInfo"),
    ],
)
def test_who_has_no_token_cannot_join_the_cluster(ray_head: RayHead, port: str, call: str) -> None:
    """Neither as a driver nor as a node: what Ray's processes ask each other, asked by a stranger."""
    grpc = pytest.importorskip("grpc")

    def code(*metadata: tuple[str, str]) -> str:
        with grpc.insecure_channel(f"127.0.0.1:{ray_head._ports[port]}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                channel.unary_unary(f"/ray.rpc.{call}")(b"", metadata=metadata, timeout=10, wait_for_ready=True)
            except grpc.RpcError as error:
                return str(error.code().name)
        return "OK"

    assert code() == "UNAUTHENTICATED"
    assert code(("authorization", f"Bearer {'wrong' * 8}")) == "UNAUTHENTICATED"
    assert code(("authorization", f"Bearer {ray_head.token}")) in ("OK", "NOT_FOUND")  # it is heard: not found is its client


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
