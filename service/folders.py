"""What a submission can know of a data folder on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

from mae_core.options import IMAGE_SUFFIXES
from mae_core.packed import INDEX, is_packed
from service.errors import Invalid

REMEDY = "put the images of each class into a folder of its name"


def packed_content(place: str) -> str | None:
    """The index of packed images; None where the folder has none."""
    try:
        content = (Path(place) / INDEX).read_bytes()
    except OSError:
        return None
    return content.decode(errors="replace") if is_packed(content) else None


def check_folder(field: str, place: str) -> None:
    """Invalid unless it is a folder with images in it."""
    folder = Path(place)
    if not folder.exists():
        raise Invalid(field, f"the folder {place!r} does not exist")
    if not folder.is_dir():
        raise Invalid(field, f"{place!r} is not a folder; give the folder that holds the images")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise Invalid(field, f"the folder {place!r} cannot be read by the service; grant it access")
    if next(_images(folder), None) is None:
        raise Invalid(field, f"the folder {place!r} holds no images ({', '.join(IMAGE_SUFFIXES)}; links to folders are not followed)")


def class_folders(field: str, place: str) -> set[str]:
    """The names of the class folders, at least one. Invalid where images lie beside them."""
    entries = list(Path(place).iterdir())
    loose = [entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()]
    names = {entry.name for entry in entries if entry.is_dir() and not entry.is_symlink() and next(_images(entry), None) is not None}
    if loose:
        raise Invalid(field, f"labels are missing: {min(loose)!r} lies in {place!r} itself, in no class folder; {REMEDY}")
    return names


def _images(folder: Path) -> Iterator[str]:
    for _, _, names in os.walk(folder):
        yield from (name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
