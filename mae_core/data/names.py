"""Images by their names: classes, and a share of them that is the same wherever they lie."""

import hashlib
from collections.abc import Sequence


def printable(name: str) -> str:
    """The name of a file as text that any program takes: Python keeps bytes of a name that are no UTF-8 as lone surrogates."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def key_hash(key: str) -> int:
    """64 bits of a name."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def labels_of(keys: Sequence[str]) -> tuple[list[str], list[int]]:
    """Classes, the first-level folders of the names, and each name's place among them; nothing where a name lies in none."""
    tops = [key.partition("/")[0] if "/" in key else None for key in keys]
    classes = [] if None in tops else sorted({top for top in tops if top is not None})
    places = {name: place for place, name in enumerate(classes)}
    return classes, [places[top] for top in tops if top is not None] if classes else []
