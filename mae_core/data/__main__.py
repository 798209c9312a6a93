"""`python -m mae_core.data pack SOURCE DEST`, `show PLACE`, `verify PLACE`: packed images in local folders."""

import sys
from pathlib import Path

from mae_core.data.command import run
from mae_core.data.listing import FolderImages
from mae_core.stores import FolderParts


def main(arguments: list[str] | None = None) -> int:
    return run(
        arguments,
        program="python -m mae_core.data",
        images_at=lambda place: FolderImages(Path(place)),
        store_at=lambda place: FolderParts(Path(place)),
    )


if __name__ == "__main__":
    sys.exit(main())
