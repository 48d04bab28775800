"""The agent inside the guest: commands and answers, a line of JSON each, over a channel that may hold anything.

::

    connect                  QEMU listens; one program at a time is let through
    0xFF, guest-sync-delimited {"id": N}  ---->   the agent drops what it was reading
    0xFF, {"return": N}      <----                everything before this is somebody's old answer, or noise
    the command              ---->
    its answer               <----

A channel has no beginning: the agent may have died in the middle of a word, or answer yesterday's command now.  So
each command has a connection of its own and begins with a number of its own.  Nothing that the guest sends is trusted:
it is bounded in size and in time, and only JSON of the right shape is an answer.

Source: QEMU 7.2 qga/qapi-schema.json (guest-sync-delimited, guest-shutdown), docs/interop/qemu-ga-ref.
"""

from __future__ import annotations

import json
import logging
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio

from ferryman.errors import DomainStateError, HypervisorError
from ferryman.types import ShutdownMode
from ferryman_qemu.machine import AGENT_CHANNEL
from ferryman_qemu.monitor import MonitorClosedError

if TYPE_CHECKING:
    from ferryman_qemu.guest import Guest

CHANNEL = f"channel-{AGENT_CHANNEL}"
"""The socket in the guest's run directory that leads to the agent."""

ANSWER_MAX_BYTES = 16 * 1024 * 1024
"""The most that is read for one command, noise included."""

_DELIMITER = 0xFF
_SHUTDOWN_S = 5.0

_log = logging.getLogger(__name__)


async def ask_agent(guest: Guest, command: dict[str, Any], *, timeout_s: float) -> Any:
    """Give the agent a command, and return what it answers.

    :raises DomainStateError: the guest has no agent that is connected.
    :raises HypervisorError: it refused, or did not answer in time or in its language.
    """
    name = guest.record.name
    await _require_agent(guest)
    with anyio.move_on_after(timeout_s):
        async with guest.agent_lock, await _connect(guest) as stream:
            lines = await _agree(stream, name)
            await _send(stream, command, name)
            return _value(await lines.get(), name)
    raise HypervisorError(f"the agent of domain {name} did not answer within {timeout_s:g} s")


async def shut_down_by_agent(guest: Guest, mode: ShutdownMode, how: str) -> bool:
    """Shut the guest down through its agent, if the mode says so; what is left to do by ACPI is answered False.

    :param how: ``powerdown`` or ``reboot``.
    :raises DomainStateError: the mode asks for an agent, and there is none.
    :raises HypervisorError: the mode asks for the agent, and it failed.
    """
    if mode is ShutdownMode.ACPI:
        return False
    try:
        await _require_agent(guest)
        await _shut_down(guest, how)
    except (DomainStateError, HypervisorError) as error:
        if mode is ShutdownMode.AGENT:
            raise
        _log.info("domain %s is asked by ACPI: %s", guest.record.name, error)
        return False
    return True


async def _shut_down(guest: Guest, how: str) -> None:
    """Tell the agent; it answers only if it fails, and the guest's end may cut even that."""
    name = guest.record.name
    told = False
    answers: list[bytes] = []
    with anyio.move_on_after(_SHUTDOWN_S):
        async with guest.agent_lock, await _connect(guest) as stream:
            lines = await _agree(stream, name)
            with guest.control.events("SHUTDOWN", "RESET") as events:
                await _send(stream, {"execute": "guest-shutdown", "arguments": {"mode": how}}, name)
                told = True
                async with anyio.create_task_group() as tasks:

                    async def hear() -> None:
                        with suppress(HypervisorError):  # the guest went, and the channel with it
                            answers.append(await lines.get())
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(hear)
                    with suppress(MonitorClosedError):
                        await events.get()
                    tasks.cancel_scope.cancel()
    if not told:
        raise HypervisorError(f"the agent of domain {name} did not answer within {_SHUTDOWN_S:g} s")
    for answer in answers:
        _value(answer, name)


async def _require_agent(guest: Guest) -> None:
    """Refuse where nobody listens at the guest's end of the channel."""
    for device in await guest.command("query-chardev"):
        if CHANNEL in str(device.get("filename")):
            if device.get("frontend-open"):
                return
            raise DomainStateError(
                f"the agent of domain {guest.record.name} is not connected: start qemu-guest-agent in the guest",
                domain=guest.record.name,
            )
    raise DomainStateError(
        f"domain {guest.record.name} has no channel to an agent: give it"
        " <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
        domain=guest.record.name,
    )


async def _connect(guest: Guest) -> anyio.abc.ByteStream:
    try:
        return await guest.run.connect(CHANNEL)
    except OSError as error:
        raise HypervisorError(
            f"the agent of domain {guest.record.name} cannot be reached: {error}"
        ) from error


async def _agree(stream: anyio.abc.ByteStream, name: str) -> _Lines:
    """Agree with the agent on where the next answer begins; what is read then is what it says from there on."""
    number = secrets.randbelow(1 << 52)
    lines = _Lines(stream, name)
    command = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
    await _send(stream, command, name, before=bytes([_DELIMITER]))
    while True:
        _noise, found, rest = (await lines.get()).rpartition(bytes([_DELIMITER]))
        if found and _parse(rest) == {"return": number}:
            return lines


async def _send(
    stream: anyio.abc.ByteStream, command: dict[str, Any], name: str, *, before: bytes = b""
) -> None:
    try:
        await stream.send(before + json.dumps(command).encode() + b"\n")
    except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
        raise HypervisorError(f"the agent of domain {name} is gone: the channel was closed") from error


class _Lines:
    """Lines that the guest sends, bounded all together."""

    def __init__(self, stream: anyio.abc.ByteStream, name: str) -> None:
        self._stream = stream
        self._name = name
        self._left = ANSWER_MAX_BYTES
        self._read = bytearray()

    async def get(self) -> bytes:
        """Wait for the next line. :raises HypervisorError: the channel was closed, or too much has come."""
        searched = 0
        while (end := self._read.find(b"\n", searched)) < 0:
            searched = len(self._read)
            try:
                data = await self._stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
                raise HypervisorError(
                    f"the agent of domain {self._name} is gone: the channel was closed"
                ) from error
            self._left -= len(data)
            if self._left < 0:
                raise HypervisorError(
                    f"the agent of domain {self._name} sent more than {ANSWER_MAX_BYTES} bytes: ask for less"
                )
            self._read += data
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        return line


def _parse(line: bytes) -> Any:
    """A line as JSON; None for what is none."""
    try:
        return json.loads(line.strip())
    except (ValueError, RecursionError):
        return None


def _value(line: bytes, name: str) -> Any:
    """The value of an answer. :raises HypervisorError: it is a refusal, or no answer."""
    answer = _parse(line.removeprefix(bytes([_DELIMITER])))
    if isinstance(answer, dict):
        if "return" in answer:
            return answer["return"]
        if isinstance(refusal := answer.get("error"), dict):
            raise HypervisorError(
                f"the agent of domain {name} refused: {str(refusal.get('desc'))[:400]}"
                f" ({str(refusal.get('class'))[:60]})"
            )
    raise HypervisorError(f"the agent of domain {name} answered what is no answer: {line[:80]!r}")
