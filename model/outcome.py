"""How a command ends: exit status and words (leaf)."""


class StoppedError(Exception):
    """A signal ended the run, after a checkpoint."""

    def __init__(self, number: int, words: str):
        super().__init__(words)
        self.status = 128 + number


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and words for an error that a user's data, settings, machine or signals caused."""
    if isinstance(error, StoppedError):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError):
        return 1, f"error: {error.filename or ''}: {error.strerror or error}"
    if isinstance(error, ModuleNotFoundError):
        return 1, f"error: the package {error.name} is missing: pip install {error.name}"
    return 1, f"error: {error}"
