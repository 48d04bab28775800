"""Every hook of Ferryman: the only file that a driver's author must read.

A driver is an object with some of the methods of :class:`DriverHooks`, each marked ``@hookimpl``, each ``async def``,
each with ONE parameter named ``request`` and no default.  Its class is named by an entry point::

    [project.entry-points."ferryman.drivers"]
    mylab = "ferryman_mylab:MyLabDriver"        # opened by mylab://...

and is constructed with no argument for each connection.  ``capabilities``, ``migrate_prepare``, ``migrate_perform``
and ``migrate_finish`` make a working driver; every other hook is optional and its docstring says what happens without
it.  Requests grow by fields, never by new hooks with a number.

Who owns the guest
==================

========  ===========  ===================================  =====================================================
phase     side         on success                           on failure (any exception from :mod:`ferryman.errors`)
========  ===========  ===================================  =====================================================
begin     source       the source owns it, unchanged        the source owns it, unchanged
prepare   destination  the source owns it; a receiver       the source owns it; nothing is left here
                       waits that cannot run by itself
perform   source       the source owns it, *stopped*, and   the source owns it, and it runs (or is paused, if it
                       its hypervisor cannot resume it by   was) as before: raising means that no proof of stop
                       itself: the proof of stop            was or will be given
finish    destination  RUN: the destination owns it;        RUN: the guest never ran here, and the receiver may
                       DISCARD: nothing is left here        still wait: DISCARD follows
confirm   source       GIVEN: nothing is left here;         the owner does not change; confirm is done again at
                       KEPT: the source owns it, running    the next opening of the host
========  ===========  ===================================  =====================================================

The core writes the journal around these hooks, so a driver keeps no record of its own about ownership.  Every hook
with an ``id`` in its request may be called again after a crash and then completes what is left, or finds it done.

Errors
======
Raise errors of :mod:`ferryman.errors`.  Anything else is a broken contract, reported with the name of your
distribution.  Cancellation must pass through; where a hook's docstring says *shielded*, finish first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import pluggy

from ferryman.types import (
    DomainEvent,
    DomainInfo,
    DomainStatistics,
    DomainUUID,
    Evidence,
    Finding,
    MigrationEvent,
    MigrationId,
    MigrationOptions,
    Scope,
    Screenshot,
    ShutdownMode,
    Side,
    TransferStatistics,
    Tuning,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anyio.abc import ByteStream, TaskGroup

    from ferryman.capabilities import Capabilities
    from ferryman.engine import HostEnd
    from ferryman.plan import Plan
    from ferryman.uri import ConnectionURI

PROJECT = "ferryman"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a method of a driver or an observer as the implementation of a hook."""


# Requests and replies


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRequest:
    """Open the host that a URI names.

    :param tasks: runs the driver's background tasks until the connection closes; a task that raises ends the
        connection, so a task handles its own errors.
    :param emit: tells the connection's listeners that something happened to a domain; never blocks.
    """

    uri: ConnectionURI
    tasks: TaskGroup
    emit: Callable[[DomainEvent], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenReply:
    """What the core needs to know of the host.

    :param journal: where the host's journal lies; None lets the core choose a place under the user's state directory.
    :param address: connection URI by which another end can ask this host; None is the URI that was opened.
    :param looks_on: another program may change the host now, and this one only reads until ``connection_acquire``.
    :param end: the host's end of migrations, where another program keeps it and its journal; None is that the core
        keeps them here.
    :param hooks: names of the hooks that the host behind this driver has; None is all that the driver has itself.
    """

    journal: Path | None = None
    address: str | None = None
    looks_on: bool = False
    end: HostEnd | None = None
    hooks: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HostRequest:
    """A request about the host as a whole: it has no parameters yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LookupRequest:
    """Find a domain; exactly one of the two is set."""

    name: str | None = None
    uuid: DomainUUID | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DefinitionRequest:
    """Make a domain from libvirt domain XML.

    :param paused: for ``domain_create``: leave it paused.
    :param autodestroy: for ``domain_create``: end it when this connection closes, or when its program dies.
    """

    definition: str
    paused: bool = False
    autodestroy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainRequest:
    """A request about one domain.

    :param paused: for ``domain_start``: leave it paused.
    :param autodestroy: for ``domain_start``: end it when this connection closes, or when its program dies.
    """

    uuid: DomainUUID
    name: str
    paused: bool = False
    autodestroy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ShutdownRequest:
    """Ask a guest to shut down, or to reboot."""

    uuid: DomainUUID
    name: str
    mode: ShutdownMode = ShutdownMode.DEFAULT


@dataclass(frozen=True, kw_only=True, slots=True)
class AutostartRequest:
    """Start a domain when its host has booted, or no longer."""

    uuid: DomainUUID
    name: str
    enabled: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class BootRequest:
    """The host is open, and what earlier programs left open is settled, as far as it can be.

    :param admit: to be called with uuid and name before a domain is started; raises DomainBusyError where a migration
        has locked it, which then stays shut off.
    """

    admit: Callable[[DomainUUID, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveRequest:
    """Save a guest.

    :param path: of the file, on the domain's host.
    """

    uuid: DomainUUID
    name: str
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreRequest:
    """Run a guest from a file.

    :param path: of the file, on this host.
    :param paused: leave it paused, or run it; None is as it was when it was saved.
    :param definition: runs it instead of the saved one, of the same uuid and of the same machine; None keeps that.
    :param admit: to be called with uuid and name as soon as they are known, and before anything is started; raises
        DomainBusyError where a migration has locked that domain.
    """

    path: str
    paused: bool | None
    definition: str | None
    admit: Callable[[DomainUUID, str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenshotRequest:
    """Take a picture of a guest's screen.

    :param screen: its number, from 0.
    """

    uuid: DomainUUID
    name: str
    screen: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsoleRequest:
    """Connect to a guest's console.

    :param device: its alias in the definition; None is the first.
    """

    uuid: DomainUUID
    name: str
    device: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryRequest:
    """Change how much memory a guest has to itself.

    :param memory_bytes: above 0, and checked by the driver against the memory that the definition gives.
    """

    uuid: DomainUUID
    name: str
    memory_bytes: int
    scope: Scope = Scope.CURRENT


@dataclass(frozen=True, kw_only=True, slots=True)
class AttachRequest:
    """Plug a device into a domain.

    :param definition: one device as libvirt domain XML has it in ``<devices>``.
    """

    uuid: DomainUUID
    name: str
    definition: str
    scope: Scope = Scope.CURRENT


@dataclass(frozen=True, kw_only=True, slots=True)
class DetachRequest:
    """Unplug a device of a domain.

    :param definition: the device as libvirt domain XML has it, or as much of it as tells it from the others.
    :param timeout_s: limit for the guest to let go of it, above 0.
    """

    uuid: DomainUUID
    name: str
    definition: str
    timeout_s: float
    scope: Scope = Scope.CURRENT


@dataclass(frozen=True, kw_only=True, slots=True)
class VcpusRequest:
    """Change how many processors a guest has.

    :param count: above 0, and checked by the driver against the number that the definition allows.
    """

    uuid: DomainUUID
    name: str
    count: int
    scope: Scope = Scope.CURRENT


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentRequest:
    """Ask the guest agent.

    :param command: as the agent takes it: ``execute`` and perhaps ``arguments``, JSON values all the way down.
    :param timeout_s: limit for the answer, above 0.
    """

    uuid: DomainUUID
    name: str
    command: dict[str, Any]
    timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DirtyRateRequest:
    """Measure how fast a guest writes to its memory.

    :param duration_s: above 0, up to 60; a driver may measure for longer, and says so where it is documented.
    """

    uuid: DomainUUID
    name: str
    duration_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StatisticsRequest:
    """Give the counters of several domains.

    :param uuids: of which domains; None is all.
    """

    uuids: tuple[DomainUUID, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptRequest:
    """Take in a hypervisor's process that another program has started.

    :param path: of the control socket, which nobody else may be connected to.
    :param name: of the domain here; None is what the process says.
    :param uuid: the same; needed where the process says none.
    :param pid: of the process; None is who listens at the socket.
    :param receiver: it waits for a guest to arrive, and is no domain yet.
    """

    path: str
    name: str | None = None
    uuid: DomainUUID | None = None
    pid: int | None = None
    receiver: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRequest:
    """What the plan asks each side before anything moves.

    :param source: the source's capabilities.
    :param destination: the destination's capabilities.
    :param definition: the domain's definition, as the destination would get it.
    :param source_definition: the same as the source has it.
    :param options: those in effect, best-effort ones that are not supported already dropped.
    :param facts: at the destination: what the source's check told; empty at the source, which is asked first.
    """

    side: Side
    domain: DomainInfo
    definition: str
    options: MigrationOptions
    source: Capabilities
    destination: Capabilities
    source_definition: str = ""
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReply:
    """What a side found.

    :param facts: small texts for the destination's check, such as the identity of a disk.
    """

    findings: tuple[Finding, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class BeginRequest:
    """Get ready to send a domain."""

    id: MigrationId
    domain: DomainInfo
    options: MigrationOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class BeginReply:
    """What the source knows of the domain.

    :param definition: what the destination builds the domain from.
    :param paused: the guest is paused now, and arrives paused.
    :param process: identity of the guest's process, opaque to the core; must not be reused after a restart.
    :param cookie: small texts for the destination's driver.
    """

    definition: str
    paused: bool = False
    process: str = ""
    cookie: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectRequest:
    """A domain may be about to come: fields as in :class:`PrepareRequest`, which follows with the same id, or never."""

    id: MigrationId
    uuid: DomainUUID
    name: str
    definition: str
    options: MigrationOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareRequest:
    """Make ready to receive a domain.

    :param definition: from begin, with the name already changed where the caller asked for it.
    :param migration_uri: what the caller asked for, or None.
    :param paused: the guest stays paused here.
    :param cookie: from the source's driver.
    """

    id: MigrationId
    uuid: DomainUUID
    name: str
    definition: str
    migration_uri: str | None
    paused: bool
    options: MigrationOptions
    cookie: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareReply:
    """Where the receiver waits.

    :param migration_uri: where the source connects to; None keeps what the caller asked for.
    :param process: identity of the receiver, opaque to the core.
    :param cookie: small texts for the source's driver.
    """

    migration_uri: str | None = None
    process: str = ""
    cookie: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformRequest:
    """Send a domain's state.

    :param migration_uri: where the receiver waits.
    :param progress: takes a sample of the counters; never blocks; call it when something changed.
    :param cookie: from the destination's driver.
    """

    id: MigrationId
    domain: DomainInfo
    process: str
    migration_uri: str
    options: MigrationOptions
    progress: Callable[[TransferStatistics], None]
    cookie: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformReply:
    """The guest is stopped for good at the source: returning this IS the proof of stop.

    :param statistics: of the whole transfer, as far as they are known without lengthening the blackout.
    :param stopped_for_ms: how long the guest has been stopped, by this host's monotonic clock; None for a guest that
        was paused before.
    :param switched: post-copy: the destination has the device state, the source's hypervisor can no longer fail back,
        and pages are still to be sent; ``migrate_serve`` waits for them.
    """

    statistics: TransferStatistics
    stopped_for_ms: float | None = None
    switched: bool = False


class Verdict(Enum):
    """What finish and confirm are to do."""

    RUN = "run"
    DISCARD = "discard"
    GIVEN = "given"
    KEPT = "kept"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishRequest:
    """Run the arrived guest, or discard it.

    :param verdict: RUN or DISCARD.
    :param process: the receiver's identity, as prepare gave it; '' after a prepare that failed.
    :param paused: RUN verifies that the whole state is here and leaves the guest paused.
    :param persist: keep the definition once the guest has run.
    """

    id: MigrationId
    uuid: DomainUUID
    name: str
    verdict: Verdict
    process: str
    paused: bool = False
    persist: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmRequest:
    """Let the domain go, or keep it.

    :param verdict: GIVEN or KEPT.
    :param process: the guest's process as begin gave it: act on this one, never on a name.
    :param paused: KEPT leaves the guest paused.
    :param undefine: GIVEN also removes the definition.
    """

    id: MigrationId
    uuid: DomainUUID
    name: str
    verdict: Verdict
    process: str
    paused: bool = False
    undefine: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmReply:
    """What confirm found.

    :param statistics: counters that were not known at the end of perform, or None.
    :param guest_gone: KEPT was asked for, but the guest's process is gone: the domain is shut off.
    """

    statistics: TransferStatistics | None = None
    guest_gone: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneRequest:
    """Change a running transfer."""

    id: MigrationId
    uuid: DomainUUID
    process: str
    tuning: Tuning


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeReply:
    """How far the pages of a guest in post-copy have come.

    Neither is set when nothing is left to do.

    :param broken: the stream broke while pages were needed, and both halves wait.
    :param lost: the half here is gone, and pages were needed.
    """

    broken: bool = False
    lost: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MendRequest:
    """Mend a stream that broke in post-copy.

    :param process: the guest's process on this side.
    :param migration_uri: at the source: where the destination waits now; None at the destination, which is asked first.
    """

    id: MigrationId
    uuid: DomainUUID
    side: Side
    process: str
    options: MigrationOptions
    migration_uri: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MendReply:
    """What came of it.

    :param migration_uri: from the destination: where the source connects to now.
    """

    migration_uri: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AbortRequest:
    """End a transfer that a crashed caller left behind."""

    id: MigrationId
    uuid: DomainUUID
    process: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRequest:
    """End receivers that nobody answers for.

    :param known: migrations that the journal holds open; every other receiver is a stray.
    """

    known: frozenset[MigrationId]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvidenceRequest:
    """Say what the hypervisor knows of a process that an open row names."""

    id: MigrationId
    uuid: DomainUUID
    name: str
    side: Side
    process: str


class DriverHooks:
    """The hooks of a driver.  Exactly one implementation of each is awaited."""

    @hookspec
    async def connection_open(self, request: OpenRequest) -> OpenReply:
        """Open the host.  Without it there is nothing to open.

        :raises ConnectError: the host cannot be reached or used.
        :raises HostBusyError: another program holds it.
        """
        raise NotImplementedError

    @hookspec
    async def connection_acquire(self, request: HostRequest) -> None:
        """Become the one program that changes the host, after an opening that only looks on.

        Called before the first change, and once.  Before it those hooks must work that only read: ``capabilities``,
        ``domain_list``, ``domain_lookup``, ``domain_definition``, ``domain_statistics`` and ``host_statistics``.
        Needed by a driver whose ``connection_open`` can answer ``looks_on``, and by no other.

        :raises HostBusyError: the other program did not let go in the time that the driver states.
        :cancellation: this program goes on looking on.
        """
        raise NotImplementedError

    @hookspec
    async def connection_close(self, request: HostRequest) -> None:
        """Let the host go; guests go on running.  Without it nothing is done."""
        raise NotImplementedError

    @hookspec
    async def capabilities(self, request: HostRequest) -> Capabilities:
        """Say what this host and driver can do, and nothing more.  Required."""
        raise NotImplementedError

    @hookspec
    async def host_autostart(self, request: BootRequest) -> None:
        """Start the domains that ``domain_autostart`` has marked, if the host was not opened since it booted.

        Called once after each opening.  One that cannot be started is logged and hinders nobody.  Without it nothing
        is started.
        """
        raise NotImplementedError

    @hookspec
    async def domain_list(self, request: HostRequest) -> list[DomainInfo]:
        """List all domains, receivers of migrations left out.  Without it: not supported."""
        raise NotImplementedError

    @hookspec
    async def domain_lookup(self, request: LookupRequest) -> DomainInfo:
        """Find a domain by name or uuid.

        Without it a look-up by name answers a running domain of that name with a uuid derived from scheme and name,
        and a look-up by uuid is not supported.

        :raises DomainNotFoundError: there is none.
        """
        raise NotImplementedError

    @hookspec
    async def domain_define(self, request: DefinitionRequest) -> DomainInfo:
        """Make a persistent domain, shut off, or change its definition.  Without it: not supported.

        The definition of an active domain is the one of its next start; a transient domain becomes persistent.

        :raises DefinitionError: an element is unknown or has a value that cannot be used.
        :raises DomainExistsError: the name belongs to another uuid.
        """
        raise NotImplementedError

    @hookspec
    async def domain_create(self, request: DefinitionRequest) -> DomainInfo:
        """Make and start a transient domain.  Without it: not supported.

        The uuid of a persistent domain that is shut off runs that domain by this definition, which it does not keep.

        :raises DefinitionError: as ``domain_define``.
        :raises DomainExistsError: the name belongs to another uuid, or the domain is active.
        :raises HypervisorError: it could not be started; nothing is left.
        """
        raise NotImplementedError

    @hookspec
    async def domain_start(self, request: DomainRequest) -> DomainInfo:
        """Start a persistent domain.  Without it: not supported.

        :raises DomainStateError: it is active.
        :raises HypervisorError: it could not be started; it stays shut off.
        """
        raise NotImplementedError

    @hookspec
    async def domain_suspend(self, request: DomainRequest) -> None:
        """Pause a running domain; a paused one stays paused.  Without it: not supported."""
        raise NotImplementedError

    @hookspec
    async def domain_resume(self, request: DomainRequest) -> None:
        """Run a paused domain; a running one goes on.  Without it: not supported."""
        raise NotImplementedError

    @hookspec
    async def domain_shutdown(self, request: ShutdownRequest) -> None:
        """Ask the guest to shut down; returns before it has.  Without it: not supported.

        :raises DomainStateError: it is shut off, or has no agent where the mode asks for one.
        """
        raise NotImplementedError

    @hookspec
    async def domain_reboot(self, request: ShutdownRequest) -> None:
        """Ask the guest to shut down and to boot again; returns before it has.  Without it: not supported.

        A guest that ignores it goes on.  The domain stays active, whatever the definition's ``<on_poweroff>`` says.

        :raises DomainStateError: as ``domain_shutdown``.
        """
        raise NotImplementedError

    @hookspec
    async def domain_reset(self, request: DomainRequest) -> None:
        """Reset the machine, as its reset button does; a paused guest stays paused.  Without it: not supported."""
        raise NotImplementedError

    @hookspec
    async def domain_autostart(self, request: AutostartRequest) -> None:
        """Start a persistent domain at the first opening of its host after each boot, or no longer.

        It is forgotten with the definition.  Without it: not supported.

        :raises DomainStateError: it is transient.
        """
        raise NotImplementedError

    @hookspec
    async def domain_save(self, request: SaveRequest) -> None:
        """Write a guest's state into a file and end it.  Without it: not supported.

        The file appears whole or not at all; one that was there is replaced.

        :raises DomainStateError: it is shut off, or cannot be saved in the state it is in.
        :raises HypervisorError: the guest goes on as before, and there is no new file.
        :cancellation: the same, while the state is being written; afterwards the save is completed.
        """
        raise NotImplementedError

    @hookspec
    async def domain_restore(self, request: RestoreRequest) -> DomainInfo:
        """Run a guest from a file that ``domain_save`` wrote; the file stays.  Without it: not supported.

        A domain that is not defined is transient.

        :raises DefinitionError: the file holds no guest, is not whole, or the definition is of another machine.
        :raises DomainExistsError: the domain is active, or the name belongs to another uuid.
        :raises HypervisorError: the state could not be loaded; the guest did not run.
        :cancellation: nothing is left, until the guest runs.
        """
        raise NotImplementedError

    @hookspec
    async def domain_screenshot(self, request: ScreenshotRequest) -> Screenshot:
        """Take a picture of a screen.  Without it: not supported.

        :raises DomainStateError: it is shut off, or has no such screen.
        """
        raise NotImplementedError

    @hookspec
    async def domain_console(self, request: ConsoleRequest) -> ByteStream:
        """Connect to a console, which the caller closes.  Without it: not supported.

        The stream ends when the guest does.

        :raises DomainStateError: it is shut off, has no such console, or somebody else is connected to it.
        """
        raise NotImplementedError

    @hookspec
    async def domain_set_memory(self, request: MemoryRequest) -> None:
        """Change how much of its memory a guest has to itself; it gives back the rest.  Without it: not supported.

        A guest takes its time, and one without a balloon driver does nothing.

        :raises OptionError: more than the definition's memory.
        :raises DomainStateError: the scope asks for a guest or a definition that there is not.
        """
        raise NotImplementedError

    @hookspec
    async def domain_attach(self, request: AttachRequest) -> None:
        """Plug a device in.  Without it: not supported.

        :raises DefinitionError: the device, or the domain with it, is not understood or cannot be built.
        :raises NotSupportedError: a guest that runs does not take such a device.
        :raises DomainStateError: the scope asks for a guest or a definition that there is not, or there is no room.
        :raises HypervisorError: the hypervisor refused; nothing is changed.
        """
        raise NotImplementedError

    @hookspec
    async def domain_detach(self, request: DetachRequest) -> None:
        """Unplug a device, of which a running guest must let go.  Without it: not supported.

        :raises DefinitionError: the domain has no such device, or several.
        :raises NotSupportedError: a guest that runs does not give such a device back.
        :raises DomainStateError: the scope asks for a guest or a definition that there is not.
        :raises HypervisorError: the guest or the hypervisor did not let go of it; nothing is changed, unless the guest
            does it later, which the driver then takes note of.
        :cancellation: as when the guest does not let go of it.
        """
        raise NotImplementedError

    @hookspec
    async def domain_set_vcpus(self, request: VcpusRequest) -> None:
        """Change how many processors a guest has.  Without it: not supported.

        :raises OptionError: more than the definition allows.
        :raises DomainStateError: the scope asks for a guest or a definition that there is not.
        :raises HypervisorError: the hypervisor refused, or the guest did not let go of one; the domain's information
            says how many there are.
        """
        raise NotImplementedError

    @hookspec
    async def domain_agent(self, request: AgentRequest) -> object:
        """Give a command to the guest agent and return its answer, JSON as Python has it.  Without it: not supported.

        What is answered late, or to nobody, is never taken for the answer to a later command.

        :raises DomainStateError: it is shut off, or has no agent that is connected.
        :raises HypervisorError: the agent refused, or did not answer in time or in its language.
        :cancellation: the guest may have done it.
        """
        raise NotImplementedError

    @hookspec
    async def domain_dirty_rate(self, request: DirtyRateRequest) -> int:
        """Measure how fast the guest makes its memory stale, in bytes per second.  Without it: not supported.

        :raises DomainStateError: it does not run.
        :raises HypervisorError: it could not be measured.
        :cancellation: the measurement ends by itself.
        """
        raise NotImplementedError

    @hookspec
    async def domain_destroy(self, request: DomainRequest) -> None:
        """End the guest at once; a transient domain is gone afterwards.  Without it: not supported."""
        raise NotImplementedError

    @hookspec
    async def domain_undefine(self, request: DomainRequest) -> None:
        """Forget a persistent definition; a running guest becomes transient.  Without it: not supported."""
        raise NotImplementedError

    @hookspec
    async def domain_definition(self, request: DomainRequest) -> str:
        """Give the definition as libvirt domain XML.  Without it: a document of name, uuid and type only."""
        raise NotImplementedError

    @hookspec
    async def domain_statistics(self, request: DomainRequest) -> DomainStatistics:
        """Give the domain's counters.  Without it: not supported."""
        raise NotImplementedError

    @hookspec
    async def host_statistics(self, request: StatisticsRequest) -> dict[DomainUUID, DomainStatistics]:
        """Give the counters of several domains at once; one that is gone meanwhile is left out.

        Without it the core asks for each by ``domain_statistics``, some at a time.
        """
        raise NotImplementedError

    @hookspec
    async def host_adopt(self, request: AdoptRequest) -> DomainInfo:
        """Take in a process that another program has started, as a transient domain or as a receiver for one.

        From then on this driver alone commands it.  Without it: not supported.

        :raises ConnectError: nothing answers at the socket, or somebody else is connected to it.
        :raises DomainExistsError: the name or the uuid belongs to another domain.
        :raises DomainStateError: the process is not in a state to be taken in.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_check(self, request: CheckRequest) -> CheckReply:
        """Say what would stop or endanger this migration here.  Changes nothing.  Without it: nothing is found."""
        raise NotImplementedError

    @hookspec
    async def migrate_begin(self, request: BeginRequest) -> BeginReply:
        """Get ready at the source.  The journal's ``begun`` is written after it and before anybody is told.

        Without it the definition is that of ``domain_definition`` and the process has no identity.

        :raises BeginError: nothing was changed.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_expect(self, request: ExpectRequest) -> None:
        """Start what ``migrate_prepare`` will need, while the plan is still being made and the source begins.

        Runs until it is cancelled, or until there is nothing to wait for.  Its errors are logged and nothing else:
        what is missing is ``migrate_prepare``'s to start and to tell.  Without it nothing is started ahead.

        :cancellation: ends what ``migrate_prepare`` has not taken over; it comes once that has returned, or will not
            be called.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_prepare(self, request: PrepareRequest) -> PrepareReply:
        """Reserve name, uuid, memory and port, and start a receiver that cannot run by itself.  Required.

        :raises PrepareError: nothing is left here.
        :cancellation: nothing is left here.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_perform(self, request: PerformRequest) -> PerformReply:
        """Send the state and stop the guest.  Returning is the proof of stop.  Required.

        INVARIANT: return only when the hypervisor can no longer resume the guest by itself, and never destroy it.

        :raises PerformError: the guest is at the source as before, and no proof was or will be given.
        :raises InDoubtError: contact with the hypervisor was lost, so that nobody here can tell; the core asks.
        :cancellation: asks for an abort. Before the guest is stopped for good: undo and let the cancellation pass,
            which means the same as PerformError. Too late for that: return as if it had not come.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_finish(self, request: FinishRequest) -> None:
        """Run the arrived guest, or discard it.  Required.

        RUN is called after ``claiming`` is durable; it may be called again after a crash and then finds the guest
        running, or runs it.  DISCARD ends the receiver and returns when it is gone; one that is gone is no error.

        :raises FinishError: RUN: the guest never ran (the state is not whole, or the command failed).
        :cancellation: shielded by the core.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_adopt(self, request: FinishRequest) -> DomainInfo:
        """Turn the receiver that ran into a domain, after ``claimed`` is durable.

        Without it the domain is what prepare was told.  Done again after a crash it finds the domain.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_confirm(self, request: ConfirmRequest) -> ConfirmReply:
        """Let the domain go, or resume it.  Without it nothing is done: perform and finish left nothing to do.

        :raises ConfirmError: it could not be done; it is tried again at the next opening of the host.
        :cancellation: shielded by the core.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_tune(self, request: TuneRequest) -> None:
        """Change a running transfer.  Without it: not supported.

        :raises HypervisorError: the setting is unchanged.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_serve(self, request: EvidenceRequest) -> ServeReply:
        """Post-copy, at the source: wait until every page has come, the stream broke, or the process is gone.

        Called when the destination has claimed the guest, and again after a restart and after the stream was mended;
        the copy is destroyed once nothing is left to do.  Needed by a driver whose ``migrate_perform`` can answer
        ``switched``, and by no other.

        :raises HypervisorError: it is not known yet; called again later.
        :cancellation: ends the wait; the pages go on being sent.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_mend(self, request: MendRequest) -> MendReply:
        """Post-copy: connect the halves of a guest anew, after their stream broke.

        The destination is asked first, and waits for the source; then the source connects.  Without it a broken stream
        loses the guest.

        :raises GuestLostError: the half here is gone: the guest is lost, as the plan said that it can be.
        :raises HypervisorError: the halves still wait; it is tried again.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_abort(self, request: AbortRequest) -> None:
        """End a transfer that nobody awaits any more, after a restart; evidence is gathered afterwards.

        It never resumes a stopped guest itself; a hypervisor that does so on its own is right to.  A running
        ``migrate_perform`` is aborted by cancelling it instead.  Without it nothing is done.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_sweep(self, request: SweepRequest) -> None:
        """End receivers that an earlier program started and never wrote down.  Called once after an opening.

        One that runs its guest is taken in instead: a running receiver is a claim, whatever the journal has lost.
        Without it nothing is done.
        """
        raise NotImplementedError

    @hookspec
    async def migrate_evidence(self, request: EvidenceRequest) -> Evidence:
        """Say what the hypervisor knows of a process.  Without it everything is unknown and a person is asked.

        The process is the one of that identity: one of the same name or number is another.
        """
        raise NotImplementedError


class ObserverHooks:
    """The hooks of observers (entry points ``ferryman.observers``).  Every observer is called.

    One is made for each connection, so an observer that is at both ends of a migration sees it from both.  When the
    migration is over it has five seconds for what it has not seen yet.
    """

    @hookspec
    async def migration_review(self, request: Plan) -> list[Finding]:
        """Add findings to a plan; a blocker is a veto.

        An observer that fails here blocks the plan, since its word is missing.
        """
        raise NotImplementedError

    @hookspec
    async def access_review(self, request: AccessRequest) -> str | None:
        """Say why a client of a daemon may not do what it asks; None where nothing speaks against it.

        Asked before anything is done.  One refusal is enough, and an observer that fails here refuses.  What settles a
        migration that has begun is never asked about, so that no rule can leave a guest between two hosts.
        """
        raise NotImplementedError

    @hookspec
    async def migration_event(self, request: ObservedEvent) -> None:
        """See an event of a migration.  What an observer raises is logged with its distribution's name."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """A client of a daemon, as far as its connection shows who it is.

    :param transport: ``unix``, ``tcp`` or ``tls``.
    :param uid: of its process, over a unix socket.
    :param pid: of its process, over a unix socket.
    :param certificate: a name in its certificate, over TLS.
    :param address: host and port, over a network.
    """

    transport: str
    uid: int | None = None
    pid: int | None = None
    certificate: str | None = None
    address: str | None = None

    @property
    def identity(self) -> str:
        """Who it is, in a word: ``uid:1000``, ``certificate:NAME``, or ``anybody``."""
        if self.certificate is not None:
            return f"certificate:{self.certificate}"
        return "anybody" if self.uid is None else f"uid:{self.uid}"

    def __str__(self) -> str:
        if self.uid is not None:
            return f"user {self.uid}, process {self.pid}"
        where = self.address or "an unknown address"
        return where if self.certificate is None else f"{self.certificate} at {where}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessRequest:
    """What a client of a daemon asks to do.

    :param action: the name of the hook that does it, such as ``domain_destroy``; ``connection_open``, ``migrate_out``,
        ``migrate_in``, ``migrate_tune``, ``migrate_abort`` or ``migrate_resolve``.
    :param host: connection URI of the host.
    :param uuid: of the domain as the host knows it, or as the client's definition has it; None where it concerns none.
    """

    client: Client
    action: str
    host: str
    uuid: DomainUUID | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservedEvent:
    """An event, with the migration that it is about.

    :param id: None until begin has made one.
    """

    id: MigrationId | None
    uuid: DomainUUID
    name: str
    source: str
    destination: str
    event: MigrationEvent


def hook_names(hooks: type[Any]) -> tuple[str, ...]:
    """Names of the hooks that a specification class declares, in its order."""
    return tuple(name for name in vars(hooks) if not name.startswith("_"))
