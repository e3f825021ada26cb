"""The one exception that a user's data or settings can cause (leaf)."""


class DataError(ValueError):
    """Bad input, output or settings. The message says what was expected, what came, where, and what to do."""


class BadRowError(DataError):
    """A row that cannot be parsed. Rows before it may be kept, for a run that leaves it out."""


class DeviceMemoryError(DataError):
    """The GPU's memory, or the part of it that may be used, does not suffice. The work done so far is good."""
