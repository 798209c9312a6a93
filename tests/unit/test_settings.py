from pathlib import Path

import pytest

from service.settings import Settings, load_settings

GOOD = {
    "DATABASE_URL": "sqlite:////tmp/x.db",
    "SECRET_KEY": "s" * 32,
    "API_TOKEN": "t" * 20,
    "SERVICE_URL": "http://127.0.0.1:8000/",
    "RAY_URL": "http://127.0.0.1:8265",
    "RAY_TOKEN": "ray",
    "S3_ENDPOINT": "http://127.0.0.1:9000",
    "S3_BUCKET": "maestro",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MAESTRO_{name.upper()}", raising=False)
    for name, value in GOOD.items():
        monkeypatch.setenv(f"MAESTRO_{name}", value)
    return monkeypatch


def test_settings_come_from_the_environment(environment: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    assert settings.s3_public_endpoint == settings.s3_endpoint
    assert settings.service_url == "http://127.0.0.1:8000"
    assert settings.max_workers_per_job == 64
    assert "s" * 32 not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SECRET_KEY", None, ["MAESTRO_SECRET_KEY: is not set", "secrets.token_urlsafe"]),
        ("SECRET_KEY", "short-secret", ["MAESTRO_SECRET_KEY", "at least 32", "secrets.token_urlsafe"]),
        ("API_TOKEN", "short-secret", ["MAESTRO_API_TOKEN", "at least 20"]),
        ("DATABASE_URL", "mysql://short-secret", ["MAESTRO_DATABASE_URL: it is neither a SQLite file nor a PostgreSQL", "sqlite:////"]),
        ("RAY_TOKEN", "", ["MAESTRO_RAY_TOKEN", "RAY_AUTH_TOKEN"]),
        ("PORT", "many", ["MAESTRO_PORT", "integer"]),
    ],
)
def test_a_bad_setting_exits_2_and_names_variable_and_remedy(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str | None, says: list[str]
) -> None:
    if value is None:
        environment.delenv(f"MAESTRO_{name}")
    else:
        environment.setenv(f"MAESTRO_{name}", value)
    with pytest.raises(SystemExit) as exit_:
        load_settings()
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert all(part in message for part in says), message
    assert "short-secret" not in message


def test_every_setting_has_a_remedy() -> None:
    assert all((field.description or "").startswith("Set it to") for field in Settings.model_fields.values())


def test_secrets_come_from_files(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SECRET_KEY", "API_TOKEN"):
        environment.delenv(f"MAESTRO_{name}")
        (tmp_path / f"maestro_{name.lower()}").write_text(name[0] * 40 + "\n")
    (tmp_path / "maestro_ray_token").write_text("from-a-file")
    (tmp_path / "maestro_previous_secret_key").write_text("")
    environment.setenv("MAESTRO_SECRETS_DIR", str(tmp_path))
    settings = load_settings()
    assert settings.secret_key.get_secret_value() == "S" * 40
    assert settings.api_token.get_secret_value() == "A" * 40
    assert settings.ray_token.get_secret_value() == "ray", "the environment goes before a file"
    assert settings.previous_secret_key is None, "an empty file is none: Compose mounts one"


@pytest.mark.parametrize("folder", ["nowhere", "empty", "broken"])
def test_secrets_that_are_not_there(
    environment: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "maestro_secret_key").mkdir(parents=True)
    environment.delenv("MAESTRO_SECRET_KEY")
    environment.setenv("MAESTRO_SECRETS_DIR", str(tmp_path / folder))
    with pytest.raises(SystemExit) as exit_:
        load_settings()
    assert exit_.value.code == 2
    says = {"nowhere": "which is no folder", "empty": "MAESTRO_SECRET_KEY: is not set", "broken": "maestro_secret_key"}
    assert says[folder] in capsys.readouterr().err
