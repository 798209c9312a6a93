"""What a project is called. It is there as soon as a token or a job names it, and nobody in it sees another's jobs."""

from typing import Annotated

from pydantic import StringConstraints

DEFAULT_PROJECT = "default"
ProjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
