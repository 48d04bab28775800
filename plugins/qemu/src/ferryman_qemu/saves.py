"""The driver of QEMU: hooks that save a guest into a file and restore it, and what a crash in between leaves.

::

    save     guest.json: save_path ---> stop ---> migrate into a pipe ---> file whole ---> guest.json: save_whole
             ---> the file gets its name ---> QEMU ends
    restore  guest.json: restoring ---> migrate-incoming from the file ---> cont ---> guest.json: restoring no more

Until ``save_whole`` is written the guest stays, and goes on if anything fails; from then on the file is the guest.
Whoever opens the root next tells by these words what to do.  A guest that is being restored and does not run yet is
ended, since the file still has it.

QEMU writes into a pipe and not into the file: it cannot be told to let go of a file, and breaking the pipe is how a
save is aborted at any moment (never ``migrate_cancel``, see :mod:`ferryman_qemu.transfer`).

Source: QEMU 7.2 migration/fd.c, migration/migration.c (process_incoming_migration_co).
"""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from ferryman.errors import DefinitionError, DomainExistsError, DomainStateError, HypervisorError
from ferryman.hookspecs import RestoreRequest, SaveRequest, hookimpl
from ferryman.types import DomainEventKind, DomainInfo, DomainUUID
from ferryman_qemu.guest import Guest, first_of
from ferryman_qemu.host import QemuHost
from ferryman_qemu.machine import Machine, differences, read_machine, read_pinned
from ferryman_qemu.monitor import Command
from ferryman_qemu.probe import dotted
from ferryman_qemu.savefile import Saved, SaveFile, open_saved, publish, save_path, unfinished_path
from ferryman_qemu.transfer import ACTIVE, DEFAULT_DOWNTIME_MS, capabilities, settle_source

if TYPE_CHECKING:
    from ferryman_qemu.monitor import EventStream

_log = logging.getLogger(__name__)

_FD_NAME = "ferryman-save"
_PIPE_BYTES = 1 << 20
_END_PATIENCE_S = 30.0
_SAVABLE = ("running", "paused", "prelaunch")
_SETTINGS = (
    # A file does not answer, and what an earlier migration left on would not be understood where the file is read.
    capabilities({"events"}),
    Command(
        "migrate-set-parameters",
        {"max-bandwidth": 0, "downtime-limit": DEFAULT_DOWNTIME_MS, "tls-creds": "", "tls-hostname": ""},
    ),
)


class SaveHooks(QemuHost):
    """Hooks that save and restore."""

    # Saving

    @hookimpl
    async def domain_save(self, request: SaveRequest) -> None:
        guest = self._active(request.uuid, request.name)
        path = save_path(request.path)
        if guest.saving:
            raise DomainStateError(f"domain {request.name} is being saved already", domain=request.name)
        if guest.changing or guest.unsettled:
            raise DomainStateError(
                f"devices of domain {request.name} are being changed: wait for it, or reset the domain",
                domain=request.name,
            )
        # INVARIANT: from here on no migration of it begins, and none has begun: the core has just looked.
        guest.saving = True
        try:
            async with guest.lock:
                await self._save(guest, path)
        finally:
            guest.saving = False

    async def _save(self, guest: Guest, path: Path) -> None:
        record = guest.record
        status, migration = await guest.command_all(Command("query-status"), Command("query-migrate"))
        state = str(status["status"])
        if migration.get("status") in ACTIVE:
            raise DomainStateError(
                f"QEMU is sending domain {record.name}: wait for it or abort it", domain=record.name
            )
        if state not in _SAVABLE:
            raise DomainStateError(
                f"domain {record.name} cannot be saved in the state {state}: resume, reset or destroy it",
                domain=record.name,
            )
        saved = Saved(
            uuid=record.uuid,
            name=record.name,
            definition=record.definition,
            qemu=dotted(guest.version),
            running=state == "running",
        )
        try:
            with SaveFile(path, saved) as file:
                guest.write(replace(record, save_path=str(path), save_running=saved.running))
                try:
                    await self._write_state(guest, file)
                    with anyio.CancelScope(shield=True):
                        await anyio.to_thread.run_sync(file.complete)
                        guest.write(replace(guest.record, save_whole=True))
                        await anyio.to_thread.run_sync(file.publish)
                except BaseException:
                    with anyio.CancelScope(shield=True):
                        await self._stay(guest)
                    raise
        except OSError as error:
            raise HypervisorError(f"{path} cannot be written: {error.strerror}") from error
        guest.ending = "saved"
        with anyio.CancelScope(shield=True):
            await guest.kill()

    async def _write_state(self, guest: Guest, file: SaveFile) -> None:
        """Stop the guest and write all of it. :cancellation: the pipe breaks, and with it the save."""
        await guest.command_all(Command("stop"), *_SETTINGS)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            with suppress(OSError):  # a larger pipe is faster, and not everybody may have it
                fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            with guest.control.events("MIGRATION") as events:
                try:
                    with anyio.CancelScope(shield=True):
                        # In one go: QEMU would keep a descriptor that nobody asks it to use.
                        await guest.command_all(
                            Command("getfd", {"fdname": _FD_NAME}, [writing]),
                            Command("migrate", {"uri": f"fd:{_FD_NAME}"}),
                        )
                finally:
                    os.close(writing)
                await _copy(reading, file.descriptor)
                await _wait_whole(guest, events)
        finally:
            os.close(reading)
        if await guest.run_state() not in ("postmigrate", "finish-migrate"):
            raise HypervisorError(
                f"QEMU says that it saved domain {guest.record.name}, and does not stand still"
            )

    async def _stay(self, guest: Guest) -> None:
        """Let a guest whose save failed go on as before."""
        record = guest.record
        try:
            if record.save_whole:
                guest.write(replace(record, save_whole=False))
            await _wait_over(guest)
            if record.save_running:
                await guest.command("cont")
            guest.write(replace(guest.record, save_path="", save_running=False, save_whole=False))
        except HypervisorError as error:
            if not await guest.is_ending():
                _log.error("domain %s could not be told to go on: %s", record.name, error)

    async def _settle_save(self, guest: Guest) -> None:
        """Finish what a program that died left of a save; call it under the guest's lock."""
        record = guest.record
        path = Path(record.save_path)
        unfinished = unfinished_path(path, record.uuid)
        if not record.save_whole:
            unfinished.unlink(missing_ok=True)
            await self._stay(guest)
            return
        if unfinished.exists():
            publish(unfinished, path)
        guest.ending = "saved"
        with anyio.CancelScope(shield=True):
            await guest.kill()

    # Restoring

    @hookimpl
    async def domain_restore(self, request: RestoreRequest) -> DomainInfo:
        path = save_path(request.path)
        saved, descriptor = await anyio.to_thread.run_sync(open_saved, path)
        try:
            machine = self._saved_machine(saved, request)
            definition = machine.definition
            request.admit(definition.uuid, definition.name)
            if definition.uuid in self._guests or definition.uuid in self._reserved:
                raise DomainExistsError(f"domain {definition.name} is active already", domain=definition.name)
            self._reserved[definition.uuid] = definition.name
            try:
                guest = await self._load(machine, descriptor, path, saved)
                paused = request.paused if request.paused is not None else not saved.running
                await self._resume_saved(guest, paused=paused)
                self._take(guest)
            finally:
                del self._reserved[definition.uuid]
        finally:
            os.close(descriptor)
        self._tell(DomainEventKind.STARTED, definition.name, definition.uuid, "restored")
        return await self._info(definition.uuid)

    def _saved_machine(self, saved: Saved, request: RestoreRequest) -> Machine:
        """The machine to load the state into.

        :raises DefinitionError: the definition that was given is of another one.
        """
        machine = read_pinned(saved.definition)
        if machine.definition.uuid != saved.uuid:
            raise DefinitionError(f"{request.path} is damaged: it is of two domains")
        if request.definition is not None:
            given = self._pin(read_machine(request.definition))
            changed = differences(machine, given)
            if given.definition.uuid != saved.uuid:
                changed.insert(0, "uuid")
            if changed:
                # QEMU itself would overlook much of it.
                raise DefinitionError(
                    f"the definition is another machine than the guest in {request.path}: {', '.join(changed)}"
                )
            machine = given
        return self._admit(machine)

    async def _load(self, machine: Machine, descriptor: int, path: Path, saved: Saved) -> Guest:
        """Start a process and load the state into it; it stands still."""
        uuid = machine.definition.uuid
        guest = await self._spawn(machine, persistent=uuid in self._defined, restoring=True)
        try:
            await guest.command_all(
                *_SETTINGS,
                Command("getfd", {"fdname": _FD_NAME}, [descriptor]),
                Command("migrate-incoming", {"uri": f"fd:{_FD_NAME}"}),
            )
            await first_of(guest.loaded, guest.gone)
            if not guest.loaded.is_set() or guest.incoming_failed:
                # QEMU ends by itself, after it has printed why.
                with anyio.move_on_after(_END_PATIENCE_S):
                    await guest.gone.wait()
                said = guest.last_words() or "QEMU did not say why"
                raise HypervisorError(
                    f"the state in {path}, of QEMU {saved.qemu}, could not be loaded: {said}"
                )
        except BaseException:
            with anyio.CancelScope(shield=True):
                await guest.kill()
            raise
        return guest

    async def _resume_saved(self, guest: Guest, *, paused: bool) -> None:
        try:
            async with guest.lock:
                await guest.learn_memory()
                if not paused:
                    await guest.command("cont")
                guest.write(replace(guest.record, restoring=False))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await guest.kill()
            raise

    async def _settle_restore(self, guest: Guest) -> bool:
        """Say whether a guest that an earlier program was restoring runs; one that does not is ended."""
        if guest.running:
            guest.write(replace(guest.record, restoring=False))
            return True
        await guest.kill()
        return False

    async def _settle_guest(self, guest: Guest) -> None:
        """Finish what an earlier program left open with a guest, but for migrations."""
        uuid, name = DomainUUID(guest.record.uuid), guest.record.name
        if guest.record.save_path:
            try:
                async with guest.lock:
                    await self._settle_save(guest)
            except (HypervisorError, OSError) as error:
                _log.warning("the save of domain %s (%s) could not be settled: %s", name, uuid, error)
        elif guest.record.reboot or not guest.running:
            await self._settle_power(guest)


async def _copy(reading: int, file: int) -> None:
    """Move what comes out of a pipe into a file, to its end."""
    while True:
        await anyio.wait_readable(reading)
        # In a thread, since a disk may take its time; the pipe has something, so that it does not wait for QEMU.
        if not await anyio.to_thread.run_sync(partial(os.splice, reading, file, _PIPE_BYTES)):
            return


async def _wait_whole(guest: Guest, events: EventStream) -> None:
    """Wait for QEMU's word that it has written everything."""
    status = ""
    while status not in ("completed", "failed", "cancelled"):
        status = str((await events.get()).data.get("status"))
    if status != "completed":
        reason = (await guest.command("query-migrate")).get("error-desc")
        raise HypervisorError(f"QEMU could not save domain {guest.record.name}: {reason or status}")


async def _wait_over(guest: Guest) -> None:
    """Wait until a save whose pipe is broken has failed."""
    with guest.control.events("MIGRATION") as events, anyio.move_on_after(_END_PATIENCE_S):
        while (await guest.command("query-migrate")).get("status") in ACTIVE:
            await events.get()
    await settle_source(guest)
