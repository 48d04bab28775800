"""The handshakes of others as tables for the same checker: what they do where a message is lost or a command fails.

Facts only, and those that matter for who owns the guest; nothing else of these programs is modelled.  Sources: libvirt
9.0 ``src/libvirt-domain.c`` (the client's side of migration v2 and v3) and ``src/qemu/qemu_migration.c``; Xen 4.17
``tools/xl/xl_migrate.c``; both were also watched at work.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from ferryman.handover import TABLE, Action, Input, PaperKind, Record, State, Step
from tests.model.mutants import Mutant
from tests.model.world import Bounds, Protocol

_CALM = Bounds(crash_managers=False, kill=False, silent=False, fail=False)

LIBVIRT_V2 = Mutant(
    name="libvirt-v2",
    protocol=Protocol(
        table={
            **TABLE,
            # A successful perform ends the source's copy; only then is the destination asked to run the guest.
            (State.HANDING, Input.PROVED): Step(
                state=State.GIVEN,
                record=Record.GIVEN,
                actions=(Action.DESTROY_COPY, Action.SETTLE),
                answer=PaperKind.PROOF,
            ),
        },
        asks=False,
    ),
    bounds=replace(_CALM, fail=True),
)
"""The destination cannot run the guest: nobody has it."""

LIBVIRT_V3 = Mutant(
    name="libvirt-v3",
    protocol=Protocol(
        # The client's rule: whatever is wrong with finish's reply, confirm says that the migration was cancelled.
        presumes=MappingProxyType({PaperKind.PROOF: PaperKind.REFUSAL}),
        asks=False,
    ),
    bounds=_CALM,
)
"""Finish's reply is lost: two run."""

_XL = {
    **TABLE,
    # One pipe: a target that gives up because it has broken cannot say so, and there is nobody to ask.
    (State.PREPARED, Input.CANCEL): replace(TABLE[State.PREPARED, Input.CANCEL], answer=None),
    (State.REFUSED, Input.GO): replace(TABLE[State.REFUSED, Input.GO], answer=None),
    (State.REFUSED, Input.RESTART): replace(TABLE[State.REFUSED, Input.RESTART], answer=None),
    (State.REFUSED, Input.CANCEL): replace(TABLE[State.REFUSED, Input.CANCEL], answer=None),
    (State.REFUSED, Input.ASK): replace(TABLE[State.REFUSED, Input.ASK], answer=None),
    (State.REFUSED, Input.NO_PROOF): replace(TABLE[State.REFUSED, Input.NO_PROOF], answer=None),
}

XL = Mutant(
    name="xl",
    protocol=Protocol(table=_XL, asks=False),
    bounds=_CALM,
)
"""The pipe breaks in the last handshake: the target has destroyed its copy, and the source stays suspended."""

XL_OPERATOR = Mutant(
    name="xl-operator",
    protocol=Protocol(table=_XL, presumes=MappingProxyType({PaperKind.PROOF: PaperKind.REFUSAL}), asks=False),
    bounds=_CALM,
    heal=False,
)
"""The same, and the operator, who must guess, resumes the source: two run."""

PEERS = (LIBVIRT_V2, LIBVIRT_V3, XL, XL_OPERATOR)

__all__ = ["LIBVIRT_V2", "LIBVIRT_V3", "PEERS", "XL", "XL_OPERATOR"]
