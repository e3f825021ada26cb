"""How a command ends: its result, its exit status, and the one net for what a user's data, settings, machine or signals
may cause: a line of words, no traceback."""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from common.jsonable import jsonable
from model.config import ConfigError
from model.memory import shortage

MEMORY_REMEDY = "lower --batch_size or --test_batch_size, or take a machine with more"


class StoppedError(Exception):
    """A signal ended the run, after a checkpoint."""

    def __init__(self, number: int, words: str):
        super().__init__(words)
        self.status = 128 + number


class TerminatedError(BaseException):
    """SIGTERM, where nothing waits for it: as KeyboardInterrupt, so that what is half done is cleared away."""


def say(text: str) -> None:
    """A line of words to stderr."""
    print(text, file=sys.stderr)


def tell(result: dict) -> None:
    """The result as one line of JSON on stdout. Raises OSError where nobody takes it."""
    try:
        print(json.dumps(jsonable(result), allow_nan=False), flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # Python flushes once more at its end, and would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "the result, on standard output") from error


def explain(
    error: BaseException, expected: tuple[type, ...] = (), remedy: str = MEMORY_REMEDY
) -> tuple[int, str] | None:
    """Exit status and words for an error that is nobody's mistake in the program; None for others. expected: errors
    whose message says it all, beside ConfigError; remedy: what to do where memory ran out."""
    found = _explain(error, (ConfigError, *expected), remedy)
    if found is None:
        return None
    status, words = found
    return status, "\n".join([words, *getattr(error, "__notes__", [])])


def _explain(error: BaseException, expected: tuple[type, ...], remedy: str) -> tuple[int, str] | None:
    if isinstance(error, StoppedError):
        return error.status, str(error)
    if isinstance(error, TerminatedError):
        return 128 + signal.SIGTERM, "terminated"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, expected):
        return 1, f"error: {error}"
    if lack := shortage(error):
        return 1, f"error: out of memory: {lack}; {remedy}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return 1, f"error: the package {error.name} is missing: pip install {error.name}"
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) and error.filename else ""
        return 1, f"error: {where}{error.strerror or str(error) or type(error).__name__}"
    return None


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """While this lasts, SIGTERM raises TerminatedError in the main thread, where it is not handled in another way."""

    def stop(*_):
        raise TerminatedError

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(work: Callable[[], dict], expected: tuple[type, ...], debug: bool) -> int:
    """Do the work, tell its result, or why there is none; returns the exit status. debug: tracebacks of what is
    expected, too; what is not goes on up."""
    try:
        with sigterm_raises():
            tell(work())
    except BaseException as error:
        found = explain(error, expected)
        if found is None:
            raise
        with contextlib.suppress(OSError):  # nobody may be there to read it
            if debug:
                traceback.print_exception(error)
            say(found[1])
        return found[0]
    return 0
