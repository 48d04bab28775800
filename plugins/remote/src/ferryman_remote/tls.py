"""Encrypted links: both ends show certificates of one authority, as libvirt's do.

The server says with one byte, inside the encrypted stream, that it takes the client's certificate; only then do packets
begin.  Source: libvirt, docs/tlscerts.rst and src/rpc/virnettlscontext.c.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from anyio.streams.tls import TLSAttribute, TLSStream

from ferryman.errors import ConnectError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.abc import ByteStream

TLS_PORT = 16514
_TAKEN = b"\x01"


@dataclass(frozen=True, slots=True)
class Pki:
    """Where the authority's certificate lies, and a certificate of ours with its key."""

    authority: Path
    certificate: Path
    key: Path


def pki(directory: str | Path | None, role: str) -> Pki:
    """The files of a role, ``client`` or ``server``.

    :param directory: holds all of them; None is where libvirt has them: below ``/etc/pki``, or for a client who is not
        root below ``~/.pki/libvirt`` where there is such a directory.
    """
    own = Path.home() / ".pki" / "libvirt"
    if directory is None and role == "client" and os.geteuid() != 0 and own.is_dir():
        directory = own
    if directory is not None:
        place = Path(directory)
        return Pki(place / "cacert.pem", place / f"{role}cert.pem", place / f"{role}key.pem")
    place = Path("/etc/pki/libvirt")
    return Pki(
        Path("/etc/pki/CA/cacert.pem"), place / f"{role}cert.pem", place / "private" / f"{role}key.pem"
    )


def context_of(files: Pki, *, server: bool) -> ssl.SSLContext:
    """What a side of the handshake needs.

    :raises ConnectError: a file is missing, or is no certificate or key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    # Stock clients read once, without waiting, for the byte below; a session ticket that comes first is taken for its
    # absence.
    if server:
        context.num_tickets = 0
    for path in (files.authority, files.certificate, files.key):
        if not path.is_file():
            raise ConnectError(f"{path} is missing, which an encrypted connection needs")
    try:
        context.load_verify_locations(files.authority)
        context.load_cert_chain(files.certificate, files.key)
    except (OSError, ssl.SSLError) as error:
        raise ConnectError(f"{files.certificate} and its key cannot be used: {error}") from error
    return context


async def as_client(stream: ByteStream, host: str, context: ssl.SSLContext) -> TLSStream:
    """Encrypt a connection to a daemon.

    :raises ConnectError: either does not take the other's certificate.
    :cancellation: as after an error, the stream is closed.
    """
    try:
        wrapped = await TLSStream.wrap(
            stream, server_side=False, hostname=host, ssl_context=context, standard_compatible=False
        )
        if await wrapped.receive(1) != _TAKEN:
            raise ConnectError(f"{host} does not take our certificate")
        return wrapped
    except BaseException as error:
        await anyio.aclose_forcefully(stream)
        if isinstance(error, (ssl.SSLError, anyio.EndOfStream, anyio.BrokenResourceError, OSError)):
            raise ConnectError(
                f"{host} and we do not take each other's certificates: {_words(error)}"
            ) from error
        raise


async def as_server(
    stream: ByteStream, context: ssl.SSLContext, allowed: Sequence[str]
) -> tuple[TLSStream, str]:
    """Encrypt a client's connection; returns it, and the client's name.

    :param allowed: patterns of names, one of which the client's certificate must have.
    :raises ConnectError: it has none of them, or the handshake failed.
    """
    try:
        wrapped = await TLSStream.wrap(
            stream, server_side=True, ssl_context=context, standard_compatible=False
        )
        names = names_in(wrapped.extra(TLSAttribute.peer_certificate))
        name = next((name for name in names if any(fnmatchcase(name, each) for each in allowed)), None)
        if name is None:
            raise ConnectError(
                f"its certificate names {', '.join(names) or 'nobody'}, who is not allowed here"
            )
        await wrapped.send(_TAKEN)
    except (ssl.SSLError, anyio.EndOfStream, anyio.BrokenResourceError, OSError) as error:
        raise ConnectError(f"the handshake failed: {_words(error)}") from error
    return wrapped, name


def _words(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__


def names_in(certificate: dict[str, Any] | None) -> list[str]:
    """Names in a certificate, as :meth:`ssl.SSLSocket.getpeercert` has it: of its subject, then the others."""
    found = certificate or {}
    names = [value for part in found.get("subject", ()) for key, value in part if key == "commonName"]
    return [*names, *(value for _, value in found.get("subjectAltName", ()))]
