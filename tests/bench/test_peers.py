"""Each peer really migrates a running guest, and leaves nothing behind; what the benchmark trusts."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bench._libvirt_host import HIDDEN_DIRECTORIES
from tests.bench.peer import (
    Direction,
    GuestSpec,
    Peer,
    PeerError,
    PeerUnavailable,
    Sample,
    counter_guest,
    lot_wall_s,
    outage_of,
)
from tests.bench.peer_libvirt import LibvirtPeer
from tests.bench.peer_raw import RawPeer, Stream
from tests.guests.counter import CounterGuest
from tests.guests.witness import Witness

MAKERS: dict[str, Callable[[], Peer]] = {
    "raw": RawPeer,
    "raw-unix": lambda: RawPeer(stream=Stream.UNIX),
    "raw-return-path": lambda: RawPeer(return_path=True),
    "libvirt": LibvirtPeer,
}
GUEST = CounterGuest(memory_bytes=32 * 2**20)
TICKS_BEFORE = 20
LIBVIRT_PLACES = [
    Path("/run/libvirt"),
    Path("/run/libvirtd.pid"),
    *(Path(place) for place in HIDDEN_DIRECTORIES if place != "/run"),
]


class Bench:
    """A peer with a running guest for each witness."""

    def __init__(self, peer: Peer, guests: list[GuestSpec], witnesses: list[Witness]) -> None:
        self.peer = peer
        self.guests = guests
        self.witnesses = witnesses


@pytest.fixture(params=list(MAKERS))
def bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Start a peer with two ticking guests; afterwards stop it and look for what it left."""
    # A short directory for sockets, and an empty one for whatever the peer makes.
    with tempfile.TemporaryDirectory(prefix="fb-") as sockets:
        private = Path(sockets, "peer")
        private.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(private))
        image = tmp_path / "image"
        GUEST.write_image(image)
        peer = MAKERS[request.param]()
        before = state_of_machine(private)
        with contextlib.ExitStack() as stack:
            witnesses = [stack.enter_context(Witness(sockets)) for _ in range(2)]
            guests = [
                counter_guest(
                    GUEST,
                    name=f"guest-{number}",
                    uuid=str(uuid.uuid4()),
                    image_path=image,
                    serial_socket_path=witness.socket_path,
                )
                for number, witness in enumerate(witnesses)
            ]
            try:
                peer.start(guests)
                for witness in witnesses:
                    witness.wait_tick(TICKS_BEFORE)
                yield Bench(peer, guests, witnesses)
            except PeerUnavailable as unavailable:
                if os.environ.get("CI") == "true":
                    raise
                pytest.skip(unavailable.reason)
            finally:
                peer.stop()
                peer.stop()
        traces = [str(private), *(guest.uuid for guest in guests)]
        assert [line for line in command_lines() if any(trace in line for trace in traces)] == []
        assert list(private.iterdir()) == []
        assert state_of_machine(private) == before


def command_lines() -> list[str]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.append(Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def state_of_machine(private: Path) -> set[str]:
    """What a libvirt host would leave in the real places instead of in its own: mounts and files."""
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    ours = {mount for mount in mounts if mount in HIDDEN_DIRECTORIES or mount.startswith(str(private))}
    files = {str(path) for place in LIBVIRT_PLACES for path in place.rglob("*")}
    return ours | files | {str(place) for place in LIBVIRT_PLACES if place.exists()}


def gone(pid: int) -> bool:
    return not Path("/proc", str(pid)).exists()


def check(sample: Sample, guest: GuestSpec, direction: Direction, source_pid: int) -> None:
    assert (sample.guest, sample.direction) == (guest.name, direction)
    assert sample.source_pid == source_pid
    assert gone(sample.source_pid)
    assert sample.wall_s == pytest.approx((sample.t_done_ns - sample.t_call_ns) / 1e9)
    for measured in (sample.downtime_ms, sample.total_time_ms, sample.cpu_s):
        assert measured is None or 0 <= measured < 60_000


def test_there_and_back_without_a_gap(bench: Bench) -> None:
    peer = bench.peer
    at_first = [peer.pid(guest) for guest in bench.guests]

    there = []
    for guest, witness, pid in zip(bench.guests, bench.witnesses, at_first, strict=True):
        sample = peer.migrate(guest, Direction.A_TO_B)
        check(sample, guest, Direction.A_TO_B, pid)
        first = witness.wait_new_process(other_than=pid)
        assert first.pid == sample.destination_pid == peer.pid(guest)
        witness.wait_tick(first.value + TICKS_BEFORE)
        there.append(sample)

    back = peer.migrate_many(bench.guests, Direction.B_TO_A)
    assert len({sample.t_call_ns for sample in back}) == 1
    assert lot_wall_s(back) == max(sample.wall_s for sample in back)

    for guest, witness, before, after in zip(bench.guests, bench.witnesses, there, back, strict=True):
        check(after, guest, Direction.B_TO_A, before.destination_pid)
        first = witness.wait_new_process(other_than=before.destination_pid)
        witness.wait_tick(first.value + TICKS_BEFORE)
        report = witness.report()
        assert report.pids == (before.source_pid, before.destination_pid, after.destination_pid)
        assert (report.ticks_lost, report.ticks_doubled, report.overlaps) == (0, 0, ())
        for sample, blackout in zip((before, after), report.blackouts, strict=True):
            outage = outage_of(sample, witness.ticks())
            assert outage.blackout_ms == pytest.approx(blackout.ms)
            assert outage.call_to_first_tick_ms > 0


def test_a_guest_that_is_not_there(bench: Bench) -> None:
    guest = bench.guests[0]
    with pytest.raises(ValueError, match="not at host b"):
        bench.peer.migrate(guest, Direction.B_TO_A)
    with pytest.raises(ValueError, match="not at host b"):
        bench.peer.migrate_many(bench.guests, Direction.B_TO_A)
    last = bench.witnesses[0].last()
    assert last is not None
    bench.witnesses[0].wait_tick(last.value)


def test_a_dead_guest_is_an_error_and_not_a_wait(bench: Bench) -> None:
    os.kill(bench.peer.pid(bench.guests[0]), signal.SIGKILL)
    with pytest.raises(PeerError, match=bench.guests[0].name):
        bench.peer.migrate_many(bench.guests, Direction.A_TO_B)
