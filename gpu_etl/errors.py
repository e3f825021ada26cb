"""The exceptions that a user's data, settings or disk can cause (leaf)."""


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
