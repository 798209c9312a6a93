"""Names of training states, by which they are ordered: `step=0000000400-a1-<incarnation>`, in object storage a folder."""

import re
from collections.abc import Iterable

from workers.stored import training_state_prefix

_NAME = re.compile(r"(^|.*/)step=(?P<step>\d+)-a(?P<attempt>\d+)-(?P<incarnation>\d+)($|/|\.)")
_FOLDER = re.compile(r"step=[0-9]{1,18}-a[0-9]{1,9}-[0-9]{1,18}/")


def state_name(*, step: int, attempt: int, incarnation: int) -> str:
    """The name of one training state."""
    return f"step={step:010d}-a{attempt}-{incarnation}"


def state_prefix(job_prefix: str, name: str) -> str:
    """Where the state `name` lies in object storage."""
    return f"{training_state_prefix(job_prefix)}{name}/"


def name_of(prefix: str) -> str:
    """The name of the state that lies at `prefix`."""
    return prefix.rstrip("/").rpartition("/")[2]


def is_of_state(key: str) -> bool:
    """Whether a key, a prefix or a folder's name is a training state's."""
    return _NAME.match(key) is not None


def is_state_of(job_prefix: str, prefix: str) -> bool:
    """Whether `prefix` is where a training state of the job lies."""
    below = training_state_prefix(job_prefix)
    return prefix.startswith(below) and _FOLDER.fullmatch(prefix.removeprefix(below)) is not None


def age(key: str) -> tuple[int, int, int]:
    """Attempt, incarnation and step of a state, or of what lies in its folder."""
    found = _NAME.match(key)
    assert found is not None, key
    return int(found["attempt"]), int(found["incarnation"]), int(found["step"])


def newest_first(names: Iterable[str]) -> list[str]:
    """Names or prefixes, the newest start of the run first: where it went back behind a damaged state, its steps are lower."""
    return sorted(names, key=age, reverse=True)
