"""The events of all jobs, as they happen."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse

from service import streams
from service.auth import USERS, Caller, Credentials
from service.errors import NotAcceptable
from service.projects import ProjectName
from service.routes.answers import PROBLEMS, STREAM_HEADERS, problems
from service.routes.state import FeedDep
from workers.contract import MAX_INTEGER

router = APIRouter(prefix="/events", tags=["events"], responses=PROBLEMS)


_ANSWERS: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/event-stream": {}}},
    **problems(406),
}


@router.get("", response_class=Response, responses=_ANSWERS)
async def stream_events(
    request: Request,
    caller: Annotated[Caller, Depends(USERS)],
    credentials: Credentials,
    feed: FeedDep,
    project: Annotated[ProjectName | None, Query(description="of an admin: of this project alone")] = None,
    after: Annotated[int | None, Query(ge=0, le=MAX_INTEGER, description="an event's id; where it is left out, from now on")] = None,
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_INTEGER)] = None,
) -> Response:
    """Events of all jobs of the token's project, of an admin of all, by their ids, none left out. `Last-Event-ID` resumes."""
    project = caller.project_of(project)
    if "text/event-stream" not in request.headers.get("accept", ""):
        raise NotAcceptable
    stream = streams.of_all(
        feed,
        project,
        after=after if last_event_id is None else last_event_id,
        authorize=partial(USERS, request, credentials),
    )
    return EventSourceResponse(stream, headers=STREAM_HEADERS)
