"""Does every definition of the corpus start, and do both sides of a migration build the same machine?

Where the kernel here lacks what a definition needs, a clear error is expected instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import ferryman.sync
from ferryman import DomainState
from ferryman.errors import HypervisorError
from tests.definitions import lay_out, names, text_of
from tests.guests.inspect import QMPSocket, run_directories
from tests.qemu import emulators, end_process, need, need_qemu

BRIDGE = "ferrytest0"

_ONE_HOST = {
    "serial-kinds": "its TCP port",
    "redirection-tcp": "its TCP port",
    "graphics-ports": "its displays' ports",
    "interface-tap": "its tap",
}
"""Definitions of which one machine has room for one guest, with what there is once."""

_LACKING = {
    "disk-block": "QEMU did not start domain disk-block: .*host_device",
    "vsock": "QEMU did not start domain vsock: .*vhost-vsock",
    "vsock-non-transitional": "QEMU did not start domain vsock-non-transitional: .*vhost-vsock",
    "interface-tap-elsewhere": "the tap ferrytest2 is not there",
    "disk-nbd": "QEMU did not start domain disk-nbd: .*Failed to connect",
    "virt-install-hugepages": "QEMU did not start domain hugepages: .*Cannot allocate memory",
    "interface-bridge": f"the bridge {BRIDGE} cannot take an interface: No such device",
    "virt-install-ubuntu-bridge": f"the bridge {BRIDGE} cannot take an interface: No such device",
}
"""Definitions that name what is made for them or is not there; and what is said where it is not."""

# What differs between two processes of one machine: where QEMU has things in its own memory.
_OWN = re.compile(r"0x[0-9a-f]{9,}|\bfd = .*")


@contextmanager
def place() -> Iterator[Path]:
    """A directory with two roots and all files that definitions name; no process may be left in it."""
    need_qemu()
    need("qemu-img", here=shutil.which("qemu-img") is not None)
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="ferryman-definitions-"))
        stack.callback(shutil.rmtree, directory)
        lay_out(directory)
        try:
            yield directory
            assert emulators(directory) == [], "processes are left behind"
            assert [path for root in ("a", "b") for path in run_directories(directory / root)] == []
        finally:
            for pid in emulators(directory):
                end_process(pid)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with place() as made:
        yield made


@pytest.fixture(scope="module")
def hosts(directory: Path) -> Iterator[list[ferryman.sync.Connection]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(ferryman.sync.connect(f"qemu:///embed?root={directory / name}"))
            for name in ("a", "b")
        ]


def hardware(root: Path) -> dict[str, Any]:
    """What the one process of a root has built: devices with all properties, memory and block nodes."""
    (run,) = run_directories(root)
    qmp = QMPSocket(run / "read")
    try:
        tree = qmp.execute("human-monitor-command", **{"command-line": "info qtree"})
        memory = qmp.execute("query-memdev")
        nodes = qmp.execute("query-named-block-nodes", flat=True)
    finally:
        qmp.close()
    return {
        "devices": [_OWN.sub("", line) for line in tree.splitlines()],
        "memory": sorted((one.get("id", ""), one["size"], one["share"]) for one in memory),
        # QEMU makes up names of what images stand on.
        "nodes": sorted((one["node-name"].partition("#")[0], one["drv"], one["ro"]) for one in nodes),
    }


def crosses(name: str, directory: Path, hosts: list[ferryman.sync.Connection]) -> None:
    """A guest that stands still goes from one host to the other, and finds the same machine there."""
    a, b = hosts
    domain = a.create(text_of(name, directory=str(directory)), paused=True)
    try:
        before = hardware(directory / "a")
        definition = domain.definition()
        if name in _ONE_HOST:
            return
        domain.migrate(b).result()
        domain = b.lookup_by_name(domain.name)
        assert hardware(directory / "b") == before
        assert domain.definition() == definition
        assert domain.info().state is DomainState.PAUSED
    finally:
        domain.destroy()


@pytest.mark.parametrize("name", [name for name in names() if name not in _LACKING])
def test_it_starts_and_moves_to_the_same_machine(
    name: str, directory: Path, hosts: list[ferryman.sync.Connection]
) -> None:
    crosses(name, directory, hosts)


@pytest.mark.parametrize("name", _LACKING)
def test_what_is_not_there_is_said(name: str, directory: Path, hosts: list[ferryman.sync.Connection]) -> None:
    try:
        domain = hosts[0].create(text_of(name, directory=str(directory)), paused=True)
    except HypervisorError as error:
        assert re.search(_LACKING[name], str(error), re.DOTALL)
    else:
        assert name.startswith("vsock") or name.endswith("hugepages")  # which other machines have
        domain.destroy()
    assert hosts[0].list_domains() == []


def test_a_tpm_whose_domain_did_not_start_does_not_keep_the_next_one(
    directory: Path, hosts: list[ferryman.sync.Connection]
) -> None:
    need("swtpm", here=shutil.which("swtpm") is not None)
    text = text_of("tpm-tis", directory=str(directory))
    disk = "<disk type='file'><source file='/nowhere/a'/><target dev='vda'/></disk>"
    broken = text.replace("</devices>", f"{disk}</devices>")
    with pytest.raises(HypervisorError, match="/nowhere/a"):
        hosts[0].create(broken, paused=True)
    crosses("tpm-tis", directory, hosts)


@pytest.mark.parametrize("name", ["interface-bridge", "virt-install-ubuntu-bridge"])
def test_a_bridge_gets_the_tap_and_loses_it(
    name: str, directory: Path, hosts: list[ferryman.sync.Connection]
) -> None:
    need("root", here=os.geteuid() == 0)
    need("ip", here=shutil.which("ip") is not None)
    made = subprocess.run(
        ["ip", "link", "add", BRIDGE, "type", "bridge"], capture_output=True, text=True, check=False
    )
    need("a kernel that makes bridges", here=made.returncode == 0)
    try:
        crosses(name, directory, hosts)
        assert list(Path(f"/sys/class/net/{BRIDGE}/brif").iterdir()) == []
    finally:
        subprocess.run(["ip", "link", "delete", BRIDGE], check=True)


def test_a_network_block_device(directory: Path, hosts: list[ferryman.sync.Connection]) -> None:
    need("qemu-nbd", here=shutil.which("qemu-nbd") is not None)
    pidfile = directory / "nbd.pid"
    image = ["-f", "raw", str(directory / "disk3.raw")]
    where = ["-k", str(directory / "nbd"), f"--pid-file={pidfile}"]
    subprocess.run(
        ["qemu-nbd", "--fork", "--persistent", "--shared=4", "-x", "x", *where, *image], check=True
    )
    try:
        crosses("disk-nbd", directory, hosts)
    finally:
        end_process(int(pidfile.read_text()))
        (directory / "nbd").unlink()


# What virt-install asks of libvirt, in the words of this driver's machines; so it needs no libvirtd.
_CAPABILITIES = """\
<capabilities>
  <host> <cpu> <arch>x86_64</arch> </cpu> </host>
  <guest>
    <os_type>hvm</os_type>
    <arch name="x86_64">
      <wordsize>64</wordsize> <emulator>{emulator}</emulator>
      <machine>pc</machine> <machine>q35</machine>
      <domain type="qemu"/>
    </arch>
    <features> <acpi default="on" toggle="yes"/> <apic default="on" toggle="no"/> </features>
  </guest>
</capabilities>
"""
_DOMAIN_CAPABILITIES = """\
<domainCapabilities>
  <path>{emulator}</path> <domain>qemu</domain> <machine>q35</machine> <arch>x86_64</arch>
  <os supported="yes"> <enum name="firmware"> <value>efi</value> </enum> </os>
</domainCapabilities>
"""


@pytest.mark.parametrize(
    "options",
    [
        ["--import"],
        ["--import", "--graphics", "none"],
        ["--import", "--boot", "uefi", "--graphics", "vnc"],
        ["--import", "--machine", "pc", "--graphics", "vnc"],
        ["--cdrom", "cd.iso"],
    ],
    ids=["plain", "headless", "uefi", "pc", "install"],
)
def test_what_virt_install_writes_now(
    options: list[str],
    directory: Path,
    hosts: list[ferryman.sync.Connection],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need("virt-install", here=shutil.which("virt-install") is not None)
    emulator = shutil.which("qemu-system-x86_64")
    for name, text in (("caps", _CAPABILITIES), ("domcaps", _DOMAIN_CAPABILITIES)):
        (directory / name).write_text(text.format(emulator=emulator))
    where = f"caps={directory / 'caps'},domcaps={directory / 'domcaps'},fakeuri=qemu:///system"
    # It keeps a cache and a log below its home.
    monkeypatch.setenv("HOME", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
    printed = subprocess.run(
        ["virt-install", "--connect", f"__virtinst_test__test:///default,{where}", "--virt-type", "qemu"]
        + ["--print-xml", "1", "--dry-run", "--name", "fresh", "--memory", "64", "--osinfo", "linux2020"]
        + ["--disk", f"path={directory / 'disk.raw'}", "--network", "user"]
        + [str(directory / option) if option == "cd.iso" else option for option in options],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert printed.returncode == 0, printed.stderr
    domain = hosts[0].define(printed.stdout)
    domain.start(paused=True)
    domain.destroy()
    domain.undefine()
