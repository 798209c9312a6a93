"""`maestro doctor`: a look at the service and at all that it stands on, each with its remedy. Secrets are never shown."""

import os
from typing import NamedTuple

import typer
from pydantic import SecretStr

from service import doctor_checks, doctor_storage
from service.console import connect, painted
from service.doctor_checks import Check
from service.home import Home, Run
from service.local import REGION
from service.settings import SECRETS_VARIABLE, Settings, WrongSettings, read_settings
from service.up import BUCKET
from service.user_errors import UserError
from service.wording import clean


class Keys(NamedTuple):
    """Of the object store, where they are not in the environment: of `maestro up`, which runs workers on this machine, too."""

    access_key: str
    secret_key: str


def examine(home: Home, *, is_given: bool) -> list[Check]:
    """All checks that can be made from here. is_given: the home was named, so that the environment is not what is meant."""
    run = home.read_run()
    if not is_given and (os.environ.get("MAESTRO_DATABASE_URL") or os.environ.get(SECRETS_VARIABLE)):
        try:
            return _of_service(read_settings(), home, keys=None)
        except WrongSettings as error:
            return [Check("settings", "fail", str(error), "set them where the service runs, and here")]
    if run is not None and run.is_alive() and (is_given or "MAESTRO_URL" not in os.environ):
        secrets = home.secrets()
        return _of_service(_settings_of(home, run), home, keys=Keys(secrets.s3_access_key, secrets.s3_secret_key))
    if is_given:
        return [
            Check("installation", "fail", f"nothing is up in {home.path}", "start it: `maestro up`"),
            *doctor_checks.versions(is_local=True),
        ]
    return _of_users()


def _settings_of(home: Home, run: Run) -> Settings:
    secrets = home.secrets()
    return Settings(
        database_url=SecretStr(home.database_url),
        secret_key=SecretStr(secrets.secret_key),
        api_token=SecretStr(secrets.api_token),
        service_url=run.url,
        ray_url=run.ray_url,
        ray_token=SecretStr(secrets.ray_token),
        s3_endpoint=run.s3_endpoint,
        s3_region=REGION,
        s3_bucket=BUCKET,
    )


def _of_service(settings: Settings, home: Home, *, keys: Keys | None) -> list[Check]:
    client = doctor_storage.s3_client(
        settings.s3_endpoint,
        region=settings.s3_region,
        access_key=keys.access_key if keys else None,
        secret_key=keys.secret_key if keys else None,
    )
    return [
        *doctor_checks.api(settings.service_url, settings.api_token.get_secret_value()),
        doctor_checks.database(settings.database_url.get_secret_value()),
        *doctor_storage.rights(client, settings.s3_bucket),
        *doctor_checks.ray(settings.ray_url, settings.ray_token.get_secret_value()),
        *doctor_checks.disks(home.path),
        *doctor_checks.versions(is_local=keys is not None),
    ]


def _of_users() -> list[Check]:
    try:
        with connect(patience_seconds=0.0) as client:
            url, token = client.url, client.token
    except UserError as error:
        return [Check("service", "fail", str(error), "start one, or name one"), *doctor_checks.versions(is_local=False)]
    return [*doctor_checks.api(url, token), *doctor_checks.versions(is_local=False)]


def print_report(checks: list[Check]) -> None:
    """A line for each, and its remedy below."""
    names = max(len(check.name) for check in checks)
    for check in checks:
        typer.echo(f"{painted(f'{check.status:<4}', by=check.status)}  {check.name:<{names}}  {clean(check.detail)}")
        if check.remedy and check.status != "ok":
            typer.echo(f"{'':<{names + 6}}  → {clean(check.remedy)}")
