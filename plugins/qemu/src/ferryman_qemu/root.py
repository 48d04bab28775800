"""A host of the QEMU driver: a directory, and what lies in it.

::

    lock                    held while a program has the root open
    uuid                    identity of this host
    probe.json              what the emulator can do
    journal, .mark, .reserve
    domains/<uuid>.xml      persistent definitions
    domains/<uuid>.autostart    beside one that starts with the host
    booted                  the boot of the host at which they were started last
    made/<migration>.json   files that were made for disks that are being copied
    nvram/<uuid>.fd         variables of UEFI firmware
    tpm/<uuid>/             state of a TPM
    logs/<name>.log         command lines and what QEMU printed
    run/<nonce>/            one process of QEMU:
        guest.json          who it is; written when its pid is known
        control, read       its monitors' sockets: the driver's, and one for programs that look on
        pid                 written by QEMU

A process without a ``guest.json`` is found by its command line, so none is ever lost.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import uuid as uuid_module
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio

from ferryman.errors import ConnectError, HostBusyError, HypervisorError

if TYPE_CHECKING:
    from ferryman.types import DomainUUID
    from ferryman.uri import ConnectionURI

LOCK_WAIT_S = 3.0
"""How long a second program waits for the root before it changes something."""

NEW = ".new"
"""How the name of a file ends that is not whole yet."""

_LOCK_RETRY_S = 0.05
_SAFE = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestRecord:
    """What ``guest.json`` says of one process.

    :param migration: id of the migration that this process receives; '' for a domain.
    :param identity: boot id, pid and start time.
    :param socket: unix socket that the receiver listens on; QEMU removes it unless it is killed.
    :param attached: control socket of a process that another program has started; '' for one of ours.
    :param offered: such a process waits for a guest, and no migration has asked for it yet.
    :param taps: names of the taps that were made for the process, by the alias of their interface.
    :param plugging: definition that the machine has once a device is plugged in, while one is; '' otherwise.
    :param leaving: what the guest was asked to let go of, and may at any moment: aliases, and QOM paths of processors.
    :param listen: post-copy: migration URI where the receiver waited, and waits again when the stream breaks.
    :param exports: the source writes disks of the receiver, until the guest runs on them.
    :param log_begin: where in the domain's log begins what this process prints.
    :param autodestroy: the domain ends with the program that started it.
    :param restoring: the guest's state is being loaded from a file, which still has it.
    :param reboot: what of a reboot is under way.
    :param save_path: file that the guest is being saved into; '' while it is not.
    :param save_running: the guest ran before it was saved, and runs again if the save fails.
    :param save_whole: all of the guest's state is in the unfinished file, which may have its name already.
    """

    uuid: str
    name: str
    definition: str
    persistent: bool
    migration: str = ""
    identity: str = ""
    socket: str = ""
    listen: str = ""
    exports: bool = False
    attached: str = ""
    offered: bool = False
    log_begin: int = 0
    taps: dict[str, str] = field(default_factory=dict)
    plugging: str = ""
    leaving: list[str] = field(default_factory=list)
    autodestroy: bool = False
    restoring: bool = False
    reboot: Literal["", "asked", "resetting"] = ""
    save_path: str = ""
    save_running: bool = False
    save_whole: bool = False


def root_of(uri: ConnectionURI) -> Path:
    """The directory that a URI names.

    :raises ConnectError: the URI names none.
    """
    for name, _value in uri.params:
        if name != "root" or uri.path != "/embed":
            raise ConnectError(f"{uri} has the parameter {name}, which qemu:// does not know here")
    match uri.path:
        case "/embed":
            text = uri.param("root")
            if not text or not text.startswith("/"):
                raise ConnectError(f"{uri} names no directory: write qemu:///embed?root=/absolute/path")
            return Path(text)
        case "/system":
            return Path("/var/lib/ferryman/qemu")
        case "/session":
            data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
            return Path(data) / "ferryman" / "qemu"
        case path:
            raise ConnectError(
                f"{path} is no host of QEMU: write qemu:///system, /session or /embed?root=DIRECTORY"
            )


class Root:
    """An open root.

    :ivar held: this program alone changes it; others look on.
    """

    def __init__(self, path: Path, lock: int, *, held: bool) -> None:
        self.path = path
        self.held = held
        self._lock = lock
        self.uuid = self._read_uuid()

    @classmethod
    def open(cls, path: Path) -> Root:
        """Open a root, and make it at its first use; held, unless another program holds it.

        :raises ConnectError: the directory cannot be made or used.
        """
        try:
            for part in ("", "domains", "logs", "run"):
                (path / part).mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConnectError(f"the directory {path} cannot be used: {error.strerror}") from error
        try:
            held = _try_lock(lock)
            if held:
                _sign(lock)
            return cls(path, lock, held=held)
        except (OSError, HypervisorError) as error:
            os.close(lock)
            raise ConnectError(f"the directory {path} cannot be used: {error}") from error
        except BaseException:
            os.close(lock)
            raise

    async def acquire(self) -> None:
        """Become the program that changes the root.

        :raises HostBusyError: another program holds it and did not let go within :data:`LOCK_WAIT_S`.
        """
        with anyio.move_on_after(LOCK_WAIT_S):
            while not _try_lock(self._lock):  # noqa: ASYNC110
                # flock has no event to wait for: a waiting thread could not be cancelled.
                await anyio.sleep(_LOCK_RETRY_S)
            _sign(self._lock)
            self.held = True
            return
        holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
        raise HostBusyError(
            f"{self.path} is open in another program (process {holder}): it did not let go within {LOCK_WAIT_S:g} s"
        )

    def close(self) -> None:
        """Let the root go."""
        if self._lock >= 0:
            if self.held:
                os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = -1

    def _read_uuid(self) -> str:
        path = self.path / "uuid"
        try:
            return str(uuid_module.UUID(path.read_text().strip()))
        except FileNotFoundError:
            made = str(uuid_module.uuid4())
            write_file(path, made + "\n")
            return made
        except ValueError as error:
            raise ConnectError(f"{path} does not hold a uuid: remove it") from error

    @property
    def journal(self) -> Path:
        """Where the journal lies."""
        return self.path / "journal"

    def log(self, name: str) -> Path:
        """Where a domain's log lies."""
        return self.path / "logs" / f"{_SAFE.sub('_', name)[:100]}.log"

    def definitions(self) -> dict[DomainUUID, str]:
        """Persistent definitions by uuid."""
        found: dict[DomainUUID, str] = {}
        for path in sorted((self.path / "domains").glob("*.xml")):
            found[path.stem] = path.read_text()  # type: ignore[index]  # the stem is the uuid we wrote
        return found

    def write_definition(self, uuid: DomainUUID, definition: str) -> None:
        """Keep a persistent definition, whole or not at all. :raises HypervisorError: it cannot be written."""
        write_file(self.path / "domains" / f"{uuid}.xml", definition)

    def remove_definition(self, uuid: DomainUUID) -> None:
        """Forget a persistent definition, and that it starts with the host."""
        self.set_autostart(uuid, enabled=False)
        (self.path / "domains" / f"{uuid}.xml").unlink(missing_ok=True)

    def nvram(self, uuid: str) -> Path:
        """Where the firmware of a domain keeps its variables, unless the definition names a place."""
        return self.path / "nvram" / f"{uuid}.fd"

    def tpm(self, uuid: str) -> Path:
        """The directory in which the TPM of a domain keeps its state."""
        return self.path / "tpm" / uuid

    def remove_state(self, uuid: DomainUUID) -> None:
        """Remove what a domain that is gone has kept here beside its definition."""
        self.nvram(uuid).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            shutil.rmtree(self.tpm(uuid))

    def autostart(self, uuid: DomainUUID) -> bool:
        """Whether a domain starts with the host."""
        return self._autostart_mark(uuid).exists()

    def set_autostart(self, uuid: DomainUUID, *, enabled: bool) -> None:
        """Start a domain with the host, or no longer. :raises HypervisorError: it cannot be written."""
        if enabled:
            write_file(self._autostart_mark(uuid), "")
        else:
            self._autostart_mark(uuid).unlink(missing_ok=True)

    def _autostart_mark(self, uuid: DomainUUID) -> Path:
        return self.path / "domains" / f"{uuid}.autostart"

    def has_booted(self, boot: str) -> bool:
        """Whether the host has booted since the domains were last started with it."""
        try:
            return (self.path / "booted").read_text() != boot
        except OSError:
            return True

    def note_boot(self, boot: str) -> None:
        """Note that the domains were started with the host. :raises HypervisorError: it cannot be written."""
        write_file(self.path / "booted", boot)

    def run_directories(self) -> list[RunDirectory]:
        """Directories of all processes that were started here and not cleaned up."""
        return [RunDirectory(path) for path in sorted((self.path / "run").iterdir())]

    def new_run_directory(self) -> RunDirectory:
        """Make the directory of a new process. :raises HypervisorError: there is no room, or no right to."""
        path = self.path / "run" / uuid_module.uuid4().hex[:12]
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise HypervisorError(f"{path} cannot be made: {error.strerror}") from error
        return RunDirectory(path)


class RunDirectory:
    """The directory of one process of QEMU."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def pidfile(self) -> str:
        """The file that QEMU writes its pid into; its path marks the process."""
        return str(self.path / "pid")

    def write(self, record: GuestRecord) -> None:
        """Write down who the process is, whole or not at all. :raises HypervisorError: it cannot be written."""
        write_file(self.path / "guest.json", json.dumps(asdict(record)))

    def read(self) -> GuestRecord | None:
        """Who the process is; None for a directory that never got so far."""
        try:
            return GuestRecord(**json.loads((self.path / "guest.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def listen(self, name: str) -> socket.socket:
        """Make a listening socket; its path may be longer than a socket's address can be."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _directory(self.path) as short:
                listener.bind(f"{short}/{name}")
            listener.listen(4)
        except BaseException:
            listener.close()
            raise
        return listener

    async def connect_control(self, record: GuestRecord) -> anyio.abc.UNIXSocketStream:
        """Connect to the monitor that changes the process's state. :raises OSError: nobody listens."""
        return await connect_unix(Path(record.attached) if record.attached else self.path / "control")

    async def connect(self, name: str) -> anyio.abc.UNIXSocketStream:
        """Connect to a monitor, or to a channel. :raises OSError: nobody listens."""
        return await connect_unix(self.path / name)

    def remove(self) -> None:
        """Remove the directory and everything in it."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path)


async def connect_unix(path: Path) -> anyio.abc.UNIXSocketStream:
    """Connect to a socket, whose path may be longer than a socket's address can be. :raises OSError: nobody listens."""
    with _directory(path.parent) as short:
        return await anyio.connect_unix(f"{short}/{path.name}")


class _directory:  # noqa: N801 - used as a function
    """A short path for a directory, for the 108 bytes of a socket's address."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> str:
        self._fd = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._fd}"

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._fd)


def _sign(lock: int) -> None:
    """Write down who holds the lock."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_file(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a file, whole or not at all; durably, it is there after a loss of power too.

    :raises HypervisorError: there is no room, or no right to.
    """
    temporary = path.with_name(path.name + NEW)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise HypervisorError(f"{path} cannot be written: {error.strerror}") from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. :raises OSError: they are not."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
