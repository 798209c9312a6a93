"""Every setting of the service, from the environment (`MAESTRO_*`), or from files that are named as the variables in small letters.

The files lie in `MAESTRO_SECRETS_DIR`; the environment goes before them. S3 credentials come from the standard `AWS_*` variables.
"""

import os
import sys
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from service.processlog import LogFormat

_PREFIX = "MAESTRO_"
SECRETS_VARIABLE = "MAESTRO_SECRETS_DIR"  # such as /run/secrets of Docker, or where a Secret of Kubernetes is mounted


class Settings(BaseSettings):
    """What a deployment decides. A field's description is the remedy told when it is missing or wrong."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr = Field(
        description="Set it to sqlite:////absolute/path/maestro.db, or to postgresql://user:password@host/database."
    )
    secret_key: SecretStr = Field(
        min_length=32, description="Set it to 32 or more random characters: python -c 'import secrets; print(secrets.token_urlsafe(48))'."
    )
    previous_secret_key: SecretStr | None = Field(
        default=None, min_length=32, description="Set it to the secret key before the present one, until what was made with it has ended."
    )
    api_token: SecretStr = Field(
        min_length=20, description="Set it to 20 or more random characters: python -c 'import secrets; print(secrets.token_urlsafe(32))'."
    )
    host: str = Field(default="127.0.0.1", description="Set it to the address the API listens on.")
    port: int = Field(default=8000, ge=1, le=65535, description="Set it to the port the API listens on.")
    service_url: str = Field(
        pattern=r"^https?://\S+$", description="Set it to this API's address as the workers reach it, such as http://10.0.0.5:8000."
    )

    ray_url: str = Field(pattern=r"^https?://\S+$", description="Set it to the address of Ray's dashboard, such as http://127.0.0.1:8265.")
    ray_token: SecretStr = Field(min_length=1, description="Set it to the cluster's RAY_AUTH_TOKEN.")
    worker_python: str = Field(default="python", min_length=1, description="Set it to the Python of the cluster's machines.")

    s3_endpoint: str | None = Field(default=None, description="Set it to the object store's address; leave it out for AWS.")
    s3_public_endpoint: str | None = Field(default=None, description="Set it to the object store's address as users reach it.")
    s3_region: str = Field(default="us-east-1", description="Set it to the bucket's region.")
    s3_bucket: str = Field(min_length=3, description="Set it to the bucket that holds the jobs' results.")

    rate_limit: float = Field(
        default=200.0, ge=1, description="Set it to the requests a second that each API process takes of one token, 10 s of them at once."
    )
    max_workers_per_job: int = Field(default=64, ge=1, description="Set it to the most workers that one job may ask for.")
    autoscaled_cpus: float = Field(
        default=0.0, ge=0, description="Set it to the CPUs that the cluster's autoscaler may bring it to; leave it out where there is none."
    )
    autoscaled_gpus: float = Field(
        default=0.0, ge=0, description="Set it to the GPUs that the cluster's autoscaler may bring it to; leave it out where there is none."
    )
    sources_are_local: bool = Field(default=False, description="Set it to true where data folders can be seen from this machine.")

    log_quota_mb: int = Field(default=512, ge=8, description="Set it to the most megabytes that are kept of what one job prints.")
    metrics_whole_days: int = Field(
        default=90, ge=1, description="Set it to the days after which the series of an ended job are thinned to 10,000 points each."
    )

    poll_seconds: float = Field(default=0.25, gt=0, le=5, description="Set it to the dispatcher's pause between looks at the queue.")
    line_patience_seconds: float = Field(
        default=600.0, ge=0, description="Set it to how long small jobs may pass one that waits for more devices."
    )
    lease_seconds: float = Field(default=45.0, ge=5, description="Set it to how long a dispatcher may hold a job.")
    retry_backoff_seconds: float = Field(default=2.0, ge=0, description="Set it to the pause before a second attempt.")
    stop_grace_seconds: float = Field(default=20.0, ge=0, description="Set it to the time a cancelled run has to stop by itself.")
    pause_grace_seconds: float = Field(default=600.0, ge=0, description="Set it to the time a paused run has to save its training state.")

    log_format: LogFormat = Field(default="text", description="Set it to json for logs that programs read.")
    metrics_token: SecretStr | None = Field(
        default=None, min_length=20, description="Set it to 20 or more random characters, with which Prometheus reads /metrics."
    )
    webhooks_to_private_addresses: bool = Field(
        default=False, description="Set it to true where webhooks may reach this machine and its own networks, and without https."
    )

    @property
    def secret_keys(self) -> list[str]:
        """What is made, is made with the first; what was made with any of them counts."""
        return [key.get_secret_value() for key in (self.secret_key, self.previous_secret_key) if key is not None]

    @field_validator("previous_secret_key", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        """Compose mounts a file for it, which is empty while there is none."""
        return value or None

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        if not url.startswith(("sqlite:///", "postgresql://")) or url in ("sqlite:///", "postgresql://"):
            raise ValueError("it is neither a SQLite file nor a PostgreSQL database")
        try:
            make_url(url)
        except (ArgumentError, ValueError):
            raise ValueError("it cannot be read: a password's @, / and : are written as %40, %2F and %3A") from None
        return value

    @field_validator("service_url", "ray_url", "s3_endpoint", "s3_public_endpoint")
    @classmethod
    def _no_trailing_slash(cls, value: str | None) -> str | None:
        return value.rstrip("/") if value else None

    @model_validator(mode="after")
    def _public_endpoint(self) -> Self:
        self.s3_public_endpoint = self.s3_public_endpoint or self.s3_endpoint
        return self


class WrongSettings(Exception):
    """Its text says what is wrong, and the remedy. Values are never shown."""


def explain(error: ValidationError) -> str:
    """One line for each setting that is missing or wrong: its variable, what is wrong, the remedy."""
    lines = ["these settings are missing or wrong:"]
    for item in error.errors():
        field = str(item["loc"][0]) if item["loc"] else ""
        what = "is not set" if item["type"] == "missing" else item["msg"].removeprefix("Value error, ")
        known = Settings.model_fields.get(field)
        lines.append(f"  {_PREFIX}{field.upper()}: {what}. {known.description if known else ''}".rstrip())
    return "\n".join(lines)


def read_settings() -> Settings:
    """The settings of the environment. Raises WrongSettings."""
    folder = os.environ.get(SECRETS_VARIABLE) or None
    if folder is not None and not Path(folder).is_dir():
        raise WrongSettings(f"{SECRETS_VARIABLE} names {folder}, which is no folder. Mount the secrets there.")
    try:
        return Settings(_secrets_dir=folder)
    except ValidationError as error:
        raise WrongSettings(explain(error)) from None
    except SettingsError as error:
        why = error.__cause__ or error
        raise WrongSettings(f"a file of {folder} cannot be read ({why}). Let the service's user read it.") from None


def load_settings() -> Settings:
    """The settings of the environment; exits 2 with one clear message where they do not do."""
    try:
        return read_settings()
    except WrongSettings as error:
        sys.stderr.write(f"The service cannot start: {error}\n")
        raise SystemExit(2) from None
