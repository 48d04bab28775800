"""Small helpers for tests on the simulated hypervisor."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import ferryman
from ferryman import Connection, Domain
from ferryman.testing import World
from ferryman.testing.world import ProcessState

NAME = "web"
UUID = "6a1f3c52-98b7-4d0e-8f0a-2f7d1c1f9e55"


def definition(
    name: str = NAME, uuid: str = UUID, *, memory_mib: int = 4, dirty_bytes_per_s: int = 10_000_000
) -> str:
    """A small guest that writes all the time."""
    return (
        f"<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>{memory_mib}</memory>"
        f"<metadata><guest xmlns='urn:ferryman:test' dirty-bytes-per-s='{dirty_bytes_per_s}'/></metadata></domain>"
    )


@asynccontextmanager
async def two_hosts(lab: World) -> AsyncIterator[tuple[Connection, Connection]]:
    """Both hosts of a world, open."""
    async with (
        ferryman.connect(f"test:///{lab.name}/alpha") as alpha,
        ferryman.connect(f"test:///{lab.name}/beta") as beta,
    ):
        yield alpha, beta


async def start(connection: Connection, *, paused: bool = False) -> Domain:
    """Start the usual guest."""
    return await connection.create(definition(), paused=paused)


def receivers(lab: World) -> list[str]:
    """Hosts that still hold a process which is no domain."""
    return [
        host.name
        for host in lab.hosts.values()
        for process in host.processes.values()
        if process.migration or process.state is ProcessState.RECEIVING
    ]
