"""Byte streams to a daemon, by the transport of a connection URI."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ferryman.errors import ConnectError, NotSupportedError
from ferryman_remote.sockets import connect_tcp, connect_unix
from ferryman_remote.tls import TLS_PORT, as_client, context_of, pki

if TYPE_CHECKING:
    from anyio.abc import ByteStream

    from ferryman.uri import ConnectionURI

TCP_PORT = 16509

PKI_DIRECTORY = "FERRYMAN_PKI_DIRECTORY"
"""Variable of the environment: where certificates for outgoing connections lie, if not where libvirt has them."""


def runtime_directory() -> Path:
    """Where the sockets of this user's daemons lie; libvirt's clients look there too."""
    if os.geteuid() == 0:
        return Path("/run/libvirt")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "libvirt"


def socket_name(scheme: str, *, read_only: bool = False) -> str:
    """The name by which libvirt's clients find the daemon of a scheme."""
    return f"virt{scheme}d-sock{'-ro' if read_only else ''}"


async def connect_stream(uri: ConnectionURI) -> ByteStream:
    """Connect.

    :raises OSError: nothing listens there. :raises NotSupportedError: the transport is not served.
    :raises ConnectError: the URI lacks what its transport needs.
    """
    match uri.transport:
        case "tcp":
            if not uri.host:
                raise ConnectError(f"{uri} names no host")
            return await connect_tcp(uri.host, uri.port or TCP_PORT)
        case "tls":
            if not uri.host:
                raise ConnectError(f"{uri} names no host")
            context = context_of(
                pki(uri.param("pkipath") or os.environ.get(PKI_DIRECTORY), "client"), server=False
            )
            return await as_client(await connect_tcp(uri.host, uri.port or TLS_PORT), uri.host, context)
        case "unix":
            path = uri.param("socket") or str(runtime_directory() / socket_name(uri.scheme))
            return await connect_unix(path)
        case _:
            raise NotSupportedError(f"the transport {uri.transport} is not served yet")
