"""The guest agent: what the guest may send is anything, and the next command never hears of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from ferryman.errors import DomainStateError, HypervisorError
from ferryman_qemu import agent
from ferryman_qemu.agent import CHANNEL, ask_agent

Far = Callable[[Any], Awaitable[None]]
PING = {"execute": "guest-ping"}


class Guest:
    """What the agent's module knows of a guest; its channel leads to a far end of the test's."""

    def __init__(self, tasks: anyio.abc.TaskGroup, *far_ends: Far) -> None:
        self.agent_lock = anyio.Lock()
        self.record = self
        self.run = self
        self.name = "web"
        self.devices: list[dict[str, Any]] = [{"filename": f"unix:/r/{CHANNEL}", "frontend-open": True}]
        self._tasks = tasks
        self._far_ends = list(far_ends)

    async def command(self, name: str) -> list[dict[str, Any]]:
        assert name == "query-chardev"
        return self.devices

    async def connect(self, name: str) -> Any:
        assert name == CHANNEL
        if not self._far_ends:
            raise ConnectionRefusedError("planted")
        to_send, to_receive = anyio.create_memory_object_stream[bytes](1000)
        from_send, from_receive = anyio.create_memory_object_stream[bytes](1000)
        self._tasks.start_soon(_serve, self._far_ends.pop(0), _Bytes(from_send, to_receive))
        return _Bytes(to_send, from_receive)


class _Bytes(anyio.abc.ByteStream):
    def __init__(self, sending: Any, receiving: Any) -> None:
        self._sending, self._receiving = sending, receiving

    async def send(self, item: bytes) -> None:
        await self._sending.send(item)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        data: bytes = await self._receiving.receive()
        return data

    async def line(self) -> dict[str, Any]:
        """The next command that the far end gets."""
        told: dict[str, Any] = json.loads((await self.receive()).lstrip(b"\xff"))
        return told

    async def send_eof(self) -> None:
        self._sending.close()

    async def aclose(self) -> None:
        self._sending.close()
        self._receiving.close()


async def _serve(far: Far, stream: _Bytes) -> None:
    async with stream:
        try:
            await far(stream)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass


@asynccontextmanager
async def guest_with(*far_ends: Far) -> AsyncIterator[Any]:
    async with anyio.create_task_group() as tasks:
        yield Guest(tasks, *far_ends)
        tasks.cancel_scope.cancel()


def answer(*said: bytes, before: bytes = b"", until: bytes = b"") -> Far:
    """A far end that agrees and answers.

    :param before: comes before anything else; ``until`` before the answer to the agreement.
    """

    async def far(stream: _Bytes) -> None:
        if before:
            await stream.send(before)
        sync = await stream.line()
        assert sync["execute"] == "guest-sync-delimited"
        await stream.send(until + b"\xff" + json.dumps({"return": sync["arguments"]["id"]}).encode() + b"\n")
        assert await stream.line() == PING
        for part in said:
            await stream.send(part)
        await anyio.sleep_forever()

    return far


async def silent(stream: _Bytes) -> None:
    await anyio.sleep_forever()


async def hangs_up(stream: _Bytes) -> None:
    await stream.line()


async def repeats(stream: _Bytes) -> None:
    """A channel that echoes: what was asked is no answer."""
    while True:
        await stream.send(await stream.receive())


@pytest.mark.parametrize(
    ("far", "value"),
    [
        (answer(b'{"return": {}}\n'), {}),
        (answer(b'{"ret', b'urn": [1, "\xc3\xbc"]}\r', b"\n"), [1, "ü"]),
        (answer(b'{"return": null}\nand more\n'), None),
        (answer(b'{"return": 1}\n', before=b'{"return": "yesterday"}\n\xff{"return": 5}\n{"ret'), 1),
        (answer(b'{"return": 1}\n', until=b"\x00\xfe garbage \xff\xff {}\n\n"), 1),
        (answer(b'{"return": 1}\n', before=b"x" * 1_000_000), 1),
    ],
    ids=["plain", "in pieces", "null", "late answers", "garbage", "noise"],
)
async def test_an_answer(far: Far, value: Any) -> None:
    async with guest_with(far) as guest:
        assert await ask_agent(guest, PING, timeout_s=10) == value


@pytest.mark.parametrize(
    ("far", "why"),
    [
        (answer(b'{"error": {"class": "C", "desc": "no"}}\n'), r"refused: no \(C\)"),
        (answer(b'{"error": "no"}\n'), "no answer"),
        (answer(b"garbage\n"), "no answer"),
        (answer(b"[]\n"), "no answer"),
        (answer(b"\xfe\xff\n"), "no answer"),
        (answer(b'{"return":' + b"[" * 100_000 + b"\n"), "no answer"),
        (hangs_up, "closed"),
        (silent, r"within 0\.2 s"),
        (answer(b'{"return": '), r"within 0\.2 s"),
        (repeats, r"within 0\.2 s"),
    ],
)
async def test_no_answer_and_the_next_command_does_not_hear_of_it(far: Far, why: str) -> None:
    async with guest_with(far, answer(b'{"return": 7}\n')) as guest:
        with pytest.raises(HypervisorError, match=why):
            await ask_agent(guest, PING, timeout_s=0.2)
        assert await ask_agent(guest, PING, timeout_s=10) == 7


async def test_a_flood_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "ANSWER_MAX_BYTES", 100_000)

    async def flood(stream: _Bytes) -> None:
        while True:
            await stream.send(b"x" * 65536)

    for far in (flood, answer(*[b"x" * 10_000] * 20)):
        async with guest_with(far) as guest:
            with pytest.raises(HypervisorError, match="more than 100000 bytes"):
                await ask_agent(guest, PING, timeout_s=10)


async def test_one_command_at_a_time() -> None:
    answers: list[Any] = []
    async with guest_with(answer(b'{"return": 1}\n'), answer(b'{"return": 2}\n')) as guest:

        async def ask() -> None:
            answers.append(await ask_agent(guest, PING, timeout_s=10))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            tasks.start_soon(ask)
    assert sorted(answers) == [1, 2]


async def test_nobody_is_asked_where_there_is_no_agent() -> None:
    async with guest_with() as guest:
        with pytest.raises(HypervisorError, match="cannot be reached"):
            await ask_agent(guest, PING, timeout_s=10)
        guest.devices[0]["frontend-open"] = False
        with pytest.raises(DomainStateError, match="not connected: start qemu-guest-agent"):
            await ask_agent(guest, PING, timeout_s=10)
        guest.devices.clear()
        with pytest.raises(DomainStateError, match="no channel to an agent"):
            await ask_agent(guest, PING, timeout_s=10)
