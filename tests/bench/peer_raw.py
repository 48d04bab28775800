"""The limit: two QEMUs and as few QMP round trips between them as QEMU permits.

Nothing is journalled, negotiated, checked or rolled back: no manager of guests can be faster with the same QEMU
and the same settings, so the distance to this peer is what a manager costs. One call does, in this order::

    source QEMU                         this process                        destination QEMU
                                        spawn  -S -incoming defer  ------>  (starts: the largest part of the call)
      <---- capabilities, parameters    capabilities, migrate-incoming -->  written before it can read them
                                                                   <------  address it listens on
      <---- migrate
            ~~~~~~~~~~~~~~~~~~~ memory, device state ~~~~~~~~~~~~~~~~~~~~>
            MIGRATION completed ---->                              <------  MIGRATION completed
                                        cont  --------------------------->
      <---- query-migrate, quit                                    <------  answer: the guest runs
            process gone ----------->   done

The destination's own ``completed`` is the signal for ``cont``: QEMU sets its run state before it sends that
event (``process_incoming_migration_bh``), while the source's says nothing about arrival when the return path
is off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.bench.peer import Direction, GuestSpec, Host, PeerError, PeerUnavailable, Sample

DOWNTIME_LIMIT_MS = 300


class Stream(enum.Enum):
    """What the state travels over."""

    TCP = "tcp"
    UNIX = "unix"


class _Monitor:
    """A blocking QMP client that may write many commands before it reads the first answer."""

    def __init__(self, sock: socket.socket, *, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._received = b""
        self._lines: list[bytes] = []
        self._sent = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._migration_states: list[str] = []

    def rearm(self) -> None:
        """Begin a call: from now on it has the whole time-out."""
        self._deadline_s = time.monotonic() + self._timeout_s
        self._migration_states.clear()

    def send(self, *commands: tuple[str, dict[str, Any]]) -> list[int]:
        """Write commands in one go.

        :returns: the id of each, for :meth:`answer`.
        """
        ids = []
        data = bytearray()
        for execute, arguments in commands:
            self._sent += 1
            ids.append(self._sent)
            data += json.dumps({"execute": execute, "arguments": arguments, "id": self._sent}).encode()
        try:
            self._sock.settimeout(self._timeout_s)
            self._sock.sendall(data)
        except OSError as error:
            raise PeerError("QEMU is gone, or takes no more commands") from error
        return ids

    def answer(self, command_id: int) -> Any:
        """Wait for the answer to one command."""
        while command_id not in self._answers:
            self._read()
        answer = self._answers.pop(command_id)
        if "error" in answer:
            raise PeerError(f"QEMU refused command {command_id}: {answer['error']['desc']}")
        return answer["return"]

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        (command_id,) = self.send((command, arguments))
        return self.answer(command_id)

    def wait_completed(self) -> None:
        """Wait for the event MIGRATION completed."""
        while True:
            while self._migration_states:
                state = self._migration_states.pop(0)
                if state == "completed":
                    return
                if state in {"failed", "cancelled"}:
                    raise PeerError(f"the migration ended as {state!r}")
            self._read()

    def close(self) -> None:
        self._sock.close()

    def _read(self) -> None:
        while not self._lines:
            self._sock.settimeout(max(self._deadline_s - time.monotonic(), 0.001))
            try:
                data = self._sock.recv(65536)
            except TimeoutError as error:
                raise PeerError(f"QEMU was silent; no end within {self._timeout_s} s") from error
            except ConnectionResetError:
                data = b""
            if not data:
                raise PeerError("QEMU is gone")
            *self._lines, self._received = (self._received + data).split(b"\n")
        message = json.loads(self._lines.pop(0))
        if "id" in message:
            self._answers[message["id"]] = message
        elif "error" in message:
            raise PeerError(f"QEMU could not read a command: {message['error']['desc']}")
        elif message.get("event") == "MIGRATION":
            self._migration_states.append(message["data"]["status"])


class _Qemu:
    """A QEMU that is this process's own child, so that its end is seen at once and by nobody else's leave."""

    def __init__(self, argv: Sequence[str], *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        ours, theirs = socket.socketpair()
        self._stderr_fd = os.memfd_create("qemu-stderr")
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [
                        *argv,
                        *("-chardev", f"socket,id=ferryman-bench-monitor,fd={theirs.fileno()}"),
                        *("-mon", "chardev=ferryman-bench-monitor,mode=control"),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr_fd,
                    pass_fds=[theirs.fileno()],
                )
        except BaseException:
            ours.close()
            os.close(self._stderr_fd)
            raise
        self.monitor = _Monitor(ours, timeout_s=timeout_s)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stderr(self) -> str:
        return os.pread(self._stderr_fd, 4096, 0).decode(errors="replace").strip()

    def wait_gone(self) -> None:
        """Wait for the end of a process that was told to quit, and reap it.

        ``Popen.wait`` with a time-out sleeps between looks; a pidfd is readable at once.
        """
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(self._timeout_s * 1000):
                raise PeerError(f"QEMU {self.pid} was told to quit and did not within {self._timeout_s} s")
        finally:
            os.close(pidfd)
        self._process.wait()
        self._close()

    def kill(self) -> None:
        """End it without its consent; may be called again."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
            self._close()

    def _close(self) -> None:
        self.monitor.close()
        os.close(self._stderr_fd)


_COUNTERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("query-status", {}),
    ("query-cpus-fast", {}),
    ("query-block", {}),
    ("query-blockstats", {}),
)


@dataclasses.dataclass(kw_only=True, slots=True)
class _Running:
    qemu: _Qemu
    host: Host


class RawPeer:
    """Raw QMP between two QEMUs; see the module.

    :param return_path: also wait, at the source, for the destination's word that everything has come, and take
        image locks late, as Ferryman does; off is what a plain user of QMP gets.
    :param stream: a TCP connection over the loopback interface, or a unix socket.
    :param width: how many guests :meth:`migrate_many` has under way at a time; None means two for each CPU. All at
        once takes as long, because every CPU is busy either way, and interrupts each guest many times longer.
    :param timeout_s: for every wait of a call.
    """

    def __init__(
        self,
        *,
        return_path: bool = False,
        stream: Stream = Stream.TCP,
        width: int | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._return_path = return_path
        self._stream = stream
        self._width = width or 2 * len(os.sched_getaffinity(0))
        self._timeout_s = timeout_s
        self._running: dict[str, _Running] = {}
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._serial = itertools.count()

    @property
    def name(self) -> str:
        parts = ["raw"]
        if self._stream is Stream.UNIX:
            parts.append("unix")
        if self._return_path:
            parts.append("return-path")
        return "-".join(parts)

    def start(self, guests: Sequence[GuestSpec]) -> None:
        for program in {guest.qemu_argv[0] for guest in guests}:
            if shutil.which(program) is None:
                raise PeerUnavailable(f"{program} is not installed")
        self._directory = tempfile.TemporaryDirectory(prefix="ferryman-bench-raw-")
        for guest in guests:
            self._running[guest.name] = _Running(
                qemu=_Qemu(guest.qemu_argv, timeout_s=self._timeout_s), host=Host.A
            )
        for guest in guests:
            self._await_running(guest)

    def migrate(self, guest: GuestSpec, direction: Direction) -> Sample:
        t_call_ns = time.monotonic_ns()
        self._check_at_source([guest], direction)
        return self._migrate(guest, direction, t_call_ns)

    def migrate_many(self, guests: Sequence[GuestSpec], direction: Direction) -> list[Sample]:
        t_call_ns = time.monotonic_ns()
        self._check_at_source(guests, direction)
        with ThreadPoolExecutor(max_workers=self._width) as pool:
            futures: list[Future[Sample]] = [
                pool.submit(self._migrate, guest, direction, t_call_ns) for guest in guests
            ]
        return [future.result() for future in futures]

    def _await_running(self, guest: GuestSpec) -> None:
        qemu = self._running[guest.name].qemu
        with _blame(guest, qemu):
            greeted, status = qemu.monitor.send(("qmp_capabilities", {}), ("query-status", {}))
            qemu.monitor.answer(greeted)
            if not qemu.monitor.answer(status)["running"]:
                raise PeerError("the guest does not run")

    def count_all(self, rounds: int) -> list[float]:
        taken_s = []
        for _ in range(rounds):
            begin_s = time.perf_counter()
            asked = []
            for running in self._running.values():
                monitor = running.qemu.monitor
                monitor.rearm()
                asked.append((monitor, monitor.send(*_COUNTERS)))
            for monitor, ids in asked:
                for command_id in ids:
                    monitor.answer(command_id)
            taken_s.append(time.perf_counter() - begin_s)
        return taken_s

    def restart(self, guest: GuestSpec) -> float:
        self._running.pop(guest.name).qemu.kill()
        begin_s = time.perf_counter()
        self._running[guest.name] = _Running(
            qemu=_Qemu(guest.qemu_argv, timeout_s=self._timeout_s), host=Host.A
        )
        self._await_running(guest)
        return time.perf_counter() - begin_s

    def pid(self, guest: GuestSpec) -> int:
        if guest.name not in self._running:
            raise ValueError(f"{self.name} does not run {guest.name!r}")
        return self._running[guest.name].qemu.pid

    def stop(self) -> None:
        while self._running:
            _, running = self._running.popitem()
            running.qemu.kill()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _check_at_source(self, guests: Sequence[GuestSpec], direction: Direction) -> None:
        for guest in guests:
            if guest.name not in self._running or self._running[guest.name].host is not direction.source:
                raise ValueError(f"{guest.name!r} is not at host {direction.source.value}")

    def _migrate(self, guest: GuestSpec, direction: Direction, t_call_ns: int) -> Sample:
        cpu_began_s = time.thread_time()
        running = self._running[guest.name]
        source = running.qemu
        destination = _Qemu([*guest.qemu_argv, "-S", "-incoming", "defer"], timeout_s=self._timeout_s)
        try:
            with _blame(guest, source, destination):
                stamps = self._hand_over(source, destination)
        except BaseException:
            destination.kill()
            raise
        running.qemu, running.host = destination, direction.destination
        try:
            with _blame(guest, source):
                query, _ = source.monitor.send(("query-migrate", {}), ("quit", {}))
                info = source.monitor.answer(query)
                source.wait_gone()
        except BaseException:
            source.kill()
            raise
        t_done_ns = time.monotonic_ns()
        return Sample(
            guest=guest.name,
            direction=direction,
            wall_s=(t_done_ns - t_call_ns) / 1e9,
            t_call_ns=t_call_ns,
            t_done_ns=t_done_ns,
            source_pid=source.pid,
            destination_pid=destination.pid,
            destination_ready_ms=(stamps.ready_ns - t_call_ns) / 1e6,
            completed_to_cont_ms=(stamps.cont_ns - stamps.completed_ns) / 1e6,
            # QEMU 7.2 sends ``completed`` before it has worked these out, so they can be missing.
            downtime_ms=info.get("downtime"),
            total_time_ms=info.get("total-time"),
            cpu_s=time.thread_time() - cpu_began_s,
        )

    def _hand_over(self, source: _Qemu, destination: _Qemu) -> _Stamps:
        source.monitor.rearm()
        uri = "tcp:127.0.0.1:0"
        if self._stream is Stream.UNIX:
            assert self._directory is not None
            uri = f"unix:{self._directory.name}/{next(self._serial)}"
        prepared_source = source.monitor.send(
            self._set_capabilities(receiver=False),
            ("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": DOWNTIME_LIMIT_MS}),
        )
        prepared_destination = destination.monitor.send(
            ("qmp_capabilities", {}),
            self._set_capabilities(receiver=True),
            ("migrate-incoming", {"uri": uri}),
            ("query-migrate", {}),
        )
        for command_id in prepared_source:
            source.monitor.answer(command_id)
        *_, incoming = [destination.monitor.answer(command_id) for command_id in prepared_destination]
        ready_ns = time.monotonic_ns()
        if self._stream is Stream.TCP:
            (address,) = incoming["socket-address"]
            uri = f"tcp:{address['host']}:{address['port']}"
        source.monitor.execute("migrate", {"uri": uri})
        source.monitor.wait_completed()
        completed_ns = time.monotonic_ns()
        destination.monitor.wait_completed()
        destination.monitor.execute("cont", {})
        cont_ns = time.monotonic_ns()
        if self._stream is Stream.UNIX:
            # QEMU leaves the name of its listening socket behind.
            Path(uri.removeprefix("unix:")).unlink(missing_ok=True)
        return _Stamps(ready_ns=ready_ns, completed_ns=completed_ns, cont_ns=cont_ns)

    def _set_capabilities(self, *, receiver: bool) -> tuple[str, dict[str, Any]]:
        wanted = {"events": True, "return-path": self._return_path}
        if receiver:
            wanted["late-block-activate"] = self._return_path
        capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
        return "migrate-set-capabilities", {"capabilities": capabilities}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Stamps:
    ready_ns: int
    completed_ns: int
    cont_ns: int


@contextlib.contextmanager
def _blame(guest: GuestSpec, *qemus: _Qemu) -> Iterator[None]:
    """Add the guest's name, and what its QEMUs printed, to an error."""
    try:
        yield
    except PeerError as error:
        printed = " ".join(text for text in (qemu.stderr() for qemu in qemus) if text)
        raise PeerError(f"{guest.name}: {error}; QEMU printed: {printed or 'nothing'}") from error
