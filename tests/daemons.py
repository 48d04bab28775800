"""Ferryman's daemon as a process of its own, and libvirt's stock client."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tests.qemu import PROMPT_S, Field, need

EVERYTHING = ("v1", "v2", "v3", "params")


@dataclass(kw_only=True)
class Daemon:
    """A daemon that listens."""

    process: subprocess.Popen[bytes]
    port: int
    directory: Path
    log: Path

    def uri(self, root: Path, *, transport: str = "tcp") -> str:
        """Connection URI of a QEMU root behind it.

        By name, since libvirt's client keeps the path ``/embed`` for a driver of its own.
        """
        name = quote(f"qemu:///embed?root={quote(str(root))}")
        if transport == "tls":
            return (
                f"qemu+tls://127.0.0.1:{self.port}/?name={name}&pkipath={quote(str(self.directory / 'pki'))}"
            )
        if transport == "unix":
            return f"qemu+unix:///?name={name}&socket={quote(str(self.directory / 'virtqemud-sock'))}"
        return f"qemu+tcp://127.0.0.1:{self.port}/?name={name}"

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PROMPT_S)


@contextmanager
def daemon(directory: Path, **config: object) -> Iterator[Daemon]:
    """Run a daemon for the length of a block.

    :param directory: for its sockets, its configuration and its log.
    :param config: keys of its configuration.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings: dict[str, object] = {
        "schemes": ["qemu", "test"],
        "socket_directory": str(directory),
        "allowed_uris": ["qemu:///embed[?]root=*", "test:///*", "nosuch:///*"],
        "tcp_listen": "127.0.0.1:0",
        "tcp_without_encryption": True,
        "log_level": "DEBUG",
        **config,
    }
    path, log = directory / "ferrymand.toml", directory / "ferrymand.log"
    # A JSON value of these kinds is a TOML value too.
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, log.open("ab") as output:
        told.bind(str(directory / "notify"))
        told.settimeout(PROMPT_S)
        process = subprocess.Popen(
            [sys.executable, "-m", "ferryman_remote.daemon.main", "--config", str(path)],
            stdout=output,
            stderr=output,
            env={**os.environ, "NOTIFY_SOCKET": str(directory / "notify")},
        )
        try:
            status = told.recv(4096).decode()
            assert status.startswith("READY=1\n"), status
            tcp = bool(settings["tcp_listen"] or settings.get("tls_listen"))
            port = int(status.rpartition(":")[2]) if tcp else 0
            yield Daemon(process=process, port=port, directory=directory, log=log)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(PROMPT_S)
            # One that was killed has left its sockets.
            for sock in [path for path in directory.iterdir() if path.is_socket()]:
                sock.unlink()


def need_virsh() -> None:
    """Skip where there is no stock client, or fail in CI."""
    need("virsh", here=shutil.which("virsh") is not None)


def virsh(uri: str, *command: str, timeout_s: float = PROMPT_S, read_only: bool = False) -> str:
    """What stock virsh prints; it must succeed."""
    done = virsh_tried(uri, *command, timeout_s=timeout_s, read_only=read_only)
    assert done.returncode == 0, f"virsh {' '.join(command)}: {done.stderr}"
    return done.stdout


def virsh_tried(
    uri: str, *command: str, timeout_s: float = PROMPT_S, read_only: bool = False
) -> subprocess.CompletedProcess[str]:
    """What becomes of a command of stock virsh."""
    arguments = ["virsh", *(["-r"] if read_only else []), "-q", "-c", uri, *command]
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
    )


class Terminal:
    """A command of stock virsh that has a terminal."""

    def __init__(self, uri: str, *command: str) -> None:
        self._ours, theirs = os.openpty()
        tty.setraw(theirs)
        try:
            self.process = subprocess.Popen(
                ["virsh", "-c", uri, *command],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        self.shown = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PROMPT_S)
        os.close(self._ours)

    def wait_for(self, pattern: bytes) -> None:
        """Read until something is shown that fits."""
        while not re.search(pattern, self.shown):
            assert self._read(), f"it ended, and showed {self.shown!r}"

    def type(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._ours, keys)

    def ended(self) -> int:
        """Read until it ends; returns its exit status."""
        while self._read():
            pass
        return self.process.wait(PROMPT_S)

    def _read(self) -> bool:
        assert select.select([self._ours], [], [], PROMPT_S)[0], f"nothing came after {self.shown!r}"
        try:
            self.shown += os.read(self._ours, 65536)
        except OSError:  # EIO: nobody has the other end any more
            return False
        return True


@contextmanager
def daemons(field: Field, **config: object) -> Iterator[tuple[Daemon, Daemon]]:
    """Two daemons, one for each root of a field."""
    with (
        daemon(field.directory / "daemon-a", **config) as a,
        daemon(field.directory / "daemon-b", **config) as b,
    ):
        yield a, b
