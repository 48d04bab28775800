"""Frames of libvirt's RPC: a length, a header of six numbers, and a payload.  Nothing here does I/O.

Source: libvirt ``src/rpc/virnetprotocol.x`` and ``virnetmessage.c`` (9.0 to 11.3).  A length counts itself; a whole
message holds at most 32 MiB behind it.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

MAX_MESSAGE_BYTES = 33_554_432
"""Of a message without its length."""

MAX_DESCRIPTORS = 32

_LENGTH = struct.Struct(">I")
_HEADER = struct.Struct(">IIIiIII")
_COUNT = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size
HEADER_BYTES = _HEADER.size - LENGTH_BYTES


class WireError(ValueError):
    """What came is no message; nothing that follows it can be read."""


class PacketType(IntEnum):
    """What a packet is."""

    CALL = 0
    REPLY = 1
    EVENT = 2
    STREAM = 3
    CALL_WITH_DESCRIPTORS = 4
    REPLY_WITH_DESCRIPTORS = 5
    STREAM_HOLE = 6


class Status(IntEnum):
    """How a call went, or a stream goes on."""

    OK = 0
    ERROR = 1
    CONTINUE = 2


_TYPES = tuple(PacketType)
_STATUSES = tuple(Status)


class Packet(NamedTuple):
    """One message.

    :param procedure: a signed number, as on the wire.
    :param serial: chosen by who calls; a reply bears that of its call.
    :param descriptors: how many travel with it; their payload's count is not in ``payload``.
    """

    program: int
    version: int
    procedure: int
    type: PacketType
    serial: int
    status: Status = Status.OK
    payload: bytes = b""
    descriptors: int = 0

    def pack(self) -> bytes:
        """The bytes of the message. :raises WireError: it is too long, or a number does not fit."""
        payload = self.payload
        if self.type in (PacketType.CALL_WITH_DESCRIPTORS, PacketType.REPLY_WITH_DESCRIPTORS):
            if not 0 <= self.descriptors <= MAX_DESCRIPTORS:
                raise WireError(f"{self.descriptors} descriptors are not 0 to {MAX_DESCRIPTORS}")
            payload = _COUNT.pack(self.descriptors) + payload
        length = _HEADER.size + len(payload)
        if length - LENGTH_BYTES > MAX_MESSAGE_BYTES:
            raise WireError(f"a message of {length - LENGTH_BYTES} bytes is longer than {MAX_MESSAGE_BYTES}")
        try:
            head = _HEADER.pack(
                length, self.program, self.version, self.procedure, self.type, self.serial, self.status
            )
        except struct.error as error:
            raise WireError(f"a number of the header does not fit: {error}") from error
        return head + payload


class PacketReader:
    """Makes packets of bytes as they come, however they are cut.

    :param limit: how many bytes a message may have without its length; less than :data:`MAX_MESSAGE_BYTES` for a peer
        that nobody knows yet.
    """

    def __init__(self, limit: int = MAX_MESSAGE_BYTES) -> None:
        self.limit = limit
        self._received = bytearray()
        self._broken: WireError | None = None

    @property
    def waiting_bytes(self) -> int:
        """How much of a message has come that is not whole yet: never more than was received, whatever was promised."""
        return len(self._received)

    def feed(self, data: bytes) -> list[Packet]:
        """Take what has been received; returns the packets that are whole now, in their order.

        :raises WireError: it is no message; whatever is fed later raises the same. Packets before it are lost, since a
            connection that holds such a thing is closed.
        """
        if self._broken is not None:
            raise self._broken
        received = self._received
        received += data
        packets: list[Packet] = []
        at = 0
        try:
            while len(received) - at >= LENGTH_BYTES:
                (length,) = _LENGTH.unpack_from(received, at)
                if not _HEADER.size <= length <= self.limit + LENGTH_BYTES:
                    raise WireError(
                        f"a length of {length} is not {_HEADER.size} to {self.limit + LENGTH_BYTES}"
                    )
                if len(received) - at < length:
                    break
                packets.append(_unpack(received, at, at + length))
                at += length
        except WireError as error:
            self._broken = error
            received.clear()
            raise
        del received[:at]
        return packets


def _unpack(received: bytearray, at: int, end: int) -> Packet:
    """The packet between two places. :raises WireError: it is none."""
    _, program, version, procedure, kind, serial, status = _HEADER.unpack_from(received, at)
    if kind >= len(_TYPES) or status >= len(_STATUSES):
        raise WireError(f"type {kind} and status {status} are no message's")
    at += _HEADER.size
    descriptors = 0
    if kind in (PacketType.CALL_WITH_DESCRIPTORS, PacketType.REPLY_WITH_DESCRIPTORS):
        if end - at < _COUNT.size:
            raise WireError("a message with descriptors does not say how many")
        (descriptors,) = _COUNT.unpack_from(received, at)
        if descriptors > MAX_DESCRIPTORS:
            raise WireError(f"{descriptors} descriptors are more than {MAX_DESCRIPTORS}")
        at += _COUNT.size
    with memoryview(received) as view:
        payload = bytes(view[at:end])
    return Packet(program, version, procedure, _TYPES[kind], serial, _STATUSES[status], payload, descriptors)
