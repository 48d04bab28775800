"""The driver of QEMU: what it tells the plan of a migration."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from ferryman.errors import DefinitionError, HypervisorError
from ferryman.hookspecs import (
    CheckReply,
    CheckRequest,
    hookimpl,
)
from ferryman.types import (
    Finding,
    MigrationOptions,
    Side,
    StorageCopy,
)
from ferryman.uri import MigrationURI
from ferryman_qemu.attached import ATTACHED, check_attached, check_receiver
from ferryman_qemu.findings import blocker, check_options
from ferryman_qemu.guest import Guest
from ferryman_qemu.host import QemuHost
from ferryman_qemu.machine import (
    Machine,
    boot_paths,
    differences,
    read_pinned,
)
from ferryman_qemu.machine.model import Disk
from ferryman_qemu.monitor import Command
from ferryman_qemu.probe import Emulator, dotted
from ferryman_qemu.storage import (
    DiskFacts,
    decode_facts,
    encode_facts,
    identify,
    is_same,
    learn_facts,
    wanted_copies,
)
from ferryman_qemu.tls import Credentials, find_credentials
from ferryman_qemu.transfer import ACTIVE

_log = logging.getLogger(__name__)


class CheckHooks(QemuHost):
    """The hook that says what would stop a migration here."""

    @hookimpl
    async def migrate_check(self, request: CheckRequest) -> CheckReply:
        if request.side is Side.SOURCE:
            return await self._check_source(request)
        if ATTACHED in request.facts:
            return await check_receiver(self._offered.get(request.domain.uuid), request)
        return self._check_destination(request)

    async def _check_source(self, request: CheckRequest) -> CheckReply:
        # The source's own: what the options change for the destination is not here.
        machine = read_pinned(request.source_definition or request.definition)
        guest = self._guests.get(request.domain.uuid)
        if guest is not None and guest.record.attached:
            return await check_attached(guest, request, await self._check_guest(guest, machine))
        findings = await self._check_guest(guest, machine) if guest is not None else []
        findings += check_options(request)
        facts = await learn_facts(guest, machine)
        emulator = self._running(guest)
        cpu = emulator.cpu(machine.cpu.model, machine.cpu.features, accelerated=machine.accelerated)
        return CheckReply(
            findings=tuple(findings),
            facts={
                "disks": encode_facts(facts),
                "cpu": cpu or "",
                "credentials": _kind_of(find_credentials(self._root.path / "pki")),
            },
        )

    def _running(self, guest: Guest | None) -> Emulator:
        """The emulator as the guest runs in it: it may have been updated since the guest was started."""
        return replace(self._emulator, version=guest.version) if guest is not None else self._emulator

    async def _check_guest(self, guest: Guest, machine: Machine) -> list[Finding]:
        findings: list[Finding] = []
        if guest.record.autodestroy:
            findings.append(
                blocker(
                    "autodestroy",
                    Side.SOURCE,
                    f"domain {guest.record.name} ends with the connection that started it",
                    "start it without autodestroy",
                )
            )
        if guest.unsettled:
            findings.append(
                blocker(
                    "devices-unsettled",
                    Side.SOURCE,
                    f"the guest may let go of {', '.join(guest.record.leaving) or 'a device'} at any moment",
                    "detach it again, or reset the domain, which takes it away",
                )
            )
        state, info = await guest.command_all(Command("query-status"), Command("query-migrate"))
        status = state["status"]
        if status in ("guest-panicked", "internal-error", "io-error", "shutdown"):
            findings.append(
                blocker(
                    "guest-state", Side.SOURCE, f"the guest is in the state {status}", "reset or restart it"
                )
            )
        if status == "postmigrate":
            # QEMU 7.2 migration/migration.c, migrate_prepare.
            findings.append(
                blocker(
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
                blocker(
                    "writes-lost",
                    Side.SOURCE,
                    f"QEMU {dotted(emulator.version)} without KVM loses writes of a running guest whose memory"
                    f" is a multiple of 256 KiB, as this one's {memory // 1024} KiB are",
                    f"suspend the guest while it moves, or restart it, which gives it {safe // 1024} KiB",
                )
            )
        if info.get("status") in ACTIVE:
            findings.append(
                blocker(
                    "job-active",
                    Side.SOURCE,
                    "QEMU is sending this guest already",
                    "wait for it or cancel it",
                )
            )
        findings.extend(
            blocker("device-unmigratable", Side.SOURCE, str(reason), "remove the device")
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
                findings=(blocker("definition-unknown", side, error.message, "change the definition"),)
            )
        if machine.machine not in self._emulator.machines:
            findings.append(
                blocker(
                    "machine-unknown",
                    side,
                    f"QEMU {dotted(self._emulator.version)} has no machine type {machine.machine}",
                    "install a newer QEMU there",
                )
            )
        if machine.accelerated and not self._emulator.kvm:
            findings.append(
                blocker(
                    "accelerator-missing",
                    side,
                    "the guest runs with KVM, which does not work there",
                    "mend KVM there",
                )
            )
        findings += _check_same_machine(request, machine)
        findings += self._check_transfer(request)
        findings += self._check_cpu(machine, request.facts.get("cpu", ""))
        available = _available_bytes()
        if available is not None and available < request.domain.memory_bytes:
            findings.append(
                blocker(
                    "memory-short",
                    side,
                    f"the guest has {request.domain.memory_bytes} bytes of memory and the host has {available} free",
                    "free memory there, or choose another host",
                )
            )
        for path in boot_paths(machine):
            if not os.access(path, os.R_OK):
                findings.append(
                    blocker("file-missing", side, f"{path} cannot be read there", "copy it there")
                )
        try:
            findings += check_disks(request, machine)
        except HypervisorError as error:
            findings.append(
                blocker("storage-copy", Side.SOURCE, error.message, "install the same version on both hosts")
            )
        return CheckReply(findings=tuple(findings))

    def _check_transfer(self, request: CheckRequest) -> list[Finding]:
        """See whether a receiver here can do what the options ask of it."""
        options = request.options
        findings = []
        if options.postcopy is not None and (reason := _page_faults_refused()):
            findings.append(
                blocker(
                    "postcopy-forbidden",
                    Side.DESTINATION,
                    f"the kernel there does not let QEMU wait for pages (userfaultfd: {reason})",
                    "set vm.unprivileged_userfaultfd to 1 there, run QEMU as root, or leave postcopy out",
                )
            )
        if options.tls:
            findings += self._check_credentials(request)
        return findings

    def _check_credentials(self, request: CheckRequest) -> list[Finding]:
        here = find_credentials(self._root.path / "pki")
        theirs = request.facts.get("credentials", "")
        mine = _kind_of(here)
        if theirs != mine:
            return [
                blocker(
                    "tls-mismatch",
                    None,
                    f"the source has {theirs or 'no credentials'} for TLS, and the destination {mine or 'none'}",
                    "give both the same kind: certificates of one signer, or one key",
                )
            ]
        options = request.options
        uri = MigrationURI.parse(options.migration_uri) if options.migration_uri is not None else None
        if mine == _CERTIFICATES and options.tls_name is None and uri is not None and uri.protocol == "unix":
            return [
                blocker(
                    "tls-name-missing",
                    None,
                    "a unix socket has no host name that the destination's certificate could bear",
                    "set the option tls_name",
                )
            ]
        return []

    def _check_cpu(self, machine: Machine, told: str) -> list[Finding]:
        here = self._emulator.cpu(machine.cpu.model, machine.cpu.features, accelerated=machine.accelerated)
        if here is None:
            return [
                blocker(
                    "cpu-unknown",
                    Side.DESTINATION,
                    f"QEMU {dotted(self._emulator.version)} has no CPU model {machine.cpu.model}",
                    "install a newer QEMU there",
                )
            ]
        if told in ("", here):
            return []
        return [
            blocker(
                "cpu-differs",
                Side.DESTINATION,
                f"the guest's CPU is {told}, and there it would be {here}",
                "give the guest a CPU model that both hosts have in full",
            )
        ]


_CERTIFICATES = "certificates"


def _kind_of(credentials: Credentials | None) -> str:
    if credentials is None:
        return ""
    return "a key" if credentials.psk else _CERTIFICATES


def _check_same_machine(request: CheckRequest, machine: Machine) -> list[Finding]:
    """See whether a definition that was changed for the destination is still the guest's machine."""
    if request.source_definition in ("", request.definition):
        return []
    changed = differences(read_pinned(request.source_definition), machine)
    if not changed:
        return []
    return [
        blocker(
            "machine-differs",
            Side.DESTINATION,
            f"the definition for the destination is another machine to the guest: {', '.join(changed)}",
            "change only what stands at the host's end, in the definition that the domain has now",
        )
    ]


_USERFAULTFD = 323
"""Number of the system call on x86-64 (arch/x86/entry/syscalls/syscall_64.tbl)."""


def _page_faults_refused() -> str:
    """Why the kernel does not give this user what post-copy needs; '' where it does."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        return os.strerror(ctypes.get_errno())
    os.close(descriptor)
    return ""


def check_disks(request: CheckRequest, machine: Machine) -> list[Finding]:
    """See whether every disk is here, is to be copied and can be, or would be another one."""
    options = request.options
    told = decode_facts(request.facts.get("disks", ""))
    try:
        copies = {disk.target for disk in wanted_copies(options, machine, told)}
    except HypervisorError as error:
        return [blocker("storage-copy", Side.DESTINATION, error.message, "change the option copy_disks")]
    findings: list[Finding] = []
    for disk in machine.disks:
        if disk.source is None or disk.source.kind == "nbd":
            continue
        if disk.target in copies:
            findings += _check_copy(disk, told[disk.target], options)
        else:
            facts = told.get(disk.target)
            findings += _check_shared(
                disk.source.path, facts.identity if facts is not None else None, fixed=disk.readonly
            )
    return findings


def _check_shared(path: str, told: list[str | int] | None, *, fixed: bool) -> list[Finding]:
    here = identify(path)
    if here is None or not os.access(path, os.R_OK):
        return [
            blocker(
                "storage-missing",
                Side.DESTINATION,
                f"{path} cannot be read there",
                "share the storage" if fixed else "share the storage, or copy it (option copy_storage)",
            )
        ]
    if not is_same(path, here, told):
        return [
            blocker(
                "storage-not-shared",
                Side.DESTINATION,
                f"{path} there is another file than at the source",
                "put the disk on storage that both hosts share"
                + ("" if fixed else ", or remove that file and set copy_storage"),
            )
        ]
    return []


def _check_copy(disk: Disk, facts: DiskFacts, options: MigrationOptions) -> list[Finding]:
    """See whether a disk can be copied to where the definition says."""
    assert disk.source is not None
    path, side = disk.source.path, Side.DESTINATION
    if disk.source.kind == "block":
        return _check_device(path, facts)
    if os.path.lexists(path):
        return [
            blocker(
                "storage-exists",
                side,
                f"{path} is there already, and nothing is copied over it",
                "remove it, or give the disk another path there (option disks)",
            )
        ]
    directory = os.path.dirname(path)
    if not os.access(directory, os.W_OK | os.X_OK):
        return [
            blocker("storage-missing", side, f"{directory} cannot be written there", "make it, or allow it")
        ]
    findings = []
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if free < facts.allocated_bytes:
        findings.append(
            blocker(
                "storage-short",
                side,
                f"the disk {disk.target} takes {facts.allocated_bytes} bytes, and {directory} has {free} free",
                "make room there, or give the disk another path there (option disks)",
            )
        )
    if options.copy_storage is StorageCopy.TOP:
        findings += _check_base(disk, facts)
    if disk.format != "raw" and shutil.which("qemu-img") is None:
        findings.append(
            blocker(
                "program-missing",
                side,
                "qemu-img is not installed there",
                "install it (qemu-utils on Debian)",
            )
        )
    return findings


def _check_base(disk: Disk, facts: DiskFacts) -> list[Finding]:
    if not facts.backing or disk.format != "qcow2":
        return [
            blocker(
                "storage-copy",
                Side.SOURCE,
                f"the disk {disk.target} stands on no base image, so there is no top to copy alone",
                "copy it in full (StorageCopy.FULL)",
            )
        ]
    if not os.access(facts.backing, os.R_OK):
        return [
            blocker(
                "storage-missing",
                Side.DESTINATION,
                f"the base image {facts.backing} of the disk {disk.target} cannot be read there",
                "bring it there, or copy the disk in full (StorageCopy.FULL)",
            )
        ]
    return []


def _check_device(path: str, facts: DiskFacts) -> list[Finding]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return [
            blocker("storage-missing", Side.DESTINATION, f"{path} there: {error.strerror}", "make the device")
        ]
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
    if size != facts.size_bytes:
        return [
            blocker(
                "storage-copy",
                Side.DESTINATION,
                f"{path} has {size} bytes there, and the disk {facts.size_bytes}",
                "make a device of the same size",
            )
        ]
    return []


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError) as error:
        _log.info("free memory is not known: %s", error)
    return None
