"""Messages that stock virsh and libvirtd said to each other (``python -m tests.record_rpc``) go both ways unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferryman_remote.protocol import PROCEDURES, REMOTE_PROGRAM, RemoteError
from ferryman_remote.wire import Packet, PacketReader, PacketType, Status
from ferryman_remote.xdr import decode, encode

RECORDING = Path(__file__).with_name("recorded-rpc.txt")
LINES = RECORDING.read_text().splitlines()[1:]


def recorded() -> list[tuple[str, Packet]]:
    reader = PacketReader()
    found = []
    for line in LINES:
        sign, _, text = line.partition(" ")
        message = bytes.fromhex(text)
        (packet,) = reader.feed(message)
        assert packet.pack() == message
        found.append((sign, packet))
    return found


def test_every_message_that_is_declared_is_made_again_byte_by_byte() -> None:
    seen: set[tuple[int, PacketType]] = set()
    unknown: set[int] = set()
    for sign, packet in recorded():
        if packet.program != REMOTE_PROGRAM:
            continue
        procedure = PROCEDURES.get(packet.procedure)
        if packet.status is Status.ERROR:
            error = decode(RemoteError, packet.payload)
            assert encode(error) == packet.payload
            assert (sign, packet.type, error.level) == ("<", PacketType.REPLY, 2)
            assert error.message
        elif procedure is None:
            unknown.add(packet.procedure)
        else:
            message = procedure.result if packet.type is PacketType.REPLY else procedure.arguments
            assert message is not None
            assert encode(decode(message, packet.payload)) == packet.payload
            seen.add((packet.procedure, packet.type))
    calls = {number for number, kind in seen if kind is PacketType.CALL}
    assert len(calls) > 50
    assert any(kind is PacketType.EVENT for _, kind in seen)
    # What virsh asked besides: counters of the host's memory, a guest's processors, the compression cache's like.
    assert len(unknown) < 12


@pytest.mark.parametrize(
    ("number", "values"),
    [(1, {"name": "qemu:///system", "flags": 0}), (60, {"feature": 10}), (23, {"name": "d"})],
)
def test_what_is_known_to_have_been_said(number: int, values: dict[str, object]) -> None:
    calls = [
        p for sign, p in recorded() if sign == ">" and p.procedure == number and p.program == REMOTE_PROGRAM
    ]
    arguments = [decode(PROCEDURES[number].arguments, packet.payload)._asdict() for packet in calls]
    assert values in arguments
