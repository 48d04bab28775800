"""Messages of libvirt's RPC: both directions, against each other and another library, and bytes that are none."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xdrlib3 import Packer

from ferryman_remote import protocol
from ferryman_remote.protocol import (
    PROCEDURES,
    ConnectListAllDomainsReply,
    ConnectOpen,
    Domain,
    DomainGetInfoReply,
    DomainLookupByName,
    NodeGetInfoReply,
    OfDomain,
    ParameterKind,
    RemoteError,
    TypedParameter,
    Void,
)
from ferryman_remote.xdr import (
    I32,
    Array,
    Opaque,
    OptionalStr,
    Str,
    String,
    XDRError,
    decode,
    encode,
    fields,
    structure_of,
    type_of,
)
from tests.rpc import PAGE, pack, page, values

MESSAGES = sorted(
    {p.arguments for p in PROCEDURES.values()}
    | {p.result for p in PROCEDURES.values() if p.result is not None}
    | {RemoteError},
    key=lambda message: message.__name__,
)


class Small(NamedTuple):
    name: Annotated[str, String(8)]
    cookie: Annotated[bytes, Opaque(6)]
    ids: Annotated[tuple[int, ...], Array(type_of(I32), 3)]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_message_comes_back_and_is_what_another_library_writes(
    message: type[Any], data: st.DataObject
) -> None:
    kind = structure_of(message)
    value = data.draw(values(kind))
    packer = Packer()
    pack(kind, value, packer)
    made = encode(value)
    assert made == packer.get_buffer()
    assert decode(message, made) == value
    # What a newer peer adds at the end is passed over; what is missing at the end is missed.
    assert decode(message, made + b"more") == value
    for cut in {len(made) - 1, len(made) // 2, data.draw(st.integers(0, max(0, len(made) - 1)))}:
        if 0 <= cut < len(made):
            with pytest.raises(XDRError):
                decode(message, made[:cut])


@settings(deadline=None)
@given(message=st.sampled_from(MESSAGES), data=st.binary(max_size=400))
def test_any_bytes_are_a_message_or_an_error(message: type[Any], data: bytes) -> None:
    try:
        value = decode(message, data)
    except XDRError as error:
        assert str(error)
    else:
        assert decode(message, encode(value)) == value


@settings(deadline=None)
@given(message=st.sampled_from(MESSAGES), data=st.data())
def test_a_message_with_a_broken_byte(message: type[Any], data: st.DataObject) -> None:
    made = bytearray(encode(data.draw(values(structure_of(message)))))
    if made:
        made[data.draw(st.integers(0, len(made) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decode(message, bytes(made))
    except XDRError as error:
        assert str(error)


def test_known_bytes() -> None:
    """By hand, from RFC 4506 and what libvirt says of its smaller numbers."""
    web = Domain("web", UUID("00112233-4455-6677-8899-aabbccddeeff").bytes, -1)
    assert encode(OfDomain(web)).hex(" ", 4) == (
        "00000003 77656200 00112233 44556677 8899aabb ccddeeff ffffffff"
    )
    assert encode(ConnectOpen(None, 1)).hex(" ", 4) == "00000000 00000001"
    assert encode(ConnectOpen("", 0)).hex(" ", 4) == "00000001 00000000 00000000"
    info = DomainGetInfoReply(1, 2, 3, 4, 5)
    assert len(encode(info)) == 32
    node = NodeGetInfoReply(tuple(b"x86_64".ljust(32, b"\0")), 1, 2, 3, 4, 5, 6, 7)
    assert len(encode(node)) == 160
    assert encode(node)[:8].hex(" ", 4) == "00000078 00000038"
    assert encode(Void()) == b""


@pytest.mark.parametrize(
    ("message", "data", "words"),
    [
        (Small, "00000009", "name: 9 bytes are more than 8"),
        (Small, "ffffffff", "name: 4294967295 bytes are more than 8"),
        (Small, "00000005 6162", "name: 8 bytes are needed, and 2 are left"),
        (Small, "00000002 6100", "name: 4 bytes are needed, and 2 are left"),
        (Small, "00000003 61006200", "name: a text holds a NUL"),
        (Small, "00000002 61ff0000", "name: byte 1 of a text is not UTF-8"),
        (Small, "00000000 00000007", "cookie: 7 bytes are more than 6"),
        (Small, "00000000 00000000 00000004", "ids: 4 values are more than 3"),
        (
            Small,
            "00000000 00000000 00000003 00000001",
            "ids: 3 values need 12 bytes at least, and 4 are left",
        ),
        (Small, "00000000 00000000", "ids: 4 bytes are needed, and 0 are left"),
        (ConnectOpen, "00000002", "name: 2 says neither that a value is there nor that it is absent"),
        (ConnectOpen, "000000", "name: 4 bytes are needed, and 3 are left"),
        (OfDomain, "00000000 00", "dom.uuid: 16 bytes are needed, and 1 are left"),
        (DomainGetInfoReply, "00000100", "state: 256 is outside 0 to 255"),
        (
            ConnectListAllDomainsReply,
            "00000002" + "00000000" + "00" * 16 + "00000001" + "00000009 61" + "00" * 40,
            "domains[1].name: byte",
        ),
        (
            protocol.DomainMigratePrepare3Params,
            "00000001 00000001 78000000 00000008",
            "params[0].x: 8 is no kind",
        ),
        (
            protocol.DomainMigratePrepare3Params,
            "00000001 00000001 78000000 00000000",
            "params[0].x: 0 is no kind",
        ),
        (protocol.DomainMigratePrepare3Params, "00000041", "params: 65 values are more than 64"),
    ],
)
def test_what_is_no_message_says_where(message: type[Any], data: str, words: str) -> None:
    if message is ConnectListAllDomainsReply:
        data = data.replace("00000009 61", "00000001 ff")
    with pytest.raises(XDRError) as caught:
        decode(message, bytes.fromhex(data))
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Small("x" * 9, b"", ()), "name: 9 bytes are more than 8"),
        (Small("ä" * 5, b"", ()), "name: 10 bytes are more than 8"),
        (Small("a\0b", b"", ()), "name: a text holds a NUL"),
        (Small("\ud800", b"", ()), "name: '\\ud800' is not a text of characters"),
        (Small(b"x", b"", ()), "name: b'x' is not a text of characters"),  # type: ignore[arg-type]
        (Small("", b"1234567", ()), "cookie: 7 bytes are more than 6"),
        (Small("", "x", ()), "cookie: 'x' is not bytes"),  # type: ignore[arg-type]
        (Small("", b"", (1, 2, 3, 4)), "ids: 4 values are more than 3"),
        (Small("", b"", (1, 2**31)), "ids[1]: 2147483648 is no i32"),
        (Small("", b"", ("x",)), "ids[0]: 'x' is no i32"),  # type: ignore[arg-type]
        (ConnectOpen("", -1), "flags: -1 is no u32"),
        (DomainGetInfoReply(256, 0, 0, 0, 0), "state: 256 is outside 0 to 255"),
        (OfDomain(Domain("", b"short", 0)), "dom.uuid: b'short' is not 16 bytes"),
        (OfDomain(Domain("", "x" * 16, 0)), "dom.uuid: 'xxxxxxxxxxxxxxxx' is not bytes"),  # type: ignore[arg-type]
        (Small("", b"", 7), "ids: 7 is not a list of values"),  # type: ignore[arg-type]
        (OfDomain(("web", bytes(16), 1)), "dom: ('web', "),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_encoded_says_which_field(value: tuple[Any, ...], words: str) -> None:
    with pytest.raises(XDRError) as caught:
        encode(value)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (TypedParameter("x", ParameterKind.INT, 2**31), "params[0].x: 2147483648 is no i32"),
        (TypedParameter("x", 9, 1), "params[0].x: 9 is no kind"),  # type: ignore[arg-type]
        (TypedParameter("x", ParameterKind.STRING, 1), "params[0].x: 1 is not a text"),
    ],
)
def test_a_typed_parameter_of_another_kind(parameter: TypedParameter, words: str) -> None:
    with pytest.raises(XDRError) as caught:
        encode(protocol.DomainMigratePrepare3Params((parameter,), b"", 0))
    assert str(caught.value).startswith(words)


def test_a_promise_costs_nothing() -> None:
    """A count or a length that is within its limit and cannot be true is found before anything is made."""
    promises = {
        ConnectListAllDomainsReply: struct.pack(">I", 16_384),
        DomainLookupByName: struct.pack(">I", 4_194_304),
        protocol.ConnectGetAllDomainStatsReply: struct.pack(">I", 16_384),
        protocol.AuthSaslStep: struct.pack(">iI", 0, 65_536),
    }
    for message, data in promises.items():
        decode_fails(message, data)
        tracemalloc.start()
        try:
            decode_fails(message, data)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 16_384


def decode_fails(message: type[Any], data: bytes) -> None:
    with pytest.raises(XDRError):
        decode(message, data)


def test_annotations_that_say_nothing() -> None:
    class Bad(NamedTuple):
        name: str

    with pytest.raises(TypeError, match="says nothing"):
        encode(Bad("x"))


def test_every_procedure_stands_once_under_its_number() -> None:
    assert [p.number for p in PROCEDURES.values()] == sorted(PROCEDURES)
    assert len({p.name for p in PROCEDURES.values()}) == len(PROCEDURES) > 130
    assert all(name.isidentifier() for message in MESSAGES for name, _ in fields(message))
    assert {type_of(hint).notation for hint in (Str, OptionalStr)} == {"str", "str?"}


def test_the_reference_page_is_the_declarations() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.rpc --write"
