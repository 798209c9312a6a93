"""The command line against the real API: what each command shows, what it prints as JSON, and how it fails."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from service.cli import app
from service.tokens import Role
from service.user_errors import EXIT_CODES
from tests.unit.access import make_token
from tests.unit.scripted_server import Answer, Request, ScriptedServer, scripted_server
from tests.unit.service_fixtures import API_TOKEN, PRETRAIN, Service, make_settings
from tests.unit.test_metrics import send
from tests.unit.test_pruning import save

EVIL = "a\x1b[31mred\x07\u202e[bold]x\x9b2J\n"


@pytest.fixture
def database_url(migrated: Path, tmp_path: Path) -> str:
    """What is tested here is in front of the database: one kind does."""
    shutil.copy(migrated, tmp_path)
    return make_settings(tmp_path).database_url.get_secret_value()


@pytest.fixture
def server(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """The API on a socket. A stream is answered when it has ended."""

    def forward(request: Request) -> Answer:
        kept = {"authorization", "content-type", "accept", "if-match", "idempotency-key", "last-event-id"}
        headers = {name: value for name, value in request.headers.items() if name in kept}
        answer = client.request(request.method, request.path, headers=headers, content=request.body, follow_redirects=False)
        told = {
            name: value for name, value in answer.headers.items() if name.startswith("maestro-") or name in ("etag", "location", "date")
        }
        return Answer(answer.status_code, answer.content, told)

    with scripted_server(forward) as server:
        monkeypatch.setenv("MAESTRO_URL", server.url)
        monkeypatch.setenv("MAESTRO_TOKEN", API_TOKEN)
        yield server


def maestro(*arguments: str, given: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), input=given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def as_json(*arguments: str) -> Any:
    """stdout is JSON, and nothing but JSON."""
    code, out, err = maestro(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def listed(*arguments: str) -> list[str]:
    return [job["name"] for job in as_json("jobs", *arguments)]


def finished(service: Service, **changes: Any) -> str:
    """A job that has been cancelled."""
    job = service.submit(**changes)
    service.cancel(job)
    return job


@pytest.mark.usefixtures("server")
def test_jobs_by_every_filter(service: Service) -> None:
    service.submit(name="one", labels={"team": "cells", "stage": "a"})
    service.pause(service.submit(name="two", labels={"team": "cells"}))
    finished(service, name="three")
    assert listed() == ["three", "two", "one"]
    assert listed("--label", "team:cells", "--label", "stage") == ["one"]
    assert listed("--status", "paused", "--status", "cancelled") == ["three", "two"]
    assert listed("--text", "thr") == listed("--finished-after", "1h") == ["three"]
    assert listed("--finished-before", "1h") == listed("--created-before", "2026-01-01") == []
    assert listed("--created-after", "90min", "--kind", "pretrain", "--limit", "2") == ["three", "two"]
    code, _out, err = maestro("jobs", "--text", "none")
    assert (code, err) == (0, "no jobs like that\n")
    assert "newest 1" in maestro("jobs", "--limit", "1")[2]
    assert maestro("jobs", "--created-after", "yesterday")[0] == 2
    code, _, err = maestro("jobs", "--kind", "bake")
    assert (code, "kind" in err) == (4, True)


@pytest.mark.usefixtures("server")
def test_a_job_is_edited(service: Service) -> None:
    job = service.submit(labels={"team": "cells", "old": "x"})
    changed = as_json("edit", job, "--name", "new", "--label", "stage:b:c", "--remove-label", "old", "--priority", "7", "--notes", "n")
    assert (changed["name"], changed["priority"], changed["notes"]) == ("new", 7, "n")
    assert changed["labels"] == {"team": "cells", "stage": "b:c"}
    assert maestro("edit", job, "--notes", "") == (0, f"job {job} changed: notes\n", "")
    assert service.job(job).notes is None
    for wrong in ([], ["--label", "x"], ["--priority", "9999"]):
        assert maestro("edit", job, *wrong)[0] == 2, wrong


@pytest.mark.usefixtures("server")
def test_a_job_is_submitted_anew(service: Service) -> None:
    job = service.submit(name="again")
    code, out, err = maestro("retry", job)
    assert (code, out) == (4, "")
    assert "queued" in err
    service.cancel(job)
    made = as_json("retry", job)
    assert (made["retry_of"], made["name"], made["status"]) == (job, "again", "queued")


@pytest.mark.usefixtures("server")
def test_a_job_is_deleted_only_when_that_is_confirmed(service: Service) -> None:
    job = finished(service, name="gone")
    service.storage.put_bytes(f"jobs/{job}/x", b"12345")
    code, out, err = maestro("delete", job, given="n\n")
    assert (code, err) == (1, "error: nothing was deleted\n")
    assert out.startswith(f"job {job} (gone), cancelled, ")
    assert "1 objects, 5 bytes\n" in out
    assert maestro("delete", job, given="")[0] == 1
    code, out, err = maestro("delete", job, "--json")
    assert (code, out) == (1, "")
    assert "--yes" in json.loads(err)["error"]
    assert as_json("delete", job, "--yes") == {"id": job, "deleted": True, "num_objects": 1, "bytes": 5}
    assert maestro("show", job)[0] == 4
    going_on = service.submit()
    code, _, err = maestro("delete", going_on, "--yes")
    assert code == 4
    assert "cancel it first" in err


@pytest.mark.usefixtures("server")
def test_the_other_changes_of_a_job_as_json(service: Service) -> None:
    job = service.submit()
    assert as_json("pause", job)["status"] == "paused"
    assert as_json("resume", job)["status"] == "queued"
    assert as_json("cancel", job)["status"] == "cancelled"
    assert as_json("show", job)["id"] == job


@pytest.mark.usefixtures("server")
def test_an_estimate_the_cluster_and_recipes(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(json.dumps(PRETRAIN))
    found = as_json("estimate", "spec.yaml")
    assert found["fits"] == "now"
    code, out, _ = maestro("estimate", "spec.yaml")
    assert code == 0
    assert "images/s on CPUs" in out
    assert as_json("jobs") == []
    assert as_json("cluster", "show")["total"]["num_cpus"] == 8
    job = service.start(name="holder")
    code, out, _ = maestro("cluster", "show")
    assert (code, job in out, "of 8 CPUs" in out) == (0, True, True)
    assert {recipe["name"] for recipe in as_json("recipes")} == {"paper", "small"}
    assert "# paper, the default of base, large, huge" in maestro("recipes")[1]


@pytest.mark.usefixtures("server")
def test_every_wrong_field_of_a_spec_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(json.dumps(PRETRAIN | {"seed": "x", "sede": 1, "optim": {"epochs": -1}}))
    for command in ("submit", "estimate"):
        code, out, err = maestro(command, "spec.yaml")
        assert (code, out) == (1, "")
        assert len(err.splitlines()) == 3
        for field in ("optim.epochs", "seed", "sede"):
            assert f"spec.yaml:1: {field}: " in err


@pytest.mark.usefixtures("server")
def test_series_as_a_table_as_csv_and_as_json(service: Service) -> None:
    job = service.start()
    send(service, job, {1: float("nan"), 2: 5.0, 3: 1.0}, sequence=1)
    send(service, job, {2: 0.5}, name="lr", sequence=2)
    assert as_json("metrics", job, "--key", "loss") == {"loss": {"steps": [1, 2, 3], "values": ["NaN", 5.0, 1.0]}}
    assert maestro("metrics", job, "--csv")[1] == "step,loss,lr\n1,NaN,\n2,5.0,0.5\n3,1.0,\n"
    _code, out, err = maestro("metrics", job, "--key", "loss", "--key", "none")
    assert out.splitlines()[1].split() == ["loss", "3", "1", "1", "5", "█▁"]
    assert err == f"job {job} has no series none (yet)\n"


@pytest.mark.usefixtures("server")
def test_events_and_logs(service: Service) -> None:
    job = finished(service)
    assert maestro("events", job)[1].splitlines()[0].split()[1] == "job_queued"
    for arguments in (["events", job], ["events", job, "-f"], ["watch", job]):
        lines = [json.loads(line) for line in maestro(*arguments, "--json")[1].splitlines()]
        assert "cancel_requested" in [line.get("type") or line["data"].get("type") for line in lines]
    assert maestro("logs", job) == (0, "", "")


@pytest.mark.usefixtures("server")
def test_two_jobs_compared(service: Service) -> None:
    first, second = service.submit(name="a"), service.submit(name="b", seed=7, optim={"epochs": 3, "batch_size": 64, "warmup_epochs": 1})
    found = as_json("compare", first, second)
    assert [job["id"] for job in found["jobs"]] == [first, second]
    assert found["spec"]["seed"] == [0, 7]
    assert found["spec"]["optim.epochs"] == [2, 3]
    assert "optim.batch_size" not in found["spec"]
    assert found["duration_seconds"] == [None, None]
    table = maestro("compare", first, second)[1]
    assert [line.split() for line in table.splitlines() if line.startswith("optim.epochs")] == [["optim.epochs", "2", "3"]]
    assert maestro("compare", first, first)[0] == 1


@pytest.mark.usefixtures("server")
def test_a_watched_job_that_ends_otherwise_exits_5(service: Service) -> None:
    job = finished(service, name=EVIL.strip())
    code, _out, err = maestro("watch", job)
    assert code == 5
    assert f"error: job {job} cancelled" in err
    assert json.loads(maestro("watch", job, "--json")[2])["job"]["id"] == job


@pytest.mark.usefixtures("server")
def test_no_name_can_steer_the_terminal(service: Service) -> None:
    job = finished(service, name=EVIL, labels={"k": EVIL})
    other = service.start(name=EVIL, seed=7)
    shown = [maestro(*arguments) for arguments in (["jobs"], ["show", job], ["events", job], ["compare", job, other], ["cluster", "show"])]
    shown += [maestro("delete", job, given="n\n"), maestro("watch", job), maestro("retry", job)]
    for _code, out, err in shown:
        text = out + err
        assert not set(text) & set("\x1b\x07\u202e\x9b"), text
    assert "[bold]" in shown[0][1]
    assert as_json("show", job)["name"] == service.job(job).name


@pytest.mark.usefixtures("server")
def test_what_is_refused_and_its_exit_code(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = maestro("show", "j2", "--json")
    assert (code, json.loads(err)["exit_code"]) == (4, 4)
    problem = json.loads(err)
    assert (problem["type"], problem["status"], problem["errors"]) == ("urn:maestro:not-found", 404, [])
    assert maestro("show", "Not/An/Id")[0] == 2
    assert "`maestro jobs` lists them" in maestro("show", "../tokens")[2]
    monkeypatch.setenv("MAESTRO_TOKEN", make_token(service, Role.READER))
    job = service.submit()
    assert maestro("cancel", job)[0] == 4
    monkeypatch.setenv("MAESTRO_TOKEN", "mst_none_of_ours")
    code, _, err = maestro("jobs")
    assert (code, "it is wrong, revoked or expired" in err) == (4, True)
    for token in ("with space ", "\u00fc", "line\nbreak"):
        monkeypatch.setenv("MAESTRO_TOKEN", token)
        code, _, err = maestro("jobs")
        assert (code, err) == (1, "error: the token has characters that no token has; copy it again\n")


def test_what_does_not_answer_and_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRO_TOKEN", API_TOKEN)
    monkeypatch.setattr("service.console.connect.__kwdefaults__", {"patience_seconds": 0.0, "timeout_seconds": 5.0})
    monkeypatch.setenv("MAESTRO_URL", "http://127.0.0.1:1")
    code, _, err = maestro("jobs", "--json")
    assert (code, json.loads(err)["exit_code"]) == (3, 3)
    with scripted_server(lambda _: Answer(503, b"{}")) as away:
        monkeypatch.setenv("MAESTRO_URL", away.url)
        assert maestro("jobs")[0] == 3
    with scripted_server(lambda _: Answer(200, b"<html>")) as other:
        monkeypatch.setenv("MAESTRO_URL", other.url)
        code, _, err = maestro("jobs")
        assert (code, "is not MAEstro; check MAESTRO_URL" in err) == (3, True)
    for url in ("localhost:8470", "ftp://x", "http://", "http://[", "http://h:99999"):
        monkeypatch.setenv("MAESTRO_URL", url)
        code, _, err = maestro("jobs")
        assert (code, "write it as http://host:port" in err) == (1, True), url


def test_a_shell_completes_ids_and_says_nothing_where_it_cannot(
    service: Service, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.console import complete_jobs

    monkeypatch.setattr("service.console.COMPLETION_SECONDS", 60.0)
    job = service.submit(name="x\x1b")
    assert complete_jobs(job[:3]) == [(job, "x\ufffd (queued)")]
    assert complete_jobs("-") == []
    monkeypatch.setenv("MAESTRO_URL", "http://127.0.0.1:1")
    assert complete_jobs("") == []


def test_everything_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is made of these texts."""

    def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        yield path, command
        for name, each in getattr(command, "commands", {}).items():
            yield from walk(each, f"{path} {name}")

    for path, command in walk(typer.main.get_command(app), "maestro"):
        assert command.help, path
        for parameter in command.params:
            assert getattr(parameter, "help", None), (path, parameter.name)
        if not hasattr(command, "commands") and path != "maestro demo":
            assert "--json" in [name for parameter in command.params for name in parameter.opts], path
    help = " ".join(maestro("--help")[1].split())
    assert all(f"{code} {meaning}" in help for code, meaning in EXIT_CODES.items())


@pytest.mark.usefixtures("server")
def test_training_states_are_listed_tried_with_another_policy_and_pinned(service: Service) -> None:
    job = service.start()
    for step in (200, 400, 600):
        save(service, job, step)
    code, out, _ = maestro("checkpoints", job)
    assert (code, [line.split()[1] for line in out.splitlines()[1:4]]) == (0, ["600", "400", "200"])
    assert "about to be deleted: 1 (6 bytes)" in out
    found = as_json("checkpoints", job)["checkpoints"]
    assert [state["kept_because"] for state in found] == [["last"], ["last"], []]
    tried = as_json("checkpoints", job, "--last", "1", "--every-steps", "400")
    assert (tried["num_deleted"], tried["keep"]["every_steps"]) == (1, 400)
    assert [state["kept_because"] for state in tried["checkpoints"]] == [["last"], ["every"], []]
    assert "would be deleted: 2 (12 bytes)" in maestro("checkpoints", job, "--last", "1")[1]
    assert as_json("checkpoints", job, "--best", "loss", "--best-mode", "min", "--best-number", "2")["keep"]["best"]["number"] == 2
    assert service.row(job).keep == {"last": 2, "every_steps": None, "best": None}

    assert maestro("pin", job, found[2]["name"]) == (0, f"{found[2]['name']} stays\n", "")
    assert as_json("checkpoints", job)["checkpoints"][2]["kept_because"] == ["pinned"]
    assert as_json("unpin", job, found[2]["name"])["pinned"] is False
    applied = as_json("checkpoints", job, "--last", "1", "--apply")
    assert [state["kept_because"] for state in applied["checkpoints"]] == [["last"], [], []]
    assert service.row(job).keep == {"last": 1, "every_steps": None, "best": None}
    assert maestro("checkpoints", job, "--apply")[0] == 2
    code, _, err = maestro("pin", job, "training_state/none")
    assert (code, "has no artifact" in err) == (4, True)
