"""Figures for Prometheus. For those who have the token for that, and admins: they tell how much a service is used."""

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.auth import require_scraper
from service.routes.answers import PROBLEMS
from service.routes.state import TelemetryDep

router = APIRouter(tags=["health"], responses=PROBLEMS, dependencies=[Depends(require_scraper)])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def scrape(telemetry: TelemetryDep) -> Response:
    """In Prometheus' text format."""
    return Response(telemetry.text(), media_type=CONTENT_TYPE_LATEST)
