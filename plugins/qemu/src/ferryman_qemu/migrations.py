"""The driver of QEMU: hooks of both sides of a migration."""

from __future__ import annotations

import logging
import os
import socket
import stat
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from ferryman.errors import (
    BeginError,
    DefinitionError,
    DomainExistsError,
    FinishError,
    GuestLostError,
    HypervisorError,
    InDoubtError,
    PerformError,
    PrepareError,
)
from ferryman.hookspecs import (
    AbortRequest,
    BeginReply,
    BeginRequest,
    ConfirmReply,
    ConfirmRequest,
    EvidenceRequest,
    ExpectRequest,
    FinishRequest,
    MendReply,
    MendRequest,
    PerformReply,
    PerformRequest,
    PrepareReply,
    PrepareRequest,
    ServeReply,
    SweepRequest,
    TuneRequest,
    Verdict,
    hookimpl,
)
from ferryman.types import (
    DomainInfo,
    Evidence,
    GuestEvidence,
    MigrationId,
    Side,
    TransferEvidence,
    TransferStatistics,
)
from ferryman.uri import MigrationURI
from ferryman_qemu.guest import Guest, first_of
from ferryman_qemu.host import Expected, QemuHost
from ferryman_qemu.machine import (
    Machine,
    read_pinned,
)
from ferryman_qemu.monitor import Command, MonitorClosedError, MonitorError, MonitorTimeout, QMPCommandError
from ferryman_qemu.storage import (
    abandon_copies,
    decode_facts,
    disks_socket,
    encode_facts,
    end_export,
    export_disks,
    keep_targets,
    learn_facts,
    make_targets,
    remove_targets,
    stray_targets,
    wanted_copies,
)
from ferryman_qemu.tls import TLS_IDS, find_credentials, peer_name
from ferryman_qemu.transfer import (
    ACTIVE,
    POSTCOPY,
    Transfer,
    break_stream,
    leave_switchover,
    mend_source,
    receiver_settings,
    serve_pages,
    settle_source,
    source_settings,
    statistics_of,
    tls_settings,
)

if TYPE_CHECKING:
    from ferryman_qemu.machine.model import Disk


_log = logging.getLogger(__name__)

_LOAD_PATIENCE_S = 30.0
_LOOK_AGAIN_S = 0.002
_CANCEL_PATIENCE_S = 5.0
_UNIX_PATH_MAX = 107
_WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104 - to be told apart, not to listen on
_EVIDENCE = {
    "running": GuestEvidence.RUNNING,
    **dict.fromkeys(
        ("inmigrate", "paused", "prelaunch", "finish-migrate", "postmigrate"), GuestEvidence.STOPPED
    ),
}


class MigrationHooks(QemuHost):
    """Hooks of the five phases, and of recovery."""

    # Migration: source

    @hookimpl
    async def migrate_begin(self, request: BeginRequest) -> BeginReply:
        guest = self._guests.get(request.domain.uuid)
        if guest is None:
            raise BeginError(f"domain {request.domain.name} is not active", side=Side.SOURCE)
        if guest.saving:
            raise BeginError(f"domain {request.domain.name} is being saved", side=Side.SOURCE)
        if guest.changing or guest.unsettled:
            raise BeginError(f"devices of domain {request.domain.name} are being changed", side=Side.SOURCE)
        # What the transfer needs is set now, while the receiver has not even been started.
        status, *_ = await guest.command_all(Command("query-status"), *source_settings(request.options))
        cookie = {}
        if request.options.copy_storage is not None:
            facts = await learn_facts(guest, read_pinned(guest.record.definition))
            cookie["disks"] = encode_facts(facts)
        if guest.record.attached:
            cookie["attached"] = "yes"
        return BeginReply(
            definition=guest.record.definition,
            paused=status["status"] != "running",
            process=guest.process.identity,
            cookie=cookie,
        )

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
        proved = False
        try:
            if request.options.tls:
                name = peer_name(request.options, request.migration_uri)
                try:
                    await self._encrypt(guest, server=False, name=name)
                except HypervisorError as error:
                    raise PerformError(error.message, side=Side.SOURCE) from error
            reply = await transfer.run()
            proved = True
            return reply
        finally:
            if not proved and request.options.copy_storage is not None:
                with anyio.CancelScope(shield=True):
                    await self._abandon_copies(guest)
            transfer.begun.set()
            del self._transfers[request.id]

    async def _abandon_copies(self, guest: Guest) -> None:
        """End the copies of a transfer that has failed; what cannot be ended now is ended with the domain."""
        try:
            await abandon_copies(guest)
        except HypervisorError as error:
            _log.warning("the copies of domain %s's disks could not be ended: %s", guest.record.name, error)

    async def _encrypt(self, guest: Guest, *, server: bool, name: str = "") -> None:
        """Encrypt the next transfer. :raises HypervisorError: there are no credentials, or QEMU does not take them."""
        credentials = find_credentials(self._root.path / "pki")
        if credentials is None:
            raise HypervisorError(f"{self._root.path / 'pki'} holds no credentials for encrypted transfers")
        for identity in TLS_IDS:
            try:
                # An earlier attempt may have left it, with files that have changed since.
                await guest.control.execute("object-del", {"id": identity})
            except MonitorError as error:
                _log.debug("%s was not there: %s", identity, error)
        await guest.command_all(*tls_settings(credentials, server=server, name=name))

    @hookimpl
    async def migrate_confirm(self, request: ConfirmRequest) -> ConfirmReply:
        guest = self._guest_of(request.process)
        if request.verdict is Verdict.GIVEN:
            return await self._let_go(guest, request)
        if guest is None:
            return ConfirmReply(guest_gone=True)
        async with guest.lock:
            if (await guest.command("query-migrate")).get("status") in POSTCOPY:
                # The refusal is durable: the other half never ran, and this one never can (HANDOVER.md, experiment 11).
                _log.error("domain %s was split between two hosts, and the other half is gone", request.name)
                guest.ending = "crashed"
                await guest.kill()
                return ConfirmReply(guest_gone=True)
            state = await settle_source(guest)
            # None is left unless the program that made them died.
            await self._abandon_copies(guest)
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
        if request.tuning.postcopy_bandwidth_bytes_per_s is not None:
            wanted["max-postcopy-bandwidth"] = request.tuning.postcopy_bandwidth_bytes_per_s
        transfer = self._transfers.get(request.id)
        if transfer is not None and (wanted or request.tuning.postcopy):
            # Not before the transfer's own settings, which would undo this one.
            await transfer.begun.wait()
        if wanted:
            await guest.command("migrate-set-parameters", wanted)
        if transfer is not None and request.tuning.copy_bandwidth_bytes_per_s is not None:
            await transfer.set_copy_speed(request.tuning.copy_bandwidth_bytes_per_s)
        if request.tuning.postcopy:
            if transfer is not None:
                transfer.begin_switch()
            await guest.command("migrate-start-postcopy")

    @hookimpl
    async def migrate_serve(self, request: EvidenceRequest) -> ServeReply:
        guest = self._guest_of(request.process)
        return await serve_pages(guest) if guest is not None else ServeReply()

    @hookimpl
    async def migrate_mend(self, request: MendRequest) -> MendReply:
        guest = self._guest_of(request.process)
        if guest is None:
            raise GuestLostError("the half of the guest that was here is gone", side=request.side)
        if request.side is Side.SOURCE:
            await mend_source(guest, request.migration_uri or "")
            return MendReply()
        uri = MigrationURI.parse(guest.record.listen)
        if uri.protocol == "unix":
            # The path is this guest's already.  Asking whether somebody listens there would be to connect, and QEMU,
            # where it listens since an earlier attempt, would take that for the source.
            listen = f"unix:{uri.path}"
        else:
            # QEMU cannot be asked which port it got: its main loop may wait for the very pages that are missing.
            uri = uri.with_port(_free_port(uri.host or ""))
            listen = f"tcp:{_bracketed(uri.host or '')}:{uri.port}"
        try:
            # Whoever asks knows that the stream is broken; QEMU here may not have noticed.
            await guest.control.execute_oob("migrate-pause")
        except MonitorError as error:
            _log.info("domain %s waits already: %s", guest.record.name, error)
        try:
            await guest.control.execute_oob("migrate-recover", {"uri": listen})
        except MonitorClosedError as error:
            raise GuestLostError("the half of the guest that was here is gone", side=request.side) from error
        except MonitorError as error:
            raise HypervisorError(f"QEMU does not wait anew at {listen}: {error}") from error
        return MendReply(migration_uri=uri.render())

    @hookimpl
    async def migrate_abort(self, request: AbortRequest) -> None:
        guest = self._guest_of(request.process)
        if guest is None:
            return
        with guest.control.events("MIGRATION") as events:
            try:
                status = (await guest.command("query-migrate")).get("status")
                if status in POSTCOPY:
                    return  # a guest that is split is not made whole by breaking the stream
                if status == "pre-switchover":
                    await leave_switchover(guest)
            except HypervisorError as error:
                # A silent main loop is one that stops the guest; what can be broken then is the stream.
                _log.info("QEMU does not say how far domain %s has come: %s", guest.record.name, error)
            try:
                await break_stream(guest)
            except MonitorClosedError:
                return  # with its process the transfer is gone too
            with anyio.move_on_after(_CANCEL_PATIENCE_S):
                while (status := (await guest.command("query-migrate")).get("status")) in ACTIVE:
                    if status == "pre-switchover":
                        await leave_switchover(guest)
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
                keep_targets(self._root, migration_id)
            else:
                await self._discard(guest)
        for migration_id in map(MigrationId, stray_targets(self._root)):
            if migration_id not in request.known:
                # Made before the migration was written down, so nobody has ever heard of it.
                self._remove_targets(migration_id)

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
        elif status in POSTCOPY and state in ("finish-migrate", "postmigrate"):
            transfer = TransferEvidence.SWITCHED
        elif status in ACTIVE:
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
                path = listen.removeprefix("unix:")
                _require_free(path)
                if request.options.copy_storage is not None:
                    _require_free(disks_socket(path))
            machine = self._arriving(request)
        except (DefinitionError, DomainExistsError) as error:
            raise PrepareError(error.message, side=Side.DESTINATION) from error
        if request.uuid in self._guests or request.uuid in self._reserved:
            raise PrepareError(f"domain {request.name} is active here already", side=Side.DESTINATION)
        self._reserved[request.uuid] = request.name
        copies: list[Disk] = []
        try:
            machine, copies = await self._with_targets(machine, request)
            guest = await self._receiver(machine, request)
        except BaseException as error:
            self._reserved.pop(request.uuid, None)
            if copies:
                self._remove_targets(request.id)
            if isinstance(error, HypervisorError):
                raise PrepareError(error.message, side=Side.DESTINATION) from error
            raise
        self._receivers[request.id] = guest
        try:
            if listen.startswith("unix:"):
                guest.write(replace(guest.record, socket=listen.removeprefix("unix:")))
            if request.options.tls:
                await self._encrypt(guest, server=True)
            *_, told = await guest.command_all(
                *receiver_settings(request.options),
                Command("migrate-incoming", {"uri": listen}),
                Command("query-migrate"),
            )
            uri = propose or _proposed(told, request)
            if request.options.postcopy is not None:
                guest.write(replace(guest.record, listen=uri))
            cookie = {}
            if copies:
                guest.write(replace(guest.record, exports=True))
                place, ports = MigrationURI.parse(uri), request.options.port_range
                cookie["disks"] = await export_disks(
                    guest,
                    copies,
                    place,
                    address=request.options.listen_address,
                    ports=ports,
                    tls=request.options.tls,
                )
                cookie["copied"] = ",".join(disk.target for disk in copies)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._discard(guest)
                self._remove_targets(request.id)
            if isinstance(error, HypervisorError):
                raise PrepareError(
                    f"the receiver cannot listen at {listen}: {error.message}", side=Side.DESTINATION
                ) from error
            raise
        return PrepareReply(migration_uri=uri, process=guest.process.identity, cookie=cookie)

    def _remove_targets(self, migration_id: MigrationId) -> None:
        """Remove files of a migration that has failed already; what cannot be removed now is at the next opening."""
        try:
            remove_targets(self._root, migration_id)
        except HypervisorError as error:
            _log.warning("%s", error.message)

    async def _with_targets(self, machine: Machine, request: PrepareRequest) -> tuple[Machine, list[Disk]]:
        """Make the files of disks that are copied.

        :returns: the machine, whose copied disks keep holes as holes; and those disks.
        """
        copy = request.options.copy_storage
        if copy is None:
            return machine, []
        told = decode_facts(request.cookie.get("disks", ""))
        copies = wanted_copies(request.options, machine, told)
        if copies:
            await anyio.to_thread.run_sync(make_targets, self._root, request.id, copies, told, copy)
        chosen = {disk.target for disk in copies}
        disks = tuple(replace(d, discard="unmap") if d.target in chosen else d for d in machine.disks)
        return replace(machine, disks=disks), copies

    def _arriving(self, request: PrepareRequest | ExpectRequest) -> Machine:
        machine = self._admit(read_pinned(request.definition))
        if machine.definition.uuid != request.uuid:
            raise PrepareError(
                f"the definition is of domain {machine.definition.uuid}, not of {request.uuid}",
                side=Side.DESTINATION,
            )
        return machine

    async def _receiver(self, machine: Machine, request: PrepareRequest) -> Guest:
        """Start the process of a receiver, or take the one that was started ahead, or that was brought."""
        if request.cookie.get("attached"):
            return self._brought(request)
        expected = self._expected.pop(request.id, None)
        if expected is not None:
            await expected.started.wait()
            guest, expected.guest = expected.guest, None
            if guest is not None and guest.record.definition == machine.definition.render():
                return guest
            if guest is not None:
                await guest.kill()
        return await self._spawn(machine, persistent=request.options.persist, migration=request.id)

    def _brought(self, request: PrepareRequest) -> Guest:
        """Take the receiver that another program has started. :raises PrepareError: there is none."""
        guest = self._offered.pop(request.uuid, None)
        if guest is None:
            raise PrepareError(
                f"no receiver was attached for domain {request.name}, which another program has started",
                side=Side.DESTINATION,
            )
        guest.write(replace(guest.record, offered=False, migration=request.id))
        return guest

    @hookimpl
    async def migrate_expect(self, request: ExpectRequest) -> None:
        machine = self._arriving(request)
        if request.uuid in self._guests or request.uuid in self._reserved:
            return
        if request.uuid in self._offered:
            return  # it was started already
        if request.options.copy_storage is not None:
            return  # its disks are not there yet
        expected = self._expected[request.id] = Expected()
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

    @hookimpl
    async def migrate_finish(self, request: FinishRequest) -> None:
        guest = self._guest_of(request.process)
        if request.verdict is Verdict.DISCARD:
            self._reserved.pop(request.uuid, None)
            # By the migration too: prepare may have failed before the process had told its identity.
            guest = guest or self._receivers.get(request.id)
            if guest is not None:
                await self._discard(guest)
            remove_targets(self._root, request.id)
            return
        if guest is None:
            raise FinishError("the receiver's process is gone", side=Side.DESTINATION)
        async with guest.lock:
            try:
                await self._run(guest, request)
            except HypervisorError as error:
                if guest.may_have_run:
                    raise
                raise FinishError(
                    f"the guest did not arrive whole: {error.message}", side=Side.DESTINATION
                ) from error

    async def _run(self, guest: Guest, request: FinishRequest) -> None:
        """Run the arrived guest; INVARIANT: never ``cont`` before the run state has left ``inmigrate``."""
        if not guest.loaded.is_set():
            state = await guest.run_state()
            if state == "running":
                return
            if state == "inmigrate":
                guest.may_have_run = bool(guest.record.attached)
                with anyio.move_on_after(_LOAD_PATIENCE_S):
                    await first_of(guest.loaded, guest.listening, guest.gone)
                    if guest.listening.is_set():
                        await self._await_devices(guest)
                        await self._cont(guest, request)
                        return
                if not guest.loaded.is_set():
                    raise FinishError("the guest's state did not arrive whole", side=Side.DESTINATION)
        if guest.incoming_failed:
            raise FinishError(guest.incoming_failed, side=Side.DESTINATION)
        await self._cont(guest, request)

    async def _await_devices(self, guest: Guest) -> None:
        """Post-copy: wait until the devices' state is loaded.

        QEMU tells it by no event where the guest does not start by itself (seen on 7.2): its run state is asked, and
        the answer itself waits while devices are being loaded.
        """
        while await guest.run_state() == "inmigrate" and not guest.loaded.is_set():  # noqa: ASYNC110
            await anyio.sleep(_LOOK_AGAIN_S)

    async def _cont(self, guest: Guest, request: FinishRequest) -> None:
        """Run a guest whose state is loaded."""
        if guest.record.exports:
            await end_export(guest)
        if request.paused:
            return
        guest.may_have_run = True
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
        keep_targets(self._root, request.id)
        if guest is not None and guest.record.migration:
            self._take_in(guest)
        if guest is not None and request.persist:
            self._root.write_definition(request.uuid, guest.record.definition)
            self._defined[request.uuid] = guest.record.definition
        return await self._info(request.uuid)


def _listen_uri(request: PrepareRequest) -> tuple[str, str]:
    """Where the receiver listens, as QEMU writes it, and what to propose; '' where the port is not known yet."""
    ports = request.options.port_range
    some = f"{ports[0]},to={ports[1]}" if ports is not None else "0"
    if request.migration_uri is None:
        return f"tcp:{_bracketed(request.options.listen_address or '127.0.0.1')}:{some}", ""
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
    return f"tcp:{host}:{uri.port or some}", request.migration_uri if uri.port else ""


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


def _free_port(host: str) -> int:
    """A port at which nobody listens now; somebody else may take it before QEMU does, which is tried again then."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


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
            if host in _WILDCARDS:
                # Listening everywhere: the name of this host is what another one can reach.
                host = socket.getfqdn()
            return f"tcp://{_bracketed(host)}:{address['port']}"
    raise HypervisorError("QEMU does not say where it listens")
