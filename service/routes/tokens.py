"""Users' tokens: make, list, revoke. For admins."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from service import tokens
from service.db import utc_now
from service.projects import ProjectName
from service.routes.answers import PROBLEMS, answer
from service.routes.state import DatabaseDep
from service.tokens import Role
from service.views import NewTokenView, TokenList, TokenView
from workers.contract import Time

router = APIRouter(prefix="/tokens", tags=["tokens"], responses=PROBLEMS)


class NewToken(BaseModel):
    """Who a token is for, and what it is good for."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=200, description="whose it is, or what for")
    role: Role
    project: Annotated[ProjectName | None, Field(description="`default` where it is left out; an admin's is good for all")] = None
    expires_at: Time | None = None


@router.post("", response_model=NewTokenView, status_code=201)
def create_token(new: NewToken, database: DatabaseDep) -> Response:
    """Make a token. Its text is in this answer and nowhere else, ever."""
    expires_at: datetime | None = new.expires_at
    with database.write() as session:
        row, token = tokens.create(session, name=new.name, role=new.role, project=new.project, expires_at=expires_at, now=utc_now())
        view = NewTokenView(**TokenView.of(row).model_dump(), token=token)
    return answer(view, status_code=201, headers={"Cache-Control": "no-store"})


@router.get("", response_model=TokenList)
def list_tokens(database: DatabaseDep) -> Response:
    """All tokens, newest first, also those that are good no more."""
    with database.read() as session:
        return answer(TokenList(tokens=[TokenView.of(row) for row in tokens.list_all(session)]))


@router.delete("/{token_id}", response_model=TokenView)
def revoke_token(token_id: str, database: DatabaseDep) -> Response:
    """Make a token worthless, from the next request on. A repeat changes nothing."""
    with database.write() as session:
        return answer(TokenView.of(tokens.revoke(session, token_id, now=utc_now())))
