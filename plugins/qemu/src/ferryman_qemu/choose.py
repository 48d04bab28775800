"""Chooses what a definition leaves to the host: machine type, CPU model, size of memory, firmware.

Source: QEMU docs/interop/firmware.json (descriptors of firmware and the order of their directories).
"""

from __future__ import annotations

import json
import logging
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferryman.definition import definition_error

if TYPE_CHECKING:
    from ferryman_qemu.machine import Machine
    from ferryman_qemu.machine.pin import ChosenFirmware
    from ferryman_qemu.probe import Emulator

_log = logging.getLogger(__name__)

FIRMWARE_DIRECTORIES = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
"""Where descriptors lie; one in an earlier directory hides one of the same name in a later one."""

_CHIPSETS = ("pc-i440fx-", "pc-q35-")


class HostChooser:
    """Chooses by what one emulator can do here."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator

    def machine_type(self, machine: Machine) -> str:
        """The versioned machine type."""
        root: Any = machine.definition.root
        pinned = self._emulator.machines.get(machine.machine)
        if pinned is None:
            raise definition_error(
                root.find("os/type"),
                f"{self._emulator.path} has no machine type {machine.machine}: see the host's capabilities",
            )
        if not pinned.startswith(_CHIPSETS):
            raise definition_error(
                root.find("os/type"),
                f"the machine type {machine.machine} is not supported: use pc, q35, or one of them of some version",
            )
        if machine.accelerated and not self._emulator.kvm:
            raise definition_error(
                root, "KVM was tried on this host and does not work: use <domain type='qemu'>"
            )
        return pinned

    def cpu(self, machine: Machine, machine_type: str) -> tuple[str, tuple[tuple[str, bool], ...]]:
        """The CPU model, and features beyond it."""
        emulator, cpu = self._emulator, machine.cpu
        root: Any = machine.definition.root
        if cpu.host_model:
            model, features = emulator.host_models[emulator.accelerator(accelerated=machine.accelerated)]
            return model, tuple((name, True) for name in features)
        model = cpu.model or emulator.default_cpus.get(machine_type, "qemu64")
        lacking = emulator.lacking(model, cpu.features, accelerated=machine.accelerated)
        if lacking is None:
            raise definition_error(
                root.find("cpu/model"), f"{emulator.path} has no CPU model {model}: see its -cpu help"
            )
        if lacking and cpu.check in ("partial", "full"):
            raise definition_error(
                root.find("cpu"), f"this host cannot give a guest {', '.join(lacking)} of the CPU {model}"
            )
        return model, ()

    def memory(self, machine: Machine, memory_bytes: int) -> int:
        """Memory with which the guest can be migrated."""
        return self._emulator.migratable_memory(memory_bytes, accelerated=machine.accelerated)

    def firmware(self, machine: Machine, machine_type: str) -> ChosenFirmware:
        """The first firmware whose descriptor fits."""
        from ferryman_qemu.machine.pin import ChosenFirmware

        wanted = dict(machine.firmware.wanted)
        if machine.firmware.secure is not None:
            wanted.setdefault("secure-boot", machine.firmware.secure)
        # What nobody asked for: a guest without a system that is signed does not start with enrolled keys.
        wanted.setdefault("secure-boot", False)
        wanted.setdefault("enrolled-keys", wanted["secure-boot"])
        for descriptor in _descriptors():
            features = descriptor["features"]
            fits = (
                "uefi" in descriptor["interface-types"]
                and _targets(descriptor, machine_type)
                and all((name in features) == has for name, has in wanted.items())
            )
            if not fits:
                continue
            return ChosenFirmware(
                code=descriptor["executable"],
                template=descriptor["nvram-template"],
                secure="requires-smm" in features,
            )
        said = ", ".join(f"{name} {'on' if has else 'off'}" for name, has in wanted.items())
        raise definition_error(
            machine.definition.root.find("os"),
            f"no UEFI firmware for {machine_type} with {said} is installed here: on Debian, apt-get install ovmf",
        )


def _targets(descriptor: dict[str, Any], machine_type: str) -> bool:
    return any(
        target["architecture"] == "x86_64"
        and any(fnmatch(machine_type, pattern) for pattern in target["machines"])
        for target in descriptor["targets"]
    )


def _descriptors() -> list[dict[str, Any]]:
    """All descriptors of firmware in two flash chips that can be used, in the order of their names."""
    files: dict[str, Path] = {}
    for directory in reversed(FIRMWARE_DIRECTORIES):
        files |= {path.name: path for path in directory.glob("*.json")}
    found = []
    for name in sorted(files):
        try:
            text = files[name].read_text()
            if not text.strip():
                continue  # that is how a descriptor of a later directory is switched off
            descriptor = _two_chips(json.loads(text))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("the firmware descriptor %s cannot be used: %r", files[name], error)
            continue
        if descriptor is not None:
            found.append(descriptor)
    return found


def _two_chips(document: Any) -> dict[str, Any] | None:
    """What a descriptor says, with values of their types; None if it is not of two raw images that are here."""
    mapping = document["mapping"]
    if mapping["device"] != "flash" or mapping.get("mode", "split") != "split":
        return None
    chips = {name: mapping[name] for name in ("executable", "nvram-template")}
    if any(chip["format"] != "raw" for chip in chips.values()):
        return None
    paths = {name: str(chip["filename"]) for name, chip in chips.items()}
    if not all(os.access(path, os.R_OK) for path in paths.values()):
        return None
    return {
        **paths,
        "interface-types": [str(kind) for kind in document["interface-types"]],
        "features": [str(name) for name in document.get("features", ())],
        "targets": [
            {
                "architecture": str(target["architecture"]),
                "machines": [str(pattern) for pattern in target["machines"]],
            }
            for target in document["targets"]
        ],
    }
