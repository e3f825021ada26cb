"""What JSON can say of a value."""

import math


def jsonable(value):
    """The same value with null for each number that JSON does not have: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: jsonable(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
