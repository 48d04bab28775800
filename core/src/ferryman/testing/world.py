"""The simulated world: hosts, guests, a link between them, and a clock of its own.

Nothing here sleeps.  Time passes only when a transfer takes it: :meth:`World.elapse` moves the clock and lets every
running guest do its work.  Transfers of one world take turns on its link.

A guest is a counter that dirties memory by a known rule: step ``s`` writes ``s`` into page ``s mod pages``.  So the
memory of a stopped guest can be checked page by page, and a guest that was resumed from an older memory is seen.
"""

from __future__ import annotations

import itertools
import tempfile
import uuid as uuid_module
from array import array
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import anyio.lowlevel

from ferryman.testing.faults import FaultPlan
from ferryman.types import DomainUUID

PAGE_BYTES = 4096


class ProcessState(Enum):
    """What a simulated hypervisor's process does."""

    RECEIVING = "receiving"
    PAUSED = "paused"
    RUNNING = "running"
    HANDED_OVER = "handed-over"
    """Completed its migration: stopped, and only a command can run it."""
    GONE = "gone"


@dataclass(eq=False, kw_only=True, slots=True)
class Process:
    """One guest's process on one host.

    :param steps: how many pages the guest has written since it was started, wherever it ran.
    :param owed: part of a step that time has already paid for.
    """

    identity: str
    host: str
    uuid: DomainUUID
    name: str
    definition: str
    persistent: bool
    pages: int
    dirty_pages_per_s: float
    state: ProcessState
    memory: array[int]
    steps: int = 0
    owed: float = 0.0
    whole: bool = True
    transfer: str = "none"
    migration: str = ""


@dataclass(eq=False, kw_only=True, slots=True)
class HostState:
    """One simulated host: what stays when connections come and go."""

    name: str
    uuid: str
    memory_bytes: int
    directory: tempfile.TemporaryDirectory[str]
    processes: dict[str, Process] = field(default_factory=dict)
    defined: dict[DomainUUID, str] = field(default_factory=dict)
    autostart: set[DomainUUID] = field(default_factory=set)
    receivers: dict[int, Process] = field(default_factory=dict)

    @property
    def journal(self) -> Path:
        """Where the host's journal lies."""
        return Path(self.directory.name) / "journal"

    def actives(self) -> dict[DomainUUID, Process]:
        """The process of every active domain, receivers left out."""
        return {
            process.uuid: process
            for process in self.processes.values()
            if process.state is not ProcessState.GONE and not process.migration
        }

    def active(self, uuid: DomainUUID) -> Process | None:
        """The domain's process, receivers left out."""
        return self.actives().get(uuid)


class World:
    """A set of simulated hosts.

    :param link_bytes_per_s: speed of the link between any two hosts.
    """

    def __init__(self, name: str, *, link_bytes_per_s: int = 1 << 30) -> None:
        self.name = name
        self.link_bytes_per_s = link_bytes_per_s
        self.clock_s = 0.0
        self.faults = FaultPlan()
        self.violations: list[str] = []
        self.hosts: dict[str, HostState] = {}
        self._numbers = itertools.count(1)
        self._furthest: dict[DomainUUID, int] = {}
        self._linked: set[frozenset[str]] = set()
        self.cut: set[frozenset[str]] = set()

    def host(self, name: str, *, memory_bytes: int = 1 << 36) -> HostState:
        """The host of that name; the first use makes it."""
        if name not in self.hosts:
            self.hosts[name] = HostState(
                name=name,
                uuid=str(uuid_module.uuid5(uuid_module.NAMESPACE_URL, f"test:{self.name}/{name}")),
                memory_bytes=memory_bytes,
                directory=tempfile.TemporaryDirectory(prefix="ferryman-test-"),
            )
        return self.hosts[name]

    def number(self) -> int:
        """A number that no process or port of this world has had."""
        return next(self._numbers)

    async def elapse(self, seconds: float) -> None:
        """Let time pass: every running guest works, every other task gets its turn."""
        self.clock_s += seconds
        for host in self.hosts.values():
            for process in host.processes.values():
                if process.state is ProcessState.RUNNING:
                    self._work(process, seconds)
        await anyio.lowlevel.checkpoint()

    def _work(self, process: Process, seconds: float) -> None:
        due = process.owed + process.dirty_pages_per_s * seconds
        steps = int(due)
        process.owed = due - steps
        first = process.steps + max(0, steps - process.pages)
        for step in range(first, process.steps + steps):
            process.memory[step % process.pages] = step
        process.steps += steps
        self._furthest[process.uuid] = max(self._furthest.get(process.uuid, 0), process.steps)

    def run(self, process: Process) -> None:
        """Run a guest, and see to it that nobody else runs it and that its memory is the newest."""
        others = [
            other
            for host in self.hosts.values()
            for other in host.processes.values()
            if other is not process and other.uuid == process.uuid and other.state is ProcessState.RUNNING
        ]
        if others:
            self.violations.append(f"two run {process.name}: at {process.host} and at {others[0].host}")
        if process.steps < self._furthest.get(process.uuid, 0):
            self.violations.append(
                f"{process.name} runs at {process.host} from an older memory: step {process.steps} after"
                f" {self._furthest[process.uuid]}"
            )
        process.state = ProcessState.RUNNING

    def forget(self, uuid: DomainUUID) -> None:
        """Forget how far a guest had come: it was ended on purpose, and the next one of its uuid begins anew."""
        self._furthest.pop(uuid, None)

    def check_memory(self, process: Process) -> int:
        """Number of pages that do not hold what the guest's rule says."""
        wrong = 0
        for page in range(process.pages):
            turns = (process.steps - 1 - page) // process.pages if process.steps > page else -1
            expected = page + turns * process.pages if turns >= 0 else 0
            wrong += process.memory[page] != expected
        return wrong

    def runners(self, uuid: DomainUUID) -> list[str]:
        """Names of the hosts where a domain's guest is executing."""
        return [
            host.name
            for host in self.hosts.values()
            for process in host.processes.values()
            if process.uuid == uuid and process.state is ProcessState.RUNNING
        ]

    def close(self) -> None:
        """Remove the hosts' directories."""
        for host in self.hosts.values():
            host.directory.cleanup()
        self.hosts.clear()


_worlds: dict[str, World] = {}


def world(name: str, *, link_bytes_per_s: int = 1 << 30) -> World:
    """The world of that name in this process; the first use makes it."""
    if name not in _worlds:
        _worlds[name] = World(name, link_bytes_per_s=link_bytes_per_s)
    return _worlds[name]


def forget_world(name: str) -> None:
    """Remove a world and everything in it."""
    found = _worlds.pop(name, None)
    if found is not None:
        found.close()
