"""What the driver of QEMU knows of one root: its guests, its definitions, and who is on the way."""

from __future__ import annotations

import logging
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from ferryman.definition import read_memory
from ferryman.errors import (
    DomainBusyError,
    DomainExistsError,
    DomainNotFoundError,
    DomainStateError,
    HypervisorError,
)
from ferryman.types import (
    DomainEvent,
    DomainEventKind,
    DomainInfo,
    DomainState,
    DomainUUID,
    MigrationId,
)
from ferryman_qemu.choose import HostChooser
from ferryman_qemu.guest import Guest
from ferryman_qemu.machine import AGENT_CHANNEL, Machine, command_line, pin, read_pinned
from ferryman_qemu.power import read_wishes, settle_power
from ferryman_qemu.probe import Emulator
from ferryman_qemu.root import GuestRecord, Root, RunDirectory
from ferryman_qemu.site import LocalSite
from ferryman_qemu.transfer import (
    Transfer,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from anyio.abc import TaskGroup

    from ferryman.definition import Definition
    from ferryman_qemu.qmp import Event

_log = logging.getLogger(__name__)

_EVENTS = {
    "STOP": DomainEventKind.SUSPENDED,
    "RESUME": DomainEventKind.RESUMED,
    "RESET": DomainEventKind.REBOOTED,
    "GUEST_PANICKED": DomainEventKind.PANICKED,
    "BALLOON_CHANGE": DomainEventKind.MEMORY_CHANGED,
}
_SETTLED_AFTER = ("SHUTDOWN", "GUEST_PANICKED")


@dataclass(eq=False, slots=True)
class Expected:
    """A receiver that is started ahead; whoever takes the guest out of it ends it."""

    started: anyio.Event = field(default_factory=anyio.Event)
    guest: Guest | None = None


class QemuHost:
    """One root, open: state that the driver's hooks share, and what they all do with it."""

    def __init__(self) -> None:
        self._root: Root
        self._tasks: TaskGroup
        self._emit: Callable[[DomainEvent], None]
        self._emulator: Emulator
        self._defined: dict[DomainUUID, str] = {}
        self._guests: dict[DomainUUID, Guest] = {}
        self._receivers: dict[MigrationId, Guest] = {}
        self._offered: dict[DomainUUID, Guest] = {}
        self._expected: dict[MigrationId, Expected] = {}
        self._reserved: dict[DomainUUID, str] = {}
        self._look_lock = anyio.Lock()
        self._transfers: dict[MigrationId, Transfer] = {}
        self._free: Callable[[DomainUUID, str], None] | None = None

    def _looks_on(self) -> bool:
        """Whether another program changes the root, and this one only reads it."""
        return not self._root.held

    @asynccontextmanager
    async def _seen(self) -> AsyncIterator[None]:
        """Know the root for the length of a question; a program that only looks on reads it anew each time."""
        if not self._looks_on():
            yield
            return
        async with self._look_lock:
            if not self._looks_on():
                yield
                return
            failure: Exception | None = None
            async with anyio.create_task_group() as tasks:
                try:
                    await self._look(tasks)
                    yield
                except Exception as error:  # noqa: BLE001 - raised again outside the group, which would wrap it
                    failure = error
                finally:
                    self._guests = {}
                    tasks.cancel_scope.cancel()
            if failure is not None:
                raise failure

    async def _look(self, tasks: TaskGroup) -> None:
        """Read the root, and connect to every process that can be looked at."""
        self._defined = self._root.definitions()
        self._guests = {}
        failures: list[HypervisorError] = []

        async def look_at(run: RunDirectory) -> None:
            try:
                guest = await Guest.look_on(run, log=self._root.log, tasks=tasks)
            except HypervisorError as error:
                failures.append(error)
                return
            if guest is not None and not guest.record.migration and not guest.record.restoring:
                self._take(guest)

        async with anyio.create_task_group() as looking:
            for run in self._root.run_directories():
                looking.start_soon(look_at, run)
        if failures:
            raise failures[0]

    def _take(self, guest: Guest) -> None:
        if guest.record.offered:
            self._offered[DomainUUID(guest.record.uuid)] = guest
        elif guest.record.migration:
            self._receivers[MigrationId(guest.record.migration)] = guest
        else:
            self._guests[DomainUUID(guest.record.uuid)] = guest

    # What happens by itself

    def _guest_ended(self, guest: Guest, ending: str, detail: str) -> None:
        uuid = DomainUUID(guest.record.uuid)
        if guest.record.migration:
            self._receivers.pop(MigrationId(guest.record.migration), None)
            return
        if guest.record.offered:
            self._offered.pop(uuid, None)
            return
        if guest.record.restoring:
            return
        if self._guests.get(uuid) is guest:
            del self._guests[uuid]
        self._tell(DomainEventKind(ending), guest.record.name, uuid, detail)

    def _guest_event(self, guest: Guest, event: Event) -> None:
        if guest.record.migration or guest.record.restoring or guest.record.offered:
            return
        kind = _EVENTS.get(event.name)
        if event.name == "VSERPORT_CHANGE" and event.data.get("id") == self._agent_port(guest):
            kind = DomainEventKind.AGENT_CONNECTED if event.data.get("open") else DomainEventKind.AGENT_GONE
        if kind is not None:
            self._tell(kind, guest.record.name, DomainUUID(guest.record.uuid), _detail(event))
        if event.name in _SETTLED_AFTER and not guest.ending:
            self._tasks.start_soon(self._settle_power, guest)

    def _agent_port(self, guest: Guest) -> str:
        """Alias of the port that leads to the agent; '' where there is none."""
        ports = read_pinned(guest.record.definition).ports
        return next((port.alias for port in ports if port.name == AGENT_CHANNEL), "")

    async def _settle_power(self, guest: Guest) -> None:
        """Do what the state of a machine calls for; one that a migration has locked is left as it is."""
        if self._free is None:
            return  # the root is being opened, which ends with looking at every guest
        try:
            async with guest.lock:
                # Under the lock: a migration that begins later waits for it before it sends anything.
                self._free(DomainUUID(guest.record.uuid), guest.record.name)
                await settle_power(guest, read_wishes(read_pinned(guest.record.definition).definition.root))
        except DomainBusyError as error:
            _log.warning("domain %s stays as it is: %s", guest.record.name, error)
        except HypervisorError as error:
            if not await guest.is_ending():
                _log.warning("domain %s could not be settled: %s", guest.record.name, error)

    def _tell(self, kind: DomainEventKind, name: str, uuid: DomainUUID, detail: str = "") -> None:
        self._emit(DomainEvent(kind=kind, name=name, uuid=uuid, time_s=time.time(), detail=detail))

    # Domains

    async def _info(self, uuid: DomainUUID) -> DomainInfo:
        guest = self._guests.get(uuid)
        state = await guest.state() if guest is not None else DomainState.SHUT_OFF
        if state is DomainState.SHUT_OFF:
            guest = None
        text = guest.record.definition if guest is not None else self._defined.get(uuid)
        if text is None:
            raise DomainNotFoundError(f"no domain with uuid {uuid} in {self._root.path}", domain=uuid)
        definition = read_pinned(text).definition
        vcpu = definition.root.find("vcpu")
        current = definition.vcpus if vcpu is None else int(vcpu.get("current", definition.vcpus))
        return DomainInfo(
            name=definition.name,
            uuid=uuid,
            state=state,
            persistent=uuid in self._defined,
            memory_bytes=definition.memory_bytes,
            vcpus=current,
            autostart=uuid in self._defined and self._root.autostart(uuid),
            current_memory_bytes=guest.current_memory_bytes if guest is not None else None,
            max_vcpus=definition.vcpus,
        )

    def _name_owner(self, name: str) -> DomainUUID | None:
        for uuid, guest in self._guests.items():
            if guest.record.name == name:
                return uuid
        for uuid, reserved in self._reserved.items():
            if reserved == name:
                return uuid
        for uuid, text in self._defined.items():
            if read_pinned(text).definition.name == name:
                return uuid
        return None

    def _admit(self, machine: Machine) -> Machine:
        """Let a machine in whose name is free or its own."""
        definition = machine.definition
        owner = self._name_owner(definition.name)
        if owner is not None and owner != definition.uuid:
            raise DomainExistsError(
                f"the name {definition.name} belongs to domain {owner}", domain=definition.name
            )
        return machine

    def _pin(self, machine: Machine) -> Machine:
        """Fix what a definition leaves open, and what this host's emulator needs otherwise."""
        return pin(machine, HostChooser(self._emulator))

    async def _start(
        self,
        machine: Machine,
        *,
        persistent: bool,
        paused: bool,
        autodestroy: bool = False,
        detail: str = "booted",
    ) -> None:
        definition = machine.definition
        self._reserved[definition.uuid] = definition.name
        try:
            guest = await self._spawn(machine, persistent=persistent, autodestroy=autodestroy)
            try:
                await self._set_out(guest, definition, paused=paused)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await guest.kill()
                raise
            self._take(guest)
        finally:
            del self._reserved[definition.uuid]
        self._tell(DomainEventKind.STARTED, definition.name, definition.uuid, detail)

    async def _set_out(self, guest: Guest, definition: Definition, *, paused: bool) -> None:
        """Give a machine that was just started the memory that its definition says, and run it."""
        async with guest.lock:
            wanted = definition.root.find("currentMemory")
            if wanted is not None and read_memory(wanted) < definition.memory_bytes:
                await guest.command("balloon", {"value": read_memory(wanted)})
            await guest.learn_memory()
            if not paused:
                await guest.command("cont")

    async def _spawn(
        self,
        machine: Machine,
        *,
        persistent: bool,
        migration: str = "",
        restoring: bool = False,
        autodestroy: bool = False,
    ) -> Guest:
        definition = machine.definition
        run: RunDirectory = self._root.new_run_directory()
        site = LocalSite(
            self._root,
            run,
            emulator=machine.emulator or self._emulator.path,
            incoming=bool(migration) or restoring,
            uuid=definition.uuid,
            name=definition.name,
        )
        return await Guest.start(
            GuestRecord(
                uuid=definition.uuid,
                name=definition.name,
                definition=definition.render(),
                persistent=persistent,
                migration=migration,
                autodestroy=autodestroy,
                restoring=restoring,
            ),
            run,
            site,
            partial(command_line, machine),
            log=self._root.log(definition.name),
            tasks=self._tasks,
            ended=self._guest_ended,
            happened=self._guest_event,
        )

    def _active(self, uuid: DomainUUID, name: str) -> Guest:
        guest = self._guests.get(uuid)
        if guest is None:
            if uuid not in self._defined:
                raise DomainNotFoundError(f"no domain {name} in {self._root.path}", domain=name)
            raise DomainStateError(f"domain {name} is shut off: start it first", domain=name)
        return guest

    def _persistent(self, uuid: DomainUUID, name: str) -> Machine:
        """What is defined under a uuid. :raises DomainStateError: the domain is transient."""
        text = self._defined.get(uuid)
        if text is None:
            self._active(uuid, name)
            raise DomainStateError(f"domain {name} is transient: it has no definition", domain=name)
        return read_pinned(text)

    def _keep_definition(self, definition: Definition) -> None:
        """Define a domain, or define it anew. :raises HypervisorError: it cannot be written; all is as before."""
        text = definition.render()
        self._root.write_definition(definition.uuid, text)
        self._defined[definition.uuid] = text

    def _undefine(self, uuid: DomainUUID, name: str) -> None:
        self._root.remove_definition(uuid)
        if self._defined.pop(uuid, None) is not None:
            self._tell(DomainEventKind.UNDEFINED, name, uuid)

    def _guest_of(self, identity: str) -> Guest | None:
        """The live process of an identity, domain or receiver."""
        for guest in (*self._guests.values(), *self._receivers.values()):
            if guest.process.identity == identity:
                return guest
        return None

    async def _discard(self, guest: Guest) -> None:
        self._reserved.pop(DomainUUID(guest.record.uuid), None)
        await guest.kill()

    def _take_in(self, guest: Guest) -> None:
        """Make a receiver the domain's guest."""
        uuid = DomainUUID(guest.record.uuid)
        self._receivers.pop(MigrationId(guest.record.migration), None)
        guest.write(replace(guest.record, migration=""))
        self._guests[uuid] = guest
        self._reserved.pop(uuid, None)
        self._tasks.start_soon(guest.learn_memory)
        self._tell(DomainEventKind.MIGRATED_IN, guest.record.name, uuid)


def _detail(event: Event) -> str:
    """What an event of QEMU says of its reason, in a word."""
    return str(event.data.get("reason") or event.data.get("actual") or event.data.get("action") or "")
