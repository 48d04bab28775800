"""One host's end of its migrations: runs the table of :mod:`ferryman.handover` against hooks and a journal.

A caller (:mod:`ferryman.migration`, a daemon, another host) sends messages to a :class:`Host`; each becomes an input
of the table, and the table's step is done in its order: record, actions, answer.  What an action finds out is the
next input.  The Host decides nothing that the table does not say, and the caller decides nothing at all.

Shields: a step is never torn by cancellation; only ``prepare`` (while its receiver starts) and the transfer itself
can be cancelled, and both then end by an input of the table.
"""

from __future__ import annotations

import logging
import math
import secrets
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, assert_never

import anyio
import anyio.to_thread

from ferryman.definition import arriving_definition, minimal_definition
from ferryman.errors import (
    DomainBusyError,
    DomainNotFoundError,
    DomainStateError,
    FerrymanError,
    FinishError,
    GuestLostError,
    HypervisorError,
    JournalError,
    MigrationNotFoundError,
    MigrationURIMissingError,
    OptionError,
    PaperError,
    PerformError,
)
from ferryman.handover import (
    QUESTIONS,
    TABLE,
    Action,
    Cookie,
    Input,
    MigrationRow,
    OutOfOrderError,
    Paper,
    PaperKind,
    Record,
    State,
    admit_answer,
    admit_inquiry,
    admit_question,
    decode_cookie,
    encode_cookie,
    fall_back,
    names,
    recover,
    step,
)
from ferryman.hookspecs import (
    AbortRequest,
    BeginReply,
    BeginRequest,
    ConfirmReply,
    ConfirmRequest,
    DomainRequest,
    EvidenceRequest,
    ExpectRequest,
    FinishRequest,
    MendReply,
    MendRequest,
    PerformReply,
    PerformRequest,
    PrepareReply,
    PrepareRequest,
    ServeReply,
    SweepRequest,
    TuneRequest,
    Verdict,
)
from ferryman.resolve import Resolution, Testimony, ask_journal, describe
from ferryman.types import (
    DomainInfo,
    DomainState,
    DomainUUID,
    Evidence,
    GuestEvidence,
    GuestState,
    MigrationId,
    MigrationOptions,
    Phase,
    Side,
    TransferEvidence,
    TransferStatistics,
    Tuning,
)
from ferryman.uri import MigrationURI

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from ferryman.journal import Journal
    from ferryman.registry import Hooks

_log = logging.getLogger(__name__)

T = TypeVar("T")

_ASK_FIRST_S = 0.05
_ASK_LONGEST_S = 30.0
_MEND_LONGEST_S = 5.0
_RECOVERY_ROUNDS = 8
_DRIVER_PREFIX = "driver."


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """Begin's answer: the passport for the destination, and what it builds the domain from."""

    id: MigrationId
    cookie: bytes
    definition: str
    paused: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Prepare's answer: the receipt for the source, and where it connects to."""

    cookie: bytes
    migration_uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Performed:
    """Perform's answer: a cookie that is the proof of stop, or ``kept``, or only a question.

    :param switched: post-copy: pages are still to be sent when the destination has claimed the guest.
    :param error: why there is no proof, or None.
    """

    kind: PaperKind
    cookie: bytes
    statistics: TransferStatistics
    stopped_for_ms: float | None = None
    switched: bool = False
    error: FerrymanError | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The destination's decision, or why there is none yet.

    :param domain: the domain as it is here, with the claim and only with it.
    :param tail_ms: time from the command that ran the guest to this answer: not part of the blackout.
    """

    kind: PaperKind
    cookie: bytes
    reason: str = ""
    domain: DomainInfo | None = None
    tail_ms: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmed:
    """What the source made of the decision.

    :param kind: ``kept`` or ``given``, or ``pending`` where the paper decided nothing.
    :param guest_gone: kept, but its process is gone; or given, and a half was lost before the other had every page.
    """

    kind: PaperKind
    statistics: TransferStatistics | None = None
    guest_gone: bool = False


def new_migration_id() -> MigrationId:
    """An id that no migration has had."""
    return MigrationId(secrets.token_hex(16))


class Endpoint(Protocol):
    """What a caller, or another host, can say to one host about migrations."""

    @property
    def address(self) -> str:
        """Connection URI by which this host can be asked."""

    async def begin(
        self, domain: DomainInfo, options: MigrationOptions, *, migration_id: MigrationId | None = None
    ) -> Begun:
        """Lock a domain and write its passport."""

    async def expect(
        self, migration_id: MigrationId, domain: DomainInfo, definition: str, options: MigrationOptions
    ) -> None:
        """Start what prepare will need, until this is cancelled."""

    async def prepare(
        self, cookie: bytes, domain: DomainInfo, definition: str, options: MigrationOptions, *, paused: bool
    ) -> Prepared:
        """Reserve everything and start the receiver."""

    async def perform(
        self,
        cookie: bytes,
        migration_uri: str,
        options: MigrationOptions,
        progress: Callable[[TransferStatistics], None],
    ) -> Performed:
        """Send the state."""

    async def decide(self, cookie: bytes) -> Finished:
        """Claim, refuse, or answer a question: finish, cancel and ask are one message with different papers."""

    async def confirm(self, cookie: bytes) -> Confirmed:
        """Let go with the claim, resume with the refusal."""

    async def inquire(self, cookie: bytes) -> bytes:
        """Ask the source of a migration; the answer is a paper for the destination."""

    async def switch(self, cookie: bytes) -> None:
        """Switch a running transfer to post-copy, with the destination's pledge."""

    async def mend(self, cookie: bytes) -> str:
        """Let the destination wait anew for the rest of a guest, after the stream broke in post-copy."""

    async def give_up(self, migration_id: MigrationId) -> None:
        """End a migration whose transfer has not begun, or cancel the transfer."""

    async def tune(self, migration_id: MigrationId, tuning: Tuning) -> None:
        """Change a running transfer."""

    async def renew(self, side: Side, migration_id: MigrationId) -> None:
        """Say that the caller is still there: the lease starts anew."""


class HostEnd(Endpoint, Protocol):
    """One host's end of migrations: what others say to it, and what its own program asks of it."""

    def require_free(self, uuid: DomainUUID, name: str) -> None:
        """Refuse what a migration has locked. :raises DomainBusyError: it has."""

    def open_migrations(self) -> list[MigrationRow]:
        """Migrations that are under way or in doubt here."""

    def in_doubt(self) -> list[Resolution]:
        """Every migration that is open here, and what is missing; asks nobody."""

    async def resolve(
        self, migration_id: MigrationId | None = None, testimony: Testimony | None = None
    ) -> list[Resolution]:
        """Settle what is open here."""


@dataclass(eq=False, slots=True)
class _Run:
    """One open migration on this host: its row, its state, and what only memory holds."""

    side: Side
    state: State
    row: MigrationRow
    options: MigrationOptions = field(default_factory=MigrationOptions)
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    stale: bool = False
    """A write failed, so the journal must be read before anything else is done."""
    lease_end: float = math.inf
    lease_ending: bool = False
    """Something is being done about its end."""
    transfer: anyio.CancelScope | None = None
    transfer_request: PerformRequest | None = None
    transfer_reply: PerformReply | None = None
    prepare_request: PrepareRequest | None = None
    prepare_reply: PrepareReply | None = None
    failure: FerrymanError | None = None
    confirm_reply: ConfirmReply = field(default_factory=ConfirmReply)
    domain: DomainInfo | None = None
    ran_at: float = 0.0
    sending: anyio.Event = field(default_factory=anyio.Event)
    """Set when the transfer begins, and when it will never begin."""
    adopted: bool = True
    recovered: bool = False
    """It was open when the host was opened, so nobody drives it."""
    abort_asked: bool = False
    lost: bool = False
    """Post-copy: a half of the guest went while the other needed it."""
    serving: anyio.Event | None = None
    """Post-copy: set when the destination has every page; None before there is anything to serve."""
    done: bool = False


class Host:
    """The engine of one connection's host.

    :param peer: opens the endpoint behind an address, to ask it; used when a decision is missing.
    :param start: starts a background task that lives as long as the connection.
    """

    def __init__(
        self,
        hooks: Hooks,
        journal: Journal,
        *,
        address: str,
        peer: Callable[[str, Callable[[Endpoint], Awaitable[None]]], Awaitable[None]],
        start: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
    ) -> None:
        self._hooks = hooks
        self._journal = journal
        self._address = address
        self._peer = peer
        self._start = start
        self._runs: dict[tuple[Side, MigrationId], _Run] = {}
        self._admitting: set[DomainUUID] = set()
        self._next_look = math.inf
        self._look_sooner = anyio.Event()

    @property
    def address(self) -> str:
        """Connection URI by which this host can be asked."""
        return self._address

    # What the connection asks

    def require_free(self, uuid: DomainUUID, name: str) -> None:
        """Refuse a change of a domain that a migration has locked.

        :raises DomainBusyError: a migration of it is open here.
        """
        if uuid in self._admitting:
            raise DomainBusyError(
                f"a migration of domain {name} is starting here: wait for it or abort it", domain=name
            )
        for run in self._runs.values():
            if run.row.uuid == uuid and not run.done:
                raise DomainBusyError(
                    f"migration {run.row.migration_id} of domain {name} is open here (state {run.state.value}):"
                    " wait for it, abort it, or resolve it",
                    domain=name,
                )

    def open_migrations(self) -> list[MigrationRow]:
        """Rows of all migrations that are open here, in doubt or under way."""
        return [run.row for run in self._runs.values() if not run.done]

    async def recover(self) -> None:
        """Settle every open row of the journal, as far as this host can alone; ask for the rest in the background.

        Called once, before anything else.
        """
        self._start(self._watch_leases)
        for row in self._journal.open_rows():
            run = _Run(side=row.side, state=fall_back(row.record), row=row, recovered=True)
            self._runs[row.side, row.migration_id] = run
            try:
                async with run.lock:
                    await self._recover_or_ask(run)
            except FerrymanError as error:
                _log.warning(
                    "migration %s of domain %s could not be settled yet: %s",
                    row.migration_id,
                    row.name,
                    error,
                )
            if not run.done and run.state not in QUESTIONS:
                self._lease(run)
            if not run.done and run.state in QUESTIONS:
                self._start(lambda run=run: self._ask_until_answered(run))  # type: ignore[misc]
        await self._hook_unless_missing(
            "migrate_sweep", SweepRequest(known=frozenset(id for _, id in self._runs))
        )

    # Source

    async def begin(
        self, domain: DomainInfo, options: MigrationOptions, *, migration_id: MigrationId | None = None
    ) -> Begun:
        """Lock a domain to a new migration.

        :param migration_id: a new one, made by the caller; None makes one here.
        :raises PaperError: the id was used before.
        :raises BeginError: nothing was changed. :raises DomainBusyError: another migration of it is open.
        :cancellation: nothing is left.
        """
        self.require_free(domain.uuid, domain.name)
        with self._admit(domain.uuid):
            await self._journal.require_room()
            if migration_id is None:
                migration_id = new_migration_id()
            elif self._journal.read(Side.SOURCE, migration_id) is not None:
                raise PaperError(f"migration {migration_id} began here before, and an id is used once")
            reply = await self._begin_hook(BeginRequest(id=migration_id, domain=domain, options=options))
            row = MigrationRow(
                side=Side.SOURCE,
                migration_id=migration_id,
                generation=self._journal.generation(domain.uuid) + 1,
                uuid=domain.uuid,
                name=domain.name,
                record=Record.BEGUN,
                process=reply.process,
                arrives_paused=reply.paused,
                extra=_flags(undefine=options.undefine_source),
            )
            run = _Run(side=Side.SOURCE, state=State.ABSENT, row=row, options=options)
            with anyio.CancelScope(shield=True):
                await self._feed(run, Input.BEGIN)
            self._runs[Side.SOURCE, migration_id] = run
        self._lease(run)
        return Begun(
            id=migration_id,
            cookie=self._cookie(run, PaperKind.PASSPORT, _from_driver(reply.cookie)),
            definition=reply.definition,
            paused=reply.paused,
        )

    async def _begin_hook(self, request: BeginRequest) -> BeginReply:
        if self._hooks.has("migrate_begin"):
            return await self._hooks.call("migrate_begin", request, BeginReply)
        domain = request.domain
        definition = minimal_definition(name=domain.name, uuid=domain.uuid)
        if self._hooks.has("domain_definition"):
            definition = await self._hooks.call(
                "domain_definition", DomainRequest(uuid=domain.uuid, name=domain.name), str
            )
        return BeginReply(definition=definition, paused=domain.state is DomainState.PAUSED)

    async def perform(
        self,
        cookie: bytes,
        migration_uri: str,
        options: MigrationOptions,
        progress: Callable[[TransferStatistics], None],
    ) -> Performed:
        """Send the state; answer with the proof of stop, with ``kept``, or with neither.

        :raises PaperError: the cookie is no receipt for an open migration; nothing was changed.
        :cancellation: as :meth:`give_up`.
        """
        receipt = decode_cookie(cookie)
        run = await self._run(Side.SOURCE, receipt.paper)
        if run is None or receipt.paper.kind is not PaperKind.RECEIPT or receipt.paper.receipt is None:
            raise PaperError("the cookie is no receipt for a migration that began here")
        async with run.lock:
            if run.state is not State.BEGUN:
                raise PaperError(
                    f"migration {run.row.migration_id} was performed or given up before (it is {run.state.value})"
                )
            run.row = replace(run.row, receipt=receipt.paper.receipt, peer_address=receipt.address)
            run.transfer_request = PerformRequest(
                id=run.row.migration_id,
                domain=_info(run.row),
                process=run.row.process,
                migration_uri=migration_uri,
                options=options,
                progress=progress,
                cookie=_to_driver(receipt),
            )
            await self._feed(run, Input.PERFORM)
            kind = await self._after_transfer(run)
        reply = run.transfer_reply
        return Performed(
            kind=kind,
            cookie=self._cookie(run, kind),
            statistics=reply.statistics if reply is not None else TransferStatistics(),
            stopped_for_ms=reply.stopped_for_ms if reply is not None else None,
            switched=reply is not None and reply.switched,
            error=run.failure,
        )

    async def _after_transfer(self, run: _Run) -> PaperKind:
        """What perform can say: the proof, that the guest is kept, or nothing but a question."""
        if run.state is State.HANDING:
            with anyio.CancelScope(shield=True):
                await self._recover_or_ask(run)
        return QUESTIONS.get(run.state, PaperKind.KEPT)

    async def confirm(self, cookie: bytes) -> Confirmed:
        """Let go with the claim, resume with the refusal; any other paper changes nothing.

        :returns: in post-copy only when every page has come.
        :raises ConfirmError: the paper decided, but the source could not act on it; the next opening tries again.
        :cancellation: shielded, but for the wait for the pages, which go on being sent.
        """
        answer = decode_cookie(cookie)
        run = await self._run(Side.SOURCE, answer.paper)
        if run is None:
            raise PaperError(f"no migration {answer.paper.migration_id} began here")
        kind = await self._take_answer(run, answer.paper)
        if kind is None:
            return Confirmed(kind=PaperKind.PENDING)
        if run.serving is not None:
            await run.serving.wait()
            kind = PaperKind.GIVEN
        return Confirmed(
            kind=kind,
            statistics=run.confirm_reply.statistics,
            guest_gone=run.lost or run.confirm_reply.guest_gone,
        )

    async def _take_answer(self, run: _Run, paper: Paper) -> PaperKind | None:
        """Do at the source what the destination's answer decides; waits for no pages.

        :returns: None where it decides nothing.
        """
        kind: PaperKind | None = None
        with anyio.CancelScope(shield=True):
            async with run.lock:
                await self._refresh(run)
                newest = self._journal.generation(run.row.uuid) == run.row.generation
                given = admit_answer(run.row, paper, newest=newest)
                if given is not None:
                    kind = await self._answer(run, given)
        return kind

    async def inquire(self, cookie: bytes) -> bytes:
        """Answer a destination that pledged itself: with the proof, with ``no-proof``, or ``pending``.

        :raises JournalError: what was decided could not be read.
        :cancellation: shielded.
        """
        paper = decode_cookie(cookie).paper
        run = await self._run(Side.SOURCE, paper)
        given = admit_inquiry(run.row if run is not None else None, paper)
        if run is None or isinstance(given, PaperKind):
            answer = replace(paper, kind=PaperKind.UNKNOWN, reason="")
            return encode_cookie(Cookie(paper=answer, address=self.address))
        if run.transfer is not None:
            return self._cookie(run, PaperKind.PENDING)
        with anyio.CancelScope(shield=True):
            async with run.lock:
                await self._refresh(run)
                kind = await self._answer(run, given)
        return self._cookie(run, kind)

    async def switch(self, cookie: bytes) -> None:
        """Switch a running transfer to post-copy, with the destination's pledge and only with it.

        :raises PaperError: the cookie is no pledge for this migration. :raises DomainStateError: nothing is sent here.
        """
        pledge = decode_cookie(cookie).paper
        await self._await_sending(pledge.migration_id)
        run = self._runs.get((Side.SOURCE, pledge.migration_id))
        if run is None or run.transfer is None:
            raise DomainStateError(
                f"migration {pledge.migration_id} is not sending, so there is nothing to switch",
                domain=run.row.name if run is not None else "",
            )
        newest = self._journal.generation(run.row.uuid) == run.row.generation
        if admit_answer(run.row, pledge, newest=newest) is not Input.PLEDGED:
            raise PaperError("the cookie is no pledge for this migration")
        # Without the run's lock, which the transfer holds: the step changes neither state nor journal.
        await self._feed(run, Input.PLEDGED)

    async def mend(self, cookie: bytes) -> str:
        """Post-copy, at the destination: wait for the source anew, after the stream broke.

        A guest that nobody has claimed yet may run here already, and its hypervisor may not be able to say so before
        more of its pages have come.

        :returns: the migration URI where it waits.
        :raises PaperError: the cookie names no migration whose guest was ever commanded to run here.
        :raises HypervisorError: the stream is not broken, or nothing can be done about it.
        """
        paper = decode_cookie(cookie).paper
        run = await self._run(Side.DESTINATION, paper)
        brought = (Record.CLAIMING, Record.CLAIMED)
        if run is None or run.row.record not in brought or not names(run.row, paper):
            raise PaperError(f"migration {paper.migration_id} has brought no guest here")
        reply = await self._hooks.call("migrate_mend", self._mend_request(run, None), MendReply)
        if reply.migration_uri is None:
            raise HypervisorError(
                f"the hook migrate_mend of {self._hooks.distribution} does not say where it waits"
            )
        return reply.migration_uri

    async def give_up(self, migration_id: MigrationId) -> None:
        """End a migration before its transfer, or cancel the transfer: then perform answers what came of it."""
        run = self._runs.get((Side.SOURCE, migration_id))
        if run is None:
            return
        run.abort_asked = True
        if run.transfer is not None:
            run.transfer.cancel()
            return
        with anyio.CancelScope(shield=True):
            async with run.lock:
                if run.state is State.BEGUN:
                    await self._feed(run, Input.GIVE_UP)

    async def _await_sending(self, migration_id: MigrationId) -> None:
        """Wait until the transfer of a migration has begun, or will not."""
        run = self._runs.get((Side.SOURCE, migration_id))
        if run is not None and run.state in (State.BEGUN, State.HANDING):
            await run.sending.wait()

    async def tune(self, migration_id: MigrationId, tuning: Tuning) -> None:
        """Change a running transfer, or what is sent after it in post-copy.

        :raises DomainStateError: nothing of that migration is sent here.
        """
        await self._await_sending(migration_id)
        run = self._runs.get((Side.SOURCE, migration_id))
        if run is None or not _sends(run):
            raise DomainStateError(
                f"migration {migration_id} is not sending, so there is nothing to change",
                domain=run.row.name if run is not None else "",
            )
        await self._hooks.call("migrate_tune", self._tune_request(run, tuning), type(None))

    def _tune_request(self, run: _Run, tuning: Tuning) -> TuneRequest:
        return TuneRequest(id=run.row.migration_id, uuid=run.row.uuid, process=run.row.process, tuning=tuning)

    # Destination

    async def expect(
        self, migration_id: MigrationId, domain: DomainInfo, definition: str, options: MigrationOptions
    ) -> None:
        """Let the driver start what prepare will need.  Nothing is written down, and nothing fails here.

        :cancellation: ends what prepare has not taken over, and comes when prepare has returned or will not be called.
        """
        if not self._hooks.has("migrate_expect"):
            return
        try:
            request = ExpectRequest(
                id=migration_id,
                uuid=domain.uuid,
                name=options.name or domain.name,
                definition=arriving_definition(definition, options),
                options=options,
            )
            await self._hooks.call("migrate_expect", request, type(None))
        except FerrymanError as error:
            _log.info("nothing was started ahead for domain %s: %s", domain.name, error)

    async def prepare(
        self, cookie: bytes, domain: DomainInfo, definition: str, options: MigrationOptions, *, paused: bool
    ) -> Prepared:
        """Reserve everything and start the receiver; answer with the receipt.

        :raises PrepareError: nothing is left here. :raises PaperError: the cookie is no passport, or a late one.
        :cancellation: nothing is left here.
        """
        passport = decode_cookie(cookie)
        paper = passport.paper
        if paper.kind is not PaperKind.PASSPORT:
            raise PaperError("the cookie is no passport")
        if any(run.row.uuid == domain.uuid for run in self._runs.values() if not run.done):
            await self._settle_older(domain, paper.generation)
        self.require_free(domain.uuid, domain.name)
        with self._admit(domain.uuid):
            await self._journal.require_room()
            known = self._journal.generation(domain.uuid)
            seen = self._journal.read(Side.DESTINATION, paper.migration_id) is not None
            if paper.generation <= known or seen or (Side.DESTINATION, paper.migration_id) in self._runs:
                raise PaperError(
                    f"migration {paper.migration_id} of domain {domain.name} comes too late: this host has seen"
                    f" generation {known} of the domain, and the passport says {paper.generation}"
                )
            name = options.name or domain.name
            request = PrepareRequest(
                id=paper.migration_id,
                uuid=domain.uuid,
                name=name,
                definition=arriving_definition(definition, options),
                migration_uri=options.migration_uri,
                paused=paused,
                options=options,
                cookie=_to_driver(passport),
            )
            run = _Run(
                side=Side.DESTINATION,
                state=State.ABSENT,
                options=options,
                prepare_request=request,
                row=MigrationRow(
                    side=Side.DESTINATION,
                    migration_id=paper.migration_id,
                    generation=paper.generation,
                    uuid=domain.uuid,
                    name=name,
                    record=Record.PREPARED,
                    peer_address=passport.address,
                    arrives_paused=paused,
                    extra=_flags(persist=options.persist),
                ),
            )
            self._runs[Side.DESTINATION, paper.migration_id] = run
            try:
                async with run.lock:
                    await self._feed(run, Input.PREPARE)
            except JournalError:
                await self._discard_unwritten(run)
                raise
            finally:
                if run.state is not State.PREPARED:
                    run.done = True
                    self._runs.pop((Side.DESTINATION, paper.migration_id), None)
        reply = run.prepare_reply
        assert reply is not None
        self._lease(run)
        uri = reply.migration_uri or options.migration_uri
        assert uri is not None
        return Prepared(
            cookie=self._cookie(run, PaperKind.RECEIPT, _from_driver(reply.cookie)), migration_uri=uri
        )

    async def _discard_unwritten(self, run: _Run) -> None:
        """End a receiver whose ``prepared`` could not be written: no receipt left, so nobody can ask for it."""
        with anyio.CancelScope(shield=True):
            await self._hooks.call("migrate_finish", self._finish_request(run, Verdict.DISCARD), type(None))

    async def decide(self, cookie: bytes) -> Finished:
        """Answer finish, cancel, or a question.

        :raises JournalError: the decision could not be written, and the guest was not touched; ask again.
        :cancellation: shielded: the decision's result is always awaited and read.
        """
        paper = decode_cookie(cookie).paper
        with anyio.CancelScope(shield=True):
            finished = await self._decide(paper)
        return finished

    async def _decide(self, paper: Paper) -> Finished:
        run = await self._run(Side.DESTINATION, paper)
        given = admit_question(run.row if run is not None else None, paper)
        if isinstance(given, PaperKind):
            answer = replace(paper, kind=given, reason="")
            return Finished(kind=given, cookie=encode_cookie(Cookie(paper=answer, address=self.address)))
        if run is None:
            # Known from here on, so that a prepare that comes meanwhile is too late.
            run = self._runs.setdefault((Side.DESTINATION, paper.migration_id), self._stranger(paper))
        async with run.lock:
            await self._refresh(run)
            if run.state is State.CLAIMING:
                # Only a failed write or a lost answer leaves a run here: look again before answering.
                await self._recover(run)
            kind = await self._answer(run, given)
        return Finished(
            kind=kind,
            cookie=self._cookie(run, kind),
            reason=run.row.reason,
            domain=(run.domain or _info(run.row)) if kind is PaperKind.CLAIM else None,
            tail_ms=(anyio.current_time() - run.ran_at) * 1000 if run.ran_at else 0.0,
        )

    def _stranger(self, paper: Paper) -> _Run:
        return _Run(
            side=Side.DESTINATION,
            state=State.ABSENT,
            row=MigrationRow(
                side=Side.DESTINATION,
                migration_id=paper.migration_id,
                generation=paper.generation,
                uuid=DomainUUID(""),
                name="",
                record=Record.NEVER_PREPARED,
            ),
        )

    async def renew(self, side: Side, migration_id: MigrationId) -> None:
        """Start the lease anew."""
        run = self._runs.get((side, migration_id))
        if run is not None:
            run.lease_end = anyio.current_time() + run.options.lease_s

    async def _settle_older(self, domain: DomainInfo, generation: int) -> None:
        """End what an older generation of this domain left open here, before a newer one is prepared."""
        for run in list(self._runs.values()):
            if run.row.uuid != domain.uuid or run.done or run.row.generation >= generation:
                continue
            if run.side is Side.DESTINATION:
                async with run.lock:
                    if run.state is State.PREPARED:
                        run.row = replace(run.row, reason="a newer migration of the domain came")
                        await self._feed(run, Input.CANCEL)
            if run.state in QUESTIONS:
                await self._ask_once(run)

    # The table at work

    async def _answer(self, run: _Run, given: Input) -> PaperKind:
        """Feed an input; first finish what a decided row has not finished, so that nothing is told too early."""
        if run.row.record.decided and run.state is not State.ABSENT and not run.done:
            await self._recover(run)
        try:
            answer = await self._feed(run, given)
        except OutOfOrderError as error:
            raise PaperError(f"migration {run.row.migration_id} of domain {run.row.name}: {error}") from error
        return answer or PaperKind.PENDING

    async def _feed(self, run: _Run, given: Input) -> PaperKind | None:
        """Do the step that the table names, and every step that its actions lead to."""
        following: Input | None = given
        answer: PaperKind | None = None
        while following is not None:
            found = step(run.state, following)
            if found.record is not None:
                run.row = await self._write(run, replace(run.row, record=found.record, settled=False))
            run.state = found.state
            answer = found.answer
            following = None
            for action in found.actions:
                following = await self._act(run, action)
        return answer

    async def _write(self, run: _Run, row: MigrationRow) -> MigrationRow:
        try:
            return await self._journal.write(row)
        except JournalError:
            run.stale = True
            raise

    async def _refresh(self, run: _Run) -> None:
        """After a failed write: what does the journal say?"""
        if not run.stale:
            return
        row = self._journal.read(run.side, run.row.migration_id)
        run.stale = False
        if row is not None:
            run.row = row
            state = fall_back(row.record)
            # A proof that was given stays given: only memory knows it, and memory was not lost.
            if not (state is State.HANDING and run.state in QUESTIONS):
                run.state = state

    async def _act(self, run: _Run, action: Action) -> Input | None:
        match action:
            case Action.START_RECEIVER:
                return await self._start_receiver(run)
            case Action.TRANSFER:
                return await self._transfer(run)
            case Action.RUN_GUEST:
                return await self._run_guest(run)
            case Action.CANCEL_TRANSFER:
                await self._hook_unless_missing(
                    "migrate_abort",
                    AbortRequest(id=run.row.migration_id, uuid=run.row.uuid, process=run.row.process),
                )
            case Action.SWITCH:
                tuning = Tuning(postcopy=True)
                await self._hooks.call("migrate_tune", self._tune_request(run, tuning), type(None))
            case Action.SERVE_PAGES:
                if not self._hooks.has("migrate_serve"):
                    return Input.SERVED
                run.serving = anyio.Event()
                self._start(lambda: self._serve(run))
            case Action.DESTROY_RECEIVER:
                await self._limited(
                    run, "migrate_finish", self._finish_request(run, Verdict.DISCARD), type(None)
                )
            case Action.RESUME:
                await self._confirm_hook(run, Verdict.KEPT)
            case Action.DESTROY_COPY:
                await self._confirm_hook(run, Verdict.GIVEN)
            case Action.ADOPT:
                await self._adopt(run)
            case Action.SETTLE:
                self._settle(run)
            case _:
                assert_never(action)
        return None

    async def _serve(self, run: _Run) -> None:
        """Post-copy: wait until the destination has every page, and mend the stream whenever it breaks."""
        assert run.serving is not None
        wait_s = _ASK_FIRST_S
        while True:
            try:
                reply = await self._hooks.call("migrate_serve", self._evidence_request(run), ServeReply)
                run.lost = reply.lost
                if not reply.broken:
                    await self._served(run)
                    break
                await self._mend(run)
                wait_s = _ASK_FIRST_S
            except GuestLostError:
                run.lost = True
            except FerrymanError as error:
                _log.warning(
                    "the pages of domain %s do not come through at the moment, both halves of the guest wait: %s",
                    run.row.name,
                    error,
                )
            if run.lost:
                await self._served(run)
                break
            await anyio.sleep(wait_s)
            wait_s = min(wait_s * 2, _MEND_LONGEST_S)
        run.serving.set()

    async def _served(self, run: _Run) -> None:
        """Let the source's half go; what fails here is done again by the next opening."""
        if run.lost:
            _log.error(
                "one half of domain %s is gone while pages were needed: the guest is lost", run.row.name
            )
        try:
            async with run.lock:
                with anyio.CancelScope(shield=True):
                    await self._feed(run, Input.SERVED)
        except FerrymanError as error:
            _log.warning("the copy of domain %s could not be removed yet: %s", run.row.name, error)

    async def _mend(self, run: _Run) -> None:
        """Connect the two halves anew: the destination says where it waits, then the source connects."""
        question = self._cookie(run, PaperKind.ASK)
        uris: list[str] = []

        async def ask(destination: Endpoint) -> None:
            uris.append(await destination.mend(question))

        await self._peer(run.row.peer_address, ask)
        await self._hooks.call("migrate_mend", self._mend_request(run, uris[0]), MendReply)

    def _mend_request(self, run: _Run, migration_uri: str | None) -> MendRequest:
        return MendRequest(
            id=run.row.migration_id,
            uuid=run.row.uuid,
            side=run.side,
            process=run.row.process,
            options=run.options,
            migration_uri=migration_uri,
        )

    async def _start_receiver(self, run: _Run) -> Input:
        request = run.prepare_request
        assert request is not None
        try:
            reply = await self._hooks.call("migrate_prepare", request, PrepareReply)
            uri = reply.migration_uri or request.migration_uri
            if uri is None:
                raise MigrationURIMissingError(
                    "neither the caller nor the destination named a migration URI: set the option migration_uri",
                    phase=Phase.PREPARE,
                    side=Side.DESTINATION,
                    domain=request.name,
                    guest_state=GuestState.SOURCE,
                )
            MigrationURI.parse(uri)
        except BaseException as error:
            # An id is prepared once: the tombstone bars a late prepare, whatever made this one fail.
            run.row = replace(run.row, reason=str(error) or type(error).__name__)
            with anyio.CancelScope(shield=True):
                await self._feed(run, Input.RECEIVER_FAILED)
            raise
        run.prepare_reply = reply
        run.row = replace(run.row, process=reply.process)
        return Input.RECEIVER_UP

    async def _transfer(self, run: _Run) -> Input | None:
        """Send; None where the driver does not know how it ended."""
        request = run.transfer_request
        assert request is not None
        run.failure = None
        try:
            with anyio.CancelScope() as scope:
                run.transfer = scope
                run.sending.set()
                if run.abort_asked:
                    scope.cancel()
                run.transfer_reply = await self._hooks.call("migrate_perform", request, PerformReply)
        except PerformError as error:
            run.failure = error
            run.row = replace(run.row, reason=str(error))
            return Input.STAYED
        except FerrymanError as error:
            # Only the error above says that the guest stays: look, and ask.
            run.failure = error
            return None
        except anyio.get_cancelled_exc_class():
            run.row = replace(run.row, reason="aborted")
            with anyio.CancelScope(shield=True):
                await self._feed(run, Input.STAYED)
            raise
        finally:
            run.transfer = None
        if run.transfer_reply is None:
            run.row = replace(run.row, reason="aborted")
            return Input.STAYED
        return Input.SWITCHED if run.transfer_reply.switched else Input.PROVED

    async def _run_guest(self, run: _Run) -> Input:
        request = self._finish_request(run, Verdict.RUN)
        returned = False
        try:
            with anyio.move_on_after(run.options.patience_s):
                await self._hooks.call("migrate_finish", request, type(None))
                returned = True
        except FinishError as error:
            run.row = replace(run.row, reason=error.message)
            run.failure = error
            return Input.NEVER_RAN
        except FerrymanError as error:
            # The command's fate is unknown.  A receiver that still waits never ran, for nobody else commands it.
            _log.warning("running domain %s failed in an unknown way: %s", run.row.name, error)
            run.failure = error
            evidence = await self._evidence(run)
            if evidence.guest is GuestEvidence.STOPPED:
                run.row = replace(run.row, reason=error.message)
                return Input.NEVER_RAN
        else:
            if not returned:
                # The command may still be on its way: nothing is decided before somebody has looked.
                raise HypervisorError(
                    f"the hook migrate_finish of {self._hooks.distribution} did not return within"
                    f" {run.options.patience_s:g} s"
                )
        run.ran_at = anyio.current_time()
        return Input.RAN

    async def _adopt(self, run: _Run) -> None:
        """Take the guest in; the claim stands whatever comes of it."""
        run.adopted = True
        if not self._hooks.has("migrate_adopt"):
            return
        try:
            run.domain = await self._limited(
                run, "migrate_adopt", self._finish_request(run, Verdict.RUN), DomainInfo
            )
        except DomainNotFoundError:
            _log.warning("domain %s ended right after it had arrived", run.row.name)
        except FerrymanError as error:
            run.adopted = False
            _log.warning("domain %s arrived, but could not be taken in yet: %s", run.row.name, error)

    async def _confirm_hook(self, run: _Run, verdict: Verdict) -> None:
        if not self._hooks.has("migrate_confirm"):
            return
        request = ConfirmRequest(
            id=run.row.migration_id,
            uuid=run.row.uuid,
            name=run.row.name,
            verdict=verdict,
            process=run.row.process,
            paused=run.row.arrives_paused,
            undefine=dict(run.row.extra).get("undefine") == "yes",
        )
        run.confirm_reply = await self._limited(run, "migrate_confirm", request, ConfirmReply)

    def _settle(self, run: _Run) -> None:
        if not run.adopted:
            return  # done again by the lease's watch or by the next opening
        run.done = True
        run.sending.set()
        self._runs.pop((run.side, run.row.migration_id), None)
        self._journal.settle(run.row)

    def _finish_request(self, run: _Run, verdict: Verdict) -> FinishRequest:
        return FinishRequest(
            id=run.row.migration_id,
            uuid=run.row.uuid,
            name=run.row.name,
            verdict=verdict,
            process=run.row.process,
            paused=run.row.arrives_paused,
            persist=dict(run.row.extra).get("persist") == "yes",
        )

    async def _limited(self, run: _Run, hook: str, request: object, expects: type[T]) -> T:
        """Call a hook that a shield keeps from being cancelled: within the migration's patience, or not at all.

        :raises HypervisorError: it did not return in time, and what it has done is not known.
        """
        limit_s = run.options.patience_s
        with anyio.move_on_after(limit_s):
            return await self._hooks.call(hook, request, expects)
        raise HypervisorError(
            f"the hook {hook} of {self._hooks.distribution} did not return within {limit_s:g} s"
        )

    async def _hook_unless_missing(self, hook: str, request: object) -> None:
        if self._hooks.has(hook):
            await self._hooks.call(hook, request, type(None))

    # After a crash, and whenever a side does not know

    async def _evidence(self, run: _Run) -> Evidence:
        if not self._hooks.has("migrate_evidence"):
            return Evidence(guest=GuestEvidence.UNKNOWN, transfer=TransferEvidence.UNKNOWN)
        return await self._limited(run, "migrate_evidence", self._evidence_request(run), Evidence)

    def _evidence_request(self, run: _Run) -> EvidenceRequest:
        return EvidenceRequest(
            id=run.row.migration_id,
            uuid=run.row.uuid,
            name=run.row.name,
            side=run.side,
            process=run.row.process,
        )

    async def _look(self, run: _Run) -> Input | None:
        return recover(run.row, await self._evidence(run))

    async def _recover(self, run: _Run) -> None:
        """Feed what the evidence says until the row is settled, waits for the other side, or nobody knows more."""
        for _ in range(_RECOVERY_ROUNDS):
            if (
                run.done
                or run.serving is not None
                or run.state in (State.STOPPED, State.SWITCHED, State.BEREFT)
            ):
                return
            given = await self._look(run)
            if given is None:
                if run.state in QUESTIONS:
                    return  # the other side is asked next
                _log.warning(
                    "migration %s of domain %s is in doubt: the hypervisor does not say what became of the guest",
                    run.row.migration_id,
                    run.row.name,
                )
                return
            if given is Input.CANCEL:
                run.row = replace(
                    run.row, reason="the destination was restarted before the guest had arrived"
                )
            await self._feed(run, given)

    async def _recover_or_ask(self, run: _Run) -> None:
        """Recover; a source that finds nothing out goes on to ask."""
        await self._recover(run)
        if run.state is State.HANDING:
            await self._feed(run, Input.UNCLEAR)

    # What a person asks for

    def in_doubt(self) -> list[Resolution]:
        """Every migration that is open here, and what is missing; asks nobody."""
        return [
            describe(run.row, run.state, settled=False, under_way=_under_way(run)) for run in self._open()
        ]

    async def resolve(
        self, migration_id: MigrationId | None = None, testimony: Testimony | None = None
    ) -> list[Resolution]:
        """Settle what is open here: alone, by asking the other end, and with what a person brings.

        A migration that is under way is left alone.  Twice, or at both ends at once, is harmless.

        :param migration_id: only this one; None is every open one.
        :raises MigrationNotFoundError: nothing of that id is known here.
        :raises OptionError: evidence was brought, and it is not said for which of several migrations.
        :raises JournalError: the journal that was brought cannot be used.
        :cancellation: between two steps; what was decided stays.
        """
        runs = [run for run in self._open() if migration_id in (None, run.row.migration_id)]
        if not runs and migration_id is not None:
            return self._known(migration_id)
        if testimony is not None and len(runs) > 1:
            raise OptionError(
                f"{len(runs)} migrations are open here: say which one the evidence is about",
                option="migration",
            )
        return [await self._resolve(run, testimony) for run in runs]

    def _known(self, migration_id: MigrationId) -> list[Resolution]:
        rows = [row for side in Side if (row := self._journal.read(side, migration_id)) is not None]
        if not rows:
            raise MigrationNotFoundError(f"no migration {migration_id} is known here")
        return [describe(row, fall_back(row.record), settled=row.record.decided) for row in rows]

    async def _resolve(self, run: _Run, testimony: Testimony | None) -> Resolution:
        if _under_way(run):
            return describe(run.row, run.state, settled=False, under_way=True)
        answered: PaperKind | None = None
        trouble = ""
        try:
            with anyio.fail_after(run.options.patience_s):
                answered = await self._look_and_ask(run)
        except TimeoutError:
            trouble = f"no answer within {run.options.patience_s:g} s"
        except FerrymanError as error:
            trouble = error.message
        # Whoever has just answered that it is still deciding is not lost.
        if not run.done and testimony is not None and not (testimony.lost and answered is PaperKind.PENDING):
            answered, trouble = await self._testify(run, testimony, answered, trouble)
        return describe(
            run.row,
            run.state,
            settled=run.done,
            under_way=_under_way(run),
            answered=answered,
            trouble=trouble,
        )

    async def _testify(
        self, run: _Run, testimony: Testimony, answered: PaperKind | None, trouble: str
    ) -> tuple[PaperKind | None, str]:
        """Act on what a person brings.

        :returns: what the journal that was brought answers, or what was known before; and what went wrong.
        """
        note = testimony.note()
        if testimony.journal is not None:
            if run.state not in QUESTIONS:
                return answered, trouble  # it is this host's hypervisor that has not answered
            question = run.row.paper(QUESTIONS[run.state])
            answer = await anyio.to_thread.run_sync(ask_journal, testimony.journal, question, run.side, note)
            before = run.row.testimony
            run.row = replace(run.row, testimony=note)
            cookie = encode_cookie(Cookie(paper=answer, address=run.row.peer_address))
            trouble = ""
            try:
                await (self.confirm(cookie) if run.side is Side.SOURCE else self.decide(cookie))
            except FerrymanError as error:
                trouble = error.message
            if not run.row.record.decided:
                run.row = replace(run.row, testimony=before)
            return answer.kind, trouble
        with anyio.CancelScope(shield=True):
            async with run.lock:
                await self._refresh(run)
                # A source that may have resumed by itself is not destroyed while its hypervisor can still be heard.
                silent = run.state is State.SILENT and self._hooks.has("migrate_evidence")
                if run.done or silent or (run.state, Input.WRITTEN_OFF) not in TABLE:
                    return answered, trouble
                # The definition stays, whatever was asked for: it is all that is left of the guest.
                kept = tuple(pair for pair in run.row.extra if pair[0] != "undefine")
                run.row = replace(run.row, testimony=note, extra=kept)
                try:
                    await self._feed(run, Input.WRITTEN_OFF)
                except FerrymanError as error:
                    return answered, error.message
        return answered, ""

    def _open(self) -> list[_Run]:
        return [run for run in self._runs.values() if not run.done]

    async def _ask_once(self, run: _Run) -> PaperKind:
        """Ask the other side, and act on what decides.

        :returns: what it answered.
        """
        question = self._cookie(run, QUESTIONS[run.state])
        answers: list[bytes] = []

        async def ask_destination(destination: Endpoint) -> None:
            answers.append((await destination.decide(question)).cookie)

        async def ask_source(source: Endpoint) -> None:
            answers.append(await source.inquire(question))

        await self._peer(run.row.peer_address, ask_destination if run.side is Side.SOURCE else ask_source)
        # The other host may be open for the question only, and what follows may ask it more: it is let go before.
        paper = decode_cookie(answers[0]).paper
        if run.side is Side.SOURCE:
            await self._take_answer(run, paper)
        elif paper.kind is not PaperKind.PENDING:
            await self.decide(answers[0])
        return paper.kind

    async def _look_and_ask(self, run: _Run) -> PaperKind | None:
        """Do what this host can find out alone, then ask the other side.

        :returns: what it answered, or None where it was not asked.
        """
        async with run.lock:
            with anyio.CancelScope(shield=True):
                await self._refresh(run)
                await self._recover_or_ask(run)
        if run.done or run.state not in QUESTIONS:
            return None
        return await self._ask_once(run)

    async def _ask_until_answered(self, run: _Run) -> None:
        wait_s = _ASK_FIRST_S
        while not run.done:
            for ask_or_mend in (self._look_and_ask, partial(self._keep_whole, within_s=wait_s)):
                try:
                    await ask_or_mend(run)
                except FerrymanError as error:
                    _log.info("migration %s is still in doubt: %s", run.row.migration_id, error)
            if not run.done:
                await anyio.sleep(wait_s)
                wait_s = min(wait_s * 2, _ASK_LONGEST_S)

    async def _keep_whole(self, run: _Run, within_s: float) -> None:
        """Post-copy: mend the stream of a guest that nobody has claimed yet, if it is broken or breaks in that time.

        Without its pages the destination may not even be able to say what became of the guest.
        """
        if run.serving is not None:
            await run.serving.wait()
        elif run.state is State.SWITCHED and self._hooks.has("migrate_serve"):
            reply = ServeReply()
            with anyio.move_on_after(within_s):
                reply = await self._hooks.call("migrate_serve", self._evidence_request(run), ServeReply)
            if reply.broken:
                await self._mend(run)

    def _lease(self, run: _Run) -> None:
        """Let an undecided side give up by itself when its caller is gone (rule 5)."""
        run.lease_end = anyio.current_time() + run.options.lease_s
        if run.lease_end < self._next_look:
            self._look_sooner.set()

    async def _watch_leases(self) -> None:
        """Wait for the first lease to end, of all; one that is renewed meanwhile is only looked at too early."""
        while True:
            self._look_sooner = anyio.Event()
            watched = [run for run in self._runs.values() if not run.done and not run.lease_ending]
            self._next_look = min((run.lease_end for run in watched), default=math.inf)
            now = anyio.current_time()
            if self._next_look > now:
                with anyio.move_on_after(self._next_look - now):
                    await self._look_sooner.wait()
                continue
            for run in watched:
                if run.lease_end <= now:
                    run.lease_ending = True
                    self._start(lambda run=run: self._end_lease(run))  # type: ignore[misc]

    async def _end_lease(self, run: _Run) -> None:
        try:
            await self._lease_ended(run)
        except FerrymanError as error:
            _log.warning("migration %s could not be settled yet: %s", run.row.migration_id, error)
        run.lease_ending = False
        self._lease(run)

    async def _lease_ended(self, run: _Run) -> None:
        """Do what a side does by itself: give up, refuse, look again, or ask."""
        if run.transfer is not None:
            run.transfer.cancel()
            return
        if run.state in QUESTIONS:
            await self._ask_until_answered(run)
            return
        async with run.lock:
            if run.done or run.lease_end > anyio.current_time():
                return
            with anyio.CancelScope(shield=True):
                await self._refresh(run)
                match run.state:
                    case State.PREPARED | State.BEGUN if not run.recovered:
                        run.row = replace(
                            run.row, reason="the caller was not heard of for the length of the lease"
                        )
                        await self._feed(run, Input.CANCEL if run.state is State.PREPARED else Input.GIVE_UP)
                    case _:
                        await self._recover_or_ask(run)

    # Small things

    async def _run(self, side: Side, paper: Paper) -> _Run | None:
        """Find the run that a paper names, in memory or in the journal."""
        run = self._runs.get((side, paper.migration_id))
        if run is not None:
            return run
        row = self._journal.read(side, paper.migration_id)
        if row is None:
            return None
        return _Run(side=side, state=fall_back(row.record), row=row, done=row.settled)

    @contextmanager
    def _admit(self, uuid: DomainUUID) -> Iterator[None]:
        self._admitting.add(uuid)
        try:
            yield
        finally:
            self._admitting.discard(uuid)

    def _cookie(self, run: _Run, kind: PaperKind, extra: tuple[tuple[str, str], ...] = ()) -> bytes:
        return encode_cookie(Cookie(paper=run.row.paper(kind), address=self.address, extra=extra))


def _sends(run: _Run) -> bool:
    """Whether something is being sent: the transfer, or in post-copy the pages after it."""
    if run.serving is not None:
        return not run.serving.is_set()
    switched = run.transfer_reply is not None and run.transfer_reply.switched
    return run.transfer is not None or (switched and not run.done)


def _under_way(run: _Run) -> bool:
    """Whether somebody still drives it, whom its lease ends otherwise, or the rest of its guest is being sent."""
    driven = (State.ABSENT, State.BEGUN, State.PREPARING, State.PREPARED)
    serves = run.serving is not None and not run.serving.is_set()
    return run.transfer is not None or serves or (run.state in driven and not run.recovered)


def _flags(**flags: bool) -> tuple[tuple[str, str], ...]:
    return tuple((name, "yes") for name, value in flags.items() if value)


def _from_driver(cookie: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((_DRIVER_PREFIX + key, value) for key, value in cookie.items())


def _to_driver(cookie: Cookie) -> dict[str, str]:
    return {
        key.removeprefix(_DRIVER_PREFIX): value
        for key, value in cookie.extra
        if key.startswith(_DRIVER_PREFIX)
    }


def _info(row: MigrationRow) -> DomainInfo:
    return DomainInfo(
        name=row.name,
        uuid=row.uuid,
        state=DomainState.PAUSED if row.arrives_paused else DomainState.RUNNING,
        persistent=False,
        memory_bytes=0,
        vcpus=0,
    )
