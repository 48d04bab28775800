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
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Any

import anyio

import ferryman
from ferryman.definition import parse_definition
from ferryman.errors import DomainNotFoundError, FerrymanError
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

    from ferryman.connection import Domain
    from ferryman.migration import MigrationJob
    from ferryman_remote.daemon.hosts import ServedHost
    from ferryman_remote.daemon.session import Session

MIB = 1 << 20


class Flag(IntFlag):
    """What a client asks of a migration beside its parameters."""

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
    OFFLINE = 1024
    COMPRESSED = 2048
    ABORT_ON_ERROR = 4096
    AUTO_CONVERGE = 8192
    RDMA_PIN_ALL = 16384
    POSTCOPY = 32768
    TLS = 65536
    PARALLEL = 131072
    SYNCHRONOUS_WRITES = 262144
    POSTCOPY_RESUME = 524288
    ZEROCOPY = 1048576


_REFUSED = {
    Flag.TUNNELLED: "--tunnelled",
    Flag.OFFLINE: "--offline",
    Flag.ABORT_ON_ERROR: "--abort-on-error",
    Flag.RDMA_PIN_ALL: "--rdma-pin-all",
    Flag.POSTCOPY_RESUME: "--postcopy-resume",
}
"""What is not served, as virsh calls it; the last is done here by itself."""

_KNOWN = sum(Flag)

_SWITCHES = {
    Flag.PAUSED: "paused",
    Flag.PERSIST_DEST: "persist",
    Flag.UNDEFINE_SOURCE: "undefine_source",
    Flag.AUTO_CONVERGE: "auto_converge",
    Flag.TLS: "tls",
    Flag.ZEROCOPY: "zero_copy",
    Flag.SYNCHRONOUS_WRITES: "copy_synchronously",
}

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
_OTHER_TEXTS = ("compression", "migrate_disks")
_DEFAULT_STREAMS = 2
_AT_ONCE_S = 0.001


@dataclass(eq=False)
class Move:
    """One migration away from here.

    :ivar error: why it failed, or None; meaningful when it has ended.
    """

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
    for bit in range(flags.bit_length()):
        flag = flags & (1 << bit)
        if flag in _REFUSED or flag & ~_KNOWN:
            what = _REFUSED[Flag(flag)] if flag in _REFUSED else f"the flag {flag}"
            raise WireFault(
                Code.ARGUMENT_UNSUPPORTED, f"argument unsupported: {what} is not served by Ferryman"
            )
    found: dict[str, Any] = {option: True for flag, option in _SWITCHES.items() if flags & flag}
    if flags & Flag.POSTCOPY:
        found["postcopy"] = Postcopy.ON_REQUEST
    if flags & Flag.PARALLEL:
        found["streams"] = _DEFAULT_STREAMS
    if flags & Flag.COMPRESSED:
        found["compression"] = Compression.XBZRLE
    if flags & (Flag.NON_SHARED_DISK | Flag.NON_SHARED_INC):
        found["copy_storage"] = StorageCopy.FULL if flags & Flag.NON_SHARED_DISK else StorageCopy.TOP
    if not flags & Flag.LIVE:
        found |= {"timeout_s": _AT_ONCE_S, "timeout_action": TimeoutAction.SUSPEND}
    for parameter in parameters:
        _take(parameter, found)
    return MigrationOptions(**found)


def _take(parameter: TypedParameter, found: dict[str, Any]) -> None:
    name, value = parameter.field, parameter.value
    is_text = name in _TEXTS or name in _OTHER_TEXTS
    if not is_text and name not in _NUMBERS and name not in _RATES:
        raise WireFault(
            Code.ARGUMENT_UNSUPPORTED,
            f"argument unsupported: the parameter {name:.60} is not served by Ferryman",
        )
    if type(value) is not (str if is_text else int):
        raise WireFault(Code.INVALID_ARG, f"invalid argument: {name} has another type")
    if name in _TEXTS:
        found[_TEXTS[name]] = value
    elif name in _NUMBERS:
        found[_NUMBERS[name]] = value
    elif name in _RATES:
        if value:  # 0 is no limit
            found[_RATES[name]] = int(value) * MIB
    elif name == "migrate_disks":
        found["copy_disks"] = (*found.get("copy_disks", ()), value)
    else:
        try:
            found["compression"] = Compression(value)
        except ValueError as error:
            raise WireFault(
                Code.ARGUMENT_UNSUPPORTED, f"argument unsupported: compression by {value:.60} is not served"
            ) from error


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


async def begin(host: ServedHost, uuid: DomainUUID, given: str | None) -> tuple[bytes, str]:
    """Say who the source is, and what the guest's definition is; nothing is locked.

    :param given: the definition that the client wants at the destination; None is the domain's own.
    """
    domain = await host.connection.lookup_by_uuid(uuid)
    return cookie(source=own_address(host)), given if given is not None else await domain.definition()


async def prepare(
    session: Session, name: str | None, definition: str | None, shown: bytes | None
) -> tuple[bytes, str]:
    """Say who the destination is; nothing is reserved.

    :param shown: the source's cookie; None where the protocol has none.
    :returns: the cookie, and the text that stands for a migration URI which nobody has asked for.
    """
    host = session.host
    assert host is not None
    if shown is not None:
        read_cookie(shown, "source")
    address = own_address(host)
    if definition is not None:
        read = parse_definition(definition)
        session.announce(name or read.name, read.uuid, active=await _active(host, read.uuid))
    return cookie(destination=address), address


async def perform(
    host: ServedHost, domain: Domain, shown: bytes, flags: int, parameters: Sequence[TypedParameter]
) -> bytes:
    """Migrate.  A client that goes away meanwhile aborts it."""
    address = read_cookie(shown, "destination").get("destination", "")
    kept = [each for each in parameters if (each.field, each.value) != ("migrate_uri", address)]
    await migrate(host, domain, address, await _asked(host, domain, flags, kept))
    return cookie(claimed=domain.uuid)


async def _asked(
    host: ServedHost, domain: Domain, flags: int, parameters: Sequence[TypedParameter]
) -> MigrationOptions:
    """The options; a definition that is the domain's own, which clients hand on from begin, asks for nothing."""
    own = (("destination_xml", await domain.definition()), ("destination_name", domain.name))
    kept = [each for each in parameters if (each.field, each.value) not in own]
    speed = host.speeds.get(domain.uuid)
    if speed and not any(each.field == "bandwidth" and each.value for each in kept):
        kept.append(TypedParameter("bandwidth", ParameterKind.ULLONG, speed))
    return options_of(flags, kept)


async def perform_by_itself(
    session: Session, domain: Domain, address: str, flags: int, parameters: Sequence[TypedParameter]
) -> None:
    """Migrate to the host of a URI; goes on when the client goes away."""
    host = session.host
    assert host is not None
    options = await _asked(host, domain, flags, parameters)
    outcome: list[Exception | None] = []
    over = anyio.Event()

    async def run() -> None:
        try:
            await migrate(host, domain, address, options)
            outcome.append(None)
        except (FerrymanError, WireFault) as error:
            outcome.append(error)
        finally:
            over.set()

    session.hosts.start(f"migrating domain {domain.name} to {address}", run)
    await over.wait()
    if not outcome:
        raise WireFault(Code.INTERNAL, "internal error: the daemon's log says more")
    if outcome[0] is not None:
        raise outcome[0]


async def migrate(host: ServedHost, domain: Domain, address: str, options: MigrationOptions) -> None:
    """Migrate a domain to the host at an address.

    :cancellation: the job's: the safe abort.
    """
    uri = ConnectionURI.parse(address)
    if uri.transport is None:
        raise WireFault(Code.INVALID_ARG, f"{address} leads to no daemon: write it as scheme+tls://host/path")
    async with ferryman.connect(uri) as destination:
        job = domain.migrate(destination, options)
        move = Move(began_s=anyio.current_time(), job=job, max_downtime_ms=options.max_downtime_ms)
        host.moves[domain.uuid] = move
        try:
            async with job:
                async for event in job.progress():
                    if isinstance(event, ProgressEvent):
                        move.statistics = event.statistics
                move.downtime_ms = (await job.result()).blackout_ms
        except FerrymanError as error:
            move.error = error
            raise
        finally:
            move.ended_s = anyio.current_time()


async def finish(session: Session, name: str, shown: bytes, *, cancelled: bool) -> Domain:
    """Say whether the guest is here.

    A client that believes the migration failed is told otherwise where the guest that it announced has come.
    """
    host = session.host
    assert host is not None
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
