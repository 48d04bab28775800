"""The data that Ferryman's users, drivers and observers exchange: frozen, keyword-only, no I/O.

Units live in the names: ``_bytes``, ``_s``, ``_ms``, ``_bytes_per_s``.  ``None`` means "not measured" or "not set",
never zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import NewType

from ferryman.errors import OptionError

MigrationId = NewType("MigrationId", str)
"""32 lower-case hexadecimal digits, made by the source at begin; an id is prepared, performed and decided once."""

DomainUUID = NewType("DomainUUID", str)
"""A uuid in its canonical lower-case form with dashes."""


class Side(Enum):
    """One of the two ends of a migration."""

    SOURCE = "source"
    DESTINATION = "destination"


class Phase(Enum):
    """The five phases, in their order."""

    BEGIN = "begin"
    PREPARE = "prepare"
    PERFORM = "perform"
    FINISH = "finish"
    CONFIRM = "confirm"


class GuestState(Enum):
    """Where the guest is, as far as can be told."""

    SOURCE = "source"
    DESTINATION = "destination"
    IN_DOUBT = "in-doubt"
    GONE = "gone"

    @property
    def sentence(self) -> str:
        """The state in plain words, for messages."""
        return _GUEST_SENTENCES[self]


_GUEST_SENTENCES = {
    GuestState.SOURCE: "at the source",
    GuestState.DESTINATION: "at the destination",
    GuestState.IN_DOUBT: "in doubt, stopped at the source until the destination answers",
    GuestState.GONE: "gone, the domain is shut off",
}


class DomainState(Enum):
    """What a domain does now."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTTING_DOWN = "shutting-down"
    SHUT_OFF = "shut-off"
    CRASHED = "crashed"

    @property
    def active(self) -> bool:
        """Whether the domain has a process at its hypervisor and so can be migrated live."""
        return self in (DomainState.RUNNING, DomainState.PAUSED, DomainState.SHUTTING_DOWN)


class DomainEventKind(Enum):
    """What happened to a domain."""

    DEFINED = "defined"
    UNDEFINED = "undefined"
    STARTED = "started"
    """Its guest runs, or waits paused: after a start, a create or a restore, which ``detail`` tells apart."""
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    REBOOTED = "rebooted"
    """The machine was reset, by the guest or by its host; the hypervisor's process is the same."""
    PANICKED = "panicked"
    """The guest's kernel gave up; what follows is the definition's ``<on_crash>``."""
    MEMORY_CHANGED = "memory-changed"
    """The balloon leaves the guest another amount of memory: ``detail`` is the number of bytes."""
    AGENT_CONNECTED = "agent-connected"
    """The agent inside the guest listens; whoever asks for it when it does not is refused."""
    AGENT_GONE = "agent-gone"
    SHUT_DOWN = "shut-down"
    """The guest shut itself down, asked or not."""
    DESTROYED = "destroyed"
    """Its host ended it."""
    SAVED = "saved"
    """Its state is in a file, and it is shut off."""
    CRASHED = "crashed"
    """The hypervisor's process ended by itself, or the guest panicked and was ended for it."""
    MIGRATED_IN = "migrated-in"
    MIGRATED_OUT = "migrated-out"


class ShutdownMode(Enum):
    """How a guest is asked to shut down or to reboot."""

    DEFAULT = "default"
    """Through the guest agent where it is connected, else by ACPI."""
    ACPI = "acpi"
    """By the power button, which the guest may ignore."""
    AGENT = "agent"
    """Through the guest agent."""


class Scope(Enum):
    """What a change of a domain is to reach."""

    CURRENT = "current"
    """The guest of an active domain, and the definition of one that is shut off."""
    LIVE = "live"
    """The guest, until it ends."""
    CONFIG = "config"
    """The persistent definition, from the next start on."""
    BOTH = "both"

    def reaches_guest(self, *, active: bool) -> bool:
        """Whether the guest itself is to change."""
        return self in (Scope.LIVE, Scope.BOTH) or (self is Scope.CURRENT and active)

    def reaches_definition(self, *, active: bool) -> bool:
        """Whether the persistent definition is to change."""
        return self in (Scope.CONFIG, Scope.BOTH) or (self is Scope.CURRENT and not active)


class Feature(Enum):
    """What a driver can do in a migration; the value is the element's name in ``<migration_features>``.

    ``live``, ``rename`` and ``bandwidth`` are those of the 2007 review; the others are what the field has added.
    """

    LIVE = "live"
    RENAME = "rename"
    BANDWIDTH = "bandwidth"
    BANDWIDTH_IN_FLIGHT = "bandwidth_in_flight"
    MAX_DOWNTIME = "max_downtime"
    MAX_DOWNTIME_IN_FLIGHT = "max_downtime_in_flight"
    ABORT = "abort"
    PAUSED = "paused"
    PERSIST = "persist"
    UNDEFINE_SOURCE = "undefine_source"
    LISTEN_ADDRESS = "listen_address"
    PORT_RANGE = "port_range"
    STREAMS = "streams"
    COMPRESSION = "compression"
    ZERO_COPY = "zero_copy"
    AUTO_CONVERGE = "auto_converge"
    POSTCOPY = "postcopy"
    TLS = "tls"
    REDEFINE = "redefine"
    COPY_STORAGE = "copy_storage"


class Compression(Enum):
    """How the transfer is made smaller.

    XBZRLE sends what changed in a page that was sent before; ZLIB and ZSTD compress the streams of a transfer that has
    several.
    """

    XBZRLE = "xbzrle"
    ZLIB = "zlib"
    ZSTD = "zstd"


class Postcopy(Enum):
    """When the guest may go on at the destination before all of its memory is there.

    From then on it is lost if either host, or for good the network between them, is.
    """

    ON_REQUEST = "on-request"
    AFTER_FIRST_PASS = "after-first-pass"


class StorageCopy(Enum):
    """What is copied of disks that the two hosts do not share."""

    FULL = "full"
    """Everything, into a file of its own."""
    TOP = "top"
    """What stands on the base image, which the destination has already at the same path."""


class TimeoutAction(Enum):
    """What is done with a transfer that takes too long."""

    ABORT = "abort"
    SUSPEND = "suspend"
    """Pause the guest, so that its memory changes no more; it runs again where it ends up."""
    POSTCOPY = "postcopy"


class FindingSeverity(Enum):
    """Whether a finding of the plan stops the migration."""

    BLOCKER = "blocker"
    WARNING = "warning"


class GuestEvidence(Enum):
    """What the hypervisor says of the guest's process that a row names."""

    RUNNING = "running"
    STOPPED = "stopped"
    """It stands still, and nothing says that it ever ran here."""
    HALTED = "halted"
    """It stands still in a state that a guest reaches by running: panicked, shut down, failed by its disk."""
    GONE = "gone"
    UNKNOWN = "unknown"


class TransferEvidence(Enum):
    """What the hypervisor says of the transfer that a source's row is about."""

    NONE = "none"
    ACTIVE = "active"
    """Until it ends, the hypervisor may resume the guest by itself."""
    FAILED = "failed"
    COMPLETED = "completed"
    SWITCHED = "switched"
    """Post-copy: the destination has the device state, the source can no longer resume, pages are still to be sent."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """The hypervisor's word, gathered now, about the process that a row names."""

    guest: GuestEvidence
    transfer: TransferEvidence = TransferEvidence.UNKNOWN


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that the plan found, with its remedy.

    :param code: kebab-case, stable; docs/reference/findings.md lists them.
    :param side: where it was found, or None where it is about the pair.
    :param message: one sentence that says what is.
    :param remedy: one sentence that says what to do.
    """

    code: str
    severity: FindingSeverity
    side: Side | None
    message: str
    remedy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainInfo:
    """A domain as its host knows it now.

    Two are equal where a migration planned for one still fits the other, so what may change meanwhile does not count.

    :param memory_bytes: memory that the guest is given at start.
    :param persistent: whether the definition outlives the guest.
    :param autostart: whether the domain is started when its host has booted.
    :param current_memory_bytes: memory that the balloon leaves the guest now.
    :param max_vcpus: virtual processors that the guest can have without a restart.
    """

    name: str
    uuid: DomainUUID
    state: DomainState
    persistent: bool
    memory_bytes: int
    vcpus: int
    autostart: bool = field(default=False, compare=False)
    current_memory_bytes: int | None = field(default=None, compare=False)
    max_vcpus: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskStatistics:
    """Counters of one disk since the guest was started on this host; None where the driver does not measure.

    :param target: as the definition names it, such as ``vda``.
    :param read_time_ns: time that all reads together have taken; likewise of writes and flushes.
    :param capacity_bytes: size that the guest sees.
    :param allocation_bytes: of that, what takes room on the host.
    :param physical_bytes: size of the file or the device on the host.
    """

    target: str
    read_requests: int | None = None
    read_bytes: int | None = None
    read_time_ns: int | None = None
    write_requests: int | None = None
    write_bytes: int | None = None
    write_time_ns: int | None = None
    flush_requests: int | None = None
    flush_time_ns: int | None = None
    capacity_bytes: int | None = None
    allocation_bytes: int | None = None
    physical_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class InterfaceStatistics:
    """Counters of one network interface as the guest sees it; None where the driver does not measure.

    :param target: the interface's name on the host; '' where it has none.
    :param mac: the guest's address, in lower case with colons.
    """

    target: str
    mac: str = ""
    rx_bytes: int | None = None
    rx_packets: int | None = None
    rx_errors: int | None = None
    rx_drops: int | None = None
    tx_bytes: int | None = None
    tx_packets: int | None = None
    tx_errors: int | None = None
    tx_drops: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainStatistics:
    """Counters of one domain; None where the driver does not measure.

    :param cpu_time_s: processor time that the hypervisor's process has used.
    :param resident_bytes: host memory in use by that process.
    :param current_memory_bytes: memory that the balloon leaves the guest.
    :param vcpu_time_s: processor time of each virtual processor, in their order; empty where it is not measured.
    """

    state: DomainState
    cpu_time_s: float | None = None
    resident_bytes: int | None = None
    current_memory_bytes: int | None = None
    vcpu_time_s: tuple[float, ...] = ()
    disks: tuple[DiskStatistics, ...] = ()
    interfaces: tuple[InterfaceStatistics, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Screenshot:
    """A picture of a guest's screen.

    :param media_type: such as ``image/png``.
    """

    media_type: str
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainEvent:
    """Something happened to a domain.

    :param time_s: wall clock, seconds since the epoch; for people, never compared.
    :param detail: why, in a word or two; of a crash the last that the hypervisor's process printed.
    """

    kind: DomainEventKind
    name: str
    uuid: DomainUUID
    time_s: float
    detail: str = ""


_MAX_BANDWIDTH_BYTES_PER_S = 1 << 50
_MAX_DOWNTIME_MS = 2_000_000


_MAX_TEXT = 4096
_ZLIB_LEVELS = 9
_THROTTLES = ("throttle_initial_percent", "throttle_increment_percent", "throttle_max_percent")
_SWITCHES = (
    "paused",
    "persist",
    "undefine_source",
    "zero_copy",
    "auto_converge",
    "tls",
    "copy_synchronously",
)
_TEXTS = {
    "name": _MAX_TEXT,
    "migration_uri": _MAX_TEXT,
    "listen_address": _MAX_TEXT,
    "tls_name": 255,
    "graphics_address": 255,
    "destination_definition": 1_048_576,
}
_KINDS: dict[str, type[Enum]] = {
    "compression": Compression,
    "postcopy": Postcopy,
    "timeout_action": TimeoutAction,
    "copy_storage": StorageCopy,
}
_NUMBERS = {
    "bandwidth_bytes_per_s": (1, _MAX_BANDWIDTH_BYTES_PER_S, "bytes per second"),
    "max_downtime_ms": (1, _MAX_DOWNTIME_MS, "milliseconds"),
    "streams": (1, 64, "connections"),
    "compression_level": (1, 20, ""),
    "xbzrle_cache_bytes": (65_536, 1 << 40, "bytes"),
    **dict.fromkeys(
        ("postcopy_bandwidth_bytes_per_s", "copy_bandwidth_bytes_per_s"),
        (1, _MAX_BANDWIDTH_BYTES_PER_S, "bytes per second"),
    ),
    **dict.fromkeys(_THROTTLES, (1, 99, "percent")),
}


def _need_int(option: str, value: object, low: int, high: int, unit: str) -> None:
    if type(value) is not int or not low <= value <= high:
        raise OptionError(
            f"{option} must be a whole number from {low} to {high}{unit and ' '}{unit}, not {value!r}",
            option=option,
        )


def _need_seconds(option: str, value: object, high: float) -> None:
    if type(value) not in (int, float) or not 0 < value <= high:  # type: ignore[operator]
        raise OptionError(
            f"{option} must be a number of seconds above 0 and up to {high:g}, not {value!r}", option=option
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationOptions:
    """What the caller asks of one migration; checked when built, and against both hosts by the plan.

    An option left at its default asks for nothing.  An option that a host cannot honour is a blocker of the plan,
    unless its field's name stands in ``best_effort``: then it is dropped, and the plan says so.

    :param name: the domain's name at the destination; None keeps it.
    :param migration_uri: where the source connects to; None lets the destination propose one.
    :param listen_address: address on which the destination listens; None is loopback or what the driver proposes.
    :param bandwidth_bytes_per_s: cap of the transfer, 1 to 2**50; None is no cap.
    :param max_downtime_ms: longest stop that the hypervisor may plan for, 1 to 2,000,000; None is its default.
    :param paused: leave the guest paused at the destination. A guest that is paused when the migration begins
        stays paused without this option.
    :param persist: make the domain persistent at the destination.
    :param undefine_source: remove the definition at the source once the guest runs at the destination.
    :param port_range: first and last port that the destination may listen on.
    :param streams: number of connections that memory is sent over, 1 to 64; None is one, without the cost of several.
    :param compression: how the transfer is made smaller.
    :param compression_level: of ZLIB 1 to 9, of ZSTD 1 to 20.
    :param xbzrle_cache_bytes: memory at the source for pages as they were sent last, 64 KiB to 2**40.
    :param zero_copy: let the network card read the guest's memory; needs ``streams`` and memory that may be locked.
    :param auto_converge: slow the guest's processors down while it writes faster than the transfer sends.
    :param throttle_initial_percent: how much at first, 1 to 99.
    :param throttle_increment_percent: how much more after each pass that did not help, 1 to 99.
    :param throttle_max_percent: how much at most, 1 to 99.
    :param postcopy: let the guest go on at the destination before all of its memory is there.
        A guest that is split so is lost if either host is, or the network between them for good.
    :param postcopy_bandwidth_bytes_per_s: cap of what is sent after that, 1 to 2**50; None is no cap.
    :param timeout_s: after how long ``timeout_action`` is taken, counted from the transfer's begin.
    :param tls: encrypt the transfer, with the credentials of both hosts.
    :param tls_name: name that the destination's certificate must bear; None is the host in the migration URI.
    :param destination_definition: the definition that the destination is to build, in place of the source's; the
        machine that it describes must be the same one.
    :param disks: pairs of a disk's target (``vda``) and its path at the destination, where that differs.
    :param copy_storage: copy disks that the hosts do not share while the guest runs; None copies none.
    :param copy_disks: targets of the disks to copy; none are all that are writable and not shared.
    :param copy_bandwidth_bytes_per_s: cap of the copy of each disk, 1 to 2**50; None is no cap.
    :param copy_synchronously: let the guest's writes wait until they are at both ends, so that the copy always ends.
    :param graphics_address: address on which the destination serves the guest's display.
    :param best_effort: names of options that may be dropped where they are not supported.
    :param lease_s: how long an undecided destination keeps its reservation after the last sign of its caller.
    :param patience_s: how long a caller waits for an answer that decides the migration before it is in doubt.
    :raises OptionError: a value is out of range, or an unknown option is named as best effort.
    """

    name: str | None = None
    migration_uri: str | None = None
    listen_address: str | None = None
    bandwidth_bytes_per_s: int | None = None
    max_downtime_ms: int | None = None
    paused: bool = False
    persist: bool = False
    undefine_source: bool = False
    port_range: tuple[int, int] | None = None
    streams: int | None = None
    compression: Compression | None = None
    compression_level: int | None = None
    xbzrle_cache_bytes: int | None = None
    zero_copy: bool = False
    auto_converge: bool = False
    throttle_initial_percent: int | None = None
    throttle_increment_percent: int | None = None
    throttle_max_percent: int | None = None
    postcopy: Postcopy | None = None
    postcopy_bandwidth_bytes_per_s: int | None = None
    timeout_s: float | None = None
    timeout_action: TimeoutAction = TimeoutAction.ABORT
    tls: bool = False
    tls_name: str | None = None
    destination_definition: str | None = None
    disks: tuple[tuple[str, str], ...] = ()
    graphics_address: str | None = None
    copy_storage: StorageCopy | None = None
    copy_disks: tuple[str, ...] = ()
    copy_bandwidth_bytes_per_s: int | None = None
    copy_synchronously: bool = False
    best_effort: frozenset[str] = frozenset()
    lease_s: float = 30.0
    patience_s: float = 30.0

    def __post_init__(self) -> None:
        for option, longest in _TEXTS.items():
            text = getattr(self, option)
            if text is not None and (not isinstance(text, str) or not text.strip() or len(text) > longest):
                raise OptionError(
                    f"{option} must be a text of 1 to {longest} characters, not {text!r:.80}", option=option
                )
        for option, (low, high, unit) in _NUMBERS.items():
            if getattr(self, option) is not None:
                _need_int(option, getattr(self, option), low, high, unit)
        for option in _SWITCHES:
            if type(getattr(self, option)) is not bool:
                raise OptionError(
                    f"{option} must be True or False, not {getattr(self, option)!r:.80}", option=option
                )
        for option, kind in _KINDS.items():
            value = getattr(self, option)
            if value is not None and not isinstance(value, kind):
                words = " or ".join(f"{kind.__name__}.{member.name}" for member in kind)
                raise OptionError(f"{option} must be {words}, not {value!r:.80}", option=option)
        if self.timeout_s is not None:
            _need_seconds("timeout_s", self.timeout_s, 604_800)
        self._check_ports()
        self._check_disks()
        self._check_copies()
        self._check_together()
        _need_seconds("lease_s", self.lease_s, 86_400)
        _need_seconds("patience_s", self.patience_s, 86_400)
        if not isinstance(self.best_effort, frozenset):
            raise OptionError("best_effort must be a frozenset of option names", option="best_effort")
        unknown = sorted(str(name) for name in self.best_effort - OPTION_FEATURES.keys())
        if unknown:
            raise OptionError(
                f"best_effort names {', '.join(unknown)}, but only {', '.join(OPTION_FEATURES)} can be dropped",
                option="best_effort",
            )

    def _check_ports(self) -> None:
        ports: object = self.port_range
        if ports is None:
            return
        if not isinstance(ports, tuple) or len(ports) != 2:
            raise OptionError(
                "port_range must be a pair of ports, the first and the last", option="port_range"
            )
        for port in ports:
            _need_int("port_range", port, 1, 65_535, "as a port")
        if ports[0] > ports[1]:
            raise OptionError(
                f"port_range begins at {ports[0]}, after its end {ports[1]}", option="port_range"
            )

    def _check_disks(self) -> None:
        pairs: object = self.disks
        whole = isinstance(pairs, tuple) and all(
            isinstance(pair, tuple)
            and len(pair) == 2
            and all(isinstance(text, str) and 0 < len(text) <= _MAX_TEXT for text in pair)
            for pair in pairs
        )
        if not whole or len({target for target, _ in self.disks}) != len(self.disks):
            raise OptionError(
                "disks must give a path for each target once, as (('vda', '/path'),)", option="disks"
            )

    def _check_copies(self) -> None:
        targets: object = self.copy_disks
        whole = isinstance(targets, tuple) and all(
            isinstance(target, str) and 0 < len(target) <= _MAX_TEXT for target in targets
        )
        if not whole or len(set(self.copy_disks)) != len(self.copy_disks):
            raise OptionError("copy_disks must name each target once, as ('vda',)", option="copy_disks")

    def _check_together(self) -> None:
        """Refuse an option that means nothing without another; what a host makes of both is the plan's to say."""
        needs = (
            (
                "compression_level",
                self.compression in (Compression.ZLIB, Compression.ZSTD),
                "compression ZLIB or ZSTD",
            ),
            ("xbzrle_cache_bytes", self.compression is Compression.XBZRLE, "compression XBZRLE"),
            *((name, self.auto_converge, "auto_converge") for name in _THROTTLES),
            ("postcopy_bandwidth_bytes_per_s", self.postcopy is not None, "postcopy"),
            ("tls_name", self.tls, "tls"),
            *(
                (name, self.copy_storage is not None, "copy_storage")
                for name in ("copy_disks", "copy_bandwidth_bytes_per_s", "copy_synchronously")
            ),
        )
        for option, there, what in needs:
            if getattr(self, option) not in (None, False, ()) and not there:
                raise OptionError(f"{option} means nothing without {what}", option=option)
        if self.compression is Compression.ZLIB and (self.compression_level or 0) > _ZLIB_LEVELS:
            raise OptionError(
                f"compression_level of ZLIB is at most {_ZLIB_LEVELS}, not {self.compression_level}",
                option="compression_level",
            )

    def asked(self) -> tuple[str, ...]:
        """Names of the options that ask for a feature, in the order of their declaration."""
        return tuple(
            option.name
            for option in fields(self)
            if option.name in OPTION_FEATURES and getattr(self, option.name) not in (None, False, ())
        )


OPTION_FEATURES: dict[str, Feature] = {
    "name": Feature.RENAME,
    "listen_address": Feature.LISTEN_ADDRESS,
    "bandwidth_bytes_per_s": Feature.BANDWIDTH,
    "max_downtime_ms": Feature.MAX_DOWNTIME,
    "paused": Feature.PAUSED,
    "persist": Feature.PERSIST,
    "undefine_source": Feature.UNDEFINE_SOURCE,
    "port_range": Feature.PORT_RANGE,
    "streams": Feature.STREAMS,
    "compression": Feature.COMPRESSION,
    "compression_level": Feature.COMPRESSION,
    "xbzrle_cache_bytes": Feature.COMPRESSION,
    "zero_copy": Feature.ZERO_COPY,
    "auto_converge": Feature.AUTO_CONVERGE,
    "throttle_initial_percent": Feature.AUTO_CONVERGE,
    "throttle_increment_percent": Feature.AUTO_CONVERGE,
    "throttle_max_percent": Feature.AUTO_CONVERGE,
    "postcopy": Feature.POSTCOPY,
    "postcopy_bandwidth_bytes_per_s": Feature.POSTCOPY,
    "tls": Feature.TLS,
    "tls_name": Feature.TLS,
    "destination_definition": Feature.REDEFINE,
    "disks": Feature.REDEFINE,
    "graphics_address": Feature.REDEFINE,
    "copy_storage": Feature.COPY_STORAGE,
    "copy_disks": Feature.COPY_STORAGE,
    "copy_bandwidth_bytes_per_s": Feature.COPY_STORAGE,
    "copy_synchronously": Feature.COPY_STORAGE,
}
"""The feature that each droppable option of :class:`MigrationOptions` needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """A change to a running migration; None leaves a setting as it is.  Ranges as in :class:`MigrationOptions`.

    :param bandwidth_bytes_per_s: new cap; 0 removes it.
    :param postcopy_bandwidth_bytes_per_s: new cap of what is sent in post-copy; 0 removes it.
    :param copy_bandwidth_bytes_per_s: new cap of the copy of each disk; 0 removes it.
    :param postcopy: True switches to post-copy.
    """

    bandwidth_bytes_per_s: int | None = None
    max_downtime_ms: int | None = None
    postcopy: bool = False
    postcopy_bandwidth_bytes_per_s: int | None = None
    copy_bandwidth_bytes_per_s: int | None = None

    def __post_init__(self) -> None:
        for option in (
            "bandwidth_bytes_per_s",
            "postcopy_bandwidth_bytes_per_s",
            "copy_bandwidth_bytes_per_s",
        ):
            if getattr(self, option) is not None:
                _need_int(option, getattr(self, option), 0, _MAX_BANDWIDTH_BYTES_PER_S, "bytes per second")
        if self.max_downtime_ms is not None:
            _need_int("max_downtime_ms", self.max_downtime_ms, 1, _MAX_DOWNTIME_MS, "milliseconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferStatistics:
    """Counters of a transfer, cumulative; None where the driver does not measure.

    :param iteration: 1 is the first pass over the memory.
    :param transferred_bytes: bytes sent so far, of memory and device state.
    :param remaining_bytes: memory still to send; it can rise while the guest writes.
    :param total_bytes: the guest's memory.
    :param dirty_bytes_per_s: rate at which the guest makes sent memory stale.
    :param bandwidth_bytes_per_s: rate of the transfer now.
    :param expected_downtime_ms: the hypervisor's estimate of the stop, were it to switch over now.
    :param downtime_ms: the stop as the hypervisor measured it; known at the end.
    :param setup_ms: time until the first byte of memory was sent.
    :param total_ms: the hypervisor's own duration of the transfer; known at the end.
    :param throttle_percent: how much the guest's processors are slowed down now.
    :param postcopy: pages are being sent to a guest that runs at the destination already.
    :param storage_bytes: copied of disks so far.
    :param storage_total_bytes: to be copied of disks; it grows with what the guest writes.
    """

    iteration: int | None = None
    transferred_bytes: int | None = None
    remaining_bytes: int | None = None
    total_bytes: int | None = None
    dirty_bytes_per_s: int | None = None
    bandwidth_bytes_per_s: int | None = None
    expected_downtime_ms: float | None = None
    downtime_ms: float | None = None
    setup_ms: float | None = None
    total_ms: float | None = None
    throttle_percent: int | None = None
    postcopy: bool = False
    storage_bytes: int | None = None
    storage_total_bytes: int | None = None

    @property
    def estimate_s(self) -> float | None:
        """Seconds until the rest could be sent at today's rates; infinite where the guest writes faster."""
        if self.remaining_bytes is None or not self.bandwidth_bytes_per_s:
            return None
        net = self.bandwidth_bytes_per_s - (self.dirty_bytes_per_s or 0)
        return self.remaining_bytes / net if net > 0 else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseEvent:
    """A phase began or ended.

    :param elapsed_ms: since the migration's call.
    :param error: code of the error with which the phase ended, or None.
    """

    phase: Phase
    side: Side
    ended: bool
    elapsed_ms: float
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressEvent:
    """A sample of the transfer's counters.

    :param elapsed_ms: since the migration's call.
    """

    statistics: TransferStatistics
    elapsed_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SettledEvent:
    """The last event of every migration: where the guest is.

    :param elapsed_ms: since the migration's call.
    :param error: code of the error with which the migration ended, or None for success.
    """

    guest_state: GuestState
    elapsed_ms: float
    error: str | None = None


MigrationEvent = PhaseEvent | ProgressEvent | SettledEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationResult:
    """A migration that succeeded: the guest is at the destination.

    :param name: the domain's name at the destination.
    :param total_ms: the whole call, as the caller saw it, plan not included.
    :param setup_ms: from the call to the first byte of the transfer.
    :param downtime_ms: the stop as the hypervisor measured it, or None.
    :param blackout_ms: from the guest's stop at the source to the answer of the command that ran it at the
        destination: an upper bound, measured on one clock; None for a guest that was paused.
    :param transferred_bytes: bytes sent.
    :param iterations: passes over the memory.
    :param phase_ms: duration of each phase; prepare runs beside begin's preparations, so the sum may exceed the total.
    """

    migration_id: MigrationId
    uuid: DomainUUID
    name: str
    source: str
    destination: str
    total_ms: float
    setup_ms: float | None
    downtime_ms: float | None
    blackout_ms: float | None
    transferred_bytes: int | None
    iterations: int | None
    phase_ms: dict[Phase, float] = field(default_factory=dict)
    dropped_options: tuple[str, ...] = ()
