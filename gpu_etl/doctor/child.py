"""How a check tells what it found: exit status 0, or SKIPPED with the reason, or 1 with the error, on the last
line of stderr."""

import sys
import traceback
from collections.abc import Callable

SKIPPED = 77


class SkipError(Exception):
    """The check cannot be made here; the message says why."""


def outcome(check: Callable[[], object]) -> int:
    """Run a check; returns the exit status."""
    try:
        check()
    except SkipError as reason:
        print(reason, file=sys.stderr)
        return SKIPPED
    except Exception as error:
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"error: {type(error).__name__}: {'; '.join(lines[:3])}", file=sys.stderr)
        return 1
    return 0
