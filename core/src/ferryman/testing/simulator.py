"""The simulated hypervisor as a driver: scheme ``test``.

``test:///WORLD/HOST`` opens a host of a world in this process; ``test:///HOST`` is a host of the world ``default``.
It keeps every promise of :mod:`ferryman.hookspecs`, shares the behaviour of QEMU that the handover rests on (a source
whose stream breaks before completion runs again by itself; one that has completed does not), and fails where its
world's fault plan says so.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import anyio

from ferryman.capabilities import Capabilities
from ferryman.definition import Definition, parse_definition, read_memory
from ferryman.errors import (
    ConnectError,
    DefinitionError,
    DomainExistsError,
    DomainNotFoundError,
    DomainStateError,
    FinishError,
    HypervisorError,
    InDoubtError,
    OptionError,
    PerformError,
    PrepareError,
)
from ferryman.hookspecs import (
    AbortRequest,
    AutostartRequest,
    BeginReply,
    BeginRequest,
    CheckReply,
    CheckRequest,
    ConfirmReply,
    ConfirmRequest,
    DefinitionRequest,
    DomainRequest,
    EvidenceRequest,
    FinishRequest,
    HostRequest,
    LookupRequest,
    MemoryRequest,
    OpenReply,
    OpenRequest,
    PerformReply,
    PerformRequest,
    PrepareReply,
    PrepareRequest,
    RestoreRequest,
    SaveRequest,
    ShutdownRequest,
    StatisticsRequest,
    SweepRequest,
    TuneRequest,
    Verdict,
    hookimpl,
)
from ferryman.testing.faults import Fault
from ferryman.testing.world import PAGE_BYTES, HostState, Process, ProcessState, World, world
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
    GuestState,
    ShutdownMode,
    Side,
    TransferEvidence,
    TransferStatistics,
)
from ferryman.uri import MigrationURI

if TYPE_CHECKING:
    from collections.abc import Callable

NAMESPACE = "urn:ferryman:test"
"""``<metadata><guest xmlns="urn:ferryman:test" dirty-bytes-per-s="N"/></metadata>`` sets a guest's dirty rate."""

_DEFAULT_DOWNTIME_MS = 300
_START_S = 0.04
_RUN_S = 0.001
_FIRST_PORT = 49_152
_SENDING = (ProcessState.RUNNING, ProcessState.PAUSED)


_SAVED = b"ferryman-test-save 1\n"


_FEATURES = frozenset(
    {
        Feature.LIVE,
        Feature.RENAME,
        Feature.BANDWIDTH,
        Feature.BANDWIDTH_IN_FLIGHT,
        Feature.MAX_DOWNTIME,
        Feature.MAX_DOWNTIME_IN_FLIGHT,
        Feature.ABORT,
        Feature.PAUSED,
        Feature.PERSIST,
        Feature.UNDEFINE_SOURCE,
    }
)


class _StreamCut(Exception):
    """The link broke while something was being sent."""


class SimulatedDriver:
    """Driver of the scheme ``test``."""

    def __init__(self) -> None:
        self._world: World
        self._host: HostState
        self._emit: Callable[[DomainEvent], None]
        self._limits: dict[str, tuple[int | None, int]] = {}
        self._autodestroy: list[Process] = []

    # The host

    @hookimpl
    async def connection_open(self, request: OpenRequest) -> OpenReply:
        parts = [part for part in request.uri.path.split("/") if part]
        if not 1 <= len(parts) <= 2:
            raise ConnectError(f"{request.uri} names no host: write test:///WORLD/HOST")
        self._world = world(parts[0] if len(parts) == 2 else "default")
        self._host = self._world.host(parts[-1])
        self._emit = request.emit
        return OpenReply(journal=self._host.journal, address=f"test:///{self._world.name}/{self._host.name}")

    @hookimpl
    async def connection_close(self, request: HostRequest) -> None:
        for process in list(self._autodestroy):
            self._end(process, DomainEventKind.DESTROYED)

    @hookimpl
    async def capabilities(self, request: HostRequest) -> Capabilities:
        return Capabilities(
            scheme="test",
            hypervisor="simulated",
            version=(1, 0, 0),
            arch="x86_64",
            host_uuid=self._host.uuid,
            cpu_model="",
            machines=(),
            memory_bytes=self._host.memory_bytes,
            features=_FEATURES,
            uri_transports=("tcp",),
            domain_types=("test",),
        )

    # Domains

    def _find(self, uuid: DomainUUID, name: str = "") -> Process:
        process = self._host.active(uuid)
        if process is None:
            raise DomainStateError(f"domain {name or uuid} is not active at {self._host.name}", domain=name)
        return process

    def _infos(self) -> dict[DomainUUID, DomainInfo]:
        """All domains, the active ones first."""
        active = self._host.actives()
        return {
            uuid: self._info(uuid, active.get(uuid)) for uuid in dict.fromkeys([*active, *self._host.defined])
        }

    def _info(self, uuid: DomainUUID, process: Process | None) -> DomainInfo:
        text = self._host.defined[uuid] if process is None else process.definition
        facts = _facts(text)
        state = DomainState.SHUT_OFF
        if process is not None:
            state = DomainState.RUNNING if process.state is ProcessState.RUNNING else DomainState.PAUSED
        return DomainInfo(
            name=facts.name,
            uuid=uuid,
            state=state,
            persistent=uuid in self._host.defined,
            memory_bytes=facts.memory_bytes,
            vcpus=facts.vcpus,
            autostart=uuid in self._host.autostart,
            current_memory_bytes=None if process is None else facts.current_memory_bytes,
        )

    def _require_info(self, uuid: DomainUUID, name: str = "") -> DomainInfo:
        process = self._host.active(uuid)
        if process is None and uuid not in self._host.defined:
            raise DomainNotFoundError(f"no domain {name or uuid} at {self._host.name}", domain=name or uuid)
        return self._info(uuid, process)

    @hookimpl
    async def domain_list(self, request: HostRequest) -> list[DomainInfo]:
        return list(self._infos().values())

    @hookimpl
    async def domain_lookup(self, request: LookupRequest) -> DomainInfo:
        if request.uuid is not None:
            return self._require_info(request.uuid)
        for info in self._infos().values():
            if info.name == request.name:
                return info
        raise DomainNotFoundError(f"no domain {request.name} at {self._host.name}", domain=request.name or "")

    def _read(self, text: str) -> Definition:
        definition = parse_definition(text)
        for info in self._infos().values():
            if info.name == definition.name and info.uuid != definition.uuid:
                raise DomainExistsError(
                    f"the name {definition.name} belongs to domain {info.uuid}", domain=definition.name
                )
        return definition

    @hookimpl
    async def domain_define(self, request: DefinitionRequest) -> DomainInfo:
        definition = self._read(request.definition)
        self._host.defined[definition.uuid] = definition.render()
        self._tell(DomainEventKind.DEFINED, definition.name, definition.uuid)
        return self._require_info(definition.uuid)

    @hookimpl
    async def domain_create(self, request: DefinitionRequest) -> DomainInfo:
        definition = self._read(request.definition)
        if self._host.active(definition.uuid) is not None:
            raise DomainExistsError(f"domain {definition.name} is active", domain=definition.name)
        self._spawn(definition, paused=request.paused, autodestroy=request.autodestroy)
        return self._require_info(definition.uuid)

    @hookimpl
    async def domain_start(self, request: DomainRequest) -> DomainInfo:
        self._require_info(request.uuid, request.name)
        if self._host.active(request.uuid) is not None:
            raise DomainStateError(f"domain {request.name} is active already", domain=request.name)
        definition = parse_definition(self._host.defined[request.uuid])
        self._spawn(definition, paused=request.paused, autodestroy=request.autodestroy)
        return self._require_info(request.uuid)

    def _spawn(self, definition: Definition, *, paused: bool, autodestroy: bool) -> None:
        process = self._process(definition, ProcessState.PAUSED)
        self._host.processes[process.identity] = process
        if autodestroy:
            self._autodestroy.append(process)
        self._tell(DomainEventKind.STARTED, definition.name, definition.uuid)
        if not paused:
            self._world.run(process)

    def _process(self, definition: Definition, state: ProcessState) -> Process:
        pages = max(1, definition.memory_bytes // PAGE_BYTES)
        if definition.memory_bytes > self._host.memory_bytes:
            raise HypervisorError(f"{self._host.name} has no memory for domain {definition.name}")
        guest = definition.root.find(f"metadata/{{{NAMESPACE}}}guest")
        rate = 0.0 if guest is None else float(guest.get("dirty-bytes-per-s", "0")) / PAGE_BYTES
        return Process(
            identity=f"{self._host.name}-{self._world.number()}",
            host=self._host.name,
            uuid=definition.uuid,
            name=definition.name,
            definition=definition.render(),
            persistent=definition.uuid in self._host.defined,
            pages=pages,
            dirty_pages_per_s=rate,
            state=state,
            memory=array("Q", bytes(8 * pages)),
        )

    @hookimpl
    async def domain_suspend(self, request: DomainRequest) -> None:
        process = self._find(request.uuid, request.name)
        if process.state is ProcessState.RUNNING:
            process.state = ProcessState.PAUSED
            self._tell(DomainEventKind.SUSPENDED, request.name, request.uuid)

    @hookimpl
    async def domain_resume(self, request: DomainRequest) -> None:
        process = self._find(request.uuid, request.name)
        if process.state is not ProcessState.RUNNING:
            self._world.run(process)
            self._tell(DomainEventKind.RESUMED, request.name, request.uuid)

    @hookimpl
    async def domain_shutdown(self, request: ShutdownRequest) -> None:
        self._end(self._asked(request), DomainEventKind.SHUT_DOWN)

    @hookimpl
    async def domain_reboot(self, request: ShutdownRequest) -> None:
        self._reset(self._asked(request))

    @hookimpl
    async def domain_reset(self, request: DomainRequest) -> None:
        self._reset(self._find(request.uuid, request.name))

    def _asked(self, request: ShutdownRequest) -> Process:
        process = self._find(request.uuid, request.name)
        if request.mode is ShutdownMode.AGENT:
            raise DomainStateError(f"domain {request.name} has no guest agent", domain=request.name)
        return process

    def _reset(self, process: Process) -> None:
        process.memory = array("Q", bytes(8 * process.pages))
        process.steps, process.owed = 0, 0.0
        self._world.forget(process.uuid)
        self._tell(DomainEventKind.REBOOTED, process.name, process.uuid)

    @hookimpl
    async def domain_autostart(self, request: AutostartRequest) -> None:
        self._require_persistent(request.uuid, request.name)
        if request.enabled:
            self._host.autostart.add(request.uuid)
        else:
            self._host.autostart.discard(request.uuid)

    @hookimpl
    async def domain_set_memory(self, request: MemoryRequest) -> None:
        info = self._require_info(request.uuid, request.name)
        if request.memory_bytes > info.memory_bytes:
            raise OptionError(
                f"domain {request.name} has {info.memory_bytes} bytes of memory, less than {request.memory_bytes}",
                option="memory_bytes",
            )
        process = self._host.active(request.uuid)
        active = process is not None
        text = str(request.memory_bytes // 1024)
        if request.scope.reaches_guest(active=active):
            process = self._find(request.uuid, request.name)
        if request.scope.reaches_definition(active=active):
            self._require_persistent(request.uuid, request.name)
            edited = parse_definition(self._host.defined[request.uuid]).edited(currentMemory=text)
            self._host.defined[request.uuid] = edited.render()
        if process is not None and request.scope.reaches_guest(active=active):
            process.definition = parse_definition(process.definition).edited(currentMemory=text).render()
            self._tell(DomainEventKind.MEMORY_CHANGED, request.name, request.uuid, str(int(text) * 1024))

    def _require_persistent(self, uuid: DomainUUID, name: str) -> None:
        self._require_info(uuid, name)
        if uuid not in self._host.defined:
            raise DomainStateError(f"domain {name} is transient: it has no definition", domain=name)

    @hookimpl
    async def domain_save(self, request: SaveRequest) -> None:
        process = self._find(request.uuid, request.name)
        head = {
            "definition": process.definition,
            "running": process.state is ProcessState.RUNNING,
            "steps": process.steps,
            "owed": process.owed,
        }
        data = _SAVED + json.dumps(head).encode() + b"\n" + process.memory.tobytes()
        path = anyio.Path(request.path)
        unfinished = path.with_name(path.name + ".new")
        try:
            await unfinished.write_bytes(data)
            await unfinished.rename(path)
        except OSError as error:
            raise HypervisorError(f"{path} cannot be written: {error.strerror}") from error
        self._end(process, DomainEventKind.SAVED)

    @hookimpl
    async def domain_restore(self, request: RestoreRequest) -> DomainInfo:
        try:
            data = await anyio.Path(request.path).read_bytes()
        except OSError as error:
            raise DefinitionError(f"{request.path} cannot be read: {error.strerror}") from error
        head, _newline, memory = data.removeprefix(_SAVED).partition(b"\n")
        try:
            told = json.loads(head if data.startswith(_SAVED) else b"")
            text, running, steps, owed = (told[name] for name in ("definition", "running", "steps", "owed"))
        except (ValueError, KeyError, TypeError) as error:
            raise DefinitionError(f"{request.path} holds no guest of the simulated hypervisor") from error
        saved = self._read(text)
        definition = saved if request.definition is None else self._read(request.definition)
        if definition.uuid != saved.uuid:
            raise DefinitionError(f"{request.path} holds domain {saved.uuid}, not {definition.uuid}")
        request.admit(definition.uuid, definition.name)
        if self._host.active(definition.uuid) is not None:
            raise DomainExistsError(f"domain {definition.name} is active", domain=definition.name)
        process = self._process(definition, ProcessState.PAUSED)
        if len(memory) != 8 * process.pages:
            raise DefinitionError(f"{request.path} is not whole, or of a guest with other memory")
        process.memory, process.steps, process.owed = array("Q", memory), steps, owed
        self._host.processes[process.identity] = process
        self._tell(DomainEventKind.STARTED, definition.name, definition.uuid, "restored")
        if not (request.paused if request.paused is not None else not running):
            self._world.run(process)
        return self._require_info(definition.uuid)

    @hookimpl
    async def domain_destroy(self, request: DomainRequest) -> None:
        self._end(self._find(request.uuid, request.name), DomainEventKind.DESTROYED)

    @hookimpl
    async def domain_undefine(self, request: DomainRequest) -> None:
        if self._host.defined.pop(request.uuid, None) is None:
            raise DomainStateError(f"domain {request.name} is not persistent", domain=request.name)
        self._host.autostart.discard(request.uuid)
        self._tell(DomainEventKind.UNDEFINED, request.name, request.uuid)

    @hookimpl
    async def domain_definition(self, request: DomainRequest) -> str:
        process = self._host.active(request.uuid)
        if process is not None:
            return process.definition
        self._require_info(request.uuid, request.name)
        return self._host.defined[request.uuid]

    @hookimpl
    async def domain_statistics(self, request: DomainRequest) -> DomainStatistics:
        return _statistics(self._require_info(request.uuid, request.name))

    @hookimpl
    async def host_statistics(self, request: StatisticsRequest) -> dict[DomainUUID, DomainStatistics]:
        infos = self._infos()
        asked = infos if request.uuids is None else request.uuids
        return {uuid: _statistics(infos[uuid]) for uuid in asked if uuid in infos}

    def _end(self, process: Process, kind: DomainEventKind) -> None:
        process.state = ProcessState.GONE
        self._host.processes.pop(process.identity, None)
        if process in self._autodestroy:
            self._autodestroy.remove(process)
        self._world.forget(process.uuid)
        self._tell(kind, process.name, process.uuid)

    def _tell(self, kind: DomainEventKind, name: str, uuid: DomainUUID, detail: str = "") -> None:
        self._emit(DomainEvent(kind=kind, name=name, uuid=uuid, time_s=self._world.clock_s, detail=detail))

    # Faults

    async def _fault(
        self, point: str, process: Process | None, error: Exception, *, receiver: Process | None = None
    ) -> None:
        fault = self._world.faults.take(self._host.name, point)
        match fault:
            case None:
                return
            case Fault.FAIL:
                raise error
            case Fault.BREAK_CONTRACT:
                raise ValueError(f"planted at {point}")
            case Fault.CUT:
                raise _StreamCut(point)
            case Fault.HANG:
                await anyio.sleep_forever()
            case Fault.KILL_GUEST:
                if process is not None:
                    process.state = ProcessState.GONE
            case Fault.CORRUPT:
                arrived = receiver or process
                if arrived is not None:
                    arrived.memory[arrived.pages // 2] ^= 1
            case Fault.RUN_TWICE:
                if process is not None:
                    self._world.run(process)

    # Migration, source

    @hookimpl
    async def migrate_check(self, request: CheckRequest) -> CheckReply:
        if request.side is Side.SOURCE:
            if not any(process.uuid == request.domain.uuid for process in self._autodestroy):
                return CheckReply()
            bound = Finding(
                code="autodestroy",
                severity=FindingSeverity.BLOCKER,
                side=Side.SOURCE,
                message=f"domain {request.domain.name} ends with the connection that started it",
                remedy="start it without autodestroy",
            )
            return CheckReply(findings=(bound,))
        used = sum(p.pages * PAGE_BYTES for p in self._host.processes.values())
        if used + request.domain.memory_bytes <= self._host.memory_bytes:
            return CheckReply()
        short = Finding(
            code="memory-short",
            severity=FindingSeverity.BLOCKER,
            side=Side.DESTINATION,
            message=f"{self._host.name} has {self._host.memory_bytes - used} bytes of memory left",
            remedy="free memory there, or choose another host",
        )
        return CheckReply(findings=(short,))

    @hookimpl
    async def migrate_begin(self, request: BeginRequest) -> BeginReply:
        process = self._find(request.domain.uuid, request.domain.name)
        await self._fault("migrate_begin.before", process, HypervisorError("planted at begin"))
        process.transfer = "none"
        await self._fault("migrate_begin.after", process, HypervisorError("planted after begin"))
        return BeginReply(
            definition=process.definition,
            paused=process.state is not ProcessState.RUNNING,
            process=process.identity,
        )

    @hookimpl
    async def migrate_perform(self, request: PerformRequest) -> PerformReply:
        process = self._host.processes.get(request.process)
        if process is None or process.state is ProcessState.GONE:
            raise InDoubtError("the guest's process is gone", evidence_missing="the destination's word")
        was_running = process.state is ProcessState.RUNNING
        options = request.options
        self._limits[request.id] = (
            options.bandwidth_bytes_per_s,
            options.max_downtime_ms or _DEFAULT_DOWNTIME_MS,
        )
        process.transfer = "active"
        try:
            return await self._send(request, process, was_running=was_running)
        except (_StreamCut, PerformError) as error:
            self._stay(process, was_running=was_running)
            raise PerformError(
                f"the stream to {request.migration_uri} broke: {error}",
                side=Side.SOURCE,
                domain=process.name,
                guest_state=GuestState.SOURCE,
            ) from error
        except anyio.get_cancelled_exc_class():
            self._stay(process, was_running=was_running)
            raise
        finally:
            self._limits.pop(request.id, None)

    def _stay(self, process: Process, *, was_running: bool) -> None:
        process.transfer = "failed"
        if was_running and process.state is ProcessState.PAUSED:
            self._world.run(process)

    async def _send(self, request: PerformRequest, process: Process, *, was_running: bool) -> PerformReply:
        receiver = self._receiver(request.migration_uri)
        failed = PerformError("planted in perform")
        await self._fault("migrate_perform.before", process, failed)
        begin_s = self._world.clock_s
        sent_bytes, iteration, first, count = 0, 0, 0, process.pages
        while True:
            iteration += 1
            bandwidth, downtime_ms = self._limits[request.id]
            speed = min(self._world.link_bytes_per_s, bandwidth or self._world.link_bytes_per_s)
            seconds = count * PAGE_BYTES / speed
            if iteration > 1 and seconds * 1000 <= downtime_ms:
                break
            steps = process.steps
            self._copy(process, receiver, first, count)
            await self._world.elapse(seconds)
            await self._fault("migrate_perform.iteration", process, failed, receiver=receiver)
            self._require_alive(process, receiver)
            sent_bytes += count * PAGE_BYTES
            dirtied = min(process.pages, process.steps - steps)
            first, count = steps % process.pages, dirtied
            request.progress(
                TransferStatistics(
                    iteration=iteration,
                    transferred_bytes=sent_bytes,
                    remaining_bytes=count * PAGE_BYTES,
                    total_bytes=process.pages * PAGE_BYTES,
                    dirty_bytes_per_s=int(dirtied * PAGE_BYTES / seconds) if seconds else 0,
                    bandwidth_bytes_per_s=speed,
                    expected_downtime_ms=count * PAGE_BYTES / speed * 1000,
                )
            )
        process.state = ProcessState.PAUSED
        await self._fault("migrate_perform.stopped", process, failed, receiver=receiver)
        self._copy(process, receiver, first, count)
        await self._world.elapse(seconds)
        receiver.steps, receiver.owed = process.steps, process.owed
        receiver.whole, receiver.state = True, ProcessState.PAUSED
        # From here to completion the destination has everything, and the source may still run again by itself.
        await self._fault("migrate_perform.last-byte", process, failed, receiver=receiver)
        self._require_alive(process, receiver)
        process.transfer = "completed"
        process.state = ProcessState.HANDED_OVER
        await self._fault("migrate_perform.completed", process, failed, receiver=receiver)
        downtime_ms_seen = seconds * 1000
        return PerformReply(
            statistics=TransferStatistics(
                iteration=iteration,
                transferred_bytes=sent_bytes + count * PAGE_BYTES,
                remaining_bytes=0,
                total_bytes=process.pages * PAGE_BYTES,
                bandwidth_bytes_per_s=speed,
                downtime_ms=downtime_ms_seen,
                total_ms=(self._world.clock_s - begin_s) * 1000,
            ),
            stopped_for_ms=downtime_ms_seen if was_running else None,
        )

    def _copy(self, process: Process, receiver: Process, first: int, count: int) -> None:
        end = first + count
        receiver.memory[first : min(end, process.pages)] = process.memory[first : min(end, process.pages)]
        if end > process.pages:
            receiver.memory[: end - process.pages] = process.memory[: end - process.pages]

    def _receiver(self, text: str) -> Process:
        uri = MigrationURI.parse(text)
        host = self._world.hosts.get(uri.host or "")
        process = None if host is None else host.receivers.get(uri.port or 0)
        if process is None or process.state is not ProcessState.RECEIVING:
            raise PerformError(f"nobody receives at {text}", guest_state=GuestState.SOURCE)
        return process

    def _require_alive(self, process: Process, receiver: Process) -> None:
        if process.state is ProcessState.GONE:
            raise InDoubtError("the guest's process died", evidence_missing="the destination's word")
        if receiver.state is ProcessState.GONE:
            raise _StreamCut("the receiver died")
        if frozenset({process.host, receiver.host}) in self._world.cut:
            raise _StreamCut("the link is cut")

    @hookimpl
    async def migrate_confirm(self, request: ConfirmRequest) -> ConfirmReply:
        process = self._host.processes.get(request.process)
        await self._fault("migrate_confirm.before", process, HypervisorError("planted at confirm"))
        if process is not None and process.state is ProcessState.GONE:
            self._end(process, DomainEventKind.CRASHED)
            process = None
        if request.verdict is Verdict.GIVEN:
            if process is not None:
                self._end(process, DomainEventKind.MIGRATED_OUT)
            if request.undefine:
                self._host.defined.pop(request.uuid, None)
                self._host.autostart.discard(request.uuid)
        elif process is not None and process.state in (ProcessState.HANDED_OVER, ProcessState.PAUSED):
            process.state = ProcessState.PAUSED
            if not request.paused:
                self._world.run(process)
        await self._fault("migrate_confirm.after", process, HypervisorError("planted after confirm"))
        return ConfirmReply(guest_gone=request.verdict is Verdict.KEPT and process is None)

    @hookimpl
    async def migrate_tune(self, request: TuneRequest) -> None:
        bandwidth, downtime_ms = self._limits[request.id]
        if request.tuning.bandwidth_bytes_per_s is not None:
            bandwidth = request.tuning.bandwidth_bytes_per_s or None
        self._limits[request.id] = (bandwidth, request.tuning.max_downtime_ms or downtime_ms)

    @hookimpl
    async def migrate_abort(self, request: AbortRequest) -> None:
        process = self._host.processes.get(request.process)
        if process is not None and process.transfer == "active":
            process.transfer = "failed"

    # Migration, destination

    @hookimpl
    async def migrate_prepare(self, request: PrepareRequest) -> PrepareReply:
        await self._fault("migrate_prepare.before", None, PrepareError("planted at prepare"))
        definition = parse_definition(request.definition)
        try:
            process = self._process(definition, ProcessState.RECEIVING)
        except HypervisorError as error:
            raise PrepareError(error.message) from error
        process.whole, process.migration = False, request.id
        port = _FIRST_PORT + self._world.number()
        self._host.processes[process.identity] = process
        self._host.receivers[port] = process
        try:
            await self._world.elapse(_START_S)
            await self._fault("migrate_prepare.after", process, PrepareError("planted after prepare"))
        except BaseException:
            self._discard(process)
            raise
        return PrepareReply(migration_uri=f"tcp://{self._host.name}:{port}", process=process.identity)

    @hookimpl
    async def migrate_finish(self, request: FinishRequest) -> None:
        process = self._host.processes.get(request.process)
        if request.verdict is Verdict.DISCARD:
            if process is not None:
                self._discard(process)
            return
        await self._fault("migrate_finish.before", process, FinishError("planted at finish"))
        if process is None or process.state is ProcessState.GONE:
            raise FinishError("the receiver is gone")
        if process.state is ProcessState.RUNNING:
            return
        if not process.whole:
            raise FinishError("the guest's state is not whole")
        await self._world.elapse(_RUN_S)
        if not request.paused:
            self._world.run(process)
        await self._fault("migrate_finish.after", process, HypervisorError("planted after finish"))

    @hookimpl
    async def migrate_adopt(self, request: FinishRequest) -> DomainInfo:
        process = self._host.processes.get(request.process)
        if process is not None:
            process.migration = ""
            self._forget_port(process)
            if request.persist:
                self._host.defined[request.uuid] = process.definition
            self._tell(DomainEventKind.MIGRATED_IN, request.name, request.uuid)
        return self._require_info(request.uuid, request.name)

    def _discard(self, process: Process) -> None:
        process.state = ProcessState.GONE
        self._host.processes.pop(process.identity, None)
        self._forget_port(process)

    def _forget_port(self, process: Process) -> None:
        for port, receiver in list(self._host.receivers.items()):
            if receiver is process:
                del self._host.receivers[port]

    @hookimpl
    async def migrate_sweep(self, request: SweepRequest) -> None:
        for process in list(self._host.processes.values()):
            if not process.migration or process.migration in request.known:
                continue
            if process.state is ProcessState.RUNNING:
                process.migration = ""
                self._forget_port(process)
                self._tell(DomainEventKind.MIGRATED_IN, process.name, process.uuid)
            else:
                self._discard(process)

    @hookimpl
    async def migrate_evidence(self, request: EvidenceRequest) -> Evidence:
        process = self._host.processes.get(request.process)
        if process is None or process.state is ProcessState.GONE:
            return Evidence(guest=GuestEvidence.GONE)
        running = process.state is ProcessState.RUNNING
        return Evidence(
            guest=GuestEvidence.RUNNING if running else GuestEvidence.STOPPED,
            transfer=TransferEvidence(process.transfer),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """What a definition says of a domain."""

    name: str
    memory_bytes: int
    vcpus: int
    current_memory_bytes: int


@lru_cache(maxsize=4096)
def _facts(text: str) -> _Facts:
    """Read a definition; kept, since every look at a host with many domains reads them all."""
    definition = parse_definition(text)
    element = definition.root.find("currentMemory")
    return _Facts(
        name=definition.name,
        memory_bytes=definition.memory_bytes,
        vcpus=definition.vcpus,
        current_memory_bytes=definition.memory_bytes if element is None else read_memory(element),
    )


def _statistics(info: DomainInfo) -> DomainStatistics:
    return DomainStatistics(state=info.state, current_memory_bytes=info.current_memory_bytes)
