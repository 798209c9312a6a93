import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from typer.testing import CliRunner

from service import doctor_checks
from service.cli import app
from service.doctor_checks import Check, api, database, disks, ray, versions
from service.doctor_storage import rights
from service.migrations.schema import downgrade
from tests.unit.scripted_server import Answer, Request, scripted_server
from tests.unit.service_fixtures import Service


def refused(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "the key AKIA-SECRET"}}, "operation")


class FakeS3:
    """A bucket in memory. `refuses`: calls that are not allowed; `is_plain`: it has no conditional writes."""

    def __init__(self, *refuses: str, is_plain: bool = False) -> None:
        self.objects: dict[str, bytes] = {}
        self._refuses = refuses
        self._is_plain = is_plain

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._refuses:
            raise refused("AccessDenied")
        return super().__getattribute__(name)

    def head_bucket(self, Bucket: str) -> None: ...

    def put_object(self, Bucket: str, Key: str, Body: bytes, IfNoneMatch: str = "") -> None:
        if IfNoneMatch and Key in self.objects and not self._is_plain:
            raise refused("PreconditionFailed")
        self.objects[Key] = Body

    def get_object(self, Bucket: str, Key: str) -> Any:
        return {"Body": io.BytesIO(self.objects[Key])}

    def list_objects_v2(self, Bucket: str, Prefix: str) -> Any:
        return {"Contents": [key for key in self.objects if key.startswith(Prefix)]}

    def create_multipart_upload(self, Bucket: str, Key: str) -> Any:
        return {"UploadId": "u"}

    def upload_part(self, **part: Any) -> Any:
        return {"ETag": "e"}

    def complete_multipart_upload(self, *, Key: str, **upload: Any) -> None:
        self.objects[Key] = b""

    def abort_multipart_upload(self, **upload: Any) -> None: ...

    def delete_objects(self, Bucket: str, Delete: Any) -> Any:
        for item in Delete["Objects"]:
            self.objects.pop(item["Key"], None)
        return {}

    def delete_object(self, Bucket: str, Key: str) -> None:
        self.objects.pop(Key, None)


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if check.status == "fail"]


def test_all_rights_are_tried_and_nothing_is_left() -> None:
    store = FakeS3()
    checks = rights(store, "b")  # type: ignore[arg-type]
    assert [check.name for check in checks] == [
        *("S3 bucket", "S3 put", "S3 get", "S3 list", "S3 conditional put", "S3 multipart", "S3 delete")
    ]
    assert failed(checks) == []
    assert store.objects == {}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("head_bucket", "S3 bucket"),
        ("put_object", "S3 put"),
        ("get_object", "S3 get"),
        ("list_objects_v2", "S3 list"),
        ("upload_part", "S3 multipart"),
        ("delete_objects", "S3 delete"),
    ],
)
def test_a_right_that_is_missing_is_named_with_its_remedy(call: str, name: str) -> None:
    checks = rights(FakeS3(call), "b")  # type: ignore[arg-type]
    assert failed(checks) == [name]
    [check] = [check for check in checks if check.name == name]
    assert check.detail.endswith("refused (AccessDenied)")
    assert "'b'" in check.remedy
    assert "AKIA" not in str(check)


def test_a_store_without_conditional_writes() -> None:
    checks = rights(FakeS3(is_plain=True), "b")  # type: ignore[arg-type]
    assert failed(checks) == ["S3 conditional put"]


def test_a_store_that_does_not_answer() -> None:
    class Away(FakeS3):
        def head_bucket(self, Bucket: str) -> None:
            raise EndpointConnectionError(endpoint_url="http://user:secret@store")

    [check] = rights(Away(), "b")  # type: ignore[arg-type]
    assert (check.status, check.detail) == ("fail", "b: no answer (EndpointConnectionError)")


def answers(*, token: int = 200, missing: dict[str, str] | None = None) -> Any:
    def answer(request: Request) -> Answer:
        if request.path == "/livez":
            return Answer(body=b"{}")
        if request.path == "/readyz":
            return Answer(503 if missing else 200, json.dumps({"ready": not missing, "missing": missing or {}}).encode())
        return Answer(token, b"{}")

    return answer


def looked(*, ahead_seconds: float = 0.0, **options: Any) -> dict[str, Check]:
    with scripted_server(answers(**options)) as server:
        return {check.name: check for check in api(server.url, "token", clock=lambda: datetime.now(UTC) + timedelta(seconds=ahead_seconds))}


def test_the_api() -> None:
    assert {check.status for check in looked().values()} == {"ok"}
    assert looked(token=401)["token"].status == "fail"
    assert "tokens create" in looked(token=401)["token"].remedy
    found = looked(missing={"ray": "It is away."})
    assert (found["API → ray"].status, found["API → ray"].detail) == ("fail", "It is away.")
    for seconds, status in ((60, "warn"), (-100, "warn"), (-400, "fail"), (400, "fail")):
        assert looked(ahead_seconds=seconds)["clock"].status == status, seconds
    [check] = api("http://127.0.0.1:1", "token")
    assert check.status == "fail"
    with scripted_server(lambda _: Answer(404)) as other:
        assert failed(api(other.url, "token")) == ["API"]


def test_the_database(service: Service) -> None:
    url = service.settings.database_url.get_secret_value()
    assert database(url).status == "ok"
    downgrade(service.database, "0007")
    found = database(url)
    assert found.status == "fail"
    assert "schema 0007, this version needs" in found.detail
    assert "service.migrations" in found.remedy


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    assert database(f"sqlite:///{tmp_path}/none.db").status == "fail"
    assert list(tmp_path.iterdir()) == []
    found = database("postgresql://ada:secret@127.0.0.1:1/x")
    assert found.status == "fail"
    assert "secret" not in str(found)
    assert "ada:***@127.0.0.1:1/x" in found.detail


def test_ray_and_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"node_id": "n", "state": "ALIVE", "is_head_node": True, "resources_total": {"CPU": 8.0}}

    def answer(request: Request) -> Answer:
        if request.path == "/api/version":
            return Answer(body=b'{"ray_version": "0.1"}')
        if "authorization" not in request.headers or request.headers["authorization"] == "":
            return Answer(401)
        return Answer(body=json.dumps({"data": {"result": {"result": [node]}}}).encode())

    monkeypatch.setattr(doctor_checks, "_gpus_here", lambda: ["H100", "H100"])
    with scripted_server(answer) as server:
        cluster, gpus = ray(server.url, "token")
    assert (cluster.status, "version 0.1" in cluster.detail) == ("warn", True)
    assert (gpus.status, gpus.detail) == ("warn", "this machine has 2 (H100), Ray none")
    [away] = ray("http://127.0.0.1:1", "ray-secret")
    assert away.status == "fail"
    assert "ray-secret" not in str(away)


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((2e10, "ok"), (5e9, "warn"), (1e6, "fail")):
        monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda place, free=free: type("Usage", (), {"free": free}))
        assert {check.status for check in disks(tmp_path)} == {status}


@pytest.mark.parametrize(
    ("is_local", "gpus", "status", "remedy"),
    [(True, [], "fail", "'maestro-mae[local]'"), (False, [], "ok", ""), (False, ["H100"], "warn", "'maestro-mae[workers]'")],
)
def test_what_trains_is_needed_only_where_this_machine_trains(
    monkeypatch: pytest.MonkeyPatch, is_local: bool, gpus: list[str], status: str, remedy: str
) -> None:
    monkeypatch.setattr(doctor_checks, "_gpus_here", lambda: gpus)
    monkeypatch.setattr(doctor_checks, "_installed", lambda name: "1.0" if name == "maestro-mae" else None)
    checks = {check.name: check for check in versions(is_local=is_local)}
    assert {name: check.status for name, check in checks.items()} == {"versions": "ok", "torch": status, "ray": status, "timm": "warn"}
    assert all(checks[name].remedy.endswith(remedy) for name in ("torch", "ray"))


def doctor(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MAESTRO_URL", "MAESTRO_TOKEN", "MAESTRO_DATABASE_URL", "MAESTRO_SECRETS_DIR"):
        monkeypatch.delenv(name, raising=False)
    code, out, _err = doctor("--home", str(tmp_path))
    assert code == 1
    assert f"fail  installation  nothing is up in {tmp_path}" in out
    assert "→ start it: `maestro up`" in out
    code, out, _ = doctor("--home", str(tmp_path), "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    monkeypatch.setenv("MAESTRO_HOME", str(tmp_path))
    assert json.loads(doctor("--json")[1])["checks"][0]["name"] == "service"
    with scripted_server(answers()) as server:
        monkeypatch.setenv("MAESTRO_URL", server.url)
        monkeypatch.setenv("MAESTRO_TOKEN", "token-secret")
        code, out, _ = doctor()
        assert (code, "token-secret" in out) == (0, False)
    monkeypatch.setenv("MAESTRO_DATABASE_URL", "postgresql://u:pass-secret@h/d")
    code, out, _ = doctor()
    assert code == 1
    assert "MAESTRO_S3_BUCKET" in out
    assert "pass-secret" not in out


def test_a_service_whose_secrets_are_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, service: Service) -> None:
    monkeypatch.delenv("MAESTRO_DATABASE_URL", raising=False)
    monkeypatch.setenv("MAESTRO_HOME", str(tmp_path))
    monkeypatch.setenv("MAESTRO_SECRETS_DIR", str(tmp_path / "none"))
    assert "which is no folder" in doctor()[1]
    monkeypatch.setenv("MAESTRO_SECRETS_DIR", str(tmp_path))
    assert "MAESTRO_DATABASE_URL: is not set" in doctor()[1]
    secrets = {"secret_key": "s" * 32, "api_token": "t" * 20, "ray_token": "r"}
    for name, value in (secrets | {"database_url": service.settings.database_url.get_secret_value()}).items():
        (tmp_path / f"maestro_{name}").write_text(value)
    for name, value in {"SERVICE_URL": "http://127.0.0.1:1", "RAY_URL": "http://127.0.0.1:1", "S3_BUCKET": "bucket"}.items():
        monkeypatch.setenv(f"MAESTRO_{name}", value)
    monkeypatch.setenv("MAESTRO_S3_ENDPOINT", "http://127.0.0.1:1")
    found = {check["name"]: check["status"] for check in json.loads(doctor("--json")[1])["checks"]}
    assert (found["database"], found["API"], found["Ray"]) == ("ok", "fail", "fail")
