"""What made a result."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple


class Provenance(NamedTuple):
    """Of a result: the job, if a service ran one; versions of this project, of what it computes with and of Python; the commit."""

    job: str | None
    versions: dict[str, str]
    git_revision: str | None


def provenance(job: str | None = None, *, libraries: tuple[str, ...] = ()) -> Provenance:
    """Of this process. `libraries`: further ones whose versions matter."""
    return Provenance(job, versions(*libraries), _git_revision())


def versions(*libraries: str) -> dict[str, str]:
    """Of this project, of torch, of `libraries` and of Python."""
    known = {name: importlib.metadata.version(name) for name in ("maestro-mae", "torch", *libraries)}
    return known | {"python": platform.python_version()}


def _git_revision() -> str | None:
    """The commit of a source checkout, with -dirty where it was changed; None for an installed package."""
    here = Path(__file__)
    try:
        _git("ls-files", "--error-unmatch", here.name, folder=here.parent)  # another project's repository around us says nothing
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*", folder=here.parent)
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str, folder: Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
