"""Fixtures of the service's unit tests."""

from tests.unit.service_fixtures import client, migrated, service

__all__ = ["client", "migrated", "service"]
