"""``python -m tests.bench.remote``: the daemon beside stock libvirtd, driven by the same client in one run.

Calls go over unix sockets, by a client that packs the same bytes for both: a trivial call (the host's name), a domain's
information, lists of simulated domains (both have a simulated driver), connecting and closing; memory is the resident
set of each daemon when idle and with many connections open.  Migrations are ``virsh migrate --live`` of an idle guest
between two daemons of each kind, in turns.

Figures are medians; every sample stands in ``.cache/results/remote.json``.  Ratios above 1: Ferryman is faster.
"""

from __future__ import annotations

import argparse
import os
import platform
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

import ferryman
from ferryman_remote import protocol
from ferryman_remote.protocol import PROCEDURES, REMOTE_PROGRAM
from ferryman_remote.wire import Packet, PacketReader, PacketType, Status
from ferryman_remote.xdr import decode, encode
from tests.bench.domains import conclude, simulated_xml
from tests.bench.peer import Direction, Host, PeerUnavailable, counter_guests
from tests.bench.peer_libvirt import LibvirtPeer
from tests.daemons import daemon, virsh
from tests.guests.counter import CounterGuest
from tests.guests.witness import Witness

_RESULTS = Path(".cache/results/remote.json")
_NUMBERS = {procedure.name: procedure.number for procedure in PROCEDURES.values()}
_GUEST = CounterGuest(
    memory_bytes=(32 << 20) + 8192, tick_hz=500, page_count=16, pages_per_tick=0, prefill=False
)
_PEERS = ("ferrymand", "libvirtd")
_TIMEOUT_S = 60.0
_LISTS = (1, 100, 1000)


@dataclass(kw_only=True)
class Report:
    """Everything that one run found: samples by what was measured, and by whose daemon."""

    machine: dict[str, Any]
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, whose: str, *values: float) -> None:
        self.samples.setdefault(what, {}).setdefault(whose, []).extend(values)

    def median(self, what: str, whose: str) -> float:
        found = self.samples.get(what, {}).get(whose)
        return statistics.median(found) if found else float("nan")

    def ratio(self, what: str, *, rate: bool = False) -> float:
        ours, theirs = (self.median(what, whose) for whose in _PEERS)
        return ours / theirs if rate else theirs / ours

    def summary(self) -> str:
        """The last line."""
        return (
            f"bench-remote: ok rpc_vs_libvirtd={self.ratio('calls/s of 8 callers', rate=True):.2f}"
            f" list1000_vs_libvirtd={self.ratio('list of 1000, ms'):.2f}"
            f" virsh_migrate_vs_libvirtd={self.ratio('virsh migrate, ms'):.2f}"
            f" rss_mib={self.median('resident, MiB', 'ferrymand'):.0f}"
            f" kib_per_connection={self.median('a connection, KiB', 'ferrymand'):.0f}"
        )


class Caller:
    """A client that waits for each answer."""

    def __init__(self, path: str, uri: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(_TIMEOUT_S)
        self.socket.connect(path)
        self._reader = PacketReader()
        self._serial = 0
        self.call("AUTH_LIST")
        self.call("CONNECT_OPEN", uri, 0)

    def pack(self, name: str, *arguments: object) -> bytes:
        procedure = PROCEDURES[_NUMBERS[name]]
        payload = encode(procedure.arguments(*arguments)) if arguments else b""
        self._serial += 1
        number = procedure.number
        return Packet(REMOTE_PROGRAM, 1, number, PacketType.CALL, self._serial, payload=payload).pack()

    def receive(self) -> Packet | None:
        """The answer, if it is whole with what comes now."""
        packets = self._reader.feed(self.socket.recv(1 << 20))
        if not packets:
            return None
        (packet,) = packets
        if packet.status is not Status.OK:
            raise RuntimeError(str(decode(protocol.RemoteError, packet.payload).message))
        return packet

    def call(self, name: str, *arguments: object) -> Any:
        self.socket.sendall(self.pack(name, *arguments))
        while (packet := self.receive()) is None:
            pass
        result = PROCEDURES[packet.procedure].result
        assert result is not None
        return decode(result, packet.payload)

    def close(self) -> None:
        self.call("CONNECT_CLOSE")
        self.socket.close()


def _timed(times: int, what: Callable[[], object]) -> list[float]:
    taken_ms = []
    for _ in range(times):
        begin_s = time.perf_counter()
        what()
        taken_ms.append((time.perf_counter() - begin_s) * 1000)
    return taken_ms


def _rate(path: str, uri: str, callers: int, calls: int) -> float:
    """Trivial calls per second of several clients at once, each of which waits for its answer."""
    clients = [Caller(path, uri) for _ in range(callers)]
    by_descriptor = {client.socket.fileno(): client for client in clients}
    poll = select.epoll()
    for descriptor in by_descriptor:
        poll.register(descriptor, select.EPOLLIN)
    data = clients[0].pack("CONNECT_GET_HOSTNAME")
    answered, sent = 0, callers
    begin_s = time.perf_counter()
    for client in clients:
        client.socket.sendall(data)
    while answered < calls:
        for descriptor, _ in poll.poll(_TIMEOUT_S):
            client = by_descriptor[descriptor]
            # The bytes are counted, and not read: the same for both, and little beside what the daemons do.
            client.socket.recv(4096)
            answered += 1
            if sent < calls:
                client.socket.sendall(data)
                sent += 1
    taken_s = time.perf_counter() - begin_s
    poll.close()
    for client in clients:
        client.close()
    return calls / taken_s


def _resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise ProcessLookupError(pid)


@dataclass(frozen=True, slots=True)
class Served:
    """A daemon as it is measured.

    :param uris: its hosts with so many simulated domains.
    """

    path: str
    pid: int
    uris: dict[int, str]


def _measure_calls(report: Report, whose: str, served: Served, rounds: int) -> None:
    uri = served.uris[100]
    caller = Caller(served.path, uri)
    report.add("trivial call, ms", whose, *_timed(rounds * 50, lambda: caller.call("CONNECT_GET_HOSTNAME")))
    (dom, *_) = caller.call("CONNECT_LIST_ALL_DOMAINS", 1, 0).domains
    report.add("domain info, ms", whose, *_timed(rounds * 20, lambda: caller.call("DOMAIN_GET_INFO", dom)))
    caller.close()
    for count in _LISTS:
        caller = Caller(served.path, served.uris[count])
        assert len(caller.call("CONNECT_LIST_ALL_DOMAINS", 1, 0).domains) == count
        taken = _timed(rounds * 2, lambda: caller.call("CONNECT_LIST_ALL_DOMAINS", 1, 0))  # noqa: B023 - called here
        report.add(f"list of {count}, ms", whose, *taken)
        caller.close()
    report.add("connect and close, ms", whose, *_timed(rounds * 5, lambda: Caller(served.path, uri).close()))
    for callers in (1, 8):
        for _ in range(3):
            rate = _rate(served.path, uri, callers, rounds * 500)
            report.add(f"calls/s of {callers} caller{'s' if callers > 1 else ''}", whose, rate)


def _measure_memory(report: Report, whose: str, served: Served, connections: int) -> None:
    idle = _resident_kib(served.pid)
    report.add("resident, MiB", whose, idle / 1024)
    callers = [Caller(served.path, served.uris[1]) for _ in range(connections)]
    report.add("a connection, KiB", whose, (_resident_kib(served.pid) - idle) / connections)
    for caller in callers:
        caller.close()


async def _fill(path: Path, counts: Sequence[int]) -> None:
    """Make simulated domains through the daemon itself."""
    for count in counts:
        uri = f"test+unix://{_world(count)}?socket={path}"
        async with ferryman.connect(uri) as connection:
            for number in range(count):
                await connection.create(simulated_xml(number, for_libvirt=False))


def _world(count: int) -> str:
    return f"/bench-{count}/alpha"


@contextmanager
def _ferrymand(directory: Path, counts: Sequence[int]) -> Iterator[Served]:
    with daemon(directory, log_level="INFO", tcp_listen="") as made:
        path = made.directory / "virttestd-sock"
        anyio.run(_fill, path, counts)
        uris = {count: f"test://{_world(count)}" for count in counts}
        yield Served(str(path), made.process.pid, uris)


@contextmanager
def _libvirtd(directory: Path, counts: Sequence[int]) -> Iterator[Served]:
    peer = LibvirtPeer()
    try:
        peer.start([])
        uris = {}
        for count in counts:
            node = directory / f"node-{count}.xml"
            machines = "".join(simulated_xml(number, for_libvirt=True) for number in range(count))
            node.write_text(f"<node>{machines}</node>")
            uris[count] = f"test://{node}"
        path, pid = peer.daemon(Host.A)
        yield Served(path, pid, uris)
    finally:
        peer.stop()


def _measure_migrations(report: Report, directory: Path, rounds: int) -> None:
    with ExitStack() as stack:
        image = directory / "image"
        _GUEST.write_image(image)
        witnesses = {whose: stack.enter_context(Witness(directory)) for whose in _PEERS}
        specs = {whose: counter_guests(_GUEST, [image], [witnesses[whose]])[0] for whose in _PEERS}
        peer = LibvirtPeer()
        stack.callback(peer.stop)
        peer.start([specs["libvirtd"]])
        ends = [stack.enter_context(daemon(directory / name, log_level="INFO")) for name in "ab"]
        uris = [end.uri(directory / f"root-{number}") for number, end in enumerate(ends)]
        spec = specs["ferrymand"]
        definition = directory / "definition.xml"
        definition.write_text(spec.domain_xml)
        virsh(uris[0], "create", str(definition))
        for witness in witnesses.values():
            witness.wait_tick(20, timeout_s=_TIMEOUT_S)
        for number in range(rounds):
            direction = (Direction.A_TO_B, Direction.B_TO_A)[number % 2]
            for whose in _PEERS if number % 2 else reversed(_PEERS):
                if whose == "libvirtd":
                    report.add(
                        "virsh migrate, ms", whose, peer.migrate(specs[whose], direction).wall_s * 1000
                    )
                else:
                    source, destination = uris if direction is Direction.A_TO_B else reversed(uris)
                    migrate = ["virsh", "-q", "-c", source, "migrate", "--live", spec.name, destination]
                    begin_s = time.perf_counter()
                    subprocess.run(migrate, check=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
                    report.add("virsh migrate, ms", whose, (time.perf_counter() - begin_s) * 1000)
                last = witnesses[whose].last()
                assert last is not None
                witnesses[whose].wait_tick(last.value + 50, timeout_s=_TIMEOUT_S)
        for whose, witness in witnesses.items():
            seen = witness.report()
            if (seen.ticks_lost, seen.ticks_doubled, seen.overlaps) != (0, 0, ()):
                raise RuntimeError(f"a guest of {whose} lost or repeated something: {seen}")
            report.add("blackout, ms", whose, *(blackout.ms for blackout in seen.blackouts))
        virsh(uris[(rounds % 2)], "destroy", spec.name)


def _print_table(report: Report) -> None:
    print(f"{'median [least, most]':26}{'ferrymand':>34}{'libvirtd':>34}")
    for what, samples in report.samples.items():
        row = f"{what:26}"
        for whose in _PEERS:
            values = samples.get(whose)
            shown = (
                f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]" if values else "-"
            )
            row += f"{shown:>34}"
        print(row, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.remote", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of each figure (default %(default)s)")
    parser.add_argument("--migrations", type=int, default=20, help="of each (default %(default)s)")
    parser.add_argument(
        "--connections", type=int, default=200, help="that are open at a time (default %(default)s)"
    )
    arguments = parser.parse_args(argv)
    report = Report(
        machine={"python": platform.python_version(), "cpus": os.cpu_count(), "kernel": platform.release()}
    )
    makers = {"ferrymand": _ferrymand, "libvirtd": _libvirtd}
    with tempfile.TemporaryDirectory(prefix="fb-") as text:
        directory = Path(text)
        for whose, make in makers.items():
            (directory / whose).mkdir()
            try:
                with make(directory / whose, _LISTS) as served:
                    _measure_calls(report, whose, served, arguments.rounds)
                with make(directory / whose, (1,)) as served:
                    _measure_memory(report, whose, served, arguments.connections)
            except PeerUnavailable as unavailable:
                report.unavailable[whose] = unavailable.reason
        if arguments.migrations and not report.unavailable:
            _measure_migrations(report, directory, arguments.migrations)
    _print_table(report)
    conclude(report, report.unavailable, report.summary(), _RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
