"""The guests' images and rules, without running them: what is written, what a memory must hold, what ticks mean."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
import subprocess
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guests import counter
from tests.guests.counter import PAGE_BYTES, PAGES_ADDRESS, CounterGuest
from tests.guests.linux import LinuxGuest, build_initramfs
from tests.guests.witness import Blackout, Overlap, Tick, read_log, report_on

MIB = 1024 * 1024
UUID = "0b1f7c4e-8d2a-4c53-9a55-5a7d1e6f0c21"
SOURCE = Path(counter.__file__).with_suffix(".asm")
AWKWARD = "/run/a&b, 'c' <d>"


class ModelGuest:
    """The counter guest as its source's comments describe it, word by word."""

    def __init__(self, guest: CounterGuest) -> None:
        self.guest = guest
        self.memory = bytearray(guest.memory_bytes)
        sector = guest.sector()
        self.memory[0x7C00 : 0x7C00 + len(sector)] = sector
        self.step = 0
        self.tick = 0
        for _ in range(guest.page_count if guest.prefill else 0):
            self.do_step()

    def do_tick(self) -> None:
        self.tick += 1
        for _ in range(self.guest.pages_per_tick):
            self.do_step()

    def do_step(self) -> None:
        self.write_words(1024)
        self.step += 1

    def write_words(self, count: int) -> None:
        """Begin the current step: its first ``count`` words are written, the counter is not incremented."""
        at = self.page_address(self.step)
        self.memory[at : at + count * 4] = struct.pack("<I", self.step) * count

    def page_address(self, step: int) -> int:
        return PAGES_ADDRESS + step % self.guest.page_count * PAGE_BYTES

    def dump(self) -> bytearray:
        struct.pack_into("<II", self.memory, 0x6000, self.tick, self.step)
        return self.memory


@st.composite
def frozen_guests(draw: st.DrawFn) -> ModelGuest:
    guest = CounterGuest(
        memory_bytes=4 * MIB,
        page_count=draw(st.integers(1, 5)),
        pages_per_tick=draw(st.integers(0, 4)),
        prefill=draw(st.booleans()),
    )
    model = ModelGuest(guest)
    for _ in range(draw(st.integers(0, 6))):
        model.do_tick()
    model.write_words(draw(st.integers(0, 1024)))
    return model


class TestCounterImage:
    def test_sector_is_its_source_assembled(self, tmp_path: Path) -> None:
        if shutil.which("nasm") is None:
            reason = "nasm is not installed"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        assembled = tmp_path / "counter.bin"
        subprocess.run(["nasm", "-f", "bin", "-o", assembled, SOURCE], check=True)
        assert assembled.read_bytes() == counter.SECTOR

    def test_sector_is_bootable(self) -> None:
        assert len(counter.SECTOR) == 512
        assert counter.SECTOR[510:] == b"\x55\xaa"

    def test_image_carries_the_parameters(self, tmp_path: Path) -> None:
        guest = CounterGuest(
            memory_bytes=8 * MIB, tick_hz=1000, page_count=1000, pages_per_tick=7, prefill=True
        )
        guest.write_image(tmp_path / "image")
        image = (tmp_path / "image").read_bytes()
        assert len(image) == MIB
        assert struct.unpack_from("<IIIHB", image, 0x1A0) == (0x200000, 1000, 7, 1193, 1)
        assert image[:0x1A0] == counter.SECTOR[:0x1A0]
        assert image[510:512] == b"\x55\xaa"
        assert not any(image[512:])

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"memory_bytes": 64 * MIB + 4096}, "memory_bytes"),
            ({"memory_bytes": 0}, "memory_bytes"),
            ({"memory_bytes": 3 * 1024 * MIB + 8192}, "memory_bytes"),
            ({"tick_hz": 18}, "tick_hz"),
            ({"tick_hz": 1001}, "tick_hz"),
            ({"page_count": 0}, "page_count"),
            ({"memory_bytes": 8 * MIB, "page_count": 5 * 256 + 1}, "1 to 1280"),
            ({"pages_per_tick": -1}, "pages_per_tick"),
            ({"pages_per_tick": 2**32}, "pages_per_tick"),
        ],
    )
    def test_parameters_out_of_range_are_refused(self, wrong: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CounterGuest(**wrong)  # type: ignore[arg-type]  # a table of wrong values has one type

    def test_filling_leaves_three_mib(self) -> None:
        assert CounterGuest.filling(memory_bytes=8 * MIB).page_count == 5 * 256

    @pytest.mark.parametrize("tick_hz", [19, 100, 1000])
    def test_tick_interval(self, tick_hz: int) -> None:
        assert CounterGuest(tick_hz=tick_hz).tick_interval_s == pytest.approx(1 / tick_hz, rel=5e-4)


class TestCounterMemory:
    @given(model=frozen_guests())
    @settings(deadline=None)
    def test_a_guest_that_keeps_the_rule_has_no_errors(self, model: ModelGuest) -> None:
        report = model.guest.verify_memory(model.dump())
        assert report.page_errors == ()
        assert (report.errors, report.pages_checked) == (0, model.guest.page_count)
        assert (report.step, report.tick) == (model.step, model.tick)

    @given(model=frozen_guests(), data=st.data())
    @settings(deadline=None)
    def test_any_changed_byte_is_found(self, model: ModelGuest, data: st.DataObject) -> None:
        unfinished = model.page_address(model.step)
        pages_end = PAGES_ADDRESS + model.guest.page_count * PAGE_BYTES
        at = data.draw(
            st.integers(PAGES_ADDRESS, pages_end - 1).filter(
                lambda at: at // PAGE_BYTES != unfinished // PAGE_BYTES
            )
            if model.guest.page_count > 1
            else st.integers(0x7C00, 0x7DFF)
        )
        memory = model.dump()
        memory[at] ^= data.draw(st.integers(1, 255))
        report = model.guest.verify_memory(memory)
        assert report.errors == 1
        (error,) = report.page_errors
        assert error.address == at & ~3
        assert error.found == int.from_bytes(memory[at & ~3 : (at & ~3) + 4], "little") != error.expected
        assert error.page == ((at - PAGES_ADDRESS) // PAGE_BYTES if at >= PAGES_ADDRESS else None)

    @given(model=frozen_guests(), word=st.integers(0, 1023), value=st.integers(0, 40))
    @settings(deadline=None)
    def test_the_page_being_written_is_new_then_old(self, model: ModelGuest, word: int, value: int) -> None:
        memory = model.dump()
        at = model.page_address(model.step)
        struct.pack_into("<I", memory, at + word * 4, value)
        words = struct.unpack_from("<1024I", memory, at)
        old = max(model.step - model.guest.page_count, 0)
        allowed = any(
            words == (model.step,) * done + (old,) * (1024 - done)
            for done in (words.count(model.step), 1024 - words.count(old))
        )
        assert (model.guest.verify_memory(memory).errors == 0) is allowed

    def test_only_the_exact_page_may_be_unfinished(self) -> None:
        model = ModelGuest(CounterGuest(memory_bytes=4 * MIB, page_count=4, prefill=True))
        model.write_words(1)
        memory = model.dump()
        assert model.guest.verify_memory(memory).errors == 0
        struct.pack_into("<I", memory, model.page_address(model.step + 1), model.step)
        (error,) = model.guest.verify_memory(memory).page_errors
        assert (error.page, error.expected, error.found) == (1, 1, 4)

    def test_a_page_left_behind_by_a_migration_is_found(self) -> None:
        model = ModelGuest(CounterGuest(memory_bytes=4 * MIB, page_count=8, pages_per_tick=8, prefill=True))
        old = bytes(model.dump()[PAGES_ADDRESS:][: 8 * PAGE_BYTES])
        model.do_tick()
        memory = model.dump()
        memory[PAGES_ADDRESS + 3 * PAGE_BYTES : PAGES_ADDRESS + 4 * PAGE_BYTES] = old[
            3 * PAGE_BYTES : 4 * PAGE_BYTES
        ]
        (error,) = model.guest.verify_memory(memory).page_errors
        assert (error.page, error.expected, error.found) == (3, 11, 3)

    def test_every_kind_of_dump_reads_the_same(self, tmp_path: Path) -> None:
        model = ModelGuest(CounterGuest(memory_bytes=4 * MIB, page_count=16, pages_per_tick=5, prefill=True))
        model.do_tick()
        memory = bytes(model.dump())
        path = tmp_path / "dump"
        path.write_bytes(memory)
        reports = [model.guest.verify_memory(dump) for dump in (path, str(path), memory, memoryview(memory))]
        assert reports == [reports[0]] * 4
        assert reports[0].errors == 0

    def test_many_errors_are_counted_and_some_told(self) -> None:
        guest = CounterGuest(memory_bytes=8 * MIB, page_count=100, prefill=True)
        memory = ModelGuest(guest).dump()
        memory[PAGES_ADDRESS : PAGES_ADDRESS + 100 * PAGE_BYTES] = b"\xff" * (100 * PAGE_BYTES)
        report = guest.verify_memory(memory)
        assert report.errors == 100
        assert [error.page for error in report.page_errors] == list(range(16))

    def test_a_short_dump_is_refused(self) -> None:
        guest = CounterGuest(memory_bytes=4 * MIB, page_count=1)
        with pytest.raises(ValueError, match="4194303 bytes"):
            guest.verify_memory(bytes(4 * MIB - 1))


class TestDefinitions:
    def test_counter_domain(self) -> None:
        guest = CounterGuest(memory_bytes=64 * MIB)
        domain = ElementTree.fromstring(
            guest.domain_xml("a<b", UUID, f"{AWKWARD}/image", f"{AWKWARD}/serial")
        )
        assert domain.get("type") == "qemu"
        assert domain.findtext("name") == "a<b"
        assert domain.findtext("uuid") == UUID
        assert (memory := domain.find("memory")) is not None
        assert (memory.get("unit"), memory.text) == ("KiB", "65536")
        assert (source := domain.find("devices/disk/source")) is not None
        assert source.get("file") == f"{AWKWARD}/image"
        assert domain.find("devices/disk/readonly") is not None
        assert (serial := domain.find("devices/serial/source")) is not None
        assert serial.attrib == {"mode": "connect", "path": f"{AWKWARD}/serial"}

    def test_a_counter_that_writes_its_disk(self, tmp_path: Path) -> None:
        guest = CounterGuest(disk_ticks=16)
        domain = ElementTree.fromstring(guest.domain_xml("n", UUID, "/image", "/serial"))
        assert domain.find("devices/disk/readonly") is None
        assert (target := domain.find("devices/disk/target")) is not None
        assert target.get("bus") == "ide"
        assert any("ide-hd" in word for word in guest.qemu_argv("n", UUID, "/image", "/serial"))
        guest.write_image(tmp_path / "image")
        assert (tmp_path / "image").read_bytes()[0x1AF] == 15
        assert guest.tick_on_disk(tmp_path / "image") == 0
        with pytest.raises(ValueError, match="disk_ticks"):
            CounterGuest(disk_ticks=3)

    def test_counter_command(self) -> None:
        argv = CounterGuest().qemu_argv("n", UUID, "/a,b", "/s", qmp_fd=7, stopped=True, incoming=True)
        assert argv[0] == "qemu-system-x86_64"
        assert "driver=file,filename=/a,,b,node-name=image-file,read-only=on" in argv
        assert "socket,id=qmp,fd=7,server=off" in argv
        assert argv[-3:] == ["-S", "-incoming", "defer"]

    def test_command_without_monitor(self) -> None:
        argv = CounterGuest().qemu_argv("n", UUID, "/a", "/s")
        assert not {"-mon", "-S", "-incoming"} & set(argv)

    def test_linux_domain(self) -> None:
        domain = ElementTree.fromstring(LinuxGuest(tick_ms=35).domain_xml("l", UUID, "/k", AWKWARD, "/s"))
        assert domain.findtext("os/kernel") == "/k"
        assert domain.findtext("os/initrd") == AWKWARD
        assert "ferryman.tick_ms=35 " in str(domain.findtext("os/cmdline"))
        assert domain.find("devices/disk") is None

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"memory_bytes": 1}, "memory_bytes"),
            ({"tick_ms": 0}, "tick_ms"),
            ({"pause_ms": 60_001}, "pause_ms"),
            ({"block_bytes": 1000}, "block_bytes"),
            ({"blocks_bytes": 1000}, "blocks_bytes"),
            ({"memory_bytes": 64 * MIB, "blocks_bytes": 33 * MIB}, "blocks_bytes"),
        ],
    )
    def test_linux_parameters_out_of_range_are_refused(self, wrong: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LinuxGuest(**wrong)


def static_program(*, interpreter: bool = False) -> bytes:
    """The smallest thing with the headers of an ELF64 program."""
    kinds = [1, 3 if interpreter else 1]
    header = struct.pack(
        "<4sBB10xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 2, 62, 1, 0, 64, 0, 0, 64, 56, len(kinds), 0, 0, 0
    )
    return header + b"".join(struct.pack("<I52x", kind) for kind in kinds)


def read_cpio(archive: bytes) -> dict[str, tuple[int, bytes]]:
    entries: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11]]
        assert name.endswith(b"\0")
        at += -(-(110 + fields[11]) // 4) * 4
        if name == b"TRAILER!!!\0":
            return entries
        entries[name[:-1].decode()] = (fields[1], archive[at : at + fields[6]])
        at += -(-fields[6] // 4) * 4


class TestInitramfs:
    def test_archive_holds_what_the_guest_needs(self, tmp_path: Path) -> None:
        (tmp_path / "busybox").write_bytes(static_program())
        (tmp_path / "button.ko").write_bytes(b"module!")
        path = build_initramfs(tmp_path, busybox=tmp_path / "busybox", modules=[tmp_path / "button.ko"])
        entries = read_cpio(path.read_bytes())
        assert entries["bin/busybox"] == (stat.S_IFREG | 0o755, static_program())
        assert entries["modules/0-button.ko"] == (stat.S_IFREG | 0o644, b"module!")
        assert entries["init"][0] == stat.S_IFREG | 0o755
        assert entries["init"][1].startswith(b"#!/bin/busybox sh\n")
        assert entries["dev/console"] == (stat.S_IFCHR | 0o600, b"")
        for name in entries:
            parent = os.path.dirname(name)
            assert not parent or stat.S_ISDIR(entries[parent][0]), name
            assert not parent or list(entries).index(parent) < list(entries).index(name), name

    def test_it_is_built_once_for_each_content(self, tmp_path: Path) -> None:
        (tmp_path / "busybox").write_bytes(static_program())
        first = build_initramfs(tmp_path / "cache", busybox=tmp_path / "busybox", modules=[])
        written_ns = first.stat().st_mtime_ns
        assert build_initramfs(tmp_path / "cache", busybox=tmp_path / "busybox", modules=[]) == first
        assert first.stat().st_mtime_ns == written_ns
        (tmp_path / "busybox").write_bytes(static_program() + b"newer")
        second = build_initramfs(tmp_path / "cache", busybox=tmp_path / "busybox", modules=[])
        assert second != first
        assert sorted((tmp_path / "cache").iterdir()) == sorted([first, second])
        assert hashlib.sha256(second.read_bytes()).hexdigest()[:16] in second.name

    @pytest.mark.parametrize("program", [static_program(interpreter=True), b"#!/bin/sh\n", b""])
    def test_a_busybox_that_could_not_run_is_refused(self, tmp_path: Path, program: bytes) -> None:
        (tmp_path / "busybox").write_bytes(program)
        with pytest.raises(ValueError, match="not statically linked"):
            build_initramfs(tmp_path, busybox=tmp_path / "busybox", modules=[])


def said(*parts: tuple[int, range]) -> list[Tick]:
    """Ticks 1 ms apart: what each process said, in order."""
    values = [(pid, value) for pid, numbers in parts for value in numbers]
    return [Tick(pid, pid, index * 1_000_000, value) for index, (pid, value) in enumerate(values)]


class TestReport:
    def test_nothing_heard(self) -> None:
        report = report_on([])
        assert (report.ticks, report.ticks_lost, report.ticks_doubled) == (0, 0, 0)
        assert (report.blackouts, report.overlaps, report.pids) == ((), (), ())

    def test_there_and_back_again(self) -> None:
        report = report_on(said((10, range(1, 6)), (11, range(6, 9)), (12, range(9, 20))))
        assert (report.ticks, report.ticks_lost, report.ticks_doubled) == (19, 0, 0)
        assert report.overlaps == ()
        assert report.pids == (10, 11, 12)
        assert report.blackouts == (
            Blackout(
                source_pid=10,
                destination_pid=11,
                t_last_source_ns=4_000_000,
                t_first_destination_ns=5_000_000,
            ),
            Blackout(
                source_pid=11,
                destination_pid=12,
                t_last_source_ns=7_000_000,
                t_first_destination_ns=8_000_000,
            ),
        )
        assert report.blackouts[0].ms == 1.0

    def test_an_older_memory_doubles_ticks(self) -> None:
        report = report_on(said((10, range(1, 11)), (11, range(8, 15))))
        assert (report.ticks_lost, report.ticks_doubled) == (0, 3)

    def test_two_running_guests_overlap(self) -> None:
        report = report_on(said((10, range(1, 5)), (11, range(5, 7)), (10, range(5, 8)), (11, range(7, 9))))
        assert report.ticks_doubled == 3
        assert report.overlaps == (
            Overlap(pid=10, taken_over_by_pid=11, ticks=3, t_first_ns=6_000_000, t_last_ns=8_000_000),
        )
        assert len(report.blackouts) == 1

    @given(
        runs=st.lists(st.integers(1, 20), min_size=1, max_size=6),
        lost=st.sets(st.integers(2, 100)),
        again=st.lists(st.integers(1, 100), max_size=10),
    )
    def test_counting(self, runs: list[int], lost: set[int], again: list[int]) -> None:
        """Each process says a run of numbers; some get lost on the way, some are said again at the end."""
        parts, first = [], 1
        for pid, length in enumerate(runs, start=100):
            parts.append((pid, range(first, first + length)))
            first += length
        whole = [tick for tick in said(*parts) if tick.value not in lost]
        repeated = [whole[-1]._replace(value=value) for value in again if value < first]
        report = report_on(whole + repeated)
        counts = Counter(tick.value for tick in whole + repeated)
        assert report.ticks_lost == sum(value not in counts for value in range(1, max(counts)))
        assert report.ticks_doubled == sum(count > 1 for count in counts.values())
        assert len(report.blackouts) == len(report.pids) - 1
        assert report.overlaps == ()


class TestLog:
    def test_records_read_back(self, tmp_path: Path) -> None:
        ticks = [Tick(0, 4711, 5_000_000_000, 1), Tick(2**32 - 1, 1, 2**62, 2**63)]
        path = tmp_path / "ticks"
        path.write_bytes(b"".join(struct.pack("<IiqQ", *tick) for tick in ticks))
        assert read_log(path) == ticks

    def test_half_a_record_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "ticks"
        path.write_bytes(bytes(25))
        with pytest.raises(ValueError, match="middle of a record"):
            read_log(path)
