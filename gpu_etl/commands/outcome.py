"""How a command ends: signals, exit status and words."""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from gpu_etl.common import packages
from gpu_etl.common.errors import DataError, notes

DEBUG = "GPU_ETL_DEBUG"


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def signals() -> Iterator[None]:
    """In this block SIGTERM unwinds the stack, as Ctrl-C does. In a thread, and under a handler of the caller's,
    nothing changes."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number, frame):
    raise Terminated


def say(words: str) -> None:
    """Words to stderr, where that is open."""
    try:
        if sys.stderr is not None:
            print(words, file=sys.stderr, flush=True)
    except OSError:
        pass


def print_json(result: dict) -> None:
    """The result as the last line of stdout. Raises OSError where that cannot be written, and ValueError for a number
    that JSON cannot hold."""
    text = json.dumps(result, allow_nan=False)
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still flushes at its end
        words = f"{error.strerror}; the work is done, but its result could not be told"
        raise OSError(error.errno, words, "stdout") from error


def explain(error: BaseException, go_on: str = "") -> tuple[int, str]:
    """Exit status and words for an error that a user's input, settings, machine or signals cause; any other is raised
    again. go_on: what is said of a run that a signal stopped."""
    if os.environ.get(DEBUG) and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        status, what = (143, "terminated") if isinstance(error, Terminated) else (130, "interrupted")
        words = f"{what}; {go_on}" if go_on else what
    elif isinstance(error, DataError):
        status, words = 1, f"error: {error}"
    elif isinstance(error, OSError):
        status, words = 1, f"error: {_os_words(error)}"
    elif isinstance(error, ModuleNotFoundError):
        status, words = 1, f"error: {packages.explain(error)}"
    elif isinstance(error, MemoryError):
        remedy = "lower --slab-bytes, --threads or --workers, or free memory"
        status, words = 1, f"error: not enough memory ({str(error) or 'an allocation failed'}): {remedy}"
    else:
        raise error
    return status, "\n".join([words, *notes(error)])


def _os_words(error: OSError) -> str:
    """File name and fault of an error of the operating system; errors of the network have neither."""
    names = (error.filename, error.filename2)
    names = [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]
    fault = error.strerror or str(error) or type(error).__name__
    return ": ".join([*filter(None, [" -> ".join(names)]), fault])
