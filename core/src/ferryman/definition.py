"""Libvirt domain XML that drivers share: parse, edit, render.

Only what every driver needs is read here (name, uuid, type, memory, vcpus); a driver reads the rest from
:attr:`Definition.root` and refuses by name what it does not know.  Parsing resolves no entity, loads no DTD, opens no
network connection and is bounded in size and depth.

Source: libvirt, docs/formatdomain.rst (general metadata, memory allocation, units).
"""

from __future__ import annotations

import copy
import re
import uuid as uuid_module
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ferryman.errors import DefinitionError
from ferryman.types import DomainUUID

if TYPE_CHECKING:
    from lxml.etree import _Element

    from ferryman.types import MigrationOptions

MAX_DEFINITION_BYTES = 1_048_576
"""A document longer than this is refused before it is parsed."""

_UNITS = {
    "b": 1,
    "bytes": 1,
    "KB": 10**3,
    "k": 2**10,
    "KiB": 2**10,
    "MB": 10**6,
    "M": 2**20,
    "MiB": 2**20,
    "GB": 10**9,
    "G": 2**30,
    "GiB": 2**30,
    "TB": 10**12,
    "T": 2**40,
    "TiB": 2**40,
}
_MAX_MEMORY_BYTES = 2**53
_NAME = re.compile(r"[^\x00-\x1f\x7f/]{1,200}")
_UUID = re.compile(r"[0-9A-Fa-f-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """A parsed domain definition.

    :param root: the ``<domain>`` element; never changed in place: edits return a new definition.
    :param memory_bytes: of ``<memory>``, rounded up to whole KiB as libvirt does.
    """

    root: _Element
    type: str
    name: str
    uuid: DomainUUID
    memory_bytes: int
    vcpus: int

    def render(self) -> str:
        """Write the definition as XML."""
        from lxml import etree

        return etree.tostring(self.root, encoding="unicode")

    def without_secrets(self) -> Definition:
        """The definition without the passwords of its displays, for those who may only look."""
        root = copy.deepcopy(self.root)
        for display in root.iterfind("devices/graphics[@passwd]"):
            del display.attrib["passwd"]
        return from_root(root)

    def renamed(self, name: str) -> Definition:
        """Give the definition another name.

        :raises DefinitionError: the name cannot be used.
        """
        return self.edited(name=name)

    def edited(self, **texts: str) -> Definition:
        """Replace the texts of direct children of ``<domain>``, and check the result."""
        root = copy.deepcopy(self.root)
        for tag, text in texts.items():
            element = root.find(tag)
            if element is None:
                from lxml import etree

                element = etree.SubElement(root, tag)
            try:
                element.text = text
            except ValueError as error:
                raise _error(element, f"{text!r:.80} cannot be the text of <{tag}>") from error
        return from_root(root)


def parse_definition(text: str) -> Definition:
    """Read a domain definition; a missing uuid is made up.

    :raises DefinitionError: not well-formed, too large, or without what every domain has; names element and line.
    """
    return from_root(parse_xml(text))


def parse_xml(text: str) -> _Element:
    """Parse any XML document as this module does.

    :raises DefinitionError: not well-formed, too large, or with a DTD.
    """
    from lxml import etree

    if not isinstance(text, str):
        raise DefinitionError(f"a definition is a text, not {type(text).__name__}")
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise DefinitionError("the definition holds characters that no XML document may hold") from error
    if len(data) > MAX_DEFINITION_BYTES:
        raise DefinitionError(f"the definition has {len(data)} bytes, more than {MAX_DEFINITION_BYTES}")
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
        encoding="utf-8",
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        # libxml2 quotes the document, line breaks and all.
        reason = " ".join(error.msg.split())
        raise DefinitionError(
            f"the definition is not well-formed XML: {reason:.400}", line=error.lineno
        ) from error
    if root.getroottree().docinfo.internalDTD is not None:
        raise DefinitionError(
            "the definition has a document type declaration, which no domain needs: remove it"
        )
    return root


def from_root(root: _Element) -> Definition:
    """Check a ``<domain>`` element."""
    if root.tag != "domain":
        raise _error(root, f"the definition's root element is <{root.tag}>, not <domain>")
    kind = root.get("type", "")
    if not kind:
        raise _error(root, "<domain> has no type attribute")
    return Definition(
        root=root,
        type=kind,
        name=_read_name(root),
        uuid=_read_uuid(root),
        memory_bytes=_read_memory(root),
        vcpus=_read_vcpus(root),
    )


def arriving_definition(text: str, options: MigrationOptions) -> str:
    """Write the definition that the destination builds: the source's, with what the options change.

    :raises DefinitionError: the options name a disk that is not there, or a definition of another domain.
    """
    asked = (options.name, options.destination_definition, options.disks, options.graphics_address)
    if not any(asked):
        return text
    source = parse_definition(text)
    definition = source
    if options.destination_definition is not None:
        definition = parse_definition(options.destination_definition)
        if definition.uuid != source.uuid:
            raise _error(
                definition.root,
                f"destination_definition is of domain {definition.uuid}, and {source.uuid} is to be migrated",
            )
    root = copy.deepcopy(definition.root)
    for target, path in options.disks:
        _move_disk(root, target, path)
    if options.graphics_address is not None:
        for graphics in root.iterfind("devices/graphics"):
            for listen in graphics.findall("listen"):
                graphics.remove(listen)
            graphics.set("listen", options.graphics_address)
    name = options.name or source.name
    return from_root(root).edited(name=name).render()


_SOURCES = {"file": "file", "block": "dev"}
"""Attribute of a disk's source that is its path, by the disk's type."""


def _move_disk(root: _Element, target: str, path: str) -> None:
    for disk in root.iterfind("devices/disk"):
        place, source = disk.find("target"), disk.find("source")
        if place is None or place.get("dev") != target:
            continue
        attribute = _SOURCES.get(disk.get("type", "file"))
        if source is None or attribute is None:
            raise _error(disk, f"the disk {target} has no path that could be another one at the destination")
        source.set(attribute, path)
        return
    raise _error(root, f"the options give a path for the disk {target}, which the domain does not have")


def minimal_definition(
    *, name: str, uuid: DomainUUID, type: str = "unknown", memory_bytes: int = 1024
) -> str:
    """Write the document that stands for a domain whose driver gives none.

    :raises DefinitionError: the name cannot be used.
    """
    from lxml import etree

    if not _NAME.fullmatch(name):
        raise DefinitionError(f"{name!r:.80} cannot be a name", element="domain/name")
    root = etree.Element("domain", type=type)
    for tag, text in (
        ("name", name),
        ("uuid", uuid),
        ("memory", str(max(1, memory_bytes // 1024))),
        ("vcpu", "1"),
    ):
        etree.SubElement(root, tag).text = text
    return etree.tostring(root, encoding="unicode")


def _error(element: Any, message: str) -> DefinitionError:
    line: int | None = element.sourceline
    where = f" (line {line})" if line else ""
    return DefinitionError(f"{message:.400}{where}", element=_path(element), line=line)


def _path(element: Any) -> str:
    parts = [str(element.tag)]
    parts.extend(str(ancestor.tag) for ancestor in element.iterancestors())
    return "/".join(reversed(parts))


definition_error = _error
"""Make the error for an element at fault: its path and line are taken from the element."""


def _only(root: _Element, tag: str) -> _Element | None:
    found = root.findall(tag)
    if len(found) > 1:
        raise _error(found[1], f"<{tag}> stands twice in <{root.tag}>")
    return found[0] if found else None


def _text(element: _Element) -> str:
    if len(element):
        raise _error(element[0], f"<{element.tag}> holds a text, not <{element[0].tag}>")
    return (element.text or "").strip()


def _read_name(root: _Element) -> str:
    element = _only(root, "name")
    if element is None or not _text(element):
        raise _error(root if element is None else element, "<domain> has no <name>")
    name = _text(element)
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise _error(
            element, f"{name!r:.80} cannot be a name: 1 to 200 characters, no '/' and no control characters"
        )
    return name


def _read_uuid(root: _Element) -> DomainUUID:
    element = _only(root, "uuid")
    if element is None:
        from lxml import etree

        element = etree.SubElement(root, "uuid")
        element.text = str(uuid_module.uuid4())
    text = _text(element)
    try:
        # Alone, UUID() would take a sign, braces and the digits of other scripts.
        canonical = str(uuid_module.UUID(text if _UUID.fullmatch(text) else ""))
    except ValueError as error:
        raise _error(element, f"{text!r:.80} is not a uuid") from error
    element.text = canonical
    return DomainUUID(canonical)


def _read_memory(root: _Element) -> int:
    element = _only(root, "memory")
    if element is None:
        raise _error(root, "<domain> has no <memory>")
    return read_memory(element)


def read_memory(element: _Element) -> int:
    """Read an amount of memory with its unit, in bytes, rounded up to whole KiB as libvirt does.

    :raises DefinitionError: not a whole number, an unknown unit, or outside 1 KiB to 8 PiB.
    """
    text = _text(element)
    unit = element.get("unit", "KiB")
    if unit not in _UNITS:
        raise _error(element, f"{unit!r:.20} is not a unit of memory: use one of {', '.join(_UNITS)}")
    number = _whole(element, text, str(element.tag))
    amount = -(-number * _UNITS[unit] // 1024) * 1024
    if not 0 < amount <= _MAX_MEMORY_BYTES:
        raise _error(element, f"<{element.tag}> of {text} {unit} is outside 1 KiB to 8 PiB")
    return amount


def _read_vcpus(root: _Element) -> int:
    element = _only(root, "vcpu")
    if element is None:
        return 1
    number = _whole(element, _text(element), "vcpu")
    if not 1 <= number <= 4096:
        raise _error(element, f"{number} virtual processors are outside 1 to 4096")
    return number


def _whole(element: _Element, text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise _error(element, f"{text!r:.40} is not a whole number for {what}")
    return int(text)
