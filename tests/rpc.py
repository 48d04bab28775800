"""What the declarations of libvirt's messages give tests: values to try, and the same bytes made by another library.

``python -m tests.rpc --write`` writes the reference page of the messages.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from xdrlib3 import Packer

from ferryman_remote import protocol, xdr

PAGE = Path(__file__).parents[1] / "docs/reference/libvirt-rpc.md"

_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
_MOST = 4
"""Values of a list; the limits themselves have tests of their own."""


def values(kind: xdr.Type[Any]) -> st.SearchStrategy[Any]:
    """Values of a type, as its declaration says."""
    match kind:
        case xdr.Number(code="d"):
            return st.floats(allow_nan=False)
        case xdr.Number():
            return st.integers(*kind.range)
        case xdr.String():
            return _TEXTS
        case xdr.Opaque():
            return st.binary(max_size=min(kind.limit, 40))
        case xdr.FixedOpaque():
            return st.binary(min_size=kind.minimum_bytes, max_size=kind.minimum_bytes)
        case xdr.Optional():
            return st.none() | values(kind.of)
        case xdr.Array():
            return st.lists(values(kind.of), max_size=_MOST).map(tuple)
        case xdr.FixedArray():
            return st.lists(values(kind.of), min_size=kind.count, max_size=kind.count).map(tuple)
        case xdr.Structure():
            return st.tuples(*(values(of) for _, of in kind.fields)).map(kind.cls._make)
        case protocol.TypedParameterType():
            return st.sampled_from(sorted(kind.kinds)).flatmap(
                lambda tag: st.builds(
                    protocol.TypedParameter,
                    _TEXTS,
                    st.just(protocol.ParameterKind(tag)),
                    values(kind.kinds[tag]),
                )
            )
    raise AssertionError(kind)


def pack(kind: xdr.Type[Any], value: Any, packer: Packer) -> None:
    """Encode a value with another library."""
    match kind:
        case xdr.Number(code="q"):
            packer.pack_hyper(value)
        case xdr.Number(code="Q"):
            packer.pack_uhyper(value)
        case xdr.Number(code="i"):
            packer.pack_int(value)
        case xdr.Number(code="d"):
            packer.pack_double(value)
        case xdr.Number():
            packer.pack_uint(value)
        case xdr.String():
            packer.pack_string(value.encode())
        case xdr.Opaque():
            packer.pack_opaque(value)
        case xdr.FixedOpaque():
            packer.pack_fopaque(kind.minimum_bytes, value)
        case xdr.Optional():
            packer.pack_bool(value is not None)
            if value is not None:
                pack(kind.of, value, packer)
        case xdr.Array():
            packer.pack_uint(len(value))
            for one in value:
                pack(kind.of, one, packer)
        case xdr.FixedArray():
            for one in value:
                pack(kind.of, one, packer)
        case xdr.Structure():
            for (_, of), one in zip(kind.fields, value, strict=True):
                pack(of, one, packer)
        case protocol.TypedParameterType():
            packer.pack_string(value.field.encode())
            packer.pack_int(value.kind)
            pack(kind.kinds[value.kind], value.value, packer)
        case _:
            raise AssertionError(kind)


def page() -> str:
    """The reference page of the messages."""
    lines = [
        "# The messages of libvirt's RPC",
        "",
        "Written by `python -m tests.rpc --write` from the declarations in `ferryman_remote.protocol`, of which both"
        " directions of the codec",
        "are made. `i32`, `u64` and their like are numbers, `i8`, `u8` and `u16` too in four bytes; `str` is a text,"
        " `?` what may be absent,",
        "`[…]<n>` at most, and `…[n]` exactly so many, `bytes<n>` at most so many bytes, `tparam` a typed parameter.",
        "",
        "| # | procedure | arguments | result |",
        "| --- | --- | --- | --- |",
    ]
    for procedure in protocol.PROCEDURES.values():
        result = "(event)" if procedure.result is None else _cell(procedure.result)
        lines.append(f"| {procedure.number} | {procedure.name} | {_cell(procedure.arguments)} | {result} |")
    lines += ["", "Structures inside of them:", "", "| structure | fields |", "| --- | --- |"]
    inner: dict[str, type[Any]] = {}
    for procedure in protocol.PROCEDURES.values():
        for message in (procedure.arguments, procedure.result):
            for _, kind in xdr.fields(message) if message is not None else ():
                _collect(kind, inner)
    _collect(xdr.structure_of(protocol.RemoteError), inner)
    lines += [f"| {name} | {_cell(inner[name])} |" for name in sorted(inner)]
    return "\n".join([*lines, ""])


def _cell(message: type[Any]) -> str:
    return xdr.notation(message).replace("<", "\\<")


def _collect(kind: xdr.Type[Any], into: dict[str, type[Any]]) -> None:
    """Add the structures that a type is made of."""
    match kind:
        case xdr.Optional() | xdr.Array() | xdr.FixedArray():
            _collect(kind.of, into)
        case xdr.Structure():
            into[kind.notation] = kind.cls
            for _, of in kind.fields:
                _collect(of, into)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page(), end="")
