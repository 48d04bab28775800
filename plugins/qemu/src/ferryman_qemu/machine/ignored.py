"""What a definition may say without effect here, each with the reason; docs/use/qemu-definitions.md shows the list."""

from __future__ import annotations

IGNORED: dict[str, str] = {
    "@id": "a number that libvirt gives a running domain",
    "title": "for people: kept with the definition",
    "description": "for people: kept with the definition",
    "metadata": "for other programs: kept with the definition",
    "seclabel": "labels are set by whoever confines QEMU; this driver starts it as the user who calls",
    "resource": "groups of processes (cgroups) are managed by whoever calls",
    "features/apic": "every machine of these types has an APIC",
    "features/pae": "the CPU model says it",
    "cpu/vendor": "the CPU model says it; with KVM every guest sees the host's",
    "features/hap": "QEMU uses it where the processor has it",
    "devices/*/seclabel": "as <seclabel> of the domain",
    "devices/*/source/seclabel": "as <seclabel> of the domain",
    "devices/*/source/reconnect": "QEMU's ports do not reconnect: open the far end first, or let QEMU listen",
    "devices/disk/@index": "a number that libvirt gives a running domain",
    "devices/disk/source/@index": "a number that libvirt gives a running domain",
    "devices/disk/source/privateData": "a note that libvirt keeps about a running domain",
    "devices/disk/privateData": "a note that libvirt keeps about a running domain",
    "devices/console/@tty": "the path of a running domain's terminal",
    "devices/channel/target/@state": "what a running guest said last",
    "devices/video/model/acceleration/@rendernode": "without 3D acceleration there is none",
    "devices/graphics/@connected": "it asks that a viewer stays when the password changes, which QEMU does",
}
"""Paths below ``<domain>``; ``*`` is any one name, ``@name`` an attribute.  What is below an element goes with it."""
