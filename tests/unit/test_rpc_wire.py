"""Frames of libvirt's RPC: cut anywhere, too long, too short, and none at all."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryman_remote.protocol import KEEPALIVE_PROGRAM, REMOTE_PROGRAM
from ferryman_remote.wire import (
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    Packet,
    PacketReader,
    PacketType,
    Status,
    WireError,
)

_WITH_DESCRIPTORS = (PacketType.CALL_WITH_DESCRIPTORS, PacketType.REPLY_WITH_DESCRIPTORS)
PACKETS = st.builds(
    Packet,
    program=st.sampled_from([REMOTE_PROGRAM, KEEPALIVE_PROGRAM, 0, 2**32 - 1]),
    version=st.integers(0, 2**32 - 1),
    procedure=st.integers(-(2**31), 2**31 - 1),
    type=st.sampled_from(PacketType),
    serial=st.integers(0, 2**32 - 1),
    status=st.sampled_from(Status),
    payload=st.binary(max_size=60),
).flatmap(
    lambda packet: st.integers(0, 32 if packet.type in _WITH_DESCRIPTORS else 0).map(
        lambda count: Packet(
            packet.program,
            packet.version,
            packet.procedure,
            packet.type,
            packet.serial,
            packet.status,
            packet.payload,
            count,
        )
    )
)
CALL = Packet(REMOTE_PROGRAM, 1, 23, PacketType.CALL, 5, Status.OK, b"payload.")


@settings(deadline=None)
@given(packets=st.lists(PACKETS, max_size=5), seed=st.integers())
def test_packets_come_back_however_they_are_cut(packets: list[Packet], seed: int) -> None:
    stream = b"".join(packet.pack() for packet in packets)
    cuts = random.Random(seed)
    reader, found, at = PacketReader(), list[Packet](), 0
    while at < len(stream):
        step = cuts.choice([1, 3, 28, 40, 200])
        found += reader.feed(stream[at : at + step])
        at += step
    assert found == packets
    assert reader.waiting_bytes == 0
    assert PacketReader().feed(stream) == packets


def test_known_bytes() -> None:
    """A PING: nothing but a header, whose length counts itself."""
    ping = Packet(KEEPALIVE_PROGRAM, 1, 1, PacketType.EVENT, 0)
    assert ping.pack().hex(" ", 4) == "0000001c 6b656570 00000001 00000001 00000002 00000000 00000000"


@settings(deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_packets_or_an_error(data: bytes) -> None:
    reader = PacketReader()
    try:
        reader.feed(data)
    except WireError as error:
        assert str(error)
        with pytest.raises(WireError):
            reader.feed(b"")
        assert reader.waiting_bytes == 0


@pytest.mark.parametrize("length", [0, 1, 27, MAX_MESSAGE_BYTES + 5, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_length_that_no_message_has(length: int) -> None:
    """It is refused as soon as it is read, before anything that it promises has come."""
    with pytest.raises(WireError, match=f"a length of {length} is not 28 to 33554436"):
        PacketReader().feed(struct.pack(">I", length))


def test_the_longest_message() -> None:
    payload = bytes(MAX_MESSAGE_BYTES - HEADER_BYTES)
    message = Packet(REMOTE_PROGRAM, 1, 7, PacketType.REPLY, 0, Status.OK, payload).pack()
    assert len(message) == MAX_MESSAGE_BYTES + 4
    (packet,) = PacketReader().feed(message)
    assert len(packet.payload) == len(payload)
    with pytest.raises(WireError, match="longer than 33554432"):
        Packet(REMOTE_PROGRAM, 1, 7, PacketType.REPLY, 0, Status.OK, payload + b"x").pack()


def test_a_lower_limit_for_who_is_not_known_yet() -> None:
    reader = PacketReader(limit=HEADER_BYTES + 8)
    assert reader.feed(CALL.pack()) == [CALL]
    with pytest.raises(WireError, match="a length of 37 is not 28 to 36"):
        reader.feed(struct.pack(">I", 37))


def test_what_waits_is_what_came() -> None:
    reader = PacketReader()
    assert reader.feed(struct.pack(">I", MAX_MESSAGE_BYTES)) == []
    assert reader.waiting_bytes == 4


@pytest.mark.parametrize(
    ("type_", "status", "tail", "words"),
    [
        (7, 0, b"", "type 7 and status 0"),
        (0, 3, b"", "type 0 and status 3"),
        (4, 0, b"", "does not say how many"),
        (5, 0, b"\0\0\0", "does not say how many"),
        (4, 0, b"\0\0\0\x21", "33 descriptors are more than 32"),
    ],
)
def test_a_header_that_no_message_has(type_: int, status: int, tail: bytes, words: str) -> None:
    head = struct.pack(">IIIiIII", 28 + len(tail), REMOTE_PROGRAM, 1, 1, type_, 0, status)
    with pytest.raises(WireError, match=words):
        PacketReader().feed(head + tail)


def test_a_packet_that_cannot_be_sent() -> None:
    with pytest.raises(WireError, match="33 descriptors"):
        Packet(REMOTE_PROGRAM, 1, 1, PacketType.CALL_WITH_DESCRIPTORS, 0, Status.OK, b"", 33).pack()
    with pytest.raises(WireError, match="does not fit"):
        Packet(REMOTE_PROGRAM, 1, 1, PacketType.CALL, -1).pack()
