"""Checks of data folders at submission, where this machine sees the same folders as the workers."""

import os
from collections.abc import Iterator
from pathlib import Path

from mae_core.config import PretrainSpec, Spec
from mae_core.options import DIGITS, IMAGE_SUFFIXES
from service.errors import Invalid


def check_sources(spec: Spec) -> None:
    """Invalid where a folder is missing, empty, or not sorted into classes though labels are needed. The same rules as mae_core.data's."""
    sources = {"data.source": spec.data.source, "data.validation": spec.data.validation}
    folders = {field: Path(source) for field, source in sources.items() if source is not None and source != DIGITS}
    for field, folder in folders.items():
        _check_folder(field, folder)
    if not isinstance(spec, PretrainSpec):
        classes = [_classes(field, folder) for field, folder in folders.items()]
        if len(classes) == 2 and classes[0] != classes[1]:
            differ = ", ".join(sorted(classes[0] ^ classes[1])[:5])
            raise Invalid("data.validation", f"its class folders are not those of data.source; only one of the two has {differ}")


def _check_folder(field: str, folder: Path) -> None:
    if not folder.exists():
        raise Invalid(field, f"the folder {str(folder)!r} does not exist")
    if not folder.is_dir():
        raise Invalid(field, f"{str(folder)!r} is not a folder; give the folder that holds the images")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise Invalid(field, f"the folder {str(folder)!r} cannot be read by the service; grant it access")
    if next(_images(folder), None) is None:
        raise Invalid(field, f"the folder {str(folder)!r} holds no images ({', '.join(IMAGE_SUFFIXES)}; links to folders are not followed)")


def _classes(field: str, folder: Path) -> set[str]:
    entries = list(folder.iterdir())
    loose = [entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()]
    names = {entry.name for entry in entries if entry.is_dir() and not entry.is_symlink() and next(_images(entry), None) is not None}
    remedy = "put the images of each class into a folder of its name"
    if loose:
        raise Invalid(field, f"labels are missing: {min(loose)!r} lies in {str(folder)!r} itself, in no class folder; {remedy}")
    if len(names) < 2:
        raise Invalid(field, f"labels are missing: {str(folder)!r} has only one class folder, {min(names)!r}; {remedy}")
    return names


def _images(folder: Path) -> Iterator[str]:
    for _, _, names in os.walk(folder):
        yield from (name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
