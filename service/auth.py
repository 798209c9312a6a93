"""Who may call: users with the API token, an attempt's workers with the attempt's own token."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.errors import NotAuthenticated
from service.settings import Settings
from workers.contract import attempt_token

_bearer = HTTPBearer(auto_error=False, description="The API token, or for reports the attempt's own")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def same_secret(given: str, expected: str) -> bool:
    """Constant-time, also in the length of what is given."""
    return hmac.compare_digest(hashlib.sha256(given.encode()).digest(), hashlib.sha256(expected.encode()).digest())


def require_api_token(request: Request, credentials: Credentials) -> None:
    settings: Settings = request.app.state.settings
    if credentials is None or not same_secret(credentials.credentials, settings.api_token.get_secret_value()):
        raise NotAuthenticated


def require_attempt_token(request: Request, credentials: Credentials, job_id: str, attempt: int) -> None:
    settings: Settings = request.app.state.settings
    expected = attempt_token(settings.secret_key.get_secret_value(), job_id, attempt)
    if credentials is None or not same_secret(credentials.credentials, expected):
        raise NotAuthenticated("Reports carry the token of their own attempt.")
