"""One libvirt "host": a libvirtd with an identity of its own, and everything it starts, under one supervisor.

Run as ``unshare --mount --uts -- python _libvirt_host.py SETTINGS`` where SETTINGS is the JSON of
:class:`HostSettings`. The supervisor, inside its two namespaces:

1. hides the directories that libvirtd shares by path (``HIDDEN_DIRECTORIES``) under empty tmpfs mounts;
2. takes the host's own hostname, and writes ``libvirtd.conf`` and ``qemu.conf``;
3. runs ``libvirtd --daemon``, whose foreground half returns when the daemon accepts connections;
4. writes ``{"libvirtd_pid": N}`` and a newline to its standard output;
5. reaps, until its standard input ends: then it stops libvirtd, kills every QEMU, waits for all of them
   and exits. The mounts die with the last process of the namespace.

libvirt starts its QEMUs as daemons, so they become children of the nearest subreaper and libvirtd can only
poll for their end (``virProcessKillPainfully``, every 200 ms). The supervisor is that subreaper: a pid 1 that
reaps late would add whole polling intervals to every migration and be charged to libvirt.

Standard library only, and no import from the tests: it runs as a script.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

# Everything that libvirt 9.0 reaches by a fixed path and writes to. /run also takes away the system bus,
# so that libvirtd meets neither systemd-machined nor firewalld of the real host.
HIDDEN_DIRECTORIES = (
    "/run",
    "/etc/libvirt",
    "/var/lib/libvirt",
    "/var/cache/libvirt",
    "/var/log/libvirt",
)
START_TIMEOUT_S = 60.0
TERMINATE_TIMEOUT_S = 10.0

_PR_SET_CHILD_SUBREAPER = 36


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostSettings:
    """What distinguishes this host from the other; ``directory`` is visible to both and private to neither."""

    hostname: str
    host_uuid: str
    directory: str
    migration_port_min: int
    migration_port_max: int

    @property
    def socket_path(self) -> str:
        return f"{self.directory}/libvirt-sock"

    @property
    def pid_path(self) -> str:
        return f"{self.directory}/libvirtd.pid"

    @property
    def log_path(self) -> str:
        return f"{self.directory}/libvirtd.log"


def _become_subreaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), "prctl(PR_SET_CHILD_SUBREAPER)")


def _hide_directories() -> None:
    """Mount over the directories of this namespace, once it is sure that it is not the machine's own."""
    for namespace in ("mnt", "uts"):
        ours, parents = (os.readlink(f"/proc/{pid}/ns/{namespace}") for pid in ("self", os.getppid()))
        if ours == parents:
            raise RuntimeError(f"this process shares its {namespace} namespace with its parent: use unshare")
    for directory in HIDDEN_DIRECTORIES:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", directory],
            check=True,
            timeout=START_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )


def _write_configuration(settings: HostSettings) -> Path:
    if not os.path.ismount("/etc/libvirt"):
        raise RuntimeError("/etc/libvirt is the machine's own")
    libvirtd_conf = Path("/etc/libvirt/libvirtd.conf")
    libvirtd_conf.write_text(
        f'unix_sock_dir = "{settings.directory}"\n'
        f'unix_sock_rw_perms = "0700"\n'
        f'auth_unix_ro = "none"\n'
        f'auth_unix_rw = "none"\n'
        f'host_uuid = "{settings.host_uuid}"\n'
        f'log_outputs = "3:file:{settings.log_path}"\n'
    )
    # cgroup_controllers: the cgroup tree is not namespaced, and both daemons would name a domain's group alike.
    # stdio_handler: no virtlogd. Everything else that decides the speed of a migration is as Debian ships it.
    Path("/etc/libvirt/qemu.conf").write_text(
        'security_driver = "none"\n'
        'user = "root"\n'
        'group = "root"\n'
        "remember_owner = 0\n"
        "dynamic_ownership = 0\n"
        'stdio_handler = "file"\n'
        "cgroup_controllers = [ ]\n"
        f"migration_port_min = {settings.migration_port_min}\n"
        f"migration_port_max = {settings.migration_port_max}\n"
    )
    return libvirtd_conf


def _children() -> list[int]:
    """Every live or unreaped child of this process, by pid."""
    mine = str(os.getpid())
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The second field, in parentheses, may hold blanks and parentheses itself.
        if stat.rpartition(")")[2].split()[1] == mine:
            found.append(int(entry.name))
    return found


def _reap() -> bool:
    """Reap whatever has ended.

    :returns: whether any child is left.
    """
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


def _wait_for_end_of_input(wakeup: socket.socket) -> None:
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN)
    poll.register(wakeup.fileno(), select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wakeup.fileno():
                wakeup.recv(4096)
                _reap()
            elif not os.read(fd, 4096):
                return


def _end_all(libvirtd_pid: int | None, wakeup: socket.socket) -> None:
    """Stop libvirtd first, so that it starts nothing more, then kill what it leaves; return with no child left."""
    poll = select.poll()
    poll.register(wakeup.fileno(), select.POLLIN)
    if libvirtd_pid is not None and libvirtd_pid in _children():
        os.kill(libvirtd_pid, signal.SIGTERM)
        pidfd = os.pidfd_open(libvirtd_pid)
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        ended.poll(TERMINATE_TIMEOUT_S * 1000)
        os.close(pidfd)
    while _reap():
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        # A child killed here may hand its own children over to us: look again at every SIGCHLD.
        if poll.poll(100):
            wakeup.recv(4096)


def main() -> int:
    settings = HostSettings(**json.loads(sys.argv[1]))
    _become_subreaper()
    wakeup, wakeup_write = socket.socketpair()
    wakeup_write.setblocking(False)
    signal.set_wakeup_fd(wakeup_write.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    # The only way out is the end of standard input, so that nothing is left behind by an interrupted terminal.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    _hide_directories()
    socket.sethostname(settings.hostname)
    configuration = _write_configuration(settings)
    libvirtd_pid: int | None = None
    try:
        subprocess.run(
            ["libvirtd", "--daemon", "--config", str(configuration), "--pid-file", settings.pid_path],
            check=True,
            timeout=START_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        libvirtd_pid = int(Path(settings.pid_path).read_text())
        sys.stdout.write(json.dumps({"libvirtd_pid": libvirtd_pid}) + "\n")
        sys.stdout.flush()
        _wait_for_end_of_input(wakeup)
    finally:
        _end_all(libvirtd_pid, wakeup)
    return 0


if __name__ == "__main__":
    sys.exit(main())
