"""`maestro cluster head | join`: what is shown, what is run, and what is refused before Ray is asked."""

import json
import os
import socket
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from service.cli import app

Started = list[tuple[list[str], dict[str, str]]]
TOKEN = "the-clusters-own-token"
runner = CliRunner()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The commands that this process would have become, with their environments."""
    became: Started = []
    monkeypatch.setattr(os, "execvpe", lambda _, command, environment: became.append((command, environment)))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    return became


@pytest.fixture
def head() -> Iterator[str]:
    """Somebody who listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_the_head_asks_its_machines_often_enough_to_miss_one_soon(started: Started) -> None:
    done = runner.invoke(app, ["cluster", "head", "--address", "127.0.0.1", "--num-cpus", "0"])
    assert done.exit_code == 0, done.output
    [(command, environment)] = started
    assert command[:3] == ["ray", "start", "--block"]
    assert {"--head", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--port=6379", "--num-cpus=0"} <= set(command)
    assert environment["RAY_AUTH_MODE"] == "token"
    period, timeout, times = (int(environment[f"RAY_health_check_{name}"]) for name in ("period_ms", "timeout_ms", "failure_threshold"))
    assert times * (period + timeout) <= 20_000
    assert " ".join(command) in done.stdout
    assert TOKEN not in done.output


def test_a_machine_joins_by_the_address_that_leads_to_the_head(started: Started, head: str) -> None:
    done = runner.invoke(app, ["cluster", "join", head])
    assert done.exit_code == 0, done.output
    [(command, environment)] = started
    assert {f"--address={head}", "--node-ip-address=127.0.0.1"} <= set(command)
    assert environment["RAY_AUTH_TOKEN"] == TOKEN
    assert TOKEN not in done.output


def test_print_only_shows(started: Started) -> None:
    done = runner.invoke(app, ["cluster", "join", "127.0.0.1", "--num-gpus", "4", "--print"])
    assert (done.exit_code, started) == (0, [])
    assert "ray start --block --node-ip-address=127.0.0.1 --address=127.0.0.1:6379 --num-gpus=4" in done.stdout


@pytest.mark.parametrize("arguments", [["join", "127.0.0.1"], ["head", "--address", "127.0.0.1"]])
def test_the_command_as_json_is_only_shown(started: Started, arguments: list[str]) -> None:
    done = runner.invoke(app, ["cluster", *arguments, "--print", "--json"])
    told = json.loads(done.stdout)
    assert (told["command"][:4], told["environment"]["RAY_AUTH_MODE"]) == (
        ["ray", "start", "--block", "--node-ip-address=127.0.0.1"],
        "token",
    )
    assert TOKEN not in done.output
    done = runner.invoke(app, ["cluster", *arguments, "--json"])
    assert (done.exit_code, "--json goes with --print" in done.stderr, started) == (2, True, [])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["head", "--address", "192.0.2.77"], "no network interface of this machine has the address 192.0.2.77; it has"),
        (["join", "10.0.0.2:6379:1"], "is no address of a head: write HOST or HOST:PORT"),
        (["join", ":6379"], "is no address of a head"),
        (["join", "10.0.0.2:70000"], "is no address of a head"),
        (["join", "127.0.0.1:1"], "no head answers at 127.0.0.1:1"),
    ],
)
def test_what_cannot_work_is_refused(started: Started, arguments: list[str], says: str) -> None:
    done = runner.invoke(app, ["cluster", *arguments])
    assert (done.exit_code, started) == (1, [])
    assert says in done.stderr


def test_without_a_token_nothing_is_started(started: Started, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    done = runner.invoke(app, ["cluster", "join", head])
    assert (done.exit_code, started) == (1, [])
    assert "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH" in done.stderr


def test_without_keys_it_says_what_workers_will_do(started: Started, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    done = runner.invoke(app, ["cluster", "join", head])
    assert (done.exit_code, len(started)) == (0, 1)
    assert "AWS_ACCESS_KEY_ID is not set" in done.stderr
