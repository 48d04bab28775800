"""QEMUs that another program has started, so that it can migrate them with Ferryman.

What the other program knows and nobody here can know is the command line: the destination cannot build the machine.  So
the other program starts the receiver as well, and brings it; what both processes say of their machines is compared.

Sources: QEMU 7.2 qapi/misc.json (query-name, query-uuid), qapi/pci.json, qapi/machine.json; unix(7), SO_PEERCRED.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.abc

from ferryman.definition import minimal_definition
from ferryman.errors import ConnectError, DomainExistsError, DomainStateError, HypervisorError
from ferryman.hookspecs import AdoptRequest, CheckReply, CheckRequest, hookimpl
from ferryman.types import (
    DomainEventKind,
    DomainInfo,
    DomainState,
    DomainUUID,
    Finding,
    FindingSeverity,
    Side,
)
from ferryman_qemu.findings import blocker, check_options
from ferryman_qemu.guest import Guest
from ferryman_qemu.host import QemuHost
from ferryman_qemu.machine import read_machine
from ferryman_qemu.monitor import Command
from ferryman_qemu.process import Process, identity_of
from ferryman_qemu.root import GuestRecord
from ferryman_qemu.storage import identify, is_same

_log = logging.getLogger(__name__)

ATTACHED = "attached"
"""Name of the fact by which the source tells that another program has started the guest."""

_UCRED = struct.Struct("3i")
_NO_UUID = "00000000-0000-0000-0000-000000000000"


class AttachHooks(QemuHost):
    """The hook that takes in what another program has started."""

    @hookimpl
    async def host_adopt(self, request: AdoptRequest) -> DomainInfo:
        for known in (*self._guests.values(), *self._offered.values(), *self._receivers.values()):
            if known.record.attached == request.path:
                raise DomainExistsError(
                    f"what listens at {request.path} is domain {known.record.name} here already",
                    domain=known.record.name,
                )
        guest = await self._connect(request)
        try:
            await self._take_over(guest, request)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await guest.let_go()
            raise
        self._take(guest)
        definition = read_machine(guest.record.definition).definition
        if not request.receiver:
            self._tell(DomainEventKind.STARTED, guest.record.name, definition.uuid, "attached")
        return DomainInfo(
            name=guest.record.name,
            uuid=definition.uuid,
            state=DomainState.PAUSED if request.receiver else await guest.state(),
            persistent=False,
            memory_bytes=definition.memory_bytes,
            vcpus=definition.vcpus,
        )

    async def _connect(self, request: AdoptRequest) -> Guest:
        """Connect to the process behind a socket. :raises ConnectError: it is not there, or not free."""
        run = self._root.new_run_directory()
        record = GuestRecord(uuid="", name="", definition="", persistent=False, attached=request.path)
        stream: anyio.abc.UNIXSocketStream | None = None
        process: Process | None = None
        try:
            stream = await run.connect_control(record)
            process = _process_behind(stream, request)
            return await Guest.adopt(
                record,
                run,
                process,
                stream,
                log=self._root.log(request.name or Path(request.path).name),
                tasks=self._tasks,
                ended=self._guest_ended,
                happened=self._guest_event,
            )
        except BaseException as error:
            if stream is not None:
                with anyio.CancelScope(shield=True):
                    await anyio.aclose_forcefully(stream)
            if process is not None:
                process.close()
            run.remove()
            if isinstance(error, OSError):
                raise ConnectError(f"nothing can be reached at {request.path}: {error}") from error
            if isinstance(error, HypervisorError):
                raise ConnectError(
                    f"QEMU at {request.path} does not answer: it has ended, or somebody else is connected"
                ) from error
            raise

    async def _take_over(self, guest: Guest, request: AdoptRequest) -> None:
        """Learn who a process is, and write it down."""
        name, uuid, memory, cpus, kvm, status = await guest.command_all(
            Command("query-name"),
            Command("query-uuid"),
            Command("query-memory-size-summary"),
            Command("query-cpus-fast"),
            Command("query-kvm"),
            Command("query-status"),
        )
        found = request.uuid or DomainUUID(str(uuid["UUID"]))
        if found == _NO_UUID:
            raise DomainStateError(
                "the process was started without a uuid: say which one the domain has (uuid=)",
                domain=request.name or "",
            )
        called = request.name or str(name.get("name") or "") or f"attached-{found}"
        if request.receiver:
            _require_waiting(guest, str(status["status"]), called)
        elif status["status"] == "inmigrate":
            raise DomainStateError(
                f"{called} waits for a guest to arrive: attach_receiver() takes it", domain=called
            )
        owner = self._name_owner(called)
        known = found in self._guests or found in self._reserved or found in self._offered
        if known or (owner is not None and owner != found):
            raise DomainExistsError(f"domain {called} with uuid {found} is here already", domain=called)
        guest.write(
            GuestRecord(
                uuid=found,
                name=called,
                definition=_definition(
                    called,
                    found,
                    memory_bytes=int(memory["base-memory"]) + int(memory.get("plugged-memory", 0)),
                    vcpus=len(cpus),
                    accelerated=bool(kvm["enabled"]),
                ),
                persistent=False,
                identity=guest.process.identity,
                attached=request.path,
                offered=request.receiver,
            )
        )


def _process_behind(stream: anyio.abc.UNIXSocketStream, request: AdoptRequest) -> Process:
    """The process of a socket. :raises ConnectError: it is not QEMU, or not known."""
    pid = request.pid
    if pid is None:
        raw: socket.socket = stream.extra(anyio.abc.SocketAttribute.raw_socket)
        pid, _, _ = _UCRED.unpack(raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    identity = identity_of(pid)
    try:
        program = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        program = ""
    process = Process.find(identity) if identity is not None and program.startswith("qemu") else None
    if process is None:
        raise ConnectError(
            f"who listens at {request.path} is process {pid} ({program or 'gone'}), which is not QEMU:"
            " say which process it is (pid=)"
        )
    return process


def _require_waiting(guest: Guest, status: str, name: str) -> None:
    """Refuse a receiver that could run by itself. :raises DomainStateError: it could, or is none."""
    if status != "inmigrate":
        raise DomainStateError(f"{name} is in the state {status}: start it with -incoming defer", domain=name)
    try:
        arguments = Path(f"/proc/{guest.process.pid}/cmdline").read_bytes().split(b"\0")
    except OSError as error:
        raise DomainStateError(
            f"how {name} was started cannot be seen: {error.strerror}", domain=name
        ) from error
    if not {b"-S", b"--S"} & set(arguments):
        raise DomainStateError(f"{name} would run by itself: start it with -S", domain=name)
    following = dict(pairwise(arguments)).get(b"-incoming")
    if following != b"defer":
        raise DomainStateError(f"{name} listens already: start it with -incoming defer", domain=name)


def _definition(name: str, uuid: DomainUUID, *, memory_bytes: int, vcpus: int, accelerated: bool) -> str:
    """What stands for the definition, which nobody here knows."""
    kind = "kvm" if accelerated else "qemu"
    text = minimal_definition(name=name, uuid=uuid, type=kind, memory_bytes=memory_bytes)
    devices = "<devices><memballoon model='none'/></devices>"
    return text.replace("<vcpu>1</vcpu>", f"<vcpu>{vcpus}</vcpu><os><type>hvm</type></os>{devices}")


# The plan


async def describe_machine(guest: Guest) -> dict[str, Any]:
    """What a process says of its machine that its guest would notice; JSON values all the way down."""
    memory, cpus, pci, kind, blocks = await guest.command_all(
        Command("query-memory-size-summary"),
        Command("query-cpus-fast"),
        Command("query-pci"),
        Command("qom-get", {"path": "/machine", "property": "type"}),
        Command("query-block"),
    )
    models = await guest.command_all(
        *(Command("qom-get", {"path": cpu["qom-path"], "property": "type"}) for cpu in cpus)
    )
    opened = guest.process.opened_files()
    disks = {
        str(block.get("qdev") or block["device"]): [
            _file(block),
            bool(block["inserted"]["ro"]),
            identify(_file(block), opened),
        ]
        for block in blocks
        if block.get("inserted")
    }
    return {
        "machine": kind,
        "memory": memory,
        "processors": [[cpu.get("props"), model] for cpu, model in zip(cpus, models, strict=True)],
        "pci": [[_device(device) for device in bus["devices"]] for bus in pci],
        "disks": disks,
    }


def _file(block: dict[str, Any]) -> str:
    """Path of the file below a block device's nodes."""
    image = block["inserted"].get("image") or {}
    return str(image.get("filename") or block["inserted"]["file"])


def _device(device: dict[str, Any]) -> list[Any]:
    bridge = device.get("pci_bridge") or {}
    return [
        device["slot"],
        device["function"],
        device["id"]["vendor"],
        device["id"]["device"],
        [_device(below) for below in bridge.get("devices", ())],
    ]


async def check_attached(guest: Guest, request: CheckRequest, findings: list[Finding]) -> CheckReply:
    """What stands against sending a guest that another program has started."""
    findings = [*findings, *check_options(request)]
    options = request.options
    changed = options.destination_definition or options.disks or options.graphics_address or options.name
    if options.copy_storage is not None or changed or options.persist:
        findings.append(
            blocker(
                "definition-missing",
                Side.SOURCE,
                "another program has started the guest, so its definition is not known here",
                "leave out the options that change or keep it, and let that program do so",
            )
        )
    findings.append(
        Finding(
            code="foreign-monitor",
            severity=FindingSeverity.WARNING,
            side=None,
            message="the program that has started the guest can command it behind our back, at either host",
            remedy="see that it does not until the migration is over",
        )
    )
    return CheckReply(findings=tuple(findings), facts={ATTACHED: json.dumps(await describe_machine(guest))})


async def check_receiver(receiver: Guest | None, request: CheckRequest) -> CheckReply:
    """What stands against a receiver that another program has started, or is to start."""
    side = Side.DESTINATION
    if receiver is None:
        missing = blocker(
            "receiver-missing",
            side,
            "another program has started the guest, so nobody here knows its command line",
            "start QEMU there with the same command line and -S -incoming defer, and attach_receiver() it",
        )
        return CheckReply(findings=(missing,))
    theirs, here = json.loads(request.facts[ATTACHED]), await describe_machine(receiver)
    findings = [
        blocker(
            "machine-differs",
            side,
            f"the {what} of the receiver differ: {here[what]!r:.300}, and at the source {theirs[what]!r:.300}",
            "start the receiver with the same command line",
        )
        for what in ("machine", "memory", "processors", "pci")
        if here[what] != theirs[what]
    ]
    for name, (path, readonly, identity) in theirs["disks"].items():
        mine = here["disks"].get(name)
        if mine is None or (not readonly and not is_same(mine[0], mine[2], identity)):
            findings.append(
                blocker(
                    "storage-not-shared",
                    side,
                    f"the disk {name} is {path} at the source, and {mine[0] if mine else 'nothing'} there",
                    "give both the same file, on storage that both hosts share",
                )
            )
    return CheckReply(findings=tuple(findings))
