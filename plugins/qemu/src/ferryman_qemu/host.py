"""What the driver of QEMU knows of one root: its guests, its definitions, and who is on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from ferryman.definition import definition_error
from ferryman.errors import (
    DomainExistsError,
    DomainNotFoundError,
    DomainStateError,
)
from ferryman.types import (
    DomainEvent,
    DomainEventKind,
    DomainInfo,
    DomainState,
    DomainUUID,
    MigrationId,
)
from ferryman_qemu.commandline import (
    Machine,
    build_argv,
    pin,
    read_pinned,
)
from ferryman_qemu.guest import Guest
from ferryman_qemu.probe import Emulator
from ferryman_qemu.root import GuestRecord, Root, RunDirectory
from ferryman_qemu.transfer import (
    Transfer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup

    from ferryman_qemu.qmp import Event


_EVENTS = {"STOP": DomainEventKind.SUSPENDED, "RESUME": DomainEventKind.RESUMED}


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
        self._expected: dict[MigrationId, Expected] = {}
        self._reserved: dict[DomainUUID, str] = {}
        self._transfers: dict[MigrationId, Transfer] = {}

    def _take(self, guest: Guest) -> None:
        if guest.record.migration:
            self._receivers[MigrationId(guest.record.migration)] = guest
        else:
            self._guests[DomainUUID(guest.record.uuid)] = guest

    # What happens by itself

    def _guest_ended(self, guest: Guest, ending: str) -> None:
        uuid = DomainUUID(guest.record.uuid)
        if guest.record.migration:
            self._receivers.pop(MigrationId(guest.record.migration), None)
            return
        if self._guests.get(uuid) is guest:
            del self._guests[uuid]
        self._tell(DomainEventKind(ending or "crashed"), guest.record.name, uuid)

    def _guest_event(self, guest: Guest, event: Event) -> None:
        kind = _EVENTS.get(event.name)
        if kind is not None and not guest.record.migration:
            self._tell(kind, guest.record.name, DomainUUID(guest.record.uuid))

    def _tell(self, kind: DomainEventKind, name: str, uuid: DomainUUID) -> None:
        self._emit(DomainEvent(kind=kind, name=name, uuid=uuid, time_s=time.time()))

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
        return DomainInfo(
            name=definition.name,
            uuid=uuid,
            state=state,
            persistent=uuid in self._defined,
            memory_bytes=definition.memory_bytes,
            vcpus=definition.vcpus,
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
        root = machine.definition.root
        pinned = self._emulator.machines.get(machine.machine)
        if pinned is None:
            raise definition_error(
                root.find("os/type"),
                f"{self._emulator.path} has no machine type {machine.machine}: see the host's capabilities",
            )
        if not pinned.startswith("pc-i440fx-"):
            raise definition_error(
                root.find("os/type"),
                f"the machine type {machine.machine} is not supported: use pc, or a pc-i440fx of some version",
            )
        if machine.accelerated and not self._emulator.kvm:
            raise definition_error(
                root, "KVM was tried on this host and does not work: use <domain type='qemu'>"
            )
        return pin(
            machine,
            machine_type=pinned,
            cpu=machine.cpu or self._emulator.default_cpus.get(pinned, "qemu64"),
            memory_bytes=self._emulator.migratable_memory(
                machine.definition.memory_bytes, accelerated=machine.accelerated
            ),
        )

    async def _start(self, machine: Machine, *, persistent: bool, paused: bool) -> None:
        definition = machine.definition
        self._reserved[definition.uuid] = definition.name
        try:
            guest = await self._spawn(machine, persistent=persistent)
            try:
                if not paused:
                    async with guest.lock:
                        await guest.command("cont")
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await guest.kill()
                raise
            self._take(guest)
        finally:
            del self._reserved[definition.uuid]
        self._tell(DomainEventKind.STARTED, definition.name, definition.uuid)

    async def _spawn(self, machine: Machine, *, persistent: bool, migration: str = "") -> Guest:
        definition = machine.definition
        run: RunDirectory = self._root.new_run_directory()
        return await Guest.start(
            GuestRecord(
                uuid=definition.uuid,
                name=definition.name,
                definition=definition.render(),
                persistent=persistent,
                migration=migration,
            ),
            run,
            lambda control, read: build_argv(
                machine,
                emulator=machine.emulator or self._emulator.path,
                name=definition.name,
                control_fd=control,
                read_fd=read,
                incoming=bool(migration),
                pidfile=run.pidfile,
            ),
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
        self._tell(DomainEventKind.MIGRATED_IN, guest.record.name, uuid)
