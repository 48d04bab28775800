"""Two hosts of the QEMU driver with a guest that is watched from outside, for tests; and nothing left behind."""

from __future__ import annotations

import gc
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

import anyio
import pytest

from ferryman import Connection
from tests.guests.counter import CounterGuest
from tests.guests.inspect import dump_memory, run_directories
from tests.guests.linux import KERNEL_DIRECTORY, TICK_PREFIX, LinuxGuest, build_initramfs
from tests.guests.witness import Witness

NAME = "counter"
MIB = 1 << 20
PROMPT_S = 60.0
"""Limit for what takes a moment on an idle machine."""

USUAL = CounterGuest(memory_bytes=32 * MIB, tick_hz=500, page_count=5000, pages_per_tick=4, prefill=True)
"""A guest with 20 MiB that are not zero, which writes 8 MB/s."""

HEAVY = CounterGuest(memory_bytes=32 * MIB, tick_hz=1000, page_count=5000, pages_per_tick=30, prefill=True)
"""The same, but it writes all of its pages six times a second: 123 MB/s."""

CALM = CounterGuest(memory_bytes=32 * MIB, tick_hz=500, page_count=5000, prefill=True)
"""The same, but it writes nothing any more, so that a transfer ends with its first pass."""


def need(what: str, *, here: bool) -> None:
    """Skip where something is missing, and fail there in CI."""
    if not here:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{what} is missing")
        pytest.skip(f"{what} is missing")


def need_qemu() -> None:
    """Skip where there is no QEMU, and fail there in CI."""
    need("qemu-system-x86_64", here=shutil.which("qemu-system-x86_64") is not None)


def emulators(directory: Path) -> list[int]:
    """Live emulators that have a path below a directory among their arguments, by the system's word alone."""
    found = []
    for entry in os.listdir("/proc"):
        with suppress(ValueError, OSError):
            arguments = Path(f"/proc/{int(entry)}/cmdline").read_bytes().split(b"\0")
            if b"-pidfile" in arguments and any(os.fsencode(directory) in part for part in arguments):
                found.append(int(entry))
    return sorted(found)


def end_process(pid: int) -> None:
    """End a process, and wait until it is gone."""
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], PROMPT_S)
            with suppress(ChildProcessError):  # another program's child is not ours to reap
                os.waitid(os.P_PIDFD, process, os.WEXITED)
        finally:
            os.close(process)


@dataclass(kw_only=True)
class Field:
    """Two roots, a guest's definition, and its witness."""

    directory: Path
    guest: CounterGuest | LinuxGuest
    definition: str
    witness: Witness

    @property
    def roots(self) -> list[Path]:
        return [self.directory / "a", self.directory / "b"]

    @property
    def uris(self) -> list[str]:
        return [f"qemu:///embed?root={quote(str(root))}" for root in self.roots]

    def define(self, name: str) -> str:
        """Definition of one more guest of the same kind, heard by the same witness."""
        assert isinstance(self.guest, CounterGuest)
        return _define(self.guest, name, self.directory, self.witness)

    def wrong_pages(self, root: Path, *, name: str = NAME) -> int:
        """Pages of the paused guest that break its rule; the root must be closed."""
        assert isinstance(self.guest, CounterGuest)
        dump = self.directory / "memory"
        dump_memory(root, name, dump, self.guest.memory_bytes)
        report = self.guest.verify_memory(dump)
        dump.unlink()
        assert report.pages_checked == self.guest.page_count > 1000
        return report.errors

    def wait_ticks(self, count: int) -> None:
        """Wait until the guest has gone on by some ticks."""
        last = self.witness.last()
        self.witness.wait_tick((last.value if last else 0) + count, timeout_s=PROMPT_S)

    def emulators(self, root: Path | None = None) -> list[int]:
        """Emulators of one root, or of both."""
        return emulators(root / "run" if root is not None else self.directory)

    def the_runner(self) -> int:
        """The one emulator that there is: it ticks, and nobody else does."""
        last = self.witness.last()
        since_ns = last.t_ns if last else 0
        self.wait_ticks(20)
        heard = {tick.pid for tick in self.witness.ticks() if tick.t_ns > since_ns}
        assert self.emulators() == sorted(heard)
        (pid,) = heard
        return pid

    def assert_unbroken(self, *, crossings: int | None = None) -> None:
        """No tick is missing, doubled, or from a process that had handed over: no older memory ever ran."""
        seen = self.witness.report()
        assert seen.ticks > 0
        assert (seen.ticks_lost, seen.ticks_doubled, seen.overlaps) == (0, 0, ())
        if crossings is not None:
            assert len(seen.blackouts) == crossings


def _define(guest: CounterGuest, name: str, directory: Path, witness: Witness) -> str:
    return guest.domain_xml(name, uuid.uuid4(), directory / "image", witness.socket_path)


def console_definition(field: Field, kind: str) -> str:
    """The usual guest, whose first serial port, on which it counts, is another one."""
    head, _, rest = field.definition.partition("<serial type='unix'>")
    tail = rest.partition("</serial>")[2]
    source = f"<source mode='bind' path='{field.directory}/console'/>" if kind == "unix" else ""
    return f"{head}<serial type='{kind}'>{source}</serial>{tail}"


@contextmanager
def laid_out(guest: CounterGuest | LinuxGuest = USUAL, *, directory: Path | None = None) -> Iterator[Field]:
    """A field for the length of a block; at its end no process, run directory or socket may be left in it.

    :param directory: where it goes, and is left; None makes a temporary one and removes it.
    """
    need_qemu()
    with ExitStack() as stack:
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="ferryman-it-"))
            stack.callback(shutil.rmtree, directory)
        if isinstance(guest, CounterGuest):
            guest.write_image(directory / "image")
            witness = stack.enter_context(Witness())
            definition = _define(guest, NAME, directory, witness)
        else:
            kernel = KERNEL_DIRECTORY / "vmlinuz"
            need(f"the guests' kernel, .cache/kernel/{kernel.name},", here=kernel.is_file())
            need("busybox", here=shutil.which("busybox") is not None)
            initramfs = build_initramfs(KERNEL_DIRECTORY.parent / "guests")
            witness = stack.enter_context(Witness(prefix=TICK_PREFIX))
            definition = guest.domain_xml(NAME, uuid.uuid4(), kernel, initramfs, witness.socket_path)
        made = Field(directory=directory, guest=guest, definition=definition, witness=witness)
        try:
            yield made
            # A socket that nobody closed warns when it is collected, and the warning belongs to this test.
            gc.collect()
            assert made.emulators() == [], "processes are left behind"
            assert [path for root in made.roots for path in run_directories(root)] == []
            assert [path for path in directory.rglob("*") if path.is_socket()] == []
        finally:
            for pid in made.emulators():
                end_process(pid)


async def settled(*ends: Connection) -> None:
    """Wait until nothing is open at any of these hosts."""
    with anyio.fail_after(PROMPT_S):
        while any(end.open_migrations() for end in ends):
            await anyio.sleep(0.02)


Target: TypeAlias = tuple[str, int] | str


def _connected(target: Target) -> socket.socket:
    if not isinstance(target, str):
        return socket.create_connection(target, timeout=PROMPT_S)
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(PROMPT_S)
    stream.connect(target)
    return stream


class Relay:
    """A man in the middle of one migration stream, in threads of its own.

    :param target: where the receiver listens: host and port, or the path of a unix socket.
    :param bytes_per_s: how fast it passes the guest's state on; None is as fast as it comes.
    :param stop_after_bytes: fall silent, and set ``stopped``, once so many bytes of the guest's state are passed on.
    :param stop_at: what to look for in the guest's state; from its first occurrence on, ``stop_after_bytes`` counts.
    :param buffer_bytes: how much the system keeps for who reads slowly, on each side of the sender's connection.
    :param cut_at_last_answer: swallow the receiver's last message, which says that it has everything, and cut.
    """

    def __init__(
        self,
        target: Target,
        *,
        bytes_per_s: int | None = None,
        stop_after_bytes: int | None = None,
        stop_at: bytes = b"",
        buffer_bytes: int = 65536,
        cut_at_last_answer: bool = False,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._stop_after_bytes = stop_after_bytes
        self._stop_at = stop_at
        self._cut_at_last_answer = cut_at_last_answer
        self.swallowed = False
        self.passed_bytes = 0
        self.stopped = threading.Event()
        self._wake, self._waker = socket.socketpair()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            # Small buffers, so that who stops reading is noticed.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            self._ours = _connected(target)
            self.stream = socket.socket()
            self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            self.stream.settimeout(PROMPT_S)
            self.stream.connect(listener.getsockname())
            self._theirs, _ = listener.accept()
        for end in (self._ours, self._theirs):
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(True)
        self._threads = [threading.Thread(target=each) for each in (self._forward, self._answer)]
        for thread in self._threads:
            thread.start()

    def stop_reading(self) -> None:
        """Fall silent: from now on nothing of the guest's state is read, and the connection stays."""
        self.stopped.set()

    def go_on(self) -> None:
        """Pass on what has been held back, and what comes."""
        self._waker.send(b"\0")

    def end_sending(self) -> None:
        """Say on both connections that nothing more comes, and still read nothing of what is sent."""
        self._cut()

    def close(self) -> None:
        """Cut both connections, and end."""
        self._cut()
        self._waker.close()
        for thread in self._threads:
            thread.join()
        for end in (self._ours, self._theirs, self._wake):
            end.close()

    def _cut(self) -> None:
        for end in (self._ours, self._theirs):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _forward(self) -> None:
        """Pass the state of the guest on."""
        tail = held = b""
        looking, left = bool(self._stop_at), None if self._stop_at else self._stop_after_bytes
        with suppress(OSError):
            while True:
                if self.stopped.is_set():
                    if not self._wake.recv(1):
                        return
                    self.stopped.clear()
                    data, held, left = held, b"", None
                else:
                    data = self._theirs.recv(16384)
                    if not data:
                        break
                if looking:
                    seen = tail + data
                    if (at := seen.find(self._stop_at)) >= 0:
                        looking, left = False, max(0, at - len(tail)) + (self._stop_after_bytes or 0)
                    # It may begin in one piece and end in the next.
                    tail = seen[-len(self._stop_at) + 1 :]
                if left is not None:
                    data, held = data[:left], data[left:]
                    left -= len(data)
                self._ours.sendall(data)
                self.passed_bytes += len(data)
                if left == 0:
                    self.stopped.set()
                if self._bytes_per_s is not None:
                    select.select([self._wake], [], [], len(data) / self._bytes_per_s)
            self._ours.shutdown(socket.SHUT_WR)

    def _answer(self) -> None:
        """Pass the receiver's answers back: messages of a type and a length, both of two bytes, and their data."""
        with suppress(OSError):
            answers = self._ours.makefile("rb")
            while head := answers.read(4):
                kind, length = int.from_bytes(head[:2], "big"), int.from_bytes(head[2:], "big")
                message = head + answers.read(length)
                if kind == _SHUT and self._cut_at_last_answer:
                    self.swallowed = True
                    self._cut()
                    return
                self._theirs.sendall(message)
            self._theirs.shutdown(socket.SHUT_WR)


class RawRelay(Relay):
    """Passes whatever comes on, both ways: what is encrypted, and what a mended stream begins with."""

    def _answer(self) -> None:
        with suppress(OSError):
            while data := self._ours.recv(16384):
                self._theirs.sendall(data)
        # A receiver that is gone takes nothing any more, and the source has to learn it.
        self._cut()


_SHUT = 1  # MIG_RP_MSG_SHUT (QEMU 7.2, migration/migration.h)


@contextmanager
def relayed(monkeypatch: pytest.MonkeyPatch, make: Callable[[Target], Relay]) -> Iterator[list[Relay]]:
    """Lead every transfer of this process through a relay; they are in the list that the block gets."""
    import ferryman_qemu.streams
    from ferryman.uri import MigrationURI

    relays: list[Relay] = []

    def connect_stream(text: str) -> socket.socket:
        uri = MigrationURI.parse(text)
        if uri.protocol == "unix":
            relays.append(make(uri.path))
        else:
            assert uri.host is not None
            assert uri.port is not None
            relays.append(make((uri.host, uri.port)))
        return relays[-1].stream

    with monkeypatch.context() as patch:
        patch.setattr(ferryman_qemu.streams, "connect_stream", connect_stream)
        try:
            yield relays
        finally:
            for relay in relays:
                relay.close()
