"""The guests on real QEMU with software emulation, and the witness with real processes at the other end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest
from lxml import etree

from tests.guests.counter import PAGE_BYTES, PAGES_ADDRESS, CounterGuest, VerifyReport
from tests.guests.linux import KERNEL_DIRECTORY, TICK_PREFIX, LinuxGuest, build_initramfs, find_modules
from tests.guests.witness import Tick, Witness, WitnessError, WitnessTimeoutError, read_log

MIB = 1024 * 1024
UUID = "0b1f7c4e-8d2a-4c53-9a55-5a7d1e6f0c21"
ROOT = Path(__file__).parents[2]
DOMAIN_SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
PROMPT_S = 60.0  # for what takes a moment on an idle machine

# One word of the counter guest's pattern is written by many; this is who has the machine to himself.
CPU_SHARE_LIMIT = {100: 0.2, 1000: 0.6}


def need(what: str, *, here: bool) -> None:
    if not here:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{what} is missing")
        pytest.skip(f"{what} is missing")


@pytest.fixture
def qemu() -> None:
    need("qemu-system-x86_64", here=shutil.which("qemu-system-x86_64") is not None)


class Qemu:
    """One QEMU process, driven over plain QMP."""

    def __init__(self, argv: Callable[[int], list[str]]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(argv(theirs.fileno()), pass_fds=[theirs.fileno()])
        ours.settimeout(PROMPT_S)
        self._socket = ours
        self._messages = ours.makefile("rb")
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self.read()
        self.do("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._messages.close()
        self._socket.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._messages.readline())
        return message

    def do(self, command: str, **arguments: object) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = self.read()
            if "event" in message:
                self._events.append(message)
            else:
                assert "error" not in message, message
                return message["return"]

    def wait_migration(self) -> None:
        """Return when the migration is completed."""
        while True:
            message = self._events.pop(0) if self._events else self.read()
            if message.get("event") == "MIGRATION":
                assert message["data"]["status"] not in {"failed", "cancelled"}
                if message["data"]["status"] == "completed":
                    return

    def migrate_to(self, destination: Qemu, path: Path) -> None:
        for side in (self, destination):
            side.do("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self.do("migrate-set-parameters", **{"max-bandwidth": 2**40})
        destination.do("migrate-incoming", uri=f"unix:{path}")
        self.do("migrate", uri=f"unix:{path}")
        self.wait_migration()


class CounterHost:
    """Starts counter guests of one kind, all heard by one witness."""

    def __init__(self, guest: CounterGuest, witness: Witness, directory: Path) -> None:
        self.guest = guest
        self.witness = witness
        self.image = directory / "image"
        self.dump = directory / "dump"
        guest.write_image(self.image)

    def qemu(self, *, stopped: bool = False, incoming: bool = False) -> Qemu:
        return Qemu(
            lambda qmp_fd: self.guest.qemu_argv(
                "counter",
                UUID,
                self.image,
                self.witness.socket_path,
                qmp_fd=qmp_fd,
                stopped=stopped,
                incoming=incoming,
            )
        )

    def verify(self, qemu: Qemu) -> VerifyReport:
        qemu.do("pmemsave", val=0, size=self.guest.memory_bytes, filename=os.fspath(self.dump))
        return self.guest.verify_memory(self.dump)


@pytest.fixture
def witness() -> Iterator[Witness]:
    with Witness() as witness:
        yield witness


def assert_gapless(ticks: list[Tick]) -> None:
    assert [tick.value for tick in ticks] == list(range(1, len(ticks) + 1))


@pytest.mark.usefixtures("qemu")
class TestCounter:
    def test_it_boots_at_once_and_ticks_without_a_gap(self, witness: Witness, tmp_path: Path) -> None:
        host = CounterHost(CounterGuest(tick_hz=100), witness, tmp_path)
        with host.qemu() as qemu:
            witness.wait_tick(0, PROMPT_S)
            # The processor time, because other programs may have the machine meanwhile.
            assert qemu.cpu_s < 1.0
            witness.wait_tick(200, PROMPT_S)
        assert witness.lines() == []
        ticks = witness.ticks()
        assert_gapless(ticks)
        assert {tick.pid for tick in ticks} == {qemu.pid}

    @pytest.mark.parametrize("tick_hz", [100, 1000])
    def test_it_is_idle_between_ticks(self, witness: Witness, tmp_path: Path, tick_hz: int) -> None:
        host = CounterHost(CounterGuest(tick_hz=tick_hz), witness, tmp_path)
        with host.qemu() as qemu:
            first = witness.wait_tick(10, PROMPT_S)
            cpu_s = qemu.cpu_s
            last = witness.wait_tick(first.value + 2 * tick_hz, PROMPT_S)
            share = (qemu.cpu_s - cpu_s) / ((last.t_ns - first.t_ns) / 1e9)
        print(f"idle at {tick_hz} Hz: {share:.1%} of a core")
        assert share < CPU_SHARE_LIMIT[tick_hz]

    def test_its_memory_is_right_whenever_it_is_stopped(self, witness: Witness, tmp_path: Path) -> None:
        guest = CounterGuest(
            memory_bytes=80 * MIB,
            tick_hz=100,
            page_count=64 * MIB // PAGE_BYTES,
            pages_per_tick=1500,
            prefill=True,
        )
        host = CounterHost(guest, witness, tmp_path)
        with host.qemu() as qemu:
            step = 0
            for _ in range(5):
                last = witness.last()
                witness.wait_tick(last.value + 10 if last else 10, PROMPT_S)
                qemu.do("stop")
                report = host.verify(qemu)
                assert report.page_errors == ()
                assert report.pages_checked == 16384
                assert report.step > step + guest.pages_per_tick
                # The tick that was counted may be on its way out still.
                assert report.tick - witness.count() in {0, 1}
                step = report.step
                qemu.do("cont")
            qemu.do("stop")
        assert_gapless(witness.ticks())

        with open(host.dump, "r+b") as dump:
            dump.seek(PAGES_ADDRESS + (step + 5) % guest.page_count * PAGE_BYTES + 1234)
            (byte,) = dump.read(1)
            dump.seek(-1, os.SEEK_CUR)
            dump.write(bytes([byte ^ 0x20]))
        report = guest.verify_memory(host.dump)
        assert report.errors == 1
        assert report.page_errors[0].page == (step + 5) % guest.page_count

    def test_memory_that_it_never_wrote_is_zero(self, witness: Witness, tmp_path: Path) -> None:
        guest = CounterGuest.filling(memory_bytes=16 * MIB, pages_per_tick=10, prefill=False)
        host = CounterHost(guest, witness, tmp_path)
        with host.qemu() as qemu:
            witness.wait_tick(20, PROMPT_S)
            qemu.do("stop")
            report = host.verify(qemu)
        assert report.page_errors == ()
        assert 0 < report.step < guest.page_count

    @pytest.mark.parametrize("pages_per_tick", [0, 300])
    def test_live_migrations(self, witness: Witness, tmp_path: Path, pages_per_tick: int) -> None:
        """There and on to a third process: nothing lost, nothing doubled, memory right at the end."""
        guest = CounterGuest.filling(memory_bytes=64 * MIB, tick_hz=1000, pages_per_tick=pages_per_tick // 10)
        host = CounterHost(guest, witness, tmp_path)
        with ExitStack() as stack:
            qemu = stack.enter_context(host.qemu())
            pids = [qemu.pid]
            witness.wait_tick(100, PROMPT_S)
            for hop in range(2):
                destination = stack.enter_context(host.qemu(incoming=True))
                # Connected, and silent until the guest arrives.
                assert [peer.ticks for peer in witness.peers() if peer.pid == destination.pid] == [0]
                qemu.migrate_to(destination, tmp_path / f"stream{hop}")
                first = witness.wait_new_process(PROMPT_S, other_than=qemu.pid)
                assert first.pid == destination.pid
                qemu.do("quit")
                qemu = destination
                pids.append(qemu.pid)
                witness.wait_tick(first.value + 100, PROMPT_S)
            qemu.do("stop")
            memory = host.verify(qemu)
        assert memory.page_errors == ()
        report = witness.report()
        print(f"{pages_per_tick} pages a tick: blackouts of {[round(b.ms, 1) for b in report.blackouts]} ms")
        assert (report.ticks_lost, report.ticks_doubled, report.overlaps) == (0, 0, ())
        assert report.pids == tuple(pids)
        assert [(b.source_pid, b.destination_pid) for b in report.blackouts] == list(itertools.pairwise(pids))
        assert all(guest.tick_interval_s * 1000 / 2 < blackout.ms < 5000 for blackout in report.blackouts)
        assert_gapless(witness.ticks())

    def test_it_can_start_stopped(self, witness: Witness, tmp_path: Path) -> None:
        host = CounterHost(CounterGuest(), witness, tmp_path)
        with host.qemu(stopped=True) as qemu:
            assert qemu.do("query-status")["status"] == "prelaunch"
            with pytest.raises(WitnessTimeoutError, match=r"wait-tick \(after -1\).* the last tick was None"):
                witness.wait_tick(timeout_s=0.2)
            (peer,) = witness.peers()
            assert (peer.pid, peer.ticks, peer.closed_ns) == (qemu.pid, 0, None)
            qemu.do("cont")
            assert witness.wait_tick(0, PROMPT_S).value == 1


@pytest.mark.usefixtures("qemu")
class TestLinux:
    @pytest.fixture
    def witness(self) -> Iterator[Witness]:
        with Witness(prefix=TICK_PREFIX) as witness:
            yield witness

    @pytest.fixture
    def start(self, witness: Witness) -> Callable[..., Qemu]:
        kernel = KERNEL_DIRECTORY / "vmlinuz"
        need(f"the guests' kernel, {kernel.relative_to(ROOT)},", here=kernel.is_file())
        need("busybox", here=shutil.which("busybox") is not None)
        initramfs = build_initramfs(ROOT / ".cache" / "guests")

        def start(guest: LinuxGuest, *, incoming: bool = False) -> Qemu:
            return Qemu(
                lambda qmp_fd: guest.qemu_argv(
                    "linux", UUID, kernel, initramfs, witness.socket_path, qmp_fd=qmp_fd, incoming=incoming
                )
            )

        return start

    def test_it_survives_a_migration(
        self, witness: Witness, start: Callable[..., Qemu], tmp_path: Path
    ) -> None:
        guest = LinuxGuest(blocks_bytes=4 * MIB)
        with start(guest) as source:
            witness.wait_line("boot ok", PROMPT_S)
            witness.wait_line("mem ok", PROMPT_S)
            with start(guest, incoming=True) as destination:
                source.migrate_to(destination, tmp_path / "stream")
                first = witness.wait_new_process(PROMPT_S, other_than=source.pid)
                # Two passes: the first may have been compared at the source in part.
                line = witness.wait_line("mem ok", PROMPT_S, after_ns=first.t_ns)
                line = witness.wait_line("mem ok", PROMPT_S, after_ns=line.t_ns)
                assert line.pid == destination.pid
        report = witness.report()
        print(f"blackout of {report.blackouts[0].ms:.1f} ms")
        assert (report.ticks_lost, report.ticks_doubled, report.overlaps) == (0, 0, ())
        assert report.pids == (source.pid, destination.pid)
        assert witness.lines("mem BAD") == []
        assert_gapless(witness.ticks())

    def test_it_sees_damage_to_its_memory(
        self, witness: Witness, start: Callable[..., Qemu], tmp_path: Path
    ) -> None:
        """A dump shows where the third pattern lies; QEMU's debugger stub changes a byte in every copy of it."""
        guest = LinuxGuest(memory_bytes=128 * MIB, blocks_bytes=4 * MIB)
        with start(guest) as qemu:
            witness.wait_line("mem ok", PROMPT_S)
            qemu.do("stop")
            dump = tmp_path / "dump"
            qemu.do("pmemsave", val=0, size=guest.memory_bytes, filename=os.fspath(dump))
            memory = dump.read_bytes()
            line = b"pattern 3 of the file\n"
            page = (line * (2 * PAGE_BYTES // len(line) + 2))[:PAGE_BYTES]
            addresses = [
                at for at in range(0, len(memory), PAGE_BYTES) if memory[at : at + PAGE_BYTES] == page
            ]
            assert addresses
            stub = tmp_path / "gdb"
            qemu.do("human-monitor-command", **{"command-line": f"gdbserver unix:{stub},server=on,wait=off"})
            with socket.socket(socket.AF_UNIX) as debugger:
                debugger.settimeout(PROMPT_S)
                debugger.connect(os.fspath(stub))
                ask_stub(debugger, "Qqemu.PhyMemMode:1")
                for address in addresses:
                    ask_stub(debugger, f"M{address + 100:x},1:00")
            qemu.do("cont")
            witness.wait_line("mem BAD", PROMPT_S)

    def test_it_powers_off_when_asked_or_says_that_it_cannot(
        self, witness: Witness, start: Callable[..., Qemu]
    ) -> None:
        with start(LinuxGuest(blocks_bytes=0)) as qemu:
            witness.wait_tick(0, PROMPT_S)
            if len(find_modules()) < 2:
                assert witness.lines("no power button")
                return
            qemu.do("system_powerdown")
            witness.wait_line("power button", PROMPT_S)
            qemu.process.wait(PROMPT_S)
        assert witness.lines("no power button") == []


def ask_stub(debugger: socket.socket, packet: str) -> None:
    """Send one packet of the GDB remote protocol and expect OK."""
    debugger.sendall(f"${packet}#{sum(packet.encode()) % 256:02x}".encode())
    answer = b""
    while b"#" not in answer[:-2]:
        answer += debugger.recv(4096)
    debugger.sendall(b"+")
    assert b"$OK#" in answer, answer


class TestDefinitions:
    @pytest.mark.parametrize(
        "xml",
        [
            CounterGuest().domain_xml("counter", UUID, "/images/counter", "/run/serial"),
            LinuxGuest().domain_xml("linux", UUID, "/boot/vmlinuz", "/boot/initramfs", "/run/serial"),
        ],
    )
    def test_libvirts_schema_accepts_them(self, xml: str) -> None:
        need(f"libvirt's schema, {DOMAIN_SCHEMA},", here=DOMAIN_SCHEMA.is_file())
        etree.RelaxNG(etree.parse(DOMAIN_SCHEMA)).assertValid(etree.fromstring(xml))


class Speaker:
    """A process of its own that says on a serial connection what it is told to."""

    PROGRAM = (
        "import socket, sys\n"
        "connection = socket.socket(socket.AF_UNIX)\n"
        "connection.connect(sys.argv[1])\n"
        "for line in sys.stdin:\n"
        "    connection.sendall(bytes.fromhex(line))\n"
        "    print(flush=True)\n"
    )

    def __init__(self, witness: Witness) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-IS", "-c", self.PROGRAM, os.fspath(witness.socket_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        self.say(b"")  # answered when it is connected
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def say(self, data: bytes) -> None:
        """Send these bytes; they are in the socket when this returns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(data.hex() + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def tick(self, *values: int) -> None:
        self.say(b"".join(b"%08X\n" % value for value in values))


class TestWitness:
    def test_lines_have_their_process_and_time(self, witness: Witness) -> None:
        with Speaker(witness) as one, Speaker(witness) as other:
            before_ns = time.monotonic_ns()
            one.tick(1, 2)
            other.say(b"hello\r\n\n")
            witness.wait_line("hello", PROMPT_S)
            after_ns = time.monotonic_ns()
            other.tick(3)
            assert witness.wait_tick(2, PROMPT_S).pid == other.pid
            assert witness.count() == 3
            ticks = witness.ticks()
        assert [(tick.pid, tick.value) for tick in ticks] == [(one.pid, 1), (one.pid, 2), (other.pid, 3)]
        assert before_ns < ticks[0].t_ns == ticks[1].t_ns < after_ns < ticks[2].t_ns
        (line,) = witness.lines()
        assert (line.pid, line.text, line.connection) == (other.pid, "hello", ticks[2].connection)

    def test_waits_are_woken_by_what_they_wait_for(self, witness: Witness) -> None:
        with Speaker(witness) as source, Speaker(witness) as destination, ThreadPoolExecutor() as threads:
            source.tick(1)
            witness.wait_tick(0, PROMPT_S)
            named = threads.submit(witness.wait_new_process, PROMPT_S, other_than=source.pid)
            line = threads.submit(witness.wait_line, "mem", PROMPT_S)
            value = threads.submit(witness.wait_tick, 9, PROMPT_S)
            source.tick(2, 3)
            destination.tick(4)
            assert (named.result().pid, named.result().value) == (destination.pid, 4)
            destination.say(b"mem ok 7\n")
            assert line.result().text == "mem ok 7"
            destination.tick(10)
            assert value.result().value == 10
            # What was heard already counts too.
            assert witness.wait_new_process(PROMPT_S, other_than=source.pid).value == 4
            assert witness.wait_tick(1, PROMPT_S).value == 2

    def test_a_process_that_came_back_is_no_new_one_before_its_successor(self, witness: Witness) -> None:
        with Speaker(witness) as source, Speaker(witness) as destination:
            source.tick(1)
            witness.wait_tick(0, PROMPT_S)
            destination.tick(2)
            witness.wait_tick(1, PROMPT_S)
            with pytest.raises(WitnessTimeoutError):
                witness.wait_new_process(0.2, other_than=destination.pid)

    @pytest.mark.parametrize("cut", range(10))
    def test_a_line_cut_by_the_hand_over_is_one_tick(self, witness: Witness, cut: int) -> None:
        with Speaker(witness) as source, Speaker(witness) as destination:
            source.tick(1, 2)
            source.say(b"00000003\n"[:cut])
            witness.wait_tick(1, PROMPT_S)
            rest = b"00000003\n"[cut:] + b"00000004\n"
            for at in range(len(rest)):
                destination.say(rest[at : at + 1])
            witness.wait_tick(3, PROMPT_S)
        report = witness.report()
        assert (report.ticks, report.ticks_lost, report.ticks_doubled, report.overlaps) == (4, 0, 0, ())
        assert report.blackouts[0].destination_pid == destination.pid
        assert witness.lines() == []

    def test_a_late_witness_hears_the_older_connection_first(self, witness: Witness) -> None:
        with Speaker(witness) as source, Speaker(witness) as destination:
            source.tick(1)
            witness.wait_tick(0, PROMPT_S)
            os.kill(witness.pid, signal.SIGSTOP)
            destination.tick(3)
            source.tick(2)
            os.kill(witness.pid, signal.SIGCONT)
            witness.wait_tick(2, PROMPT_S)
        assert [tick.value for tick in witness.ticks()] == [1, 2, 3]
        assert witness.report().overlaps == ()

    def test_a_source_that_goes_on_doubles_the_line_that_was_cut(self, witness: Witness) -> None:
        with Speaker(witness) as source, Speaker(witness) as destination:
            source.tick(1, 2)
            source.say(b"000000")
            witness.wait_tick(1, PROMPT_S)
            destination.say(b"03\n00000004\n")
            witness.wait_tick(3, PROMPT_S)
            source.say(b"03\n")
            source.say(b"end\n")
            witness.wait_line("end", PROMPT_S)
        report = witness.report()
        assert (report.ticks_lost, report.ticks_doubled) == (0, 1)
        assert [(overlap.pid, overlap.ticks) for overlap in report.overlaps] == [(source.pid, 1)]

    def test_cut_lines_of_several_guests_find_their_heads(self, witness: Witness) -> None:
        with ExitStack() as stack:
            sources = [stack.enter_context(Speaker(witness)) for _ in range(3)]
            destinations = [stack.enter_context(Speaker(witness)) for _ in range(3)]
            for number, source in enumerate(sources, start=1):
                source.tick(number * 1000)
                source.say((b"%08X\n" % (number * 1000 + 1))[:6])
                witness.wait_tick(number * 1000 - 1, PROMPT_S)
            # In another order, so that it is the number and not the place that finds the head.
            for number in (3, 1, 2):
                destinations[number - 1].say((b"%08X\n" % (number * 1000 + 1))[6:])
                destinations[number - 1].tick(number * 1000 + 2)
        for number, (source, destination) in enumerate(zip(sources, destinations, strict=True), start=1):
            report = witness.report(pids={source.pid, destination.pid})
            assert (report.ticks, report.ticks_lost, report.ticks_doubled) == (3, 0, 0), number

    def test_a_head_is_used_once(self, witness: Witness) -> None:
        """A tail that would fit to the head of a guest that was handed over before."""
        with ExitStack() as stack:
            pids = []
            for first in (1000, 2000):
                source, destination = (stack.enter_context(Speaker(witness)) for _ in range(2))
                source.tick(first)
                source.say(b"%08X" % (first + 1))
                destination.say(b"\n")
                destination.tick(first + 2)
                pids.append({source.pid, destination.pid})
            values = [[tick.value for tick in witness.ticks() if tick.pid in pair] for pair in pids]
        assert values == [[1000, 1001, 1002], [2000, 2001, 2002]]

    def test_ticks_and_text_with_a_prefix(self) -> None:
        with (
            Witness(prefix=TICK_PREFIX) as witness,
            Speaker(witness) as source,
            Speaker(witness) as destination,
        ):
            source.say(b"boot ok\r\ntick 9\r\nmem ok 1\r\ntick 10\r\ntick x\r\n00000001\r\ntick 1")
            witness.wait_line("00000001", PROMPT_S)
            destination.say(b"1\r\nmem BAD 2\r\n")
            witness.wait_line("mem BAD", PROMPT_S)
            assert [tick.value for tick in witness.ticks()] == [9, 10, 11]
            assert [line.text for line in witness.lines("mem")] == ["mem ok 1", "mem BAD 2"]
            assert witness.lines("tick")[0].text == "tick x"

    def test_text_cut_by_the_hand_over_is_one_line(self) -> None:
        with (
            Witness(prefix=TICK_PREFIX) as witness,
            Speaker(witness) as source,
            Speaker(witness) as destination,
        ):
            source.say(b"tick 1\r\nmem B")
            witness.wait_tick(0, PROMPT_S)
            for part in (b"A", b"D 2\r", b"\ntick 2\r\n"):
                destination.say(part)
            witness.wait_tick(1, PROMPT_S)
        assert [(line.pid, line.text) for line in witness.lines()] == [(destination.pid, "mem BAD 2")]

    def test_readers_after_the_end(self, tmp_path: Path) -> None:
        with Witness(tmp_path) as witness:
            with Speaker(witness) as speaker:
                speaker.tick(1, 2)
                speaker.say(b"text\n")
                witness.wait_line("text", PROMPT_S)
            pid = witness.pid
        assert [tick.value for tick in witness.ticks()] == [1, 2]
        assert [line.text for line in witness.lines("te")] == ["text"]
        assert witness.lines("other") == []
        assert (witness.report().ticks, len(witness.peers())) == (2, 1)
        assert list(tmp_path.iterdir()) == []
        assert not Path(f"/proc/{pid}").exists()
        with pytest.raises(WitnessError, match="with block"):
            witness.last()

    def test_a_witness_that_is_gone_says_so(self) -> None:
        witness = Witness()
        with pytest.raises(WitnessError, match="is gone"), witness:
            os.kill(witness.pid, signal.SIGKILL)
            witness.wait_tick(0, PROMPT_S)
        assert not witness.socket_path.exists()

    def test_the_program_alone(self, tmp_path: Path) -> None:
        """As a person runs it: ended by SIGTERM, with the log complete and the sockets gone."""
        command = [sys.executable, "-m", "tests.guests.witness", "--socket", "serial", "--out", "ticks"]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.fspath(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"ready ")
            with socket.socket(socket.AF_UNIX) as guest:
                guest.connect(os.fspath(tmp_path / "serial"))
                guest.sendall(b"00000001\n0000000a\ndone\n")
                with socket.socket(socket.AF_UNIX) as control:
                    control.connect(os.fspath(tmp_path / "serial.control"))
                    control.sendall(b'{"request": "wait-line", "prefix": "done", "after_ns": 0}\n')
                    assert json.loads(control.makefile().readline())["line"][3] == "done"
            process.terminate()
            assert process.wait(PROMPT_S) == 0
        assert [(tick.value, tick.pid) for tick in read_log(tmp_path / "ticks")] == [
            (1, os.getpid()),
            (10, os.getpid()),
        ]
        assert [path.name for path in tmp_path.iterdir()] == ["ticks"]

    def test_a_path_too_long_for_a_socket_is_refused(self, tmp_path: Path) -> None:
        directory = tmp_path / ("d" * 100)
        directory.mkdir()
        with pytest.raises(WitnessError, match="did not start"), Witness(directory):
            pass
        assert list(directory.iterdir()) == []
