"""Ferryman as a peer of its own benchmark.

It runs in a process of its own, so that the CPU time and the peak memory are those of a program that migrates and
does nothing else.  The parent speaks lines of JSON with it; what a call costs is taken inside, around the call.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anyio
import anyio.to_thread

from tests.bench.peer import Direction, GuestSpec, PeerError, PeerUnavailable, Sample
from tests.guests.inspect import pids_by_name

_TIMEOUT_S = 180.0


class FerrymanPeer:
    """Two embedded roots of the QEMU driver, and one process that migrates between them.

    :param loop: ``asyncio``, ``uvloop`` or ``trio``.
    :param journal_can_be_off: :attr:`journal_on` is heeded.
    """

    def __init__(self, *, loop: str = "asyncio", journal_can_be_off: bool = False) -> None:
        self._loop = loop
        self._journal_can_be_off = journal_can_be_off
        self.journal_on = True
        self._directory: Path | None = None
        self._worker: subprocess.Popen[str] | None = None
        self._pids: dict[str, int] = {}
        self.peak_rss_bytes = 0
        self.start_parts_ms: list[dict[str, float]] = []
        """What each start by :meth:`restart` consists of, in the order of its parts."""

    @property
    def name(self) -> str:
        return "ferryman" if self._loop == "asyncio" else f"ferryman-{self._loop}"

    def start(self, guests: Sequence[GuestSpec]) -> None:
        if shutil.which(guests[0].qemu_argv[0]) is None:
            raise PeerUnavailable(f"{guests[0].qemu_argv[0]} is not installed")
        self._directory = Path(tempfile.mkdtemp(prefix="ferryman-bench-"))
        self._worker = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.peer_ferryman", str(self._directory), self._loop]
            + ["journal-can-be-off"] * self._journal_can_be_off,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ask(command="start", definitions=[guest.domain_xml for guest in guests])
        self._pids = pids_by_name(self._directory / Direction.A_TO_B.source.value)

    def migrate(self, guest: GuestSpec, direction: Direction) -> Sample:
        return self.migrate_many([guest], direction)[0]

    def migrate_many(self, guests: Sequence[GuestSpec], direction: Direction) -> list[Sample]:
        assert self._directory is not None
        answer = self._ask(
            command="migrate",
            names=[guest.name for guest in guests],
            direction=direction.value,
            journal_on=self.journal_on,
        )
        self.peak_rss_bytes = max(self.peak_rss_bytes, answer["peak_rss_bytes"])
        now = pids_by_name(self._directory / direction.destination.value)
        samples = []
        for found in answer["samples"]:
            name = found["guest"]
            samples.append(
                Sample(
                    **{**found, "direction": direction},
                    source_pid=self._pids[name],
                    destination_pid=now[name],
                )
            )
            self._pids[name] = now[name]
        return samples

    def count_all(self, rounds: int) -> list[float]:
        return [float(taken_s) for taken_s in self._ask(command="count", rounds=rounds)["taken_s"]]

    def restart(self, guest: GuestSpec) -> float:
        assert self._directory is not None
        answer = self._ask(command="restart", name=guest.name, definition=guest.domain_xml)
        self._pids = pids_by_name(self._directory / Direction.A_TO_B.source.value)
        self.start_parts_ms.append(answer["parts_ms"])
        return float(answer["taken_s"])

    def pid(self, guest: GuestSpec) -> int:
        if guest.name not in self._pids:
            raise ValueError(f"{self.name} does not run {guest.name!r}")
        return self._pids[guest.name]

    def stop(self) -> None:
        if self._worker is not None:
            if self._worker.poll() is None:
                self._ask(command="stop")
            self._worker.communicate(timeout=_TIMEOUT_S)
            self._worker = None
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None
        self._pids.clear()

    def _ask(self, **request: object) -> Any:
        assert self._worker is not None
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        line = self._worker.stdout.readline()
        if not line:
            raise PeerError(f"{self.name}: the worker ended with {self._worker.wait(_TIMEOUT_S)}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer


# The worker


class _Marks:
    """When the source said ``completed`` and when the destination answered ``cont``, by domain."""

    def __init__(self) -> None:
        from ferryman_qemu.monitor import EventStream, Monitor

        self.completed_ns: dict[str, int] = {}
        self.cont_ns: dict[str, int] = {}
        put, execute = EventStream._put, Monitor.execute
        marks = self

        def put_marked(stream: EventStream, event: Any) -> None:
            if event.name == "MIGRATION" and event.data.get("status") == "completed":
                marks.completed_ns.setdefault(stream._monitor.name, time.monotonic_ns())
            put(stream, event)

        async def execute_marked(monitor: Monitor, name: str, *arguments: Any, **more: Any) -> Any:
            answer = await execute(monitor, name, *arguments, **more)
            if name == "cont":
                marks.cont_ns[monitor.name] = time.monotonic_ns()
            return answer

        EventStream._put = put_marked  # type: ignore[method-assign,assignment]
        Monitor.execute = execute_marked  # type: ignore[method-assign,assignment]

    def clear(self) -> None:
        self.completed_ns.clear()
        self.cont_ns.clear()

    def completed_to_cont_ms(self, name: str) -> float | None:
        if name not in self.completed_ns or name not in self.cont_ns:
            return None
        return (self.cont_ns[name] - self.completed_ns[name]) / 1e6


async def _work(directory: str, switch: Any = None) -> None:
    import ferryman

    marks = _Marks()
    ends = [f"qemu:///embed?root={directory}/{direction.source.value}" for direction in Direction]
    async with ferryman.connect(ends[0]) as a, ferryman.connect(ends[1]) as b:
        while True:
            line = await anyio.to_thread.run_sync(sys.stdin.readline)
            request: dict[str, Any] = json.loads(line) if line else {"command": "stop"}
            try:
                match request["command"]:
                    case "start":
                        for definition in request["definitions"]:
                            await a.create(definition)
                        answer: dict[str, Any] = {}
                    case "migrate":
                        there = Direction(request["direction"]) is Direction.A_TO_B
                        if switch is not None:
                            switch.on = request["journal_on"]
                        answer = await _migrate(request["names"], *((a, b) if there else (b, a)), marks)
                    case "count":
                        answer = {"taken_s": [await _count(a) for _ in range(request["rounds"])]}
                    case "restart":
                        answer = await _restart(a, request["name"], request["definition"])
                    case _:
                        for connection in (a, b):
                            for domain in await connection.list_domains():
                                await domain.destroy()
                        answer = {}
            except ferryman.FerrymanError as error:
                answer = {"error": f"{error} [{error.code}]"}
            print(json.dumps(answer), flush=True)
            if request["command"] == "stop":
                return


async def _migrate(names: list[str], source: Any, destination: Any, marks: _Marks) -> dict[str, Any]:
    marks.clear()
    domains = [await source.lookup_by_name(name) for name in names]
    samples: list[dict[str, Any]] = []
    cpu_began_s, t_call_ns = time.process_time(), time.monotonic_ns()

    async def one(domain: Any) -> None:
        result = await domain.migrate(destination)
        t_done_ns = time.monotonic_ns()
        samples.append(
            {
                "guest": domain.name,
                "wall_s": (t_done_ns - t_call_ns) / 1e9,
                "t_call_ns": t_call_ns,
                "t_done_ns": t_done_ns,
                "downtime_ms": result.downtime_ms,
                "completed_to_cont_ms": marks.completed_to_cont_ms(domain.name),
            }
        )

    async with anyio.create_task_group() as tasks:
        for domain in domains:
            tasks.start_soon(one, domain)
    cpu_s = (time.process_time() - cpu_began_s) / len(names)
    order = {name: number for number, name in enumerate(names)}
    samples.sort(key=lambda sample: order[sample["guest"]])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"samples": [{**sample, "cpu_s": cpu_s} for sample in samples], "peak_rss_bytes": peak}


async def _count(connection: Any) -> float:
    begin_s = time.perf_counter()
    found = await connection.statistics()
    taken_s = time.perf_counter() - begin_s
    if any(one.vcpu_time_s == () for one in found.values()):
        raise PeerError("a guest did not give its counters")
    return taken_s


async def _restart(connection: Any, name: str, definition: str) -> dict[str, Any]:
    await (await connection.lookup_by_name(name)).destroy()
    with _parts() as parts_ms:
        begin_s = time.perf_counter()
        await connection.create(definition)
        taken_s = time.perf_counter() - begin_s
    # What is left of the whole, after its parts: the core, the events, the record of the process.
    parts_ms["the rest"] = taken_s * 1000 - sum(parts_ms.values())
    return {"taken_s": taken_s, "parts_ms": parts_ms}


@contextmanager
def _parts() -> Iterator[dict[str, float]]:
    """Measure the parts of a start; they do not overlap."""
    from ferryman_qemu import domains, host
    from ferryman_qemu.host import QemuHost
    from ferryman_qemu.machine.build import command_line
    from ferryman_qemu.machine.read import read_machine
    from ferryman_qemu.monitor import Monitor
    from ferryman_qemu.process import Process

    parts_ms: dict[str, float] = {}

    @contextmanager
    def measured(label: str) -> Iterator[None]:
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            parts_ms[label] = parts_ms.get(label, 0) + (time.perf_counter() - begin_s) * 1000

    def plain(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            with measured(label):
                return function(*arguments, **named)

        return timed

    def waiting(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        async def timed(*arguments: Any, **named: Any) -> Any:
            with measured(label):
                return await function(*arguments, **named)

        return timed

    wrapped: list[tuple[Any, str, Callable[..., Any]]] = [
        (domains, "read_machine", plain("definition", read_machine)),
        (QemuHost, "_pin", plain("pinning", QemuHost._pin)),
        (host, "command_line", plain("command line", command_line)),
        (Process, "spawn", plain("fork and exec", Process.spawn)),
        (Monitor, "_negotiate", waiting("QEMU, until it answers", Monitor._negotiate)),
        (QemuHost, "_set_out", waiting("cont", QemuHost._set_out)),
    ]
    with ExitStack() as stack:
        for owner, name, function in wrapped:
            stack.enter_context(patch.object(owner, name, function))
        yield parts_ms


def main() -> None:
    """Run the worker: ``python -m tests.bench.peer_ferryman DIRECTORY LOOP [journal-can-be-off]``."""
    directory, loop, *more = sys.argv[1:]
    options = {"use_uvloop": True} if loop == "uvloop" else {}
    with ExitStack() as stack:
        switch = None
        if more:
            from tests.bench.journal_switch import (
                switched_journals,
            )  # what it loads would count as Ferryman's

            switch = stack.enter_context(switched_journals())
        backend = "trio" if loop == "trio" else "asyncio"
        anyio.run(_work, directory, switch, backend=backend, backend_options=options)


if __name__ == "__main__":
    main()
