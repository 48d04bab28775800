"""What an emulator can do, found by starting it: version, machine types, and accelerators that work.

``/dev/kvm`` may exist and not work, so an accelerator is tried, never inferred.  The answers are kept in the root's
``probe.json`` and are good for one emulator file and one boot of the host.

Sources: QMP ``query-version``, ``query-machines``, ``query-cpu-definitions`` (QEMU >= 7.2).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ferryman.errors import ConnectError, HypervisorError
from ferryman_qemu.process import boot_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_log = logging.getLogger(__name__)

EMULATOR = "qemu-system-x86_64"
_TIMEOUT_S = 30.0
_POSTCOPY_TRIED = (7, 2)
_NO_FEATURES = {"hypervisor", "svme-addr-chk", "cr8legacy"}
"""Properties of the accelerator rather than of a processor, or which no model turns on."""

_BITMAP_WORD_BYTES = 64 * 4096
_MEMORY_STEP_BYTES = 8192
"""QEMU rounds the size of memory up to this (``BIOS``'s tables need it; softmmu/vl.c, 7.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Emulator:
    """One emulator on this host.

    :param machines: alias or name -> versioned name.
    :param default_cpus: versioned machine type -> CPU model that it has by itself.
    :param cpus: accelerator that works -> CPU model -> features of it that are missing here.
    :param postcopy: post-copy is safe with it: a source that has begun the switch never runs again by itself.
    :param features: accelerator -> every CPU feature that a guest can have here.
    :param host_models: accelerator -> the named model that is nearest to that, and what it lacks of it.
    """

    path: str
    version: tuple[int, int, int]
    machines: dict[str, str]
    default_cpus: dict[str, str]
    cpus: dict[str, dict[str, list[str]]]
    postcopy: bool
    features: dict[str, list[str]]
    host_models: dict[str, tuple[str, list[str]]]

    @property
    def kvm(self) -> bool:
        """Whether KVM was tried and works."""
        return "kvm" in self.cpus

    def accelerator(self, *, accelerated: bool) -> str:
        """Name of the accelerator that a guest runs with."""
        return "kvm" if accelerated else "tcg"

    def lacking(
        self, model: str, features: Sequence[tuple[str, bool]], *, accelerated: bool
    ) -> list[str] | None:
        """What a guest with a CPU model and features beyond it would lack here; None for an unknown model."""
        accelerator = self.accelerator(accelerated=accelerated)
        if model in ("max", "host"):
            missing = []
        else:
            known = self.cpus.get(accelerator, {}).get(model)
            if known is None:
                return None
            missing = list(known)
        refused = {name for name, has in features if not has}
        available = set(self.features.get(accelerator, ()))
        missing += [name for name, has in features if has and name not in available]
        return [name for name in dict.fromkeys(missing) if name not in refused]

    def cpu(self, model: str, features: Sequence[tuple[str, bool]], *, accelerated: bool) -> str | None:
        """What a guest with a CPU model gets here, as a text that two hosts can compare; None for an unknown model."""
        missing = self.lacking(model, features, accelerated=accelerated)
        if missing is None:
            return None
        said = model
        if model == "max":
            said = f"all that QEMU {dotted(self.version)} emulates"
        elif model == "host":
            said = f"the host's {host_cpu()}"
        return f"{said} without {', '.join(missing)}" if missing else said

    def migratable_memory(self, memory_bytes: int, *, accelerated: bool) -> int:
        """The guest's memory, or the next larger one with which this emulator loses no write while it sends a guest.

        Before 9.0 QEMU's own software emulation goes on using cached addresses after it has read which pages were
        written, wherever the size of memory is a multiple of 64 pages: what the guest then writes is never sent.
        Seen here on 7.2.22: some 1,300 of 5,000 pages wrong after six passes, none with 8 KiB more memory.  A guest
        that stands still writes nothing and is safe.

        :source: QEMU ``include/exec/ram_addr.h``, cpu_physical_memory_sync_dirty_bitmap: the fast path for whole words
            of the bitmap; mended in 9.0 ("physmem: Fix migration dirty bitmap coherency with TCG memory access").
        """
        affected = not accelerated and self.version < (9, 0, 0) and memory_bytes % _BITMAP_WORD_BYTES == 0
        return memory_bytes + _MEMORY_STEP_BYTES if affected else memory_bytes


def find_emulator(path: str = "") -> str:
    """Find the emulator.

    :raises ConnectError: it is not installed.
    """
    found = shutil.which(path or EMULATOR)
    if found is None:
        raise ConnectError(f"{path or EMULATOR} is not installed: on Debian, apt-get install qemu-system-x86")
    return found


def probe(path: str, cache: Path) -> Emulator:
    """Ask an emulator what it can do, or the cache; blocking, some hundred milliseconds.

    :raises HypervisorError: it does not start.
    """
    status = os.stat(path)
    key = [path, status.st_mtime_ns, status.st_size, boot_id()]
    try:
        kept = json.loads(cache.read_text())
        if kept["key"] == key:
            return Emulator(**{**kept["emulator"], "version": tuple(kept["emulator"]["version"])})
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache, or one of another format: it is made anew below
    answers = _ask(
        path, "tcg", [("query-version", {}), ("query-machines", {}), ("query-cpu-definitions", {})]
    )
    if answers is None:
        raise HypervisorError(f"{path} does not start: run it with -machine none -accel tcg to see why")
    version = answers[0]["qemu"]
    cpus = {"tcg": _cpus(answers[2])}
    accelerated = _ask(path, "kvm", [("query-cpu-definitions", {})]) if _runs_code(path, "kvm") else None
    if accelerated is not None:
        cpus["kvm"] = _cpus(accelerated[0])
    features, host_models = {}, {}
    for accelerator, models in cpus.items():
        features[accelerator], host_models[accelerator] = _host_model(path, accelerator, models)
    emulator = Emulator(
        path=path,
        version=(version["major"], version["minor"], version["micro"]),
        machines={
            **{machine["name"]: machine["name"] for machine in answers[1]},
            **{machine["alias"]: machine["name"] for machine in answers[1] if "alias" in machine},
        },
        default_cpus={
            machine["name"]: machine["default-cpu-type"].removesuffix("-x86_64-cpu")
            for machine in answers[1]
            if "default-cpu-type" in machine
        },
        cpus=cpus,
        postcopy=_postcopy(path, (version["major"], version["minor"])),
        features=features,
        host_models=host_models,
    )
    temporary = cache.with_name(cache.name + f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"key": key, "emulator": asdict(emulator)}))
        temporary.replace(cache)
    except OSError as error:
        _log.warning("what %s can do is asked again next time: %s cannot be written: %s", path, cache, error)
        with suppress(OSError):
            temporary.unlink()
    return emulator


def dotted(version: tuple[int, ...]) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))


@lru_cache(maxsize=1)
def host_cpu() -> str:
    """Model of this host's processors, as the kernel names it; '' where it does not."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        names = [line.partition(":")[2] for line in file if line.startswith("model name")]
    return " ".join(names[0].split()) if names else ""


_FIRMWARE_BYTES = 65_536
_RESET_VECTOR = 16
_SAY_AND_STOP = bytes((0xB0, 0x10, 0xE6, 0xF4, 0xF4))
"""What the processor starts with: ``mov al, 0x10; out 0xf4, al; hlt``."""

_SAID = 0x10 << 1 | 1
"""Exit status of QEMU when ``isa-debug-exit`` is told that (hw/misc/debugexit.c)."""


def _runs_code(path: str, accelerator: str) -> bool:
    """Whether a guest's first instructions run with an accelerator: it may open, and fail only then."""
    firmware = _SAY_AND_STOP.ljust(_RESET_VECTOR, b"\0").rjust(_FIRMWARE_BYTES, b"\0")
    with tempfile.NamedTemporaryFile(prefix="ferryman-probe-") as file:
        file.write(firmware)
        file.flush()
        argv = [path, "-machine", "pc", "-accel", accelerator, "-nodefaults", "-no-user-config"]
        argv += ["-display", "none", "-m", "1", "-bios", file.name]
        argv += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        try:
            ended = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return ended.returncode == _SAID


def _host_model(
    path: str, accelerator: str, models: dict[str, list[str]]
) -> tuple[list[str], tuple[str, list[str]]]:
    """What a guest can have here, and the named model that comes nearest to it, with what it lacks of that.

    :source: QMP ``query-cpu-model-expansion``: of ``static`` every property stands by its proper name.
    """
    most = "host" if accelerator == "kvm" else "max"
    # Of the names of each model only the versioned ones: the bare name is another name of the first.
    named = [name for name, missing in models.items() if not missing and re.search(r"-v\d+$", name)]
    asks = [("static", most), ("full", most), *(("full", name) for name in named)]
    answers = _ask(
        path,
        accelerator,
        [("query-cpu-model-expansion", {"type": kind, "model": {"name": name}}) for kind, name in asks],
    )
    if answers is None:
        raise HypervisorError(f"{path} does not say which CPU features it has with {accelerator}")
    best, all_names, *others = [
        {name for name, value in answer["model"]["props"].items() if value is True} for answer in answers
    ]
    nearest = (
        max((len(has & best), name, has) for name, has in zip(named, others, strict=True))
        if named
        else (0, "qemu64", set())
    )
    _, model, has = nearest
    return sorted(all_names), (model, sorted(best - has - _NO_FEATURES))


def _cpus(definitions: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {cpu["name"]: sorted(cpu.get("unavailable-features", ())) for cpu in definitions}


def _postcopy(path: str, version: tuple[int, int]) -> bool:
    """Whether a source that says ``postcopy-active`` can no longer run by itself.

    7.2 never resumes it (seen).  Since 8.x one that fails right after it has sent the devices' state starts its guest
    again, although the destination may have everything; until, in versions with the state ``postcopy-device``,
    ``postcopy-active`` means that the destination has loaded it.

    :source: QEMU migration/migration.c, postcopy_start and migration_iteration_finish.
    """
    if version == _POSTCOPY_TRIED:
        return True
    answers = _ask(path, "tcg", [("query-qmp-schema", {})])
    return answers is not None and "postcopy-device" in json.dumps(answers)


def _ask(path: str, accelerator: str, commands: list[tuple[str, dict[str, Any]]]) -> list[Any] | None:
    """Start the emulator with no machine and ask it; None where it does not start with that accelerator."""
    asked = [("qmp_capabilities", {}), *commands, ("quit", {})]
    lines = [json.dumps({"execute": name, "arguments": arguments}) for name, arguments in asked]
    argv = [
        path,
        "-machine",
        "none",
        "-accel",
        accelerator,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
    ]
    try:
        ended = subprocess.run(
            [*argv, "-S", "-qmp", "stdio"],
            input="\n".join(lines).encode(),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    try:
        messages = [json.loads(line) for line in ended.stdout.splitlines()]
    except ValueError:
        return None
    returned = [message["return"] for message in messages if "return" in message]
    if ended.returncode != 0 or len(returned) != len(lines):
        return None
    return returned[1:-1]
