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
from ferryman_qemu.storage import disks_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anyio.abc import TaskGroup

    from ferryman_qemu.machine import CommandLine
    from ferryman_qemu.qmp import Event
    from ferryman_qemu.root import GuestRecord, RunDirectory
    from ferryman_qemu.site import LocalSite

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
        log: Path,
        ended: Callable[[Guest, str, str], None],
        happened: Callable[[Guest, Event], None],
        greeting_s: float | None = None,
    ) -> None:
        self.record = record
        self.run = run
        self.process = process
        self.control = Monitor(stream, name=record.name, heard=self._heard, greeting_timeout_s=greeting_s)
        self.running = False
        self.may_have_run = True
        """False while it is certain that this process has not run its guest: nobody but us could tell it to."""
        self.stopped_at: float | None = None
        self.lock = anyio.Lock()
        self._watching = anyio.CancelScope()
        self.loaded = anyio.Event()
        self.listening = anyio.Event()
        self.incoming_failed = ""
        self.gone = anyio.Event()
        self.ending = ""
        self.saving = False
        self.changing = 0
        self.current_memory_bytes: int | None = None
        self.agent_lock = anyio.Lock()
        self.consoles: set[str] = set()
        self._log = log
        self._told = ("", "")
        self._ended = ended
        self._happened = happened

    # Starting and finding

    @classmethod
    async def start(
        cls,
        record: GuestRecord,
        run: RunDirectory,
        site: LocalSite,
        build: Callable[[LocalSite], CommandLine],
        *,
        log: Path,
        tasks: TaskGroup,
        ended: Callable[[Guest, str, str], None],
        happened: Callable[[Guest, Event], None],
    ) -> Guest:
        """Start a process and connect to it.

        :param build: writes the command line with what the site gives it.

        :raises HypervisorError: it did not start; the message holds the last of what it printed. Nothing is left.
        :cancellation: nothing is left.
        """
        process: Process | None = None
        stream: anyio.abc.UNIXSocketStream | None = None
        try:
            # Listening before it is started: the monitor answers when it is ready, and nobody has to look.
            with site:
                line = build(site)
                stream = await run.connect("control")
                begin = _write_log(log, line.argv)
                process = Process.spawn(
                    line.argv, output=log, inherited=site.inherited, environment=line.environment
                )
            record = replace(record, identity=process.identity, log_begin=begin, taps=site.taps)
            run.write(record)
            guest = cls(
                record=record,
                run=run,
                process=process,
                stream=stream,
                log=log,
                ended=ended,
                happened=happened,
            )
            guest.may_have_run = False
            await tasks.start(guest.control.run)
            if guest.control.closed:
                with anyio.move_on_after(_QUIT_S):
                    await process.wait()
                said = _read_log(log, begin) or guest.control.close_reason
                raise HypervisorError(f"QEMU did not start domain {record.name}: {said}")
            await guest.command_all(*(Command(name, arguments) for name, arguments in line.prelude))
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                if process is not None:
                    process.signal(SIGKILL)
                    await process.wait()
                    process.close()
                if stream is not None:
                    await anyio.aclose_forcefully(stream)
                site.abandon()
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
        log: Callable[[str], Path],
        tasks: TaskGroup,
        ended: Callable[[Guest, str, str], None],
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
            stream = await run.connect_control(record)
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
            log=log(record.name),
            ended=ended,
            happened=happened,
        )
        await tasks.start(guest.control.run)
        tasks.start_soon(guest._watch_process)
        with suppress(
            HypervisorError
        ):  # one that is silent or ending is found out when it is asked for something
            guest.running = await guest.run_state() == "running"
            await guest.learn_memory()
        return guest

    @classmethod
    async def adopt(
        cls,
        record: GuestRecord,
        run: RunDirectory,
        process: Process,
        stream: anyio.abc.UNIXSocketStream,
        *,
        log: Path,
        tasks: TaskGroup,
        ended: Callable[[Guest, str, str], None],
        happened: Callable[[Guest, Event], None],
    ) -> Guest:
        """Take in a process that somebody else has started.

        :raises HypervisorError: it does not answer; it goes on, and nothing of it is left here.
        """
        guest = cls(
            record=record,
            run=run,
            process=process,
            stream=stream,
            log=log,
            ended=ended,
            happened=happened,
            greeting_s=_QUIT_S,
        )
        try:
            await tasks.start(guest.control.run)
            guest.running = await guest.run_state() == "running"
        except BaseException:
            with anyio.CancelScope(shield=True):
                await guest.control.aclose()
            raise
        tasks.start_soon(guest._watch_process)
        return guest

    @classmethod
    async def look_on(
        cls, run: RunDirectory, *, log: Callable[[str], Path], tasks: TaskGroup
    ) -> Guest | None:
        """Look on at a process that another program drives, through the monitor for that; None where there is none.

        It can be asked; nothing of it may be changed or cleaned up.

        :raises HypervisorError: it does not answer, since a third program looks on at this moment.
        """
        record = run.read()
        if record is None or record.attached:
            return None  # an attached one has only the monitor that the other program holds
        process = Process.find(record.identity)
        if process is None:
            return None
        try:
            stream = await run.connect("read")
        except OSError as error:
            process.close()
            raise HypervisorError(f"domain {record.name} cannot be looked at: {error}") from error
        guest = cls(
            record=record,
            run=run,
            process=process,
            stream=stream,
            log=log(record.name),
            ended=_ignore,
            happened=_ignore,
        )
        await tasks.start(guest.control.run)
        tasks.start_soon(guest._watch_from_afar)
        return guest

    async def _watch_from_afar(self) -> None:
        try:
            await self.process.wait()
            self.gone.set()
        finally:
            self.process.close()

    async def let_go(self) -> None:
        """Forget a process that was adopted; it goes on."""
        self._watching.cancel()
        await self.control.aclose()
        self.process.close()
        self.run.remove()

    # Watching

    async def _watch_process(self) -> None:
        with self._watching:
            await self.process.wait()
        if self._watching.cancelled_caught:
            return
        with anyio.CancelScope(shield=True):
            await self.control.aclose()
        self.process.close()
        clean_up(self.run, self.record)
        self._ended(self, *self._why())
        # Last, so that who waits for it finds the guest gone everywhere.
        self.gone.set()

    def _why(self) -> tuple[str, str]:
        """How the process ended, and why; and write it into the log."""
        ending, detail = (self.ending, "") if self.ending else self._told
        if not ending:
            # Nobody asked for it, and QEMU said nothing on its monitor.
            ending, detail = "crashed", self.last_words()
        with suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"{_now()} end: {ending}\n")
        return ending, detail

    @property
    def unsettled(self) -> bool:
        """Whether the machine may come to differ from its definition by itself."""
        return bool(self.record.plugging or self.record.leaving)

    @property
    def end_is_told(self) -> bool:
        """Whether QEMU has said why its process is about to end."""
        return bool(self._told[0])

    def last_words(self) -> str:
        """The last that the process printed, at most 2000 bytes of it."""
        try:
            return _read_log(self._log, self.record.log_begin)
        except OSError as error:
            return f"{self._log} cannot be read: {error.strerror}"

    def _heard(self, event: Event) -> None:
        match event.name:
            case "STOP":
                self.running = False
                self.stopped_at = event.timestamp_s
            case "RESUME":
                self.running = True
                self._told = ("", "")  # it was reset, and goes on
            case "GUEST_PANICKED":
                self._told = ("crashed", "panicked")
                # QEMU stops it right after it has told of it, and says so a moment later.
                self.running = self.running and event.data.get("action") == "run"
            case "SHUTDOWN":
                if not self._told[0]:
                    self._told = ("shut-down", str(event.data.get("reason", "")))
            case "BALLOON_CHANGE":
                self.current_memory_bytes = int(str(event.data["actual"]))
            case "MIGRATION" if self.record.migration or self.record.restoring:
                self._incoming(str(event.data.get("status")))
        self._happened(self, event)

    def _incoming(self, status: str) -> None:
        if status == "completed":
            self.loaded.set()
        elif status == "postcopy-active":
            self.listening.set()
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

    async def learn_memory(self) -> None:
        """Ask what the balloon leaves the guest, which events keep up to date; nothing where there is none."""
        try:
            self.current_memory_bytes = int((await self.command("query-balloon"))["actual"])
        except HypervisorError as error:
            _log.info("what domain %s has of its memory is not known: %s", self.record.name, error)

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


def _ignore(*_told: object) -> None:
    """Take no notice: what happens to a guest that is only looked at is the other program's affair."""


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S%z")


def _write_log(log: Path, argv: Sequence[str]) -> int:
    """Log a command line; returns where what the process prints begins."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{_now()} start: {' '.join(argv)}\n")
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
        Path(disks_socket(record.socket)).unlink(missing_ok=True)
    run.remove()


async def first_of(*events: anyio.Event) -> None:
    """Wait for the first of some events."""
    async with anyio.create_task_group() as tasks:

        async def wait(event: anyio.Event) -> None:
            await event.wait()
            tasks.cancel_scope.cancel()

        for event in events:
            tasks.start_soon(wait, event)
