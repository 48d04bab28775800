"""The QMP client against real QEMU, and against a peer that does what QEMU does too rarely: stall, lie, break."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from ferryman_qemu import monitor as monitor_module
from ferryman_qemu.monitor import (
    EVENT_BACKLOG_MAX,
    FDS_MAX,
    IN_BAND_MAX,
    Command,
    CommandNotSentError,
    EventsLostError,
    Monitor,
    MonitorClosedError,
    MonitorTimeout,
    QMPCommandError,
)
from ferryman_qemu.qmp import Event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator

LOOPS = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
QEMU = "qemu-system-x86_64"


def need(*, present: bool, what: str) -> None:
    if not present:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{what} is not installed")
        pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="module", params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    need(
        present=request.param == "asyncio" or importlib.util.find_spec(request.param) is not None,
        what=request.param,
    )
    return LOOPS[request.param]


class Peer:
    """The server's side of a connection, played by the test."""

    def __init__(self, stream: anyio.abc.SocketStream) -> None:
        self.stream = stream
        self.lines = BufferedByteReceiveStream(stream)

    async def send(self, *messages: dict[str, Any]) -> None:
        await self.stream.send(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    async def command(self) -> dict[str, Any]:
        command: dict[str, Any] = json.loads(await self.lines.receive_until(b"\n", 1 << 26))
        return command

    async def answer(self, command: dict[str, Any], value: object) -> None:
        await self.send({"return": value, "id": command["id"]})

    async def greet(self, *capabilities: str) -> None:
        version = {"qemu": {"major": 9, "minor": 1, "micro": 2}, "package": "test"}
        await self.send({"QMP": {"version": version, "capabilities": capabilities}})

    async def negotiate(self, *capabilities: str) -> None:
        await self.greet(*capabilities)
        command = await self.command()
        assert command["execute"] == "qmp_capabilities"
        assert command.get("arguments") == ({"enable": ["oob"]} if "oob" in capabilities else None)
        await self.answer(command, {})


def event(name: str, number: int = 0) -> dict[str, Any]:
    return {"event": name, "data": {"n": number}, "timestamp": {"seconds": 1, "microseconds": 0}}


@asynccontextmanager
async def unconnected() -> AsyncIterator[tuple[anyio.abc.UNIXSocketStream, Peer]]:
    """A stream for a monitor, and the peer at its other end, who has not said anything."""
    with tempfile.TemporaryDirectory(prefix="qmp") as directory, anyio.fail_after(60):
        path = f"{directory}/monitor"
        async with await anyio.create_unix_listener(path) as listener:
            stream = await anyio.connect_unix(path)
            async with await listener.accept() as accepted:
                yield stream, Peer(accepted)


@asynccontextmanager
async def connected(
    *capabilities: str, command_timeout_s: float = 30.0
) -> AsyncIterator[tuple[Monitor, Peer]]:
    """An open monitor and its peer."""
    async with unconnected() as (stream, peer), running(stream, command_timeout_s=command_timeout_s) as start:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(peer.negotiate, *(capabilities or ("oob",)))
            monitor = await start()
        yield monitor, peer


class Starter:
    """Starts one monitor with each call."""

    def __init__(self, tasks: anyio.abc.TaskGroup, monitors: list[Monitor]) -> None:
        self.monitors = monitors
        self._tasks = tasks
        self._waiting = iter(monitors)

    async def __call__(self) -> Monitor:
        monitor = next(self._waiting)
        await self._tasks.start(monitor.run)
        assert not monitor.closed, monitor.close_reason
        return monitor


@asynccontextmanager
async def running(*streams: anyio.abc.ByteStream, command_timeout_s: float = 30.0) -> AsyncIterator[Starter]:
    """Make a monitor for each stream, and close them in the end."""
    monitors = [Monitor(stream, name="guest", command_timeout_s=command_timeout_s) for stream in streams]
    async with anyio.create_task_group() as tasks:
        yield Starter(tasks, monitors)
        for monitor in monitors:
            await monitor.aclose()


@dataclass
class Machine:
    """A running QEMU without a guest, one monitor socket per path."""

    process: anyio.abc.Process
    directory: Path
    paths: list[str]
    streams: list[anyio.abc.UNIXSocketStream]

    def holds(self, fd: int, their_fd: int) -> bool:
        """Whether QEMU's descriptor is the same open file as ours."""
        ours, theirs = os.fstat(fd), Path(f"/proc/{self.process.pid}/fd/{their_fd}").stat()
        return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)


@asynccontextmanager
async def machine(monitors: int = 1) -> AsyncIterator[Machine]:
    """Start QEMU on sockets that we are connected to before it is spawned, so that nobody polls for it."""
    need(present=shutil.which(QEMU) is not None, what=QEMU)
    with tempfile.TemporaryDirectory(prefix="qmp") as name, anyio.fail_after(100):
        paths = [f"{name}/monitor{index}" for index in range(monitors)]
        options: list[str] = []
        listeners: list[socket.socket] = []
        streams: list[anyio.abc.UNIXSocketStream] = []
        try:
            for index, path in enumerate(paths):
                listener = socket.socket(socket.AF_UNIX)
                listeners.append(listener)
                # Two threads of a starting QEMU may accept the same connection; on a blocking socket the one that
                # comes too late sleeps in accept for ever, and when that is the main thread, so does its main loop.
                listener.setblocking(False)
                listener.bind(path)
                listener.listen(1)
                streams.append(await anyio.connect_unix(path))
                options += ["-chardev", f"socket,id=mon{index},fd={listener.fileno()},server=on,wait=off"]
                options += ["-mon", f"chardev=mon{index},mode=control"]
            process = await anyio.open_process(
                [
                    QEMU,
                    "-accel",
                    "tcg",
                    "-M",
                    "none",
                    "-m",
                    "16",
                    "-display",
                    "none",
                    "-nodefaults",
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=None,
                stderr=None,
                pass_fds=[listener.fileno() for listener in listeners],
            )
        finally:
            for listener in listeners:
                listener.close()
        try:
            yield Machine(process, Path(name), paths, streams)
        finally:
            if process.returncode is None:
                process.kill()
            with anyio.CancelScope(shield=True):
                await process.wait()
                await process.aclose()
            for stream in streams:
                await anyio.aclose_forcefully(stream)


class Silence:
    """QEMU's main loop is stuck in a command that writes to a pipe which nobody drains."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    async def end(self) -> None:
        while await self._read():
            pass

    async def _read(self) -> bytes:
        while True:
            await anyio.wait_readable(self._fd)
            try:
                return os.read(self._fd, 1 << 20)
            except BlockingIOError:
                continue


@asynccontextmanager
async def silenced(host: Machine, monitor: Monitor, outcome: list[object]) -> AsyncIterator[Silence]:
    """Silence QEMU through ``monitor``; what became of the guilty command is appended to ``outcome``."""
    pipe = host.directory / "pipe"
    os.mkfifo(pipe)
    fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    async def save() -> None:
        try:
            outcome.append(
                await monitor.execute("pmemsave", {"val": 0, "size": 1 << 20, "filename": str(pipe)})
            )
        except MonitorClosedError as error:
            outcome.append(error)
        until_written.cancel()

    until_written = anyio.CancelScope()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(save)
            with until_written:
                await anyio.wait_readable(fd)  # QEMU writes, so it is inside the command
            assert not outcome, f"QEMU did not get silent: {outcome}"
            yield Silence(fd)
    finally:
        os.close(fd)
        pipe.unlink()


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Descriptors of three different files."""
    opened = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - closed below
    yield [file.fileno() for file in opened]
    for file in opened:
        file.close()


# Real QEMU.


async def test_qemu_greets_executes_and_fails_commands() -> None:
    async with machine() as host, running(*host.streams) as start:
        monitor = await start()
        assert monitor.greeting.version >= (7, 0, 0)
        assert monitor.oob
        assert not monitor.closed
        assert (await monitor.execute("query-status"))["running"] is True
        with pytest.raises(QMPCommandError, match="no-such-command") as missing:
            await monitor.execute("no-such-command")
        assert (missing.value.command, missing.value.error_class) == ("no-such-command", "CommandNotFound")
        with pytest.raises(QMPCommandError) as refused:
            await monitor.execute("closefd", {"fdname": "none"})
        assert refused.value.error_class == "GenericError"
        assert refused.value.description
        with pytest.raises(QMPCommandError, match="is unexpected"):
            await monitor.execute("query-status", {"żółw": "€ \0 \U0001f40d"})
        assert len(await monitor.execute("query-qmp-schema")) > 500
        await monitor.aclose()
        assert monitor.close_reason == "its owner closed it"


async def test_qemu_sends_events_in_order_and_only_those_asked_for() -> None:
    async with machine() as host, running(*host.streams) as start:
        monitor = await start()
        with monitor.events() as everything, monitor.events("RESUME", "NEVER") as resumes:
            for _ in range(3):
                await monitor.execute("stop")
                await monitor.execute("cont")
            # The event of a command precedes its answer, and nobody has read yet: nothing may be lost.
            assert [(await everything.get()).name for _ in range(6)] == ["STOP", "RESUME"] * 3
            assert [(await resumes.get()).name for _ in range(3)] == ["RESUME"] * 3
            await monitor.execute("stop")
            first = await everything.get()
            assert (first.name, first.data) == ("STOP", {})
            assert first.timestamp_s > 1_600_000_000
            with anyio.move_on_after(0):
                pytest.fail(f"an event that nobody asked for: {await resumes.get()}")


async def test_qemu_executes_out_of_band_while_its_main_loop_is_silent() -> None:
    async with machine() as host, running(*host.streams) as start:
        monitor = await start()
        outcome: list[object] = []
        async with silenced(host, monitor, outcome) as silence:
            with pytest.raises(MonitorTimeout) as late:
                await monitor.execute("query-status", timeout_s=0.1)
            assert late.value.sent
            assert await monitor.execute_oob("yank", {"instances": []}) == {}
            with pytest.raises(QMPCommandError):
                await monitor.execute_oob("query-status")
            await silence.end()
        assert outcome == [{}]
        # The late answer was dropped, and the next command gets its own.
        assert "qemu" in await monitor.execute("query-version")


async def test_any_number_of_waiting_commands_leaves_qemu_reading_out_of_band() -> None:
    async with machine(monitors=2) as host, running(*host.streams) as start:
        silencer, monitor = await start(), await start()
        outcome: list[object] = []
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await monitor.execute("query-status"))

        async with silenced(host, silencer, outcome) as silence, anyio.create_task_group() as tasks:
            for _ in range(4 * IN_BAND_MAX):
                tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            assert await monitor.execute_oob("yank", {"instances": []}, timeout_s=20) == {}
            assert answers == []
            await silence.end()
        assert len(answers) == 4 * IN_BAND_MAX


async def test_qemu_receives_each_descriptor_with_its_own_command(files: list[int]) -> None:
    async with machine(monitors=2) as host, running(*host.streams) as start:
        silencer, monitor = await start(), await start()
        assert await monitor.execute("getfd", {"fdname": "first"}, fds=files[:1]) == {}
        assert await monitor.execute("closefd", {"fdname": "first"}) == {}
        with pytest.raises(QMPCommandError, match="SCM_RIGHTS"):
            await monitor.execute("getfd", {"fdname": "none"})
        passed: dict[int, int] = {}

        async def add(fd: int) -> None:
            passed[fd] = (await monitor.execute("add-fd", fds=[fd]))["fd"]

        # While QEMU is silent all three wait; sent at once, the last descriptor would replace the others.
        outcome: list[object] = []
        async with silenced(host, silencer, outcome) as silence, anyio.create_task_group() as tasks:
            for fd in files:
                tasks.start_soon(add, fd)
            await anyio.wait_all_tasks_blocked()
            await silence.end()
        assert passed.keys() == set(files)
        assert all(host.holds(ours, theirs) for ours, theirs in passed.items())


async def test_an_abandoned_descriptor_is_not_mistaken_for_the_next(files: list[int]) -> None:
    async with machine(monitors=2) as host, running(*host.streams) as start:
        silencer, monitor = await start(), await start()
        outcome: list[object] = []
        async with silenced(host, silencer, outcome) as silence:
            with anyio.move_on_after(0.1):
                await monitor.execute("add-fd", {"opaque": "abandoned"}, fds=files[:1])
            with pytest.raises(MonitorTimeout) as unsent:
                await monitor.execute("add-fd", {"opaque": "unsent"}, fds=files[1:2], timeout_s=0.1)
            assert not unsent.value.sent
            await silence.end()
        theirs = (await monitor.execute("add-fd", {"opaque": "kept"}, fds=files[2:]))["fd"]
        assert host.holds(files[2], theirs)
        sets = await monitor.execute("query-fdsets")
        assert {fd["opaque"]: host.holds(files[0], fd["fd"]) for group in sets for fd in group["fds"]} == {
            "abandoned": True,
            "kept": False,
        }


async def test_commands_sent_together_are_executed_in_order_and_each_for_itself() -> None:
    async with machine() as host, running(*host.streams) as start:
        monitor = await start()
        commands = [Command("stop"), Command("query-status"), Command("cont"), Command("query-status")]
        answers = await monitor.execute_all(commands)
        assert [answer.get("status") for answer in answers] == [None, "paused", None, "running"]
        with pytest.raises(QMPCommandError) as failed:
            await monitor.execute_all([Command("no-such"), Command("stop"), Command("nor-this")])
        assert failed.value.command == "no-such"
        # What came after it was executed all the same.
        assert (await monitor.execute("query-status"))["status"] == "paused"
        assert await monitor.execute_all([]) == []


async def test_qemu_killed_in_the_middle_of_commands_fails_them_all() -> None:
    async with machine() as host, running(*host.streams) as start:
        monitor = await start()
        outcome: list[object] = []
        fates: list[MonitorClosedError] = []

        async def ask() -> None:
            with pytest.raises(MonitorClosedError) as closed:
                await monitor.execute("query-status")
            fates.append(closed.value)

        with monitor.events() as stream:
            async with silenced(host, monitor, outcome), anyio.create_task_group() as tasks:
                for _ in range(IN_BAND_MAX + 3):
                    tasks.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                host.process.kill()
            with pytest.raises(MonitorClosedError):
                await stream.get()
        await monitor.wait_closed()
        assert monitor.closed
        assert monitor.close_reason in {"QEMU closed it", "the connection to QEMU broke"}
        assert isinstance(outcome[0], MonitorClosedError)
        assert {fate.reason for fate in fates} == {monitor.close_reason}
        # The silencer is one of the seven that left.
        assert sorted(fate.sent for fate in fates) == [False] * 4 + [True] * (IN_BAND_MAX - 1)
        for call in (monitor.execute, monitor.execute_oob):
            with pytest.raises(MonitorClosedError) as after:
                await call("query-status")
            assert not after.value.sent


async def test_events_that_qemu_sent_before_its_end_are_delivered() -> None:
    async with machine() as host, running(*host.streams) as start:
        monitor = await start()
        names: list[str] = []
        with monitor.events() as stream, pytest.raises(MonitorClosedError):
            await monitor.execute("stop")
            await monitor.execute("quit")
            async for happened in stream:
                names.append(happened.name)
        assert names[0] == "STOP"
        assert "SHUTDOWN" in names
        await monitor.wait_closed()


async def test_a_cancelled_command_leaves_the_connection_usable() -> None:
    async with machine() as host, running(*host.streams) as start:
        monitor = await start()
        outcome: list[object] = []
        async with silenced(host, monitor, outcome) as silence:
            async with anyio.create_task_group() as tasks:
                for _ in range(IN_BAND_MAX + 3):
                    tasks.start_soon(monitor.execute, "stop")
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            await silence.end()
        assert outcome == [{}]
        # Those that had left were executed; their answers went to nobody.
        assert (await monitor.execute("query-status"))["status"] == "paused"


async def test_an_answer_to_a_lost_connection_is_dropped_by_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with machine() as host, running(*host.streams) as start:
        first = await start()
        outcome: list[object] = []
        async with silenced(host, first, outcome) as silence:
            await first.aclose()
            again = await anyio.connect_unix(host.paths[0])
            # The greeting: QEMU has taken the connection, so the answer will go there and not nowhere.
            await anyio.wait_readable(again.extra(anyio.abc.SocketAttribute.raw_socket))
            async with running(again) as start_again:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(start_again)
                    await anyio.wait_all_tasks_blocked()
                    await silence.end()
                assert (await start_again.monitors[0].execute("query-status"))["running"] is True
        assert isinstance(outcome[0], MonitorClosedError)
        assert "an answer to no command of this connection" in caplog.text


# A peer that breaks the rules.


async def test_a_silent_peer_is_a_timeout_and_its_late_answer_is_dropped() -> None:
    async with connected() as (monitor, peer):
        with pytest.raises(MonitorTimeout, match="within 0.05 s, it may still be executed") as late:
            await monitor.execute("cont", timeout_s=0.05)
        assert (late.value.command, late.value.sent) == ("cont", True)
        abandoned = await peer.command()
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await monitor.execute("query-status"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            asked = await peer.command()
            assert asked["id"] > abandoned["id"]
            await peer.answer(abandoned, "late")
            await peer.answer({"id": 1 << 61}, "to nobody")
            await peer.answer(asked, "mine")
        assert answers == ["mine"]


async def test_the_monitors_own_time_limit_is_the_default() -> None:
    async with connected(command_timeout_s=0.05) as (monitor, _):
        with pytest.raises(MonitorTimeout) as late:
            await monitor.execute("query-status")
        assert late.value.timeout_s == 0.05
        with pytest.raises(MonitorTimeout) as late:
            await monitor.execute_oob("yank")
        assert late.value.sent


async def test_a_command_that_has_not_left_is_withdrawn() -> None:
    async with connected() as (monitor, peer):
        async with anyio.create_task_group() as tasks:
            for number in range(IN_BAND_MAX):
                tasks.start_soon(monitor.execute, f"early-{number}")
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(MonitorTimeout, match="withdrawn") as late:
                await monitor.execute("withdrawn", timeout_s=0.05)
            assert not late.value.sent
            with anyio.move_on_after(0.05):
                await monitor.execute("cancelled")
            with anyio.CancelScope() as scope:
                scope.cancel()
                await monitor.execute_oob("cancelled-before")
            tasks.start_soon(monitor.execute, "last")
            seen = [await peer.command() for _ in range(IN_BAND_MAX)]
            await peer.answer(seen[3], {})
            seen.append(await peer.command())
            assert {command["execute"] for command in seen[:-1]} == {f"early-{n}" for n in range(IN_BAND_MAX)}
            assert seen[-1]["execute"] == "last"
            for command in seen:
                if command is not seen[3]:
                    await peer.answer(command, {})


async def test_an_answer_to_a_command_that_has_not_left_is_none() -> None:
    async with connected() as (monitor, peer), anyio.create_task_group() as tasks:
        for _ in range(IN_BAND_MAX):
            tasks.start_soon(monitor.execute, "stop")
        seen = [await peer.command() for _ in range(IN_BAND_MAX)]
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await monitor.execute("query-status"))

        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        await peer.answer({"id": max(command["id"] for command in seen) + 1}, "guessed")
        for command in seen:
            await peer.answer(command, {})
        await peer.answer(await peer.command(), "given")
        while not answers:
            await anyio.wait_all_tasks_blocked()
        assert answers == ["given"]


async def test_a_command_cancelled_half_sent_is_sent_to_its_end() -> None:
    async with connected() as (monitor, peer):
        text = "x" * (8 << 20)  # more than the socket takes
        with pytest.raises(MonitorTimeout) as late:
            await monitor.execute("long", {"text": text}, timeout_s=0.05)
        assert late.value.sent
        # Behind it nothing can leave yet, out of band neither.
        with pytest.raises(MonitorTimeout) as unsent:
            await monitor.execute_oob("yank", timeout_s=0.05)
        assert not unsent.value.sent
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(monitor.execute, "short")
            long = await peer.command()
            assert long["arguments"] == {"text": text}
            short = await peer.command()
            assert short["execute"] == "short"
            await peer.answer(long, {})
            await peer.answer(short, {})


async def test_a_command_that_waits_for_the_socket_takes_its_descriptor_along(files: list[int]) -> None:
    async with unconnected() as (stream, peer), running(stream) as start:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(peer.negotiate)
            monitor = await start()
        with pytest.raises(MonitorTimeout):
            await monitor.execute("long", {"text": "x" * (4 << 20)}, timeout_s=0.05)
        received: list[int] = []
        async with anyio.create_task_group() as tasks:

            async def pass_it() -> None:
                await monitor.execute("getfd", {"text": "y" * (4 << 20)}, fds=files[:2])  # and takes it once

            tasks.start_soon(pass_it)
            await anyio.wait_all_tasks_blocked()
            assert isinstance(peer.stream, anyio.abc.UNIXSocketStream)
            data = b""
            while data.count(b"\n") < 2:
                more, fds = await peer.stream.receive_fds(1 << 16, 8)
                if fds:
                    # They come with the first byte of their command: none of it before, some of it now.
                    assert not data.partition(b"\n")[2]
                    assert (data + more).partition(b"\n")[2]
                received += fds
                data += more
            for line in data.splitlines():
                await peer.answer(json.loads(line), {})
        try:
            assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in files[:2]]
        finally:
            for fd in received:
                os.close(fd)


async def test_a_descriptor_that_cannot_be_passed_is_the_fault_of_its_command_alone(files: list[int]) -> None:
    async with connected() as (monitor, peer):
        with pytest.raises(CommandNotSentError, match="descriptors cannot be passed") as refused:
            await monitor.execute("getfd", fds=[files[0], 1 << 20])
        assert isinstance(refused.value.__cause__, OSError)
        with pytest.raises(ValueError, match="at most 16 descriptors"):
            await monitor.execute("getfd", fds=[files[0]] * (FDS_MAX + 1))
        with pytest.raises(TypeError):
            await monitor.execute("getfd", {"a": object()}, fds=files)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: monitor.execute("getfd", fds=files))
            command = await peer.command()
            assert command["execute"] == "getfd"
            await peer.answer(command, {})


async def test_nothing_follows_a_descriptor_before_its_answer(files: list[int]) -> None:
    """Neither in band nor out of band, and also when nobody waits for that answer any more."""
    async with connected() as (monitor, peer):
        for abandoned in (False, True):
            done: list[str] = []

            async def ask(call: Any, name: str, done: list[str] = done, **more: Any) -> None:
                with suppress(MonitorTimeout):
                    await call(name, **more)
                done.append(name)

            limit_s = 0.05 if abandoned else None
            async with anyio.create_task_group() as tasks:
                await tasks_in_order(
                    tasks,
                    partial(ask, monitor.execute, "getfd", fds=files, timeout_s=limit_s),
                    partial(ask, monitor.execute, "stop"),
                    partial(ask, monitor.execute_oob, "yank"),
                )
                carrier = await peer.command()
                if abandoned:
                    while not done:
                        await anyio.lowlevel.checkpoint()
                with anyio.move_on_after(0.1) as waited:
                    await peer.command()
                assert waited.cancelled_caught
                await peer.answer(carrier, {})
                for _ in range(2):
                    await peer.answer(await peer.command(), {})
            assert sorted(done) == ["getfd", "stop", "yank"]


async def tasks_in_order(
    tasks: anyio.abc.TaskGroup, *bodies: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Start tasks one after the other; each waits for something before the next begins."""
    for body in bodies:
        tasks.start_soon(body)
        await anyio.wait_all_tasks_blocked()


async def test_without_out_of_band_execution_only_the_main_loop_is_asked() -> None:
    async with connected("something-new") as (monitor, peer):
        assert not monitor.oob
        with pytest.raises(CommandNotSentError, match="does not offer out-of-band"):
            await monitor.execute_oob("yank")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(monitor.execute, "stop")
            await peer.answer(await peer.command(), {})


async def say_nothing(_: Peer) -> None:
    pass


async def close_at_once(peer: Peer) -> None:
    await peer.stream.aclose()


async def send_garbage(peer: Peer) -> None:
    await peer.stream.send(b"SSH-2.0-OpenSSH\r\n")


async def close_half_way(peer: Peer) -> None:
    await peer.stream.send(b'{"QMP": {"ver')
    await peer.stream.aclose()


async def refuse_negotiation(peer: Peer) -> None:
    await peer.greet()
    command = await peer.command()
    await peer.send({"error": {"class": "GenericError", "desc": "not today"}, "id": command["id"]})


async def ignore_negotiation(peer: Peer) -> None:
    await peer.greet("oob")


async def greet_twice(peer: Peer) -> None:
    await peer.greet()
    await peer.greet()


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (say_nothing, "QEMU did not greet and negotiate within 0.2 s"),
        (ignore_negotiation, "QEMU did not greet and negotiate within 0.2 s"),
        (close_at_once, "QEMU closed it"),
        (close_half_way, "QEMU closed it in the middle of a message"),
        (send_garbage, "what QEMU sent is not QMP (line is not JSON)"),
        (refuse_negotiation, "QEMU refused to negotiate (not today)"),
        (greet_twice, "QEMU greeted twice"),
    ],
)
async def test_a_peer_that_never_gets_ready_is_a_closed_monitor_and_no_exception(
    behaviour: Callable[[Peer], Coroutine[Any, Any, None]], reason: str
) -> None:
    async with unconnected() as (stream, peer), anyio.create_task_group() as tasks:
        short = reason.endswith("0.2 s")
        monitor = Monitor(stream, name="guest", greeting_timeout_s=0.2 if short else None)
        with pytest.raises(RuntimeError, match="this one is new"):
            await monitor.execute("query-status")
        with pytest.raises(RuntimeError, match="the monitor is new"):
            _ = monitor.greeting
        tasks.start_soon(behaviour, peer)
        await tasks.start(monitor.run)
        await monitor.wait_closed()
        assert monitor.close_reason == reason
        with pytest.raises(MonitorClosedError) as closed:
            await monitor.execute("query-status")
        assert str(closed.value) == f"guest: the monitor is closed, {reason}"
        if behaviour in (say_nothing, close_at_once, send_garbage):
            with pytest.raises(MonitorClosedError):
                _ = monitor.greeting


async def test_garbage_ends_the_connection_after_what_was_sound() -> None:
    async with connected() as (monitor, peer):
        with monitor.events() as stream:
            await peer.stream.send(json.dumps(event("STOP", 1)).encode() + b"\nboo\n")
            with pytest.raises(MonitorClosedError, match="not QMP"):
                await monitor.execute("query-status")
            assert (await stream.get()).data == {"n": 1}
            with pytest.raises(MonitorClosedError, match="not QMP"):
                await stream.get()
        with pytest.raises(anyio.EndOfStream):
            while True:
                await peer.stream.receive()


async def test_an_error_that_names_no_command_ends_the_connection() -> None:
    async with connected() as (monitor, peer):
        await peer.send({"error": {"class": "GenericError", "desc": "JSON parse error"}})
        with pytest.raises(MonitorClosedError, match="did not understand a command"):
            await monitor.execute("query-status")


async def test_what_the_peer_sent_before_it_broke_is_read_although_sending_fails() -> None:
    async with connected() as (monitor, peer):
        with monitor.events() as stream:
            await peer.send(event("SHUTDOWN"))
            await peer.stream.aclose()
            with pytest.raises(MonitorClosedError) as closed:
                await monitor.execute("query-status")
            assert not closed.value.sent
            assert (await stream.get()).name == "SHUTDOWN"
            with pytest.raises(MonitorClosedError):
                await stream.get()


async def test_a_peer_that_stops_reading_for_good_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_DRAIN_S", 0.05)
    async with connected() as (monitor, peer):
        peer.stream.extra(anyio.abc.SocketAttribute.raw_socket).shutdown(socket.SHUT_RD)
        with pytest.raises(MonitorClosedError, match="does not read its monitor any more"):
            await monitor.execute("query-status")
        await monitor.wait_closed()


async def test_events_wait_unread_up_to_a_limit_and_overflow_loudly() -> None:
    async with connected() as (monitor, peer):
        with monitor.events() as slow, monitor.events("OTHER", "LAST") as other:
            for start in range(0, EVENT_BACKLOG_MAX, 500):
                await peer.send(*(event("STOP", number) for number in range(start, start + 500)))
            await peer.send(event("OTHER", 1), event("LAST", 2))
            assert (await other.get()).name == "OTHER"
            assert (await other.get()).name == "LAST"
            for number in range(EVENT_BACKLOG_MAX):
                assert (await slow.get()).data == {"n": number}
            for _ in range(2):
                with pytest.raises(EventsLostError):
                    await slow.get()
            # Others, and later ones, are not affected.
            with monitor.events() as later:
                await peer.send(event("OTHER", 3))
                assert (await later.get()).data == (await other.get()).data == {"n": 3}


async def test_cancelling_a_reader_of_events_loses_none() -> None:
    async with connected() as (monitor, peer):
        with monitor.events() as stream:
            got: list[Event] = []
            for number in range(50):
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as tasks:

                        async def read() -> None:
                            got.append(await stream.get())

                        tasks.start_soon(read)
                        if number % 2:
                            await anyio.wait_all_tasks_blocked()
                        await peer.send(event("STOP", number))
                        scope.cancel()
            while len(got) < 50:
                got.append(await stream.get())
            assert [happened.data["n"] for happened in got] == list(range(50))


async def test_an_event_stream_lives_in_its_context_and_has_one_reader() -> None:
    async with connected() as (monitor, _):
        stream = monitor.events()
        with pytest.raises(anyio.ClosedResourceError):
            await stream.get()
        async with anyio.create_task_group() as tasks:
            with stream:
                with pytest.raises(RuntimeError, match="entered already"):
                    stream.__enter__()

                async def wait() -> None:
                    with pytest.raises(anyio.ClosedResourceError):
                        await stream.get()

                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                with pytest.raises(anyio.BusyResourceError):
                    await stream.get()


async def test_closing_fails_what_waits_and_tells_the_peer() -> None:
    async with connected() as (monitor, peer):
        fates: list[MonitorClosedError] = []

        async def ask(call: Callable[[str], Awaitable[object]]) -> None:
            with pytest.raises(MonitorClosedError, match="its owner closed it") as closed:
                await call("query-status")
            fates.append(closed.value)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, monitor.execute)
            tasks.start_soon(ask, monitor.execute_oob)
            await peer.command()
            await peer.command()
            await monitor.aclose()
            assert monitor.closed
        await monitor.aclose()
        await monitor.wait_closed()
        assert [fate.sent for fate in fates] == [True, True]
        with pytest.raises(anyio.EndOfStream):
            await peer.stream.receive()
        with pytest.raises(RuntimeError, match="needs a new monitor"):
            await monitor.run()


async def test_a_monitor_closed_before_it_ran_starts_as_closed() -> None:
    async with unconnected() as (stream, peer), anyio.create_task_group() as tasks:
        monitor = Monitor(stream, name="guest")
        await monitor.aclose()
        await monitor.wait_closed()
        await tasks.start(monitor.run)
        assert monitor.close_reason == "its owner closed it"
        with pytest.raises(anyio.EndOfStream):
            await peer.stream.receive()


async def test_cancelling_run_closes_the_stream_and_fails_what_waits() -> None:
    async with unconnected() as (stream, peer), anyio.create_task_group() as calls:
        monitor = Monitor(stream, name="guest")

        async def ask() -> None:
            with pytest.raises(MonitorClosedError, match="its reader task ended"):
                await monitor.execute("query-status")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(peer.negotiate)
            await tasks.start(monitor.run)
            calls.start_soon(ask)
            await peer.command()
            tasks.cancel_scope.cancel()
        assert monitor.closed
        await monitor.wait_closed()
        with pytest.raises(anyio.EndOfStream):
            await peer.stream.receive()


async def test_any_byte_stream_will_do_without_descriptors(files: list[int]) -> None:
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as tasks,
    ):
        accepted: list[anyio.abc.SocketStream] = []
        done = anyio.Event()

        async def accept(stream: anyio.abc.SocketStream) -> None:
            accepted.append(stream)
            done.set()
            await anyio.sleep_forever()

        tasks.start_soon(listener.serve, accept)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        stream = await anyio.connect_tcp("127.0.0.1", port)
        await done.wait()
        async with accepted[0]:
            peer = Peer(accepted[0])
            monitor = Monitor(stream, name="guest")
            tasks.start_soon(peer.negotiate, "oob")
            await tasks.start(monitor.run)
            with pytest.raises(CommandNotSentError, match="only a UNIX socket"):
                await monitor.execute("getfd", fds=files)
            with pytest.raises(MonitorTimeout):
                await monitor.execute("long", {"text": "x" * (16 << 20)}, timeout_s=0.1)
            tasks.start_soon(monitor.execute, "short")
            for name in ("long", "short"):
                command = await peer.command()
                assert command["execute"] == name
                await peer.answer(command, {})
            await peer.stream.aclose()
            await monitor.wait_closed()
            tasks.cancel_scope.cancel()


async def test_ids_of_two_connections_differ() -> None:
    async with connected() as (first, first_peer), connected() as (second, second_peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first.execute, "x")
            tasks.start_soon(second.execute, "x")
            commands = [await first_peer.command(), await second_peer.command()]
            assert commands[0]["id"] != commands[1]["id"]
            await first_peer.answer(commands[0], {})
            await second_peer.answer(commands[1], {})


# qemu.qmp is QEMU's own client in Python; it needs asyncio.

QUESTIONS = [
    "query-version",
    "query-status",
    "query-commands",
    "query-qmp-schema",
    "query-machines",
    "query-memory-size-summary",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "no-such-command",
    "query-named-block-nodes",
]


async def answers_of(execute: Callable[[str], Awaitable[object]], failure: type[Exception]) -> list[object]:
    answers: list[object] = []
    for name in QUESTIONS:
        try:
            answers.append(await execute(name))
        except failure as error:
            description = error.description if isinstance(error, QMPCommandError) else str(error)
            answers.append((getattr(error, "error_class", None), description))
    return answers


async def undelimited(stream: anyio.abc.SocketStream) -> AsyncGenerator[dict[str, Any], None]:
    """The commands of a client that does not end its lines, as QEMU reads them: one whole object after the other."""
    text = ""
    decoder = json.JSONDecoder()
    while True:
        try:
            text += (await stream.receive()).decode()
        except anyio.EndOfStream:
            return
        while text := text.lstrip():
            try:
                command, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break  # not whole yet
            text = text[end:]
            yield command


async def serve(stream: anyio.abc.SocketStream, monitor: Monitor) -> None:
    """Be a QMP server for one client that knows no more than our monitor tells it."""
    peer = Peer(stream)
    commands = undelimited(stream)
    major, minor, micro = monitor.greeting.version
    version = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": monitor.greeting.package}
    await peer.send({"QMP": {"version": version, "capabilities": []}})
    assert (await anext(commands))["execute"] == "qmp_capabilities"
    await peer.send({"return": {}})
    async with stream, anyio.create_task_group() as tasks:

        async def forward() -> None:
            with monitor.events() as events:
                async for happened in events:
                    seconds, microseconds = divmod(round(happened.timestamp_s * 1e6), 1_000_000)
                    stamp = {"seconds": seconds, "microseconds": microseconds}
                    await peer.send({"event": happened.name, "data": happened.data, "timestamp": stamp})

        tasks.start_soon(forward)
        async for command in commands:
            try:
                value = await monitor.execute(command["execute"], command.get("arguments"))
            except QMPCommandError as error:
                body = {"class": error.error_class, "desc": error.description}
                await peer.send({"error": body, "id": command["id"]})
            else:
                await peer.answer(command, value)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("anyio_backend", [LOOPS["asyncio"]], ids=["asyncio"])
async def test_qemus_own_client_reads_the_same_from_qemu_and_through_a_server_of_ours() -> None:
    need(present=importlib.util.find_spec("qemu") is not None, what="the package qemu.qmp")
    from qemu.qmp import ExecuteError, QMPClient

    async with machine(monitors=2) as host, running(host.streams[0]) as start:
        monitor = await start()
        direct, relayed = QMPClient("direct"), QMPClient("relayed")
        raw = host.streams[1].extra(anyio.abc.SocketAttribute.raw_socket)
        path = str(host.directory / "server")
        async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, lambda stream: serve(stream, monitor))
            await direct.connect(raw.dup())
            await relayed.connect(path)
            try:
                assert direct.greeting is not None
                assert relayed.greeting is not None
                assert relayed.greeting.QMP.version == direct.greeting.QMP.version
                with monitor.events() as events:
                    await direct.execute("stop")
                    await relayed.execute("cont")
                    ours = [await events.get() for _ in range(2)]
                theirs = [dict(await direct.events.get()) for _ in range(2)]
                through_ours = [dict(await relayed.events.get()) for _ in range(2)]
                assert through_ours == [{"data": {}, **their_event} for their_event in theirs]
                assert [happened.name for happened in ours] == [happened["event"] for happened in theirs]
                answers = await answers_of(direct.execute, ExecuteError)
                assert await answers_of(relayed.execute, ExecuteError) == answers
                assert await answers_of(monitor.execute, QMPCommandError) == answers
                # Each question was understood: only the one without an answer has none.
                assert [
                    name for name, answer in zip(QUESTIONS, answers, strict=True) if isinstance(answer, tuple)
                ] == ["no-such-command"]
            finally:
                await direct.disconnect()
                await relayed.disconnect()
                tasks.cancel_scope.cancel()
