"""The daemon as stock virsh, libvirt-python and our own client see it; real QEMU guests, real sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

import ferryman
from ferryman import MigrationOptions
from tests.daemons import EVERYTHING, daemons, need_virsh, virsh, virsh_tried
from tests.qemu import NAME, Field


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _virsh() -> None:
    need_virsh()


def defined(field: Field, uri: str) -> Path:
    path = field.directory / "definition.xml"
    path.write_text(field.definition)
    virsh(uri, "define", str(path))
    return path


def test_the_life_of_a_domain(field: Field) -> None:
    with daemons(field) as (a, _b):
        uri = a.uri(field.roots[0])
        assert virsh(uri, "list", "--all") == ""
        path = defined(field, uri)
        assert virsh(uri, "list", "--all", "--name").split() == [NAME]
        virsh(uri, "start", NAME)
        field.wait_ticks(20)
        assert virsh(uri, "domstate", NAME).strip() == "running"
        assert virsh(uri, "domid", NAME).strip() == "1"
        assert f"<name>{NAME}</name>" in virsh(uri, "dumpxml", NAME)
        info = virsh(uri, "dominfo", NAME)
        assert "CPU time" in info
        assert "Persistent:     yes" in info
        virsh(uri, "suspend", NAME)
        assert virsh(uri, "domstate", NAME).strip() == "paused"
        virsh(uri, "resume", NAME)
        stats = virsh(uri, "domstats", NAME)
        assert "state.state=1" in stats
        assert "balloon.maximum=32776" in stats
        for command in ("capabilities", "nodeinfo", "hostname", "version", "domjobinfo counter", "sysinfo"):
            done = virsh_tried(uri, *command.split())
            assert (done.returncode == 0) == (command != "sysinfo"), done.stderr
        virsh(uri, "destroy", NAME)
        virsh(uri, "undefine", NAME)
        assert virsh(uri, "list", "--all") == ""
        virsh(uri, "create", str(path))
        assert virsh(uri, "list", "--transient", "--name").split() == [NAME]
        virsh(uri, "destroy", NAME)


def test_errors_are_those_that_clients_know(field: Field) -> None:
    with daemons(field) as (a, _b):
        uri = a.uri(field.roots[0])
        for command, code in (
            (("start", "nobody"), "failed to get domain 'nobody'"),
            (("domblklist", "nobody"), "failed to get domain 'nobody'"),
            (("net-list",), "unknown procedure: 52"),
        ):
            done = virsh_tried(uri, *command)
            assert done.returncode == 1
            assert code in done.stderr
        defined(field, uri)
        done = virsh_tried(uri, "suspend", NAME)
        assert "domain is not running" in done.stderr
        done = virsh_tried(uri, "undefine", NAME, read_only=True)
        assert "read only" in done.stderr
        done = virsh_tried(f"nosuch+tcp://127.0.0.1:{a.port}/there", "list")
        assert "no driver for scheme" in done.stderr
        virsh(uri, "undefine", NAME)


@pytest.mark.parametrize("protocol", [*EVERYTHING, "p2p"])
def test_virsh_migrates(field: Field, protocol: str) -> None:
    offered = EVERYTHING if protocol == "p2p" else (protocol,)
    with daemons(field, migration_protocols=offered) as (a, b):
        uris = a.uri(field.roots[0]), b.uri(field.roots[1])
        defined(field, uris[0])
        virsh(uris[0], "start", NAME)
        field.wait_ticks(20)
        p2p = ["--p2p"] if protocol == "p2p" else []
        virsh(uris[0], "migrate", "--live", *p2p, "--persistent", "--undefinesource", NAME, uris[1])
        field.wait_ticks(20)
        assert virsh(uris[0], "list", "--all") == ""
        assert virsh(uris[1], "list", "--persistent", "--name").split() == [NAME]
        virsh(uris[1], "migrate", "--live", *p2p, NAME, uris[0])
        field.wait_ticks(20)
        assert virsh(uris[1], "list", "--name").split() == []
        field.assert_unbroken(crossings=2)
        virsh(uris[0], "destroy", NAME)
        virsh(uris[1], "undefine", NAME)


async def test_our_client_has_the_api_of_a_local_one(field: Field) -> None:
    with daemons(field) as (a, b):
        async with (
            ferryman.connect(a.uri(field.roots[0])) as source,
            ferryman.connect(b.uri(field.roots[1], transport="unix")) as destination,
        ):
            with source.events() as events:
                domain = await source.create(field.definition)
                assert (await anext(events)).name == NAME
            field.wait_ticks(20)
            result = await domain.migrate(destination, MigrationOptions())
            assert result.blackout_ms is not None
            (moved,) = await destination.list_domains()
            field.wait_ticks(20)
            assert await source.list_domains() == []
            await moved.destroy()
    field.assert_unbroken(crossings=1)
