"""The witness: a process outside every hypervisor that hears a guest's ticks and says when, and from whom.

::

    QEMU at the source ------+  serial port                    +--> FILE, one record a tick
                             +--> SOCKET --> witness process --+
    QEMU at the destination -+  (both connect)                 +--> CONTROL: questions and waits, from Witness

The rules:

1. A line belongs to the process at the other end of the connection (SO_PEERCRED, so the process that connected)
   and to the instant at which its line feed was read, on CLOCK_MONOTONIC, in nanoseconds. A destination that
   waits for its guest is connected and silent.
2. Connections that are readable at once are read in the order in which they were accepted, each until nothing
   is left. A source stops before its destination starts, so a witness that was late itself sees no overlap
   where there was none.
3. A guest may be frozen in the middle of a line. Then the source's connection ends with its head and the
   destination's begins with its tail, and the line belongs to the destination, which finished it. So the first
   line of a connection, unless it is a tick as it stands, is put behind the unfinished line of another
   connection: the one for which that yields its next tick, or else the one that was heard before. The source
   keeps its head too: if it goes on, it finishes the line there, and that tick counts as doubled.
4. A tick is eight hexadecimal digits (the counter guest), or PREFIX followed by a decimal number (the Linux
   guest). Every other line is kept as text, the newest 10,000 of them.
5. Several guests may share a witness if whoever asks tells them apart by process.

It runs as ``python -m tests.guests.witness --socket PATH --out FILE`` or under :class:`Witness`. It writes one
line to its standard output when it accepts connections, and ends at the end of its standard input, so that it
never outlives the program that started it, or at SIGTERM. Standard library only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import select
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

_RECORD = struct.Struct("<IiqQ")
_CREDENTIALS = struct.Struct("3i")
_TEXT_LINES = 10_000
_LONGEST_LINE_BYTES = 64 * 1024
_RECORDS_BEFORE_WRITE = 512
_IDLE_BEFORE_WRITE_S = 0.25
_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 10.0
# sun_path holds 108 bytes, the last of them a zero.
_LONGEST_SOCKET_PATH_BYTES = 107


class Tick(NamedTuple):
    """One tick: who said it, when it arrived (CLOCK_MONOTONIC), and its number."""

    connection: int
    pid: int
    t_ns: int
    value: int


class Line(NamedTuple):
    """One line that is not a tick."""

    connection: int
    pid: int
    t_ns: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One connection: ``closed_ns`` is None while it is open; ``ticks`` is 0 while its guest is silent."""

    connection: int
    pid: int
    opened_ns: int
    closed_ns: int | None
    ticks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Blackout:
    """A hand-over as the outside saw it. It lasts one tick interval even where nothing was interrupted."""

    source_pid: int
    destination_pid: int
    t_last_source_ns: int
    t_first_destination_ns: int

    @property
    def ms(self) -> float:
        return (self.t_first_destination_ns - self.t_last_source_ns) / 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """A process that ticked after another had taken over: two guests ran, or an older one came back."""

    pid: int
    taken_over_by_pid: int
    ticks: int
    t_first_ns: int
    t_last_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WitnessReport:
    """What a series of ticks says about the hand-overs in it.

    ``ticks_lost``: numbers between the lowest and the highest that no process said.
    ``ticks_doubled``: numbers that were said more than once, by two processes or by one.
    ``blackouts``: one for every process that took over, in order.
    ``overlaps``: one for every process that was heard again after it had been taken over.
    ``pids``: the processes in the order in which they were first heard.
    """

    ticks: int
    ticks_lost: int
    ticks_doubled: int
    blackouts: tuple[Blackout, ...]
    overlaps: tuple[Overlap, ...]
    pids: tuple[int, ...]


def report_on(ticks: Iterable[Tick]) -> WitnessReport:
    """Judge ticks in the order in which they arrived.

    A process takes over with its first tick, once. Whatever an earlier process says later is an overlap.
    """
    total = 0
    seen: set[int] = set()
    doubled: set[int] = set()
    pids: list[int] = []
    successors: dict[int, int] = {}
    blackouts: list[Blackout] = []
    overlaps: dict[int, Overlap] = {}
    last: Tick | None = None  # of the process that has the guest
    for tick in ticks:
        total += 1
        if tick.value in seen:
            doubled.add(tick.value)
        seen.add(tick.value)
        if last is None or tick.pid == last.pid:
            if last is None:
                pids.append(tick.pid)
            last = tick
        elif tick.pid in successors:
            before = overlaps.get(tick.pid)
            overlaps[tick.pid] = Overlap(
                pid=tick.pid,
                taken_over_by_pid=successors[tick.pid],
                ticks=1 if before is None else before.ticks + 1,
                t_first_ns=tick.t_ns if before is None else before.t_first_ns,
                t_last_ns=tick.t_ns,
            )
        else:
            blackouts.append(
                Blackout(
                    source_pid=last.pid,
                    destination_pid=tick.pid,
                    t_last_source_ns=last.t_ns,
                    t_first_destination_ns=tick.t_ns,
                )
            )
            successors[last.pid] = tick.pid
            pids.append(tick.pid)
            last = tick
    return WitnessReport(
        ticks=total,
        ticks_lost=max(seen) - min(seen) + 1 - len(seen) if seen else 0,
        ticks_doubled=len(doubled),
        blackouts=tuple(blackouts),
        overlaps=tuple(overlaps.values()),
        pids=tuple(pids),
    )


def read_log(path: str | os.PathLike[str]) -> list[Tick]:
    """Read the witness's file: one record a tick, ``connection`` u32, ``pid`` i32, ``t_ns`` i64, ``value`` u64.

    :raises ValueError: the file does not consist of whole records.
    """
    records = Path(path).read_bytes()
    if len(records) % _RECORD.size:
        raise ValueError(f"{os.fspath(path)} ends in the middle of a record")
    return [Tick._make(fields) for fields in _RECORD.iter_unpack(records)]


class WitnessError(Exception):
    """The witness process could not be started, or is gone."""


class WitnessTimeoutError(TimeoutError):
    """What was waited for did not come; the message says what was heard last."""


class Witness:
    """Start a witness for the length of a ``with`` block, ask it, and wait for what it hears.

    Every wait blocks until the witness reports, without polling, and may be called from several threads at
    once: with anyio through ``to_thread.run_sync``. Cancelling such a call leaves its thread waiting until
    ``timeout_s``, and changes nothing at the witness.

    After the block :meth:`ticks`, :meth:`lines`, :meth:`peers` and :meth:`report` go on answering; the files
    and sockets are gone.

    :param directory: where the sockets and the log go, under names of their own; it must exist. None makes a
        temporary directory. Keep it short: a socket's path has 107 bytes at most.
    :param prefix: what stands before the decimal number in a tick; empty for the counter guest's lines.
    :raises WitnessError: on entry, when the process does not start within 10 s.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, prefix: str = "") -> None:
        self._parent = directory
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None
        self._after: tuple[list[Tick], list[Line], list[Peer]] | None = None
        self.scheduling = ""

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="w-", dir=self._parent))
        self.socket_path = self._directory / "serial"
        self.log_path = self._directory / "ticks"
        self._control_path = self._directory / "control"
        try:
            # By path and isolated: nothing of the tests' environment is imported, and it starts in 50 ms.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-IS",
                    __file__,
                    f"--socket={self.socket_path}",
                    f"--out={self.log_path}",
                    f"--control={self._control_path}",
                    f"--prefix={self._prefix}",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # The interrupt key must not end it before its log was read.
                start_new_session=True,
            )
            self.scheduling = self._wait_until_ready(self._process)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._after = (self.ticks(), self.lines(), self.peers())
        except WitnessError:
            # An error on its way out of the block says more than the loss of the witness.
            if kind is None:
                raise
        finally:
            self._end()

    @property
    def pid(self) -> int:
        """The witness's own process, for whoever watches what it costs."""
        return self._running().pid

    def last(self) -> Tick | None:
        """Return the newest tick, or None before the first."""
        return _tick(self._ask("last")["tick"])

    def count(self) -> int:
        """Return the number of ticks heard so far."""
        return int(self._ask("last")["count"])

    def ticks(self) -> list[Tick]:
        """Return every tick heard so far, in the order of arrival."""
        if self._after is not None:
            return self._after[0]
        self._ask("flush")
        return read_log(self.log_path)

    def lines(self, prefix: str = "") -> list[Line]:
        """Return the lines that are no ticks and begin with ``prefix``, in the order of arrival."""
        if self._after is not None:
            return [line for line in self._after[1] if line.text.startswith(prefix)]
        return [Line(*fields) for fields in self._ask("lines", prefix=prefix)["lines"]]

    def peers(self) -> list[Peer]:
        """Return every connection there was, in the order of acceptance."""
        if self._after is not None:
            return self._after[2]
        return [Peer(**fields) for fields in self._ask("peers")["peers"]]

    def wait_tick(self, after: int = -1, timeout_s: float = 10.0) -> Tick:
        """Return the first tick whose number is above ``after``: one that was heard already, or else the next.

        :raises WitnessTimeoutError: none came within ``timeout_s``.
        """
        return self._wait_for_tick("wait-tick", timeout_s, after=after)

    def wait_new_process(self, timeout_s: float = 10.0, *, other_than: int | None = None) -> Tick:
        """Return the first tick of the process that takes over from ``other_than``.

        That is the first tick after ``other_than``'s own first one that came from somebody else, even if it was
        heard before this call. None stands for the process that ticked last when the call was made, so name the
        process where the hand-over may come sooner than this call.

        :raises WitnessTimeoutError: no other process ticked within ``timeout_s``.
        """
        return self._wait_for_tick("wait-new-process", timeout_s, other_than=other_than)

    def wait_line(self, prefix: str, timeout_s: float = 10.0, *, after_ns: int = 0) -> Line:
        """Return the first line that is no tick, begins with ``prefix`` and came later than ``after_ns``.

        :raises WitnessTimeoutError: none came within ``timeout_s``.
        """
        answer = self._ask("wait-line", timeout_s=timeout_s, prefix=prefix, after_ns=after_ns)
        return Line(*answer["line"])

    def report(
        self, *, since_ns: int = 0, until_ns: int | None = None, pids: Collection[int] | None = None
    ) -> WitnessReport:
        """Judge what was heard from ``since_ns`` on, before ``until_ns``, and from ``pids``; None means no limit."""
        return report_on(
            tick
            for tick in self.ticks()
            if since_ns <= tick.t_ns
            and (until_ns is None or tick.t_ns < until_ns)
            and (pids is None or tick.pid in pids)
        )

    def _wait_for_tick(self, request: str, timeout_s: float, **fields: object) -> Tick:
        tick = _tick(self._ask(request, timeout_s=timeout_s, **fields)["tick"])
        assert tick is not None
        return tick

    def _ask(self, request: str, timeout_s: float | None = None, **fields: object) -> dict[str, Any]:
        """Ask on a connection of its own; whoever gives up closes it, and the witness forgets the question."""
        process = self._running()
        deadline_s = time.monotonic() + (_ANSWER_TIMEOUT_S if timeout_s is None else timeout_s)
        answer = bytearray()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(_ANSWER_TIMEOUT_S)
            try:
                control.connect(os.fspath(self._control_path))
                control.sendall(json.dumps({"request": request, **fields}).encode() + b"\n")
                while not answer.endswith(b"\n"):
                    # A timeout of 0 would mean non-blocking.
                    control.settimeout(max(deadline_s - time.monotonic(), 1e-6))
                    part = control.recv(1024 * 1024)
                    if not part:
                        raise ConnectionResetError
                    answer += part
            except TimeoutError:
                if timeout_s is None:
                    raise WitnessError(
                        f"the witness (pid {process.pid}) does not answer {request!r}"
                    ) from None
                wanted = ", ".join(f"{name} {value!r}" for name, value in fields.items())
                raise WitnessTimeoutError(
                    f"{request} ({wanted}) saw nothing for {timeout_s} s; the last tick was {self.last()}"
                ) from None
            except (ConnectionError, FileNotFoundError) as error:
                raise WitnessError(f"the witness (pid {process.pid}) is gone") from error
        result: dict[str, Any] = json.loads(answer)
        return result

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise WitnessError("the witness runs only inside its with block")
        return self._process

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
        words = process.stdout.readline().split() if ready else []
        if words[:1] != [b"ready"]:
            raise WitnessError("the witness did not start; what it wrote to standard error says why")
        return words[1].decode()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        shutil.rmtree(self._directory)


def _tick(fields: list[int] | None) -> Tick | None:
    return None if fields is None else Tick(*fields)


# What follows runs in the witness's own process.


class _Peer:
    """A connection from a serial port, and the part of a line that it has not finished."""

    def __init__(self, number: int, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.number = number
        self.socket = connection
        self.pid: int = _CREDENTIALS.unpack(credentials)[0]
        self.opened_ns = time.monotonic_ns()
        self.closed_ns: int | None = None
        self.ticks = 0
        self.rest = b""
        self.at_first_line = True
        self.last_value = 0
        self.was_continued = False
        # The connection that was heard before this one was heard first.
        self.predecessor: _Peer | None = None


class _Question:
    """A connection to the control socket: one request, one answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.request = b""
        self.answer = b""
        self.wants_tick: Callable[[Tick], bool] | None = None
        self.wants_line: Callable[[Line], bool] | None = None


class _Server:
    def __init__(self, *, serial_path: str, control_path: str, out_path: str, prefix: bytes) -> None:
        pattern = re.escape(prefix) + rb"([0-9]+)" if prefix else rb"([0-9A-Fa-f]{8})"
        self._parse = re.compile(pattern).fullmatch
        self._base = 10 if prefix else 16
        self._selector = selectors.DefaultSelector()
        self._ticks: list[Tick] = []
        self._written = 0
        self._first_of: dict[int, int] = {}
        self._lines: deque[Line] = deque(maxlen=_TEXT_LINES)
        self._peers: list[_Peer] = []
        self._heard_last: _Peer | None = None
        self._questions: set[_Question] = set()
        self._paths: list[str] = []
        # Unbuffered: what is not written yet is in _ticks.
        self._out = open(out_path, "wb", buffering=0)  # noqa: SIM115 (open as long as the process)
        self._serial = self._listen(serial_path)
        self._control = self._listen(control_path)

    def _listen(self, path: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(path)
        self._paths.append(path)
        # A hypervisor may run its processes as another user; the directory decides who comes in.
        os.chmod(path, 0o666)
        listener.listen(64)
        self._selector.register(listener, selectors.EVENT_READ)
        return listener

    def run(self, stop_fd: int) -> None:
        """Serve until standard input ends or ``stop_fd`` becomes readable."""
        stdin = sys.stdin.fileno()
        # A file or /dev/null cannot be waited for, and never ends while this runs.
        with suppress(PermissionError):
            self._selector.register(stdin, selectors.EVENT_READ)
        self._selector.register(stop_fd, selectors.EVENT_READ)
        while True:
            unwritten = len(self._ticks) - self._written
            ready = self._selector.select(_IDLE_BEFORE_WRITE_S if unwritten else None)
            if unwritten and (not ready or unwritten >= _RECORDS_BEFORE_WRITE):
                self._write()
            peers: list[_Peer] = []
            others: list[tuple[selectors.SelectorKey, int]] = []
            for key, events in ready:
                if isinstance(key.data, _Peer):
                    peers.append(key.data)
                else:
                    others.append((key, events))
            peers.sort(key=lambda peer: peer.number)
            for peer in peers:
                self._hear(peer)
            for key, events in others:
                if isinstance(key.data, _Question):
                    # A tick of this very round may have answered it, and found its client gone.
                    if key.data in self._questions:
                        self._serve(key.data, events)
                elif key.fileobj is self._serial:
                    self._accept_peer()
                elif key.fileobj is self._control:
                    connection, _ = self._control.accept()
                    connection.setblocking(False)
                    question = _Question(connection)
                    self._questions.add(question)
                    self._selector.register(connection, selectors.EVENT_READ, question)
                elif key.fileobj == stop_fd or not os.read(stdin, 4096):
                    return

    def close(self) -> None:
        self._write()
        self._out.close()
        for path in self._paths:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _accept_peer(self) -> None:
        connection, _ = self._serial.accept()
        connection.setblocking(False)
        peer = _Peer(len(self._peers), connection)
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Peer) -> None:
        while True:
            try:
                data = peer.socket.recv(_LONGEST_LINE_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            t_ns = time.monotonic_ns()
            if not data:
                peer.closed_ns = t_ns
                self._selector.unregister(peer.socket)
                peer.socket.close()
                return
            if peer.at_first_line and self._heard_last is not peer:
                peer.predecessor = self._heard_last
            self._heard_last = peer
            lines = (peer.rest + data).split(b"\n")
            peer.rest = lines.pop()[-_LONGEST_LINE_BYTES:]
            for line in lines:
                self._take_line(peer, t_ns, line.removesuffix(b"\r"))

    def _take_line(self, peer: _Peer, t_ns: int, line: bytes) -> None:
        match = self._parse(line)
        if peer.at_first_line:
            peer.at_first_line = False
            if match is None:
                line = self._with_head(peer, line)
                match = self._parse(line)
        if match is not None:
            self._take_tick(peer, Tick(peer.number, peer.pid, t_ns, int(match[1], self._base)))
        elif line:
            text = Line(peer.number, peer.pid, t_ns, line.decode("utf-8", "replace"))
            self._lines.append(text)
            for question in [waiting for waiting in self._questions if waiting.wants_line is not None]:
                if question.wants_line is not None and question.wants_line(text):
                    self._answer(question, line=text)

    def _with_head(self, peer: _Peer, line: bytes) -> bytes:
        for other in self._peers:
            if other is not peer and other.rest and not other.was_continued:
                match = self._parse(other.rest + line)
                if match is not None and int(match[1], self._base) == other.last_value + 1:
                    other.was_continued = True
                    return other.rest + line
        return line if peer.predecessor is None else peer.predecessor.rest + line

    def _take_tick(self, peer: _Peer, tick: Tick) -> None:
        peer.ticks += 1
        peer.last_value = tick.value
        self._first_of.setdefault(peer.pid, len(self._ticks))
        self._ticks.append(tick)
        for question in [waiting for waiting in self._questions if waiting.wants_tick is not None]:
            if question.wants_tick is not None and question.wants_tick(tick):
                self._answer(question, tick=tick)

    def _write(self) -> None:
        records = b"".join(_RECORD.pack(*tick) for tick in self._ticks[self._written :])
        while records:
            records = records[self._out.write(records) :]
        self._written = len(self._ticks)

    def _serve(self, question: _Question, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(question)
            return
        try:
            data = question.socket.recv(64 * 1024)
        except ConnectionResetError:
            data = b""
        if not data:
            self._forget(question)
            return
        question.request += data
        if question.request.endswith(b"\n"):
            self._consider(question, json.loads(question.request))

    def _consider(self, question: _Question, request: dict[str, Any]) -> None:
        match request:
            case {"request": "last"}:
                self._answer(question, tick=self._ticks[-1] if self._ticks else None, count=len(self._ticks))
            case {"request": "flush"}:
                self._write()
                self._answer(question, count=self._written)
            case {"request": "peers"}:
                names = ("pid", "opened_ns", "closed_ns", "ticks")
                self._answer(
                    question,
                    peers=[
                        {"connection": peer.number, **{name: getattr(peer, name) for name in names}}
                        for peer in self._peers
                    ],
                )
            case {"request": "lines", "prefix": str(prefix)}:
                self._answer(question, lines=[line for line in self._lines if line.text.startswith(prefix)])
            case {"request": "wait-tick", "after": int(after)}:
                self._wait_tick(question, lambda tick: tick.value > after, 0)
            case {"request": "wait-new-process", "other_than": int() | None as pid}:
                if pid is None and self._ticks:
                    pid = self._ticks[-1].pid
                self._wait_tick(
                    question, lambda tick: tick.pid != pid, self._first_of.get(pid, 0) if pid else 0
                )
            case {"request": "wait-line", "prefix": str(prefix), "after_ns": int(after_ns)}:

                def wanted(line: Line) -> bool:
                    return line.t_ns > after_ns and line.text.startswith(prefix)

                found = next(filter(wanted, self._lines), None)
                if found is None:
                    question.wants_line = wanted
                else:
                    self._answer(question, line=found)
            case _:
                raise ValueError(f"a request that no client of ours makes: {request!r}")

    def _wait_tick(self, question: _Question, wanted: Callable[[Tick], bool], first: int) -> None:
        found = next((tick for tick in self._ticks[first:] if wanted(tick)), None)
        if found is None:
            question.wants_tick = wanted
        else:
            self._answer(question, tick=found)

    def _answer(self, question: _Question, **answer: object) -> None:
        question.wants_tick = question.wants_line = None
        question.answer = json.dumps(answer).encode() + b"\n"
        self._send(question)

    def _send(self, question: _Question) -> None:
        try:
            sent = question.socket.send(question.answer)
        except BlockingIOError:
            sent = 0
        except (BrokenPipeError, ConnectionResetError):
            self._forget(question)
            return
        question.answer = question.answer[sent:]
        # Once all is sent the client closes, which reads as the end.
        events = selectors.EVENT_WRITE if question.answer else selectors.EVENT_READ
        self._selector.modify(question.socket, events, question)

    def _forget(self, question: _Question) -> None:
        self._questions.discard(question)
        self._selector.unregister(question.socket)
        question.socket.close()


def _hurry() -> str:
    """Run before other processes where that is allowed, and return how: ``round-robin``, ``nice`` or ``normal``."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        return "round-robin"
    with suppress(PermissionError):
        os.nice(-10)
        return "nice"
    return "normal"


def main() -> None:
    parser = argparse.ArgumentParser(description="Stamp the ticks of a guest's serial port.")
    parser.add_argument("--socket", required=True, help="where QEMU's serial port connects (unix socket)")
    parser.add_argument("--out", required=True, help="log, one record of 24 bytes a tick")
    parser.add_argument("--control", help="where questions are asked (unix socket); default: SOCKET.control")
    parser.add_argument("--prefix", default="", help="what precedes the decimal number of a tick")
    options = parser.parse_args()
    control = options.control or f"{options.socket}.control"
    for path in (options.socket, control):
        if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH_BYTES:
            parser.error(f"a socket's path has {_LONGEST_SOCKET_PATH_BYTES} bytes at most: {path}")

    # An exception out of a handler could come in the middle of a record; a readable pipe waits for its turn.
    stop_fd, wakeup_fd = os.pipe()
    os.set_blocking(wakeup_fd, False)
    signal.set_wakeup_fd(wakeup_fd)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    # Nothing here makes cycles, and a collection would come between a line and its time.
    gc.disable()
    server = _Server(
        serial_path=options.socket, control_path=control, out_path=options.out, prefix=options.prefix.encode()
    )
    try:
        print("ready", _hurry(), flush=True)
        server.run(stop_fd)
    finally:
        server.close()


if __name__ == "__main__":
    main()
