"""The exceptions that a user's data, settings or disk can cause."""


def notes(error: BaseException | None) -> list[str]:
    """What was noted of an error, and of those that it was raised from: other errors of the same run among it."""
    found, seen = [], []
    while error is not None and error not in seen:
        found += getattr(error, "__notes__", [])
        seen.append(error)
        error = error.__cause__
    return found


class DataError(ValueError):
    """Bad input, output or settings. The message says what was expected, what came, where, and what to do."""


class BadRowError(DataError):
    """A row that cannot be parsed. Rows before it may be kept, for a run that leaves it out."""


class DeviceMemoryError(DataError):
    """The GPU's memory, or the part of it that may be used, does not suffice. The work done so far is good."""


class KeepWorkError(DataError):
    """What was done so far is good, and stays for the next try: a day file changed behind the last row, or a file of
    somebody else is in the way."""


class WorkDamagedError(DataError):
    """What an earlier run left in its work folder is not what it wrote there: it cannot be built on."""
