"""What the benchmark asks of whatever migrates guests: the interface of a peer, and what one migration yields.

A peer is two hosts on this machine, A and B, and one way of moving guests between them. All peers get the same
guests, described once by :class:`GuestSpec`, and are driven by the same calls, so that a runner can interleave
them on one machine and compare like with like. After a call of ``migrate`` or ``migrate_many`` a guest runs at
the destination in a new QEMU, and the old one is gone. What happens to the guest is not asked of the peer: a witness
process that the guest talks to stamps every sign of life, and tells the two QEMUs apart by the pids of
:class:`Sample`.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import uuid
from collections.abc import Iterable, Sequence
from typing import Protocol

from tests.guests.counter import CounterGuest
from tests.guests.witness import Tick, Witness


class PeerError(Exception):
    """A peer did not do what was asked; :meth:`Peer.stop` still clears everything away."""


class PeerUnavailable(PeerError):
    """This machine cannot run this peer; nothing was left behind.

    :param reason: one sentence for people: which program or right is missing.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Host(enum.Enum):
    """The two hosts that every peer has."""

    A = "a"
    B = "b"


class Direction(enum.Enum):
    """Which way a guest moves."""

    A_TO_B = "a-to-b"
    B_TO_A = "b-to-a"

    @property
    def source(self) -> Host:
        return Host.A if self is Direction.A_TO_B else Host.B

    @property
    def destination(self) -> Host:
        return Host.B if self is Direction.A_TO_B else Host.A

    @property
    def reverse(self) -> Direction:
        return Direction.B_TO_A if self is Direction.A_TO_B else Direction.A_TO_B


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuestSpec:
    """One guest, in the two forms that the peers need.

    Both describe the same machine: ``pc``, one CPU, TCG, no default devices.

    :param name: unique among the guests of one peer.
    :param uuid: in the usual form, 8-4-4-4-12 lower-case digits.
    :param qemu_argv: the command that runs the guest at once, program first, without a monitor, ``-S`` or
        ``-incoming``: a peer that runs QEMU itself appends those.
    :param domain_xml: the libvirt domain of type ``qemu`` that a peer with a libvirt interface is given.
    """

    name: str
    uuid: str
    qemu_argv: tuple[str, ...]
    domain_xml: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One migration of one guest. Where a field may be None, None means "not measured", never zero.

    :param wall_s: the whole call, from the moment it was made to the moment when the guest runs at the
        destination and the source's process is gone; equals ``t_done_ns`` - ``t_call_ns``.
    :param t_call_ns: CLOCK_MONOTONIC. In :meth:`Peer.migrate_many` all guests share the moment of the one call,
        so time spent waiting for a turn counts.
    :param t_done_ns: CLOCK_MONOTONIC.
    :param source_pid: the QEMU that the guest left; gone at ``t_done_ns``.
    :param destination_pid: the QEMU in which the guest runs now.
    :param destination_ready_ms: from ``t_call_ns`` until the destination's QEMU listened for the stream.
    :param completed_to_cont_ms: from the arrival of the source's event ``completed`` until the destination's
        QEMU answered ``cont``.
    :param downtime_ms: as QEMU reports it: from stopping the source to the end of its last pass.
    :param total_time_ms: as QEMU or libvirt reports it.
    :param cpu_s: CPU time of the controlling program and its helpers, not of the QEMUs.
    """

    guest: str
    direction: Direction
    wall_s: float
    t_call_ns: int
    t_done_ns: int
    source_pid: int
    destination_pid: int
    destination_ready_ms: float | None = None
    completed_to_cont_ms: float | None = None
    downtime_ms: float | None = None
    total_time_ms: float | None = None
    cpu_s: float | None = None


class Peer(Protocol):
    """One way of migrating guests between host A and host B of this machine.

    Blocking, and used by one thread at a time. Every wait has an end: a peer that makes no progress raises
    :class:`PeerError`. :meth:`stop` may be called at any time, also after an error and more than once.
    """

    @property
    def name(self) -> str:
        """What results are filed under."""

    def start(self, guests: Sequence[GuestSpec]) -> None:
        """Bring up both hosts and run the guests on host A; called once between two calls of :meth:`stop`.

        :raises PeerUnavailable: this machine cannot run this peer; nothing is left behind.
        :raises PeerError: a host or a guest did not start; call :meth:`stop`.
        """

    def migrate(self, guest: GuestSpec, direction: Direction) -> Sample:
        """Migrate one running guest, live, by one whole call.

        :raises PeerError: the guest was not moved, or nobody knows; the peer is fit for nothing but :meth:`stop`.
        :raises ValueError: the guest is not at the source of ``direction``.
        """

    def migrate_many(self, guests: Sequence[GuestSpec], direction: Direction) -> list[Sample]:
        """Migrate all these guests at once; :func:`lot_wall_s` of the result is the wall time of the lot.

        :returns: one sample for each guest, in the order given.
        :raises PeerError: as :meth:`migrate`; raised after every guest has reached an end.
        :raises ValueError: a guest is not at the source of ``direction``; none was moved.
        """

    def count_all(self, rounds: int) -> list[float]:
        """Read the counters of every guest's state, processors and disks on host A, several times.

        :returns: seconds that each look took, for all guests.
        :raises PeerError: a guest did not answer.
        """

    def restart(self, guest: GuestSpec) -> float:
        """End the guest on host A without its consent, and start it there again.

        :returns: seconds from the order to start it until it runs.
        :raises PeerError: it did not start.
        """

    def pid(self, guest: GuestSpec) -> int:
        """The process of the QEMU that runs the guest now.

        :raises ValueError: the peer does not run this guest.
        """

    def stop(self) -> None:
        """End guests and hosts and remove processes, sockets, files, namespaces and mounts."""


def lot_wall_s(samples: Iterable[Sample]) -> float:
    """The wall time of the call that yielded these samples: until the last of them was done.

    :raises ValueError: there are no samples.
    """
    lot = list(samples)
    return (max(sample.t_done_ns for sample in lot) - min(sample.t_call_ns for sample in lot)) / 1e9


def counter_guest(
    guest: CounterGuest,
    *,
    name: str,
    uuid: str,
    image_path: str | os.PathLike[str],
    serial_socket_path: str | os.PathLike[str],
) -> GuestSpec:
    """Describe a counter guest whose image was written and whose witness listens."""
    return GuestSpec(
        name=name,
        uuid=uuid,
        qemu_argv=tuple(guest.qemu_argv(name, uuid, image_path, serial_socket_path)),
        domain_xml=guest.domain_xml(name, uuid, image_path, serial_socket_path),
    )


def counter_guests(
    guest: CounterGuest, images: Sequence[str | os.PathLike[str]], witnesses: Sequence[Witness]
) -> list[GuestSpec]:
    """Describe counter guests of one kind, ``g0`` and so on: one for each image, heard by the witness beside it."""
    return [
        counter_guest(
            guest,
            name=f"g{number}",
            uuid=str(uuid.uuid4()),
            image_path=image,
            serial_socket_path=witness.socket_path,
        )
        for number, (image, witness) in enumerate(zip(images, witnesses, strict=True))
    ]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outage:
    """One migration as seen from outside.

    :param blackout_ms: from the source's last tick to the destination's first. An undisturbed guest would show
        one tick interval here.
    :param call_to_first_tick_ms: from the call to the destination's first tick.
    """

    blackout_ms: float
    call_to_first_tick_ms: float


def outage_of(sample: Sample, ticks: Iterable[Tick]) -> Outage:
    """Look a migration up in what the witness heard, by the two pids.

    :param ticks: may hold other migrations and other guests.
    :raises ValueError: one of the two processes was not heard.
    """
    last_source_ns = first_destination_ns = None
    for tick in ticks:
        if tick.pid == sample.source_pid:
            last_source_ns = tick.t_ns
        elif tick.pid == sample.destination_pid and first_destination_ns is None:
            first_destination_ns = tick.t_ns
    if last_source_ns is None or first_destination_ns is None:
        raise ValueError(f"{sample.guest!r} was not heard on both sides of its migration")
    return Outage(
        blackout_ms=(first_destination_ns - last_source_ns) / 1e6,
        call_to_first_tick_ms=(first_destination_ns - sample.t_call_ns) / 1e6,
    )
