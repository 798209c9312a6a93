"""Fixtures of the service's unit tests."""

from tests.unit.service_fixtures import client, database_url, migrated, migrated_postgres, service

__all__ = ["client", "database_url", "migrated", "migrated_postgres", "service"]
