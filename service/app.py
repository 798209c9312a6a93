"""The API: `create_app(settings)`; `python -m service.app` serves it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI

from service import errors, openapi
from service.auth import ADMINS, USERS, WEBHOOK_OWNERS
from service.bodylimit import BodyLimit
from service.connections import Connection
from service.db import Database
from service.feed import Feed
from service.processes import raise_open_files
from service.processlog import configure_logging
from service.ratelimit import RateLimit
from service.ray_jobs import HttpRayJobs, RayJobs
from service.requestlog import RequestLog
from service.routes import artifacts, catalogue, dashboard, events, health, jobs, reports, runs, telemetry, tokens, webhooks
from service.settings import Settings, load_settings
from service.startup import open_database, require_rights
from service.storage import S3Storage, Storage
from service.telemetry import Telemetry

DRAIN_SECONDS = 3  # streams have no end of their own


def create_app(settings: Settings, *, storage: Storage | None = None, ray: RayJobs | None = None) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await app.state.feed.close()
        app.state.database.close()

    app = FastAPI(
        title="MAEstro",
        version="1",
        summary="Distributed training of masked autoencoders",
        lifespan=lifespan,
        generate_unique_id_function=openapi.operation_id,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.database = Database(settings.database_url.get_secret_value())
    app.state.storage = storage or S3Storage.of(settings)
    app.state.ray = ray or HttpRayJobs(settings.ray_url, token=settings.ray_token.get_secret_value())
    app.state.telemetry = Telemetry(app.state.database)
    app.state.feed = Feed(app.state.database)
    app.state.telemetry.streams.set_function(lambda: app.state.feed.num_clients)
    app.state.readiness = health.ReadinessCache()
    errors.install(app)
    openapi.install(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(RateLimit, rate=settings.rate_limit, telemetry=app.state.telemetry)
    app.add_middleware(RequestLog, telemetry=app.state.telemetry)
    audiences = (
        (jobs.router, USERS),
        (events.router, USERS),
        (runs.router, USERS),
        (artifacts.router, USERS),
        (catalogue.router, USERS),
        (webhooks.router, WEBHOOK_OWNERS),
        (tokens.router, ADMINS),
    )
    for router, audience in audiences:
        app.include_router(router, prefix="/v1", dependencies=[Depends(audience)])
    app.include_router(reports.router, prefix="/v1")
    app.include_router(health.router)
    app.include_router(telemetry.router)
    app.include_router(dashboard.router)
    return app


def serving(settings: Settings) -> dict[str, Any]:
    """How uvicorn serves an app. One process: SQLite has one writer, and one feed looks for all streams."""
    return {
        "host": settings.host,
        "port": settings.port,
        "workers": 1,
        "http": Connection,
        "log_config": None,
        "access_log": False,
        "timeout_graceful_shutdown": DRAIN_SECONDS,
    }


def main() -> None:
    settings = load_settings()
    configure_logging(settings.log_format)
    raise_open_files()
    open_database(settings).close()
    app = create_app(settings)
    require_rights(app.state.storage)
    uvicorn.run(app, **serving(settings))


if __name__ == "__main__":
    main()
