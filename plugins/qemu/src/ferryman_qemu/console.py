"""A guest's console as a stream of bytes: a pseudo-terminal or a unix socket of QEMU's.

QEMU says where each of its character devices is (``query-chardev``).  A pseudo-terminal is held by a lock on it, a
socket takes one client and QEMU says whether it has one, so nobody reads what another one should have read.

Source: QEMU 7.2 chardev/char-pty.c, chardev/char-socket.c (qemu_chr_socket_address, update_disconnected_filename).
"""

from __future__ import annotations

import fcntl
import os
import re
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from ferryman.errors import DomainStateError, HypervisorError
from ferryman_qemu.root import connect_unix

if TYPE_CHECKING:
    from ferryman_qemu.guest import Guest

_DEFAULTS = ("serial0", "console0")
_SOCKET = re.compile(r"(disconnected:)?unix:(.*?)(,server=on)?( <-> .*)?")
_OURS = "/proc/self/fd/"


async def open_console(guest: Guest, device: str | None) -> anyio.abc.ByteStream:
    """Connect to a console.

    :param device: alias of a serial port, a console or a channel; None is the first serial port, or console.
    :raises DomainStateError: there is none, it leads elsewhere, or somebody is connected to it.
    :raises HypervisorError: it cannot be reached.
    """
    label, where = _choose(await guest.command("query-chardev"), guest.record.name, device)
    if label in guest.consoles:
        raise _taken(guest, label)
    guest.consoles.add(label)
    try:
        stream = await _open(guest, label, where)
    except BaseException:
        guest.consoles.discard(label)
        raise
    return Console(guest, label, stream)


def _choose(devices: list[dict[str, Any]], name: str, device: str | None) -> tuple[str, str]:
    """Label and place of a console among QEMU's character devices."""
    places = {str(found["label"]): str(found.get("filename", "")) for found in devices}
    for alias in _DEFAULTS if device is None else (device,):
        for label in (alias, f"char-{alias}"):
            if label in places:
                return label, places[label]
    raise DomainStateError(
        f"domain {name} has no console {device}: see the aliases in its definition"
        if device is not None
        else f"domain {name} has no console: give it <console type='pty'/>",
        domain=name,
    )


async def _open(guest: Guest, label: str, where: str) -> anyio.abc.ByteStream:
    try:
        if where.startswith("pty:"):
            return _Terminal(_open_terminal(where.removeprefix("pty:")))
        socket = _SOCKET.fullmatch(where)
        if socket is not None and socket[3]:
            if not socket[1]:
                raise _taken(guest, label)
            if socket[2].startswith(_OURS):
                # The listening socket was made through a short path of a program that may be gone.
                return await guest.run.connect(Path(socket[2]).name)
            return await connect_unix(Path(socket[2]))
    except BlockingIOError as error:
        raise _taken(guest, label) from error
    except OSError as error:
        raise HypervisorError(
            f"the console {label} of domain {guest.record.name} cannot be reached: {error}"
        ) from error
    raise DomainStateError(
        f"the console {label} of domain {guest.record.name} leads to {where or 'nowhere'}: only a pty, or a unix"
        " socket on which QEMU listens, can be connected to",
        domain=guest.record.name,
    )


def _taken(guest: Guest, label: str) -> DomainStateError:
    return DomainStateError(
        f"somebody is connected to the console {label} of domain {guest.record.name}: one can be at a time",
        domain=guest.record.name,
    )


def _open_terminal(path: str) -> int:
    """Open a pseudo-terminal for us alone. :raises BlockingIOError: somebody has it."""
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(terminal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Bytes go through as they are: the guest has a terminal of its own.
        tty.setraw(terminal)
    except BaseException:
        os.close(terminal)
        raise
    return terminal


class _Terminal(anyio.abc.ByteStream):
    """Our end of a pseudo-terminal."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._terminal < 0:
                raise anyio.ClosedResourceError
            try:
                data = os.read(self._terminal, max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self._terminal)
                continue
            except OSError as error:  # QEMU has closed its end, which Linux calls EIO
                raise anyio.EndOfStream from error
            if not data:
                raise anyio.EndOfStream
            return data

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        left = memoryview(item)
        while left:
            if self._terminal < 0:
                raise anyio.ClosedResourceError
            try:
                left = left[os.write(self._terminal, left) :]
            except BlockingIOError:
                await anyio.wait_writable(self._terminal)
            except OSError as error:
                raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        """Do nothing: a terminal has no end in one direction."""

    async def aclose(self) -> None:
        if self._terminal >= 0:
            terminal, self._terminal = self._terminal, -1
            anyio.notify_closing(terminal)
            os.close(terminal)


class Console(anyio.abc.ByteStream):
    """A stream that gives its console back when it is closed."""

    def __init__(self, guest: Guest, label: str, stream: anyio.abc.ByteStream) -> None:
        self._guest = guest
        self._label = label
        self._stream = stream

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Wait for some bytes. :raises anyio.EndOfStream: the guest has ended."""
        try:
            return await self._stream.receive(max_bytes)
        except anyio.BrokenResourceError as error:
            raise anyio.EndOfStream from error

    async def send(self, item: bytes) -> None:
        """Send all of it. :raises anyio.BrokenResourceError: the guest has ended."""
        await self._stream.send(item)

    async def send_eof(self) -> None:
        """Say that nothing more will come, where the console can be told."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Give the console back."""
        self._guest.consoles.discard(self._label)
        await self._stream.aclose()
