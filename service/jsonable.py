"""Values as JSON can say them: NaN and infinity as strings, as in the contract's points."""

import math
from typing import Any


def jsonable(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value
