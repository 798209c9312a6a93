"""No request that the interface's description allows, and none that it forbids, finds a server error or an answer that is not described."""

from pathlib import Path

import pytest

from service.tokens import Role
from tests.unit.fuzz import fuzz
from tests.unit.service_fixtures import Service, make_settings


@pytest.mark.parametrize("role", [Role.ADMIN, Role.READER])
def test_schemathesis_finds_nothing(service: Service, tmp_path: Path, role: Role) -> None:
    if role is Role.READER and service.database.engine.dialect.name == "postgresql":
        pytest.skip("whom a reader is refused does not depend on the database")
    url = service.database.engine.url.render_as_string(hide_password=False)
    service.settings = make_settings(tmp_path, database_url=url.replace("+psycopg", ""), rate_limit=1e6, webhooks_to_private_addresses=True)
    outcome = fuzz(service, tmp_path, role=role)
    assert outcome.is_clean, outcome.text
    assert outcome.report
