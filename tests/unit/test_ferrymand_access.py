"""Who may do what at the daemon, and what is written down of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman.hookspecs import AccessRequest, Client, hookimpl
from ferryman_remote import ferry, protocol
from ferryman_remote.daemon.answers import ANSWERS
from ferryman_remote.daemon.config import Config, ConfigError
from ferryman_remote.daemon.rules import Rule, Rules, RulesError, read_rules
from ferryman_remote.values import dump
from ferryman_remote.wire import Packet, PacketType
from ferryman_remote.xdr import decode, encode
from tests.unit import test_ferrymand_session as sessions
from tests.unit.test_ferrymand_session import DOMAIN, served

USER = Client(transport="unix", uid=1000, pid=7)
NAMED = Client(transport="tls", certificate="a.example", address="h port 1")
OTHER = DOMAIN.replace("web", "db").replace("000000000001", "000000000002")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def asked(action: str = "domain_start", name: str | None = "web", client: Client = USER) -> AccessRequest:
    return AccessRequest(client=client, action=action, host="test:///lab", name=name)


@pytest.mark.parametrize(
    ("client", "identity", "shown"),
    [
        (USER, "uid:1000", "user 1000, process 7"),
        (
            Client(transport="tls", certificate="a.example", address="h port 1"),
            "certificate:a.example",
            "a.example at h port 1",
        ),
        (Client(transport="tcp", address="h port 1"), "anybody", "h port 1"),
        (Client(transport="tcp"), "anybody", "an unknown address"),
    ],
)
def test_who_a_client_is(client: Client, identity: str, shown: str) -> None:
    assert (client.identity, str(client)) == (identity, shown)


async def test_the_first_rule_that_fits_decides() -> None:
    rules = read_rules(
        """
        [[rule]]
        allow = false
        domains = ["db-*"]
        actions = ["domain_destroy", "domain_undefine"]
        [[rule]]
        allow = true
        who = ["uid:1000", "certificate:*.example"]
        hosts = ["test:///lab"]
        """
    )
    assert await rules.access_review(asked()) is None
    assert await rules.access_review(asked("connection_open", None)) is None
    assert await rules.access_review(asked("domain_destroy", "web")) is None
    assert await rules.access_review(asked("domain_destroy", None)) is None
    refused = await rules.access_review(asked("domain_destroy", "db-1"))
    assert refused == "rule 1 forbids uid:1000 domain_destroy of domain db-1"
    other = Client(transport="unix", uid=1001, pid=8)
    assert (
        await rules.access_review(asked(client=other)) == "no rule allows uid:1001 domain_start of domain web"
    )
    assert await rules.access_review(asked(client=NAMED)) is None
    assert (
        await Rules().access_review(asked("connection_open", None))
        == "no rule allows uid:1000 connection_open"
    )
    # What concerns no domain is not what a rule about some domains speaks of.
    assert not Rule(True, domains=("web*",)).fits(asked("host_autostart", None))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[rule", "no TOML"),
        ("x = 1", "'x'"),
        ("rule = 1", "list of tables"),
        ("rule = [1]", "list of tables"),
        ("[[rule]]", "rule 1 must say allow"),
        ("[[rule]]\nallow = 1", "rule 1 must say allow"),
        ("[[rule]]\nallow = true\nwhom = []", "'whom'"),
        ("[[rule]]\nallow = true\nwho = []", "who of rule 1"),
        ("[[rule]]\nallow = true\nwho = 'uid:0'", "who of rule 1"),
        ("[[rule]]\nallow = true\n[[rule]]\nallow = true\nactions = [1]", "actions of rule 2"),
    ],
)
def test_rules_that_cannot_be_used(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RulesError, match=said):
        read_rules(text)
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"rules\.toml cannot be used"):
        Config(rules=str(tmp_path / "rules.toml")).reviewer()


def test_a_file_of_rules_that_is_not_there(tmp_path: Path) -> None:
    assert Config().reviewer() is None
    with pytest.raises(ConfigError, match="cannot be used"):
        Config(rules=str(tmp_path / "rules.toml")).reviewer()
    (tmp_path / "rules.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be used"):
        Config(rules=str(tmp_path / "rules.toml")).reviewer()


@given(st.text())
def test_any_text_is_rules_or_an_error(text: str) -> None:
    try:
        assert isinstance(read_rules(text), Rules)
    except RulesError:
        pass


def test_every_change_has_an_action_that_rules_can_name() -> None:
    actions = {answer.action for answer in ANSWERS.values()} - {""}
    assert {"domain_define", "domain_start", "domain_console", "migrate_in", "migrate_out"} <= actions
    assert all(action.startswith(("domain_", "migrate_")) for action in actions)
    # Their hooks are called the same, so that a rule holds for both of a daemon's programs.
    hooks = {action for action in actions if action.startswith("domain_")}
    assert hooks <= ferry.OFFERED, hooks - ferry.OFFERED


async def test_what_a_rule_forbids_is_not_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ferrymand.audit")
    rules = read_rules(
        """
        [[rule]]
        allow = false
        domains = ["db"]
        actions = ["domain_destroy", "domain_console", "migrate_*"]
        [[rule]]
        allow = true
        """
    )
    async with served(tmp_path, reviewer=rules) as place, place.client() as client:
        await client.open()
        found: list[Any] = []
        for text in (DOMAIN, OTHER):
            await client.send("DOMAIN_CREATE_XML", text, 0)
            (dom,) = decode(protocol.OfDomain, (await client.ok()).payload)
            found.append(dom)
        web, db = found
        await client.send("DOMAIN_DESTROY", db)
        error = await client.error()
        assert error.code == 88
        assert error.message == "access denied: rule 1 forbids uid:1000 domain_destroy of domain db"
        # By another one's name, too.
        await client.send("DOMAIN_DESTROY", db._replace(name="web"))
        assert (await client.error()).code == 88
        await client.send("DOMAIN_OPEN_CONSOLE", db, None, 0)
        assert (await client.error()).code == 88
        await client.send("DOMAIN_MIGRATE_PREPARE3_PARAMS", (), b"", 0)
        await client.error()
        await client.send("CONNECT_LIST_ALL_DOMAINS", 1, 0)
        assert decode(protocol.ConnectListAllDomainsReply, (await client.ok()).payload).ret == 2
        for number, name, arguments in (
            (ferry.Number.HOOK, "domain_destroy", {"uuid": str(web_uuid(db)), "name": "web"}),
            (
                ferry.Number.CONSOLE,
                "domain_console",
                {"uuid": str(web_uuid(db)), "name": "web", "device": None},
            ),
        ):
            call = encode(ferry.Call(name, dump(arguments)))
            await client.stream.send(
                Packet(ferry.PROGRAM, 1, number, PacketType.CALL, 90, payload=call).pack()
            )
            assert "rule 1 forbids" in ((await client.error()).message or "")
        # What concerns no domain that is known is for a rule about all of them.
        tuning = {"migration_id": "0" * 32, "tuning": {"max_downtime_ms": 5}}
        call = encode(ferry.Call("tune", dump(tuning)))
        await client.stream.send(
            Packet(ferry.PROGRAM, 1, ferry.Number.HOST, PacketType.CALL, 91, payload=call).pack()
        )
        assert "is not sending" in ((await client.error()).message or "")
        await client.send("DOMAIN_DESTROY", web)
        await client.ok()
        await client.send("DOMAIN_DESTROY", web)
        await client.error()
    assert any('action="migrate_tune"' in record.message for record in caplog.records)
    lines = [record.message for record in caplog.records if record.name == "ferrymand.audit"]
    assert lines[0] == (
        'who="uid:1000" from="user 1000, process 7" action="domain_create" host="test:///session/host"'
        ' domain="web" result="done"'
    )
    assert sum('result="refused"' in line and 'domain="db"' in line for line in lines) == 5
    assert (
        sum('action="domain_destroy"' in line and 'domain="web" result="done"' in line for line in lines) == 1
    )


def web_uuid(dom: protocol.Domain) -> str:
    return dom.uuid.hex()[:8] + "-0000-4000-8000-" + dom.uuid.hex()[-12:]


class Fails:
    """An observer that is broken."""

    def __init__(self, answer: Callable[[], object], action: str = "connection_open") -> None:
        self._answer = answer
        self._action = action

    @hookimpl
    async def access_review(self, request: AccessRequest) -> object:
        return self._answer() if request.action == self._action else None


def _raise() -> object:
    raise ValueError("planted")


@pytest.mark.parametrize("answer", [_raise, lambda: True])
async def test_a_reviewer_that_fails_refuses(
    answer: Callable[[], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tmp_path, reviewer=Fails(answer, "domain_create")) as place, place.client() as client:
        await client.open()
        await client.send("DOMAIN_CREATE_XML", DOMAIN, 0)
        error = await client.error()
        assert (error.code, error.message) == (
            88,
            "access denied: the observer ferryman-remote failed on the request",
        )
    assert "observer failed to review access" in caplog.text


async def test_a_host_that_may_not_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup):  # nor may the client that looks afterwards whether others are served
        async with served(tmp_path, reviewer=Rules()) as place, place.client() as client:
            await client.send("CONNECT_OPEN", sessions.LAB, 0)
            error = await client.error()
            assert (error.code, error.message) == (
                88,
                "access denied: no rule allows uid:1000 connection_open",
            )
            await client.send("CONNECT_GET_HOSTNAME")
            assert (await client.error()).message == "hypervisor connection not open"
