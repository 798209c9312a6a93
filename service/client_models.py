"""Downloaded models, loaded by the library that they were written for. None of them is loaded before it is asked for."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from service.client_errors import DownloadError, LibraryMissing

_LIBRARIES = {"timm": "timm", "hf": "transformers", "hf-mae": "transformers"}


def require(format: str) -> None:
    """Raises LibraryMissing with the remedy."""
    if format not in _LIBRARIES:
        raise DownloadError(f"nothing loads {format!r} here; there are {', '.join(_LIBRARIES)}")
    name = _LIBRARIES[format]
    if importlib.util.find_spec(name) is None:
        raise LibraryMissing(f"{name} is not installed here: pip install {name}")


def load(folder: Path, format: str) -> Any:
    """The model of a folder, in evaluation mode, all of it in memory."""
    require(format)
    library = importlib.import_module(_LIBRARIES[format])
    if format == "timm":
        return library.create_model(f"local-dir:{folder}", pretrained=True).eval()
    [architecture] = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(library, architecture).from_pretrained(folder)
