"""The one exception that a user's data or settings can cause (leaf)."""


class DataError(ValueError):
    """Bad input, output or settings. The message says what was expected, what came, where, and what to do."""
