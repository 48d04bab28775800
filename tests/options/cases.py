"""The cases, as data: what is asked, what comes of it, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ferryman.types import Compression, Postcopy, TimeoutAction

MIB = 1 << 20
SLOW = 6 * MIB
"""Bytes per second: less than the guest writes, so that a transfer under this cap ends only when it is helped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One migration, or what is refused of it.

    :param option: what it is about, as the table names it.
    :param options: those of the migration; ``{directory}`` and ``{port}`` in texts are filled in.
    :param outcome: ``passes``, ``refused: FINDING``, ``refused: option-invalid``, or ``fails: ERROR``.
    :param does: what is done while it runs: a name in ``run.ACTS``.
    :param ports: length of the range of ports that is asked for, and how many of its first ones are taken.
    :param edit: a pattern and its replacement: the source's definition, changed so, is the destination's.
    :param credentials: of source and destination, kinds in ``credentials.KINDS``.
    :param taken: take the credentials of this side away once the migration has begun.
    :param persistent: make the domain persistent before it.
    :param suspended: suspend the guest before it.
    :param seen: what is verified beside memory, ticks and disk; a name in ``run.LOOKS``.
    :param note: why, for the table.
    """

    option: str
    options: dict[str, Any] = field(default_factory=dict)
    outcome: str = "passes"
    does: str = ""
    ports: tuple[int, int] | None = None
    edit: tuple[str, str] | None = None
    credentials: tuple[str, str] | None = None
    taken: str = ""
    persistent: bool = False
    suspended: bool = False
    seen: str = ""
    note: str = ""


_GOOD = ("good", "good")
_POSTCOPY = {"postcopy": Postcopy.ON_REQUEST}
_TLS = {"tls": True}
_RAM = (r"(<memory[^>]*>)\d+", r"\g<1>65544")
_CAPPED = {"bandwidth_bytes_per_s": SLOW}

CASES: tuple[Case, ...] = (
    Case(option="none"),
    # Where it goes
    Case(option="migration_uri", options={"migration_uri": "tcp://127.0.0.1:{port}"}),
    Case(option="migration_uri", options={"migration_uri": "127.0.0.1:{port}"}),
    Case(
        option="migration_uri",
        options={"migration_uri": "tcp://127.0.0.1"},
        note="the destination chooses the port",
    ),
    Case(option="migration_uri", options={"migration_uri": "tcp://[::1]:{port}"}),
    Case(option="migration_uri", options={"migration_uri": "unix:{directory}/stream"}),
    Case(
        option="migration_uri",
        options={"migration_uri": "unix:{directory}/" + "x" * 120},
        outcome="fails: prepare-failed",
        note="a socket's path has at most 107 bytes",
    ),
    Case(
        option="migration_uri",
        options={"migration_uri": "unix:{directory}/image"},
        outcome="fails: prepare-failed",
        note="QEMU would remove the file that lies there",
    ),
    Case(
        option="migration_uri",
        options={"migration_uri": "fd:7"},
        outcome="refused: migration-uri-invalid",
        note="a descriptor is one process's own, and means nothing to the other host",
    ),
    Case(
        option="migration_uri",
        options={"migration_uri": "exec:cat"},
        outcome="refused: migration-uri-invalid",
        note="what the source may run is not a caller's to say",
    ),
    Case(
        option="migration_uri",
        options={"migration_uri": "rdma://127.0.0.1:{port}"},
        outcome="refused: transport-unsupported",
    ),
    Case(option="listen_address", options={"listen_address": "127.0.0.1"}),
    Case(option="listen_address", options={"listen_address": "::1"}),
    Case(option="listen_address", options={"listen_address": "0.0.0.0", "migration_uri": "tcp://127.0.0.1"}),
    Case(option="listen_address", options={"listen_address": "::", "migration_uri": "tcp://[::1]:{port}"}),
    Case(
        option="listen_address",
        options={"listen_address": "192.0.2.1"},
        outcome="fails: prepare-failed",
        note="the destination does not have the address",
    ),
    Case(option="port_range", ports=(4, 0)),
    Case(option="port_range", ports=(4, 3), note="all but the last are taken"),
    Case(
        option="port_range",
        ports=(2, 2),
        outcome="fails: prepare-failed",
        note="all are taken: it says so, and nothing has moved",
    ),
    Case(option="port_range", options={"port_range": (2, 1)}, outcome="refused: option-invalid"),
    # How it is sent
    Case(option="bandwidth_bytes_per_s", options={"bandwidth_bytes_per_s": 40 * MIB}),
    Case(
        option="bandwidth_bytes_per_s",
        options={"bandwidth_bytes_per_s": MIB},
        does="speed up",
        note="lifted in flight",
    ),
    Case(option="max_downtime_ms", options={**_CAPPED, "max_downtime_ms": 2_000}),
    Case(option="max_downtime_ms", options=_CAPPED, does="stop longer", note="raised in flight"),
    Case(
        option="abort",
        options=_CAPPED,
        does="abort",
        outcome="fails: migration-aborted",
        note="on request, while it is sent",
    ),
    Case(option="streams", options={"streams": 1}),
    Case(option="streams", options={"streams": 4}),
    Case(option="streams", options={"streams": 4, "migration_uri": "unix:{directory}/stream"}),
    Case(option="streams", options={"streams": 2, "bandwidth_bytes_per_s": 40 * MIB}),
    Case(
        option="streams", options={"streams": 4, **_CAPPED}, does="abort", outcome="fails: migration-aborted"
    ),
    Case(option="streams", options={"streams": 65}, outcome="refused: option-invalid"),
    Case(option="compression", options={"compression": Compression.ZLIB}, note="two streams"),
    Case(option="compression", options={"compression": Compression.ZSTD, "streams": 4}),
    Case(option="compression_level", options={"compression": Compression.ZLIB, "compression_level": 9}),
    Case(option="compression_level", options={"compression": Compression.ZSTD, "compression_level": 19}),
    Case(
        option="compression_level",
        options={"compression_level": 3},
        outcome="refused: option-invalid",
        note="it means nothing without compression",
    ),
    Case(option="compression", options={"compression": Compression.XBZRLE}),
    Case(
        option="xbzrle_cache_bytes",
        options={"compression": Compression.XBZRLE, "xbzrle_cache_bytes": 16 * MIB},
    ),
    Case(
        option="compression",
        options={"compression": Compression.XBZRLE, "streams": 2},
        outcome="refused: options-conflict",
        note="XBZRLE works on one connection",
    ),
    Case(option="zero_copy", options={"zero_copy": True, "streams": 2}),
    Case(
        option="zero_copy",
        options={"zero_copy": True},
        outcome="refused: options-conflict",
        note="it needs streams",
    ),
    Case(
        option="zero_copy",
        options={"zero_copy": True, "compression": Compression.ZSTD},
        outcome="refused: options-conflict",
        note="what is compressed is not the guest's own memory",
    ),
    Case(
        option="zero_copy",
        options={"zero_copy": True, "streams": 2, **_TLS},
        credentials=_GOOD,
        outcome="refused: options-conflict",
        note="nor is what is encrypted",
    ),
    Case(option="auto_converge", options={"auto_converge": True, **_CAPPED}, seen="throttled"),
    Case(
        option="throttle_initial_percent",
        options={
            "auto_converge": True,
            "throttle_initial_percent": 60,
            "throttle_increment_percent": 20,
            "throttle_max_percent": 95,
            **_CAPPED,
        },
        seen="throttled",
    ),
    Case(
        option="throttle_initial_percent",
        options={"throttle_initial_percent": 60},
        outcome="refused: option-invalid",
        note="it means nothing without auto_converge",
    ),
    # What becomes of the guest
    Case(option="paused", options={"paused": True}, seen="paused"),
    Case(option="none", suspended=True, seen="paused", note="a guest that is paused stays paused"),
    Case(option="persist", options={"persist": True}, seen="persistent"),
    Case(
        option="undefine_source",
        options={"undefine_source": True},
        persistent=True,
        seen="gone at the source",
    ),
    Case(option="name", options={"name": "renamed"}, seen="renamed"),
    Case(option="name", options={"name": "counter"}, note="and back"),
    # Post-copy
    Case(option="postcopy", options=_POSTCOPY, note="allowed, and not asked for"),
    Case(option="postcopy", options={**_POSTCOPY, **_CAPPED}, does="switch", note="switched on request"),
    Case(
        option="postcopy",
        options={**_POSTCOPY, **_CAPPED, "migration_uri": "unix:{directory}/stream"},
        does="switch",
    ),
    Case(
        option="postcopy",
        options={"postcopy": Postcopy.AFTER_FIRST_PASS, **_CAPPED},
        note="switched after the first pass",
    ),
    Case(
        option="postcopy", options={**_POSTCOPY, **_CAPPED, "compression": Compression.XBZRLE}, does="switch"
    ),
    Case(option="postcopy", options={**_POSTCOPY, **_CAPPED, "paused": True}, does="switch", seen="paused"),
    Case(
        option="postcopy",
        options={**_POSTCOPY, "streams": 2},
        outcome="refused: options-conflict",
        note="post-copy over streams ends the destination's QEMU 7.2 at the end",
    ),
    Case(
        option="postcopy_bandwidth_bytes_per_s",
        options={**_POSTCOPY, **_CAPPED, "postcopy_bandwidth_bytes_per_s": 20 * MIB},
        does="switch",
    ),
    Case(
        option="postcopy_bandwidth_bytes_per_s",
        options={**_POSTCOPY, **_CAPPED, "postcopy_bandwidth_bytes_per_s": MIB},
        does="switch and speed up",
        note="lifted in flight",
    ),
    Case(
        option="postcopy_bandwidth_bytes_per_s",
        options={"postcopy_bandwidth_bytes_per_s": MIB},
        outcome="refused: option-invalid",
        note="it means nothing without postcopy",
    ),
    # When it takes too long
    Case(
        option="timeout_s",
        options={**_CAPPED, "timeout_s": 0.7},
        outcome="fails: migration-aborted",
        note="aborted, the default",
    ),
    Case(
        option="timeout_action",
        options={**_CAPPED, "timeout_s": 0.7, "timeout_action": TimeoutAction.SUSPEND},
        note="suspended at the source, runs at the destination",
    ),
    Case(
        option="timeout_action",
        options={**_CAPPED, **_POSTCOPY, "timeout_s": 0.7, "timeout_action": TimeoutAction.POSTCOPY},
    ),
    Case(
        option="timeout_action",
        options={"timeout_s": 0.7, "timeout_action": TimeoutAction.POSTCOPY},
        outcome="refused: option-unsupported",
        note="post-copy must be allowed",
    ),
    Case(option="timeout_s", options={"timeout_s": 60.0}, note="it ended before"),
    # Encrypted
    Case(option="tls", options=_TLS, credentials=_GOOD),
    Case(
        option="tls",
        options={**_TLS, "migration_uri": "unix:{directory}/stream", "tls_name": "host-d"},
        credentials=_GOOD,
    ),
    Case(
        option="tls",
        options={**_TLS, "migration_uri": "unix:{directory}/stream"},
        credentials=_GOOD,
        outcome="refused: tls-name-missing",
    ),
    Case(option="tls_name", options={**_TLS, "tls_name": "host-d"}, credentials=_GOOD),
    Case(
        option="tls_name",
        options={**_TLS, "tls_name": "elsewhere"},
        credentials=_GOOD,
        outcome="fails: perform-failed",
        note="the certificate does not bear the name",
    ),
    Case(
        option="tls_name",
        options={"tls_name": "host-d"},
        outcome="refused: option-invalid",
        note="it means nothing without tls",
    ),
    Case(option="tls", options=_TLS, credentials=("key", "key"), note="a shared key instead of certificates"),
    Case(
        option="tls",
        options=_TLS,
        credentials=("key", "other key"),
        outcome="fails: perform-failed",
        note="another key",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=("good", "other name"),
        outcome="fails: perform-failed",
        note="the certificate bears another name",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=("good", "other signer"),
        outcome="fails: perform-failed",
        note="the destination's certificate is of another signer",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=("other signer", "good"),
        outcome="fails: perform-failed",
        note="the source's is",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=("good", "expired"),
        outcome="fails: prepare-failed",
        note="the destination's certificate has expired",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=("expired", "good"),
        outcome="fails: perform-failed",
        note="the source's has",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=("good", "nobody may send"),
        outcome="fails: perform-failed",
        note="clients.txt does not let the source send",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=("none", "good"),
        outcome="refused: option-unsupported",
        note="the source has no credentials",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=("good", "none"),
        outcome="refused: option-unsupported",
        note="the destination has none",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=("key", "good"),
        outcome="refused: tls-mismatch",
        note="a key and certificates",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=_GOOD,
        taken="source",
        outcome="fails: perform-failed",
        note="its credentials are taken away when the migration has begun",
    ),
    Case(
        option="tls",
        options=_TLS,
        credentials=_GOOD,
        taken="destination",
        outcome="fails: prepare-failed",
        note="likewise at the destination",
    ),
    Case(
        option="tls",
        options={**_TLS, "streams": 2},
        credentials=_GOOD,
        outcome="refused: options-conflict",
        note="a network that is cut while streams are being encrypted would stop the guest",
    ),
    Case(option="tls", options={**_TLS, **_POSTCOPY, **_CAPPED}, credentials=_GOOD, does="switch"),
    Case(option="tls", options={**_TLS, "compression": Compression.XBZRLE}, credentials=_GOOD),
    # Another definition
    Case(
        option="disks",
        options={"disks": (("hda", "{directory}/linked"),)},
        seen="disk moved",
        note="another name of the same file",
    ),
    Case(
        option="disks",
        options={"disks": (("hda", "{directory}/symbolic"),)},
        seen="disk moved",
        note="a symbolic link to it",
    ),
    Case(
        option="disks",
        options={"disks": (("hda", "{directory}/other"),)},
        outcome="refused: storage-not-shared",
        note="another file",
    ),
    Case(
        option="disks",
        options={"disks": (("hda", "{directory}/missing"),)},
        outcome="refused: storage-missing",
    ),
    Case(
        option="disks",
        options={"disks": (("vdz", "{directory}/linked"),)},
        outcome="refused: definition-unusable",
        note="the domain has no such disk",
    ),
    Case(
        option="disks",
        options={"disks": (("hda", "{directory}/image"),), "name": "counter", **_POSTCOPY, **_CAPPED},
        does="switch",
        seen="disk moved",
    ),
    Case(option="graphics_address", options={"graphics_address": "127.0.0.2"}, seen="served elsewhere"),
    Case(
        option="graphics_address",
        options={"graphics_address": "192.0.2.1"},
        outcome="fails: prepare-failed",
        note="the destination does not have the address",
    ),
    Case(option="destination_definition", edit=("", ""), note="the same"),
    Case(
        option="destination_definition",
        edit=(r"/image(['\"])", r"/linked\1"),
        seen="disk moved at the destination",
    ),
    Case(option="destination_definition", edit=_RAM, outcome="refused: machine-differs", note="other memory"),
    Case(
        option="destination_definition",
        edit=(r"<uuid>[0-9a-f]{8}", "<uuid>00000000"),
        outcome="refused: definition-unusable",
        note="another domain",
    ),
    # Together
    Case(
        option="several",
        options={
            "streams": 4,
            "compression": Compression.ZSTD,
            "auto_converge": True,
            "max_downtime_ms": 500,
            "timeout_s": 60.0,
        },
    ),
    Case(
        option="several",
        options={**_TLS, "auto_converge": True, "timeout_s": 60.0, "persist": True},
        credentials=_GOOD,
        seen="persistent",
    ),
    Case(
        option="several",
        options={
            "postcopy": Postcopy.AFTER_FIRST_PASS,
            **_TLS,
            "auto_converge": True,
            **_CAPPED,
            "timeout_s": 60.0,
            "timeout_action": TimeoutAction.ABORT,
        },
        credentials=_GOOD,
    ),
    Case(
        option="several",
        options={
            "name": "renamed",
            "disks": (("hda", "{directory}/symbolic"),),
            "graphics_address": "127.0.0.1",
            "persist": True,
        },
        seen="renamed",
    ),
    Case(
        option="several", options={"name": "counter", "streams": 2, "disks": (("hda", "{directory}/image"),)}
    ),
    Case(
        option="best_effort",
        options={"zero_copy": True, "streams": 2, "best_effort": frozenset({"zero_copy"})},
        note="what is supported is used",
    ),
)
