"""Processes of QEMU: started so that they outlive us, watched by pidfd, and found again by what cannot be reused.

A process is identified by boot id, pid and start time; a pid alone may be somebody else's after a while.

Sources: pidfd_open(2), waitid(2) with P_PIDFD, proc(5) field 22 of ``stat``.
"""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)

_STATE_FIELD = 2
_START_TIME_FIELD = 21


def boot_id() -> str:
    """Identity of this boot of this host."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _start_time(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot, as text; None for one that is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            stat = file.read()
    except OSError:
        return None
    # The command's name may hold spaces and parentheses; what follows its last one does not.
    fields = stat[stat.rindex(")") + 2 :].split()
    if fields[_STATE_FIELD - 2] in ("Z", "X"):
        return None
    return fields[_START_TIME_FIELD - 2]


def identity_of(pid: int) -> str | None:
    """Identity of a live process; None for one that is gone."""
    start = _start_time(pid)
    return f"{boot_id()}:{pid}:{start}" if start is not None else None


class Process:
    """One live process, ours or inherited from an earlier program."""

    def __init__(self, pid: int, pidfd: int, identity: str) -> None:
        self.pid = pid
        self.identity = identity
        self._pidfd = pidfd

    @classmethod
    def spawn(
        cls, argv: Sequence[str], *, output: Path, inherited: Sequence[int], environment: Mapping[str, str]
    ) -> Process:
        """Start a program in a session of its own; blocking, about a millisecond.

        :param output: file that gets what it prints, appended.
        :param inherited: descriptors that it keeps, under their numbers.
        :param environment: variables that it has beyond this program's.
        :raises OSError: it could not be started.
        """
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            # Onto itself: that clears the close-on-exec flag in the child alone.
            *((os.POSIX_SPAWN_DUP2, number, number) for number in inherited),
        ]
        pid = os.posix_spawn(
            argv[0],
            list(argv),
            {**os.environ, **environment},
            file_actions=actions,
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
        )
        pidfd = os.pidfd_open(pid)
        return cls(pid, pidfd, f"{boot_id()}:{pid}:{_start_time(pid) or '0'}")

    @classmethod
    def find(cls, identity: str) -> Process | None:
        """Find the process of an identity; None if it is gone."""
        boot, _colon, rest = identity.partition(":")
        number, _colon, start = rest.partition(":")
        if boot != boot_id() or not number.isdigit():
            return None
        pid = int(number)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        # Looked up after the pidfd was opened, so that both are of one process.
        if _start_time(pid) != start:
            os.close(pidfd)
            return None
        return cls(pid, pidfd, identity)

    def opened_files(self) -> set[tuple[int, int]]:
        """Device and inode of every file that the process has open; empty for one that is gone or not ours to see."""
        found = set()
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{self.pid}/fd"):
                with suppress(OSError):
                    status = os.stat(entry.path)
                    found.add((status.st_dev, status.st_ino))
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; to a process that is gone, or that was let go, nothing."""
        if self._pidfd < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> None:
        """Wait until the process is gone, and reap it if it is our child.

        :cancellation: ends the wait only.
        """
        await anyio.wait_readable(self._pidfd)
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - it does not wait

    def close(self) -> None:
        """Let go of the process; it goes on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def find_strays(argument: str) -> list[Process]:
    """Find live processes that have a text as one of their arguments: started, and never written down."""
    found: list[Process] = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
        except OSError:
            continue
        start = _start_time(int(entry))
        if os.fsencode(argument) in arguments and start is not None:
            process = Process.find(f"{boot_id()}:{entry}:{start}")
            if process is not None:
                found.append(process)
    return found
