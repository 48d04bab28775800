"""The daemon as stock virsh, libvirt-python and our own client see it; real QEMU guests, real sockets."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

import anyio
import anyio.to_thread
import pytest

import ferryman
from ferryman import MigrationOptions
from ferryman.errors import ConnectError, DomainStateError
from ferryman.types import DomainEventKind
from tests.daemons import EVERYTHING, Daemon, Terminal, daemon, daemons, need_virsh, virsh, virsh_tried
from tests.options.credentials import put_pki
from tests.qemu import NAME, PROMPT_S, Field, console_definition, settled


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _virsh() -> None:
    need_virsh()


def defined(field: Field, uri: str) -> Path:
    path = field.directory / "definition.xml"
    path.write_text(field.definition)
    virsh(uri, "define", str(path))
    return path


def test_the_life_of_a_domain(field: Field) -> None:
    with daemons(field) as (a, _b):
        uri = a.uri(field.roots[0])
        assert virsh(uri, "list", "--all") == ""
        path = defined(field, uri)
        assert virsh(uri, "list", "--all", "--name").split() == [NAME]
        virsh(uri, "start", NAME)
        field.wait_ticks(20)
        assert virsh(uri, "domstate", NAME).strip() == "running"
        assert virsh(uri, "domid", NAME).strip() == "1"
        assert f"<name>{NAME}</name>" in virsh(uri, "dumpxml", NAME)
        info = virsh(uri, "dominfo", NAME)
        assert "CPU time" in info
        assert "Persistent:     yes" in info
        virsh(uri, "suspend", NAME)
        assert virsh(uri, "domstate", NAME).strip() == "paused"
        virsh(uri, "resume", NAME)
        stats = virsh(uri, "domstats", NAME)
        assert "state.state=1" in stats
        assert "balloon.maximum=32776" in stats
        for command in ("capabilities", "nodeinfo", "hostname", "version", "domjobinfo counter", "sysinfo"):
            done = virsh_tried(uri, *command.split())
            assert (done.returncode == 0) == (command != "sysinfo"), done.stderr
        virsh(uri, "destroy", NAME)
        virsh(uri, "undefine", NAME)
        assert virsh(uri, "list", "--all") == ""
        virsh(uri, "create", str(path))
        assert virsh(uri, "list", "--transient", "--name").split() == [NAME]
        virsh(uri, "destroy", NAME)


def test_errors_are_those_that_clients_know(field: Field) -> None:
    with daemons(field) as (a, _b):
        uri = a.uri(field.roots[0])
        for command, code in (
            (("start", "nobody"), "failed to get domain 'nobody'"),
            (("domblklist", "nobody"), "failed to get domain 'nobody'"),
            (("net-list",), "unknown procedure: 52"),
        ):
            done = virsh_tried(uri, *command)
            assert done.returncode == 1
            assert code in done.stderr
        defined(field, uri)
        done = virsh_tried(uri, "suspend", NAME)
        assert "domain is not running" in done.stderr
        done = virsh_tried(uri, "undefine", NAME, read_only=True)
        assert "read only" in done.stderr
        done = virsh_tried(f"nosuch+tcp://127.0.0.1:{a.port}/there", "list")
        assert "no driver for scheme" in done.stderr
        virsh(uri, "undefine", NAME)


@pytest.mark.parametrize("protocol", [*EVERYTHING, "p2p"])
def test_virsh_migrates(field: Field, protocol: str) -> None:
    offered = EVERYTHING if protocol == "p2p" else (protocol,)
    with daemons(field, migration_protocols=offered) as (a, b):
        uris = a.uri(field.roots[0]), b.uri(field.roots[1])
        defined(field, uris[0])
        virsh(uris[0], "start", NAME)
        field.wait_ticks(20)
        p2p = ["--p2p"] if protocol == "p2p" else []
        virsh(uris[0], "migrate", "--live", *p2p, "--persistent", "--undefinesource", NAME, uris[1])
        field.wait_ticks(20)
        assert virsh(uris[0], "list", "--all") == ""
        assert virsh(uris[1], "list", "--persistent", "--name").split() == [NAME]
        virsh(uris[1], "migrate", "--live", *p2p, NAME, uris[0])
        field.wait_ticks(20)
        assert virsh(uris[1], "list", "--name").split() == []
        field.assert_unbroken(crossings=2)
        virsh(uris[0], "destroy", NAME)
        virsh(uris[1], "undefine", NAME)


def test_only_hosts_that_are_allowed_are_opened(field: Field) -> None:
    """Who may only read could have root's daemon make directories and take locks otherwise."""
    with daemon(field.directory / "daemon", allowed_uris=[]) as made:
        done = virsh_tried(made.uri(field.roots[0], transport="unix"), "list", read_only=True)
        assert done.returncode == 1
        assert "is not served here" in done.stderr
        assert not field.roots[0].exists()
        virsh(f"test+tcp://127.0.0.1:{made.port}/there/here", "list")


async def test_passwords_are_for_those_who_may_change_something(field: Field) -> None:
    with daemons(field) as (a, _b):
        uri = a.uri(field.roots[0])
        path = field.directory / "definition.xml"
        display = "<graphics type='vnc' autoport='yes' passwd='hunter2'/>"
        path.write_text(field.definition.replace("</devices>", f"{display}</devices>"))
        virsh(uri, "define", str(path))
        assert "hunter2" not in virsh(uri, "dumpxml", NAME)
        assert "hunter2" in virsh(uri, "dumpxml", "--security-info", NAME)
        assert "<graphics" in virsh(uri, "dumpxml", NAME, read_only=True)
        done = virsh_tried(uri, "dumpxml", "--security-info", NAME, read_only=True)
        assert "operation forbidden" in done.stderr
        async with ferryman.connect(uri) as ours:
            assert "hunter2" in await (await ours.lookup_by_name(NAME)).definition()
        virsh(uri, "undefine", NAME)


async def test_a_guest_that_ends_with_its_client(field: Field) -> None:
    with daemons(field) as (a, _b):
        uri = a.uri(field.roots[0])
        async with ferryman.connect(uri) as watching:
            with watching.events() as events:
                async with ferryman.connect(uri) as ours:
                    await ours.create(field.definition, autodestroy=True)
                    assert virsh(uri, "list", "--name").split() == [NAME]
                with anyio.fail_after(PROMPT_S):
                    async for event in events:
                        if event.kind is DomainEventKind.DESTROYED:
                            break
        assert virsh(uri, "list", "--all") == ""


async def test_our_client_has_the_api_of_a_local_one(field: Field) -> None:
    with daemons(field) as (a, b):
        async with (
            ferryman.connect(a.uri(field.roots[0])) as source,
            ferryman.connect(b.uri(field.roots[1], transport="unix")) as destination,
        ):
            with source.events() as events:
                domain = await source.create(field.definition)
                assert (await anext(events)).name == NAME
            field.wait_ticks(20)
            result = await domain.migrate(destination, MigrationOptions())
            assert result.blackout_ms is not None
            (moved,) = await destination.list_domains()
            field.wait_ticks(20)
            assert await source.list_domains() == []
            await moved.destroy()
    field.assert_unbroken(crossings=1)


_PASSED = """
import os, sys
for index, descriptor in enumerate(map(int, sys.argv[2].split(",")), 3):
    os.dup2(descriptor, index)
os.environ |= {"LISTEN_FDS": sys.argv[3], "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": sys.argv[4]}
os.execv(sys.executable, [sys.executable, "-m", "ferryman_remote.daemon.main", "--config", sys.argv[1]])
"""


def passed(
    directory: Path, listeners: list[socket.socket], names: str, config: str = ""
) -> subprocess.Popen[str]:
    """A daemon that is given its sockets, as systemd gives them."""
    (directory / "passed.toml").write_text(f'schemes = ["qemu"]\nsocket_directory = "{directory}"\n{config}')
    # Above those that they become.
    high = [os.dup(os.dup(os.dup(each.fileno()))) for each in listeners]
    descriptors = ",".join(map(str, high))
    command = [
        sys.executable,
        "-c",
        _PASSED,
        str(directory / "passed.toml"),
        descriptors,
        str(len(high)),
        names,
    ]
    try:
        return subprocess.Popen(command, pass_fds=high, stderr=subprocess.PIPE, text=True)
    finally:
        for each in high:
            os.close(each)


def test_sockets_that_were_opened_for_it(field: Field) -> None:
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        for listener, name in zip(listeners, ("virtqemud-sock", "elsewhere-ro"), strict=True):
            listener.bind(str(field.directory / name))
            listener.listen()
        process = passed(field.directory, listeners, "one:two")
        stack.callback(process.communicate, timeout=PROMPT_S)
        stack.callback(process.terminate)
        # Nobody waits until the daemon is ready: who connects is served once it is.
        uri = f"qemu+unix:///system?socket={field.directory / 'virtqemud-sock'}&name=qemu:///system"
        assert virsh(uri, "hostname")
        refused = virsh_tried(uri.replace("virtqemud-sock", "elsewhere-ro"), "create", "/dev/null")
        assert refused.returncode == 1
        assert not (field.directory / "elsewhere-ro").samefile(field.directory / "virtqemud-sock-ro")
    # What others opened is theirs to remove; what it opened itself is gone.
    assert sorted(path.name for path in field.directory.iterdir() if path.is_socket()) == [
        "elsewhere-ro",
        "virtqemud-sock",
    ]
    for name in ("elsewhere-ro", "virtqemud-sock"):
        (field.directory / name).unlink()


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("", "", "its unit must say FileDescriptorName=tls"),
        ("tcp", "", "was passed for tcp, which serves everybody"),
        ("tls", 'pki_directory = "/nonexistent"\n', "/nonexistent"),
    ],
)
def test_sockets_that_it_does_not_serve(field: Field, name: str, config: str, said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = passed(field.directory, [listener], name, config)
        _, told = process.communicate(timeout=PROMPT_S)
    assert process.returncode == 1
    assert said in told
    assert told.startswith("ferrymand: ")


def test_rules_of_a_migration(field: Field) -> None:
    rules = field.directory / "rules.toml"
    for forbidden in ("migrate_in", "migrate_out", "domain_undefine"):
        rules.write_text(
            f'[[rule]]\nallow = false\nactions = ["{forbidden}"]\ndomains = ["{NAME}", "db"]\n[[rule]]\nallow = true\n'
        )
        with daemons(field, rules=str(rules)) as (a, b):
            uris = a.uri(field.roots[0]), b.uri(field.roots[1])
            if forbidden == "migrate_in":
                path = field.directory / "definition.xml"
                path.write_text(field.definition)
                virsh(uris[0], "create", str(path))
                field.wait_ticks(20)
            if forbidden == "migrate_in":
                # By the name that it would have there, which only the daemons tell each other here.
                renamed = virsh_tried(uris[0], "migrate", "--live", "--p2p", "--dname", "db", NAME, uris[1])
                assert renamed.returncode == 1
                assert "rule 1 forbids anybody migrate_in of domain db" in renamed.stderr
            done = virsh_tried(uris[0], "migrate", "--live", NAME, uris[1])
            there = virsh(uris[1], "list", "--name").split() == [NAME]
            if forbidden == "domain_undefine":
                assert (done.returncode, there) == (0, True), done.stderr
                virsh(uris[1], "destroy", NAME)
                lines = [line for line in b.log.read_text().splitlines() if 'action="migrate_in"' in line]
                # By virsh at libvirt's prepare, and by the other daemon; that one announces the guest first, which ends
                # where it is prepared.
                # The same log tells of the first round, in which it was refused.
                results = [line.rpartition("result=")[2] for line in lines if "refused" not in line]
                assert results.count('"done"') >= 2
                assert set(results) <= {'"done"', '"cancelled"'}
            else:
                assert (done.returncode, there) == (1, False)
                assert f"rule 1 forbids anybody {forbidden} of domain {NAME}" in done.stderr
                assert virsh(uris[0], "domstate", NAME).strip() == "running"
    field.assert_unbroken(crossings=1)


def test_virsh_on_a_console(field: Field) -> None:
    with daemons(field) as (a, _b):
        uri = a.uri(field.roots[0])
        path = field.directory / "definition.xml"
        path.write_text(console_definition(field, "pty"))
        virsh(uri, "create", str(path))
        with Terminal(uri, "console", NAME) as terminal:
            terminal.wait_for(rb"(?:[0-9A-F]{8}\r?\n){20}")
            numbers = [int(word, 16) for word in re.findall(rb"([0-9A-F]{8})\r?\n", terminal.shown)]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            with Terminal(uri, "console", NAME) as other:
                assert other.ended() == 1
                assert b"somebody is connected to the console" in other.shown
            terminal.type(b"\x1d")
            assert terminal.ended() == 0
        # It is free again at once, and ends with its guest.
        with Terminal(uri, "console", NAME, "--safe") as terminal:
            terminal.wait_for(rb"(?:[0-9A-F]{8}\r?\n){5}")
            virsh(uri, "destroy", NAME)
            terminal.ended()
        # A client that is gone leaves no console taken.
        virsh(uri, "create", str(path))
        with Terminal(uri, "console", NAME) as terminal:
            terminal.wait_for(rb"(?:[0-9A-F]{8}\r?\n){5}")
            terminal.process.kill()
            terminal.ended()
        with Terminal(uri, "console", NAME) as terminal:
            terminal.wait_for(rb"(?:[0-9A-F]{8}\r?\n){5}")
            terminal.type(b"\x1d")
            assert terminal.ended() == 0
        refused = virsh_tried(uri, "console", NAME, read_only=True)
        assert refused.returncode == 1
        virsh(uri, "destroy", NAME)


async def test_our_client_on_a_console(field: Field) -> None:
    with daemons(field) as (a, _b):
        async with ferryman.connect(a.uri(field.roots[0])) as host:
            domain = await host.create(console_definition(field, "pty"))
            for device in (None, "serial0"):
                async with domain.console(device) as console:
                    heard = b""
                    while heard.count(b"\n") < 20:
                        heard += await console.receive()
                    await console.send(b"nobody listens" * 20_000)
                    with pytest.raises(DomainStateError, match="somebody is connected"):
                        async with domain.console(device):
                            pass
            with pytest.raises(DomainStateError, match="no console serial7"):
                async with domain.console("serial7"):
                    pass
            async with domain.console() as console:
                await domain.destroy()
                with pytest.raises(anyio.EndOfStream):
                    while True:
                        await console.receive()
            domain = await host.create(console_definition(field, "pty"))
            async with domain.console() as console:
                await console.receive()
                a.kill()
                with pytest.raises(anyio.BrokenResourceError):
                    while True:
                        await console.receive()
        async with ferryman.connect(field.uris[0]) as local:
            await (await local.lookup_by_name(NAME)).destroy()


class Migrating:
    """A `virsh migrate` that runs, slowly enough for what is done to it."""

    def __init__(self, uris: tuple[str, str], *options: str) -> None:
        self.process = subprocess.Popen(
            [
                "virsh",
                "-c",
                uris[0],
                "migrate",
                "--live",
                "--verbose",
                "--bandwidth",
                "1",
                *options,
                NAME,
                uris[1],
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        assert self.process.stderr is not None
        # It shows how far it has come; above nothing, the transfer is under way.
        self._told = b""
        while not re.search(rb"\[ *[1-9]\d* %\]", self._told):
            assert select.select([self.process.stderr], [], [], PROMPT_S)[0], self._told
            read = os.read(self.process.stderr.fileno(), 4096)
            assert read, self._told
            self._told += read

    def ended(self) -> tuple[int, str]:
        """Exit status, and what it said of its failure."""
        _, told = self.process.communicate(timeout=PROMPT_S)
        return self.process.returncode, (self._told + told).decode()


@contextmanager
def running(field: Field, **config: object) -> Iterator[tuple[Daemon, Daemon, tuple[str, str]]]:
    """Two daemons, and a guest that runs at the first."""
    with daemons(field, **config) as (a, b):
        uris = a.uri(field.roots[0]), b.uri(field.roots[1])
        path = field.directory / "definition.xml"
        path.write_text(field.definition)
        virsh(uris[0], "create", str(path))
        field.wait_ticks(20)
        yield a, b, uris


async def at_the_source(field: Field) -> None:
    """See that the guest runs at the source and nothing is open at either host, and end it; the daemons are gone."""
    async with ferryman.connect(field.uris[0]) as a, ferryman.connect(field.uris[1]) as b:
        await settled(a, b)
        assert await b.list_domains() == []
        domain = await a.lookup_by_name(NAME)
        await anyio.to_thread.run_sync(field.wait_ticks, 20)
        await domain.destroy()
    field.assert_unbroken(crossings=0)


@pytest.mark.parametrize("protocol", ["v1", "v2", "params"])
async def test_a_job_is_watched_tuned_and_aborted(field: Field, protocol: str) -> None:
    with running(field, migration_protocols=[protocol]) as (_a, _b, uris):
        migrating = Migrating(uris)
        virsh(uris[0], "migrate-setmaxdowntime", NAME, "50")
        assert virsh(uris[0], "migrate-getmaxdowntime", NAME).strip() == "50"
        virsh(uris[0], "migrate-setspeed", NAME, "2")
        assert virsh(uris[0], "migrate-getspeed", NAME).strip() == "2"
        done = virsh_tried(uris[0], "destroy", NAME)
        assert "is open here" in done.stderr
        virsh(uris[0], "domjobabort", NAME)
        status, told = migrating.ended()
        assert status == 1
        assert "aborted on request" in told
        done = virsh_tried(uris[0], "domjobabort", NAME)
        assert "no job is active" in done.stderr
    await at_the_source(field)


async def test_virsh_is_killed(field: Field) -> None:
    with running(field) as (_a, b, uris):
        migrating = Migrating(uris)
        (receiver,) = field.emulators(field.roots[1])
        gone = os.pidfd_open(receiver)
        migrating.process.kill()
        migrating.ended()
        assert select.select([gone], [], [], PROMPT_S)[0]
        os.close(gone)
        field.wait_ticks(20)
        assert virsh(uris[1], "list", "--all") == ""
        assert b.process.poll() is None
    await at_the_source(field)


@pytest.mark.parametrize("whose", ["source", "destination"])
async def test_a_daemon_is_killed_in_the_transfer_and_another_follows(field: Field, whose: str) -> None:
    with running(field) as (a, b, uris):
        migrating = Migrating(uris)
        killed, uri = (a, field.uris[0]) if whose == "source" else (b, field.uris[1])
        killed.kill()
        with daemon(killed.directory / "next", tcp_listen=f"127.0.0.1:{killed.port}", hosts=[uri]):
            status, _told = migrating.ended()
            assert status == 1
            field.wait_ticks(20)
            assert virsh(uris[0], "domstate", NAME).strip() == "running"
            assert virsh(uris[1], "list", "--all") == ""
    await at_the_source(field)


def test_postcopy_on_request(field: Field) -> None:
    with running(field) as (_a, _b, uris):
        migrating = Migrating(uris, "--postcopy", "--postcopy-bandwidth", "50")
        virsh(uris[0], "migrate-postcopy", NAME)
        status, told = migrating.ended()
        assert status == 0, told
        field.wait_ticks(20)
        assert virsh(uris[0], "list", "--all") == ""
        virsh(uris[1], "destroy", NAME)
    field.assert_unbroken(crossings=1)


@pytest.mark.parametrize(
    "options",
    [
        ("--suspend",),
        ("--dname", "moved"),
        ("--parallel", "--parallel-connections", "3"),
        ("--timeout", "1", "--timeout-suspend", "--bandwidth", "4"),
        ("--auto-converge",),
        ("--compressed", "--comp-methods", "xbzrle"),
    ],
    ids=lambda options: options[0],
)
def test_options_of_virsh(field: Field, options: tuple[str, ...]) -> None:
    with running(field) as (_a, _b, uris):
        virsh(uris[0], "migrate", "--live", *options, NAME, uris[1])
        name = "moved" if "--dname" in options else NAME
        if "--suspend" in options:
            assert virsh(uris[1], "domstate", name).strip() == "paused"
            virsh(uris[1], "resume", name)
        field.wait_ticks(20)
        virsh(uris[1], "destroy", name)
    field.assert_unbroken(crossings=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tunnelled", "--p2p"), "--tunnelled is not served"),
        (("--abort-on-error",), "--abort-on-error is not served"),
        (("--disks-port", "1234"), "disks_port is not served"),
        (("--migrateuri", "rdma://127.0.0.1:1"), "rdma"),
        (("--comp-methods", "mt"), "compression by mt is not served"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
async def test_what_is_not_served_is_refused_before_anything_moves(
    field: Field, options: tuple[str, ...], words: str
) -> None:
    with running(field) as (_a, _b, uris):
        done = virsh_tried(uris[0], "migrate", "--live", *options, NAME, uris[1])
        assert done.returncode == 1
        assert words in done.stderr
    await at_the_source(field)


async def test_a_destination_that_others_cannot_ask_is_refused(field: Field) -> None:
    with running(field) as (_a, _b, uris), daemon(field.directory / "daemon-c", tcp_listen="") as c:
        done = virsh_tried(uris[0], "migrate", "--live", NAME, c.uri(field.roots[1], transport="unix"))
        assert "set its address" in done.stderr
    await at_the_source(field)


@contextmanager
def encrypted(field: Field, *kinds: str, **config: object) -> Iterator[list[Daemon]]:
    """Daemons that listen on TLS alone, each with credentials of a kind."""
    with ExitStack() as stack:
        made = []
        for number, kind in enumerate(kinds):
            directory = field.directory / f"daemon-{number}"
            put_pki(directory / "pki", kind)
            listening = {
                "tcp_listen": "",
                "tls_listen": "127.0.0.1:0",
                "pki_directory": str(directory / "pki"),
            }
            made.append(stack.enter_context(daemon(directory, **listening, **config)))
        yield made


def test_virsh_migrates_over_tls(field: Field) -> None:
    with encrypted(field, "good", "good") as (a, b):
        uris = [end.uri(root, transport="tls") for end, root in zip((a, b), field.roots, strict=True)]
        path = field.directory / "definition.xml"
        path.write_text(field.definition)
        virsh(uris[0], "create", str(path))
        field.wait_ticks(20)
        for p2p in ([], ["--p2p"]):
            virsh(uris[0], "migrate", "--live", *p2p, NAME, uris[1])
            uris.reverse()
        field.wait_ticks(20)
        virsh(uris[0], "destroy", NAME)
    field.assert_unbroken(crossings=2)


@pytest.mark.parametrize("kind", ["other signer", "other name", "expired"])
async def test_certificates_that_are_not_taken(field: Field, kind: str) -> None:
    with encrypted(field, "good") as (a,):
        good = a.uri(field.roots[0], transport="tls")
        virsh(good, "list")
        bad = field.directory / "bad"
        put_pki(bad, kind)
        uri = good.replace(quote(str(a.directory / "pki")), quote(str(bad)))
        if kind != "other name":  # which is the server's alone
            assert virsh_tried(uri, "list").returncode != 0
            with pytest.raises(ConnectError):
                async with ferryman.connect(uri):
                    pass
            assert "is refused" in a.log.read_text()
        virsh(good, "list")
    with encrypted(Field(**{**vars(field), "directory": field.directory / "again"}), kind) as (a,):
        uri = a.uri(field.roots[0], transport="tls").replace(
            quote(str(a.directory / "pki")), quote(str(field.directory / "daemon-0" / "pki"))
        )
        assert virsh_tried(uri, "list").returncode != 0
        with pytest.raises(ConnectError):
            async with ferryman.connect(uri):
                pass


async def test_clients_by_the_names_in_their_certificates(field: Field) -> None:
    with encrypted(field, "good", tls_allowed_names=["host-x*", "admin"]) as (a,):
        uri = a.uri(field.roots[0], transport="tls")
        assert virsh_tried(uri, "list").returncode != 0
        assert "its certificate names host-s" in a.log.read_text()
        with pytest.raises(ConnectError):
            async with ferryman.connect(uri):
                pass


async def test_garbage_and_silence_on_the_encrypted_port(field: Field) -> None:
    with encrypted(field, "good", opening_s=2.0) as (a,):
        for said in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(300), b"", bytes(28)):
            with socket.create_connection(("127.0.0.1", a.port), timeout=PROMPT_S) as stream:
                stream.sendall(said)
                while stream.recv(4096):
                    pass
        virsh(a.uri(field.roots[0], transport="tls"), "list")


def test_events(field: Field) -> None:
    with running(field) as (_a, _b, uris):
        with subprocess.Popen(
            ["virsh", "-c", uris[0], "event", "--event", "lifecycle", "--loop", "--timeout", "30"],
            stdout=subprocess.PIPE,
            text=True,
        ) as listening:
            assert listening.stdout is not None
            # It says nothing when it listens, so something is done until it tells of it.
            told = b""
            os.set_blocking(listening.stdout.fileno(), False)
            for _ in range(100):
                virsh(uris[0], "suspend", NAME)
                virsh(uris[0], "resume", NAME)
                told += (
                    os.read(listening.stdout.fileno(), 65536) if _ready(listening.stdout.fileno()) else b""
                )
                if b"for domain 'counter': Suspended Paused" in told and b"Resumed Unpaused" in told:
                    break
            else:
                raise AssertionError(told)
            virsh(uris[0], "destroy", NAME)
            while b"Stopped" not in told:
                assert select.select([listening.stdout], [], [], PROMPT_S)[0]
                told += os.read(listening.stdout.fileno(), 65536)
            assert b"Stopped Destroyed" in told
            listening.send_signal(signal.SIGINT)


def _ready(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0.2)[0])
