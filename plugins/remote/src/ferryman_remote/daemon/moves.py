"""Migrations that clients of libvirt's ask for: every version of its protocol is a shell around one of ours.

libvirt's phases carry no refusal from one host to the other, so nothing of ours hangs on them::

    client             source's daemon                 destination's daemon
      |-- begin ------------>| "this is Ferryman, at A"          |
      |-- prepare -----------|---------------------------------->| "this is Ferryman, at B"
      |-- perform ---------->|==== a whole migration, A to B ===>|
      |-- finish ------------|---------------------------------->| looks whether the guest is there
      |-- confirm ---------->| nothing                           |

Perform is the transaction of :mod:`ferryman.migration`, over Ferryman's own program: it plans, refuses before anything
moves, settles who has the guest, and asks again by itself.  So it does not matter which of the other messages come, or
in what order they fail.  A destination or a source that is not Ferryman's is refused by its cookie.

Source of flags, parameters and their units: libvirt, include/libvirt/libvirt-domain.h.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

import ferryman
from ferryman.definition import parse_definition
from ferryman.errors import DomainNotFoundError, FerrymanError, OptionError
from ferryman.types import (
    Compression,
    DomainUUID,
    MigrationOptions,
    Postcopy,
    ProgressEvent,
    StorageCopy,
    TimeoutAction,
    TransferStatistics,
)
from ferryman.uri import ConnectionURI
from ferryman_remote.daemon.errors import Code, Of, WireFault
from ferryman_remote.protocol import ParameterKind, TypedParameter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferryman.migration import MigrationJob
    from ferryman_remote.daemon.hosts import ServedHost
    from ferryman_remote.daemon.session import Session

_log = logging.getLogger(__name__)

MIB = 1 << 20
_MAX_BANDWIDTH_MIB_PER_S = (1 << 50) // MIB

LIVE = 1
PEER2PEER = 2
TUNNELLED = 4
PERSIST_DEST = 8
UNDEFINE_SOURCE = 16
PAUSED = 32
NON_SHARED_DISK = 64
NON_SHARED_INC = 128
CHANGE_PROTECTION = 256
UNSAFE = 512
COMPRESSED = 2048
AUTO_CONVERGE = 8192
POSTCOPY = 32768
TLS = 65536
PARALLEL = 131072
SYNCHRONOUS_WRITES = 262144
ZEROCOPY = 1048576
_HONOURED = (
    LIVE
    | PEER2PEER
    | PERSIST_DEST
    | UNDEFINE_SOURCE
    | PAUSED
    | NON_SHARED_DISK
    | NON_SHARED_INC
    | CHANGE_PROTECTION
    | UNSAFE
    | COMPRESSED
    | AUTO_CONVERGE
    | POSTCOPY
    | TLS
    | PARALLEL
    | SYNCHRONOUS_WRITES
    | ZEROCOPY
)
_NAMED = {TUNNELLED: "--tunnelled", 1024: "--offline", 4096: "--abort-on-error", 16384: "--rdma-pin-all"}

_TEXTS = {
    "migrate_uri": "migration_uri",
    "destination_name": "name",
    "destination_xml": "destination_definition",
    "listen_address": "listen_address",
    "tls.destination": "tls_name",
}
_NUMBERS = {
    "compression.zlib.level": "compression_level",
    "compression.zstd.level": "compression_level",
    "compression.xbzrle.cache": "xbzrle_cache_bytes",
    "auto_converge.initial": "throttle_initial_percent",
    "auto_converge.increment": "throttle_increment_percent",
    "parallel.connections": "streams",
}
_RATES = {"bandwidth": "bandwidth_bytes_per_s", "bandwidth.postcopy": "postcopy_bandwidth_bytes_per_s"}
_DEFAULT_STREAMS = 2
_AT_ONCE_S = 0.001


@dataclass(eq=False)
class Move:
    """One migration away from here.

    :ivar error: why it failed, or None; meaningful when it has ended.
    """

    options: MigrationOptions
    began_s: float
    job: MigrationJob
    statistics: TransferStatistics | None = None
    max_downtime_ms: int | None = None
    ended_s: float | None = None
    downtime_ms: float | None = None
    error: FerrymanError | None = None


def text_parameter(name: str, value: str | None) -> tuple[TypedParameter, ...]:
    """A parameter, or none where there is no value."""
    return (TypedParameter(name, ParameterKind.STRING, value),) if value is not None else ()


def parameters_of(
    *, uri: str | None = None, name: str | None = None, definition: str | None = None, mib_per_s: int = 0
) -> tuple[TypedParameter, ...]:
    """What the older messages say, as the parameters of the newer ones."""
    return (
        *text_parameter("migrate_uri", uri),
        *text_parameter("destination_name", name),
        *text_parameter("destination_xml", definition),
        *((TypedParameter("bandwidth", ParameterKind.ULLONG, mib_per_s),) if mib_per_s else ()),
    )


def options_of(flags: int, parameters: Sequence[TypedParameter]) -> MigrationOptions:
    """What a client asks for, as the core's options.

    :raises WireFault: a flag or a parameter is not served: nothing has been done.
    :raises OptionError: a value is outside its range.
    """
    for flag in (1 << bit for bit in range(max(flags.bit_length(), 1))):
        if flags & flag and not flag & _HONOURED:
            what = _NAMED.get(flag, f"the flag {flag}")
            raise WireFault(
                Code.ARGUMENT_UNSUPPORTED, f"argument unsupported: {what} is not served by Ferryman"
            )
    found: dict[str, Any] = {
        "paused": bool(flags & PAUSED),
        "persist": bool(flags & PERSIST_DEST),
        "undefine_source": bool(flags & UNDEFINE_SOURCE),
        "auto_converge": bool(flags & AUTO_CONVERGE),
        "tls": bool(flags & TLS),
        "zero_copy": bool(flags & ZEROCOPY),
        "copy_synchronously": bool(flags & SYNCHRONOUS_WRITES),
    }
    if flags & POSTCOPY:
        found["postcopy"] = Postcopy.ON_REQUEST
    if flags & PARALLEL:
        found["streams"] = _DEFAULT_STREAMS
    if flags & COMPRESSED:
        found["compression"] = Compression.XBZRLE
    if flags & (NON_SHARED_DISK | NON_SHARED_INC):
        found["copy_storage"] = StorageCopy.FULL if flags & NON_SHARED_DISK else StorageCopy.TOP
    if not flags & LIVE:
        found |= {"timeout_s": _AT_ONCE_S, "timeout_action": TimeoutAction.SUSPEND}
    for parameter in parameters:
        _take(parameter, found)
    return MigrationOptions(**found)


def _take(parameter: TypedParameter, found: dict[str, Any]) -> None:
    name, value = parameter.field, parameter.value
    is_text = parameter.kind is ParameterKind.STRING
    if is_text != (name in _TEXTS or name in ("compression", "migrate_disks", "graphics_uri")) and (
        name in _TEXTS or name in _NUMBERS or name in _RATES
    ):
        raise WireFault(Code.INVALID_ARG, f"invalid argument: {name} has another type")
    if name in _TEXTS:
        found[_TEXTS[name]] = value
    elif name in _NUMBERS:
        found[_NUMBERS[name]] = value
    elif name in _RATES:
        if value and not 0 < int(value) <= _MAX_BANDWIDTH_MIB_PER_S:
            raise OptionError(f"{name} must be 1 to {_MAX_BANDWIDTH_MIB_PER_S} MiB/s", option=name)
        if value:
            found[_RATES[name]] = int(value) * MIB
    elif name == "compression" and is_text and value in ("xbzrle", "zlib", "zstd"):
        found["compression"] = Compression(value)
    elif name == "migrate_disks" and is_text:
        found["copy_disks"] = (*found.get("copy_disks", ()), value)
    else:
        raise WireFault(
            Code.ARGUMENT_UNSUPPORTED,
            f"argument unsupported: the parameter {name:.60} is not served by Ferryman",
        )


# Cookies


def cookie(**says: str) -> bytes:
    """A cookie that says whose it is."""
    return json.dumps({"ferryman": 1, **says}).encode()


def read_cookie(data: bytes, whose: str) -> dict[str, str]:
    """What a cookie says.

    :raises WireFault: it is not Ferryman's.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("ferryman") != 1:
        raise WireFault(
            Code.OPERATION_FAILED,
            f"the {whose} is not served by Ferryman, so that nobody could say which of the two has the guest:"
            " migrate between two hosts that are",
        )
    return {key: value for key, value in found.items() if isinstance(value, str)}


def own_address(host: ServedHost) -> str:
    """The address by which the other host asks this one.

    :raises WireFault: it has none.
    """
    address = host.connection.address
    if ConnectionURI.parse(address).transport is None:
        raise WireFault(
            Code.OPERATION_FAILED,
            "other hosts cannot ask this daemon, so that nothing migrates to or from it: set its address",
        )
    return address


# The phases


async def begin(session: Session, host: ServedHost, uuid: DomainUUID, given: str | None) -> tuple[bytes, str]:
    """Say who the source is, and what the guest's definition is; nothing is locked."""
    domain = await host.connection.lookup_by_uuid(uuid)
    return cookie(source=own_address(host)), given if given is not None else await domain.definition()


async def prepare(
    session: Session, host: ServedHost, name: str | None, definition: str | None, shown: bytes | None
) -> tuple[bytes, str]:
    """Say who the destination is; nothing is reserved.

    :param shown: the source's cookie; None where the protocol has none.
    :returns: the cookie, and the text that stands for a migration URI which nobody has asked for.
    """
    if shown is not None:
        read_cookie(shown, "source")
    address = own_address(host)
    if definition is not None:
        read = parse_definition(definition)
        session.awaited[name or read.name] = (read.uuid, await _active(host, read.uuid))
    return cookie(destination=address), address


async def perform(
    session: Session,
    host: ServedHost,
    uuid: DomainUUID,
    shown: bytes,
    flags: int,
    parameters: Sequence[TypedParameter],
) -> bytes:
    """Migrate.  A client that goes away meanwhile aborts it."""
    address = read_cookie(shown, "destination").get("destination", "")
    kept = tuple(each for each in parameters if (each.field, each.value) != ("migrate_uri", address))
    await migrate(host, uuid, address, await _asked(host, uuid, flags, kept))
    return cookie(claimed=uuid)


async def _asked(
    host: ServedHost, uuid: DomainUUID, flags: int, parameters: Sequence[TypedParameter]
) -> MigrationOptions:
    """The options; a definition that is the domain's own, which clients hand on from begin, asks for nothing."""
    domain = await host.connection.lookup_by_uuid(uuid)
    own = await domain.definition()
    speed = host.speeds.get(uuid)
    if speed and not any(each.field == "bandwidth" and each.value for each in parameters):
        parameters = (*parameters, TypedParameter("bandwidth", ParameterKind.ULLONG, speed))
    return options_of(
        flags,
        [
            each
            for each in parameters
            if (each.field, each.value) not in (("destination_xml", own), ("destination_name", domain.name))
        ],
    )


async def perform_by_itself(
    session: Session,
    host: ServedHost,
    uuid: DomainUUID,
    address: str,
    flags: int,
    parameters: Sequence[TypedParameter],
) -> None:
    """Migrate to the host of a URI; goes on when the client goes away."""
    options = await _asked(host, uuid, flags, parameters)
    failures: list[FerrymanError] = []
    over = anyio.Event()

    async def run() -> None:
        try:
            await migrate(host, uuid, address, options)
        except FerrymanError as error:
            failures.append(error)
        finally:
            over.set()

    session.hosts.start(run)
    await over.wait()
    if failures:
        raise failures[0]


async def migrate(host: ServedHost, uuid: DomainUUID, address: str, options: MigrationOptions) -> None:
    """Migrate a domain to the host at an address.

    :cancellation: the job's: the safe abort.
    """
    uri = ConnectionURI.parse(address)
    if uri.transport is None and uri.host is None:
        raise WireFault(Code.INVALID_ARG, f"{address} leads to no other host")
    domain = await host.connection.lookup_by_uuid(uuid)
    async with ferryman.connect(uri) as destination:
        job = domain.migrate(destination, options)
        move = host.moves[uuid] = Move(options=options, began_s=anyio.current_time(), job=job)
        move.max_downtime_ms = options.max_downtime_ms
        try:
            async with job:
                async for event in job.progress():
                    if isinstance(event, ProgressEvent):
                        move.statistics = event.statistics
                result = await job.result()
                move.downtime_ms = result.blackout_ms
        except FerrymanError as error:
            move.error = error
            raise
        finally:
            move.ended_s = anyio.current_time()


async def finish(
    session: Session, host: ServedHost, name: str, shown: bytes, *, cancelled: bool
) -> ferryman.Domain:
    """Say whether the guest is here.

    A client that believes the migration failed is told otherwise where the guest that it announced has come.
    """
    if cancelled:
        announced = session.awaited.get(name)
        if announced is not None and not announced[1] and await _active(host, announced[0]):
            return await host.connection.lookup_by_uuid(announced[0])
        raise WireFault(Code.MIGRATE_FINISH_OK, "migration successfully aborted", Of.QEMU)
    claimed = read_cookie(shown, "source").get("claimed")
    domain = await host.connection.lookup_by_name(name)
    if claimed is not None and claimed != domain.uuid:
        raise WireFault(Code.OPERATION_FAILED, f"domain {name} here is not the guest that was migrated")
    return domain


async def _active(host: ServedHost, uuid: DomainUUID) -> bool:
    try:
        domain = await host.connection.lookup_by_uuid(uuid)
        return (await domain.info()).state.active
    except DomainNotFoundError:
        return False


# What runs


def running(host: ServedHost, uuid: DomainUUID) -> Move:
    """The migration of a domain that runs.

    :raises WireFault: there is none.
    """
    move = host.moves.get(uuid)
    if move is None or move.ended_s is not None:
        raise WireFault(
            Code.OPERATION_INVALID, "Requested operation is not valid: no job is active on the domain"
        )
    return move


def elapsed_ms(move: Move) -> int:
    """How long it has run, or ran."""
    end = move.ended_s if move.ended_s is not None else anyio.current_time()
    return int((end - move.began_s) * 1000)


def counters(move: Move) -> tuple[TypedParameter, ...]:
    """The statistics of a migration under libvirt's names."""
    seen = move.statistics or TransferStatistics()
    page = 4096
    found: dict[str, int | float | None] = {
        "time_elapsed": elapsed_ms(move),
        "downtime": seen.expected_downtime_ms if move.ended_s is None else move.downtime_ms,
        "setup_time": seen.setup_ms,
        "data_total": seen.total_bytes,
        "data_processed": seen.transferred_bytes,
        "data_remaining": seen.remaining_bytes,
        "memory_total": seen.total_bytes,
        "memory_processed": seen.transferred_bytes,
        "memory_remaining": seen.remaining_bytes,
        "memory_bps": seen.bandwidth_bytes_per_s,
        "memory_dirty_rate": seen.dirty_bytes_per_s // page if seen.dirty_bytes_per_s is not None else None,
        "memory_page_size": page,
        "memory_iteration": seen.iteration,
        "disk_total": seen.storage_total_bytes,
        "disk_processed": seen.storage_bytes,
    }
    parameters = [
        TypedParameter(name, ParameterKind.ULLONG, max(0, int(value)))
        for name, value in found.items()
        if value is not None
    ]
    parameters.insert(0, TypedParameter("operation", ParameterKind.INT, 5))
    if seen.throttle_percent is not None:
        parameters.append(TypedParameter("auto_converge_throttle", ParameterKind.INT, seen.throttle_percent))
    if move.ended_s is not None:
        parameters.append(TypedParameter("success", ParameterKind.BOOLEAN, int(move.error is None)))
        if move.error is not None:
            parameters.append(TypedParameter("errmsg", ParameterKind.STRING, str(move.error)))
    return tuple(parameters)
