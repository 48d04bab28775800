"""The driver of QEMU: hooks over the guests of one root."""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from ferryman.capabilities import Capabilities
from ferryman.definition import definition_error
from ferryman.errors import (
    BeginError,
    DefinitionError,
    DomainExistsError,
    DomainNotFoundError,
    DomainStateError,
    FinishError,
    HypervisorError,
    InDoubtError,
    PrepareError,
)
from ferryman.hookspecs import (
    AbortRequest,
    BeginReply,
    BeginRequest,
    CheckReply,
    CheckRequest,
    ConfirmReply,
    ConfirmRequest,
    DefinitionRequest,
    DomainRequest,
    EvidenceRequest,
    ExpectRequest,
    FinishRequest,
    HostRequest,
    LookupRequest,
    OpenReply,
    OpenRequest,
    PerformReply,
    PerformRequest,
    PrepareReply,
    PrepareRequest,
    SweepRequest,
    TuneRequest,
    Verdict,
    hookimpl,
)
from ferryman.types import (
    DomainEvent,
    DomainEventKind,
    DomainInfo,
    DomainState,
    DomainStatistics,
    DomainUUID,
    Evidence,
    Feature,
    Finding,
    FindingSeverity,
    GuestEvidence,
    MigrationId,
    Side,
    TransferEvidence,
    TransferStatistics,
)
from ferryman.uri import MigrationURI
from ferryman_qemu.commandline import (
    Machine,
    boot_paths,
    build_argv,
    disk_paths,
    pin,
    read_machine,
    read_pinned,
)
from ferryman_qemu.guest import Guest
from ferryman_qemu.monitor import Command, MonitorClosedError, MonitorError, MonitorTimeout, QMPCommandError
from ferryman_qemu.probe import Emulator, dotted, find_emulator, host_cpu, probe
from ferryman_qemu.process import boot_id
from ferryman_qemu.root import GuestRecord, Root, RunDirectory, root_of
from ferryman_qemu.transfer import (
    Transfer,
    break_stream,
    capabilities,
    parameters,
    settle_source,
    statistics_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from anyio.abc import TaskGroup

    from ferryman_qemu.qmp import Event

_log = logging.getLogger(__name__)

_LOAD_PATIENCE_S = 30.0
_CANCEL_PATIENCE_S = 5.0
_UNIX_PATH_MAX = 107
_ACTIVE = frozenset(
    {
        "setup",
        "active",
        "device",
        "pre-switchover",
        "cancelling",
        "wait-unplug",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover",
    }
)
_EVIDENCE = {
    "running": GuestEvidence.RUNNING,
    **dict.fromkeys(
        ("inmigrate", "paused", "prelaunch", "finish-migrate", "postmigrate"), GuestEvidence.STOPPED
    ),
}
_EVENTS = {"STOP": DomainEventKind.SUSPENDED, "RESUME": DomainEventKind.RESUMED}


@dataclass(eq=False, slots=True)
class _Expected:
    """A receiver that is started ahead; whoever takes the guest out of it ends it."""

    started: anyio.Event = field(default_factory=anyio.Event)
    guest: Guest | None = None


class QemuDriver:
    """Driver of the scheme ``qemu``."""

    def __init__(self) -> None:
        self._root: Root
        self._tasks: TaskGroup
        self._emit: Callable[[DomainEvent], None]
        self._emulator: Emulator
        self._defined: dict[DomainUUID, str] = {}
        self._guests: dict[DomainUUID, Guest] = {}
        self._receivers: dict[MigrationId, Guest] = {}
        self._expected: dict[MigrationId, _Expected] = {}
        self._reserved: dict[DomainUUID, str] = {}
        self._transfers: dict[MigrationId, Transfer] = {}

    # The host

    @hookimpl
    async def connection_open(self, request: OpenRequest) -> OpenReply:
        path = root_of(request.uri)
        binary = find_emulator()
        root = await Root.open(path)
        try:
            self._emulator = await anyio.to_thread.run_sync(probe, binary, root.path / "probe.json")
            self._root, self._tasks, self._emit = root, request.tasks, request.emit
            self._defined = root.definitions()
            for run in root.run_directories():
                guest = await Guest.find(
                    run, tasks=request.tasks, ended=self._guest_ended, happened=self._guest_event
                )
                if guest is not None:
                    self._take(guest)
        except BaseException:
            root.close()
            raise
        return OpenReply(journal=root.journal, address=request.uri.render())

    def _take(self, guest: Guest) -> None:
        if guest.record.migration:
            self._receivers[MigrationId(guest.record.migration)] = guest
        else:
            self._guests[DomainUUID(guest.record.uuid)] = guest

    @hookimpl
    async def connection_close(self, request: HostRequest) -> None:
        self._root.close()

    @hookimpl
    async def capabilities(self, request: HostRequest) -> Capabilities:
        return Capabilities(
            scheme="qemu",
            hypervisor="QEMU",
            version=self._emulator.version,
            arch=platform.machine(),
            host_uuid=self._root.uuid,
            cpu_model=host_cpu(),
            machines=tuple(sorted(set(self._emulator.machines.values()))),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            features=frozenset(Feature) - {Feature.POSTCOPY},
            uri_transports=("tcp", "unix"),
            domain_types=("kvm", "qemu") if self._emulator.kvm else ("qemu",),
        )

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

    @hookimpl
    async def domain_list(self, request: HostRequest) -> list[DomainInfo]:
        found = []
        for uuid in dict.fromkeys([*self._guests, *self._defined]):
            with suppress(DomainNotFoundError):  # a transient one may end while the others are asked
                found.append(await self._info(uuid))
        return found

    @hookimpl
    async def domain_lookup(self, request: LookupRequest) -> DomainInfo:
        if request.uuid is not None:
            return await self._info(request.uuid)
        for uuid, guest in self._guests.items():
            if guest.record.name == request.name:
                return await self._info(uuid)
        for uuid, definition in self._defined.items():
            if read_pinned(definition).definition.name == request.name:
                return await self._info(uuid)
        raise DomainNotFoundError(f"no domain {request.name} in {self._root.path}", domain=request.name or "")

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

    @hookimpl
    async def domain_define(self, request: DefinitionRequest) -> DomainInfo:
        machine = self._pin(self._admit(read_machine(request.definition)))
        definition = machine.definition
        self._root.write_definition(definition.uuid, definition.render())
        self._defined[definition.uuid] = definition.render()
        self._tell(DomainEventKind.DEFINED, definition.name, definition.uuid)
        return await self._info(definition.uuid)

    @hookimpl
    async def domain_create(self, request: DefinitionRequest) -> DomainInfo:
        machine = self._pin(self._admit(read_machine(request.definition)))
        definition = machine.definition
        if definition.uuid in self._guests or definition.uuid in self._reserved:
            raise DomainExistsError(f"domain {definition.name} is active already", domain=definition.name)
        await self._start(machine, persistent=definition.uuid in self._defined, paused=request.paused)
        return await self._info(definition.uuid)

    @hookimpl
    async def domain_start(self, request: DomainRequest) -> DomainInfo:
        if request.uuid in self._guests or request.uuid in self._reserved:
            raise DomainStateError(f"domain {request.name} is active already", domain=request.name)
        text = self._defined.get(request.uuid)
        if text is None:
            raise DomainNotFoundError(f"no domain {request.name} in {self._root.path}", domain=request.name)
        await self._start(self._pin(read_machine(text)), persistent=True, paused=request.paused)
        return await self._info(request.uuid)

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

    @hookimpl
    async def domain_suspend(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        async with guest.lock:
            await guest.command("stop")

    @hookimpl
    async def domain_resume(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        async with guest.lock:
            await guest.command("cont")

    @hookimpl
    async def domain_shutdown(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        async with guest.lock:
            await guest.command("system_powerdown")

    @hookimpl
    async def domain_destroy(self, request: DomainRequest) -> None:
        guest = self._active(request.uuid, request.name)
        guest.ending = "destroyed"
        with anyio.CancelScope(shield=True):
            await guest.kill()

    @hookimpl
    async def domain_undefine(self, request: DomainRequest) -> None:
        if request.uuid not in self._defined:
            await self._info(request.uuid)
            raise DomainStateError(
                f"domain {request.name} is transient: it has no definition", domain=request.name
            )
        self._undefine(request.uuid, request.name)

    def _undefine(self, uuid: DomainUUID, name: str) -> None:
        self._root.remove_definition(uuid)
        if self._defined.pop(uuid, None) is not None:
            self._tell(DomainEventKind.UNDEFINED, name, uuid)

    @hookimpl
    async def domain_definition(self, request: DomainRequest) -> str:
        guest = self._guests.get(request.uuid)
        if guest is not None:
            return guest.record.definition
        if request.uuid not in self._defined:
            raise DomainNotFoundError(f"no domain {request.name} in {self._root.path}", domain=request.name)
        return self._defined[request.uuid]

    @hookimpl
    async def domain_statistics(self, request: DomainRequest) -> DomainStatistics:
        guest = self._guests.get(request.uuid)
        if guest is None:
            return DomainStatistics(state=(await self._info(request.uuid)).state)
        cpu_s: float | None = None
        resident: int | None = None
        with suppress(OSError, IndexError, ValueError):  # the process may end while we read about it
            fields = Path(f"/proc/{guest.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        return DomainStatistics(state=await guest.state(), cpu_time_s=cpu_s, resident_bytes=resident)

    # Migration: before anything moves

    @hookimpl
    async def migrate_check(self, request: CheckRequest) -> CheckReply:
        if request.side is Side.SOURCE:
            return await self._check_source(request)
        return self._check_destination(request)

    async def _check_source(self, request: CheckRequest) -> CheckReply:
        machine = read_pinned(request.definition)
        guest = self._guests.get(request.domain.uuid)
        findings = await self._check_guest(guest, machine) if guest is not None else []
        opened = guest.process.opened_files() if guest is not None else None
        told = {path: _file_identity(path, opened) for path in disk_paths(machine)}
        emulator = self._running(guest)
        cpu = emulator.cpu(machine.cpu, accelerated=machine.accelerated)
        return CheckReply(findings=tuple(findings), facts={"disks": json.dumps(told), "cpu": cpu or ""})

    def _running(self, guest: Guest | None) -> Emulator:
        """The emulator as the guest runs in it: it may have been updated since the guest was started."""
        return replace(self._emulator, version=guest.version) if guest is not None else self._emulator

    async def _check_guest(self, guest: Guest, machine: Machine) -> list[Finding]:
        findings: list[Finding] = []
        state, info = await guest.command_all(Command("query-status"), Command("query-migrate"))
        status = state["status"]
        if status in ("guest-panicked", "internal-error", "io-error", "shutdown"):
            findings.append(
                _blocker(
                    "guest-state", Side.SOURCE, f"the guest is in the state {status}", "reset or restart it"
                )
            )
        if status == "postmigrate":
            # QEMU 7.2 migration/migration.c, migrate_prepare.
            findings.append(
                _blocker(
                    "guest-state",
                    Side.SOURCE,
                    "the guest is paused since an earlier migration, and QEMU sends it only after it has run again",
                    "resume it, and suspend it again if it is to arrive paused",
                )
            )
        memory = machine.definition.memory_bytes
        emulator = self._running(guest)
        safe = emulator.migratable_memory(memory, accelerated=machine.accelerated)
        if status == "running" and safe != memory:
            findings.append(
                _blocker(
                    "writes-lost",
                    Side.SOURCE,
                    f"QEMU {dotted(emulator.version)} without KVM loses writes of a running guest whose memory"
                    f" is a multiple of 256 KiB, as this one's {memory // 1024} KiB are",
                    f"suspend the guest while it moves, or restart it, which gives it {safe // 1024} KiB",
                )
            )
        if info.get("status") in _ACTIVE:
            findings.append(
                _blocker(
                    "job-active",
                    Side.SOURCE,
                    "QEMU is sending this guest already",
                    "wait for it or cancel it",
                )
            )
        findings.extend(
            _blocker("device-unmigratable", Side.SOURCE, str(reason), "remove the device")
            for reason in info.get("blocked-reasons") or ()
        )
        return findings

    def _check_destination(self, request: CheckRequest) -> CheckReply:
        findings: list[Finding] = []
        side = Side.DESTINATION
        try:
            machine = read_pinned(request.definition)
        except DefinitionError as error:
            return CheckReply(
                findings=(_blocker("definition-unknown", side, error.message, "change the definition"),)
            )
        if machine.machine not in self._emulator.machines:
            findings.append(
                _blocker(
                    "machine-unknown",
                    side,
                    f"QEMU {dotted(self._emulator.version)} has no machine type {machine.machine}",
                    "install a newer QEMU there",
                )
            )
        if machine.accelerated and not self._emulator.kvm:
            findings.append(
                _blocker(
                    "accelerator-missing",
                    side,
                    "the guest runs with KVM, which does not work there",
                    "mend KVM there",
                )
            )
        findings += self._check_cpu(machine, request.facts.get("cpu", ""))
        available = _available_bytes()
        if available is not None and available < request.domain.memory_bytes:
            findings.append(
                _blocker(
                    "memory-short",
                    side,
                    f"the guest has {request.domain.memory_bytes} bytes of memory and the host has {available} free",
                    "free memory there, or choose another host",
                )
            )
        for path in boot_paths(machine):
            if not os.access(path, os.R_OK):
                findings.append(
                    _blocker("file-missing", side, f"{path} cannot be read there", "copy it there")
                )
        told = json.loads(request.facts.get("disks", "{}"))
        findings.extend(
            finding
            for path in disk_paths(machine)
            if (finding := _check_disk(path, told.get(path))) is not None
        )
        return CheckReply(findings=tuple(findings))

    def _check_cpu(self, machine: Machine, told: str) -> list[Finding]:
        here = self._emulator.cpu(machine.cpu, accelerated=machine.accelerated)
        if here is None:
            return [
                _blocker(
                    "cpu-unknown",
                    Side.DESTINATION,
                    f"QEMU {dotted(self._emulator.version)} has no CPU model {machine.cpu}",
                    "install a newer QEMU there",
                )
            ]
        if told in ("", here):
            return []
        return [
            _blocker(
                "cpu-differs",
                Side.DESTINATION,
                f"the guest's CPU is {told}, and there it would be {here}",
                "give the guest a CPU model that both hosts have in full",
            )
        ]

    # Migration: source

    @hookimpl
    async def migrate_begin(self, request: BeginRequest) -> BeginReply:
        guest = self._guests.get(request.domain.uuid)
        if guest is None:
            raise BeginError(f"domain {request.domain.name} is not active", side=Side.SOURCE)
        # What the transfer needs is set now, while the receiver has not even been started.
        status, *_ = await guest.command_all(
            Command("query-status"), capabilities("events", "return-path"), parameters(request.options)
        )
        return BeginReply(
            definition=guest.record.definition,
            paused=status["status"] != "running",
            process=guest.process.identity,
        )

    def _guest_of(self, identity: str) -> Guest | None:
        """The live process of an identity, domain or receiver."""
        for guest in (*self._guests.values(), *self._receivers.values()):
            if guest.process.identity == identity:
                return guest
        return None

    @hookimpl
    async def migrate_perform(self, request: PerformRequest) -> PerformReply:
        guest = self._guest_of(request.process)
        if guest is None:
            raise InDoubtError(
                f"the process of domain {request.domain.name} is gone",
                evidence_missing="the destination's word",
                side=Side.SOURCE,
            )
        transfer = self._transfers[request.id] = Transfer(guest, request, self._tasks)
        try:
            return await transfer.run()
        finally:
            transfer.begun.set()
            del self._transfers[request.id]

    @hookimpl
    async def migrate_confirm(self, request: ConfirmRequest) -> ConfirmReply:
        guest = self._guest_of(request.process)
        if request.verdict is Verdict.GIVEN:
            return await self._let_go(guest, request)
        if guest is None:
            return ConfirmReply(guest_gone=True)
        async with guest.lock:
            state = await settle_source(guest)
            if not request.paused and state != "running":
                await guest.command("cont")
        return ConfirmReply()

    async def _let_go(self, guest: Guest | None, request: ConfirmRequest) -> ConfirmReply:
        statistics: TransferStatistics | None = None
        if guest is not None:
            guest.ending = "migrated-out"
            with suppress(HypervisorError):  # counters only; the guest is not ours any more
                statistics = statistics_of(await guest.quit_after("query-migrate"))
        if request.undefine:
            self._undefine(request.uuid, request.name)
        return ConfirmReply(statistics=statistics)

    @hookimpl
    async def migrate_tune(self, request: TuneRequest) -> None:
        guest = self._guest_of(request.process)
        if guest is None:
            raise HypervisorError("the guest's process is gone")
        wanted: dict[str, int] = {}
        if request.tuning.bandwidth_bytes_per_s is not None:
            wanted["max-bandwidth"] = request.tuning.bandwidth_bytes_per_s
        if request.tuning.max_downtime_ms is not None:
            wanted["downtime-limit"] = request.tuning.max_downtime_ms
        transfer = self._transfers.get(request.id)
        if transfer is not None:
            # Not before the transfer's own settings, which would undo this one.
            await transfer.begun.wait()
        if wanted:
            await guest.command("migrate-set-parameters", wanted)

    @hookimpl
    async def migrate_abort(self, request: AbortRequest) -> None:
        guest = self._guest_of(request.process)
        if guest is None:
            return
        with guest.control.events("MIGRATION") as events:
            try:
                await break_stream(guest)
            except MonitorClosedError:
                return  # with its process the transfer is gone too
            with anyio.move_on_after(_CANCEL_PATIENCE_S):
                while (await guest.command("query-migrate")).get("status") in _ACTIVE:
                    await events.get()

    @hookimpl
    async def migrate_sweep(self, request: SweepRequest) -> None:
        for migration_id, guest in list(self._receivers.items()):
            if migration_id in request.known:
                continue
            if await self._runs(guest):
                _log.warning(
                    "domain %s runs here, and the journal does not know how it came: it is taken in",
                    guest.record.name,
                )
                self._take_in(guest)
            else:
                await self._discard(guest)

    async def _runs(self, guest: Guest) -> bool:
        try:
            return await guest.run_state() == "running"
        except HypervisorError:
            if await guest.is_ending():
                return False
            raise

    @hookimpl
    async def migrate_evidence(self, request: EvidenceRequest) -> Evidence:
        guest = self._guest_of(request.process)
        if guest is None:
            return Evidence(guest=GuestEvidence.GONE)
        try:
            state = await guest.run_state()
            status = (await guest.command("query-migrate")).get("status", "none")
        except HypervisorError as error:
            if await guest.is_ending():
                return Evidence(guest=GuestEvidence.GONE)
            _log.warning("QEMU does not say what domain %s does: %s", request.name, error)
            return Evidence(guest=GuestEvidence.UNKNOWN)
        transfer = TransferEvidence.FAILED
        if status == "none":
            transfer = TransferEvidence.NONE
        elif status in _ACTIVE:
            transfer = TransferEvidence.ACTIVE
        elif status == "completed":
            # "completed" of an earlier arrival is no sign of this transfer: the run state tells the two apart.
            sent = state in ("finish-migrate", "postmigrate", "running")
            transfer = TransferEvidence.COMPLETED if sent else TransferEvidence.NONE
        return Evidence(guest=_EVIDENCE.get(state, GuestEvidence.HALTED), transfer=transfer)

    # Migration: destination

    @hookimpl
    async def migrate_prepare(self, request: PrepareRequest) -> PrepareReply:
        try:
            listen, propose = _listen_uri(request)
            if listen.startswith("unix:"):
                _require_free(listen.removeprefix("unix:"))
            machine = self._arriving(request)
        except (DefinitionError, DomainExistsError) as error:
            raise PrepareError(error.message, side=Side.DESTINATION) from error
        if request.uuid in self._guests or request.uuid in self._reserved:
            raise PrepareError(f"domain {request.name} is active here already", side=Side.DESTINATION)
        self._reserved[request.uuid] = request.name
        try:
            guest = await self._receiver(machine, request)
        except BaseException as error:
            self._reserved.pop(request.uuid, None)
            if isinstance(error, HypervisorError):
                raise PrepareError(error.message, side=Side.DESTINATION) from error
            raise
        self._receivers[request.id] = guest
        try:
            if listen.startswith("unix:"):
                guest.write(replace(guest.record, socket=listen.removeprefix("unix:")))
            *_, told = await guest.command_all(
                capabilities("events", "return-path", "late-block-activate"),
                Command("migrate-incoming", {"uri": listen}),
                Command("query-migrate"),
            )
            uri = propose or _proposed(told, request)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._discard(guest)
            if isinstance(error, HypervisorError):
                raise PrepareError(
                    f"the receiver cannot listen at {listen}: {error.message}", side=Side.DESTINATION
                ) from error
            raise
        return PrepareReply(migration_uri=uri, process=guest.process.identity)

    def _arriving(self, request: PrepareRequest | ExpectRequest) -> Machine:
        machine = self._admit(read_pinned(request.definition))
        if machine.definition.uuid != request.uuid:
            raise PrepareError(
                f"the definition is of domain {machine.definition.uuid}, not of {request.uuid}",
                side=Side.DESTINATION,
            )
        return machine

    async def _receiver(self, machine: Machine, request: PrepareRequest) -> Guest:
        """Start the process of a receiver, or take the one that was started ahead."""
        expected = self._expected.pop(request.id, None)
        if expected is not None:
            await expected.started.wait()
            guest, expected.guest = expected.guest, None
            if guest is not None and guest.record.definition == machine.definition.render():
                return guest
            if guest is not None:
                await guest.kill()
        return await self._spawn(machine, persistent=request.options.persist, migration=request.id)

    @hookimpl
    async def migrate_expect(self, request: ExpectRequest) -> None:
        machine = self._arriving(request)
        if request.uuid in self._guests or request.uuid in self._reserved:
            return
        expected = self._expected[request.id] = _Expected()
        try:
            try:
                expected.guest = await self._spawn(
                    machine, persistent=request.options.persist, migration=request.id
                )
            finally:
                expected.started.set()
            await anyio.sleep_forever()
        finally:
            self._expected.pop(request.id, None)
            if expected.guest is not None:
                with anyio.CancelScope(shield=True):
                    await expected.guest.kill()

    async def _discard(self, guest: Guest) -> None:
        self._reserved.pop(DomainUUID(guest.record.uuid), None)
        await guest.kill()

    @hookimpl
    async def migrate_finish(self, request: FinishRequest) -> None:
        guest = self._guest_of(request.process)
        if request.verdict is Verdict.DISCARD:
            self._reserved.pop(request.uuid, None)
            # By the migration too: prepare may have failed before the process had told its identity.
            guest = guest or self._receivers.get(request.id)
            if guest is not None:
                await self._discard(guest)
            return
        if guest is None:
            raise FinishError("the receiver's process is gone", side=Side.DESTINATION)
        async with guest.lock:
            await self._run(guest, request)

    async def _run(self, guest: Guest, request: FinishRequest) -> None:
        """Run the arrived guest; INVARIANT: never ``cont`` before the run state has left ``inmigrate``."""
        if not guest.loaded.is_set():
            state = await guest.run_state()
            if state == "running":
                return
            if state == "inmigrate":
                with anyio.move_on_after(_LOAD_PATIENCE_S):
                    await _first(guest.loaded, guest.gone)
                if not guest.loaded.is_set():
                    raise FinishError("the guest's state did not arrive whole", side=Side.DESTINATION)
        if guest.incoming_failed:
            raise FinishError(guest.incoming_failed, side=Side.DESTINATION)
        if request.paused:
            return
        try:
            await guest.control.execute("cont")
        except QMPCommandError as error:
            raise FinishError(error.description, side=Side.DESTINATION) from error
        except MonitorError as error:
            if isinstance(error, MonitorClosedError | MonitorTimeout) and error.sent:
                raise HypervisorError(str(error)) from error
            raise FinishError(
                f"the guest could not be told to run: {error}", side=Side.DESTINATION
            ) from error

    @hookimpl
    async def migrate_adopt(self, request: FinishRequest) -> DomainInfo:
        guest = self._guest_of(request.process)
        if guest is not None and guest.record.migration:
            self._take_in(guest)
        if guest is not None and request.persist:
            self._root.write_definition(request.uuid, guest.record.definition)
            self._defined[request.uuid] = guest.record.definition
        return await self._info(request.uuid)

    def _take_in(self, guest: Guest) -> None:
        """Make a receiver the domain's guest."""
        uuid = DomainUUID(guest.record.uuid)
        self._receivers.pop(MigrationId(guest.record.migration), None)
        guest.write(replace(guest.record, migration=""))
        self._guests[uuid] = guest
        self._reserved.pop(uuid, None)
        self._tell(DomainEventKind.MIGRATED_IN, guest.record.name, uuid)


def _blocker(code: str, side: Side, message: str, remedy: str) -> Finding:
    return Finding(code=code, severity=FindingSeverity.BLOCKER, side=side, message=message, remedy=remedy)


def _file_identity(path: str, opened: Container[tuple[int, int]] | None = None) -> list[str | int] | None:
    """What tells whether two hosts mean the same file: host boot, device and inode.

    :param opened: files that the guest's process has open; None where there is none to ask.
    :returns: None where the file cannot be read, or is another one than the guest has open.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if opened is not None and (status.st_dev, status.st_ino) not in opened:
        return None
    return [boot_id(), status.st_dev, status.st_ino]


def _check_disk(path: str, told: list[str | int] | None) -> Finding | None:
    here = _file_identity(path)
    if here is None or not os.access(path, os.R_OK):
        return _blocker(
            "storage-missing", Side.DESTINATION, f"{path} cannot be read there", "share the storage"
        )
    if here != told:
        return _blocker(
            "storage-not-shared",
            Side.DESTINATION,
            f"{path} there is another file than at the source",
            "put the disk on storage that both hosts share",
        )
    return None


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError) as error:
        _log.info("free memory is not known: %s", error)
    return None


def _listen_uri(request: PrepareRequest) -> tuple[str, str]:
    """Where the receiver listens, as QEMU writes it, and what to propose; '' where the port is not known yet."""
    if request.migration_uri is None:
        return f"tcp:{_bracketed(request.options.listen_address or '127.0.0.1')}:0", ""
    uri = MigrationURI.parse(request.migration_uri)
    if uri.protocol == "unix":
        if not uri.path or len(os.fsencode(uri.path)) > _UNIX_PATH_MAX:
            raise PrepareError(
                f"the socket's path has more than {_UNIX_PATH_MAX} bytes: use a shorter one",
                side=Side.DESTINATION,
            )
        return f"unix:{uri.path}", request.migration_uri
    if uri.protocol not in ("", "tcp"):
        raise PrepareError(f"QEMU has no transport {uri.protocol}: use tcp or unix", side=Side.DESTINATION)
    host = _bracketed(request.options.listen_address or uri.host or "")
    return f"tcp:{host}:{uri.port or 0}", request.migration_uri if uri.port else ""


def _require_free(path: str) -> None:
    """Refuse a socket's path that is somebody's: QEMU would remove whatever lies there.

    :raises PrepareError: somebody listens there, or it is no socket.
    """
    try:
        with socket.socket(socket.AF_UNIX) as caller:
            caller.setblocking(False)
            caller.connect(path)
        reason = "somebody listens there"
    except FileNotFoundError:
        return
    except BlockingIOError:
        reason = "somebody listens there"
    except ConnectionRefusedError as error:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            return  # left behind by somebody who is gone
        reason = str(error.strerror)
    except OSError as error:
        reason = str(error.strerror)
    raise PrepareError(f"the receiver cannot listen at unix:{path}: {reason}", side=Side.DESTINATION)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _proposed(told: dict[str, Any], request: PrepareRequest) -> str:
    """The migration URI with the port that the receiver got, by its answer to ``query-migrate``."""
    addresses: list[dict[str, Any]] = told.get("socket-address") or []
    for address in addresses:
        if address.get("type") == "inet":
            host = str(address["host"])
            if request.migration_uri is not None:
                host = MigrationURI.parse(request.migration_uri).host or host
            return f"tcp://{_bracketed(host)}:{address['port']}"
    raise HypervisorError("QEMU does not say where it listens")


async def _first(*events: anyio.Event) -> None:
    """Wait for the first of some events."""
    async with anyio.create_task_group() as tasks:
        for event in events:
            tasks.start_soon(partial(_wait_and_cancel, event, tasks))


async def _wait_and_cancel(event: anyio.Event, tasks: TaskGroup) -> None:
    await event.wait()
    tasks.cancel_scope.cancel()
