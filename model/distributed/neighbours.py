"""The processes of other ranks on this machine: whether they live, how they ended, and their end by force."""

import contextlib
import fcntl
import os
import select
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")
# Fields of /proc/PID/stat behind the name, by proc(5): the state, the start in clock ticks, the status as of waitpid().
STATE, STARTED, STATUS = 0, 19, 49
# PIDFD_GET_INFO of Linux 6.15 and later, its answer, and the bit that asks for, and tells of, the status in it.
GET_INFO, INFO, EXIT = 0xC040FF0B, struct.Struct("QQ11Ii"), 8
STATES = {
    "T": "is stopped (SIGSTOP, or Ctrl-Z)",
    "t": "is stopped (a debugger)",
    "D": "hangs in the kernel (state D: a disk, a network file system or a device does not answer)",
}


@dataclass(frozen=True)
class Process:
    """A process, for others to find: machine: same for those that see each other's numbers; host: for people; started:
    clock ticks after the boot, as numbers are used again."""

    machine: str
    host: str
    pid: int
    started: int


def this_process() -> Process:
    """This one."""
    name = os.uname().nodename
    try:
        machine = f"{BOOT.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        return Process(machine, name, os.getpid(), int(_stat(os.getpid())[STARTED]))
    except (OSError, TypeError):  # no /proc: nobody is anybody's neighbour
        return Process("", name, os.getpid(), 0)


def _stat(pid: int) -> list[str] | None:
    """The fields behind the name; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def exit_words(status: int | None) -> str:
    """How a process ended, by its status as of waitpid(); None: unknown."""
    if status is None:
        return "ended without a word (killed, or out of memory; how, only its launcher knows)"
    code = os.waitstatus_to_exitcode(status)
    number = -code if code < 0 else code - 128 if code > 128 else 0
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"ended without a word, with exit status {code}"
    more = " (by someone, or by the system for want of memory: see dmesg)" if name == "SIGKILL" else ""
    return f"was killed by {name}{more}"


class Neighbours:
    """Other ranks' processes on this machine, by rank, each by a descriptor that no other process can take over."""

    def __init__(self):
        self._me, self._descriptors, self._pids = this_process(), {}, {}
        self._poll, self._wake = select.poll(), os.eventfd(0)
        self._poll.register(self._wake, select.POLLIN)

    def add(self, rank: int, process: Process) -> bool:
        """Watch over a rank; False where its process is on another machine, or not to be seen any more."""
        if not self._me.machine or process.machine != self._me.machine or process.pid == self._me.pid:
            return False
        try:
            descriptor = os.pidfd_open(process.pid)
        except OSError:  # gone already, or a kernel before 5.3
            return False
        found = _stat(process.pid)
        if not found or int(found[STARTED]) != process.started:
            os.close(descriptor)
            return False
        self._descriptors[rank], self._pids[rank] = descriptor, process.pid
        self._poll.register(descriptor, select.POLLIN)
        return True

    def __contains__(self, rank: int) -> bool:
        return rank in self._descriptors

    def wait(self, seconds: float) -> dict[int, int | None]:
        """Until one ends, wake() is called, or the time is over: the ranks that ended, each with its status as of
        waitpid(), None where the launcher was faster to ask for it."""
        ready = {descriptor for descriptor, _ in self._poll.poll(1000 * seconds)}
        return {rank: self._status(rank) for rank, descriptor in self._descriptors.items() if descriptor in ready}

    def _status(self, rank: int) -> int | None:
        """From the process while its launcher has not asked for it, then, on a new system, from the descriptor."""
        found = _stat(self._pids[rank])
        if found and found[STATE] in "ZX":
            return int(found[STATUS])
        try:
            asked = INFO.pack(EXIT, *[0] * 13)
            told = INFO.unpack(fcntl.ioctl(self._descriptors[rank], GET_INFO, asked))
        except OSError:
            return None
        return told[-1] if told[0] & EXIT else None

    def wake(self) -> None:
        """Let wait() return at once, now and from now on."""
        os.eventfd_write(self._wake, 1)

    def ended(self, rank: int) -> bool:
        """Whether its process is no more."""
        one = select.poll()
        one.register(self._descriptors[rank], select.POLLIN)
        return bool(one.poll(0))

    def words(self, rank: int) -> str:
        """What a rank that gives no sign of life does."""
        if self.ended(rank):
            return exit_words(self._status(rank))
        state = (_stat(self._pids[rank]) or "?")[STATE]
        return STATES.get(state, f"is alive but hangs (state {state}: it runs nothing, not even its watch)")

    def stopped(self, rank: int) -> bool:
        """Whether its process was stopped, and can end by SIGKILL only."""
        return (_stat(self._pids[rank]) or "?")[STATE] in "Tt"

    def kill(self, rank: int) -> None:
        """End its process by force."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._descriptors[rank], signal.SIGKILL)

    def __iter__(self):
        return iter(self._descriptors)
