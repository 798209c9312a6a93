"""Is it alive, and can it work? Open to all: they tell no more than that."""

import threading
import time
from collections.abc import Callable

from fastapi import APIRouter, Request, Response
from sqlalchemy.exc import SQLAlchemyError

from service.errors import Unavailable
from service.migrations.schema import current_revision, head_revision
from service.routes.answers import answer
from service.routes.state import DatabaseDep, RayDep, StorageDep
from service.views import Readiness

router = APIRouter(tags=["health"])
FRESH_SECONDS = 2.0  # anybody may ask: the parts behind are asked no more often than this


@router.get("/livez")
async def live() -> dict[str, str]:
    """Answers in no thread of the pool: it is alive, too, while all of them wait for the database."""
    return {"status": "alive"}


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness, "description": "What is missing"}})
def ready(request: Request, database: DatabaseDep, storage: StorageDep, ray: RayDep) -> Response:
    """200 when the database, object storage and Ray answer; else 503 with what is missing."""
    cache: ReadinessCache = request.app.state.readiness
    view = cache.get(lambda: _look(database, storage, ray))
    return answer(view, status_code=200 if view.ready else 503)


class ReadinessCache:
    """The last look, while it is fresh; one look at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._view: Readiness | None = None
        self._at = 0.0

    def get(self, look: Callable[[], Readiness]) -> Readiness:
        with self._lock:
            if self._view is None or time.monotonic() - self._at > FRESH_SECONDS:
                self._view, self._at = look(), time.monotonic()
            return self._view


def _look(database: DatabaseDep, storage: StorageDep, ray: RayDep) -> Readiness:
    missing = {}
    try:
        if current_revision(database) != head_revision():
            missing["database"] = "The schema is not this version's: run python -m service.migrations."
    except SQLAlchemyError:
        missing["database"] = "The database does not answer."
    for name, part in (("storage", storage), ("ray", ray)):
        try:
            part.check()
        except Unavailable as error:
            missing[name] = error.detail
    return Readiness(ready=not missing, missing=missing)
