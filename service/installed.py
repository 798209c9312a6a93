"""Where the installation of this machine is found: `$MAESTRO_HOME`, or `~/.maestro`. The standard library only."""

import os
from pathlib import Path

from service.user_errors import UserError

CLIENT_FILE = "client.json"  # in its folder: the service's address, and its token


class HomeError(UserError):
    """The state folder cannot be used."""


class StartError(UserError):
    """A part of an installation did not start."""


def default_folder() -> Path:
    return Path(os.environ.get("MAESTRO_HOME") or "~/.maestro").expanduser().absolute()
