"""What routes work with; made once by `create_app`."""

from typing import Annotated

from fastapi import Depends, Request

from service.db import Database
from service.feed import Feed
from service.ray_jobs import RayJobs
from service.settings import Settings
from service.storage import Storage
from service.telemetry import Telemetry


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _storage(request: Request) -> Storage:
    storage: Storage = request.app.state.storage
    return storage


def _ray(request: Request) -> RayJobs:
    ray: RayJobs = request.app.state.ray
    return ray


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _telemetry(request: Request) -> Telemetry:
    telemetry: Telemetry = request.app.state.telemetry
    return telemetry


def _feed(request: Request) -> Feed:
    feed: Feed = request.app.state.feed
    return feed


DatabaseDep = Annotated[Database, Depends(_database)]
StorageDep = Annotated[Storage, Depends(_storage)]
RayDep = Annotated[RayJobs, Depends(_ray)]
SettingsDep = Annotated[Settings, Depends(_settings)]
FeedDep = Annotated[Feed, Depends(_feed)]
TelemetryDep = Annotated[Telemetry, Depends(_telemetry)]
