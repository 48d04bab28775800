"""Encrypted transfers on real QEMU: whatever is wrong is found before a page moves, and the guest goes on."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

import ferryman
import ferryman_qemu.streams
from ferryman import GuestState, MigrationOptions
from ferryman.errors import MigrationError, PerformError, PrepareError
from ferryman_qemu.migrations import MigrationHooks
from tests.options.credentials import put_credentials
from tests.qemu import NAME, Field, RawRelay, relayed

_HANDSHAKE_BYTES = 16_384
"""More than what both ends say before anything is sent, and less than the guest's first pages."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def put(roots: list[Path], *kinds: str) -> None:
    for root, kind in zip(roots, kinds, strict=True):
        put_credentials(root, kind)


@pytest.mark.parametrize(
    ("kinds", "plain", "words"),
    [
        (("good", "other name"), None, "does not match the hostname 127.0.0.1"),
        (("good", "other signer"), None, "known issuer"),
        (("other signer", "good"), None, "known issuer"),
        (("key", "other key"), None, "handshake"),
        (("good", "good"), "source", "."),
        (("good", "good"), "destination", "."),
    ],
)
async def test_what_is_wrong_ends_before_a_page_moves(
    field: Field, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, str], plain: str | None, words: str
) -> None:
    put(field.roots, *kinds)
    encrypt = MigrationHooks._encrypt

    async def half(self: MigrationHooks, guest: Any, *, server: bool, name: str = "") -> None:
        if server != (plain == "destination"):
            await encrypt(self, guest, server=server, name=name)

    with monkeypatch.context() as patch, relayed(patch, RawRelay) as relays:
        if plain is not None:
            patch.setattr(MigrationHooks, "_encrypt", half)
        tls = MigrationOptions(tls=True)
        async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
            domain = await a.create(field.definition)
            await anyio.to_thread.run_sync(field.wait_ticks, 50)
            with pytest.raises(PerformError, match=words) as caught:
                await domain.migrate(b, tls)
            assert caught.value.guest_state is GuestState.SOURCE
            assert a.open_migrations() == b.open_migrations() == []
            await anyio.to_thread.run_sync(field.wait_ticks, 20)
            assert field.emulators(field.roots[1]) == []
            # A source that was made to send in plain sends until it is cut off; nobody reads what it has sent.
            if plain == "source":
                # What a source that was made to send in plain gets into the kernel's buffers until it is cut off is a
                # matter of speed. The receiver takes the first of it for what it is, and reads no more.
                (log,) = field.roots[1].rglob("*.log")
                assert "TLS handshake failed: An unexpected TLS packet was received" in log.read_text()
            else:
                assert [relay.passed_bytes < _HANDSHAKE_BYTES for relay in relays] == [True]
            await domain.destroy()
    field.assert_unbroken(crossings=0)


@pytest.mark.parametrize(
    ("kinds", "error"), [(("good", "expired"), PrepareError), (("expired", "good"), PerformError)]
)
async def test_an_expired_certificate_ends_before_anybody_connects(
    field: Field, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, str], error: type[MigrationError]
) -> None:
    put(field.roots, *kinds)
    with relayed(monkeypatch, RawRelay) as relays:
        async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
            domain = await a.create(field.definition)
            await anyio.to_thread.run_sync(field.wait_ticks, 50)
            with pytest.raises(error, match="expired") as caught:
                await domain.migrate(b, MigrationOptions(tls=True))
            assert caught.value.guest_state is GuestState.SOURCE
            assert relays == []
            assert a.open_migrations() == b.open_migrations() == []
            await anyio.to_thread.run_sync(field.wait_ticks, 20)
            assert field.emulators(field.roots[1]) == []
            await domain.destroy()
    field.assert_unbroken(crossings=0)


async def test_a_client_that_the_rules_deny(field: Field) -> None:
    """QEMU judges it when both ends are through with the handshake: the source has begun to send, and it is dropped."""
    put(field.roots, "good", "nobody may send")
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        domain = await a.create(field.definition)
        await anyio.to_thread.run_sync(field.wait_ticks, 50)
        with pytest.raises(PerformError) as caught:
            await domain.migrate(b, MigrationOptions(tls=True))
        assert caught.value.guest_state is GuestState.SOURCE
        assert a.open_migrations() == b.open_migrations() == []
        said = (field.roots[1] / "logs" / f"{NAME}.log").read_text()
        assert "authz check for" in said
        assert "is denied" in said
        await anyio.to_thread.run_sync(field.wait_ticks, 20)
        assert field.emulators(field.roots[1]) == []
        await domain.destroy()
    field.assert_unbroken(crossings=0)


async def test_a_peer_that_is_silent_in_the_handshake_is_cut(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's main loop and the guest wait for the peer then, until the connection is ended."""
    put(field.roots, "good", "good")
    with socket.create_server(("127.0.0.1", 0)) as silent, monkeypatch.context() as patch:
        patch.setattr(ferryman_qemu.streams, "CONNECT_S", 1.0)
        patch.setattr(
            ferryman_qemu.streams,
            "connect_stream",
            lambda _: socket.create_connection(silent.getsockname()),
        )
        async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
            domain = await a.create(field.definition)
            await anyio.to_thread.run_sync(field.wait_ticks, 50)
            with anyio.fail_after(20), pytest.raises(PerformError) as caught:
                await domain.migrate(b, MigrationOptions(tls=True))
            assert caught.value.guest_state is GuestState.SOURCE
            await anyio.to_thread.run_sync(field.wait_ticks, 20)
            patch.undo()
            await domain.migrate(b, MigrationOptions(tls=True))
            await anyio.to_thread.run_sync(field.wait_ticks, 20)
            await (await b.lookup_by_name(NAME)).destroy()
    field.assert_unbroken(crossings=1)
