"""The QEMU Machine Protocol as bytes in, messages out: no I/O, no clock, no event loop.

QMP is JSON, one object a line.  The client speaks first only after the server's greeting; from then on the server may
send an event between any two answers, and an answer carries the id of its command::

    server                                     client
    {"QMP": {...}}                  ------->                        Greeting
                                    <-------   {"execute": "qmp_capabilities", "id": 1}
    {"return": {}, "id": 1}         ------->                        Reply
                                    <-------   {"execute": "stop", "id": 2}
    {"event": "STOP", ...}          ------->                        Event
    {"return": {}, "id": 2}         ------->                        Reply
                                    <-------   {"exec-oob": "yank", "id": 3}
    {"error": {...}, "id": 3}       ------->                        Failure

Rules this module keeps:

- A message is what its bytes say, however they were cut into chunks.
- Members that nobody asked for are ignored, members that are promised are required, with their types.
- At most ``max_line_bytes`` are ever held back, and each byte is looked at a bounded number of times.
- The first thing that is not QMP ends the connection's use: there is no way to find the next message after garbage.

Source: QEMU, docs/interop/qmp-spec.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Event", "Failure", "Greeting", "Message", "QMPCodec", "QMPProtocolError", "Reply"]

MAX_LINE_BYTES: Final = 16 * 1024 * 1024
"""Longest line accepted by default; the longest answer of QEMU 7.2 (its own schema) has about 0.2 MiB."""

EVIDENCE_BYTES: Final = 200
"""How much of an offending line an error keeps."""

_MAX_TIME: Final = 1 << 53  # seconds and microseconds beyond it would not survive in a float


class QMPProtocolError(Exception):
    """What the peer sent is not QMP; the codec that raised it is dead.

    :ivar reason: what was wrong, as a phrase.
    :ivar evidence: the start of the offending line, at most :data:`EVIDENCE_BYTES` bytes.
    :ivar messages: the sound messages before the offending line that came in the same chunk, and that
        :meth:`QMPCodec.feed` therefore could not return.
    """

    def __init__(self, reason: str, *, evidence: bytes, messages: Sequence[Message] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.evidence = evidence[:EVIDENCE_BYTES]
        self.messages: tuple[Message, ...] = tuple(messages)

    def __str__(self) -> str:
        return f"{self.reason}: {self.evidence!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Greeting:
    """The server's first message: it is ready to negotiate capabilities.

    :param version: major, minor, micro of QEMU.
    :param package: the distributor's addition to the version, often empty.
    :param oob: the server can execute some commands out of band.
    """

    version: tuple[int, int, int]
    package: str
    oob: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The success of command ``id``; ``value`` is an empty object where the command has nothing to say."""

    id: int
    value: object


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The failure of command ``id``.

    :param id: None when the server could not even read the command's id: it did not understand its bytes.
    :param error_class: for programs, such as ``GenericError`` or ``CommandNotFound``.
    :param description: for people; its wording is no interface.
    """

    id: int | None
    error_class: str
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something happened in the server, by itself or as the effect of a command.

    :param name: such as ``STOP``.
    :param data: empty where the event carries none.
    :param timestamp_s: seconds since the Unix epoch by the server's wall clock; -1.0 where it could not read it.
    """

    name: str
    data: dict[str, object]
    timestamp_s: float


Message: TypeAlias = Greeting | Reply | Failure | Event


class QMPCodec:
    """The client's side of one QMP connection, without the connection.

    :param max_line_bytes: longest line accepted, at least 1; the line's end does not count.
    :param first_id: id of the first command, at least 0; each further one is one higher.
    """

    __slots__ = ("_dead", "_max_line_bytes", "_next_id", "_partial")

    def __init__(self, *, max_line_bytes: int = MAX_LINE_BYTES, first_id: int = 1) -> None:
        if max_line_bytes < 1:
            raise ValueError(f"max_line_bytes must be at least 1, not {max_line_bytes}")
        if not 0 <= first_id < 1 << 62:
            raise ValueError(f"first_id must be from 0 to 2**62 - 1, not {first_id}")
        self._max_line_bytes = max_line_bytes
        self._next_id = first_id
        self._partial = bytearray()
        self._dead: tuple[str, bytes] | None = None

    def command(
        self, name: str, arguments: Mapping[str, object] | None = None, *, oob: bool = False
    ) -> tuple[int, bytes]:
        """Encode a command.

        :param name: such as ``query-status``.
        :param arguments: JSON values all the way down.
        :param oob: execute it out of band; allowed only after that was negotiated, and for few commands.
        :returns: the id that the answer will carry, and the line to send.
        :raises TypeError: an argument has no JSON form; no id was used.
        :raises ValueError: an argument is not a finite number, contains itself, nests too deep, or holds text that
            QEMU's parser refuses, to which it would answer without an id: a lone surrogate or a noncharacter.
        :raises QMPProtocolError: the codec is dead.
        """
        self._require_alive()
        request: dict[str, object] = {"exec-oob" if oob else "execute": name}
        if arguments is not None:
            request["arguments"] = dict(arguments)
        request["id"] = self._next_id
        try:
            text = _ENCODER.encode(request)
        except RecursionError:
            raise ValueError(f"the arguments of {name!r} nest too deep") from None
        if not text.isascii() and any(map(_is_refused_by_qemu, text)):
            raise ValueError(f"the arguments of {name!r} hold a surrogate or a noncharacter")
        self._next_id += 1
        return self._next_id - 1, text.encode() + b"\n"

    def feed(self, data: bytes) -> list[Message]:
        """Decode what the server sent.

        :param data: the next bytes of the stream, cut anywhere.
        :returns: the messages that these bytes complete, in the order they were sent.
        :raises QMPProtocolError: they are not QMP; the codec is dead, and the messages before the fault are in the
            error.
        """
        self._require_alive()
        messages: list[Message] = []
        *ends, rest = data.split(b"\n")
        for end in ends:
            line = self._complete(end, messages)
            try:
                messages.append(_decode(line))
            except _NotQMPError as error:
                self._fail(error.reason, line, messages, error.__cause__)
        if rest:
            self._hold(rest, messages)
        return messages

    def eof(self) -> None:
        """Note that the stream has ended.

        :raises QMPProtocolError: it ended inside a line, or the codec was dead already.
        """
        self._require_alive()
        if self._partial:
            self._fail("stream ended inside a message", bytes(self._partial[:EVIDENCE_BYTES]), ())

    def _complete(self, end: bytes, messages: Sequence[Message]) -> bytes:
        if self._partial:
            self._hold(end, messages)
            line = bytes(self._partial)
            self._partial = bytearray()
            return line
        if len(end) > self._max_line_bytes:
            self._fail(f"line longer than {self._max_line_bytes} bytes", end, messages)
        return end

    def _hold(self, part: bytes, messages: Sequence[Message]) -> None:
        # INVARIANT: the limit is looked at before the part is kept.
        if len(self._partial) + len(part) > self._max_line_bytes:
            evidence = bytes(self._partial[:EVIDENCE_BYTES]) + part[:EVIDENCE_BYTES]
            self._fail(f"line longer than {self._max_line_bytes} bytes", evidence, messages)
        self._partial += part

    def _fail(
        self, reason: str, line: bytes, messages: Sequence[Message], cause: BaseException | None = None
    ) -> NoReturn:
        self._partial = bytearray()
        self._dead = (reason, line[:EVIDENCE_BYTES])
        raise QMPProtocolError(reason, evidence=line, messages=messages) from cause

    def _require_alive(self) -> None:
        if self._dead is not None:
            reason, evidence = self._dead
            raise QMPProtocolError(f"the codec is dead since it met: {reason}", evidence=evidence)


class _NotQMPError(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_KINDS: Final = frozenset({"QMP", "return", "error", "event"})


def _is_refused_by_qemu(character: str) -> bool:
    """Tell whether QEMU's JSON parser takes ``character`` for a syntax error (util/unicode.c, is_valid_codepoint)."""
    point = ord(character)
    return 0xD800 <= point <= 0xDFFF or 0xFDD0 <= point <= 0xFDEF or point & 0xFFFE == 0xFFFE


def _decode(line: bytes) -> Message:
    try:
        value = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _NotQMPError("line is not UTF-8") from error
    except ValueError as error:  # malformed, NaN, or a number with more digits than the interpreter converts
        raise _NotQMPError("line is not JSON") from error
    except RecursionError:
        raise _NotQMPError("line nests too deep") from None
    if type(value) is not dict:
        raise _NotQMPError("line is not a JSON object")
    kinds = value.keys() & _KINDS
    if len(kinds) != 1:
        raise _NotQMPError("object is not exactly one of greeting, reply, failure and event")
    match kinds.pop():
        case "return":
            return Reply(id=_integer(value, "id"), value=value["return"])
        case "event":
            return _event(value)
        case "error":
            return _failure(value)
        case _:
            return _greeting(value)


def _greeting(value: dict[str, object]) -> Greeting:
    body = _object(value, "QMP")
    version = _object(body, "version")
    numbers = _object(version, "qemu")
    capabilities = body.get("capabilities")
    if type(capabilities) is not list:
        raise _NotQMPError("member 'capabilities' is not an array")
    return Greeting(
        version=(_integer(numbers, "major"), _integer(numbers, "minor"), _integer(numbers, "micro")),
        package=_text(version, "package"),
        oob="oob" in capabilities,
    )


def _failure(value: dict[str, object]) -> Failure:
    error = _object(value, "error")
    return Failure(
        id=_integer(value, "id") if "id" in value else None,
        error_class=_text(error, "class"),
        description=_text(error, "desc"),
    )


def _event(value: dict[str, object]) -> Event:
    timestamp = _object(value, "timestamp")
    seconds = _time(timestamp, "seconds")
    microseconds = _time(timestamp, "microseconds")
    return Event(
        name=_text(value, "event"),
        data=_object(value, "data") if "data" in value else {},
        timestamp_s=-1.0 if seconds == microseconds == -1 else seconds + microseconds / 1e6,
    )


def _object(parent: dict[str, object], key: str) -> dict[str, object]:
    value = parent.get(key)
    if type(value) is not dict:
        raise _NotQMPError(f"member {key!r} is not an object")
    return value


def _text(parent: dict[str, object], key: str) -> str:
    value = parent.get(key)
    if type(value) is not str:
        raise _NotQMPError(f"member {key!r} is not a string")
    return value


def _integer(parent: dict[str, object], key: str) -> int:
    # By type, not isinstance: JSON's true must not pass for 1.
    value = parent.get(key)
    if type(value) is not int:
        raise _NotQMPError(f"member {key!r} is not an integer")
    return value


def _time(parent: dict[str, object], key: str) -> int | float:
    value = parent.get(key)
    if (type(value) is not int and type(value) is not float) or not -1 <= value <= _MAX_TIME:
        raise _NotQMPError(f"member {key!r} is not a time")
    return value
