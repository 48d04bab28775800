"""XDR as libvirt uses it (RFC 4506): types that encode and decode, and structures that are declared once.

A structure is a named tuple whose annotations say how its fields lie on the wire::

    class LookupByName(NamedTuple):
        name: Str

    data = encode(LookupByName(name="web"))
    decode(LookupByName, data)

Everything else about it is read from that declaration: both directions, the notation of the reference pages
(:func:`notation`), and what a fuzzer makes of it (:func:`fields`).  Nothing here does I/O.

A count or a length is checked against its limit, and against what is left of the message, before anything is made.
Bytes that follow the last field are nobody's: newer peers add fields at the end, and libvirt passes over them too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeAlias, TypeVar, get_type_hints

T = TypeVar("T")
V = TypeVar("V")
S = TypeVar("S", bound=tuple[Any, ...])

MAX_STRING_BYTES = 4_194_304
"""What libvirt 9.0 to 11.3 take of a string."""


class XDRError(ValueError):
    """A value cannot be encoded, or bytes are no value of their type; the message names the field."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason

    def within(self, name: str) -> XDRError:
        """The same error, seen from the structure or list that holds the value."""
        path = name + self.path if self.path.startswith("[") or not self.path else f"{name}.{self.path}"
        return XDRError(self.reason, path)


class Type(Generic[T]):
    """How values of one type lie on the wire.

    :ivar minimum_bytes: no value is shorter, so that a count which cannot be true is found before its values are read.
    :ivar notation: as the reference pages write it.
    """

    minimum_bytes: int
    notation: str

    def encode(self, value: T, out: bytearray) -> None:
        """Append a value. :raises XDRError: it is not of this type, or over a limit; ``out`` may hold a part of it."""
        raise NotImplementedError

    def decode(self, data: bytes, at: int) -> tuple[T, int]:
        """Read a value; returns it, and where the next one begins. :raises XDRError: there is none."""
        raise NotImplementedError


def _short(needed: int, data: bytes, at: int) -> XDRError:
    return XDRError(f"{needed} bytes are needed, and {max(0, len(data) - at)} are left")


class Number(Type[Any]):
    """A number of four or eight bytes.

    :param code: of :mod:`struct`, four or eight bytes wide; ``d`` is a floating-point number, all others are whole.
    :param bounds: what it may be, where that is less than the bytes hold: smaller numbers travel in four bytes too.
    """

    def __init__(self, notation: str, code: str, bounds: tuple[int, int] | None = None) -> None:
        self.notation = notation
        self.code = code
        self.bounds = bounds
        self._struct = struct.Struct(">" + code)
        self.minimum_bytes = self._struct.size

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the greatest value of a whole number."""
        if self.bounds is not None:
            return self.bounds
        bits = 8 * self.minimum_bytes
        return (0, 2**bits - 1) if self.code.isupper() else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def _check(self, value: float) -> None:
        if self.bounds is not None and not self.bounds[0] <= value <= self.bounds[1]:
            raise XDRError(f"{value} is outside {self.bounds[0]} to {self.bounds[1]}")

    def encode(self, value: float, out: bytearray) -> None:
        try:
            self._check(value)
            out += self._struct.pack(value)
        except (struct.error, TypeError) as error:
            raise XDRError(f"{value!r:.40} is no {self.notation}") from error

    def decode(self, data: bytes, at: int) -> tuple[Any, int]:
        try:
            (value,) = self._struct.unpack_from(data, at)
        except struct.error as error:
            raise _short(self.minimum_bytes, data, at) from error
        self._check(value)
        return value, at + self.minimum_bytes


_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")
_COUNT = struct.Struct(">I")


def _read_count(data: bytes, at: int) -> int:
    """The four bytes that say how much follows, or whether anything does."""
    try:
        (count,) = _COUNT.unpack_from(data, at)
    except struct.error as error:
        raise _short(4, data, at) from error
    return int(count)


def _length(value: object, kind: type | tuple[type, ...], what: str) -> int:
    """How long a value is. :raises XDRError: it is of none of these classes."""
    if not isinstance(value, kind):
        raise XDRError(f"{value!r:.40} is not {what}")
    return len(value)  # type: ignore[arg-type]  # what is asked for has a length


class Opaque(Type[bytes]):
    """Bytes with their number before them. :param limit: how many there may be."""

    minimum_bytes = 4

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.notation = f"bytes<{limit}>"

    def encode(self, value: bytes, out: bytearray) -> None:
        length = _length(value, bytes, "bytes")
        if length > self.limit:
            raise XDRError(f"{length} bytes are more than {self.limit}")
        out += _COUNT.pack(length)
        out += value
        out += _PADDING[length & 3]

    def decode(self, data: bytes, at: int) -> tuple[bytes, int]:
        length = _read_count(data, at)
        if length > self.limit:
            raise XDRError(f"{length} bytes are more than {self.limit}")
        at += 4
        end = at + length + (-length & 3)
        if end > len(data):
            raise _short(end - at, data, at)
        return data[at : at + length], end


class FixedOpaque(Type[bytes]):
    """Exactly so many bytes; a multiple of four."""

    def __init__(self, notation: str, length: int) -> None:
        assert length % 4 == 0
        self.notation = notation
        self.minimum_bytes = length

    def encode(self, value: bytes, out: bytearray) -> None:
        if _length(value, bytes, "bytes") != self.minimum_bytes:
            raise XDRError(f"{value!r:.40} is not {self.minimum_bytes} bytes")
        out += value

    def decode(self, data: bytes, at: int) -> tuple[bytes, int]:
        end = at + self.minimum_bytes
        if end > len(data):
            raise _short(self.minimum_bytes, data, at)
        return data[at:end], end


class String(Type[str]):
    """A text: UTF-8 with its length in bytes before it, and no NUL in it, which C would take for its end."""

    minimum_bytes = 4
    notation = "str"

    def __init__(self, limit: int = MAX_STRING_BYTES) -> None:
        self.limit = limit
        self._bytes = Opaque(limit)

    def encode(self, value: str, out: bytearray) -> None:
        try:
            data = value.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise XDRError(f"{value!r:.40} is not a text of characters") from error
        if 0 in data:
            raise XDRError("a text holds a NUL")
        self._bytes.encode(data, out)

    def decode(self, data: bytes, at: int) -> tuple[str, int]:
        found, at = self._bytes.decode(data, at)
        try:
            text = found.decode()
        except UnicodeDecodeError as error:
            raise XDRError(f"byte {error.start} of a text is not UTF-8") from error
        if "\0" in text:
            raise XDRError("a text holds a NUL")
        return text, at


class Optional(Type[V | None]):
    """A value that may be absent."""

    minimum_bytes = 4

    def __init__(self, of: Type[V]) -> None:
        self.of = of
        self.notation = f"{of.notation}?"

    def encode(self, value: V | None, out: bytearray) -> None:
        out += _COUNT.pack(value is not None)
        if value is not None:
            self.of.encode(value, out)

    def decode(self, data: bytes, at: int) -> tuple[V | None, int]:
        present = _read_count(data, at)
        if present > 1:
            raise XDRError(f"{present} says neither that a value is there nor that it is absent")
        return self.of.decode(data, at + 4) if present else (None, at + 4)


class Array(Type[tuple[V, ...]]):
    """Values with their number before them. :param limit: how many there may be."""

    minimum_bytes = 4

    def __init__(self, of: Type[V], limit: int) -> None:
        self.of = of
        self.limit = limit
        self.notation = f"[{of.notation}]<{limit}>"

    def encode(self, value: Sequence[V], out: bytearray) -> None:
        count = _length(value, (tuple, list), "a list of values")
        if count > self.limit:
            raise XDRError(f"{count} values are more than {self.limit}")
        out += _COUNT.pack(count)
        _encode_all(self.of, value, out)

    def decode(self, data: bytes, at: int) -> tuple[tuple[V, ...], int]:
        count = _read_count(data, at)
        if count > self.limit:
            raise XDRError(f"{count} values are more than {self.limit}")
        return _decode_all(self.of, count, data, at + 4)


class FixedArray(Type[tuple[V, ...]]):
    """Exactly so many values."""

    def __init__(self, of: Type[V], count: int) -> None:
        self.of = of
        self.count = count
        self.notation = f"{of.notation}[{count}]"
        self.minimum_bytes = of.minimum_bytes * count

    def encode(self, value: Sequence[V], out: bytearray) -> None:
        count = _length(value, (tuple, list), "a list of values")
        if count != self.count:
            raise XDRError(f"{count} values are not {self.count}")
        _encode_all(self.of, value, out)

    def decode(self, data: bytes, at: int) -> tuple[tuple[V, ...], int]:
        return _decode_all(self.of, self.count, data, at)


def _encode_all(of: Type[V], values: Sequence[V], out: bytearray) -> None:
    number = 0
    try:
        for value in values:
            of.encode(value, out)
            number += 1
    except XDRError as error:
        raise error.within(f"[{number}]") from error.__cause__


def _decode_all(of: Type[V], count: int, data: bytes, at: int) -> tuple[tuple[V, ...], int]:
    if count * of.minimum_bytes > len(data) - at:
        raise XDRError(
            f"{count} values need {count * of.minimum_bytes} bytes at least, and {max(0, len(data) - at)} are left"
        )
    found: list[V] = []
    try:
        for _ in range(count):
            value, at = of.decode(data, at)
            found.append(value)
    except XDRError as error:
        raise error.within(f"[{len(found)}]") from error.__cause__
    return tuple(found), at


class Packed(bytes):
    """A structure that was encoded before; it takes the structure's place in what is encoded."""


class Structure(Type[S]):
    """The fields of a named tuple, one after the other.

    Runs of numbers are unpacked in one go: most messages are a few of them beside a name.
    """

    def __init__(self, cls: type[S], of: Sequence[tuple[str, Type[Any]]]) -> None:
        self.cls = cls
        self.fields = tuple(of)
        self.minimum_bytes = sum(kind.minimum_bytes for _, kind in of)
        self.notation = cls.__name__
        self._kinds = tuple(kind for _, kind in of)
        self._steps = _steps(self.fields)
        self._make: Callable[[list[Any]], S] = cls._make  # type: ignore[attr-defined]  # only named tuples come here

    def encode(self, value: S | Packed, out: bytearray) -> None:
        if type(value) is Packed:
            out += value
            return
        if type(value) is not self.cls:
            raise XDRError(f"{value!r:.40} is no {self.cls.__name__}")
        number = 0
        try:
            for kind in self._kinds:
                kind.encode(value[number], out)
                number += 1
        except XDRError as error:
            raise error.within(self.fields[number][0]) from error.__cause__

    def decode(self, data: bytes, at: int) -> tuple[S, int]:
        found: list[Any] = []
        try:
            for step in self._steps:
                if isinstance(step, struct.Struct):
                    if at + step.size > len(data):
                        raise _short(step.size, data, at)
                    found += step.unpack_from(data, at)
                    at += step.size
                else:
                    value, at = step.decode(data, at)
                    found.append(value)
        except XDRError as error:
            raise error.within(self.fields[len(found)][0]) from error.__cause__
        return self._make(found), at


def _steps(of: Sequence[tuple[str, Type[Any]]]) -> tuple[struct.Struct | Type[Any], ...]:
    """The types of fields, with one step for each run of numbers of which any bytes will do."""
    steps: list[struct.Struct | Type[Any]] = []
    run = ""
    for _, kind in of:
        if isinstance(kind, Number) and kind.bounds is None:
            run += kind.code
            continue
        if run:
            steps.append(struct.Struct(">" + run))
            run = ""
        steps.append(kind)
    if run:
        steps.append(struct.Struct(">" + run))
    return tuple(steps)


I32: TypeAlias = Annotated[int, Number("i32", "i")]
U32: TypeAlias = Annotated[int, Number("u32", "I")]
I64: TypeAlias = Annotated[int, Number("i64", "q")]
U64: TypeAlias = Annotated[int, Number("u64", "Q")]
I8: TypeAlias = Annotated[int, Number("i8", "i", (-128, 127))]
U8: TypeAlias = Annotated[int, Number("u8", "I", (0, 255))]
U16: TypeAlias = Annotated[int, Number("u16", "I", (0, 65535))]
F64: TypeAlias = Annotated[float, Number("f64", "d")]
Str: TypeAlias = Annotated[str, String()]
OptionalStr: TypeAlias = Annotated[str | None, Optional(String())]
UUID: TypeAlias = Annotated[bytes, FixedOpaque("uuid", 16)]


_structures: dict[type[Any], Structure[Any]] = {}


def structure_of(cls: type[S]) -> Structure[S]:
    """The wire form of a structure; read from its annotations at its first use."""
    known: Structure[S] | None = _structures.get(cls)
    if known is None:
        hints = get_type_hints(cls, include_extras=True)
        known = _structures[cls] = Structure(cls, [(name, type_of(hint)) for name, hint in hints.items()])
    return known


def type_of(hint: Any) -> Type[Any]:
    """The wire form that an annotation says. :raises TypeError: it says none."""
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, Type):
            return extra
    if isinstance(hint, type) and hasattr(hint, "_make"):
        return structure_of(hint)
    raise TypeError(f"{hint!r} says nothing of its wire form")


def encode(value: tuple[Any, ...]) -> bytes:
    """The bytes of a structure. :raises XDRError: a field cannot be encoded."""
    out = bytearray()
    structure_of(type(value)).encode(value, out)
    return bytes(out)


def decode(cls: type[S], data: bytes, at: int = 0) -> S:
    """Read a structure; what follows it is passed over. :raises XDRError: the bytes are none."""
    return structure_of(cls).decode(data, at)[0]


def fields(cls: type[Any]) -> tuple[tuple[str, Type[Any]], ...]:
    """Names and types of a structure's fields, in their order."""
    return structure_of(cls).fields


def notation(cls: type[Any]) -> str:
    """The fields of a structure as the reference pages write them."""
    return ", ".join(f"{name}:{kind.notation}" for name, kind in fields(cls)) or "—"
