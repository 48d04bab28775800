"""Every message of ``virsh migrate`` broken, on either connection: the guest runs in one place, nothing stays open."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import anyio

import ferryman
from tests.daemons import Daemon, daemon, virsh, virsh_tried
from tests.interop.proxy import Fault, Kind, Proxy, proxied
from tests.qemu import NAME, Field, laid_out

_SETTLE_S = 60.0
_SIDES = ("source", "destination", "between")


@dataclass(frozen=True, slots=True)
class Case:
    """One broken message.

    :param side: whose connection: the client's to the source (0) or to the destination (1), or the source's to the
        destination (2).
    """

    protocol: str
    side: int
    call: int
    kind: Kind
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.protocol} {_SIDES[self.side]} {self.call} {self.name}: {self.kind.value}"


class Wrong(AssertionError):
    """The guest runs twice, nowhere, or from older memory; or something stays open."""


@dataclass
class Ring:
    """Two daemons, and one guest that goes back and forth between them.

    :param proxies: before each daemon, for clients.
    :param peers: the same, for the other daemon.
    """

    field: Field
    ends: tuple[Daemon, Daemon]
    proxies: tuple[Proxy, Proxy]
    peers: tuple[Proxy, Proxy]
    at: int = 0

    def uri(self, end: int, *, proxied: bool) -> str:
        uri = self.ends[end].uri(self.field.roots[end])
        return uri.replace(f":{self.ends[end].port}/", f":{self.proxies[end].port}/") if proxied else uri

    def migrate(self, case: Case | None, *options: str) -> list[list[str]]:
        """Migrate with a fault; returns the calls on each connection, and checks what came of it."""
        source, destination = self.at, 1 - self.at
        sides = (self.proxies[source], self.proxies[destination], self.peers[destination])
        for side, proxy in enumerate(sides):
            proxy.conversations.clear()
            proxy.struck = False
            proxy.fault = Fault(case.call, case.kind) if case is not None and case.side == side else None
        uris = [self.uri(end, proxied=True) for end in (source, destination)]
        done = virsh_tried(uris[0], "migrate", "--live", *options, NAME, uris[1])
        self.check(case, done.returncode, done.stderr)
        return [max(proxy.conversations, key=len, default=[]) for proxy in sides]

    def check(self, case: Case | None, status: int, told: str) -> None:
        anyio.run(self._settle)
        names = [virsh(self.uri(end, proxied=False), "list", "--name").split() for end in (0, 1)]
        if sorted(names) != [[], [NAME]]:
            raise Wrong(f"{case}: the guest is at {names}")
        self.field.the_runner()
        self.field.assert_unbroken()
        before, self.at = self.at, names.index([NAME])
        if case is None and (status or self.at == before):
            raise Wrong(f"the migration without a fault failed: {told}")
        if status == 0 and self.at == before:
            raise Wrong(f"{case}: virsh reports success, and the guest has not moved")

    async def _settle(self) -> None:
        with anyio.fail_after(_SETTLE_S):
            for end in (0, 1):
                async with ferryman.connect(self.uri(end, proxied=False)) as host:
                    while any(not found.settled for found in await host.resolve()):
                        await anyio.sleep(0.05)


@contextmanager
def ring(protocol: str) -> Iterator[Ring]:
    """Daemons that offer one version of the protocol, and a guest that runs at the first."""
    with laid_out() as field, ExitStack() as stack:
        peers = stack.enter_context(proxied()), stack.enter_context(proxied())
        ends = []
        for name, peer in zip("ab", peers, strict=True):
            directory, address = field.directory / f"daemon-{name}", f"tcp://127.0.0.1:{peer.port}"
            offered = [protocol]
            made = stack.enter_context(daemon(directory, address=address, migration_protocols=offered))
            peer.target = made.port
            ends.append(made)
        clients = stack.enter_context(proxied(ends[0].port)), stack.enter_context(proxied(ends[1].port))
        both = Ring(field, (ends[0], ends[1]), clients, peers)
        path = field.directory / "definition.xml"
        path.write_text(field.definition)
        virsh(both.uri(0, proxied=False), "create", str(path))
        field.wait_ticks(20)
        yield both
        virsh(both.uri(both.at, proxied=False), "destroy", NAME)


def run(protocol: str, sample: int | None, seed: int, say: Callable[[str], None]) -> int:
    """Break messages of one version; returns how many.

    :param sample: so many of them, at random; None is every one.
    :raises Wrong: a rule was broken.
    """
    with ring(protocol) as made:
        heard = made.migrate(None)
        cases = [
            Case(protocol, side, call, kind, heard[side][call])
            for side in range(len(_SIDES))
            for call in range(len(heard[side]))
            for kind in Kind
        ]
        if sample is not None and sample < len(cases):
            cases = random.Random(seed).sample(cases, sample)
        for case in cases:
            say(str(case))
            made.migrate(case)
        return len(cases)
