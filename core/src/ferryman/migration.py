"""The caller's side of a migration: drives the five phases over two hosts, and decides nothing.

::

    source                caller                destination
      |<-- begin -----------|                        |
      |--- passport ------->|------ prepare -------->|   receiver starts
      |                     |<----- receipt ---------|
      |<-- perform ---------|                        |
      |=========== state of the guest ==============>|
      |--- proof, kept ---->|------ decide --------->|   guest runs
      |                     |<----- claim, refusal --|
      |<-- confirm ---------|                        |
    lets go, or resumes

Whatever the caller does or omits, the hosts keep the rules of :mod:`ferryman.handover`.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

import anyio

from ferryman.engine import Confirmed, Finished, Performed, Prepared, new_migration_id
from ferryman.errors import (
    BeginError,
    ConfirmError,
    ConnectionClosedError,
    DomainNotFoundError,
    DomainStateError,
    FerrymanError,
    FinishError,
    GuestLostError,
    InDoubtError,
    MigrationAbortedError,
    MigrationError,
    NotSupportedError,
    PaperError,
    PerformError,
    PlanBlockedError,
    PlanStaleError,
    PrepareError,
)
from ferryman.handover import PaperKind, decode_cookie, with_kind
from ferryman.hookspecs import DomainRequest, ObservedEvent
from ferryman.plan import make_plan
from ferryman.types import (
    DomainInfo,
    Feature,
    GuestState,
    MigrationEvent,
    MigrationId,
    MigrationOptions,
    MigrationResult,
    Phase,
    PhaseEvent,
    Postcopy,
    ProgressEvent,
    SettledEvent,
    Side,
    TimeoutAction,
    TransferStatistics,
    Tuning,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence

    from anyio.abc import TaskGroup

    from ferryman.connection import Connection, Domain
    from ferryman.engine import Begun
    from ferryman.plan import Plan

_log = logging.getLogger(__name__)

_ASK_FIRST_S = 0.02
_ASK_LONGEST_S = 2.0
_CANCEL_S = 5.0
_PROGRESS_KEPT = 1_000
_OBSERVERS_S = 5.0
"""How long observers have for the last events; the migration is over by then, and the caller is waiting."""

_ERRORS: dict[Phase, type[MigrationError]] = {
    Phase.BEGIN: BeginError,
    Phase.PREPARE: PrepareError,
    Phase.PERFORM: PerformError,
    Phase.FINISH: FinishError,
    Phase.CONFIRM: ConfirmError,
}


@dataclass(slots=True)
class _Outcome:
    """How a phase ended: the error's code, or None."""

    code: str | None = None


class MigrationJob:
    """One migration: awaitable for its result, or a context manager to watch and steer it.

    ::

        async with domain.migrate(destination) as job:
            async for event in job.progress():
                ...
        result = await job.result()

    Leaving the block waits for the end; an exception or a cancellation in it aborts first.  An error of the migration
    is raised on leaving, unless :meth:`result` has raised it before.

    :cancellation: the safe abort: before the destination has decided the guest stays at the source; afterwards the
        migration is completed.  Either way the wait is bounded by the options' ``patience_s``, and the cancellation
        then goes on.
    """

    def __init__(
        self, domain: Domain, destination: Connection, options: MigrationOptions, *, plan: Plan | None = None
    ) -> None:
        self.domain = domain
        self.destination = destination
        self.options = options
        self.plan = plan
        self.id: MigrationId | None = None
        self._timed_out = False
        self._shown = plan
        self._tasks: TaskGroup | None = None
        self._result: MigrationResult | None = None
        self._error: FerrymanError | None = None
        self._error_told = False
        self._done = anyio.Event()
        self._changed = anyio.Event()
        self._sending = anyio.Event()
        self._first_pass = anyio.Event()
        self._performed = anyio.Event()
        self._receipt: bytes | None = None
        self._abort_asked = anyio.Event()
        self._phase_scope: anyio.CancelScope | None = None
        self._own_id = new_migration_id()
        self._expecting = anyio.CancelScope()
        self._observing = anyio.CancelScope()
        self._start_s = 0.0
        self._events: deque[MigrationEvent] = deque(maxlen=_PROGRESS_KEPT)
        self._events_seen = 0
        self._phase_ms: dict[Phase, float] = {}
        self._rolled_back: list[str] = []

    # Using it

    def __await__(self) -> Generator[object, None, MigrationResult]:
        return self._run_through().__await__()

    async def _run_through(self) -> MigrationResult:
        async with self:
            return await self.result()

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise RuntimeError(
                "a migration job is entered once: make another one with migrate() or execute()"
            )
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._main)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        assert self._tasks is not None
        if kind is not None:
            self.abort()
        try:
            await self._done.wait()
        except anyio.get_cancelled_exc_class():
            self.abort()
            raise
        finally:
            # The block's own exception stays out of the group, which would wrap it in an ExceptionGroup.
            await self._tasks.__aexit__(None, None, None)
        if kind is None and self._error is not None and not self._error_told:
            self._error_told = True
            raise self._error

    async def result(self) -> MigrationResult:
        """Wait for the end.

        :raises PlanBlockedError: nothing was started.
        :raises MigrationError: with ``guest_state``: where the guest is.
        :cancellation: ends the wait, not the migration; use :meth:`abort`.
        """
        await self._done.wait()
        if self._error is not None:
            self._error_told = True
            raise self._error
        assert self._result is not None
        return self._result

    def progress(self) -> AsyncIterator[MigrationEvent]:
        """Follow the events from the first one, in order; the last is a :class:`~ferryman.types.SettledEvent`.

        A reader that is more than 1,000 events behind misses the oldest ones.
        """
        return self._follow()

    async def _follow(self) -> AsyncGenerator[MigrationEvent, None]:
        seen = 0
        while True:
            changed = self._changed
            first = self._events_seen - len(self._events)
            pending = list(self._events)[max(0, seen - first) :]
            seen = self._events_seen
            for event in pending:
                yield event
                if isinstance(event, SettledEvent):
                    return
            if seen == self._events_seen:
                await changed.wait()

    def abort(self) -> None:
        """Ask for an abort; returns at once, and :meth:`result` tells what came of it.

        Before the destination has decided the guest stays at the source, running as before.  Too late is no error:
        the migration then succeeds.
        """
        self._abort_asked.set()
        if self._phase_scope is not None:
            self._phase_scope.cancel()

    async def set_bandwidth(self, bandwidth_bytes_per_s: int) -> None:
        """Change the cap of the transfer; 0 removes it.  Waits until the transfer has begun.

        :raises NotSupportedError: the driver cannot. :raises DomainStateError: the transfer is over.
        """
        await self._tune(Tuning(bandwidth_bytes_per_s=bandwidth_bytes_per_s), Feature.BANDWIDTH_IN_FLIGHT)

    async def set_max_downtime(self, max_downtime_ms: int) -> None:
        """Change the longest stop that the hypervisor may plan for.  Errors as :meth:`set_bandwidth`."""
        await self._tune(Tuning(max_downtime_ms=max_downtime_ms), Feature.MAX_DOWNTIME_IN_FLIGHT)

    async def set_postcopy_bandwidth(self, bandwidth_bytes_per_s: int) -> None:
        """Change the cap of what is sent in post-copy; 0 removes it.  Errors as :meth:`set_bandwidth`."""
        await self._tune(Tuning(postcopy_bandwidth_bytes_per_s=bandwidth_bytes_per_s), Feature.POSTCOPY)

    async def set_copy_bandwidth(self, bandwidth_bytes_per_s: int) -> None:
        """Change the cap of the copy of each disk; 0 removes it.  Errors as :meth:`set_bandwidth`."""
        await self._tune(Tuning(copy_bandwidth_bytes_per_s=bandwidth_bytes_per_s), Feature.COPY_STORAGE)

    async def switch_to_postcopy(self) -> None:
        """Let the guest go on at the destination now, and the rest of its memory follow.

        From here on the guest is lost if either host is, or the network between them for good.  The destination pledges
        itself first, durably; a transfer that ends meanwhile needs no switch, which is no error.

        :raises NotSupportedError: the drivers cannot, or the option ``postcopy`` did not allow it.
        :raises MigrationError: the migration has ended, or the destination does not pledge itself; nothing was changed.
        """
        await self._sending.wait()
        if self.plan is None or self.id is None:
            assert self._error is not None
            raise self._error
        if self.plan.effective.postcopy is None:
            raise NotSupportedError(
                "post-copy was not allowed when the migration began: set the option postcopy"
            )
        source = self.plan.source.host
        if self._receipt is None or self._performed.is_set():
            return
        finished = await self.plan.destination.host.decide(with_kind(self._receipt, PaperKind.SWITCH))
        if finished.kind is not PaperKind.PLEDGE:
            raise PerformError(
                f"the destination does not pledge itself: {finished.reason or finished.kind.value}",
                phase=Phase.PERFORM,
                side=Side.DESTINATION,
                domain=self.domain.name,
                guest_state=GuestState.SOURCE,
            )
        try:
            await source.switch(finished.cookie)
        except DomainStateError:
            if not self._performed.is_set():
                raise

    async def suspend(self) -> None:
        """Pause the guest, so that its memory changes no more and the transfer ends; it runs again where it ends up.

        :raises HypervisorError: it could not be paused, and goes on.
        """
        # Not by Domain.suspend(), which leaves alone what a migration has locked.
        request = DomainRequest(uuid=self.domain.uuid, name=self.domain.name)
        await self.domain.connection.hooks.call("domain_suspend", request, type(None))

    async def _tune(self, tuning: Tuning, feature: Feature) -> None:
        source = self.domain.connection
        if feature not in (await source.capabilities()).features:
            raise NotSupportedError(f"the driver {source.hooks.distribution} does not have {feature.value}")
        await self._sending.wait()
        if self.id is None:
            assert self._error is not None
            raise self._error
        await source.host.tune(self.id, tuning)

    # Running it

    async def _main(self) -> None:
        # The protocol is never torn: a cancelled caller aborts through abort(), and every wait in here is bounded.
        with anyio.CancelScope(shield=True):
            self._start_s = anyio.current_time()
            async with anyio.create_task_group() as beside:
                self._show_events(beside)
                state, code = GuestState.SOURCE, None
                try:
                    plan = await self._planned(beside)
                    self._start_s = anyio.current_time()
                    self._result = await self._phases(plan, beside)
                    state = GuestState.DESTINATION
                except FerrymanError as error:
                    self._error, code = error, error.code
                    if isinstance(error, MigrationError):
                        error.rolled_back = tuple(self._rolled_back)
                        error.domain = error.domain or self.domain.name
                        state = error.guest_state or GuestState.SOURCE
                finally:
                    # Everything that runs beside the phases ends by these.
                    self._expecting.cancel()
                    self._sending.set()
                    self._performed.set()
                    self._first_pass.set()
                    self._abort_asked.set()
                    self._done.set()
                    self._emit(SettledEvent(guest_state=state, elapsed_ms=self._elapsed_ms(), error=code))
                    self._observing.deadline = anyio.current_time() + _OBSERVERS_S
            if self._observing.cancelled_caught:
                _log.warning("an observer did not see all events within %g s of the end", _OBSERVERS_S)

    async def _planned(self, beside: TaskGroup) -> Plan:
        with self._abortable():
            try:
                plan = await make_plan(
                    self.domain,
                    self.destination,
                    self.options,
                    likely=partial(self._start_expecting, beside),
                )
            except DomainNotFoundError as error:
                if self._shown is None:
                    raise
                gone = f"domain {self.domain.name} is no longer at the source"
                raise PlanStaleError(gone, changes=[gone], domain=self.domain.name) from error
        self._check_abort(None, None)
        if self._shown is not None:
            changes = self._shown.changes(plan)
            if changes:
                raise PlanStaleError(
                    f"the world changed since the plan was shown ({'; '.join(changes)}): plan again",
                    changes=changes,
                    domain=plan.info.name,
                )
        self.plan = plan
        if plan.blockers:
            first = plan.blockers[0]
            more = f", and {len(plan.blockers) - 1} more" if len(plan.blockers) > 1 else ""
            raise PlanBlockedError(
                f"the migration is blocked: {first.message}: {first.remedy}{more}",
                findings=plan.blockers,
                domain=plan.info.name,
            )
        return plan

    def _start_expecting(
        self, beside: TaskGroup, domain: DomainInfo, definition: str, options: MigrationOptions
    ) -> None:
        beside.start_soon(self._expect, domain, definition, options)

    async def _expect(self, domain: DomainInfo, definition: str, options: MigrationOptions) -> None:
        """Let the destination start what it will need, until it has prepared or will not."""
        with self._expecting:
            await self.destination.host.expect(self._own_id, domain, definition, options)

    async def _phases(self, plan: Plan, beside: TaskGroup) -> MigrationResult:
        begun = await self._begin(plan)
        beside.start_soon(self._renew, plan, begun.id)
        prepared = await self._prepare(plan, begun)
        setup_ms = self._elapsed_ms()
        self._receipt = prepared.cookie
        beside.start_soon(self._abort_transfer, begun.id)
        if plan.effective.timeout_s is not None:
            beside.start_soon(self._watch_time, plan.effective.timeout_s, plan.effective.timeout_action)
        if plan.effective.postcopy is Postcopy.AFTER_FIRST_PASS:
            beside.start_soon(self._switch_after_first_pass)
        try:
            performed = await self._perform(plan, begun, prepared)
        finally:
            self._performed.set()
            self._first_pass.set()
        sent_s = anyio.current_time()
        finished = await self._finish(plan, performed)
        decided_s = anyio.current_time()
        confirmed = await self._confirm(plan, finished, switched=performed.switched)
        statistics = confirmed.statistics or performed.statistics
        blackout_ms = None
        if performed.stopped_for_ms is not None:
            blackout_ms = performed.stopped_for_ms + (decided_s - sent_s) * 1000 - finished.tail_ms
        assert finished.domain is not None
        return MigrationResult(
            migration_id=begun.id,
            uuid=finished.domain.uuid,
            name=finished.domain.name,
            source=str(plan.source.uri),
            destination=str(plan.destination.uri),
            total_ms=self._elapsed_ms(),
            setup_ms=setup_ms,
            downtime_ms=statistics.downtime_ms,
            blackout_ms=blackout_ms,
            transferred_bytes=statistics.transferred_bytes,
            iterations=statistics.iteration,
            phase_ms=dict(self._phase_ms),
            dropped_options=plan.dropped,
        )

    async def _begin(self, plan: Plan) -> Begun:
        begun: Begun | None = None
        with self._phase(Phase.BEGIN, Side.SOURCE), self._abortable():
            begun = await plan.source.host.begin(plan.info, plan.effective, migration_id=self._own_id)
        if begun is None:
            raise self._abort_error(Phase.BEGIN, Side.SOURCE)
        self.id = begun.id
        return begun

    async def _prepare(self, plan: Plan, begun: Begun) -> Prepared:
        prepared: Prepared | None = None
        try:
            self._check_abort(Phase.PREPARE, Side.DESTINATION)
            with self._phase(Phase.PREPARE, Side.DESTINATION), self._abortable():
                prepared = await plan.destination.host.prepare(
                    begun.cookie,
                    plan.info,
                    begun.definition,
                    plan.effective,
                    paused=begun.paused or plan.effective.paused,
                )
            self._check_abort(Phase.PREPARE, Side.DESTINATION)
        except FerrymanError as error:
            if prepared is not None:
                await self._cancel_destination(plan, prepared.cookie)
            elif isinstance(error.__cause__, ConnectionClosedError):
                await self._cancel_unheard(plan, begun.cookie)
            self._rolled_back.append("the destination released its reservation")
            await self._give_up(plan, begun.id)
            self._rolled_back.append("the source unlocked the domain")
            raise
        assert prepared is not None
        self._expecting.cancel()
        return prepared

    async def _perform(self, plan: Plan, begun: Begun, prepared: Prepared) -> Performed:
        """Send the state; whatever goes wrong, end with a proof, or with the guest kept and the destination clean."""
        try:
            with self._phase(Phase.PERFORM, Side.SOURCE) as outcome:
                self._sending.set()
                performed = await plan.source.host.perform(
                    prepared.cookie, prepared.migration_uri, plan.effective, self._sample
                )
                if performed.kind is not PaperKind.PROOF:
                    told = performed.error
                    outcome.code = told.code if told is not None else MigrationAbortedError.code
        except FerrymanError as error:
            # An abort came first, the journal refused, resuming failed and is tried again; or the source cannot be
            # heard any more, and may have given its proof. Only the destination's word tells.
            return await self._perform_unheard(plan, begun, prepared, error)
        if performed.kind is PaperKind.PROOF:
            return performed
        finished = await self._cancel_destination(plan, performed.cookie)
        if performed.kind is PaperKind.KEPT:
            self._rolled_back.append("the guest goes on at the source")
            if performed.error is None:
                raise self._abort_error(Phase.PERFORM, Side.SOURCE)
            raise self._failure(Phase.PERFORM, Side.SOURCE, performed.error, GuestState.SOURCE)
        return await self._perform_lost(plan, performed, finished)

    async def _perform_unheard(
        self, plan: Plan, begun: Begun, prepared: Prepared, error: FerrymanError
    ) -> Performed:
        performed = Performed(
            kind=PaperKind.ASK,
            cookie=with_kind(prepared.cookie, PaperKind.ASK),
            statistics=TransferStatistics(),
            error=error,
        )
        finished = await self._cancel_destination(plan, performed.cookie)
        await self._give_up(plan, begun.id)
        if finished is not None and finished.kind is PaperKind.REFUSAL:
            # It is durable: whatever the source has done, the guest stays there.
            self._check_abort(Phase.PERFORM, Side.SOURCE)
        return await self._perform_lost(plan, performed, finished)

    async def _give_up(self, plan: Plan, migration_id: MigrationId) -> None:
        """Let the source unlock the domain; its lease does the same when it cannot be reached."""
        try:
            await plan.source.host.give_up(migration_id)
        except FerrymanError as error:
            _log.warning("the source could not be told to unlock the domain, its lease will: %s", error)

    async def _perform_lost(self, plan: Plan, performed: Performed, finished: Finished | None) -> Performed:
        """Nobody at the source can tell what became of the transfer: only the destination's word settles it."""
        if finished is not None and finished.kind is PaperKind.CLAIM:
            return performed
        if finished is None or finished.kind is not PaperKind.REFUSAL:
            raise self._in_doubt(Phase.PERFORM, finished.reason if finished else "") from performed.error
        try:
            confirmed = await plan.source.host.confirm(finished.cookie)
        except FerrymanError as error:
            raise self._failure(Phase.PERFORM, Side.SOURCE, error, GuestState.SOURCE) from error
        if confirmed.guest_gone:
            raise GuestLostError(
                "the guest's process ended during the transfer, before the destination had the whole guest",
                phase=Phase.PERFORM,
                side=Side.SOURCE,
                domain=plan.info.name,
                guest_state=GuestState.GONE,
            ) from performed.error
        self._rolled_back.append("the guest goes on at the source")
        assert performed.error is not None
        raise self._failure(Phase.PERFORM, Side.SOURCE, performed.error, GuestState.SOURCE)

    async def _finish(self, plan: Plan, performed: Performed) -> Finished:
        cookie = performed.cookie
        if self._abort_asked.is_set():
            # The proof is given, but nobody has shown it: cancelling lets the destination refuse.
            cookie = with_kind(cookie, PaperKind.CANCEL)
        with self._phase(Phase.FINISH, Side.DESTINATION, guest=GuestState.IN_DOUBT):
            finished = await self._ask(plan, cookie)
        if finished is None:
            # The source goes on asking by itself, and both ends settle it when they can talk.
            raise self._in_doubt(Phase.FINISH, "the destination did not answer in time")
        return finished

    async def _confirm(self, plan: Plan, finished: Finished, *, switched: bool) -> Confirmed:
        claimed = finished.kind is PaperKind.CLAIM
        owner = GuestState.DESTINATION if claimed else GuestState.SOURCE
        # Whoever asks for an abort while pages are being sent does not wait for them: the source goes on by itself.
        confirmed = Confirmed(kind=PaperKind.GIVEN)
        try:
            with self._phase(Phase.CONFIRM, Side.SOURCE, guest=owner), anyio.CancelScope() as waiting:
                if switched and claimed:
                    self._phase_scope = waiting
                    if self._abort_asked.is_set():
                        waiting.cancel()
                confirmed = await plan.source.host.confirm(finished.cookie)
        except FerrymanError as error:
            raise self._failure(Phase.CONFIRM, Side.SOURCE, error, owner) from error
        finally:
            self._phase_scope = None
        if confirmed.kind is PaperKind.PENDING:
            raise self._in_doubt(
                Phase.CONFIRM, f"the destination's answer {finished.kind.value} decides nothing"
            )
        if claimed and confirmed.guest_gone:
            raise GuestLostError(
                "the guest went on at the destination before all of its memory was there, and one of its halves"
                " is gone now: it is lost, as the plan warned (postcopy-risk); destroy the domain there",
                phase=Phase.CONFIRM,
                side=Side.SOURCE,
                domain=plan.info.name,
                guest_state=GuestState.GONE,
            )
        if claimed:
            return confirmed
        if confirmed.guest_gone:
            raise GuestLostError(
                "the switch to post-copy broke before the destination had the guest's devices, and what is left"
                " at the source cannot run again: the guest is lost, as the plan warned (postcopy-risk)"
                if switched
                else "the destination refused the guest, and its process at the source is gone",
                phase=Phase.FINISH,
                side=Side.DESTINATION,
                domain=plan.info.name,
                guest_state=GuestState.GONE,
            )
        self._rolled_back += ["the destination ended its receiver", "the guest goes on at the source"]
        if self._abort_asked.is_set():
            raise self._abort_error(Phase.FINISH, Side.DESTINATION)
        raise FinishError(
            f"the destination refused the guest: {finished.reason or 'it gave no reason'}",
            phase=Phase.FINISH,
            side=Side.DESTINATION,
            domain=plan.info.name,
            guest_state=GuestState.SOURCE,
        )

    async def _ask(self, plan: Plan, cookie: bytes) -> Finished | None:
        """Show a paper to the destination until it decides; None when patience ends first."""
        wait_s = _ASK_FIRST_S
        with anyio.move_on_after(plan.effective.patience_s):
            while True:
                try:
                    finished = await plan.destination.host.decide(cookie)
                except PaperError as error:
                    raise self._in_doubt(Phase.FINISH, error.message) from error
                except FerrymanError as error:
                    _log.warning("the destination could not answer yet: %s", error)
                else:
                    if finished.kind is PaperKind.UNKNOWN:
                        raise self._in_doubt(
                            Phase.FINISH, "the destination's journal has lost this migration"
                        )
                    if finished.kind is not PaperKind.PENDING:
                        return finished
                await anyio.sleep(wait_s)
                wait_s = min(wait_s * 2, _ASK_LONGEST_S)
        return None

    async def _cancel_destination(self, plan: Plan, cookie: bytes) -> Finished | None:
        """Let the destination refuse; its lease does the same when it cannot be reached."""
        kind = decode_cookie(cookie).paper.kind
        paper = (
            cookie if kind in (PaperKind.KEPT, PaperKind.NO_PROOF) else with_kind(cookie, PaperKind.CANCEL)
        )
        try:
            finished = await self._ask(plan, paper)
        except FerrymanError as error:
            _log.warning(
                "the destination could not be told to release its reservation, its lease will: %s", error
            )
            return None
        if finished is not None:
            self._rolled_back.append("the destination ended its receiver")
        return finished

    async def _cancel_unheard(self, plan: Plan, passport: bytes) -> None:
        """Let a destination whose answer to prepare was lost release what it may have reserved; asked once."""
        with anyio.move_on_after(_CANCEL_S):
            try:
                await plan.destination.host.decide(with_kind(passport, PaperKind.CANCEL))
            except FerrymanError as error:
                _log.info("the destination could not be told that prepare was cancelled: %s", error)

    async def _watch_time(self, limit_s: float, action: TimeoutAction) -> None:
        """Do what was asked for with a transfer that takes too long."""
        with anyio.move_on_after(limit_s):
            await self._performed.wait()
        if self._performed.is_set():
            return
        _log.info(
            "the transfer of domain %s takes longer than %g s: %s", self.domain.name, limit_s, action.value
        )
        try:
            match action:
                case TimeoutAction.ABORT:
                    self._timed_out = True
                    self.abort()
                case TimeoutAction.SUSPEND:
                    await self.suspend()
                case TimeoutAction.POSTCOPY:
                    await self.switch_to_postcopy()
        except FerrymanError as error:
            _log.warning(
                "%s of domain %s after the time-out failed: %s", action.value, self.domain.name, error
            )

    async def _switch_after_first_pass(self) -> None:
        await self._first_pass.wait()
        if self._performed.is_set():
            return
        try:
            await self.switch_to_postcopy()
        except FerrymanError as error:
            _log.warning("domain %s could not be switched to post-copy: %s", self.domain.name, error)

    async def _abort_transfer(self, migration_id: MigrationId) -> None:
        await self._abort_asked.wait()
        if not self._done.is_set():
            await self.domain.connection.host.give_up(migration_id)

    async def _renew(self, plan: Plan, migration_id: MigrationId) -> None:
        """Tell both hosts that this caller lives."""
        while not self._done.is_set():
            with anyio.move_on_after(plan.effective.lease_s / 3):
                await self._done.wait()
            for side, connection in ((Side.SOURCE, plan.source), (Side.DESTINATION, plan.destination)):
                try:
                    await connection.host.renew(side, migration_id)
                except FerrymanError as error:
                    _log.info("the %s's lease could not be renewed: %s", side.value, error)

    # Abort

    @contextmanager
    def _abortable(self) -> Iterator[None]:
        """Let abort() cancel what runs inside; what runs inside undoes itself then."""
        with anyio.CancelScope() as scope:
            self._phase_scope = scope
            if self._abort_asked.is_set():
                scope.cancel()
            try:
                yield
            finally:
                self._phase_scope = None

    def _check_abort(self, phase: Phase | None, side: Side | None) -> None:
        if self._abort_asked.is_set():
            raise self._abort_error(phase, side)

    def _abort_error(self, phase: Phase | None, side: Side | None) -> MigrationAbortedError:
        return MigrationAbortedError(
            f"the transfer took longer than {self.options.timeout_s:g} s, and was aborted as the options say"
            if self._timed_out
            else "the migration was aborted on request",
            phase=phase,
            side=side,
            domain=self.domain.name,
            guest_state=GuestState.SOURCE,
        )

    # Errors, events, times

    def _failure(self, phase: Phase, side: Side, error: FerrymanError, guest: GuestState) -> MigrationError:
        if isinstance(error, MigrationError):
            error.phase = error.phase or phase
            error.side = error.side or side
            error.guest_state = error.guest_state or guest
            return error
        failure = _ERRORS[phase](
            error.message, phase=phase, side=side, domain=self.domain.name, guest_state=guest
        )
        failure.__cause__ = error
        return failure

    def _in_doubt(self, phase: Phase, reason: str) -> InDoubtError:
        return InDoubtError(
            f"the guest's owner cannot be told yet{f': {reason}' if reason else ''}: make the destination reachable",
            evidence_missing="the destination's word: a claim or a refusal",
            phase=phase,
            side=Side.DESTINATION,
            domain=self.domain.name,
            guest_state=GuestState.IN_DOUBT,
        )

    @contextmanager
    def _phase(
        self, phase: Phase, side: Side, *, guest: GuestState = GuestState.SOURCE
    ) -> Iterator[_Outcome]:
        """Tell of a phase; an error that leaves it says where the guest is: ``guest``, unless it knows better."""
        begin_s = anyio.current_time()
        self._emit(PhaseEvent(phase=phase, side=side, ended=False, elapsed_ms=self._elapsed_ms()))
        outcome = _Outcome()
        try:
            yield outcome
        except FerrymanError as error:
            outcome.code = error.code
            failure = self._failure(phase, side, error, guest)
            if failure is error:
                raise
            raise failure from error
        finally:
            self._phase_ms[phase] = (anyio.current_time() - begin_s) * 1000
            self._emit(
                PhaseEvent(
                    phase=phase, side=side, ended=True, elapsed_ms=self._elapsed_ms(), error=outcome.code
                )
            )

    def _elapsed_ms(self) -> float:
        return (anyio.current_time() - self._start_s) * 1000

    def _sample(self, statistics: TransferStatistics) -> None:
        if (statistics.iteration or 0) > 1:
            self._first_pass.set()
        self._emit(ProgressEvent(statistics=statistics, elapsed_ms=self._elapsed_ms()))

    def _emit(self, event: MigrationEvent) -> None:
        self._events.append(event)
        self._events_seen += 1
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    def _show_events(self, beside: TaskGroup) -> None:
        """Show every event to both connections' observers, beside the migration and never in its way."""
        ends = [end for end in (self.domain.connection, self.destination) if end.hooks.observed]
        if ends:
            beside.start_soon(self._show_events_to, ends)

    async def _show_events_to(self, ends: Sequence[Connection]) -> None:
        async with aclosing(self._follow()) as events:
            with self._observing:
                await self._show_each(events, ends)

    async def _show_each(self, events: AsyncIterator[MigrationEvent], ends: Sequence[Connection]) -> None:
        async for event in events:
            seen = ObservedEvent(
                id=self.id,
                uuid=self.domain.uuid,
                name=self.domain.name,
                source=str(self.domain.connection.uri),
                destination=str(self.destination.uri),
                event=event,
            )
            for end in ends:
                await end.hooks.observe(seen)
