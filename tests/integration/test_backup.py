"""A backup of a running service is restored into an empty place, and a paused job goes on there from its training state."""

import os
import secrets
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.reattach import spec
from service.client import Json, MaestroClient
from service.db import Database
from service.local import REGION, Seaweedfs
from tests.buckets import fresh_bucket
from tests.deploy.compose import PROJECT
from tests.postgres import Postgres
from tests.stand_in.script import Script
from tests.stand_in.stage import stage

SCRIPT = Script(num_steps=60, step_seconds=0.1, start_seconds=0.1)


def wait(condition: Callable[[], object], *, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def status(client: MaestroClient, job: str) -> str:
    return str(client.job(job)["status"])


def events(client: MaestroClient, job: str, kind: str) -> list[Json]:
    return [event["data"] for event in client.events(job) if event["type"] == kind]


class Scripts:
    """deploy/backup/save and restore, as an operator runs them."""

    def __init__(self, storage: Seaweedfs, postgres: Postgres | None) -> None:
        remote = {
            "TYPE": "s3",
            "PROVIDER": "Other",
            "ACCESS_KEY_ID": storage.access_key,
            "SECRET_ACCESS_KEY": storage.secret_key,
            "ENDPOINT": storage.endpoint,
            "REGION": REGION,
            "NO_CHECK_BUCKET": "true",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}  # rclone ends at an AWS_CA_BUNDLE
        self._environment = kept | {f"RCLONE_CONFIG_S3_{name}": value for name, value in remote.items()}
        if postgres is not None:
            self._environment["PATH"] = f"{postgres._bin}:{os.environ['PATH']}"

    def run(self, name: str, *arguments: str, database_url: str) -> "subprocess.CompletedProcess[str]":
        environment = self._environment | {"MAESTRO_DATABASE_URL": database_url}
        command = [str(PROJECT / "deploy" / "backup" / name), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def stored(storage: Seaweedfs, bucket: str) -> list[str]:
    return [item["Key"] for item in storage.client().list_objects_v2(Bucket=bucket).get("Contents", ())]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_paused_job_goes_on_where_it_was_restored(
    database: str, tmp_path: Path, seaweedfs: Seaweedfs, run_mark: str, request: pytest.FixtureRequest
) -> None:
    if shutil.which("rclone") is None:
        pytest.skip("NO RCLONE: apt-get install rclone")
    postgres: Postgres | None = request.getfixturevalue("postgres") if database == "postgresql" else None
    scripts, key = Scripts(seaweedfs, postgres), secrets.token_hex(32)
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    common = {"storage": seaweedfs, "postgres": postgres, "run": run_mark, "report_seconds": 0.2, "secret_key": key}

    with stage(tmp_path / "before", **common) as made, fresh_bucket(seaweedfs) as bucket:  # type: ignore[arg-type]
        old_bucket = made.api.environment["MAESTRO_S3_BUCKET"]
        made.dispatchers[0].start()
        with made.client() as client:
            done = client.submit(spec(Script(num_steps=2, step_seconds=0.05, start_seconds=0.05)))["id"]
            job = client.submit(spec(SCRIPT))["id"]
            wait(lambda: events(client, job, "first_step_taken"))
            client.pause(job)
            wait(lambda: status(client, job) == "paused" and status(client, done) == "succeeded")
            [saved] = events(client, job, "training_state_committed")
        backup = tmp_path / "backup"
        told = scripts.run("save", f"s3:{old_bucket}", str(backup), database_url=made.database_url)
        assert told.returncode == 0, told.stderr
        assert scripts.run("save", f"s3:{old_bucket}", str(backup), database_url=made.database_url).returncode != 0, "it is a new folder"
        made.dispatchers[0].stop()
        made.api.stop()

        url = f"sqlite:///{tmp_path / 'after' / 'maestro.db'}" if postgres is None else postgres.url(postgres.create())
        told = scripts.run("restore", str(backup), f"s3:{bucket}", database_url=url)
        assert told.returncode == 0, told.stderr
        again = scripts.run("restore", str(backup), f"s3:{bucket}", database_url=url)
        assert again.returncode == 1
        assert f"the bucket s3:{bucket} is not empty" in again.stderr

        with stage(tmp_path / "after", **common, database_url=url, s3_bucket=bucket) as restored:  # type: ignore[arg-type]
            restored.dispatchers[0].start()
            with restored.client() as client:
                assert {one["id"]: one["status"] for one in client.jobs()} == {done: "succeeded", job: "paused"}
                client.resume(job)
                wait(lambda: status(client, job) == "succeeded")
                first, second = events(client, job, "first_step_taken")
                assert first["step"] == 1
                assert second["step"] == saved["step"] + 1, "it does not begin anew"
        names = set(stored(seaweedfs, bucket))
        assert {name for name in stored(seaweedfs, old_bucket) if name.startswith(f"jobs/{done}/")} <= names


def test_half_a_backup_is_not_restored(tmp_path: Path, seaweedfs: Seaweedfs) -> None:
    (tmp_path / "half").mkdir()
    url = f"sqlite:///{tmp_path / 'maestro.db'}"
    told = Scripts(seaweedfs, None).run("restore", str(tmp_path / "half"), "s3:none", database_url=url)
    assert (told.returncode, told.stderr) == (1, f"{tmp_path / 'half'} is no whole backup\n")
    assert not (tmp_path / "maestro.db").exists()


def test_the_copy_of_a_database_in_use_is_whole(tmp_path: Path, seaweedfs: Seaweedfs) -> None:
    """With what is in the write-ahead log alone."""
    if shutil.which("rclone") is None:
        pytest.skip("NO RCLONE: apt-get install rclone")
    url = f"sqlite:///{tmp_path / 'a.db'}"
    database = Database(url)
    with fresh_bucket(seaweedfs) as bucket:
        with database.write() as session:
            session.connection().exec_driver_sql("CREATE TABLE t AS SELECT 7 AS x")
        assert (tmp_path / "a.db-wal").stat().st_size > 0
        told = Scripts(seaweedfs, None).run("save", f"s3:{bucket}", str(tmp_path / "backup"), database_url=url)
        assert told.returncode == 0, told.stderr
    database.close()
    copy = Database(f"sqlite:///{tmp_path / 'backup' / 'database.sqlite'}")
    with copy.read() as session:
        assert session.connection().exec_driver_sql("SELECT x FROM t").scalar_one() == 7
    copy.close()


def test_a_result_that_comes_during_the_copy_is_whole_or_not_there(
    tmp_path: Path, seaweedfs: Seaweedfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each step of the copy another job commits its result. The folder is nobody else's."""
    rclone = shutil.which("rclone")
    if rclone is None:
        pytest.skip("NO RCLONE: apt-get install rclone")
    late, calls, program = tmp_path / "late", tmp_path / "calls", tmp_path / "bin" / "rclone"
    late.mkdir()
    for name in ("model.safetensors", "manifest.json"):
        (late / name).write_text(name)
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with sqlite3.connect(tmp_path / "a.db"), fresh_bucket(seaweedfs) as bucket:
        program.parent.mkdir()
        commit = f"echo >>{calls}\n{rclone} copy {late} s3:{bucket}/jobs/$(wc -l <{calls})/encoder\n"
        program.write_text(f'#!/bin/sh\nset -e\n{rclone} "$@"\n{commit}')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        told = Scripts(seaweedfs, None).run("save", f"s3:{bucket}", str(tmp_path / "backup"), database_url=url)
        assert told.returncode == 0, told.stderr
    backup = tmp_path / "backup"
    assert backup.stat().st_mode & 0o077 == 0
    manifests = list(backup.rglob("manifest.json"))
    assert manifests, "that of the first one was there when the manifests were looked for"
    for manifest in manifests:
        assert (manifest.parent / "model.safetensors").exists(), manifest


def test_a_password_is_no_argument(tmp_path: Path, seaweedfs: Seaweedfs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pg_dump: what it is called with is for all on the machine to see."""
    if shutil.which("rclone") is None:
        pytest.skip("NO RCLONE: apt-get install rclone")
    program = tmp_path / "bin" / "pg_dump"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\necho "$PGPASSWORD" >{tmp_path}/password\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with fresh_bucket(seaweedfs) as bucket:
        url = "postgresql://maestro:s%40cret@db.example.com:5433/maestro?sslmode=require"
        told = Scripts(seaweedfs, None).run("save", f"s3:{bucket}", str(tmp_path / "backup"), database_url=url)
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "password").read_text() == "s@cret\n"
    assert (tmp_path / "arguments").read_text().split()[-1] == "postgresql://maestro@db.example.com:5433/maestro?sslmode=require"
