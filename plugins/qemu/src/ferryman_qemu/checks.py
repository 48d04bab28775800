"""The driver of QEMU: what it tells the plan of a migration."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ferryman.errors import (
    DefinitionError,
)
from ferryman.hookspecs import (
    CheckReply,
    CheckRequest,
    hookimpl,
)
from ferryman.types import (
    Finding,
    FindingSeverity,
    Side,
)
from ferryman_qemu.commandline import (
    Machine,
    boot_paths,
    disk_paths,
    read_pinned,
)
from ferryman_qemu.guest import Guest
from ferryman_qemu.host import QemuHost
from ferryman_qemu.monitor import Command
from ferryman_qemu.probe import Emulator, dotted
from ferryman_qemu.process import boot_id
from ferryman_qemu.transfer import ACTIVE

if TYPE_CHECKING:
    from collections.abc import Container


_log = logging.getLogger(__name__)


class CheckHooks(QemuHost):
    """The hook that says what would stop a migration here."""

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
        if info.get("status") in ACTIVE:
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
