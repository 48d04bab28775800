"""The handover's part of post-copy: two engines, real journals, and a hypervisor that only notes what it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from ferryman.engine import Begun, Endpoint, Finished, Host, Performed, Prepared
from ferryman.errors import (
    ConnectError,
    DomainStateError,
    FerrymanError,
    GuestLostError,
    HypervisorError,
    PaperError,
    PerformError,
)
from ferryman.handover import Cookie, PaperKind, Record, decode_cookie, encode_cookie, with_kind
from ferryman.hookspecs import (
    BeginReply,
    ConfirmReply,
    MendReply,
    PerformReply,
    PrepareReply,
    ServeReply,
    Verdict,
)
from ferryman.journal import Journal
from ferryman.registry import Hooks
from ferryman.resolve import Testimony as Evidenced
from ferryman.types import (
    DomainInfo,
    DomainState,
    DomainUUID,
    Evidence,
    GuestEvidence,
    MigrationOptions,
    Side,
    TransferEvidence,
    TransferStatistics,
    Tuning,
)

INFO = DomainInfo(
    name="web",
    uuid=DomainUUID("00000000-0000-4000-8000-000000000001"),
    state=DomainState.RUNNING,
    persistent=False,
    memory_bytes=0,
    vcpus=1,
)
OPTIONS = MigrationOptions(migration_uri="tcp://127.0.0.1:1", patience_s=2.0, lease_s=60.0)


class Hypervisor:
    """Takes every command, and notes it."""

    distribution = "note-taking"
    observed = False

    def __init__(self) -> None:
        self.told: list[str] = []
        self.switched = anyio.Event()
        self.every_page = anyio.Event()
        self.served: list[ServeReply] = []
        """What the pages come to before every one has come."""
        self.mended: list[MendReply | FerrymanError] = []
        self.end: PerformReply | PerformError = PerformReply(statistics=TransferStatistics(), switched=True)
        self.evidence = Evidence(guest=GuestEvidence.STOPPED, transfer=TransferEvidence.SWITCHED)
        self.mute = False
        """Until its stream is mended it answers nothing."""

    def has(self, hook: str) -> bool:
        return hook not in ("migrate_expect", "migrate_adopt", "domain_definition")

    async def call(self, hook: str, request: Any, _expects: type[Any]) -> Any:
        self.told.append(hook)
        if self.mute and hook in ("migrate_finish", "migrate_evidence"):
            raise HypervisorError("it waits for pages")
        match hook:
            case "migrate_begin":
                return BeginReply(definition="<domain/>", paused=False, process="source")
            case "migrate_prepare":
                return PrepareReply(process="receiver")
            case "migrate_tune" if request.tuning.postcopy:
                self.switched.set()
            case "migrate_perform":
                await self.switched.wait()
                if isinstance(self.end, PerformError):
                    raise self.end
                return self.end
            case "migrate_serve":
                if self.served:
                    return self.served.pop(0)
                await self.every_page.wait()
                return ServeReply()
            case "migrate_mend":
                self.told.append(str(request.migration_uri))
                mended = self.mended.pop(0)
                if isinstance(mended, FerrymanError):
                    raise mended
                self.mute = False
                return mended
            case "migrate_finish":
                self.told.append(request.verdict.value)
            case "migrate_confirm":
                self.told.append(request.verdict.value)
                return ConfirmReply()
            case "migrate_evidence":
                return self.evidence
        return None


class End:
    """One host of the two; it asks the other while that is reachable."""

    def __init__(self, journal: Journal, address: str, tasks: Any) -> None:
        self.hypervisor = Hypervisor()
        self.peer: End | None = None
        one_at_a_time = anyio.Lock()

        async def ask(_address: str, question: Callable[[Endpoint], Awaitable[None]]) -> None:
            if self.peer is None:
                raise ConnectError("the other host is away")
            async with one_at_a_time:  # as where a host is open for one question only
                await question(self.peer.host)

        def start(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
            tasks.start_soon(body)

        self.journal = journal
        self.host = Host(cast("Hooks", self.hypervisor), journal, address=address, peer=ask, start=start)

    def record(self, side: Side, begun: Begun) -> Record | None:
        row = self.journal.read(side, begun.id)
        return row.record if row is not None else None


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def two(directory: Path) -> AsyncIterator[tuple[End, End]]:
    with ExitStack() as stack:
        journals = [stack.enter_context(closing(Journal.open(directory / name))) for name in "ab"]
        async with anyio.create_task_group() as tasks:
            ends = [End(journal, f"note:///{journal.path.name}", tasks) for journal in journals]
            ends[0].peer, ends[1].peer = ends[1], ends[0]
            for end in ends:
                await end.host.recover()
            yield ends[0], ends[1]
            tasks.cancel_scope.cancel()


async def prepared(a: End, b: End) -> tuple[Begun, Prepared]:
    begun = await a.host.begin(INFO, OPTIONS)
    receipt = await b.host.prepare(begun.cookie, INFO, begun.definition, OPTIONS, paused=False)
    return begun, receipt


@asynccontextmanager
async def transferring(a: End, b: End) -> AsyncIterator[tuple[Begun, Prepared, list[Performed]]]:
    """A transfer under way; leaving the block waits for its end, which the list then holds."""
    begun, receipt = await prepared(a, b)
    done: list[Performed] = []

    async def perform() -> None:
        done.append(await a.host.perform(receipt.cookie, receipt.migration_uri, OPTIONS, lambda _: None))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(perform)
        await told(a, "migrate_perform")
        yield begun, receipt, done


async def told(end: End, hook: str) -> None:
    """Wait until a hypervisor was told something."""
    with anyio.fail_after(5):
        while hook not in end.hypervisor.told:
            await anyio.lowlevel.checkpoint()


async def test_a_switch_from_pledge_to_the_last_page(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        async with transferring(a, b) as (begun, receipt, done):
            pledge = await b.host.decide(with_kind(receipt.cookie, PaperKind.SWITCH))
            assert pledge.kind is PaperKind.PLEDGE
            assert b.record(Side.DESTINATION, begun) is Record.PLEDGED
            await a.host.switch(pledge.cookie)
        assert done[0].kind is PaperKind.PROOF
        claimed = await b.host.decide(done[0].cookie)
        assert claimed.kind is PaperKind.CLAIM
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(a.host.confirm, claimed.cookie)
            await told(a, "migrate_serve")
            # The decision is durable, and the half that the destination needs is still there.
            assert a.record(Side.SOURCE, begun) is Record.GIVEN
            assert Verdict.GIVEN.value not in a.hypervisor.told
            a.hypervisor.every_page.set()
        assert a.hypervisor.told[-1] == Verdict.GIVEN.value
        assert a.host.open_migrations() == b.host.open_migrations() == []


async def claimed(a: End, b: End) -> tuple[Begun, Finished]:
    """A guest that is split: claimed, and not all of its pages are there."""
    async with transferring(a, b) as (begun, receipt, done):
        pledge = await b.host.decide(with_kind(receipt.cookie, PaperKind.SWITCH))
        await a.host.switch(pledge.cookie)
    return begun, await b.host.decide(done[0].cookie)


async def test_a_broken_stream_is_mended_as_often_as_it_takes(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        _begun, claim = await claimed(a, b)
        a.hypervisor.served = [ServeReply(broken=True)] * 3
        # The destination is asked first each time; the second time it cannot, and the third time the source cannot.
        b.hypervisor.mended = [
            MendReply(migration_uri="tcp://127.0.0.1:2"),
            HypervisorError("not now"),
            MendReply(migration_uri="tcp://127.0.0.1:3"),
        ]
        a.hypervisor.mended = [MendReply(), HypervisorError("nor now")]
        a.hypervisor.every_page.set()
        confirmed = await a.host.confirm(claim.cookie)
        assert (confirmed.kind, confirmed.guest_gone) == (PaperKind.GIVEN, False)
        told = [what for what in a.hypervisor.told if what.startswith("tcp:")]
        assert told == ["tcp://127.0.0.1:2", "tcp://127.0.0.1:3"]
        assert b.hypervisor.told.count("migrate_mend") == 3
        assert a.hypervisor.told[-1] == Verdict.GIVEN.value
        assert a.host.open_migrations() == b.host.open_migrations() == []


async def test_a_stream_is_mended_after_a_source_that_asked_was_answered(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        begun, _claim = await claimed(a, b)
        a.hypervisor.served = [ServeReply(broken=True)]
        a.hypervisor.mended = b.hypervisor.mended = [MendReply(migration_uri="tcp://127.0.0.1:2")] * 2
        (resolution,) = await a.host.resolve(begun.id)
        assert resolution.record is Record.GIVEN
        assert resolution.missing == "nothing: the rest of the guest is being sent"
        await told(a, "migrate_mend")
        a.hypervisor.every_page.set()
        await told(a, "migrate_confirm")
        assert a.host.open_migrations() == b.host.open_migrations() == []


async def test_a_destination_that_cannot_answer_before_more_pages_come(tmp_path: Path) -> None:
    """Nobody knows whether the guest runs there, so it is not claimed; and nobody will know while pages are missing."""
    async with two(tmp_path) as (a, b):
        async with transferring(a, b) as (begun, receipt, done):
            pledge = await b.host.decide(with_kind(receipt.cookie, PaperKind.SWITCH))
            await a.host.switch(pledge.cookie)
        b.hypervisor.mute = True
        b.hypervisor.evidence = Evidence(guest=GuestEvidence.RUNNING)
        with pytest.raises(HypervisorError, match="waits for pages"):
            await b.host.decide(done[0].cookie)
        assert b.record(Side.DESTINATION, begun) is Record.CLAIMING
        a.hypervisor.served = [ServeReply(broken=True)]
        a.hypervisor.mended = b.hypervisor.mended = [MendReply(migration_uri="tcp://127.0.0.1:2")] * 2
        a.hypervisor.every_page.set()
        # The next program to open the source's host asks.
        await a.host.recover()
        await told(a, "migrate_confirm")
        assert a.record(Side.SOURCE, begun) is Record.GIVEN
        assert b.record(Side.DESTINATION, begun) is Record.CLAIMED
        assert a.host.open_migrations() == b.host.open_migrations() == []


@pytest.mark.parametrize("half", ["source", "destination"])
async def test_a_half_that_is_gone_loses_the_guest(tmp_path: Path, half: str) -> None:
    async with two(tmp_path) as (a, b):
        begun, claim = await claimed(a, b)
        a.hypervisor.served = [ServeReply(broken=True) if half == "destination" else ServeReply(lost=True)]
        b.hypervisor.mended = [GuestLostError("it is gone")]
        confirmed = await a.host.confirm(claim.cookie)
        assert confirmed.guest_gone
        assert a.record(Side.SOURCE, begun) is Record.GIVEN
        assert a.host.open_migrations() == b.host.open_migrations() == []


async def test_what_is_sent_after_the_switch_can_be_tuned_until_it_ends(tmp_path: Path) -> None:
    tuning = Tuning(postcopy_bandwidth_bytes_per_s=0)
    async with two(tmp_path) as (a, b):
        begun, claim = await claimed(a, b)
        await a.host.tune(begun.id, tuning)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(a.host.confirm, claim.cookie)
            await told(a, "migrate_serve")
            await a.host.tune(begun.id, tuning)
            assert a.hypervisor.told.count("migrate_tune") == 3
            a.hypervisor.every_page.set()
        with pytest.raises(DomainStateError, match="nothing to change"):
            await a.host.tune(begun.id, tuning)


async def test_only_a_guest_that_was_claimed_is_mended(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        begun, receipt = await prepared(a, b)
        asked = with_kind(receipt.cookie, PaperKind.ASK)
        with pytest.raises(PaperError, match="brought no guest here"):
            await b.host.mend(asked)
        assert "migrate_mend" not in b.hypervisor.told
        await a.host.give_up(begun.id)


async def test_no_switch_without_a_pledge(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        async with transferring(a, b) as (_begun, receipt, _done):
            for kind in (PaperKind.RECEIPT, PaperKind.CLAIM, PaperKind.PENDING):
                with pytest.raises(PaperError, match="no pledge"):
                    await a.host.switch(with_kind(receipt.cookie, kind))
            assert not a.hypervisor.switched.is_set()
            pledge = await b.host.decide(with_kind(receipt.cookie, PaperKind.SWITCH))
            await a.host.switch(pledge.cookie)
        with pytest.raises(DomainStateError, match="nothing to switch"):
            await a.host.switch(pledge.cookie)


async def test_a_pledge_stands_against_a_caller_and_falls_with_the_source(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        a.hypervisor.end = PerformError("the stream broke")
        async with transferring(a, b) as (begun, receipt, done):
            pledge = await b.host.decide(with_kind(receipt.cookie, PaperKind.SWITCH))
            cancelled = await b.host.decide(with_kind(receipt.cookie, PaperKind.CANCEL))
            assert cancelled.kind is PaperKind.PENDING
            (doubt,) = await b.host.resolve(begun.id)
            assert not doubt.settled
            assert "has not decided yet" in doubt.missing
            await a.host.switch(pledge.cookie)
        assert done[0].kind is PaperKind.KEPT
        # Nobody brings the paper: the destination asks, and the source says that there will be no proof.
        (settled,) = await b.host.resolve(begun.id)
        assert settled.settled
        assert b.record(Side.DESTINATION, begun) is Record.REFUSED
        assert b.hypervisor.told[-1] == Verdict.DISCARD.value


async def test_a_source_that_never_performed_is_asked_with_a_receipt_that_it_has_not_seen(
    tmp_path: Path,
) -> None:
    async with two(tmp_path) as (a, b):
        begun, receipt = await prepared(a, b)
        await b.host.decide(with_kind(receipt.cookie, PaperKind.SWITCH))
        await a.host.give_up(begun.id)
        assert a.record(Side.SOURCE, begun) is Record.KEPT
        (settled,) = await b.host.resolve(begun.id)
        assert settled.settled
        assert b.record(Side.DESTINATION, begun) is Record.REFUSED


async def test_a_pledged_destination_whose_source_is_lost(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        begun, receipt = await prepared(a, b)
        await b.host.decide(with_kind(receipt.cookie, PaperKind.SWITCH))
        b.peer = None
        (doubt,) = await b.host.resolve(begun.id)
        assert "the source's word" in doubt.missing
        assert "away" in doubt.missing
        (settled,) = await b.host.resolve(begun.id, Evidenced(who="alice", lost=True))
        assert settled.settled
        assert settled.testimony.startswith("alice, ")
        assert b.record(Side.DESTINATION, begun) is Record.REFUSED


async def test_questions_about_what_is_not_known(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        _begun, receipt = await prepared(a, b)
        asked = decode_cookie(with_kind(receipt.cookie, PaperKind.ASK)).paper
        for wrong in (
            replace(asked, generation=7),
            replace(asked, migration_id=type(asked.migration_id)("f" * 32)),
        ):
            answer = await a.host.inquire(encode_cookie(Cookie(paper=wrong)))
            assert decode_cookie(answer).paper.kind is PaperKind.UNKNOWN
        answer = await a.host.inquire(encode_cookie(Cookie(paper=asked)))
        assert decode_cookie(answer).paper.kind is PaperKind.PENDING
