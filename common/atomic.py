"""Put finished files and folders in the place of older ones: at any time a name is that of a whole version."""

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        to_disk(part)
        part.replace(path)
        to_disk(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places, in one moment. False where the system or the file system cannot do that."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NOT_SUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one))


def replace_folder(new: Path, folder: Path) -> None:
    """Give the folder `new` the name `folder`; what had it before is deleted after that.

    Where the file system cannot exchange two names, the old folder is called NAME.old for a moment, and recover() finds
    it after a kill in that moment.
    """
    to_disk(new)
    old = folder.with_name(folder.name + ".old")
    if not folder.exists():
        new.rename(folder)
    elif _exchange(new, folder):
        old = new
    else:
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
    to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(parent: Path) -> list[Path]:
    """Give back their names to folders that replace_folder() was killed over; returns them."""
    found = []
    for old in sorted(parent.glob("*.old")):
        folder = old.with_name(old.name.removesuffix(".old"))
        if old.is_dir() and not folder.exists():
            with contextlib.suppress(OSError):
                old.rename(folder)
                found.append(folder)
    return found


def remove(folder: Path) -> None:
    """Delete a folder; a kill on the way leaves nothing under its name."""
    doomed = folder.with_name(folder.name + ".part")  # what write() makes first, and replaces
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(folder.rename(doomed), ignore_errors=True)
