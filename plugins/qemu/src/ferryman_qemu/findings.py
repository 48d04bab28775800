"""Findings that several parts of the driver make."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ferryman.types import Compression, Finding, FindingSeverity, Side
from ferryman_qemu.transfer import streams_of

if TYPE_CHECKING:
    from ferryman.hookspecs import CheckRequest


def blocker(code: str, side: Side | None, message: str, remedy: str) -> Finding:
    """Make a finding that stops a migration."""
    return Finding(code=code, severity=FindingSeverity.BLOCKER, side=side, message=message, remedy=remedy)


def check_options(request: CheckRequest) -> list[Finding]:
    """Options that QEMU takes and that do not go together; seen on 7.2 where nothing else is said."""
    options = request.options
    streams = streams_of(options)
    clashes = [
        (
            streams and options.postcopy is not None,
            "post-copy over several streams ends the destination's QEMU at the end",
            "leave streams out, or postcopy",
        ),
        (
            streams and options.compression is Compression.XBZRLE,
            "XBZRLE works on a transfer over one connection",
            "leave streams out, or use ZLIB or ZSTD",
        ),
        (
            streams and options.tls,
            "while the streams are being encrypted QEMU waits for the network, and a network that is cut then would"
            " stop the guest",
            "leave streams out, or tls",
        ),
        (
            options.copy_storage is not None and options.postcopy is not None,
            "a disk that is copied must be whole before the guest runs on it",
            "leave copy_storage out, or postcopy",
        ),
        (options.zero_copy and not streams, "zero_copy works on streams only", "set streams"),
        (
            options.zero_copy and (options.migration_uri or "").startswith("unix:"),
            "the kernel copies what is sent over a unix socket in any case",
            "leave zero_copy out, or use tcp",
        ),
        (
            (options.xbzrle_cache_bytes or 1).bit_count() > 1,
            f"QEMU takes a power of two for xbzrle_cache_bytes, which {options.xbzrle_cache_bytes} is not",
            "give one",
        ),
        (
            (options.throttle_max_percent or 99) < (options.throttle_initial_percent or 20),
            "the throttle would begin above its own limit",
            "make throttle_max_percent at least throttle_initial_percent (20 where it is not given)",
        ),
        (
            options.zero_copy and (options.tls or options.compression is not None),
            "what is encrypted or compressed is not the guest's own memory any more, so it cannot be sent from there",
            "leave zero_copy out",
        ),
    ]
    findings = [
        blocker("options-conflict", Side.SOURCE, message, remedy)
        for clash, message, remedy in clashes
        if clash
    ]
    if options.postcopy is not None:
        findings.append(
            Finding(
                code="postcopy-risk",
                severity=FindingSeverity.WARNING,
                side=None,
                message="once the guest has begun to switch to post-copy it is lost if the connection breaks before its"
                " devices have arrived, and then if either host is lost, or the network between them for good",
                remedy="leave postcopy out if the guest must survive that",
            )
        )
    return findings
