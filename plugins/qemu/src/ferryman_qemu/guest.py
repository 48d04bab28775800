"""One process of QEMU, driven through its monitor ``control``.

INVARIANT: every command that changes the run state goes through ``control``, under :attr:`Guest.lock`.  A second way
in could execute a late ``cont`` after the state was read.  QEMU has a second monitor, ``read``, for programs that look
on; nothing here connects to it.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL
from typing import TYPE_CHECKING, Any

import anyio

from ferryman.errors import HypervisorError
from ferryman.types import DomainState
from ferryman_qemu.monitor import Command, Monitor, MonitorError
from ferryman_qemu.process import Process, find_strays

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anyio.abc import TaskGroup

    from ferryman_qemu.qmp import Event
    from ferryman_qemu.root import GuestRecord, RunDirectory

_log = logging.getLogger(__name__)

_LOG_TAIL_BYTES = 2000
_QUIT_S = 5.0

_STATES = {
    "running": DomainState.RUNNING,
    "shutdown": DomainState.SHUTTING_DOWN,
    "guest-panicked": DomainState.CRASHED,
    "internal-error": DomainState.CRASHED,
}


class Guest:
    """A live process of QEMU: a domain, or a receiver that is to become one."""

    def __init__(
        self,
        *,
        record: GuestRecord,
        run: RunDirectory,
        process: Process,
        stream: anyio.abc.UNIXSocketStream,
        ended: Callable[[Guest, str], None],
        happened: Callable[[Guest, Event], None],
    ) -> None:
        self.record = record
        self.run = run
        self.process = process
        self.control = Monitor(stream, name=record.name, heard=self._heard)
        self.running = False
        self.lock = anyio.Lock()
        self.loaded = anyio.Event()
        self.incoming_failed = ""
        self.gone = anyio.Event()
        self.ending = ""
        self._ended = ended
        self._happened = happened

    # Starting and finding

    @classmethod
    async def start(
        cls,
        record: GuestRecord,
        run: RunDirectory,
        argv: Callable[[int, int], Sequence[str]],
        *,
        log: Path,
        tasks: TaskGroup,
        ended: Callable[[Guest, str], None],
        happened: Callable[[Guest, Event], None],
    ) -> Guest:
        """Start a process and connect to it.

        :raises HypervisorError: it did not start; the message holds the last of what it printed. Nothing is left.
        :cancellation: nothing is left.
        """
        process: Process | None = None
        stream: anyio.abc.UNIXSocketStream | None = None
        try:
            # Listening before it is started: the monitor answers when it is ready, and nobody has to look.
            with run.listen("control") as control, run.listen("read") as read:
                stream = await run.connect("control")
                arguments = list(argv(control.fileno(), read.fileno()))
                begin = _write_log(log, arguments)
                process = Process.spawn(arguments, output=log, inherited=(control.fileno(), read.fileno()))
            record = replace(record, identity=process.identity)
            run.write(record)
            guest = cls(
                record=record,
                run=run,
                process=process,
                stream=stream,
                ended=ended,
                happened=happened,
            )
            await tasks.start(guest.control.run)
            if guest.control.closed:
                with anyio.move_on_after(_QUIT_S):
                    await process.wait()
                said = _read_log(log, begin) or guest.control.close_reason
                raise HypervisorError(f"QEMU did not start domain {record.name}: {said}")
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                if process is not None:
                    process.signal(SIGKILL)
                    await process.wait()
                    process.close()
                if stream is not None:
                    await anyio.aclose_forcefully(stream)
                run.remove()
            if isinstance(error, OSError):
                raise HypervisorError(
                    f"QEMU could not be started for domain {record.name}: {error}"
                ) from error
            raise
        tasks.start_soon(guest._watch_process)
        return guest

    @classmethod
    async def find(
        cls,
        run: RunDirectory,
        *,
        tasks: TaskGroup,
        ended: Callable[[Guest, str], None],
        happened: Callable[[Guest, Event], None],
    ) -> Guest | None:
        """Find the process that an earlier program started in this directory; clean up where there is none."""
        record = run.read()
        if record is None:
            # Started and never written down, or never started: it has not run and nobody knows of it.
            for stray in find_strays(run.pidfile):
                stray.signal(SIGKILL)
                await stray.wait()
                stray.close()
            run.remove()
            return None
        process = Process.find(record.identity)
        if process is None:
            clean_up(run, record)
            return None
        try:
            stream = await run.connect("control")
        except OSError as error:
            process.close()
            raise HypervisorError(
                f"domain {record.name} runs as process {process.pid}, but its monitor cannot be reached: {error}"
            ) from error
        guest = cls(
            record=record,
            run=run,
            process=process,
            stream=stream,
            ended=ended,
            happened=happened,
        )
        await tasks.start(guest.control.run)
        tasks.start_soon(guest._watch_process)
        with suppress(
            HypervisorError
        ):  # one that is silent or ending is found out when it is asked for something
            guest.running = await guest.run_state() == "running"
        return guest

    # Watching

    async def _watch_process(self) -> None:
        await self.process.wait()
        with anyio.CancelScope(shield=True):
            await self.control.aclose()
        self.process.close()
        clean_up(self.run, self.record)
        self._ended(self, self.ending)
        # Last, so that who waits for it finds the guest gone everywhere.
        self.gone.set()

    def _heard(self, event: Event) -> None:
        match event.name:
            case "STOP":
                self.running = False
            case "RESUME":
                self.running = True
            case "SHUTDOWN":
                self.ending = self.ending or ("shut-down" if event.data.get("guest") else "")
            case "MIGRATION" if self.record.migration:
                self._incoming(str(event.data.get("status")))
        self._happened(self, event)

    def _incoming(self, status: str) -> None:
        if status == "completed":
            self.loaded.set()
        elif status == "failed":
            self.incoming_failed = "the stream broke before the guest was whole"
            self.loaded.set()

    # Asking and commanding

    @property
    def version(self) -> tuple[int, int, int]:
        """Version of the QEMU that runs, as it said when it was connected to."""
        return self.control.greeting.version

    async def command(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Command one thing, or ask it; take :attr:`lock` for what changes the run state.

        :raises HypervisorError: no answer, or a refusal.
        """
        (answer,) = await self.command_all(Command(command, arguments))
        return answer

    async def command_all(self, *commands: Command) -> list[Any]:
        """Command several things in one go. :raises HypervisorError: the first that failed; all were executed."""
        try:
            return await self.control.execute_all(commands)
        except MonitorError as error:
            raise HypervisorError(str(error)) from error

    async def run_state(self) -> str:
        """QEMU's run state, asked in order with all commands."""
        return str((await self.command("query-status"))["status"])

    async def state(self) -> DomainState:
        """The domain's state; shut off where its process has ended meanwhile, and the driver has been told.

        A guest that runs is known to by QEMU's events; QEMU is asked why one stands still.

        :raises HypervisorError: QEMU is there and does not answer.
        """
        if self.running:
            return DomainState.RUNNING
        try:
            status = await self.run_state()
        except HypervisorError:
            if await self.is_ending():
                return DomainState.SHUT_OFF
            raise
        return _STATES.get(status, DomainState.PAUSED)

    async def is_ending(self) -> bool:
        """Whether the process has ended; one that has closed its monitor is about to, and is waited for."""
        if self.control.closed:
            with anyio.move_on_after(_QUIT_S):
                await self.gone.wait()
        return self.gone.is_set()

    async def quit_after(self, question: str) -> Any:
        """Ask a last thing and end the process in its own way, or by force if it does not; returns when it is gone.

        :raises HypervisorError: the question was not answered; the process is gone all the same.
        """
        try:
            answer, _ = await self.control.execute_all(
                [Command(question), Command("quit")], timeout_s=_QUIT_S
            )
        except MonitorError as error:
            raise HypervisorError(str(error)) from error
        finally:
            with anyio.move_on_after(_QUIT_S):
                await self.gone.wait()
            if not self.gone.is_set():
                await self.kill()
        return answer

    async def kill(self) -> None:
        """End the process by force; returns when it is gone."""
        self.process.signal(SIGKILL)
        await self.gone.wait()

    def write(self, record: GuestRecord) -> None:
        """Change what is written down about the process."""
        self.record = record
        self.run.write(record)


def _write_log(log: Path, argv: Sequence[str]) -> int:
    """Log a command line; returns where what the process prints begins."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} start: {' '.join(argv)}\n")
        return file.tell()


def _read_log(log: Path, begin: int) -> str:
    """The last of what a process printed."""
    with log.open("rb") as file:
        file.seek(begin)
        return file.read()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()


def clean_up(run: RunDirectory, record: GuestRecord) -> None:
    """Remove what a process that is gone has left."""
    if record.socket and record.migration:
        Path(record.socket).unlink(missing_ok=True)
    run.remove()
