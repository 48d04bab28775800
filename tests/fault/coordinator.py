"""The coordinator of a migration as a program of its own: the product's own job over two far hosts.

It begins at the first line on standard input, says what happens in one line each, and at last ``told`` with what its
user is told.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from typing import Any, cast

import anyio
from anyio.abc import TaskGroup

from ferryman import Connection, MigrationOptions, PhaseEvent, ProgressEvent, SettledEvent
from ferryman.connection import _enter_tasks
from ferryman.engine import Begun, Confirmed, Finished, Host, Performed, Prepared
from ferryman.errors import FerrymanError, MigrationError
from ferryman.handover import Cookie, PaperKind, decode_cookie, encode_cookie
from ferryman.hookspecs import OpenReply
from ferryman.registry import Hooks
from ferryman.types import DomainInfo, DomainUUID, MigrationId, Side, StorageCopy, Tuning
from ferryman.uri import ConnectionURI
from tests.fault.rpc import Link, Progress

ENOUGH_BYTES = 1 << 20
"""What a transfer has sent when a scenario does something to it."""


class FarHost:
    """The endpoint of a host in another program."""

    def __init__(self, address: str, link: Link) -> None:
        self.address = address
        self._link = link

    async def _call(self, name: str, *args: object, **named: Any) -> Any:
        return await self._link.call("host", name, *args, **named)

    def require_free(self, uuid: DomainUUID, name: str) -> None:
        """Leave it to begin and prepare, which look where it counts."""

    async def begin(
        self, domain: DomainInfo, options: MigrationOptions, *, migration_id: MigrationId | None = None
    ) -> Begun:
        return cast("Begun", await self._call("begin", domain, options, migration_id=migration_id))

    async def expect(
        self, migration_id: MigrationId, domain: DomainInfo, definition: str, options: MigrationOptions
    ) -> None:
        await self._call("expect", migration_id, domain, definition, options)

    async def prepare(
        self, cookie: bytes, domain: DomainInfo, definition: str, options: MigrationOptions, *, paused: bool
    ) -> Prepared:
        return cast(
            "Prepared", await self._call("prepare", cookie, domain, definition, options, paused=paused)
        )

    async def perform(
        self, cookie: bytes, migration_uri: str, options: MigrationOptions, progress: Progress
    ) -> Performed:
        return cast(
            "Performed", await self._call("perform", cookie, migration_uri, options, progress=progress)
        )

    async def decide(self, cookie: bytes) -> Finished:
        return cast("Finished", await self._call("decide", cookie))

    async def confirm(self, cookie: bytes) -> Confirmed:
        return cast("Confirmed", await self._call("confirm", cookie))

    async def inquire(self, cookie: bytes) -> bytes:
        return cast("bytes", await self._call("inquire", cookie))

    async def switch(self, cookie: bytes) -> None:
        await self._call("switch", cookie)

    async def mend(self, cookie: bytes) -> str:
        return cast("str", await self._call("mend", cookie))

    async def give_up(self, migration_id: MigrationId) -> None:
        await self._call("give_up", migration_id)

    async def tune(self, migration_id: MigrationId, tuning: Tuning) -> None:
        await self._call("tune", migration_id, tuning)

    async def renew(self, side: Side, migration_id: MigrationId) -> None:
        await self._call("renew", side, migration_id)


class _FarHooks:
    """The driver's hooks of a host in another program."""

    observed = False

    def __init__(self, link: Link, distribution: str, names: frozenset[str]) -> None:
        self.distribution = distribution
        self._link = link
        self._names = names

    def has(self, hook: str) -> bool:
        return hook in self._names

    async def call(self, hook: str, request: object, expects: object) -> Any:
        return await self._link.call("hooks", "call", hook, request, expects)

    async def review(self, plan: object) -> list[Any]:
        return []


class FarConnection(Connection):
    """A connection to a host in another program; a connection that broke is dialled again by the next call."""

    def __init__(self, uri: str, at: tuple[str, int], papers: Papers) -> None:
        super().__init__(ConnectionURI.parse(uri))
        self._at = at
        self._papers = papers
        self._tasks: TaskGroup

    async def _open(self) -> None:
        self._tasks = await _enter_tasks(self._stack)
        link = _Redialled(self._at, self._tasks)
        address, distribution, names = await link.call("desk", "greet")
        self._hooks = cast("Hooks", _FarHooks(link, distribution, names))
        self._host = cast("Host", ScriptedHost(address, link, self._papers))
        self._reply = OpenReply(address=address)
        self._stack.callback(self._closed)


class _Redialled(Link):
    """A link that connects when it is used, and again where the connection is gone."""

    def __init__(self, at: tuple[str, int], tasks: TaskGroup) -> None:
        self._at = at
        self._tasks = tasks
        self._current: Link | None = None
        self._dialling = anyio.Lock()

    async def call(
        self, target: str, name: str, *args: object, progress: Progress | None = None, **named: object
    ) -> Any:
        async with self._dialling:
            if self._current is None or self._current.gone:
                self._current = await Link.dial(*self._at, self._tasks)
        return await self._current.call(target, name, *args, progress=progress, **named)


@dataclass(kw_only=True)
class Papers:
    """What passed through the coordinator's hands, and what it is to do with it."""

    order: str
    passport: bytes = b""
    receipt: bytes = b""
    proof: bytes = b""
    verdict: bytes = b""
    options: MigrationOptions | None = None


_BARS = {
    "bar": (PaperKind.CANCEL, PaperKind.ASK, PaperKind.KEPT, PaperKind.CANCEL),
    "bar-ask": (PaperKind.ASK,),
    "bar-kept": (PaperKind.KEPT,),
}


class ScriptedHost(FarHost):
    """A far host whose coordinator may do otherwise than the product's."""

    def __init__(self, address: str, link: Link, papers: Papers) -> None:
        super().__init__(address, link)
        self._papers = papers

    async def prepare(self, cookie: bytes, *arguments: Any, paused: bool) -> Prepared:
        # What an earlier try of the same migration, given up since, may have left on its way: it overtakes the prepare.
        for kind in _BARS.get(self._papers.order, ()):
            await self.decide(as_kind(cookie, kind))
        self._papers.passport = cookie
        prepared = await super().prepare(cookie, *arguments, paused=paused)
        self._papers.receipt = prepared.cookie
        return prepared

    async def perform(self, *arguments: Any) -> Performed:
        if self._papers.order == "stall":
            say("stalled")
            await anyio.sleep_forever()
        if self._papers.order == "ask":
            await self.inquire(as_kind(self._papers.passport, PaperKind.ASK))
        performed = await super().perform(*arguments)
        self._papers.proof = performed.cookie
        if self._papers.order == "ask":
            await self.inquire(as_kind(performed.cookie, PaperKind.ASK))
        return performed

    async def decide(self, cookie: bytes) -> Finished:
        finished = await super().decide(cookie)
        self._papers.verdict = finished.cookie
        return finished

    async def renew(self, side: Side, migration_id: MigrationId) -> None:
        if self._papers.order != "stall":
            await super().renew(side, migration_id)


def as_kind(cookie: bytes, kind: PaperKind) -> bytes:
    """The same paper, saying something else."""
    read = decode_cookie(cookie)
    return encode_cookie(Cookie(paper=replace(read.paper, kind=kind), address=read.address))


def say(*words: object) -> None:
    print(*words, flush=True)


def _options(text: str) -> MigrationOptions:
    """Options from JSON, which has neither enums nor tuples."""
    told = json.loads(text)
    if "copy_storage" in told:
        told["copy_storage"] = StorageCopy(told["copy_storage"])
    if "disks" in told:
        told["disks"] = tuple((target, path) for target, path in told["disks"])
    return MigrationOptions(**told)


async def _again(source: Connection, destination: Connection, papers: Papers) -> None:
    """Show every paper once more, as a coordinator that does not know what it has said."""
    shown = [
        (destination, "decide", (papers.proof,)),
        (destination, "decide", (as_kind(papers.receipt, PaperKind.CANCEL),)),
        (destination, "decide", (as_kind(papers.receipt, PaperKind.ASK),)),
        (destination, "decide", (as_kind(papers.receipt, PaperKind.PROOF),)),
        (destination, "decide", (as_kind(papers.receipt, PaperKind.KEPT),)),
        (source, "confirm", (papers.verdict,)),
        (source, "inquire", (as_kind(papers.receipt, PaperKind.ASK),)),
        (source, "give_up", (decode_cookie(papers.receipt).paper.migration_id,)),
    ]
    for connection, name, arguments in shown:
        try:
            await getattr(connection.host, name)(*arguments)
        except FerrymanError as error:
            say("again", name, error.code)


async def _main(arguments: argparse.Namespace) -> None:
    papers = Papers(order=arguments.order)
    ends = [
        FarConnection(uri, (host, int(port)), papers)
        for uri, host, port in (arguments.source, arguments.destination)
    ]
    options = _options(arguments.options)
    told: dict[str, object]
    await anyio.to_thread.run_sync(sys.stdin.readline)
    try:
        async with ends[0] as source, ends[1] as destination:
            try:
                domain = await source.lookup_by_name(arguments.name)
                async with domain.migrate(destination, options) as job:
                    async for event in job.progress():
                        if isinstance(event, PhaseEvent):
                            say("phase", event.phase.value, "end" if event.ended else "begin")
                        if isinstance(event, SettledEvent):
                            say("settled", event.guest_state.value)
                        if not isinstance(event, ProgressEvent):
                            continue
                        if (event.statistics.transferred_bytes or 0) < ENOUGH_BYTES:
                            continue
                        say("sending")
                        if arguments.order == "abort":
                            job.abort()
                        if arguments.order == "ask" and papers.receipt:
                            await destination.host.decide(as_kind(papers.receipt, PaperKind.ASK))
                result = await job.result()
                told = {"guest": "destination", "blackout_ms": result.blackout_ms}
            finally:
                if arguments.again and papers.receipt and papers.proof:
                    await _again(source, destination, papers)
    except MigrationError as error:
        state = error.guest_state
        told = {"guest": state.value if state else None, "error": error.code, "text": str(error)}
    except FerrymanError as error:
        told = {"guest": None, "error": error.code, "text": str(error)}
    say("told", json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, nargs=3, metavar=("URI", "HOST", "PORT"))
    parser.add_argument("--destination", required=True, nargs=3, metavar=("URI", "HOST", "PORT"))
    parser.add_argument("--name", required=True)
    parser.add_argument("--options", default="{}", help="fields of MigrationOptions as JSON")
    parser.add_argument("--order", default="", choices=("", "abort", "ask", "stall", *_BARS))
    parser.add_argument("--again", action="store_true", help="show every paper once more at the end")
    anyio.run(_main, parser.parse_args())


if __name__ == "__main__":
    main()
