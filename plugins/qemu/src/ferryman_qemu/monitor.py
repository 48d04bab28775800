"""One QMP connection to one QEMU: commands, answers, events, descriptors.

::

    execute ----> waiting ----> outbox ----> socket ====> QEMU
                  (in band:     (bytes, in                 |
                   FIFO, at      stream order)             |
                   most 7 un-                              v
                   answered)    reader <==== socket <==== answers, events
                                  |-> the call with that id
                                  '-> every event stream that asked for that name

Rules this module keeps:

- Whoever waits for an answer may leave at any moment.  What has not begun to leave is withdrawn and was never executed;
  what has, is sent to its end by others, and its late answer is dropped.  So cancellation never cuts a line in two.
- A descriptor travels with the first byte of its command, and nothing follows that command before its answer, even
  when nobody waits for it any more: QEMU keeps only the descriptors that came last, and its main loop takes them
  without a lock while the monitor's thread may be looking at them because more has come (chardev/char-socket.c,
  tcp_chr_recv and tcp_get_msgfds).  A ``migrate`` right behind its ``getfd`` crashed QEMU 7.2 here.
- QEMU stops reading, and so ignores out-of-band commands too, when eight in-band commands are queued and none is being
  executed, which is what a silent main loop looks like.  Seven are the most that never silence it
  (monitor/qmp.c, handle_qmp_command; the specification's "eight" is one too many there).
- An answer to a command of an earlier connection arrives on the next one, when that command was still being executed
  (seen on QEMU 7.2).  Ids therefore start at a random number, and an answer to an unknown id is dropped.
- The peer's death is noticed by reading to the end: the events it sent before are delivered.

The errors::

    MonitorError
     +-- QMPCommandError       QEMU refused or failed the command
     +-- MonitorTimeout        no answer in time
     +-- MonitorClosedError    the connection is gone
     +-- CommandNotSentError   the command could not be sent, so it was not executed
     +-- EventsLostError       an event stream was read too slowly
"""

from __future__ import annotations

import array
import enum
import errno
import logging
import secrets
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import anyio
import anyio.abc
import anyio.lowlevel

from ferryman_qemu.qmp import Event, Failure, Greeting, QMPCodec, QMPProtocolError, Reply

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from ferryman_qemu.qmp import Message

__all__ = [
    "Command",
    "CommandNotSentError",
    "EventStream",
    "EventsLostError",
    "Monitor",
    "MonitorClosedError",
    "MonitorError",
    "MonitorTimeout",
    "QMPCommandError",
]

IN_BAND_MAX: Final = 7
"""In-band commands unanswered at a time; more of them wait here, so that QEMU always reads out-of-band commands."""

FDS_MAX: Final = 16
"""Descriptors that QEMU takes with one command (TCP_MAX_FDS in chardev/char-socket.c)."""

EVENT_BACKLOG_MAX: Final = 10_000
"""Unread events that one stream keeps."""

_RECEIVE_BYTES: Final = 65536
_DRAIN_S: Final = 5.0  # from "the peer does not read any more" to its end of stream
_NO_FDS: Final = array.array("i")
_SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_PEER_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})

_log = logging.getLogger(__name__)


class MonitorError(Exception):
    """Root of what a monitor raises; the driver turns it into Ferryman's errors."""


class QMPCommandError(MonitorError):
    """QEMU answered that it refused or failed the command; the connection stays usable.

    :ivar command: its name.
    :ivar error_class: for programs, such as ``GenericError`` or ``CommandNotFound``.
    :ivar description: for people.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(command, error_class, description)
        self.command = command
        self.error_class = error_class
        self.description = description

    def __str__(self) -> str:
        return f"QEMU failed {self.command!r}: {self.description} ({self.error_class})"


class MonitorTimeout(MonitorError):
    """QEMU did not answer in time; the connection stays usable, and a late answer is dropped.

    :ivar name: of the monitor.
    :ivar command: its name.
    :ivar timeout_s: how long the answer was waited for, in seconds.
    :ivar sent: False: the command did not leave and never will, so it is not executed.  True: whether it was or will
        be executed is unknown.
    """

    def __init__(self, name: str, command: str, timeout_s: float, *, sent: bool) -> None:
        super().__init__(name, command, timeout_s, sent)
        self.name = name
        self.command = command
        self.timeout_s = timeout_s
        self.sent = sent

    def __str__(self) -> str:
        fate = "it may still be executed" if self.sent else "it was withdrawn before it was sent"
        return f"{self.name}: QEMU did not answer {self.command!r} within {self.timeout_s:g} s, {fate}"


class MonitorClosedError(MonitorError):
    """The connection to QEMU is gone.

    :ivar name: of the monitor.
    :ivar reason: why, as a phrase; the same for everybody who waited.
    :ivar sent: True: the command may have reached QEMU, and whether it was executed is unknown.  False: it did not
        leave, or there was none.
    """

    def __init__(self, name: str, reason: str, *, sent: bool = False) -> None:
        super().__init__(name, reason, sent)
        self.name = name
        self.reason = reason
        self.sent = sent

    def __str__(self) -> str:
        return f"{self.name}: the monitor is closed, {self.reason}"


class CommandNotSentError(MonitorError):
    """The command could not be sent, so it was not executed; the connection stays usable.

    :ivar command: its name.
    """

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(command, reason)
        self.command = command
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.command!r} was not sent: {self.reason}"


class EventsLostError(MonitorError):
    """More than :data:`EVENT_BACKLOG_MAX` events waited unread in a stream, and later ones were not kept."""


class _PeerError(Exception):
    """The peer speaks QMP but breaks its rules."""


class _State(enum.Enum):
    NEW = "new"
    STARTING = "starting"
    OPEN = "open"
    CLOSED = "closed"


class Command(NamedTuple):
    """A command for :meth:`Monitor.execute_all`; the fields are the parameters of :meth:`Monitor.execute`."""

    name: str
    arguments: Mapping[str, object] | None = None
    fds: Sequence[int] = ()


class _Call:
    """A command on its way; settled when ``done`` is set, and then answered, refused here, or cut off."""

    __slots__ = (
        "carries_fds",
        "done",
        "id",
        "in_band",
        "name",
        "outcome",
        "refusal",
        "started",
        "unsent",
        "unsent_fds",
    )

    def __init__(self, call_id: int, line: bytes, *, name: str, fds: Sequence[int], in_band: bool) -> None:
        self.id = call_id
        self.name = name
        self.unsent = memoryview(line)
        self.unsent_fds = array.array("i", fds)
        self.carries_fds = bool(fds)
        self.in_band = in_band
        self.started = False  # at least its first byte has left
        self.outcome: Reply | Failure | None = None
        self.refusal: OSError | None = None
        self.done = anyio.Event()


class EventStream:
    """The events of some names, in the order QEMU sent them, from entering the context to leaving it.

    One task at a time may read.  Made by :meth:`Monitor.events`.
    """

    def __init__(self, monitor: Monitor, names: frozenset[str]) -> None:
        self._monitor = monitor
        self._names = names
        self._backlog: deque[Event] = deque()
        self._arrived: anyio.Event | None = None
        self._guard = anyio.ResourceGuard("reading events from")
        self._overflown = False
        self._subscribed = False

    def __enter__(self) -> Self:
        if self._subscribed:
            raise RuntimeError("this event stream has been entered already")
        self._subscribed = True
        self._monitor._streams.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._subscribed = False
        self._monitor._streams.remove(self)
        self._backlog.clear()
        self._wake()

    async def get(self) -> Event:
        """Wait for the next event.

        :raises MonitorClosedError: the connection is gone, and everything it delivered has been read.
        :raises EventsLostError: the events up to the first lost one have been read; it stays so.
        :raises anyio.ClosedResourceError: outside the context.
        :raises anyio.BusyResourceError: another task reads.
        :cancellation: loses no event.
        """
        with self._guard:
            await anyio.lowlevel.checkpoint_if_cancelled()
            while not self._backlog:
                if not self._subscribed:
                    raise anyio.ClosedResourceError
                if self._overflown:
                    raise EventsLostError(
                        f"{self._monitor.name}: more than {EVENT_BACKLOG_MAX} events waited unread, later ones are lost"
                    )
                self._monitor._require_not_closed()
                self._arrived = anyio.Event()
                await self._arrived.wait()
            return self._backlog.popleft()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """As :meth:`get`: the iteration ends by an error, because a connection's end is never routine."""
        return await self.get()

    def _put(self, event: Event) -> None:
        if self._overflown or (self._names and event.name not in self._names):
            return
        if len(self._backlog) >= EVENT_BACKLOG_MAX:
            self._overflown = True
            _log.error("events are lost: a stream is not read", extra={"monitor": self._monitor.name})
            return
        self._backlog.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None:
            self._arrived.set()


class Monitor:
    """A QMP connection.

    The owner runs its reader as a task: ``await task_group.start(monitor.run)``.

    :param stream: connected, nothing read yet; the monitor owns it from here on.  A UNIX socket passes descriptors and
        sends without a task switch; any other byte stream does neither.
    :param name: of the domain or process behind it, for messages.
    :param heard: is called with every event, in order, before anybody who waits for it or for a later answer; must
        neither block nor raise.
    :param command_timeout_s: default limit for an answer, in seconds, at least 0; ``math.inf`` waits for ever.
    :param greeting_timeout_s: limit for greeting and negotiation together, in seconds; None means
        ``command_timeout_s``.
    """

    def __init__(
        self,
        stream: anyio.abc.ByteStream,
        *,
        name: str,
        heard: Callable[[Event], None] | None = None,
        command_timeout_s: float = 30.0,
        greeting_timeout_s: float | None = None,
    ) -> None:
        self.name = name
        self._heard = heard
        self._stream = stream
        self._socket: socket.socket | None = (
            stream.extra(anyio.abc.SocketAttribute.raw_socket)
            if isinstance(stream, anyio.abc.UNIXSocketStream)
            else None
        )
        self._command_timeout_s = command_timeout_s
        self._greeting_timeout_s = command_timeout_s if greeting_timeout_s is None else greeting_timeout_s
        self._codec = QMPCodec(first_id=secrets.randbelow(1 << 52))
        self._state = _State.NEW
        self._ran = False
        self._signalled = False
        self._scope = anyio.CancelScope()
        self._finished = anyio.Event()
        self._close_reason: str | None = None
        self._close_cause: Exception | None = None
        self._greeting: Greeting | None = None
        self._oob = False
        self._calls: dict[int, _Call] = {}
        self._waiting: deque[_Call] = deque()
        self._outbox: deque[_Call] = deque()
        self._in_band = 0
        self._fd_call: _Call | None = None
        self._deaf = False  # the peer does not read any more, but may have sent something to read
        self._writer_needed = anyio.Event()
        self._streams: list[EventStream] = []

    @property
    def closed(self) -> bool:
        """True from the moment that pending calls fail; the stream closes a little later, see :meth:`wait_closed`."""
        return self._state is _State.CLOSED

    @property
    def close_reason(self) -> str | None:
        """Why the monitor closed, as a phrase; None while it is not closed."""
        return self._close_reason

    @property
    def oob(self) -> bool:
        """Whether out-of-band execution was offered and enabled."""
        return self._oob

    @property
    def greeting(self) -> Greeting:
        """What QEMU said about itself.

        :raises MonitorClosedError: the connection ended before.
        :raises RuntimeError: the monitor is not started.
        """
        if self._greeting is None:
            self._require_not_closed()
            raise RuntimeError(f"{self.name}: no greeting yet, the monitor is {self._state.value}")
        return self._greeting

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Greet, negotiate, then read until the connection ends.

        Signals that it started when commands can be executed, or when the connection ended before that: a dead, silent
        or senseless peer is never an exception here but :attr:`close_reason`, and :class:`MonitorClosedError` for every
        call.

        :raises RuntimeError: it runs or ran already.
        :cancellation: closes the stream; pending calls fail with :class:`MonitorClosedError`.
        """
        if self._ran:
            raise RuntimeError(f"{self.name}: run needs a new monitor, this one is {self._state.value}")
        self._ran = True
        if self._state is _State.NEW:
            self._state = _State.STARTING
            try:
                with self._scope:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._write)
                        await self._read(task_status)
                        tasks.cancel_scope.cancel()
            finally:
                self._shut("its reader task ended")
                # Only now: nobody reads, writes or polls the stream any more.
                await self._close_stream()
        if not self._signalled:
            task_status.started()

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, object] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> Any:
        """Execute a command in band: after all earlier ones, in QEMU's main loop.

        :param arguments: JSON values all the way down.
        :param fds: at most :data:`FDS_MAX` open descriptors, passed along for a command that takes them (``getfd``,
            ``add-fd``); they stay open here, and may be closed when this returns or raises.
        :param timeout_s: limit for the answer, in seconds, the wait for earlier commands included; None means the
            monitor's.
        :returns: the command's value as JSON decodes it.
        :raises QMPCommandError: QEMU refused or failed it.
        :raises MonitorTimeout: no answer in time; ``sent`` says whether it may still be executed.
        :raises MonitorClosedError: the connection is gone; ``sent`` says whether it may have been executed.
        :raises CommandNotSentError: it was not executed: the descriptors cannot be passed.
        :raises TypeError: as for :meth:`QMPCodec.command`, nothing was sent.
        :raises ValueError: likewise, or too many descriptors.
        :raises RuntimeError: the monitor is not open yet.
        :cancellation: a command that has not begun to leave is withdrawn; any other may or may not be executed, and its
            answer is dropped.  The connection stays usable.
        """
        (value,) = await self._execute([Command(name, arguments, fds)], timeout_s=timeout_s, in_band=True)
        return value

    async def execute_all(self, commands: Sequence[Command], *, timeout_s: float | None = None) -> list[Any]:
        """Execute some commands in band, sent in one go: in their order, and each whether or not earlier ones failed.

        :param timeout_s: limit for the last answer; otherwise everything is as for :meth:`execute`.
        :raises QMPCommandError: of the first that failed; every one was executed.
        """
        return await self._execute(commands, timeout_s=timeout_s, in_band=True)

    async def execute_oob(
        self, name: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        """Execute a command out of band: at once, even while QEMU's main loop is silent.

        Few commands allow it; ``yank``, ``migrate-recover`` and ``migrate-pause`` do.  Otherwise as :meth:`execute`.

        :raises CommandNotSentError: this QEMU or this connection has no out-of-band execution.
        """
        self._require_open()
        if not self._oob:
            raise CommandNotSentError(name, "QEMU does not offer out-of-band execution here")
        (value,) = await self._execute([Command(name, arguments)], timeout_s=timeout_s, in_band=False)
        return value

    def events(self, *names: str) -> EventStream:
        """Subscribe to events, within the returned object's context.

        :param names: such as ``"STOP"``; none means all.
        :returns: a context manager and asynchronous iterator; it may be entered before the monitor runs.
        :source: QEMU sends no event before capabilities are negotiated, and merges some within a second.
        """
        return EventStream(self, frozenset(names))

    async def wait_closed(self) -> None:
        """Wait until the connection is gone and its stream closed.

        Never returns on a monitor that nobody runs or closes.
        """
        await self._finished.wait()

    async def aclose(self) -> None:
        """Close the connection; pending calls fail with :class:`MonitorClosedError`.

        QEMU drops what it has not begun to execute.  Closing twice is no error.

        :cancellation: the connection closes all the same, a little later.
        """
        self._shut("its owner closed it")
        if self._ran:
            self._scope.cancel()
        else:
            await self._close_stream()
        await self._finished.wait()

    async def _close_stream(self) -> None:
        # Shielded, or a cancellation from outside would end this before the wait for the end is over.
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)
        self._finished.set()

    async def _execute(
        self, commands: Sequence[Command], *, timeout_s: float | None, in_band: bool
    ) -> list[Any]:
        self._require_open()
        limit_s = self._command_timeout_s if timeout_s is None else timeout_s
        calls = [self._make_call(command, in_band=in_band) for command in commands]
        with anyio.move_on_after(limit_s):
            # Whoever is cancelled already must not start a guest on the way out.
            await anyio.lowlevel.checkpoint_if_cancelled()
            for call in calls:
                self._submit(call)
            try:
                for call in calls:
                    await call.done.wait()
            finally:
                for call in reversed(calls):
                    if not call.done.is_set() and not call.started:
                        self._withdraw(call)
        return [self._value(call, limit_s) for call in calls]

    def _make_call(self, command: Command, *, in_band: bool) -> _Call:
        if command.fds:
            if len(command.fds) > FDS_MAX:
                raise ValueError(
                    f"QEMU takes at most {FDS_MAX} descriptors with a command, not {len(command.fds)}"
                )
            if self._socket is None:
                raise CommandNotSentError(command.name, "only a UNIX socket passes descriptors")
        call_id, line = self._codec.command(command.name, command.arguments, oob=not in_band)
        return _Call(call_id, line, name=command.name, fds=command.fds, in_band=in_band)

    def _value(self, call: _Call, limit_s: float) -> Any:
        match call.outcome:
            case Reply(value=value):
                return value
            case Failure(error_class=error_class, description=description):
                raise QMPCommandError(call.name, error_class, description)
        if call.refusal is not None:
            raise CommandNotSentError(call.name, "its descriptors cannot be passed") from call.refusal
        self._require_not_closed(sent=call.started)
        raise MonitorTimeout(self.name, call.name, limit_s, sent=call.started)

    def _submit(self, call: _Call) -> None:
        self._calls[call.id] = call
        if call.in_band:
            self._waiting.append(call)
            self._admit()
        else:
            self._outbox.append(call)
            self._flush()

    def _admit(self) -> None:
        """Let commands leave as long as QEMU keeps reading behind them."""
        while self._waiting and self._in_band < IN_BAND_MAX:
            call = self._waiting[0]
            if call.carries_fds:
                if self._fd_call is not None:
                    break
                self._fd_call = call
            self._waiting.popleft()
            self._in_band += 1
            self._outbox.append(call)
        self._flush()

    def _withdraw(self, call: _Call) -> None:
        """Take back a command of which no byte has left."""
        if self._calls.pop(call.id, None) is None:
            return  # the monitor has closed meanwhile
        if call in self._waiting:
            self._waiting.remove(call)
        else:
            self._outbox.remove(call)
            self._release(call)
        self._admit()

    def _release(self, call: _Call) -> None:
        if call.in_band:
            self._in_band -= 1
        if self._fd_call is call:
            self._fd_call = None

    def _next_to_leave(self) -> _Call | None:
        """The call whose bytes are sent next; None while there is none, or while descriptors have not been taken."""
        if not self._outbox:
            return None
        call, carrier = self._outbox[0], self._fd_call
        held = carrier is not None and carrier.started and carrier is not call
        return None if held else call

    def _flush(self) -> None:
        """Send what the socket takes now; leave the rest to the writer task."""
        if self._socket is None:
            if self._outbox:
                self._writer_needed.set()
            return
        while not self._deaf and (call := self._next_to_leave()) is not None:
            try:
                if call.unsent_fds:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, call.unsent_fds)
                    sent = self._socket.sendmsg([call.unsent], [rights], _SEND_FLAGS)
                else:
                    sent = self._socket.send(call.unsent, _SEND_FLAGS)
            except BlockingIOError:
                self._writer_needed.set()
                return
            except OSError as error:
                self._on_send_error(call, error)
                continue
            call.started = True
            call.unsent_fds = _NO_FDS
            call.unsent = call.unsent[sent:]
            if not call.unsent:
                self._outbox.popleft()

    def _on_send_error(self, call: _Call, error: OSError) -> None:
        if error.errno in _PEER_GONE:
            self._deaf = True
            self._writer_needed.set()
        elif call.unsent_fds:
            # A bad descriptor, or too many in flight: the fault is this command's, and nothing of it has left.
            self._outbox.popleft()
            del self._calls[call.id]
            self._release(call)
            call.refusal = error
            call.done.set()
        else:
            self._deaf = True
            self._shut(f"sending failed ({error.strerror})", error)
            self._scope.cancel()

    async def _write(self) -> None:
        while True:
            if self._deaf:
                await anyio.sleep(_DRAIN_S)
                self._shut("QEMU does not read its monitor any more")
                self._scope.cancel()
            elif (call := self._next_to_leave()) is None:
                self._writer_needed = anyio.Event()
                await self._writer_needed.wait()
            elif self._socket is not None:
                await anyio.wait_writable(self._socket)
                self._flush()
            else:
                call.started = True
                try:
                    await self._stream.send(bytes(call.unsent))
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    self._deaf = True
                else:
                    self._outbox.popleft()

    async def _read(self, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            with anyio.move_on_after(self._greeting_timeout_s):
                await self._negotiate()
            if self._state is _State.STARTING:
                self._shut(f"QEMU did not greet and negotiate within {self._greeting_timeout_s:g} s")
            if self._state is _State.CLOSED:
                return
            self._signalled = True
            task_status.started()
            while True:
                await self._receive()
        except anyio.EndOfStream:
            try:
                self._codec.eof()
            except QMPProtocolError as error:
                self._shut("QEMU closed it in the middle of a message", error)
            self._shut("QEMU closed it")
        except anyio.BrokenResourceError as error:
            self._shut("the connection to QEMU broke", error)
        except anyio.ClosedResourceError as error:
            self._shut("somebody else closed its stream", error)
        except QMPProtocolError as error:
            self._shut(f"what QEMU sent is not QMP ({error.reason})", error)
        except _PeerError as error:
            self._shut(str(error), error)

    async def _negotiate(self) -> None:
        while self._greeting is None:
            await self._receive()
        arguments = {"enable": ["oob"]} if self._greeting.oob else None
        call_id, line = self._codec.command("qmp_capabilities", arguments)
        call = _Call(call_id, line, name="qmp_capabilities", fds=(), in_band=True)
        self._submit(call)
        while call.outcome is None:
            await self._receive()
        if isinstance(call.outcome, Failure):
            raise _PeerError(f"QEMU refused to negotiate ({call.outcome.description})")
        self._oob = self._greeting.oob
        if self._state is _State.STARTING:
            self._state = _State.OPEN

    async def _receive(self) -> None:
        data = await self._receive_bytes()
        # Bytes may win against a cancellation, but nothing is dispatched any more once the monitor has been shut.
        await anyio.lowlevel.checkpoint_if_cancelled()
        try:
            messages: Sequence[Message] = self._codec.feed(data)
        except QMPProtocolError as error:
            self._dispatch(error.messages)
            raise
        self._dispatch(messages)

    async def _receive_bytes(self) -> bytes:
        if self._socket is None:
            return await self._stream.receive(_RECEIVE_BYTES)
        # Not through the stream: it gives the loop a turn before each look, and asyncio describes its socket anew for
        # each wait, a fifth of what Python does in a migration.
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                await anyio.wait_readable(self._socket.fileno())
            except OSError as error:
                raise anyio.BrokenResourceError from error
            else:
                if not data:
                    raise anyio.EndOfStream
                if len(data) == _RECEIVE_BYTES:
                    await anyio.lowlevel.checkpoint()  # a flood: others get their turn
                return data

    def _dispatch(self, messages: Sequence[Message]) -> None:
        for message in messages:
            match message:
                case Event():
                    if self._heard is not None:
                        self._heard(message)
                    for stream in self._streams:
                        stream._put(message)
                case Failure(id=None):
                    # One of the unanswered commands, but nobody can tell which.
                    raise _PeerError(f"QEMU did not understand a command ({message.description})")
                case Reply(id=int(call_id)) | Failure(id=int(call_id)):
                    self._settle(call_id, message)
                case Greeting():
                    if self._greeting is not None:
                        raise _PeerError("QEMU greeted twice")
                    self._greeting = message

    def _settle(self, call_id: int, answer: Reply | Failure) -> None:
        call = self._calls.get(call_id)
        if call is None or not call.started:
            _log.warning("an answer to no command of this connection", extra={"monitor": self.name})
            return
        del self._calls[call_id]
        call.outcome = answer
        call.done.set()
        self._release(call)
        self._admit()

    def _shut(self, reason: str, cause: Exception | None = None) -> None:
        """Fail everything that waits; the first reason stays."""
        if self._state is _State.CLOSED:
            return
        self._state = _State.CLOSED
        self._close_reason = reason
        self._close_cause = cause
        _log.debug("monitor closed: %s", reason, extra={"monitor": self.name})
        calls = tuple(self._calls.values())
        self._calls.clear()
        self._waiting.clear()
        self._outbox.clear()
        for call in calls:
            call.done.set()
        for stream in self._streams:
            stream._wake()

    def _require_open(self) -> None:
        self._require_not_closed()
        if self._state is not _State.OPEN:
            raise RuntimeError(
                f"{self.name}: a command needs an open monitor, this one is {self._state.value}"
            )

    def _require_not_closed(self, *, sent: bool = False) -> None:
        if self._close_reason is not None:
            raise MonitorClosedError(self.name, self._close_reason, sent=sent) from self._close_cause
