"""Do documents and types say the same, is every other document refused, and do two hosts agree on what they can do?"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import FrozenInstanceError, fields, replace
from datetime import timedelta
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ferryman.capabilities import (
    FEATURE_SIDES,
    MAX_CAPABILITIES_BYTES,
    Capabilities,
    Negotiation,
    negotiate,
)
from ferryman.errors import CapabilitiesError
from ferryman.types import (
    OPTION_FEATURES,
    Compression,
    Feature,
    MigrationOptions,
    Postcopy,
    Side,
    StorageCopy,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Hostile documents are refused in bounded time. Each takes milliseconds, and one that runs away takes minutes; what
# lies between allows for a machine that is shared.
hostile = settings(max_examples=150, deadline=timedelta(seconds=10))
often = settings(max_examples=200, deadline=None)

HOST = Capabilities(
    scheme="qemu",
    hypervisor="QEMU",
    version=(7, 2, 13),
    arch="x86_64",
    host_uuid="6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55",
    cpu_model="EPYC-Milan",
    machines=("pc-q35-7.2", "pc-i440fx-7.2"),
    memory_bytes=68_719_476_736,
    features=frozenset(Feature),
    uri_transports=("tcp", "unix"),
    domain_types=("kvm", "qemu"),
)
HOST_XML = """\
<capabilities>
  <host>
    <uuid>6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55</uuid>
    <cpu>
      <arch>x86_64</arch>
      <model>EPYC-Milan</model>
    </cpu>
    <memory unit="bytes">68719476736</memory>
    <migration_features>
      <live/>
      <rename/>
      <bandwidth/>
      <bandwidth_in_flight/>
      <max_downtime/>
      <max_downtime_in_flight/>
      <abort/>
      <paused/>
      <persist/>
      <undefine_source/>
      <listen_address/>
      <port_range/>
      <streams/>
      <compression/>
      <zero_copy/>
      <auto_converge/>
      <postcopy/>
      <tls/>
      <redefine/>
      <copy_storage/>
      <uri_transports>
        <uri_transport>tcp</uri_transport>
        <uri_transport>unix</uri_transport>
      </uri_transports>
    </migration_features>
  </host>
  <guest>
    <os_type>hvm</os_type>
    <arch name="x86_64">
      <machine>pc-q35-7.2</machine>
      <machine>pc-i440fx-7.2</machine>
      <domain type="kvm"/>
      <domain type="qemu"/>
    </arch>
  </guest>
  <driver>
    <scheme>qemu</scheme>
    <hypervisor>QEMU</hypervisor>
    <version>7.2.13</version>
  </driver>
</capabilities>
"""
LAST = 9 + len(Feature)
"""Line of the last feature in it."""

BARE = Capabilities(
    scheme="mylab",
    hypervisor="My Lab",
    version=(0,),
    arch="riscv64",
    host_uuid="00000000-0000-0000-0000-000000000000",
    cpu_model="",
    machines=(),
    memory_bytes=None,
    features=frozenset(),
    uri_transports=(),
    domain_types=(),
)
BARE_XML = """\
<capabilities>
  <host>
    <uuid>00000000-0000-0000-0000-000000000000</uuid>
    <cpu>
      <arch>riscv64</arch>
    </cpu>
    <migration_features/>
  </host>
  <guest>
    <os_type>hvm</os_type>
    <arch name="riscv64"/>
  </guest>
  <driver>
    <scheme>mylab</scheme>
    <hypervisor>My Lab</hypervisor>
    <version>0</version>
  </driver>
</capabilities>
"""

FULL = replace(
    HOST,
    hypervisor="&" * 256,
    version=(999_999_999,) * 8,
    arch="a" * 128,
    cpu_model="<" * 256,
    machines=tuple(f"{number:0128}" for number in range(1024)),
    memory_bytes=(1 << 63) - 1,
    uri_transports=tuple(f"t{number:063}" for number in range(64)),
    domain_types=tuple(f"d{number:063}" for number in range(64)),
)
"""The longest document that there is."""

names = st.from_regex(r"[a-z][a-z0-9.\-]{0,63}", fullmatch=True)
words = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+\-]{0,127}", fullmatch=True)
printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=256)
labels = printable.filter(lambda text: text.strip() == text)


def distinct(texts: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(texts, max_size=8, unique=True).map(tuple)


capabilities = st.builds(
    Capabilities,
    scheme=names,
    hypervisor=labels,
    version=st.lists(st.integers(0, 999_999_999), min_size=1, max_size=8).map(tuple),
    arch=words,
    host_uuid=st.uuids().map(str),
    cpu_model=st.just("") | labels,
    machines=distinct(words),
    memory_bytes=st.none() | st.integers(1, (1 << 63) - 1),
    features=st.frozensets(st.sampled_from(Feature)),
    uri_transports=distinct(names),
    domain_types=distinct(names),
)


def refusal(text: object) -> CapabilitiesError:
    """Return the error of a document that must be refused, having checked what holds for every error."""
    with pytest.raises(CapabilitiesError) as caught:
        Capabilities.from_xml(text)  # type: ignore[arg-type]
    check_error(caught.value)
    return caught.value


def check_error(error: CapabilitiesError) -> None:
    assert type(error) is CapabilitiesError
    assert error.line is None or error.line >= 1
    assert str(error).isascii()
    assert str(error).isprintable()
    assert len(str(error)) < 600


def check_any(text: str | bytes) -> None:
    """Whatever the text: capabilities that can be written and read again, or a CapabilitiesError."""
    try:
        read = Capabilities.from_xml(text)
    except CapabilitiesError as error:
        check_error(error)
    else:
        assert Capabilities.from_xml(read.to_xml()) == read


def edited(old: str, new: str) -> str:
    assert HOST_XML.count(old) == 1, old
    return HOST_XML.replace(old, new)


# Documents that are written


@pytest.mark.parametrize("host, xml", [(HOST, HOST_XML), (BARE, BARE_XML)], ids=["all", "bare"])
def test_the_document_is_exactly_this(host: Capabilities, xml: str) -> None:
    assert host.to_xml() == xml
    assert Capabilities.from_xml(xml) == host
    assert Capabilities.from_xml(xml.encode()) == host


@often
@given(capabilities)
@example(FULL)
def test_reading_undoes_writing(host: Capabilities) -> None:
    text = host.to_xml()
    assert Capabilities.from_xml(text) == host
    assert Capabilities.from_xml(text).to_xml() == text


@often
@given(capabilities)
@example(FULL)
def test_every_written_document_follows_the_schema(host: Capabilities) -> None:
    from lxml import etree

    source = files("ferryman").joinpath("schemas/capabilities.rng").read_bytes()
    etree.RelaxNG(etree.fromstring(source)).assertValid(etree.fromstring(host.to_xml()))


def test_equal_capabilities_have_equal_documents() -> None:
    features = list(Feature)
    backwards = replace(HOST, features=frozenset(reversed(features)))
    assert backwards.to_xml() == HOST_XML


def test_the_schema_lists_the_features_that_there_are() -> None:
    source = files("ferryman").joinpath("schemas/capabilities.rng").read_text(encoding="utf-8")
    listed = source.partition("in any order:")[2].partition(".\n")[0]
    assert listed.replace(",", " ").split() == [feature.value for feature in Feature]


# Documents that are read


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\ufeff" + HOST_XML, id="byte order mark"),
        pytest.param('<?xml version="1.0" encoding="UTF-8"?>\n' + HOST_XML, id="declaration"),
        pytest.param(
            '<?xml version="1.0" encoding="UTF-16"?>' + HOST_XML, id="declaration of another encoding"
        ),
        pytest.param(
            edited(">QEMU<", "><!-- c -->Q<?pi?>E<![CDATA[M]]>&#85;<"), id="comment, instruction, CDATA"
        ),
        pytest.param("".join(line.strip() for line in HOST_XML.splitlines()), id="one line"),
        pytest.param(
            edited("      <abort/>\n", "").replace("</uri_transports>", "</uri_transports><abort/>"),
            id="order",
        ),
    ],
)
def test_the_same_document_may_be_spelt_otherwise(text: str) -> None:
    assert Capabilities.from_xml(text) == HOST
    assert Capabilities.from_xml(text.encode()) == HOST


def test_features_of_newer_versions_are_ignored() -> None:
    text = edited("<live/>", "<teleport/><live></live><Über/><host/>").replace(
        "<postcopy/>", "<postcopy/><zz-9.9/>"
    )
    assert Capabilities.from_xml(text) == HOST


UNKNOWN_PLACES = [
    pytest.param("<capabilities>", "<capabilities><x/>", 1, "capabilities/x", id="first in capabilities"),
    pytest.param(
        "</capabilities>", "<x/></capabilities>", LAST + 21, "capabilities/x", id="last in capabilities"
    ),
    pytest.param("<host>", "<host><x/>", 2, "capabilities/host/x", id="host"),
    pytest.param("</cpu>", "<x/></cpu>", 7, "capabilities/host/cpu/x", id="cpu"),
    pytest.param("</uuid>", "<x/></uuid>", 3, "capabilities/host/uuid", id="uuid"),
    pytest.param("</memory>", "<x/></memory>", 8, "capabilities/host/memory", id="memory"),
    pytest.param(
        "<live/>", "<live><x/></live>", 10, "capabilities/host/migration_features/live", id="known feature"
    ),
    pytest.param(
        "<live/>", "<x><y/></x>", 10, "capabilities/host/migration_features/x", id="unknown feature"
    ),
    pytest.param(
        "<live/>", "<x a=''/>", 10, "capabilities/host/migration_features/x", id="feature's attribute"
    ),
    pytest.param("<live/>", "<x>yes</x>", 10, "capabilities/host/migration_features/x", id="feature's text"),
    pytest.param("<live/>", "<n:x xmlns:n='u'/>", 9, "capabilities/host/migration_features", id="namespace"),
    pytest.param("<live/>", "yes", 9, "capabilities/host/migration_features", id="text among features"),
    pytest.param(
        "<uri_transports>",
        "<uri_transports><x/>",
        LAST + 1,
        "capabilities/host/migration_features/uri_transports/x",
        id="uri_transports",
    ),
    pytest.param("<guest>", "<guest><x/>", LAST + 7, "capabilities/guest/x", id="guest"),
    pytest.param('<domain type="kvm"/>', "<x/>", LAST + 12, "capabilities/guest/arch/x", id="arch"),
    pytest.param(
        'type="kvm"', 'type="kvm" x=""', LAST + 12, "capabilities/guest/arch/domain[1]", id="attribute"
    ),
    pytest.param("</driver>", "<x/></driver>", LAST + 20, "capabilities/driver/x", id="driver"),
    pytest.param("</driver>", "</driver><driver/>", LAST + 20, "capabilities/driver[2]", id="second driver"),
]


@pytest.mark.parametrize("old, new, line, path", UNKNOWN_PLACES)
def test_whatever_else_is_unknown_is_refused(old: str, new: str, line: int, path: str) -> None:
    error = refusal(edited(old, new))
    assert path in str(error)
    assert error.line == line


WRONG_VALUES = [
    pytest.param("6a1f3c52", "6A1F3C52", 3, "host/uuid", "6A1F3C52", id="upper-case uuid"),
    pytest.param("<arch>x86_64<", "<arch>x86 64<", 5, "host/cpu/arch", "'x86 64'", id="arch"),
    pytest.param("EPYC-Milan", " EPYC", 6, "host/cpu/model", "' EPYC'", id="space"),
    pytest.param("EPYC-Milan", "EPYC\u2122", 6, "host/cpu/model", r"\u2122", id="not ASCII"),
    pytest.param("EPYC-Milan", "", 6, "host/cpu/model", "''", id="empty"),
    pytest.param("EPYC-Milan", "E" * 257, 6, "host/cpu/model", "EEE", id="long"),
    pytest.param(">68719476736", ">0", 8, "host/memory", "'0'", id="no memory"),
    pytest.param(">68719476736", ">-1", 8, "host/memory", "'-1'", id="negative memory"),
    pytest.param(">68719476736", ">068719476736", 8, "host/memory", "'068719476736'", id="leading zero"),
    pytest.param(">68719476736", ">9223372036854775808", 8, "host/memory", "775808", id="2**63"),
    pytest.param(">68719476736", ">" + "9" * 5000, 8, "host/memory", "999", id="5000 digits"),
    pytest.param('unit="bytes"', 'unit="KiB"', 8, "host/memory", "attribute", id="other unit"),
    pytest.param(' unit="bytes"', "", 8, "host/memory", "attribute", id="no unit"),
    pytest.param(
        ">tcp<",
        ">TCP<",
        LAST + 2,
        "host/migration_features/uri_transports/uri_transport[1]",
        "'TCP'",
        id="transport",
    ),
    pytest.param(">hvm<", ">xen<", LAST + 8, "guest/os_type", "'xen'", id="os_type"),
    pytest.param('name="x86_64"', 'name="i686"', LAST + 9, "guest/arch", "i686", id="two architectures"),
    pytest.param('type="kvm"', 'type=""', LAST + 12, "guest/arch/domain[1]", "attribute", id="domain type"),
    pytest.param(">qemu<", ">q<", None, "", "", id="control: one that is right"),
    pytest.param("7.2.13", "7.02", LAST + 19, "driver/version", "'7.02'", id="version with a zero"),
    pytest.param("7.2.13", "7.2-rc1", LAST + 19, "driver/version", "'7.2-rc1'", id="version with a word"),
    pytest.param(
        "7.2.13", "1.1.1.1.1.1.1.1.1", LAST + 19, "driver/version", "'1.1", id="version with nine parts"
    ),
    pytest.param(
        "7.2.13", "1000000000", LAST + 19, "driver/version", "'1000000000'", id="version with ten digits"
    ),
    pytest.param(
        "    <version>7.2.13</version>\n", "", LAST + 16, "driver", "element is missing", id="no version"
    ),
    pytest.param(
        ">pc-i440fx-7.2<",
        ">pc-q35-7.2<",
        LAST + 11,
        "guest/arch",
        "pc-q35-7.2 stands twice",
        id="machine twice",
    ),
    pytest.param(">unix<", ">tcp<", LAST + 3, "uri_transports", "tcp stands twice", id="transport twice"),
    pytest.param('"kvm"', '"qemu"', LAST + 13, "guest/arch", "qemu stands twice", id="domain type twice"),
    pytest.param("<rename/>", "<live/>", 11, "migration_features", "live stands twice", id="feature twice"),
    pytest.param(
        "<rename/>", "<x/>\n<x/>", 12, "migration_features", "x stands twice", id="new feature twice"
    ),
    pytest.param(
        "</uri_transports>",
        "</uri_transports><uri_transports><uri_transport>rdma</uri_transport></uri_transports>",
        LAST + 4,
        "migration_features",
        "uri_transports stands twice",
        id="transports twice",
    ),
]


@pytest.mark.parametrize("old, new, line, path, words", WRONG_VALUES)
def test_a_wrong_value_is_refused_where_it_stands(
    old: str, new: str, line: int | None, path: str, words: str
) -> None:
    if line is None:
        assert Capabilities.from_xml(edited(old, new)) == replace(HOST, scheme="q")
        return
    error = refusal(edited(old, new))
    assert error.line == line
    assert f"capabilities/{path}" in str(error) or f"{path}," in str(error)
    assert words in str(error)


@pytest.mark.parametrize(
    "line, words",
    [
        (">pc-q35-7.2<", "</machine><machine>m{}"),
        (">tcp<", "</uri_transport><uri_transport>m{}"),
        ('"kvm"', '"/><domain type="m{}'),
    ],
    ids=["machines", "transports", "domain types"],
)
def test_too_many_are_refused_at_the_first_too_many(line: str, words: str) -> None:
    limit = 1024 if "machine" in words else 64
    more = "".join(words.format(number) for number in range(limit - 2))
    Capabilities.from_xml(edited(line, line[:-1] + more + line[-1]))
    more += words.format("last")
    error = refusal(edited(line, line[:-1] + more + line[-1]))
    assert f"one too many: there may be {limit}" in str(error)
    assert error.line is not None


def test_documents_of_libvirt_are_refused_and_not_half_read() -> None:
    error = refusal(
        "<capabilities><host><cpu><arch>i686</arch></cpu><iommu support='no'/></host></capabilities>"
    )
    assert "capabilities/host/cpu" in str(error)


# Hostile documents


@hostile
@given(
    st.text()
    | st.binary()
    | st.text(alphabet="<>/&;![]?-'\"= \n\x00aclive").map(lambda text: "<capabilities>" + text)
)
@example("")
@example(b"")
@example(" \n")
@example("\ud800")
@example("<!-- -->")
@example(b"\xff\xfe<\x00")
def test_garbage(text: str | bytes) -> None:
    refusal(text)


@hostile
@given(st.data())
def test_a_valid_document_with_a_piece_exchanged(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(HOST_XML)))
    end = data.draw(st.integers(start, min(len(HOST_XML), start + 40)))
    piece = data.draw(
        st.text(max_size=8) | st.sampled_from(["<live/>", "</host>", "<driver>", "&lt;", "x", "0"])
    )
    check_any(HOST_XML[:start] + piece + HOST_XML[end:])


@hostile
@given(st.data())
def test_elements_exchanged(data: st.DataObject) -> None:
    from lxml import etree

    root = etree.fromstring(HOST_XML)
    elements = list(root.iter())
    tags = sorted({str(element.tag) for element in elements})
    for _ in range(data.draw(st.integers(1, 3))):
        element = data.draw(st.sampled_from(elements))
        match data.draw(st.sampled_from(["tag", "text", "child", "attribute"])):
            case "tag":
                element.tag = data.draw(st.sampled_from(tags))
            case "text":
                element.text = data.draw(st.sampled_from(["", "1", "x", " "]))
            case "child":
                element.insert(0, etree.Element(data.draw(st.sampled_from(tags))))
            case "attribute":
                element.set(data.draw(st.sampled_from(["name", "type", "unit"])), "x")
    check_any(etree.tostring(root, encoding="unicode"))


def test_every_truncated_document() -> None:
    document = HOST_XML.rstrip()
    for length in range(len(document)):
        refusal(document[:length])


@hostile
@given(capabilities, st.data())
def test_truncated_documents(host: Capabilities, data: st.DataObject) -> None:
    document = host.to_xml().rstrip().encode()
    refusal(document[: data.draw(st.integers(0, len(document) - 1))])


@hostile
@given(
    st.integers(1, 1 << 21),
    st.sampled_from([" ", "<a>", "&", "<!--", "é", "\u20ac", "\ud800"]),
    st.booleans(),
)
@example(1, " ", False)
def test_over_the_cap(excess: int, filler: str, binary: bool) -> None:
    text = HOST_XML + filler * ((MAX_CAPABILITIES_BYTES + excess - len(HOST_XML)) // len(filler) + 1)
    error = refusal(text.encode("utf-8", "surrogatepass") if binary else text)
    assert str(error) == f"the capabilities are longer than {MAX_CAPABILITIES_BYTES} bytes"
    assert error.line is None


@pytest.mark.parametrize("filler", [" ", "é", "\u20ac"])
def test_the_cap_counts_bytes(filler: str) -> None:
    room = MAX_CAPABILITIES_BYTES - len(HOST_XML.encode()) - len("<!---->")
    count, rest = divmod(room, len(filler.encode()))
    longest = f"<!--{filler * count}{' ' * rest}-->{HOST_XML}"
    assert Capabilities.from_xml(longest) == HOST
    assert Capabilities.from_xml(longest.encode()) == HOST
    assert "longer than" in str(refusal(longest + " "))
    assert "longer than" in str(refusal(longest.encode() + b" "))


def test_what_is_over_the_cap_is_not_copied() -> None:
    text = "\u20ac" * (16 * MAX_CAPABILITIES_BYTES)
    tracemalloc.start()
    try:
        refusal(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_CAPABILITIES_BYTES


@hostile
@given(
    st.integers(257, MAX_CAPABILITIES_BYTES // 16),
    st.sampled_from(["a", "host", "capabilities"]),
    st.booleans(),
)
def test_deep_nesting(depth: int, tag: str, closed: bool) -> None:
    text = f"<{tag}>" * depth + (f"</{tag}>" * depth if closed else "")
    refusal(text)


@hostile
@given(st.integers(1, 250), st.sampled_from(["a", "host", "capabilities"]))
def test_nesting_that_the_parser_allows(depth: int, tag: str) -> None:
    refusal("<capabilities>" + f"<{tag}>" * depth + f"</{tag}>" * depth + "</capabilities>")


@hostile
@given(
    levels=st.integers(1, 30),
    fan_out=st.integers(2, 100),
    parameter=st.booleans(),
    place=st.sampled_from([">QEMU<", ">x86_64<", '="bytes"', '="x86_64"', "<live/>", "<capabilities>"]),
)
def test_nested_entities(levels: int, fan_out: int, parameter: bool, place: str) -> None:
    mark = "% " if parameter else ""
    bomb = "".join(
        f'<!ENTITY {mark}e{level} "{f"&e{level - 1};" * fan_out if level else "ha" * 100}">'
        for level in range(levels + 1)
    )
    use = place[0] + f"&e{levels};" + place[-1] if place[0] in ">" else place.replace('"', f'"&e{levels};', 1)
    error = refusal(f"\n<!DOCTYPE capabilities [{bomb}]>\n" + HOST_XML.replace(place, use))
    assert "document type declaration" in str(error)
    assert error.line == 2


@hostile
@given(
    before=st.sampled_from(["", '<?xml version="1.0"?>', "\ufeff", "<!-- c -->\n", "<?pi?>", " \n\n"]),
    kind=st.sampled_from(["SYSTEM", 'PUBLIC "-//X//Y"']),
    form=st.sampled_from(
        [
            '<!DOCTYPE capabilities [<!ENTITY e {kind} "{uri}">]>',
            '<!DOCTYPE capabilities [<!ENTITY % e {kind} "{uri}"> %e;]>',
            '<!DOCTYPE capabilities {kind} "{uri}">',
        ]
    ),
    scheme=st.sampled_from(["file://", "", "http://127.0.0.1:9", "ftp://127.0.0.1:9"]),
    binary=st.booleans(),
)
def test_external_entities(
    tmp_path_factory: pytest.TempPathFactory, before: str, kind: str, form: str, scheme: str, binary: bool
) -> None:
    secret: Path = tmp_path_factory.getbasetemp() / "secret"
    secret.write_text("k3y", encoding="ascii")
    document = before + form.format(kind=kind, uri=f"{scheme}{secret}") + edited(">QEMU<", ">&e;<")
    error = refusal(document.encode() if binary else document)
    assert "document type declaration" in str(error)
    assert "k3y" not in str(error)


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-7", "cp500"]
)
def test_a_declaration_does_not_hide_in_another_encoding(encoding: str) -> None:
    document = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE capabilities [<!ENTITY e "QEMU">]>'
    refusal((document + edited(">QEMU<", ">&e;<")).encode(encoding))


@hostile
@given(st.sampled_from(["&e;", "&#0;", "&#xD800;", "&#x110000;", "&", "&#99999999999999999999;", "%e;&"]))
def test_entities_that_nobody_declared(entity: str) -> None:
    assert refusal(edited(">QEMU<", f">{entity}<")).line == LAST + 18


@hostile
@given(
    st.none()
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.lists(st.text())
    | st.dictionaries(st.text(), st.text())
    | st.binary().map(bytearray)
    | st.binary().map(lambda data: memoryview(data))
    | st.just(HOST)
)
def test_no_text_at_all(value: object) -> None:
    assert f"not from {type(value).__name__}" in str(refusal(value))


FILLERS: dict[str, tuple[str, Callable[[int], str]]] = {
    "equal features": ("<live/>", lambda _: "<a/>"),
    "different features": ("<live/>", lambda number: f"<a{number}/>"),
    "features with texts": ("<live/>", lambda _: "<a>1</a>"),
    "features in namespaces": ("<live/>", lambda number: f"<a xmlns='{number}'/>"),
    "machines": ('<domain type="kvm"/>', lambda number: f"<machine>{number}</machine>"),
    "domain types": ('<domain type="kvm"/>', lambda number: f'<domain type="d{number}"/>'),
    "transports": (
        "<uri_transport>tcp</uri_transport>",
        lambda number: f"<uri_transport>t{number}</uri_transport>",
    ),
    "drivers": ("</driver>", lambda _: "<driver/>"),
    "elements outside": ("</host>", lambda _: "<a/>"),
    "texts": ("EPYC-Milan", lambda _: "a "),
    "spaces": ("EPYC-Milan", lambda _: " "),
    "digits": (">7.2.13", lambda _: "1"),
    "version parts": (">7.2.13", lambda _: ".1"),
    "references": ("EPYC-Milan", lambda _: "&lt;"),
    "lines": ("<live/>", lambda _: "\n"),
    "comments": ("<live/>", lambda _: "<!---->"),
    "instructions": ("<live/>", lambda _: "<?a?>"),
    "sections": ("EPYC-Milan", lambda _: "<![CDATA[a]]>"),
    "attributes": (' unit="bytes"', lambda number: f' a{number}=""'),
    "attribute's text": (' unit="bytes', lambda _: "a "),
    "namespaces": (' unit="bytes"', lambda number: f' xmlns:a{number}="u"'),
}


@pytest.mark.parametrize("filler", FILLERS)
def test_documents_just_below_the_cap_take_bounded_time(filler: str) -> None:
    place, make = FILLERS[filler]

    @settings(max_examples=6, deadline=timedelta(seconds=10), database=None)
    @given(st.sampled_from([1, 2, 8, 64, 512, 4096]))
    def check(divisor: int) -> None:
        room = (MAX_CAPABILITIES_BYTES - len(HOST_XML)) // divisor
        pieces: list[str] = []
        while (room := room - len(piece := make(len(pieces)))) >= 0:
            pieces.append(piece)
        check_any(edited(place, place + "".join(pieces)))

    check()


# Values


WRONG_FIELDS: dict[str, list[Any]] = {
    "scheme": [None, 1, b"qemu", "", "Qemu", "1q", "q_q", "qemu\n", "q" * 65, "qemu+ssh", "é"],
    "hypervisor": [None, 1, "", " ", " QEMU", "QEMU ", "Q\nU", "Q\tU", "Q\x00", "\ud800", "é", "Q" * 257],
    "version": [None, 7, "7.2", [7, 2], (), (7.2,), (True,), (-1,), ("7",), (10**9,), (1,) * 9, (10**4000,)],
    "arch": [None, 64, "", "x86 64", "_x", "x" * 129, "<x>"],
    "host_uuid": [
        None,
        1,
        "",
        HOST.host_uuid.upper(),
        HOST.host_uuid.replace("-", ""),
        HOST.host_uuid + "\n",
    ],
    "cpu_model": [None, 1, " ", "EPYC ", "\u2122", "E" * 257],
    "machines": [None, "pc", ["pc"], {"pc"}, ("",), (1,), (None,), ("pc", "pc"), ("a b",), (["pc"],)],
    "memory_bytes": ["1", 1.0, True, 0, -1, 1 << 63, 10**4000],
    "features": [None, "live", {Feature.LIVE}, (Feature.LIVE,), frozenset({"live"}), frozenset({None})],
    "uri_transports": [None, "tcp", ["tcp"], ("TCP",), ("",), (1,), ("tcp", "tcp"), ("tcp://",)],
    "domain_types": [None, "qemu", ["qemu"], ("",), ("KVM",), (None,), ("qemu", "qemu")],
}


def test_no_field_is_without_wrong_values() -> None:
    assert list(WRONG_FIELDS) == [field.name for field in fields(Capabilities)]


@pytest.mark.parametrize(
    "field, value", [(field, value) for field, values in WRONG_FIELDS.items() for value in values]
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    with pytest.raises(CapabilitiesError) as caught:
        replace(HOST, **{field: value})  # type: ignore[arg-type]
    check_error(caught.value)
    assert caught.value.line is None
    assert field in str(caught.value)


@pytest.mark.parametrize("field, limit", [("machines", 1024), ("uri_transports", 64), ("domain_types", 64)])
def test_too_many_in_a_field(field: str, limit: int) -> None:
    texts = tuple(f"m{number}" for number in range(limit + 1))
    replace(HOST, **{field: texts[:-1]})  # type: ignore[arg-type]
    with pytest.raises(CapabilitiesError, match=f"{field} must be a tuple of at most {limit}"):
        replace(HOST, **{field: texts})  # type: ignore[arg-type]


simple: st.SearchStrategy[object] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.text())
)
anything: st.SearchStrategy[object] = (
    simple | st.lists(simple, max_size=4).map(tuple) | st.frozensets(st.text() | st.integers(), max_size=4)
)


@hostile
@given(st.sampled_from([field.name for field in fields(Capabilities)]), anything)
def test_any_value_in_any_field(field: str, value: object) -> None:
    try:
        host = replace(HOST, **{field: value})  # type: ignore[arg-type]
    except CapabilitiesError as error:
        check_error(error)
    else:
        assert Capabilities.from_xml(host.to_xml()) == host


TEXTS = [
    "a",
    "a-b.c",
    "A",
    "1",
    "a b",
    "a  b",
    " a",
    "a ",
    "a_b",
    "a+b",
    "-",
    "~",
    "<",
    "a\nb",
    "é",
    "\u00a0",
]
TEXTS += ["a" * 64, "a" * 65, "a" * 128, "a" * 129, "a" * 256, "a" * 257, ""]


@pytest.mark.parametrize(
    "field, tag", [("scheme", "qemu"), ("cpu_model", "EPYC-Milan"), ("hypervisor", "QEMU")]
)
@pytest.mark.parametrize("text", TEXTS)
def test_types_and_schema_allow_the_same_texts(field: str, tag: str, text: str) -> None:
    try:
        host = replace(HOST, **{field: text})  # type: ignore[arg-type]
    except CapabilitiesError:
        host = None
    document = edited(f">{tag}<", f">{text.replace('<', '&lt;')}<")
    if host is None or (field, text) == ("cpu_model", ""):
        refusal(document)
    else:
        assert Capabilities.from_xml(document) == host


@pytest.mark.parametrize("text", TEXTS)
def test_types_and_schema_allow_the_same_machines(text: str) -> None:
    document = edited(">pc-i440fx-7.2<", f">{text.replace('<', '&lt;')}<")
    try:
        host = replace(HOST, machines=("pc-q35-7.2", text))
    except CapabilitiesError:
        refusal(document)
    else:
        assert Capabilities.from_xml(document) == host


def test_capabilities_are_values() -> None:
    assert Capabilities.from_xml(HOST_XML) == HOST
    assert hash(Capabilities.from_xml(HOST_XML)) == hash(HOST)
    with pytest.raises(FrozenInstanceError):
        HOST.scheme = "xen"  # type: ignore[misc]


def test_lxml_is_loaded_by_documents_only() -> None:
    code = (
        "import sys, ferryman, ferryman.capabilities as c\n"
        "h = c.Capabilities(scheme='a', hypervisor='A', version=(1,), arch='a', cpu_model='', machines=(),\n"
        "    host_uuid='00000000-0000-0000-0000-000000000000', memory_bytes=None, features=frozenset(),\n"
        "    uri_transports=(), domain_types=())\n"
        "c.negotiate(h, h, ferryman.MigrationOptions())\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'lxml']\n"
        "h.to_xml()\n"
        "assert 'lxml.etree' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# Negotiation

ASKED: dict[str, Any] = {
    "name": "web2",
    "listen_address": "192.0.2.7",
    "bandwidth_bytes_per_s": 1_000_000,
    "max_downtime_ms": 50,
    "paused": True,
    "persist": True,
    "undefine_source": True,
    "port_range": (49_152, 49_215),
    "streams": 4,
    "compression": Compression.XBZRLE,
    "compression_level": 3,
    "xbzrle_cache_bytes": 1 << 20,
    "zero_copy": True,
    "auto_converge": True,
    "throttle_initial_percent": 10,
    "throttle_increment_percent": 5,
    "throttle_max_percent": 90,
    "postcopy": Postcopy.ON_REQUEST,
    "postcopy_bandwidth_bytes_per_s": 1_000_000,
    "tls": True,
    "tls_name": "web.example",
    "destination_definition": HOST_XML,
    "disks": (("vda", "/srv/web"),),
    "graphics_address": "192.0.2.7",
    "copy_storage": StorageCopy.FULL,
    "copy_disks": ("vda",),
    "copy_bandwidth_bytes_per_s": 1_000_000,
    "copy_synchronously": True,
}
NEEDS: dict[str, dict[str, Any]] = {
    "compression_level": {"compression": Compression.ZSTD},
    "xbzrle_cache_bytes": {"compression": Compression.XBZRLE},
    **{option: {"auto_converge": True} for option in ASKED if option.startswith("throttle_")},
    "postcopy_bandwidth_bytes_per_s": {"postcopy": Postcopy.ON_REQUEST},
    "tls_name": {"tls": True},
    **{option: {"copy_storage": StorageCopy.FULL} for option in ASKED if option.startswith("copy_")},
}
"""What each option means nothing without."""

# Written out here, not taken from FEATURE_SIDES, which it checks.
SIDES: dict[str, Side | None] = {
    "name": Side.DESTINATION,
    "listen_address": Side.DESTINATION,
    "bandwidth_bytes_per_s": Side.SOURCE,
    "max_downtime_ms": Side.SOURCE,
    "paused": Side.DESTINATION,
    "persist": Side.DESTINATION,
    "undefine_source": Side.SOURCE,
    "port_range": Side.DESTINATION,
    "streams": None,
    "compression": None,
    "compression_level": None,
    "xbzrle_cache_bytes": None,
    "zero_copy": Side.SOURCE,
    "auto_converge": Side.SOURCE,
    "throttle_initial_percent": Side.SOURCE,
    "throttle_increment_percent": Side.SOURCE,
    "throttle_max_percent": Side.SOURCE,
    "postcopy": None,
    "postcopy_bandwidth_bytes_per_s": None,
    "tls": None,
    "tls_name": None,
    "destination_definition": Side.DESTINATION,
    "disks": Side.DESTINATION,
    "graphics_address": Side.DESTINATION,
    "copy_storage": None,
    "copy_disks": None,
    "copy_bandwidth_bytes_per_s": None,
    "copy_synchronously": None,
}
"""None is both."""

SOURCE = HOST
DESTINATION = replace(HOST, scheme="xen", hypervisor="Xen", uri_transports=("xenmigr", "unix", "tcp"))


def asking(*names: str) -> MigrationOptions:
    """Options that ask for those of these names, and for what they mean nothing without."""
    wanted = [name for name in names if name != "compression_level" or "xbzrle_cache_bytes" not in names]
    values: dict[str, Any] = {name: ASKED[name] for name in wanted}
    for name in wanted:
        # Last, so that what an option needs is there whatever else was asked for before or after it.
        values |= NEEDS.get(name, {})
    return MigrationOptions(**values)


def of_feature(feature: Feature) -> set[str]:
    return {option for option, needed in OPTION_FEATURES.items() if needed is feature}


def without(host: Capabilities, *features: Feature) -> Capabilities:
    return replace(host, features=host.features - set(features))


def test_every_feature_and_option_has_its_sides() -> None:
    assert set(FEATURE_SIDES) == set(Feature)
    assert all(FEATURE_SIDES.values())
    assert set(SIDES) == set(ASKED) == set(OPTION_FEATURES)
    both = {feature for feature, sides in FEATURE_SIDES.items() if set(sides) == set(Side)}
    assert both == {Feature.LIVE} | {
        OPTION_FEATURES[option] for option, side in SIDES.items() if side is None
    }


@pytest.mark.parametrize("best_effort", [False, True], ids=["required", "best effort"])
@pytest.mark.parametrize(
    "at_source, at_destination",
    list(product([True, False], repeat=2)),
    ids=["both", "source", "destination", "neither"],
)
@pytest.mark.parametrize("option", ASKED)
def test_an_option_needs_its_side_and_no_other(
    option: str, at_source: bool, at_destination: bool, best_effort: bool
) -> None:
    feature = OPTION_FEATURES[option]
    source = SOURCE if at_source else without(SOURCE, feature)
    destination = DESTINATION if at_destination else without(DESTINATION, feature)
    asked = asking(option)
    allowed = frozenset(asked.asked() if best_effort else ())
    options = replace(asked, best_effort=allowed, lease_s=7.0)

    negotiation = negotiate(source, destination, options)

    places = [("the source (driver qemu)", Side.SOURCE), ("the destination (driver xen)", Side.DESTINATION)]
    asked_of = [place for place in places if SIDES[option] in (None, place[1])]
    there = {Side.SOURCE: at_source, Side.DESTINATION: at_destination}
    lacking = [place for place in asked_of if not there[place[1]]]
    said = " and ".join(place for place, _ in lacking or asked_of)
    assert [outcome.option for outcome in negotiation.options] == list(asked.asked())
    for outcome in negotiation.options:
        assert (outcome.feature, outcome.used) == (feature, not lacking)
        assert outcome.reason == (
            f"{outcome.option} needs {feature.value}, which is {'not ' if lacking else ''}supported by {said}"
        )
    if lacking:
        assert negotiation.effective(options) == MigrationOptions(best_effort=allowed, lease_s=7.0)
    else:
        assert negotiation.effective(options) == options
    assert negotiation.refused(options) == (negotiation.options if lacking and not best_effort else ())


@pytest.mark.parametrize("option", ASKED)
def test_the_lack_of_one_feature_drops_its_options_and_no_other(option: str) -> None:
    options = asking(*ASKED)
    feature = OPTION_FEATURES[option]
    negotiation = negotiate(without(SOURCE, feature), without(DESTINATION, feature), options)
    dropped = of_feature(feature) & set(options.asked())
    assert [outcome.option for outcome in negotiation.options] == list(options.asked())
    assert {outcome.option for outcome in negotiation.options if not outcome.used} == dropped
    defaults = {name: getattr(MigrationOptions(), name) for name in dropped}
    assert negotiation.effective(options) == replace(options, **defaults)


def test_nothing_asked_is_nothing_decided() -> None:
    nothing = replace(SOURCE, features=frozenset())
    negotiation = negotiate(nothing, nothing, MigrationOptions())
    assert negotiation == Negotiation(options=(), transports=("tcp", "unix"), live=False)
    assert negotiation.effective(MigrationOptions()) == MigrationOptions()
    assert negotiation.refused(MigrationOptions()) == ()


@pytest.mark.parametrize("at_source, at_destination", list(product([True, False], repeat=2)))
def test_live_needs_both(at_source: bool, at_destination: bool) -> None:
    source = SOURCE if at_source else without(SOURCE, Feature.LIVE)
    destination = DESTINATION if at_destination else without(DESTINATION, Feature.LIVE)
    assert negotiate(source, destination, MigrationOptions()).live is (at_source and at_destination)


@pytest.mark.parametrize(
    "source, destination, shared",
    [
        (("tcp", "unix"), ("xenmigr", "unix", "tcp"), ("tcp", "unix")),
        (("xenmigr", "unix", "tcp"), ("tcp", "unix"), ("unix", "tcp")),
        (("tcp",), ("xenmigr",), ()),
        ((), ("tcp",), ()),
        (("tcp",), (), ()),
    ],
)
def test_shared_transports_stand_in_the_order_of_the_source(
    source: tuple[str, ...], destination: tuple[str, ...], shared: tuple[str, ...]
) -> None:
    hosts = (replace(SOURCE, uri_transports=source), replace(DESTINATION, uri_transports=destination))
    assert negotiate(*hosts, MigrationOptions()).transports == shared


some_options = st.lists(st.sampled_from(sorted(ASKED)), unique=True).map(lambda chosen: asking(*chosen))


@often
@given(capabilities, capabilities, some_options, st.frozensets(st.sampled_from(sorted(ASKED))))
def test_what_is_in_effect_is_honoured_by_both(
    source: Capabilities, destination: Capabilities, asked: MigrationOptions, best_effort: frozenset[str]
) -> None:
    options = replace(asked, best_effort=best_effort)
    negotiation = negotiate(source, destination, options)
    effective = negotiation.effective(options)
    again = negotiate(source, destination, effective)
    assert all(outcome.used for outcome in again.options)
    assert again.effective(effective) == effective
    dropped = set(options.asked()) - set(effective.asked())
    assert {outcome.option for outcome in negotiation.refused(options)} == dropped - best_effort
