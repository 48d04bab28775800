"""Stock libvirt: ``virsh migrate --live`` between two libvirtds that take each other for different hosts.

Both daemons run on this machine as root, each in a mount and a UTS namespace of its own with its own hostname and
host uuid (see ``_libvirt_host.py``). They share the loopback interface, over which the state travels, and one
directory, in which each has its control socket. The migration is a managed one: virsh talks to both daemons and
walks libvirt's five phases itself. Each call is a virsh process, as a person or a script would start it.

Domains are transient, so neither side writes or removes a definition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import select
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tests.bench._libvirt_host import HIDDEN_DIRECTORIES, HostSettings
from tests.bench.peer import Direction, GuestSpec, Host, PeerError, PeerUnavailable, Sample

PROGRAMS = ("unshare", "mount", "libvirtd", "virsh", "qemu-system-x86_64")
HOST_START_TIMEOUT_S = 60.0
HOST_STOP_TIMEOUT_S = 30.0
# Disjoint, so that the two allocators, which know nothing of each other, do not race for a port.
MIGRATION_PORTS = {Host.A: (49152, 49407), Host.B: (49408, 49663)}

_SUPERVISOR = Path(__file__).with_name("_libvirt_host.py")


class LibvirtPeer:
    """Stock libvirt; see the module.

    :param width: how many virsh processes :meth:`migrate_many` has under way at a time; None means all of them, which
        is what starting a migration of every guest at once amounts to.
    :param timeout_s: for a whole call of :meth:`migrate` or :meth:`migrate_many`.
    """

    def __init__(self, *, width: int | None = None, timeout_s: float = 120.0) -> None:
        self._width = width
        self._timeout_s = timeout_s
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._hosts: dict[Host, _LibvirtHost] = {}
        self._at: dict[str, Host] = {}
        self._pids: dict[str, int] = {}

    @property
    def name(self) -> str:
        return "libvirt" if self._width is None else f"libvirt-width-{self._width}"

    def start(self, guests: Sequence[GuestSpec]) -> None:
        _check_machine()
        self._directory = tempfile.TemporaryDirectory(prefix="ferryman-bench-libvirt-")
        directory = Path(self._directory.name)
        for hidden in HIDDEN_DIRECTORIES:
            if directory.is_relative_to(hidden):
                self.stop()
                raise PeerUnavailable(
                    f"the directory for temporary files is under {hidden}, which the hosts hide; set TMPDIR"
                )
        try:
            for host in Host:
                self._hosts[host] = _LibvirtHost(host, directory / host.value)
            for host in Host:
                self._hosts[host].wait_ready()
        except PeerUnavailable:
            self.stop()
            raise
        # The first question about QEMU makes a daemon probe it; let that be over before anything is measured.
        self._all([self._virsh(host, "domcapabilities", "--virttype", "qemu") for host in Host])
        for guest in guests:
            self._definition(guest).write_text(guest.domain_xml)
        self._all([self._virsh(Host.A, "create", str(self._definition(guest))) for guest in guests])
        for guest in guests:
            self._at[guest.name] = Host.A
            self._pids[guest.name] = self._hosts[Host.A].qemu_pid(guest.name)

    def _definition(self, guest: GuestSpec) -> Path:
        assert self._directory is not None
        return Path(self._directory.name, f"{guest.name}.xml")

    def daemon(self, host: Host) -> tuple[str, int]:
        """The socket of a host's daemon, and its process."""
        return self._hosts[host].daemon

    def count_all(self, rounds: int) -> list[float]:
        looks = "; ".join(["domstats --list-running --state --cpu-total --vcpu --block"] * rounds)
        (virsh,) = self._all([self._virsh(Host.A, "--timing", looks)])
        return [float(ms) / 1000 for ms in re.findall(r"\(Time: ([\d.]+) ms\)", virsh.printed)]

    def restart(self, guest: GuestSpec) -> float:
        self._all([self._virsh(Host.A, "destroy", guest.name)])
        begin_s = time.perf_counter()
        self._all([self._virsh(Host.A, "create", str(self._definition(guest)))])
        taken_s = time.perf_counter() - begin_s
        self._pids[guest.name] = self._hosts[Host.A].qemu_pid(guest.name)
        return taken_s

    def migrate(self, guest: GuestSpec, direction: Direction) -> Sample:
        (sample,) = self.migrate_many([guest], direction)
        return sample

    def migrate_many(self, guests: Sequence[GuestSpec], direction: Direction) -> list[Sample]:
        t_call_ns = time.monotonic_ns()
        for guest in guests:
            if self._at.get(guest.name) is not direction.source:
                raise ValueError(f"{guest.name!r} is not at host {direction.source.value}")
        if not guests:
            return []
        daemons_began_s = self._daemons_cpu_s()
        ended = self._all(
            [
                self._virsh(
                    direction.source,
                    *("migrate", "--live", guest.name, self._hosts[direction.destination].uri),
                    *("--migrateuri", "tcp://127.0.0.1"),
                    # Both hosts see the very same image file, but libvirt trusts that only of a network storage.
                    "--unsafe",
                )
                for guest in guests
            ]
        )
        daemons_each_s = (self._daemons_cpu_s() - daemons_began_s) / len(guests)
        samples = []
        for guest, virsh in zip(guests, ended, strict=True):
            source_pid = self._pids[guest.name]
            self._at[guest.name] = direction.destination
            self._pids[guest.name] = self._hosts[direction.destination].qemu_pid(guest.name)
            samples.append(
                Sample(
                    guest=guest.name,
                    direction=direction,
                    wall_s=(virsh.ended_ns - t_call_ns) / 1e9,
                    t_call_ns=t_call_ns,
                    t_done_ns=virsh.ended_ns,
                    source_pid=source_pid,
                    destination_pid=self._pids[guest.name],
                    # Several calls at once share the daemons, so each is charged an even part.
                    cpu_s=virsh.cpu_s + daemons_each_s,
                )
            )
        return [self._with_statistics(sample) for sample in samples]

    def pid(self, guest: GuestSpec) -> int:
        if guest.name not in self._pids:
            raise ValueError(f"{self.name} does not run {guest.name!r}")
        return self._pids[guest.name]

    def stop(self) -> None:
        hosts = list(self._hosts.values())
        self._hosts.clear()
        self._at.clear()
        self._pids.clear()
        with contextlib.ExitStack() as stack:
            if self._directory is not None:
                stack.callback(self._directory.cleanup)
                self._directory = None
            for host in hosts:
                stack.callback(host.wait_stopped)
            for host in hosts:
                host.ask_to_stop()

    def _daemons_cpu_s(self) -> float:
        return sum(host.cpu_s() for host in self._hosts.values())

    def _with_statistics(self, sample: Sample) -> Sample:
        """Add what the destination remembers of the migration; asked when the clock has stopped."""
        (virsh,) = self._all(
            [
                self._virsh(
                    sample.direction.destination, "domjobinfo", sample.guest, "--completed", "--rawstats"
                )
            ]
        )
        values = dict(re.findall(r"^(\w+): *(\d+)$", virsh.printed, flags=re.MULTILINE))
        return dataclasses.replace(
            sample,
            downtime_ms=float(values["downtime"]) if "downtime" in values else None,
            total_time_ms=float(values["time_elapsed"]) if "time_elapsed" in values else None,
        )

    def _virsh(self, host: Host, *arguments: str) -> list[str]:
        return ["virsh", "--quiet", "--connect", self._hosts[host].uri, *arguments]

    def _all(self, commands: Sequence[list[str]]) -> list[_Ended]:
        """Run virsh processes, as many at a time as ``width`` allows.

        :returns: how each ended, in the order given.
        :raises PeerError: one failed, or did not end in time and was killed; all have ended.
        """
        deadline_s = time.monotonic() + self._timeout_s
        width = self._width or len(commands)
        runs: list[_VirshRun] = []
        ended: dict[int, _Ended] = {}
        assert self._directory is not None
        with selectors.DefaultSelector() as selector:
            try:
                while len(ended) < len(commands):
                    while len(runs) < min(len(commands), len(ended) + width):
                        run = _VirshRun(commands[len(runs)], cache=self._directory.name)
                        selector.register(run.pidfd, selectors.EVENT_READ, len(runs))
                        runs.append(run)
                    ready = selector.select(deadline_s - time.monotonic())
                    ended_ns = time.monotonic_ns()
                    if not ready and time.monotonic() >= deadline_s:
                        raise PeerError(
                            f"{len(commands) - len(ended)} of {len(commands)} virsh processes did not end within "
                            f"{self._timeout_s} s, the first of them: {' '.join(commands[0])}"
                        )
                    for key, _ in ready:
                        selector.unregister(key.fileobj)
                        ended[key.data] = runs[key.data].reap(ended_ns)
            finally:
                for run in runs:
                    run.close()
        for number, command in enumerate(commands):
            if ended[number].status != 0:
                raise PeerError(
                    f"{' '.join(command)} ended with status {ended[number].status}: {ended[number].printed}"
                )
        return [ended[number] for number in range(len(commands))]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Ended:
    status: int
    ended_ns: int
    cpu_s: float
    printed: str


class _VirshRun:
    """One virsh process, with a pidfd that becomes readable when it ends."""

    def __init__(self, command: list[str], *, cache: str) -> None:
        self._output = os.fdopen(os.memfd_create("virsh-output"), "rb+")
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                # Nothing of this machine's libvirt configuration, and no cache directory in anybody's home.
                env={
                    "PATH": os.environ.get("PATH", os.defpath),
                    "LC_ALL": "C",
                    "HOME": cache,
                    "XDG_CACHE_HOME": cache,
                },
            )
            self.pidfd = os.pidfd_open(self._process.pid)
        except BaseException:
            self._output.close()
            raise

    def reap(self, ended_ns: int) -> _Ended:
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._output.seek(0)
        return _Ended(
            status=self._process.returncode,
            ended_ns=ended_ns,
            cpu_s=usage.ru_utime + usage.ru_stime,
            printed=self._output.read().decode(errors="replace").strip(),
        )

    def close(self) -> None:
        """Kill it if it still runs, and give everything back."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        os.close(self.pidfd)
        self._output.close()


class _LibvirtHost:
    """One supervisor with its libvirtd, from the outside."""

    def __init__(self, host: Host, directory: Path) -> None:
        directory.mkdir()
        port_min, port_max = MIGRATION_PORTS[host]
        self._settings = HostSettings(
            # With a dot in it libvirt does not ask a resolver for the rest of the name, again and again.
            hostname=f"{host.value}.ferryman.test",
            host_uuid=str(uuid.uuid4()),
            directory=str(directory),
            migration_port_min=port_min,
            migration_port_max=port_max,
        )
        self._stderr = os.fdopen(os.memfd_create("supervisor-stderr"), "rb+")
        self._libvirtd_pid: int | None = None
        self._namespace: str | None = None
        self._supervisor = subprocess.Popen(
            [
                *("unshare", "--mount", "--uts", "--"),
                *(sys.executable, "-I", str(_SUPERVISOR)),
                json.dumps(dataclasses.asdict(self._settings)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={"PATH": _search_path(), "LC_ALL": "C"},
            # An interrupt from the terminal is for the benchmark, which then stops its hosts in order.
            start_new_session=True,
        )

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self._settings.socket_path}"

    @property
    def daemon(self) -> tuple[str, int]:
        """The daemon's socket, and its process."""
        assert self._libvirtd_pid is not None
        return self._settings.socket_path, self._libvirtd_pid

    def wait_ready(self) -> None:
        """Wait until the daemon accepts connections.

        :raises PeerUnavailable: it never will; the text holds what the supervisor and the daemon said.
        """
        line = _read_line(_pipe(self._supervisor.stdout), timeout_s=HOST_START_TIMEOUT_S)
        if not line:
            raise PeerUnavailable(f"libvirtd does not start here: {self._last_words()}")
        self._libvirtd_pid = int(json.loads(line)["libvirtd_pid"])
        self._namespace = os.readlink(f"/proc/{self._libvirtd_pid}/ns/uts")

    def cpu_s(self) -> float:
        """CPU time of libvirtd so far, ended threads included, to the nanosecond."""
        assert self._libvirtd_pid is not None
        # The clock of another process, as clock_getcpuclockid(3) makes its number: CPUCLOCK_SCHED is 2.
        return time.clock_gettime((~self._libvirtd_pid << 3) | 2)

    def qemu_pid(self, domain: str) -> int:
        """The process that runs a domain, from the file that libvirt keeps in the host's own /run."""
        path = Path(f"/proc/{self._libvirtd_pid}/root/run/libvirt/qemu/{domain}.pid")
        try:
            return int(path.read_text())
        except (OSError, ValueError) as error:
            raise PeerError(f"libvirt on {self._settings.hostname} does not run {domain!r}") from error

    def ask_to_stop(self) -> None:
        _pipe(self._supervisor.stdin).close()

    def wait_stopped(self) -> None:
        """Wait until everything in the namespaces is gone, by force if need be; the mounts go with it."""
        try:
            self._supervisor.wait(HOST_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        _pipe(self._supervisor.stdout).close()
        self._stderr.close()
        if self._namespace is not None:
            _kill_namespace(self._namespace)

    def _last_words(self) -> str:
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()[-3:]
        log = Path(self._settings.log_path)
        if log.exists():
            said += log.read_text(errors="replace").strip().splitlines()[-3:]
        return " ".join(said) or "it said nothing"


def _check_machine() -> None:
    """:raises PeerUnavailable: not Linux as root, or a program is missing."""
    if os.geteuid() != 0:
        raise PeerUnavailable("libvirtd's system connection and its namespaces need root")
    for program in PROGRAMS:
        if shutil.which(program, path=_search_path()) is None:
            raise PeerUnavailable(f"{program} is not installed")


def _search_path() -> str:
    """PATH, and the places of daemons and of mount(8), which a user's PATH may lack."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _read_line(pipe: IO[bytes], *, timeout_s: float) -> bytes:
    """Read a pipe up to a newline; b"" if it ends or the time is over before that."""
    deadline_s = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(deadline_s - time.monotonic(), 0) * 1000):
            return b""
        data = os.read(pipe.fileno(), 4096)
        if not data:
            return b""
        line += data
    return line


def _kill_namespace(namespace: str) -> None:
    """Kill whatever still lives in a UTS namespace: nothing, unless its supervisor was killed."""

    def is_member(pid: int) -> bool:
        try:
            return os.readlink(f"/proc/{pid}/ns/uts") == namespace
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False

    def members() -> list[int]:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and is_member(int(name))]

    for pid in members():
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                # The number may have passed to another process before the pidfd was there to hold it.
                if is_member(pid):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    poll = select.poll()
                    poll.register(pidfd, select.POLLIN)
                    poll.poll(HOST_STOP_TIMEOUT_S * 1000)
            finally:
                os.close(pidfd)
    if left := members():
        raise PeerError(f"these processes of a libvirt host did not end: {left}")
