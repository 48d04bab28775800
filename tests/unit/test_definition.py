"""Is every bad definition refused in one line and quickly, and does a good one survive being read and written?"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ferryman.definition import (
    MAX_DEFINITION_BYTES,
    Definition,
    arriving_definition,
    minimal_definition,
    parse_definition,
    read_memory,
)
from ferryman.errors import DefinitionError
from ferryman.types import DomainUUID, MigrationOptions

if TYPE_CHECKING:
    from pathlib import Path

often = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

UUID = "6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55"
GOOD = f"""\
<domain type="kvm">
  <name>web</name>
  <uuid>{UUID}</uuid>
  <memory unit="MiB">64</memory>
  <vcpu>2</vcpu>
  <devices><disk type="file"/></devices>
</domain>
"""
MINIMAL = "<domain type='q'><name>a</name><memory>1</memory></domain>"
LINES = {"domain": 1, "name": 2, "uuid": 3, "memory": 4, "vcpu": 5}


def edited(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def valued(tag: str, value: str) -> str:
    """The good document with another content of an element."""
    head, _, rest = GOOD.partition(f"<{tag}")
    attributes, _, rest = rest.partition(">")
    return f"{head}<{tag}{attributes}>{value}</{tag}>{rest.partition(f'</{tag}>')[2]}"


def check_error(error: DefinitionError) -> None:
    message = str(error)
    assert type(error) is DefinitionError
    assert len(message.splitlines()) == 1, message
    assert len(message) < 600
    assert "Traceback" not in message
    assert 'File "' not in message
    assert error.line is None or error.line >= 1
    if error.element is not None and error.line is not None:
        assert f"(line {error.line})" in message


def refusal(text: object) -> DefinitionError:
    """Return the error of a text that must be refused, having checked what holds for every error."""
    began = time.thread_time()
    with pytest.raises(DefinitionError) as caught:
        parse_definition(text)  # type: ignore[arg-type]
    # Each takes milliseconds of the processor, and one that runs away takes minutes.
    assert time.thread_time() - began < 2
    check_error(caught.value)
    return caught.value


def fields(definition: Definition) -> tuple[str, str, str, int, int]:
    return (definition.type, definition.name, definition.uuid, definition.memory_bytes, definition.vcpus)


def check_any(text: str) -> None:
    """Whatever the text: a definition whose writing is a fixed point, or a DefinitionError."""
    try:
        read = parse_definition(text)
    except DefinitionError as error:
        check_error(error)
    else:
        again = parse_definition(read.render())
        assert fields(again) == fields(read)
        assert again.render() == read.render()


# Documents that are no XML, or XML of the wrong kind

BOMB = "<!DOCTYPE d [<!ENTITY a0 'ha'>{}]>".format(
    "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 12))
)
# fmt: off
NOT_DOCUMENTS: list[Any] = [
    None, GOOD.encode(), b"", bytearray(b"<domain/>"), 5, True, [GOOD], "", " ", "\n\t\r\n", "\ufeff", "domain",
    '{"domain": {"name": "web"}}', repr(GOOD.encode()), GOOD.encode().hex(), GOOD.encode("utf-16").decode("latin-1"),
    "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "\x7fELF\x02\x01\x01\x00", "\0", "\0" * 1000, "\0" + GOOD,
    edited("web", "w\0eb"), GOOD + "\0", "\ud800", edited("web", "w\udcffeb"), edited("web", "\ud83d\ude00"),
    edited("web", "w\ufffeb"), edited("web", "w\x01b"), edited("<name>", "<na\x1bme>"), edited("web", "&#0;"),
    edited("web", "&#x1f;"), edited("web", "&#xd800;"), edited("web", "&#x110000;"), "<", "<" * 100_000,
    "&" * 100_000, "<!-- domain -->", "<!--" + GOOD, edited("web", "web<!-- a -- b -->"), "<?domain type='kvm'?>",
    "<?xml version='1.0'?>", "\n<?xml version='1.0'?>" + GOOD, "<?xml version='1.0'?><?xml version='1.0'?>" + GOOD,
    edited("web", "web<?pi"), "<![CDATA[" + GOOD + "]]>", edited("web", "<![CDATA[web"), edited("web", "web]]>"),
    GOOD + GOOD, "x" + GOOD, GOOD + "x", "<domain type='kvm'>", "</domain>",
    "<domain type='kvm'><name>a<memory></name>1</memory></domain>", edited("</name>", "</NAME>"),
    edited('type="kvm"', 'type="kvm" type="kvm"'), edited('type="kvm"', "type=kvm"), edited('type="kvm"', "type"),
    edited('type="kvm"', 'type="<"'), edited("web", "a & b"), edited("web", "&nbsp;"),
    edited("<vcpu>2</vcpu>", "<q:vcpu>2</q:vcpu>"), edited('type="kvm"', 'q:type="kvm"'),
    edited('type="kvm"', 'type="kvm" xmlns="a&#10;b"'), edited('type="kvm"', 'type="kvm" xml:id="1&#10;2"'),
    edited('type="kvm"', f'type="kvm" xmlns="a {"b" * 100_000}"'), "<domain>" + "<q:a/>" * 100_000 + "</domain>",
    "<a>" * 5000 + "</a>" * 5000, "<a>" * 300_000, edited("web", "<a>" * 5000 + "</a>" * 5000),
    "<!DOCTYPE domain>" + GOOD, "<!doctype html>" + GOOD, "<!DOCTYPE domain [" + GOOD,
    "<!DOCTYPE domain SYSTEM 'file:///etc/passwd'>" + GOOD,
    "<!DOCTYPE domain PUBLIC 'a' 'http://127.0.0.1:9/'>" + GOOD,
    "<!DOCTYPE domain [<!ATTLIST domain type CDATA 'kvm'>]>" + edited(' type="kvm"', ""),
    "<!DOCTYPE d [<!ENTITY % a SYSTEM 'http://127.0.0.1:9/'>%a;]>" + GOOD,
    "<!DOCTYPE d [<!ENTITY a 'web'>]>" + edited("web", "&a;"), "<!DOCTYPE d [<!ENTITY a 'web'>]>" + GOOD,
    "<!DOCTYPE d [<!ENTITY a '&b;'><!ENTITY b '&a;'>]>" + edited("web", "&a;"),
    "<!DOCTYPE d [<!ENTITY a '&a;'>]>" + edited("kvm", "&a;"), BOMB + edited("web", "&a11;"),
    BOMB + edited("kvm", "&a11;"), f"<!DOCTYPE d [<!ENTITY a '{'x' * 100_000}'>]>" + edited("web", "&a;" * 100_000),
    GOOD + " " * (MAX_DEFINITION_BYTES + 1 - len(GOOD)),
    edited("<devices>", f"<!--{'ß' * (MAX_DEFINITION_BYTES // 2)}--><devices>"), "<a>" * MAX_DEFINITION_BYTES,
]
# fmt: on


@pytest.mark.parametrize("text", NOT_DOCUMENTS, ids=range(len(NOT_DOCUMENTS)))
def test_what_is_no_document_is_refused(text: object) -> None:
    error = refusal(text)
    assert error.element is None
    assert (error.line is not None) == ("well-formed" in str(error))


def test_every_truncated_document_is_refused() -> None:
    document = GOOD.rstrip()
    for length in range(len(document)):
        assert refusal(document[:length]).line is not None


def test_no_external_entity_is_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    for text in ("&a;", "web"):
        error = refusal(f"<!DOCTYPE d [<!ENTITY a SYSTEM '{secret}'>]>" + edited("web", text))
        assert "hunter2" not in str(error)


# Documents with something wrong in them

WRONG_VALUES = {
    "name": [
        *("", " ", "\n", "\u00a0", "<!-- web -->", "<![CDATA[]]>", "<?web?>"),
        *(".", "..", "a/b", "/", "../a", "&#47;", "a\nb", "a\tb", "a&#10;b", "a&#13;b", "a&#127;b"),
        *("a" * 201, "ß" * 201, "a" * 100_000, "<web/>", "we<b/>b"),
    ],
    "uuid": [
        *("", " ", "web", "0", UUID[:-1], UUID + "0", UUID.replace("-", "_"), "g" + UUID[1:]),
        *("+" + UUID[1:], "-" * 36, "0x" + UUID[2:], "{" + UUID + "}", "urn:uuid:" + UUID),
        *("\u0661" + UUID[1:], "\uff16" + UUID[1:], UUID[:8] + " " + UUID[9:], UUID[:8] + "\n" + UUID[8:]),
        *(UUID + " " + UUID, UUID[:4] + "_" + UUID[5:], "a" * 100_000, f"<x>{UUID}</x>", f"{UUID}<x/>"),
    ],
    "memory": [
        *("", " ", "0", "-1", "-0", "+1", "1.0", "1.5", ".5", "1e3", "0x10", "0b1", "1_000", "1,000"),
        *("64 MiB", "64M", "NaN", "inf", "many", "one", "1KiB", "1/2", "1+1", "$1", "1b", "\u096a"),
        *(
            "8589934593",
            "9" * 20,
            "9" * 21,
            "9" * 100_000,
            "64<x/>",
            "<x>64</x>",
            "1 0",
            "1\n0",
            "\uff11",
            "\u00b2",
        ),
    ],
    "vcpu": [
        *("", " ", "0", "00", "-1", "+1", "4097", "1.0", "1e1", "0x1", "1 2"),
        *("1_0", "two", "\u0662", "\u00b9", "9" * 20, "9" * 5000, "2<x/>", "<x>2</x>"),
    ],
}


PAIRS = [(tag, value) for tag, values in WRONG_VALUES.items() for value in values]


@pytest.mark.parametrize("tag, value", PAIRS, ids=range(len(PAIRS)))
def test_a_wrong_value_is_refused_where_it_stands(tag: str, value: str) -> None:
    error = refusal(valued(tag, value))
    child = re.search("<([a-z]+)", value)
    assert error.element == f"domain/{tag}" + (f"/{child[1]}" if child else "")
    assert error.line == LINES[tag]


WRONG_UNITS = [
    "", " ", "kb", "kib", "mib", "Kb", "K", "PiB", "bit", "byte", "B", "KiB ", "1", "M&#10;", "\u039aiB",
]  # fmt: skip
WRONG_PLACES = [
    *((edited('"MiB"', f'"{unit}"'), "domain/memory", 4, "is not a unit of memory") for unit in WRONG_UNITS),
    ("<a/>", "a", 1, "root element is <a>"), ("<Domain type='kvm'/>", "Domain", 1, "<Domain>"),
    ("<domains/>", "domains", 1, "<domains>"), (f"<{'a' * 40_000}/>", "a" * 40_000, 1, "root element"),
    (f"\n\n<a>{GOOD}</a>", "a", 3, "root element is <a>"),
    (edited('type="kvm"', 'type="kvm" xmlns="http://libvirt.org/"'), "{http://libvirt.org/}domain", 1, "root"),
    ("<q:domain xmlns:q='u' type='kvm'/>", "{u}domain", 1, "root element"), ("<domain/>", "domain", 1, "no type"),
    (edited(' type="kvm"', ""), "domain", 1, "no type"), (edited('"kvm"', '""'), "domain", 1, "no type"),
    *((edited(' type="kvm"', new), "domain", 1, "no type") for new in (' Type="kvm"', ' xmlns:q="u" q:type="kvm"')),
    ("<domain type='kvm'/>", "domain", 1, "no <name>"), ("<domain type='kvm'>web</domain>", "domain", 1, "no <name>"),
    ("<domain type='kvm' name='web'><memory>1</memory></domain>", "domain", 1, "no <name>"),
    *((edited("<name>web</name>", new), "domain", 1, "no <name>") for new in (
        "", "<Name>web</Name>", "<name xmlns='u'>web</name>", "<x><name>web</name></x>", "&lt;name>web&lt;/name>",
        "<!-- <name>web</name> -->", "<![CDATA[<name>web</name>]]>")),
    *((edited('<memory unit="MiB">64</memory>', new), "domain", 1, "no <memory>") for new in (
        "", "<currentMemory>64</currentMemory>", "<devices><memory>64</memory></devices>")),
    *((valued(tag, '1<x xmlns="u"/>'), f"domain/{tag}/{{u}}x", LINES[tag], f"<{tag}> holds a text, not <{{u}}x>")
      for tag in ("name", "uuid", "memory", "vcpu")),
    *((edited(f"</{tag}>", f"</{tag}>\n<{tag}>1</{tag}>"), f"domain/{tag}", LINES[tag] + 1, f"<{tag}> stands twice")
      for tag in ("name", "uuid", "memory", "vcpu")),
    (edited("</devices>", "</devices><name>web</name>"), "domain/name", 6, "<name> stands twice"),
    ("\n" * 70_000 + valued("memory", "x"), "domain/memory", 70_004, "whole number"),
    (edited("</devices>", "</devices><uuid/>"), "domain/uuid", 6, "<uuid> stands twice"),
]  # fmt: skip


@pytest.mark.parametrize("text, element, line, words", WRONG_PLACES, ids=range(len(WRONG_PLACES)))
def test_whatever_else_is_wrong_is_named(text: str, element: str, line: int, words: str) -> None:
    error = refusal(text)
    assert (error.element, error.line) == (element, line)
    assert words in str(error)


# Any document

PIECES = ["<name>", "</domain>", "<!--", "&#10;", " xmlns='u'", "<uuid/>", "<![CDATA[", "0", "é"]


@often
@given(st.text() | st.text(alphabet="<>/&;![]?-'\"= \n\x00anmeoy1").map(lambda text: MINIMAL[:17] + text))
@example("\u2028")
@example(MINIMAL[:17] + "<a xmlns='&#10;'/>")
@example(MINIMAL[:17] + "<name><x xmlns='http://a/\u2028\u0085'/></name>")
def test_random_text(text: str) -> None:
    check_any(text)


@often
@given(st.data())
def test_random_mutations(data: st.DataObject) -> None:
    raw = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw) - 1))
        end = min(len(raw), start + data.draw(st.integers(1, 40)))
        match data.draw(st.sampled_from(["flip", "delete", "double", "insert"])):
            case "flip":
                raw[start] ^= 1 << data.draw(st.integers(0, 7))
            case "delete":
                del raw[start : end if end - start < len(raw) else end - 1]
            case "double":
                raw[end:end] = raw[start:end]
            case "insert":
                raw[start:start] = data.draw(st.sampled_from(PIECES)).encode()
    for errors in ("surrogateescape", "replace"):
        check_any(raw.decode(errors=errors))


# Documents that are read


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + GOOD, '<?xml version="1.0" encoding="UTF-8"?>\n' + GOOD,
        '<?xml version="1.0" encoding="UTF-16"?>' + GOOD,
        "<!-- a --><?pi?>" + GOOD + "<!-- b -->", edited("web", "\n  w<!-- -->e<?pi?><![CDATA[b]]>\n"),
        edited("web", "&#119;&#x65;b"), edited(UUID, UUID.upper()), edited(UUID, f" {UUID.replace('-', '')}\n"),
        edited(">64<", "> 064\n<"), edited("<devices>", "<vcpu xmlns='u'>9</vcpu><x><vcpu>9</vcpu></x><devices>"),
        edited(f"  <uuid>{UUID}</uuid>\n", "").replace("</dom", f"<uuid>{UUID}</uuid></dom"),
        GOOD + " " * (MAX_DEFINITION_BYTES - len(GOOD)),
    ],
    ids=range(12),
)  # fmt: skip
def test_the_same_document_may_be_spelt_otherwise(text: str) -> None:
    assert fields(parse_definition(text)) == ("kvm", "web", UUID, 64 << 20, 2)


UNITS = {
    "b": 1, "bytes": 1, "KB": 1000, "k": 1024, "KiB": 1024, "MB": 1000**2, "M": 1024**2, "MiB": 1024**2,
    "GB": 1000**3, "G": 1024**3, "GiB": 1024**3, "TB": 1000**4, "T": 1024**4, "TiB": 1024**4,
}  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("number", [1, 2, 3, 1000, 1023, 1024, 1025])
def test_units_are_those_of_libvirt_and_round_up_to_kib(unit: str, number: int) -> None:
    read = parse_definition(edited('"MiB">64', f'"{unit}">{number}')).memory_bytes
    assert read % 1024 == 0
    assert 0 <= read - number * UNITS[unit] < 1024
    refusal(edited('"MiB">64', f'"{unit}">{2**53 // UNITS[unit] + number}'))


def test_memory_in_bytes() -> None:
    for attributes, number, expected in [
        ("", 64, 64 << 10), ("", 2**43, 2**53), (' unit="b"', 1, 1024), (' unit="bytes"', 1025, 2048),
        (' unit="KB"', 1, 1024), (' unit="KB"', 128, 128_000), (' unit="TiB"', 8192, 2**53),
    ]:  # fmt: skip
        definition = parse_definition(edited(' unit="MiB">64', f"{attributes}>{number}"))
        assert definition.memory_bytes == expected
        assert [read_memory(element) for element in definition.root.findall("memory")] == [expected]


def test_vcpus() -> None:
    assert [parse_definition(valued("vcpu", number)).vcpus for number in ("1", "02", "4096")] == [1, 2, 4096]
    assert parse_definition(MINIMAL).vcpus == 1


def test_a_missing_uuid_is_made_up() -> None:
    one, other = parse_definition(MINIMAL), parse_definition(MINIMAL)
    assert one.uuid != other.uuid
    assert parse_definition(one.render()).uuid == one.uuid


# Writing and editing


letters = st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/\ufffe\uffff")
names = (
    st.text(letters, min_size=1, max_size=200).map(str.strip).filter(lambda name: name not in ("", ".", ".."))
)


@often
@given(names)
@example("""<&>"' ]]> &amp; <!-- x -->""")
@example("Ärger 雪 \U0001f600 \u2028 \u202e")
@example("ß" * 200)
def test_any_name_survives(name: str) -> None:
    original = parse_definition(GOOD)
    before = original.render()
    renamed = original.renamed(name)
    assert fields(renamed) == ("kvm", name, UUID, 64 << 20, 2)
    assert fields(parse_definition(renamed.render())) == fields(renamed)
    assert fields(parse_definition(arriving_definition(GOOD, MigrationOptions(name=name)))) == fields(renamed)
    # Nothing but the name is another one, and the original is what it was.
    assert (original.name, original.render()) == ("web", before)
    assert renamed.renamed("web").render() == before
    made = parse_definition(minimal_definition(name=name, uuid=DomainUUID(UUID), type="t", memory_bytes=4096))
    assert fields(made) == ("t", name, UUID, 4096, 1)


def test_writing_is_stable() -> None:
    for text in (GOOD, MINIMAL, edited(UUID, UUID.upper()), edited("web", "<![CDATA[<&>]]>")):
        parse_definition(text)
        check_any(text)


BAD_NAMES = ["", " ", ".", "..", "a/b", "a\nb", "a\0", "\0", "\x01", "a\x7fb", "\ud800", "\uffff", "a" * 201]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_cannot_be_used_is_refused(name: str) -> None:
    original = parse_definition(GOOD)
    renames = [original.renamed]
    if name.strip():  # the options have none that is empty
        renames.append(lambda name: parse_definition(arriving_definition(GOOD, MigrationOptions(name=name))))
    for rename in renames:
        with pytest.raises(DefinitionError) as caught:
            rename(name)
        check_error(caught.value)
        assert caught.value.element == "domain/name"
    assert parse_definition(original.render()).name == "web"


def test_edits_are_checked_and_leave_the_original_alone() -> None:
    original = parse_definition(MINIMAL)
    more = original.edited(vcpu="3", memory="2")
    assert (more.vcpus, more.memory_bytes, more.uuid) == (3, 2048, original.uuid)
    assert (original.vcpus, original.memory_bytes) == (1, 1024)
    with pytest.raises(DefinitionError, match="4097"):
        original.edited(vcpu="4097")


def test_the_minimal_definition_is_read() -> None:
    made = [
        minimal_definition(name="a", uuid=DomainUUID(UUID), memory_bytes=size) for size in (0, 1024, 2048)
    ]
    assert [parse_definition(text).memory_bytes for text in made] == [1024, 1024, 2048]
    assert minimal_definition(name="a", uuid=DomainUUID(UUID)) == made[1]
    assert fields(parse_definition(made[1])) == ("unknown", "a", UUID, 1024, 1)
