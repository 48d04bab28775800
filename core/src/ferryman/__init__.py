"""Ferryman live-migrates running virtual machines between hosts.

::

    async with ferryman.connect("qemu:///embed?root=/srv/a") as a, ferryman.connect("qemu:///embed?root=/srv/b") as b:
        domain = await a.lookup_by_name("web")
        result = await domain.migrate(b)

:mod:`ferryman.sync` has the same names for blocking callers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ferryman.capabilities import Capabilities, Negotiation, negotiate
    from ferryman.connection import Connection, Domain, connect
    from ferryman.errors import FerrymanError, InDoubtError, MigrationError
    from ferryman.migration import MigrationJob
    from ferryman.plan import Plan
    from ferryman.resolve import Resolution, Testimony
    from ferryman.types import (
        Compression,
        DomainEvent,
        DomainInfo,
        DomainState,
        DomainStatistics,
        Finding,
        GuestState,
        MigrationOptions,
        MigrationResult,
        Phase,
        PhaseEvent,
        Postcopy,
        ProgressEvent,
        Scope,
        SettledEvent,
        ShutdownMode,
        Side,
        StorageCopy,
        TimeoutAction,
        TransferStatistics,
    )
    from ferryman.uri import ConnectionURI, MigrationURI

_HOMES = {
    "connect": "connection",
    "Connection": "connection",
    "Domain": "connection",
    "MigrationOptions": "types",
    "Compression": "types",
    "Postcopy": "types",
    "StorageCopy": "types",
    "TimeoutAction": "types",
    "MigrationJob": "migration",
    "MigrationResult": "types",
    "Plan": "plan",
    "Resolution": "resolve",
    "Testimony": "resolve",
    "Finding": "types",
    "PhaseEvent": "types",
    "ProgressEvent": "types",
    "SettledEvent": "types",
    "TransferStatistics": "types",
    "Phase": "types",
    "Side": "types",
    "GuestState": "types",
    "DomainInfo": "types",
    "DomainState": "types",
    "DomainStatistics": "types",
    "DomainEvent": "types",
    "ShutdownMode": "types",
    "Scope": "types",
    "Capabilities": "capabilities",
    "Negotiation": "capabilities",
    "negotiate": "capabilities",
    "ConnectionURI": "uri",
    "MigrationURI": "uri",
    "FerrymanError": "errors",
    "MigrationError": "errors",
    "InDoubtError": "errors",
}

__all__ = [
    "connect",
    "Connection",
    "Domain",
    "MigrationOptions",
    "Compression",
    "Postcopy",
    "StorageCopy",
    "TimeoutAction",
    "MigrationJob",
    "MigrationResult",
    "Plan",
    "Resolution",
    "Testimony",
    "Finding",
    "PhaseEvent",
    "ProgressEvent",
    "SettledEvent",
    "TransferStatistics",
    "Phase",
    "Side",
    "GuestState",
    "DomainInfo",
    "DomainState",
    "DomainStatistics",
    "DomainEvent",
    "ShutdownMode",
    "Scope",
    "Capabilities",
    "Negotiation",
    "negotiate",
    "ConnectionURI",
    "MigrationURI",
    "FerrymanError",
    "MigrationError",
    "InDoubtError",
]


def __getattr__(name: str) -> object:
    """Import a public name's module at its first use: programs that only look at types need no event loop."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ferryman' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ferryman.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
