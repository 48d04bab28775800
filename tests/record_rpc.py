"""``python -m tests.record_rpc``: record what stock virsh and libvirtd say to each other, for the tests of the codec.

Needs root, libvirtd and virsh.  Each line of the recording is one message: its direction and its bytes in hexadecimal.
Messages of more than 16 KiB are left out: a host's capabilities, say.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from ferryman_remote.wire import PacketReader
from tests.bench.peer import Host
from tests.bench.peer_libvirt import _LibvirtHost

RECORDING = Path(__file__).parent / "unit/recorded-rpc.txt"
_MOST_BYTES = 16_384

_EVENTS = "event --all --loop --timeout 5"
"""What is recorded while a guest is resumed and suspended."""

_TEST_COMMANDS = (
    *("version", "nodeinfo", "hostname", "list --all", "dominfo test", "domstate test", "domstats test"),
    *("dumpxml test", "vcpuinfo test", "dommemstat test", "domblkstat test nothing", "domifstat test eth0"),
    *(
        "suspend test",
        "resume test",
        "autostart test",
        "setvcpus test 1",
        "domjobinfo test",
        "domjobabort test",
    ),
    *("desc test", "save test /nowhere/file", "domrename test other", "destroy test", "start test"),
    *(
        "shutdown test",
        "domid test",
        "dominfo nobody",
        "nodecpustats",
        "freecell",
        "freecell 0",
        "cpu-models x86_64",
    ),
)
_QEMU_COMMANDS = (
    *("list --all", "define {xml}", "dominfo d", "dumpxml d --migratable", "domstats d", "start d --paused"),
    *(
        "domstats d",
        "domjobinfo d",
        "migrate-getspeed d",
        "migrate-setmaxdowntime d 100",
        "migrate-getmaxdowntime d",
    ),
    *(
        "migrate-compcache d",
        "domcontrol d",
        "guestvcpus d",
        _EVENTS,
        "resume d",
        "reset d",
    ),
    *("migrate d qemu+unix:///system?socket=/nowhere --live", "destroy d", "undefine d", "nodememstats"),
    *("domcapabilities --machine none-such", "capabilities"),
)


_EVENT_KINDS = 20
"""Fewer than virsh registers for."""


def _is_registration(line: str) -> bool:
    """Whether it is the answer to CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY."""
    return line.startswith("<") and line[26:34] == f"{316:08x}"


class Proxy:
    """Passes on what goes over a unix socket, and keeps it."""

    def __init__(self, path: Path, target: str) -> None:
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.lines: list[str] = []
        self._heard = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._target)
                for source, sink, sign in ((client, server, ">"), (server, client, "<")):
                    threading.Thread(target=self._pass, args=(source, sink, sign), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, sign: str) -> None:
        reader = PacketReader()
        with suppress(OSError):
            while data := source.recv(65536):
                for packet in reader.feed(data):
                    message = packet.pack()
                    if len(message) <= _MOST_BYTES:
                        with self._heard:
                            self.lines.append(f"{sign} {message.hex()}")
                            self._heard.notify_all()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def wait_for(self, count: int, wanted: Callable[[str], bool], *, since: int) -> None:
        """Wait until so many of the lines after a number of them are what is wanted."""
        with self._heard:
            assert self._heard.wait_for(lambda: sum(map(wanted, self.lines[since:])) >= count, timeout=60)

    def close(self) -> None:
        self._listener.close()


def main() -> None:
    """Record, and write the recording: every message once, however often it was said but for its serial."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fr-")))
        host = _LibvirtHost(Host.A, directory / "a")
        stack.callback(host.wait_stopped)
        stack.callback(host.ask_to_stop)
        host.wait_ready()
        proxy = Proxy(directory / "proxy", host.uri.partition("socket=")[2])
        stack.callback(proxy.close)
        xml = directory / "d.xml"
        xml.write_text(
            f"<domain type='qemu'><name>d</name><uuid>{uuid.uuid4()}</uuid><memory unit='MiB'>32</memory>"
            "<vcpu>1</vcpu><os><type>hvm</type></os></domain>"
        )
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(directory)}

        def virsh(uri: str, command: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                ["virsh", "-c", f"{uri}?socket={directory}/proxy", command.format(xml=xml)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        for uri, commands in (
            ("test+unix:///default", _TEST_COMMANDS),
            ("qemu+unix:///system", _QEMU_COMMANDS),
        ):
            for command in commands:
                heard = len(proxy.lines)
                with virsh(uri, command) as process:
                    if command == _EVENTS:
                        proxy.wait_for(_EVENT_KINDS, _is_registration, since=heard)
                        for change in ("resume d", "suspend d"):
                            virsh(uri, change).wait(60)
                    process.wait(60)
        said: dict[str, str] = {}
        for line in proxy.lines:
            # The serial is bytes 20 to 23 of a message.
            said.setdefault(line[:42] + line[50:], line)
    version = subprocess.run(
        ["virsh", "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    RECORDING.write_text(f"# stock virsh and libvirtd {version}\n" + "\n".join(said.values()) + "\n")
    print(f"{RECORDING.name}: {len(said)} messages of {len(proxy.lines)}")


if __name__ == "__main__":
    assert shutil.which("virsh"), "virsh is not installed"
    main()
