"""Capability documents: what one driver can do on one host, as typed data and as XML, and what two hosts share.

The document keeps the shape of libvirt's ``<capabilities>`` where libvirt has one, and follows the RelaxNG schema
``schemas/capabilities.rng`` of this package::

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
          <uri_transports>
            <uri_transport>tcp</uri_transport>
          </uri_transports>
        </migration_features>
      </host>
      <guest>
        <os_type>hvm</os_type>
        <arch name="x86_64">
          <machine>pc-q35-7.2</machine>
          <domain type="kvm"/>
        </arch>
      </guest>
      <driver>
        <scheme>qemu</scheme>
        <hypervisor>QEMU</hypervisor>
        <version>7.2.13</version>
      </driver>
    </capabilities>

Versions of Ferryman meet: an empty element in ``<migration_features>`` that is not known here is a feature of a newer
version and is ignored.  Whatever else is unknown is an error, because a document half understood would promise what
nobody checked.

Parsing is safe on input from anybody: it is bounded in size, elements and depth, reads UTF-8 only, refuses document
type declarations (and with them every entity), and touches neither files nor network.

Source: libvirt, docs/formatcaps.rst.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Self

from ferryman.errors import CapabilitiesError
from ferryman.types import OPTION_FEATURES, Feature, MigrationOptions, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lxml.etree import _Element

__all__ = [
    "FEATURE_SIDES",
    "MAX_CAPABILITIES_BYTES",
    "Capabilities",
    "Negotiation",
    "OptionOutcome",
    "negotiate",
]

MAX_CAPABILITIES_BYTES: Final = 1 << 20
"""A document longer than this, in UTF-8, is refused before it is parsed."""

# libxml2 needs time quadratic in the number of siblings to validate them: 250,000 of them, which fit into the
# longest document, take a minute and a half, and 4096 take 30 ms. No document of ours has half as many.
_MAX_ELEMENTS = 4096

_SCHEMA = "schemas/capabilities.rng"
_MAX_MACHINES = 1024
_MAX_NAMES = 64
_MAX_MEMORY_BYTES = (1 << 63) - 1
_MAX_VERSION_PARTS = 8
_MAX_VERSION_PART = 999_999_999
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """What a text may look like; the schema has a definition of the same name."""

    pattern: re.Pattern[str]
    max_length: int
    words: str


_UUID = _Form(
    pattern=re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"),
    max_length=36,
    words="a uuid in lower case with dashes",
)
_NAME = _Form(
    pattern=re.compile(r"[a-z][a-z0-9.\-]*"),
    max_length=64,
    words="1 to 64 lower-case letters, digits, '.' and '-', beginning with a letter",
)
_WORD = _Form(
    pattern=re.compile(r"[A-Za-z0-9][A-Za-z0-9._+\-]*"),
    max_length=128,
    words="1 to 128 letters, digits, '.', '_', '+' and '-', beginning with a letter or a digit",
)
_LABEL = _Form(
    pattern=re.compile(r"[!-~]+( +[!-~]+)*"),
    max_length=256,
    words="1 to 256 printable ASCII characters without spaces at either end",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What one driver can do on one host; checked when built.

    A *name* has 1 to 64 lower-case letters, digits, ``.`` and ``-`` and begins with a letter; a *word* has 1 to 128
    letters, digits, ``.``, ``_``, ``+`` and ``-`` and begins with a letter or a digit; a *label* has 1 to 256 printable
    ASCII characters without spaces at either end.

    :param scheme: of connection URIs that open this host; a name.
    :param hypervisor: what runs the guests, such as ``QEMU``; a label.
    :param version: of the hypervisor; 1 to 8 numbers from 0 to 999,999,999.
    :param arch: of the host and of its guests, such as ``x86_64``; a word.
    :param host_uuid: identity of the host, in lower case with dashes.
    :param cpu_model: the host's; a label, or '' where it is not stated.
    :param machines: machine types that a guest may have; up to 1024 words, none twice, may be empty.
    :param memory_bytes: the host's memory, 1 to 2**63 - 1; None where it is not measured.
    :param features: what the driver can do in a migration.
    :param uri_transports: protocols of migration URIs, the preferred one first; up to 64 names, none twice.
    :param domain_types: libvirt's domain types that this driver starts; up to 64 names, none twice.
    :raises CapabilitiesError: a value has another type or form; ``line`` is None.
    """

    scheme: str
    hypervisor: str
    version: tuple[int, ...]
    arch: str
    host_uuid: str
    cpu_model: str
    machines: tuple[str, ...]
    memory_bytes: int | None
    features: frozenset[Feature]
    uri_transports: tuple[str, ...]
    domain_types: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_text("scheme", self.scheme, _NAME)
        _check_text("hypervisor", self.hypervisor, _LABEL)
        _check_version(self.version)
        _check_text("arch", self.arch, _WORD)
        _check_text("host_uuid", self.host_uuid, _UUID)
        if self.cpu_model != "":
            _check_text("cpu_model", self.cpu_model, _LABEL)
        _check_texts("machines", self.machines, _WORD, _MAX_MACHINES)
        _check_memory(self.memory_bytes)
        _check_features(self.features)
        _check_texts("uri_transports", self.uri_transports, _NAME, _MAX_NAMES)
        _check_texts("domain_types", self.domain_types, _NAME, _MAX_NAMES)

    def to_xml(self) -> str:
        """Write the document: the same text for equal capabilities, indented, with a line end after the last line.

        ``Capabilities.from_xml(capabilities.to_xml()) == capabilities`` holds for every object.
        """
        from lxml import etree

        def add(parent: _Element, tag: str, text: str | None = None, **attributes: str) -> _Element:
            element = etree.SubElement(parent, tag, attributes)
            element.text = text
            return element

        root = etree.Element("capabilities")

        host = add(root, "host")
        add(host, "uuid", self.host_uuid)
        cpu = add(host, "cpu")
        add(cpu, "arch", self.arch)
        if self.cpu_model:
            add(cpu, "model", self.cpu_model)
        if self.memory_bytes is not None:
            add(host, "memory", str(self.memory_bytes), unit="bytes")
        migration_features = add(host, "migration_features")
        for feature in Feature:
            if feature in self.features:
                add(migration_features, feature.value)
        if self.uri_transports:
            uri_transports = add(migration_features, "uri_transports")
            for transport in self.uri_transports:
                add(uri_transports, "uri_transport", transport)

        guest = add(root, "guest")
        # libvirt's word for guests that run unmodified; these capabilities tell no other kinds apart.
        add(guest, "os_type", "hvm")
        arch = add(guest, "arch", name=self.arch)
        for machine in self.machines:
            add(arch, "machine", machine)
        for domain_type in self.domain_types:
            add(arch, "domain", type=domain_type)

        driver = add(root, "driver")
        add(driver, "scheme", self.scheme)
        add(driver, "hypervisor", self.hypervisor)
        add(driver, "version", ".".join(map(str, self.version)))

        return etree.tostring(root, encoding="unicode", pretty_print=True)

    @classmethod
    def from_xml(cls, text: str | bytes) -> Self:
        """Read a document.

        :param text: at most 1 MiB in UTF-8; bytes are UTF-8, whatever an XML declaration says.
        :raises CapabilitiesError: too large, not well-formed, with a document type declaration, or not what the schema
            describes; ``line`` is 1-based, or None where the fault is not in one line.
        :source: libvirt, docs/formatcaps.rst.
        """
        root = _parse(text)
        _validate(root)
        # From here on the schema vouches for every element and its form.
        arch = root.findtext("host/cpu/arch", "")
        (guest_arch,) = root.iterfind("guest/arch")
        if guest_arch.get("name") != arch:
            raise CapabilitiesError(
                f"capabilities/guest/arch is {guest_arch.get('name')}, but capabilities/host/cpu/arch is {arch}: "
                "both must name the host's architecture",
                line=_line(guest_arch),
            )
        (migration_features,) = root.iterfind("host/migration_features")
        offered = _distinct(list(migration_features), lambda element: str(element.tag), _MAX_ELEMENTS)
        memory = root.findtext("host/memory")
        return cls(
            scheme=root.findtext("driver/scheme", ""),
            hypervisor=root.findtext("driver/hypervisor", ""),
            version=tuple(map(int, root.findtext("driver/version", "").split("."))),
            arch=arch,
            host_uuid=root.findtext("host/uuid", ""),
            cpu_model=root.findtext("host/cpu/model", ""),
            machines=_distinct(guest_arch.findall("machine"), _text, _MAX_MACHINES),
            memory_bytes=None if memory is None else int(memory),
            features=frozenset(feature for feature in Feature if feature.value in offered),
            uri_transports=_distinct(
                migration_features.findall("uri_transports/uri_transport"), _text, _MAX_NAMES
            ),
            domain_types=_distinct(
                guest_arch.findall("domain"), lambda element: element.get("type", ""), _MAX_NAMES
            ),
        )


# Values


def _check_text(field: str, value: object, form: _Form) -> None:
    if not isinstance(value, str) or len(value) > form.max_length or not form.pattern.fullmatch(value):
        raise CapabilitiesError(f"{field} must be {form.words}, not {_refused(value)}")


def _check_texts(field: str, values: object, form: _Form, limit: int) -> None:
    if not isinstance(values, tuple) or len(values) > limit:
        raise CapabilitiesError(f"{field} must be a tuple of at most {limit} texts")
    for value in values:
        _check_text(f"each of {field}", value, form)
    if len(set(values)) != len(values):
        raise CapabilitiesError(f"{field} must not hold a text twice")


def _check_version(version: object) -> None:
    if (
        not isinstance(version, tuple)
        or not 1 <= len(version) <= _MAX_VERSION_PARTS
        or not all(type(part) is int and 0 <= part <= _MAX_VERSION_PART for part in version)
    ):
        raise CapabilitiesError(
            f"version must be a tuple of 1 to {_MAX_VERSION_PARTS} whole numbers from 0 to {_MAX_VERSION_PART}"
        )


def _check_memory(memory_bytes: object) -> None:
    if memory_bytes is not None and (
        type(memory_bytes) is not int or not 1 <= memory_bytes <= _MAX_MEMORY_BYTES
    ):
        raise CapabilitiesError(f"memory_bytes must be None or a whole number from 1 to {_MAX_MEMORY_BYTES}")


def _check_features(features: object) -> None:
    if not isinstance(features, frozenset) or not all(isinstance(feature, Feature) for feature in features):
        raise CapabilitiesError("features must be a frozenset of Feature")


def _refused(value: object) -> str:
    # Only of texts is it known that they have a repr, and that it costs little.
    return (
        f"{value[:_SHOWN_CHARACTERS]!a}"
        if isinstance(value, str)
        else f"a value of type {type(value).__name__}"
    )


# Documents


def _parse(text: object) -> _Element:
    """Parse a document that may come from anybody; nothing is known of the result but its size."""
    from lxml import etree

    data = _encode(text)
    # Comments and CDATA sections with these characters are refused as well, which hurts nobody: telling them from a
    # declaration would take the parser that is not to see one.
    declaration = data.find(b"<!DOCTYPE")
    if declaration >= 0:
        raise CapabilitiesError(
            "the capabilities have a document type declaration: remove it",
            line=data.count(b"\n", 0, declaration) + 1,
        )
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise CapabilitiesError(
            f"the capabilities are not well-formed XML: {_one_line(error.msg or 'no element found')}",
            line=error.lineno or None,
        ) from error
    for count, element in enumerate(root.iter(), start=1):
        if count > _MAX_ELEMENTS:
            raise CapabilitiesError(
                f"the capabilities have more than {_MAX_ELEMENTS} elements, <{_one_line(str(element.tag))}> being "
                "the first too many",
                line=_line(element),
            )
    return root


def _encode(text: object) -> bytes:
    # One character is at least one byte, so the first test spares the encoding of a text that is far too long.
    if not isinstance(text, (str, bytes)):
        raise CapabilitiesError(f"capabilities are parsed from str or bytes, not from {type(text).__name__}")
    if len(text) <= MAX_CAPABILITIES_BYTES:
        try:
            data = text.encode() if isinstance(text, str) else text
            data.decode()
        except UnicodeError as error:
            raise CapabilitiesError("the capabilities hold characters that are not UTF-8") from error
        if len(data) <= MAX_CAPABILITIES_BYTES:
            return data
    raise CapabilitiesError(f"the capabilities are longer than {MAX_CAPABILITIES_BYTES} bytes")


@cache
def _schema_source() -> bytes:
    from importlib.resources import files

    return files("ferryman").joinpath(_SCHEMA).read_bytes()


# libxml2 speaks of these in terms of its own; it describes the others well.
_REASONS_OF_TEXT = {
    "RELAXNG_ERR_DATATYPE": "it must hold a text of the form that the schema gives",
    "RELAXNG_ERR_TYPEVAL": "it must hold a text of the form that the schema gives",
    "RELAXNG_ERR_VALUE": "it must hold the text that the schema gives",
}
_REASONS = _REASONS_OF_TEXT | {
    "RELAXNG_ERR_ATTRVALID": "an attribute is missing or has a value that the schema does not allow",
    "RELAXNG_ERR_NOELEM": "an element is missing in it",
}


def _validate(root: _Element) -> None:
    from lxml import etree

    # A validator keeps the errors of its last document, so that two threads cannot share one; a new one costs 0.3 ms.
    schema = etree.RelaxNG(etree.fromstring(_schema_source()))
    if schema.validate(root):
        return
    # libxml2 lists the fault first and then the elements that it spoils; it may also refuse without a word.
    log: Any = schema.error_log
    fault = next(iter(log), None)
    if fault is None:
        raise CapabilitiesError(f"the capabilities do not follow the schema: see {_SCHEMA}")
    path = (fault.path or "").lstrip("/")
    reason = _REASONS.get(fault.type_name) or _one_line(fault.message)
    if fault.type_name in _REASONS_OF_TEXT:
        reason += f", not {_refused(root.findtext(path.removeprefix('capabilities/'), ''))}"
    raise CapabilitiesError(
        f"the capabilities do not follow the schema at {_one_line(path)}: {reason}", line=fault.line or None
    )


def _distinct(elements: Sequence[_Element], read: Callable[[_Element], str], limit: int) -> tuple[str, ...]:
    """Read siblings that must differ, and of which there may be so many."""
    texts: dict[str, None] = {}
    for element in elements:
        text = read(element)
        if text in texts or len(texts) == limit:
            reason = "stands twice" if text in texts else f"is one too many: there may be {limit}"
            where = "/".join(str(ancestor.tag) for ancestor in reversed(list(element.iterancestors())))
            raise CapabilitiesError(f"in {where}, {_one_line(text)} {reason}", line=_line(element))
        texts[text] = None
    return tuple(texts)


def _text(element: _Element) -> str:
    return element.text or ""


def _line(element: _Element) -> int | None:
    line: Any = element.sourceline
    return line if isinstance(line, int) else None


def _one_line(text: str) -> str:
    """Make a text of the parser's, which quotes the document, fit for an error's sentence."""
    shown = " ".join(text.split()).encode("ascii", "backslashreplace").decode("ascii")
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."


# Negotiation

_SOURCE = (Side.SOURCE,)
_DESTINATION = (Side.DESTINATION,)
_BOTH = (Side.SOURCE, Side.DESTINATION)

FEATURE_SIDES: Final[dict[Feature, tuple[Side, ...]]] = {
    Feature.LIVE: _BOTH,
    Feature.RENAME: _DESTINATION,
    Feature.BANDWIDTH: _SOURCE,
    Feature.BANDWIDTH_IN_FLIGHT: _SOURCE,
    Feature.MAX_DOWNTIME: _SOURCE,
    Feature.MAX_DOWNTIME_IN_FLIGHT: _SOURCE,
    Feature.ABORT: _SOURCE,
    Feature.PAUSED: _DESTINATION,
    Feature.PERSIST: _DESTINATION,
    Feature.UNDEFINE_SOURCE: _SOURCE,
    Feature.LISTEN_ADDRESS: _DESTINATION,
    Feature.PORT_RANGE: _DESTINATION,
    Feature.STREAMS: _BOTH,
    Feature.COMPRESSION: _BOTH,
    Feature.ZERO_COPY: _SOURCE,
    Feature.AUTO_CONVERGE: _SOURCE,
    Feature.POSTCOPY: _BOTH,
    Feature.TLS: _BOTH,
    Feature.REDEFINE: _DESTINATION,
    Feature.COPY_STORAGE: _BOTH,
}
"""The sides whose drivers must have a feature before a migration can use it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionOutcome:
    """What becomes of one option that was asked for.

    :param option: a field of :class:`~ferryman.types.MigrationOptions`.
    :param feature: what the option needs; :data:`FEATURE_SIDES` says where.
    :param used: False if the option is dropped.
    :param reason: one sentence that names the side, and the driver by its scheme.
    """

    option: str
    feature: Feature
    used: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Negotiation:
    """What a pair of hosts makes of the options of a migration.

    :param options: one outcome for each option that was asked for, in the order of ``MigrationOptions.asked()``.
    :param transports: protocols of migration URIs that both hosts know, in the source's order of preference.
    :param live: whether both hosts can migrate a guest that runs.
    """

    options: tuple[OptionOutcome, ...]
    transports: tuple[str, ...]
    live: bool

    def effective(self, options: MigrationOptions) -> MigrationOptions:
        """Give the options that were negotiated with the dropped ones at their defaults, best-effort or not."""
        default = MigrationOptions()
        return replace(
            options,
            **{
                outcome.option: getattr(default, outcome.option)
                for outcome in self.options
                if not outcome.used
            },
        )

    def refused(self, options: MigrationOptions) -> tuple[OptionOutcome, ...]:
        """Give the dropped options that the caller did not allow to be dropped."""
        return tuple(
            outcome
            for outcome in self.options
            if not outcome.used and outcome.option not in options.best_effort
        )


def negotiate(source: Capabilities, destination: Capabilities, options: MigrationOptions) -> Negotiation:
    """Say for each option that is asked for whether this pair of hosts can honour it, and which side cannot."""
    hosts = {Side.SOURCE: source, Side.DESTINATION: destination}
    return Negotiation(
        options=tuple(_outcome(option, hosts) for option in options.asked()),
        transports=tuple(name for name in source.uri_transports if name in destination.uri_transports),
        live=not _lacking(Feature.LIVE, hosts),
    )


def _lacking(feature: Feature, hosts: dict[Side, Capabilities]) -> tuple[Side, ...]:
    return tuple(side for side in FEATURE_SIDES[feature] if feature not in hosts[side].features)


def _outcome(option: str, hosts: dict[Side, Capabilities]) -> OptionOutcome:
    feature = OPTION_FEATURES[option]
    lacking = _lacking(feature, hosts)
    places = " and ".join(
        f"the {side.value} (driver {hosts[side].scheme})" for side in lacking or FEATURE_SIDES[feature]
    )
    return OptionOutcome(
        option=option,
        feature=feature,
        used=not lacking,
        reason=f"{option} needs {feature.value}, which is {'not ' if lacking else ''}supported by {places}",
    )
