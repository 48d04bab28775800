"""Disks of a migration: whether both hosts mean the same file, and the copy of those that they do not share.

A copy and the handover
=======================
::

    source                                   destination
                                             target files are made and noted, then the receiver starts on them
                                             an NBD server exports each, writable
    a mirror job copies while the guest runs
    every job is ready: the guest's memory is sent
    the guest stands still (pre-switchover)
    each job is ended; one that ends without an
      error has everything over there
    the nodes go, the transfer goes on
    proof of stop ...                        the server stops, the guest runs

INVARIANT: ``migrate-continue`` is sent only after every mirror has ended without an error, so no proof can exist of a
guest whose disks are not whole at the destination.  A mirror is never pivoted: whatever fails, the source goes on with
its own disk.

Files that were made are noted in the root before they are made, and removed when the migration is refused; once the
guest has run on them they are its disks, and nobody removes them.  The note says which files they are, so that another
one that somebody has put under the same name since is left alone.

Sources: QEMU 7.2 qapi/block-core.json (blockdev-mirror), qapi/block-export.json, block/mirror.c; and what it was seen
to do.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import shutil
import socket
import stat
import struct
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from ferryman.errors import HypervisorError, PrepareError
from ferryman.types import Side, StorageCopy
from ferryman.uri import MigrationURI
from ferryman_qemu.machine.build import node_name
from ferryman_qemu.monitor import Command, MonitorClosedError, MonitorError
from ferryman_qemu.process import boot_id
from ferryman_qemu.root import NEW, write_file
from ferryman_qemu.streams import CONNECT_S, connect, cut_silent
from ferryman_qemu.tls import TLS_ID

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from anyio.abc import TaskGroup

    from ferryman.types import MigrationId, MigrationOptions
    from ferryman_qemu.guest import Guest
    from ferryman_qemu.machine import Machine
    from ferryman_qemu.machine.model import Disk
    from ferryman_qemu.qmp import Event
    from ferryman_qemu.root import Root

_log = logging.getLogger(__name__)

COPY_PREFIX = "ferryman-copy"
"""How the names of our mirror jobs and of their target nodes begin."""

_NBD_MAGIC = b"NBDMAGIC"
_FD_NAME = "ferryman-nbd"
_END_S = 20.0
_SAMPLE_S = 0.5
_QEMU_IMG_S = 60.0
_FIRST_LOCK_BYTE = 100
_LOCK_BYTES = 200
_FLOCK = struct.Struct("hhqqi4x")
_NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "ceph", "gfs2", "ocfs2", "lustre", "cifs", "smb3", "fuse.glusterfs", "glusterfs"}
)


# What a disk is


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskFacts:
    """What the source tells of one disk.

    :param identity: see :func:`identify`; None where the file cannot be read, or is another one than the guest has.
    :param size_bytes: as the guest sees it.
    :param allocated_bytes: of the host's storage.
    :param backing: path of the image that it stands on; '' for none, with its format.
    """

    path: str
    identity: list[str | int] | None
    format: str
    size_bytes: int
    allocated_bytes: int
    backing: str = ""
    backing_format: str = ""


def encode_facts(facts: dict[str, DiskFacts]) -> str:
    """Write facts by target, for the other host."""
    return json.dumps({target: asdict(one) for target, one in facts.items()})


def decode_facts(text: str) -> dict[str, DiskFacts]:
    """Read what :func:`encode_facts` has written. :raises HypervisorError: it is something else."""
    try:
        found = {target: DiskFacts(**one) for target, one in json.loads(text or "{}").items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise HypervisorError(f"what the source tells of its disks cannot be read: {error}") from error
    for target, facts in found.items():
        texts = (facts.path, facts.format, facts.backing, facts.backing_format)
        numbers = (facts.size_bytes, facts.allocated_bytes)
        whole = all(isinstance(one, str) for one in texts) and all(type(one) is int for one in numbers)
        if not whole or not isinstance(facts.identity, list | None):
            raise HypervisorError(f"what the source tells of the disk {target} cannot be read")
    return found


async def learn_facts(guest: Guest | None, machine: Machine) -> dict[str, DiskFacts]:
    """What this host knows of a domain's disks; those of an NBD server are not on this host."""
    nodes: dict[str, dict[str, Any]] = {}
    if guest is not None:
        answer = await guest.command("query-named-block-nodes", {"flat": True})
        nodes = {node["node-name"]: node for node in answer}
    opened = guest.process.opened_files() if guest is not None else None
    found = {}
    for disk in machine.disks:
        if disk.source is None or disk.source.kind == "nbd":
            continue
        image = (nodes.get(node_name(disk)) or {}).get("image") or {}
        found[disk.target] = DiskFacts(
            path=disk.source.path,
            identity=identify(disk.source.path, opened),
            format=disk.format,
            size_bytes=int(image.get("virtual-size", 0)),
            allocated_bytes=_allocated(disk.source.path),
            backing=str(image.get("full-backing-filename") or image.get("backing-filename") or ""),
            backing_format=str(image.get("backing-filename-format") or ""),
        )
    return found


def _allocated(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0


def identify(path: str, opened: Container[tuple[int, int]] | None = None) -> list[str | int] | None:
    """What tells whether two hosts mean the same file.

    On one machine that is device and inode under one boot.  On a file system of the network it is the handle by which
    its server knows the file, which is the same for all its clients.

    :param opened: files that the guest's process has open; None where there is none to ask.
    :returns: None where the file cannot be read, or is another one than the guest has open.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    if opened is not None and (status.st_dev, status.st_ino) not in opened:
        return None
    identity: list[str | int] = [boot_id(), status.st_dev, status.st_ino]
    kind = _file_system(path)
    if kind in _NETWORK_FILE_SYSTEMS and (handle := _handle(path)):
        identity += [kind, handle]
    return identity


def is_same(path: str, here: list[str | int] | None, there: list[str | int] | None) -> bool:
    """Whether a path here is the file that the other host means.

    Two servers of one kind may know different files by the same handle, so a file of the network must also show the
    locks that the source's QEMU holds on it.
    """
    if here is None or there is None:
        return False
    if here[:3] == there[:3]:
        return True
    return len(here) == len(there) and here[3:] != [] and here[3:] == there[3:] and _is_locked(path)


def _file_system(path: str) -> str:
    """Name of the file system that a path is on, by the longest mount point above it."""
    best, kind = "", ""
    real = os.path.realpath(path)
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, mount, name, *_ = line.split(" ")
        point = mount.encode().decode("unicode_escape")
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, name
    return kind


def _handle(path: str) -> str:
    """The file's handle, as text; '' where the file system has none.  :source: name_to_handle_at(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "name_to_handle_at"):
        return ""
    size = 128
    buffer = ctypes.create_string_buffer(struct.pack("Ii", size, 0) + bytes(size), 8 + size)
    mount = ctypes.c_int()
    if libc.name_to_handle_at(-100, os.fsencode(path), buffer, ctypes.byref(mount), 0x400) != 0:
        return ""
    length, kind = struct.unpack_from("Ii", buffer)
    return f"{kind}:{buffer.raw[8 : 8 + length].hex()}"


def _is_locked(path: str) -> bool:
    """Whether somebody holds QEMU's image locks on a file.  :source: QEMU block/file-posix.c, RAW_LOCK_PERM_BASE."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _FIRST_LOCK_BYTE, _LOCK_BYTES, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    except OSError as error:
        _log.info("the locks of %s cannot be seen: %s", path, error)
        return False
    finally:
        os.close(descriptor)


# Which disks are copied


def wanted_copies(options: MigrationOptions, machine: Machine, told: dict[str, DiskFacts]) -> list[Disk]:
    """Disks that a destination gets by copy: those named, or all that are writable and not shared.

    :param machine: as the destination builds it; ``told``: what the source says of its disks.
    :raises HypervisorError: a disk is named that cannot be copied.
    """
    if options.copy_storage is None:
        return []
    disks = {disk.target: disk for disk in machine.disks if disk.source is not None}
    for target in options.copy_disks:
        if target not in disks or target not in told:
            raise HypervisorError(f"there is no disk {target} whose content could be copied")
    found = []
    for target, disk in disks.items():
        facts = told.get(target)
        if facts is None or disk.source is None:
            continue
        path = disk.source.path
        if is_same(path, identify(path), facts.identity):
            if target in options.copy_disks:
                raise HypervisorError(
                    f"the disk {target} is shared by both hosts, and is not copied onto itself"
                )
            continue
        named = target in options.copy_disks
        if named and disk.readonly:
            # Its node is read-only at the destination too, so nothing can write it there.
            raise HypervisorError(f"the disk {target} is read-only: bring it there by other means")
        if named or (not options.copy_disks and not disk.readonly and not disk.shareable):
            found.append(disk)
    return found


# Target files


def _note(root: Root, migration_id: MigrationId) -> Path:
    return root.path / "made" / f"{migration_id}.json"


def make_targets(
    root: Root,
    migration_id: MigrationId,
    disks: Sequence[Disk],
    told: dict[str, DiskFacts],
    copy: StorageCopy,
) -> None:
    """Make the files that disks are copied into; blocking.

    :raises PrepareError: one is there already, or cannot be made; nothing is left.
    """
    files = [disk for disk in disks if disk.source is not None and disk.source.kind == "file"]
    paths = [disk.source.path for disk in files if disk.source is not None]
    for path in paths:
        if os.path.lexists(path):
            raise PrepareError(
                f"{path} is there already, and nothing is copied over it:"
                " remove it, or give another path by the option disks",
                side=Side.DESTINATION,
            )
    try:
        _note(root, migration_id).parent.mkdir(mode=0o700, exist_ok=True)
        _write_note(root, migration_id, dict.fromkeys(paths))
        made = dict(zip(paths, [_make_empty(path) for path in paths], strict=True))
        _write_note(root, migration_id, made)
        for disk in files:
            assert disk.source is not None
            _make(disk.source.path, disk, told[disk.target], copy)
    except (OSError, HypervisorError, subprocess.TimeoutExpired) as error:
        with suppress(HypervisorError):  # the next opening tries again
            remove_targets(root, migration_id)
        raise PrepareError(f"the copy's files cannot be made: {error}", side=Side.DESTINATION) from error


def _write_note(root: Root, migration_id: MigrationId, files: Mapping[str, list[int] | None]) -> None:
    """Note files that are being made, durably: their paths, and device and inode of those that are there."""
    write_file(_note(root, migration_id), json.dumps(files), durable=True)


def _make_empty(path: str) -> list[int]:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return [status.st_dev, status.st_ino]


def _make(path: str, disk: Disk, facts: DiskFacts, copy: StorageCopy) -> None:
    if facts.size_bytes <= 0:
        raise HypervisorError(f"the source does not say how large the disk {disk.target} is")
    if disk.format == "raw":
        os.truncate(path, facts.size_bytes)
        return
    program = shutil.which("qemu-img")
    if program is None:
        raise HypervisorError("qemu-img is not installed: on Debian, apt-get install qemu-utils")
    backing = []
    if copy is StorageCopy.TOP and facts.backing:
        backing = ["-b", facts.backing, "-F", facts.backing_format or "raw"]
    ended = subprocess.run(
        [program, "create", "-q", "-f", disk.format, *backing, path, str(facts.size_bytes)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=_QEMU_IMG_S,
        check=False,
    )
    if ended.returncode != 0:
        raise HypervisorError(ended.stderr.decode(errors="replace").strip()[:400])


def remove_targets(root: Root, migration_id: MigrationId) -> None:
    """Remove the files that were made for a migration whose guest never ran here; none is no error.

    :raises HypervisorError: one cannot be removed; it stays noted.
    """
    note = _note(root, migration_id)
    try:
        files: dict[str, list[int] | None] = json.loads(note.read_text())
        for path, identity in files.items():
            _remove(path, identity)
    except FileNotFoundError:
        pass  # nothing was made
    except (OSError, ValueError, AttributeError) as error:
        raise HypervisorError(f"what {note} says was made cannot be removed: {error}") from error
    keep_targets(root, migration_id)


def _remove(path: str, identity: list[int] | None) -> None:
    """Remove a file that was made: the one of that identity, or an empty one where a crash came before that."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if identity is None:
        ours = stat.S_ISREG(status.st_mode) and status.st_size == 0
    else:
        ours = identity == [status.st_dev, status.st_ino]
    if ours:
        os.unlink(path)
    else:
        _log.warning("%s is another file than the one that was made for a disk, and stays", path)


def keep_targets(root: Root, migration_id: MigrationId) -> None:
    """The guest runs on the files that were made: they are its disks now."""
    note = _note(root, migration_id)
    note.unlink(missing_ok=True)
    note.with_name(note.name + NEW).unlink(missing_ok=True)


def stray_targets(root: Root) -> set[str]:
    """Migrations for which files were made and not decided about."""
    return {path.name.split(".")[0] for path in (root.path / "made").glob("*.json*")}


async def export_disks(
    guest: Guest,
    disks: Sequence[Disk],
    place: MigrationURI,
    *,
    address: str | None,
    ports: tuple[int, int] | None,
    tls: bool,
) -> str:
    """Let the source write the disks that it copies; at the destination.

    :param place: where the guest's memory arrives: the disks come to the same address, at another port or path.
    :param address: on which to listen; None is that of ``place``.
    :returns: where the source connects to, as a migration URI.
    :raises HypervisorError: nothing can listen there, or QEMU does not export.
    """
    listener, uri = _listener(place, address, ports)
    with listener:
        # Nothing follows a descriptor on a monitor before its answer.
        await guest.command_all(Command("getfd", {"fdname": _FD_NAME}, [listener.fileno()]))
        server: dict[str, Any] = {
            "addr": {"type": "fd", "data": {"str": _FD_NAME}},
            "max-connections": len(disks),
        }
        if tls:
            server["tls-creds"] = TLS_ID
        exports = [
            {
                "type": "nbd",
                "id": f"{COPY_PREFIX}-{number}",
                "node-name": node_name(disk),
                "name": disk.target,
                "writable": True,
            }
            for number, disk in enumerate(disks)
        ]
        await guest.command_all(
            Command("nbd-server-start", server), *(Command("block-export-add", one) for one in exports)
        )
    return uri.render()


def disks_socket(path: str) -> str:
    """Path of the unix socket to which disks come, beside that of the guest's memory."""
    return f"{path}.disks"


def _listener(
    place: MigrationURI, address: str | None, ports: tuple[int, int] | None
) -> tuple[socket.socket, MigrationURI]:
    """A socket that listens for the copies of disks, and where."""
    if place.protocol == "unix":
        path = disks_socket(place.path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(path)
            listener.listen()
        except OSError as error:
            listener.close()
            raise HypervisorError(f"the disks' socket {path} cannot be made: {error}") from error
        return listener, MigrationURI(protocol="unix", path=path)
    host = address or place.host or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    trouble: OSError | None = None
    for port in (0,) if ports is None else range(ports[0], ports[1] + 1):
        try:
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            trouble = error
            continue
        return listener, place.with_port(int(listener.getsockname()[1]))
    raise HypervisorError(f"the disks cannot be listened for at {host}: {trouble}")


async def end_export(guest: Guest) -> None:
    """Let nobody write the disks any more; before the guest runs on them."""
    try:
        await guest.control.execute("nbd-server-stop")
    except MonitorError as error:
        _log.info("domain %s exports nothing: %s", guest.record.name, error)


# The copy, at the source


class CopyError(Exception):
    """A disk's copy failed; the guest is here, with its own disk."""


class Copies:
    """The disks of one transfer that are copied.

    :param exports: target of a disk -> name of the node that its device uses.
    :param show: shows how much has been copied, and of how much.
    """

    def __init__(
        self,
        guest: Guest,
        options: MigrationOptions,
        *,
        uri: str,
        targets: Sequence[str],
        tls_name: str,
        tasks: TaskGroup,
        show: Callable[[int, int], None],
    ) -> None:
        self._guest = guest
        self._options = options
        self._uri = uri
        self._jobs = {f"{COPY_PREFIX}{number}": target for number, target in enumerate(targets)}
        self._tls_name = tls_name
        self._tasks = tasks
        self._show = show
        self._ended: set[str] = set()
        self._total = 0

    async def run(self) -> None:
        """Copy until every disk is at both ends, where each further write of the guest goes too.

        :raises CopyError: one failed; :meth:`abandon` follows.
        :cancellation: :meth:`abandon` follows.
        """
        with self._guest.control.events(
            "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"
        ) as events:
            for name, target in self._jobs.items():
                await self._begin(name, target)
            sampling = anyio.CancelScope()
            self._tasks.start_soon(self._sample, sampling)
            try:
                ready: set[str] = set()
                while len(ready) < len(self._jobs):
                    event = await events.get()
                    name = str(event.data.get("device"))
                    if name not in self._jobs:
                        continue
                    if event.name != "BLOCK_JOB_READY":
                        self._ended.add(name)
                        raise CopyError(self._said(name, event))
                    ready.add(name)
            finally:
                sampling.cancel()
        await self._show_once()

    async def _begin(self, name: str, target: str) -> None:
        await self._connect(name, target)
        job = {
            "job-id": name,
            "device": f"node-{target}",
            "target": name,
            "sync": "top" if self._options.copy_storage is StorageCopy.TOP else "full",
            "copy-mode": "write-blocking" if self._options.copy_synchronously else "background",
            "speed": self._options.copy_bandwidth_bytes_per_s or 0,
            "on-source-error": "report",
            "on-target-error": "report",
        }
        await self._command(target, Command("blockdev-mirror", job))

    async def _connect(self, name: str, target: str) -> None:
        """Connect to the disk's export.

        QEMU waits for the server while it adds the node, and the guest with it (seen on 7.2): the server's greeting
        must be there before, and a copy of the connection is kept to end it if the server falls silent then.
        """
        try:
            stream = await connect(self._uri)
        except OSError as error:
            raise CopyError(f"the disks' server at {self._uri} cannot be reached: {error}") from error
        guard = anyio.CancelScope()
        with stream:
            stream.setblocking(False)
            with anyio.move_on_after(CONNECT_S):
                await anyio.wait_readable(stream)
            try:
                greeting = stream.recv(len(_NBD_MAGIC), socket.MSG_PEEK)
            except OSError as error:
                raise CopyError(f"the disks' server at {self._uri} does not greet: {error}") from error
            if greeting != _NBD_MAGIC:
                raise CopyError(f"what listens at {self._uri} is no NBD server")
            stream.setblocking(True)
            node: dict[str, Any] = {
                "driver": "nbd",
                "node-name": name,
                "server": {"type": "fd", "str": _FD_NAME},
                "export": target,
                "detect-zeroes": "unmap",
                "discard": "unmap",
            }
            if self._options.tls:
                node |= {"tls-creds": TLS_ID, "tls-hostname": self._tls_name}
            self._tasks.start_soon(cut_silent, stream, guard)
            try:
                with anyio.CancelScope(shield=True):
                    await self._command(target, Command("getfd", {"fdname": _FD_NAME}, [stream.fileno()]))
                    await self._command(target, Command("blockdev-add", node))
            finally:
                guard.cancel()

    async def _command(self, target: str, command: Command) -> None:
        try:
            await self._guest.command_all(command)
        except HypervisorError as error:
            raise CopyError(f"the disk {target} cannot be copied: {error.message}") from error

    def _said(self, name: str, event: Event) -> str:
        reason = str(event.data.get("error") or "it was ended by somebody else")
        return f"the copy of disk {self._jobs[name]} failed: {reason}"

    async def _sample(self, scope: anyio.CancelScope) -> None:
        with scope:
            while True:
                await self._show_once()
                await anyio.sleep(_SAMPLE_S)

    async def _show_once(self) -> None:
        try:
            jobs = await self._guest.command("query-block-jobs")
        except HypervisorError as error:
            _log.info("how far the disks have come could not be read: %s", error)
            return
        ours = [job for job in jobs if job.get("device") in self._jobs]
        self._total = sum(job["len"] for job in ours)
        self._show(sum(job["offset"] for job in ours), self._total)

    async def set_speed(self, bytes_per_s: int) -> None:
        """Cap the copy of each disk; 0 is no cap. :raises HypervisorError: a copy has ended."""
        await self._guest.command_all(
            *(Command("block-job-set-speed", {"device": name, "speed": bytes_per_s}) for name in self._jobs)
        )

    async def finish(self) -> None:
        """End every copy, of a guest that stands still: afterwards everything is at the destination.

        :raises CopyError: something is not; the guest must go on here.
        """
        with self._guest.control.events("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") as events:
            for name, target in self._jobs.items():
                await self._command(target, Command("block-job-cancel", {"device": name, "force": False}))
            waiting = set(self._jobs)
            with anyio.move_on_after(_END_S):
                while waiting:
                    event = await events.get()
                    name = str(event.data.get("device"))
                    if name not in waiting:
                        continue
                    waiting.discard(name)
                    self._ended.add(name)
                    # A ready mirror that ends well says COMPLETED, though it was cancelled; only that is whole.
                    if event.name != "BLOCK_JOB_COMPLETED" or event.data.get("error"):
                        raise CopyError(self._said(name, event))
            if waiting:
                raise CopyError(
                    f"the copy of disk {self._jobs[min(waiting)]} did not end within {_END_S:g} s"
                )
        for name, target in self._jobs.items():
            await self._command(target, Command("blockdev-del", {"node-name": name}))
        self._show(self._total, self._total)


async def abandon_copies(guest: Guest) -> None:
    """End whatever copies are left at a source, in whatever state; the guest keeps its own disks.

    :raises HypervisorError: they could not be ended; the domain goes on, and QEMU says what is wrong.
    """
    nodes = await _copy_nodes(guest)
    if not nodes:
        return
    with guest.control.events("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") as events:
        jobs = {str(job["device"]) for job in await guest.command("query-block-jobs")}
        waiting = {name for name in nodes if name in jobs}
        # A server that is silent holds a job for ever, until its connection is broken.
        await yank(guest, nodes)
        for name in sorted(waiting):
            try:
                await guest.control.execute("block-job-cancel", {"device": name, "force": True})
            except MonitorError as error:
                _log.info("the copy %s has ended meanwhile: %s", name, error)
        with anyio.move_on_after(_END_S):
            while waiting & {str(job["device"]) for job in await guest.command("query-block-jobs")}:
                await events.get()
    await guest.command_all(*(Command("blockdev-del", {"node-name": name}) for name in nodes))


async def _copy_nodes(guest: Guest) -> list[str]:
    nodes = await guest.command("query-named-block-nodes", {"flat": True})
    return [str(node["node-name"]) for node in nodes if str(node["node-name"]).startswith(COPY_PREFIX)]


async def yank(guest: Guest, nodes: Sequence[str] | None = None, *, stream: bool = False) -> None:
    """Break connections of QEMU's, out of band.

    :param nodes: of which block nodes; None is those of all our copies.
    :param stream: that of the migration too.
    :raises MonitorClosedError: the process is gone.
    :source: qapi/yank.json: one unknown instance refuses the whole list, so it is asked what there is.
    """
    try:
        there = await guest.control.execute_oob("query-yank")
        instances = [
            one
            for one in there
            if (stream and one["type"] == "migration")
            or (
                one["type"] == "block-node"
                and (
                    str(one["node-name"]).startswith(COPY_PREFIX)
                    if nodes is None
                    else one["node-name"] in nodes
                )
            )
        ]
        if instances:
            await guest.control.execute_oob("yank", {"instances": instances})
    except MonitorClosedError:
        raise
    except MonitorError as error:
        # There is none where the transfer has just ended.
        _log.info("connections of domain %s could not be broken: %s", guest.record.name, error)
