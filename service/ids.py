"""Random ids of [a-z0-9]."""

import secrets
import string

ALPHABET = string.digits + string.ascii_lowercase


def chance(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))
