"""The one exception that a user's data or settings can cause (leaf)."""


class DataError(ValueError):
    """Bad input, output or settings. The message says what was expected, what came, where, and what to do."""


class BadRowError(DataError):
    """A row that cannot be parsed. Rows before it may be kept, for a run that leaves it out."""
