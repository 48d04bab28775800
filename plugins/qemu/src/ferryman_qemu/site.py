"""What a process of QEMU gets from this host: sockets, taps, files, a TPM.

A :class:`LocalSite` is entered around the start of one process: what it has opened for the process is closed here when
the process has it, and nothing of it is left when the process did not start.

Sources: Linux Documentation/networking/tuntap.rst; linux/sockios.h; swtpm(8).
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self
from zlib import crc32

from ferryman.errors import HypervisorError

if TYPE_CHECKING:
    from ferryman_qemu.machine import Interface, Machine
    from ferryman_qemu.root import Root, RunDirectory

_log = logging.getLogger(__name__)

_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_UP = 0x1
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCSIFMTU = 0x8922
_SIOCBRADDIF = 0x89A2
_IFREQ = struct.Struct("16sH22x")
_IFREQ_INT = struct.Struct("16si20x")
_TAP_PATTERN = "ferry%d"
"""The kernel puts the first free number in."""

_PORTS = 100
_SWTPM_S = 10.0


class LocalSite:
    """What one process to come gets from this host.

    :param definition: uuid and name of the domain; its own files lie in the root under the uuid.
    """

    def __init__(
        self, root: Root, run: RunDirectory, *, emulator: str, incoming: bool, uuid: str, name: str
    ) -> None:
        self.emulator = emulator
        self.incoming = incoming
        self.pidfile = run.pidfile
        self.inherited: list[int] = []
        self.taps: dict[str, str] = {}
        self._root = root
        self._run = run
        self._uuid = uuid
        self._name = name
        self._has_tpm = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def abandon(self) -> None:
        """End what was started for a process that did not come to be, and is gone."""
        if self._has_tpm:
            _end_left_over(self._root.tpm(self._uuid))

    def _keep(self, descriptor: int) -> int:
        self.inherited.append(descriptor)
        return descriptor

    def listen(self, name: str) -> int:
        """A listening unix socket in the process's directory."""
        return self._keep(self._stack.enter_context(self._run.listen(name)).fileno())

    def secret(self, name: str, text: str) -> str:
        """A file that only this user reads; it goes with the process's directory."""
        path = self._run.path / name
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
        return str(path)

    def now_s(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def free_port(self, address: str, first: int) -> int:
        """A port that nobody has; somebody else may take it before QEMU does, which QEMU then says.

        Domains begin to look at different ports, so that those that start at once meet seldom.
        """
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        begin = crc32(self._uuid.encode()) % _PORTS
        for port in (first + (begin + number) % _PORTS for number in range(_PORTS)):
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address, port))
                except OSError:
                    continue
                return port
        raise HypervisorError(f"no port from {first} to {first + _PORTS - 1} of {address} is free")

    # Files of the domain

    def nvram(self, machine: Machine) -> str:
        """The firmware's variables; made from the template where there are none yet."""
        firmware = machine.firmware
        path = Path(firmware.nvram) if firmware.nvram else self._root.nvram(self._uuid)
        if path.exists():
            return str(path)
        if not firmware.template:
            raise HypervisorError(
                f"the file {path} of the firmware's variables is not there, and <nvram> names no template"
            )
        temporary = path.with_name(path.name + ".new")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copyfile(firmware.template, temporary)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise HypervisorError(
                f"the firmware's variables cannot be made from {firmware.template}: {error}"
            ) from error
        return str(path)

    def tpm(self) -> int:
        """Start swtpm for the process to come; it ends when that has begun to use it and lets go of the connection.

        One whose process ended before that goes on waiting (seen on swtpm 0.7.1), and is ended at the next start.
        """
        self._has_tpm = True
        program = shutil.which("swtpm")
        if program is None:
            raise HypervisorError("swtpm is not installed: on Debian, apt-get install swtpm")
        ours, theirs = socket.socketpair()
        self._stack.enter_context(ours)
        with theirs:
            state = self._root.tpm(self._uuid)
            try:
                state.mkdir(mode=0o700, parents=True, exist_ok=True)
                _end_left_over(state)
                ended = subprocess.run(
                    [
                        program,
                        "socket",
                        "--tpm2",
                        "--daemon",
                        "--terminate",
                        "--tpmstate",
                        f"dir={state},mode=0600",
                        "--ctrl",
                        f"type=unixio,clientfd={theirs.fileno()}",
                        "--pid",
                        f"file={_pidfile(state)}",
                        "--log",
                        f"file={self._root.log(self._name + '-swtpm')}",
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_SWTPM_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise HypervisorError(f"swtpm could not be started: {error}") from error
            if ended.returncode != 0:
                raise HypervisorError(
                    f"swtpm could not be started: {ended.stderr.decode(errors='replace').strip()[:400]}"
                )
        return self._keep(ours.fileno())

    # Network

    def tap(self, interface: Interface) -> tuple[list[int], list[int]]:
        """Open the tap of an interface, and make it where it is to be made; it goes with the process."""
        if interface.kind == "user":
            return [], []
        queues = interface.queues or 1
        taps = [self._open_tap(interface, multiple=queues > 1)]
        taps += [self._open_tap(interface, multiple=True) for _ in range(queues - 1)]
        vhosts = []
        wanted = interface.backend == "vhost" or (interface.backend == "" and self._vhost)
        if wanted and interface.model.startswith("virtio"):
            vhosts = [self._open("/dev/vhost-net") for _ in range(queues)]
        return taps, vhosts

    @property
    def _vhost(self) -> bool:
        return os.access("/dev/vhost-net", os.R_OK | os.W_OK)

    def _open(self, path: str) -> int:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HypervisorError(f"{path} cannot be opened: {error.strerror}") from error
        self._stack.callback(os.close, descriptor)
        return self._keep(descriptor)

    def _open_tap(self, interface: Interface, *, multiple: bool) -> int:
        descriptor = self._open("/dev/net/tun")
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if multiple else 0)
        known = self.taps.get(interface.alias, "")
        wanted = known or interface.tap or _TAP_PATTERN
        if interface.tap and not interface.managed and not Path(f"/sys/class/net/{interface.tap}").exists():
            raise HypervisorError(
                f"the tap {interface.tap} is not there, and managed='no' says that it is made elsewhere"
            )
        try:
            answer = fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(wanted.encode(), flags))
            name = _IFREQ.unpack(answer)[0].rstrip(b"\0").decode()
            self.taps[interface.alias] = name
            if not known and interface.managed:
                _bring_up(name, interface)
        except OSError as error:
            raise HypervisorError(
                f"the tap of interface {interface.alias} cannot be made: {error.strerror}"
            ) from error
        return descriptor


def _pidfile(state: Path) -> Path:
    return state.with_name(state.name + ".pid")


def _end_left_over(state: Path) -> None:
    """End the swtpm of an earlier start that keeps the state locked; the domain is being started, so nobody uses it."""
    try:
        pid = int(_pidfile(state).read_text())
        process = os.pidfd_open(pid)
    except (OSError, ValueError):
        return
    try:
        # The number may be somebody else's by now.
        if os.fsencode(f"dir={state},") in Path(f"/proc/{pid}/cmdline").read_bytes():
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], _SWTPM_S)
    except OSError as error:
        _log.info("the TPM emulator %d of an earlier start is gone: %s", pid, error)
    finally:
        os.close(process)


def _bring_up(name: str, interface: Interface) -> None:
    """Set a tap's MTU, put it on its bridge and switch it on. :raises HypervisorError: there is no such bridge."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if interface.mtu is not None:
            fcntl.ioctl(control, _SIOCSIFMTU, _IFREQ_INT.pack(name.encode(), interface.mtu))
        if interface.bridge:
            index = socket.if_nametoindex(name)
            try:
                fcntl.ioctl(control, _SIOCBRADDIF, _IFREQ_INT.pack(interface.bridge.encode(), index))
            except OSError as error:
                raise HypervisorError(
                    f"the bridge {interface.bridge} cannot take an interface: {error.strerror}"
                ) from error
        (_, flags) = _IFREQ.unpack(fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0)))
        fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(name.encode(), flags | _IFF_UP))
