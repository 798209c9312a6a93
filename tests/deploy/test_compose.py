"""docker-compose.yml, without Docker: what is reachable, where secrets are, and that every process gets what it asks for."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from service.local import find_program
from service.settings import SECRETS_VARIABLE, Settings, load_settings
from tests.deploy.compose import FILE, PROJECT, MissingVariable, command_of, read_compose

OURS = {"migrate", "api", "dispatcher"}
RAY = {"ray-head", "ray-worker", "ray-worker-gpu"}


@pytest.fixture(scope="module")
def secrets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What deploy/compose/make-secrets makes; of a copy, so that it leaves our own .env alone."""
    project = tmp_path_factory.mktemp("project")
    (project / "deploy" / "compose").mkdir(parents=True)
    script = shutil.copy(PROJECT / "deploy" / "compose" / "make-secrets", project / "deploy" / "compose")
    subprocess.run([script], check=True, capture_output=True, timeout=30)
    return project / "deploy" / "compose" / "secrets"


@pytest.fixture(scope="module")
def compose(secrets_folder: Path) -> dict[str, Any]:
    return read_compose(dotenv(secrets_folder))


def dotenv(secrets_folder: Path) -> dict[str, str]:
    lines = (secrets_folder.parents[2] / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)  # type: ignore[misc]


def test_compose_itself_takes_it(secrets_folder: Path) -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("NO DOCKER COMPOSE: apt-get install docker-compose")
    command = [program, "--env-file", str(secrets_folder.parents[2] / ".env"), "-f", str(FILE), "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=secrets_folder)
    assert (done.returncode, done.stderr) == (0, "")
    without = subprocess.run([program, "-f", str(FILE), "config", "-q"], capture_output=True, text=True, cwd=secrets_folder, check=False)
    if not (PROJECT / ".env").exists():
        assert without.returncode != 0
        assert "run deploy/compose/make-secrets first" in without.stderr


def test_without_secrets_it_is_refused() -> None:
    with pytest.raises(MissingVariable, match="run deploy/compose/make-secrets first"):
        read_compose({})


def test_secrets_are_made_once(secrets_folder: Path, compose: dict[str, Any]) -> None:
    made = {path.name: path.read_text() for path in secrets_folder.iterdir()}
    assert set(made) == set(compose["secrets"])
    assert {Path(secret["file"]).name for secret in compose["secrets"].values()} == set(made)
    assert secrets_folder.stat().st_mode & 0o777 == 0o700
    assert made.pop("maestro_previous_secret_key") == ""
    random = {name: text for name, text in made.items() if not name.startswith(("s3_", "maestro_database"))}
    assert len(set(random.values())) == len(random)
    assert all(len(text) >= 48 for text in random.values())
    assert made["postgres_password"] in made["maestro_database_url"]
    subprocess.run([secrets_folder.parent / "make-secrets"], check=True, capture_output=True, timeout=30)
    assert {path.name: path.read_text() for path in secrets_folder.iterdir()} == made | {"maestro_previous_secret_key": ""}


def test_nothing_secret_is_written_into_the_file(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET|KEY|CREDENTIALS", variable):
                assert value.startswith("/run/secrets"), (name, variable)


def test_only_three_ports_are_reachable_from_outside(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:8470:8000"], "seaweedfs": ["127.0.0.1:8333:8333"], "grafana": ["127.0.0.1:3000:3000"]}
    internal = {name for name, network in compose["networks"].items() if network.get("internal")}
    members = {
        network: [name for name, service in compose["services"].items() if network in service["networks"]]
        for network in compose["networks"]
    }
    for name, service in compose["services"].items():
        assert "network_mode" not in service
        assert not service.get("privileged")
        open_to_the_world = set(service["networks"]) - internal
        assert all(members[network] == [name] for network in open_to_the_world), "nobody else is where a port is published"
        assert bool(open_to_the_world) == (name in published or name == "dispatcher")
    assert set(members["database"]) == {"postgres", *OURS}


def test_our_processes_start_with_it(compose: dict[str, Any], secrets_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MAESTRO_")]:
        monkeypatch.delenv(name)
    for name in OURS:
        service = compose["services"][name]
        folder = secrets_folder.parent / name
        folder.mkdir()
        for secret in service["secrets"]:
            shutil.copy(secrets_folder / secret, folder)
        assert service["environment"][SECRETS_VARIABLE] == "/run/secrets"
        with monkeypatch.context() as context:
            for variable, value in (service["environment"] | {SECRETS_VARIABLE: str(folder)}).items():
                context.setenv(variable, value)
            settings = load_settings()
        known = {f"maestro_{field}" for field in Settings.model_fields} | {SECRETS_VARIABLE.lower()}
        asked = {variable.lower() for variable in service["environment"]} | set(service["secrets"])
        assert {one for one in asked if one.startswith("maestro_")} <= known
        assert settings.database_url.get_secret_value().startswith("postgresql://maestro:")
        assert settings.metrics_token is not None
        assert settings.s3_public_endpoint == "http://localhost:8333"


def test_what_they_run_is_there(compose: dict[str, Any]) -> None:
    for name in OURS:
        python, option, module = command_of(compose["services"][name])
        assert (python, option) == ("python", "-m")
        assert importlib.util.find_spec(module) is not None
    assert find_program(command_of(compose["services"]["seaweedfs"])[0])
    assert all("exec ray start" in command_of(compose["services"][name])[-1] for name in RAY)
    for service in compose["services"].values():
        if "build" in service:
            assert (PROJECT / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (PROJECT / source).exists()
            assert source.startswith((".", "/")) or source in compose["volumes"]


def test_ray_asks_for_a_token_and_trains_on_workers_alone(compose: dict[str, Any]) -> None:
    for name in RAY:
        environment = compose["services"][name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert Path(environment["RAY_AUTH_TOKEN_PATH"]).name in compose["services"][name]["secrets"]
    assert "--num-cpus=0" in command_of(compose["services"]["ray-head"])[-1]
    assert compose["services"]["ray-worker-gpu"]["profiles"] == ["gpu"]
    assert compose["services"]["ray-worker-gpu"]["build"]["args"] == {"TORCH_INDEX": ""}


def test_our_containers_have_no_rights(compose: dict[str, Any]) -> None:
    for name in OURS | RAY:
        service = compose["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "user" not in service, "the image's, which is not root"


def test_all_but_who_listens_nowhere_has_a_health_check(compose: dict[str, Any]) -> None:
    assert {name for name, service in compose["services"].items() if "healthcheck" not in service} == {"migrate", "dispatcher"}
    for name, service in compose["services"].items():
        for other, condition in service.get("depends_on", {}).items():
            waits_for_health = condition["condition"] == "service_healthy"
            assert waits_for_health == ("healthcheck" in compose["services"][other]), (name, other)
