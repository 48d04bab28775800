"""libvirt's procedures, answered by Ferryman's API; what is not here is answered as unknown, as libvirt does.

Source: libvirt, src/remote/remote_protocol.x, and what virsh 9.0 sends.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import lru_cache, partial
from typing import Any
from uuid import UUID

from anyio.abc import ByteStream

from ferryman.connection import Domain
from ferryman.definition import parse_definition
from ferryman.errors import HypervisorError
from ferryman.types import DomainInfo, DomainState, DomainStatistics, DomainUUID, Scope, ShutdownMode, Tuning
from ferryman_remote import protocol as p
from ferryman_remote.daemon import events, moves
from ferryman_remote.daemon.answers import Body, answers
from ferryman_remote.daemon.errors import Code, Of, WireFault
from ferryman_remote.daemon.hosts import ServedHost
from ferryman_remote.daemon.session import Listener, Session
from ferryman_remote.protocol import ParameterKind, TypedParameter
from ferryman_remote.xdr import Packed, encode

LIBVIRT_VERSION = 9_000_000
"""Of the protocol that is spoken: 9.0.0."""

_STATES = {
    DomainState.RUNNING: (1, 1),
    DomainState.PAUSED: (3, 1),
    DomainState.SHUTTING_DOWN: (4, 1),
    DomainState.SHUT_OFF: (5, 0),
    DomainState.CRASHED: (6, 0),
}
"""State and reason, as libvirt numbers them."""

_READ_ONLY = 1
_DEFINE_VALIDATE = 1  # which is done anyway
_CREATE_PAUSED, _CREATE_AUTODESTROY = 1, 2
_UNDEFINE_WITH_ALL = 1 | 2 | 4 | 16 | 32
"""With saved states, snapshots, checkpoints, the firmware's variables and the TPM's state: what is there goes."""
_XML_SECURE, _XML_INACTIVE, _XML_UPDATE_CPU, _XML_MIGRATABLE = 1, 2, 4, 8
_CONSOLE_SAFE = 2
"""Only where nobody else is connected, which is so anyway."""
_VCPUS_MAXIMUM = 4
_VCPUS_FLAGS = 15
_KIB = 1024


_before_open = partial(answers, needs_host=False)


def _changes(action: str, *names: str, streams: bool = False) -> Callable[[Body], Body]:
    """Register the answer to procedures that do something to a host, by the name that rules have for it."""
    return answers(*names, action=action, streams=streams)


def _host(session: Session) -> ServedHost:
    assert session.host is not None
    return session.host


def _uuid(dom: p.Domain) -> DomainUUID:
    return DomainUUID(str(UUID(bytes=dom.uuid)))


def _domain(session: Session, dom: p.Domain) -> Domain:
    """The handle of a domain that a client names; whether it is there is the driver's to say."""
    return Domain(_host(session).connection, dom.name, _uuid(dom))


async def _info(session: Session, dom: p.Domain) -> DomainInfo:
    return await _domain(session, dom).info()


async def _active(session: Session, dom: p.Domain) -> DomainInfo:
    info = await _info(session, dom)
    if not info.state.active:
        raise WireFault(
            Code.OPERATION_INVALID, "Requested operation is not valid: domain is not running", Of.QEMU
        )
    return info


@lru_cache(maxsize=65_536)
def _packed(name: str, uuid: DomainUUID, number: int) -> Packed:
    return Packed(encode(p.Domain(name, UUID(uuid).bytes, number)))


def _named(host: ServedHost, info: DomainInfo) -> Any:
    """A domain as it is named on the wire, packed before where it can be: lists are long, and mostly the same."""
    return _packed(info.name, info.uuid, host.id_of(info))


async def _told(session: Session, domain: Domain) -> p.OfDomain:
    return p.OfDomain(_named(_host(session), await domain.info()))


def _need_flags(flags: int, known: int, what: str) -> None:
    unknown = flags & ~known
    if unknown:
        raise WireFault(Code.INVALID_ARG, f"unsupported flags ({unknown:#x}) in {what}")


# The connection


@_before_open("CONNECT_OPEN")
async def _open(session: Session, arguments: p.ConnectOpen) -> None:
    if arguments.name is None:
        raise WireFault(Code.INTERNAL, "a connection needs a name", Of.RPC)
    await session.open(arguments.name or session.hosts.default, read_only=bool(arguments.flags & _READ_ONLY))


@_before_open("CONNECT_CLOSE")
def _close(session: Session, arguments: p.Void) -> None:
    """Nothing: the session ends when the answer has been written."""


@_before_open("AUTH_LIST")
def _auth_list(session: Session, arguments: p.Void) -> p.AuthListReply:
    return p.AuthListReply((0,))


_KEEPALIVE = 10
_OF_DAEMON = {8: 0, _KEEPALIVE: 1, 14: 1, 15: 1}


@_before_open("CONNECT_SUPPORTS_FEATURE")
def _feature(session: Session, arguments: p.ConnectSupportsFeature) -> p.ConnectSupportsFeatureReply:
    feature = arguments.feature
    if feature == _KEEPALIVE:
        # Only a client that asks answers pings.
        session.link.keep_alive(session.limits.keepalive_s, session.limits.keepalive_count)
    if feature not in _OF_DAEMON and session.host is None:
        raise WireFault(Code.INTERNAL, "hypervisor connection not open", Of.RPC)
    supported = _OF_DAEMON.get(feature, int(feature in session.hosts.features))
    return p.ConnectSupportsFeatureReply(supported)


@answers("CONNECT_GET_TYPE")
async def _type(session: Session, arguments: p.Void) -> p.ConnectGetTypeReply:
    return p.ConnectGetTypeReply((await _host(session).connection.capabilities()).hypervisor)


@answers("CONNECT_GET_VERSION")
async def _version(session: Session, arguments: p.Void) -> p.ConnectGetVersionReply:
    numbers = (*(await _host(session).connection.capabilities()).version, 0, 0)
    return p.ConnectGetVersionReply(numbers[0] * 1_000_000 + numbers[1] * 1_000 + numbers[2])


@answers("CONNECT_GET_LIB_VERSION")
def _lib_version(session: Session, arguments: p.Void) -> p.ConnectGetLibVersionReply:
    return p.ConnectGetLibVersionReply(LIBVIRT_VERSION)


@answers("CONNECT_GET_HOSTNAME")
def _hostname(session: Session, arguments: p.Void) -> p.ConnectGetHostnameReply:
    return p.ConnectGetHostnameReply(socket.gethostname())


@answers("CONNECT_GET_URI")
def _uri(session: Session, arguments: p.Void) -> p.ConnectGetUriReply:
    return p.ConnectGetUriReply(session.uri)


@answers("CONNECT_IS_SECURE")
def _is_secure(session: Session, arguments: p.Void) -> p.ConnectIsSecureReply:
    return p.ConnectIsSecureReply(int(session.secure))


@answers("CONNECT_GET_CAPABILITIES")
async def _capabilities(session: Session, arguments: p.Void) -> p.ConnectGetCapabilitiesReply:
    return p.ConnectGetCapabilitiesReply((await _host(session).connection.capabilities()).to_xml())


@answers("CONNECT_GET_MAX_VCPUS")
def _max_vcpus(session: Session, arguments: p.ConnectGetMaxVcpus) -> p.ConnectGetMaxVcpusReply:
    return p.ConnectGetMaxVcpusReply(255)


@answers("CONNECT_REGISTER_CLOSE_CALLBACK", "CONNECT_UNREGISTER_CLOSE_CALLBACK")
def _close_callback(session: Session, arguments: p.Void) -> None:
    """Nothing to do: the connection itself ends when this daemon does."""


@answers("NODE_GET_INFO")
def _node_info(session: Session, arguments: p.Void) -> p.NodeGetInfoReply:
    cpus = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _KIB
    model = platform.machine().encode()[:31]
    return p.NodeGetInfoReply((*model, *(0,) * (32 - len(model))), memory, cpus, 0, 1, 1, cpus, 1)


@answers("NODE_GET_FREE_MEMORY")
def _free_memory(session: Session, arguments: p.Void) -> p.NodeGetFreeMemoryReply:
    return p.NodeGetFreeMemoryReply(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


@answers("NODE_GET_SECURITY_MODEL")
def _security_model(session: Session, arguments: p.Void) -> p.NodeGetSecurityModelReply:
    return p.NodeGetSecurityModelReply((), ())


# Lists


_GROUPS: tuple[tuple[tuple[int, Callable[[DomainInfo], bool]], ...], ...] = (
    ((1, lambda info: info.state.active), (2, lambda info: not info.state.active)),
    ((4, lambda info: info.persistent), (8, lambda info: not info.persistent)),
    (
        (16, lambda info: info.state is DomainState.RUNNING),
        (32, lambda info: info.state is DomainState.PAUSED),
        (64, lambda info: info.state is DomainState.SHUT_OFF),
        (128, lambda info: info.state in (DomainState.SHUTTING_DOWN, DomainState.CRASHED)),
    ),
    ((256, lambda info: False), (512, lambda info: True)),
    ((1024, lambda info: info.autostart), (2048, lambda info: not info.autostart)),
    ((4096, lambda info: False), (8192, lambda info: True)),
    ((16384, lambda info: False), (32768, lambda info: True)),
)
"""Filters of a list: of each group any one that is asked for."""


def _filtered(infos: list[DomainInfo], flags: int) -> list[DomainInfo]:
    """Of these domains the ones that a list asks for."""
    for group in _GROUPS:
        asked = [fits for bit, fits in group if flags & bit]
        if asked and len(asked) < len(group):
            infos = [info for info in infos if any(fits(info) for fits in asked)]
    return infos


@answers("CONNECT_LIST_ALL_DOMAINS")
async def _list_all(session: Session, arguments: p.ConnectListAllDomains) -> p.ConnectListAllDomainsReply:
    host = _host(session)
    found = _filtered(await host.connection.list_domain_infos(), arguments.flags)
    if len(found) > p.MAX_DOMAINS:
        raise WireFault(
            Code.RPC, f"{len(found)} domains are more than {p.MAX_DOMAINS}, which a message holds", Of.RPC
        )
    domains = tuple(_named(host, info) for info in found) if arguments.need_results else ()
    return p.ConnectListAllDomainsReply(domains, len(found))


@answers("CONNECT_NUM_OF_DOMAINS")
async def _num_of_domains(session: Session, arguments: p.Void) -> p.NumberReply:
    return p.NumberReply(
        sum(info.state.active for info in await _host(session).connection.list_domain_infos())
    )


@answers("CONNECT_LIST_DOMAINS")
async def _list_domains(session: Session, arguments: p.ConnectListDomains) -> p.ConnectListDomainsReply:
    host = _host(session)
    active = [info for info in await host.connection.list_domain_infos() if info.state.active]
    return p.ConnectListDomainsReply(tuple(host.id_of(info) for info in active)[: max(0, arguments.maxids)])


async def _inactive(session: Session) -> list[str]:
    return [
        info.name for info in await _host(session).connection.list_domain_infos() if not info.state.active
    ]


@answers("CONNECT_NUM_OF_DEFINED_DOMAINS")
async def _num_of_defined(session: Session, arguments: p.Void) -> p.NumberReply:
    return p.NumberReply(len(await _inactive(session)))


@answers("CONNECT_LIST_DEFINED_DOMAINS")
async def _list_defined(
    session: Session, arguments: p.ConnectListDefinedDomains
) -> p.ConnectListDefinedDomainsReply:
    return p.ConnectListDefinedDomainsReply(tuple(await _inactive(session))[: max(0, arguments.maxnames)])


@answers("DOMAIN_LOOKUP_BY_NAME")
async def _by_name(session: Session, arguments: p.DomainLookupByName) -> p.OfDomain:
    return await _told(session, await _host(session).connection.lookup_by_name(arguments.name))


@answers("DOMAIN_LOOKUP_BY_UUID")
async def _by_uuid(session: Session, arguments: p.DomainLookupByUuid) -> p.OfDomain:
    uuid = str(UUID(bytes=arguments.uuid))
    return await _told(session, await _host(session).connection.lookup_by_uuid(uuid))


@answers("DOMAIN_LOOKUP_BY_ID")
async def _by_id(session: Session, arguments: p.DomainLookupById) -> p.OfDomain:
    host = _host(session)
    for info in await host.connection.list_domain_infos():
        host.id_of(info)
    uuid = host.uuid_of(arguments.id)
    if uuid is None:
        raise WireFault(
            Code.NO_DOMAIN, f"Domain not found: no domain with matching id {arguments.id}", Of.QEMU
        )
    return await _told(session, await host.connection.lookup_by_uuid(uuid))


# Life


@_changes("domain_define", "DOMAIN_DEFINE_XML")
async def _define(session: Session, arguments: p.DomainDefineXml) -> p.OfDomain:
    return await _told(session, await _host(session).connection.define(arguments.xml))


@_changes("domain_define", "DOMAIN_DEFINE_XML_FLAGS")
async def _define_flags(session: Session, arguments: p.DomainDefineXmlFlags) -> p.OfDomain:
    _need_flags(arguments.flags, _DEFINE_VALIDATE, "DOMAIN_DEFINE_XML_FLAGS")
    return await _told(session, await _host(session).connection.define(arguments.xml))


@_changes("domain_create", "DOMAIN_CREATE_XML")
async def _create_xml(session: Session, arguments: p.DomainCreateXml) -> p.OfDomain:
    how = _started_how(arguments.flags, "DOMAIN_CREATE_XML")
    domain = await _host(session).connection.create(arguments.xml_desc, **how)
    if how["autodestroy"]:
        session.destroy_on_leaving(domain)
    return await _told(session, domain)


def _started_how(flags: int, what: str) -> dict[str, bool]:
    _need_flags(flags, _CREATE_PAUSED | _CREATE_AUTODESTROY, what)
    return {"paused": bool(flags & _CREATE_PAUSED), "autodestroy": bool(flags & _CREATE_AUTODESTROY)}


@_changes("domain_start", "DOMAIN_CREATE")
async def _create(session: Session, arguments: p.OfDomain) -> None:
    await _domain(session, arguments.dom).start()


@_changes("domain_start", "DOMAIN_CREATE_WITH_FLAGS")
async def _create_with_flags(session: Session, arguments: p.OfDomainWithFlags) -> p.OfDomain:
    how = _started_how(arguments.flags, "DOMAIN_CREATE_WITH_FLAGS")
    domain = _domain(session, arguments.dom)
    await domain.start(**how)
    if how["autodestroy"]:
        session.destroy_on_leaving(domain)
    return await _told(session, domain)


@_changes("domain_destroy", "DOMAIN_DESTROY_FLAGS")
async def _destroy_flags(session: Session, arguments: p.OfDomainWithFlags) -> None:
    _need_flags(arguments.flags, 0, "DOMAIN_DESTROY_FLAGS")
    await _destroy(session, p.OfDomain(arguments.dom))


@_changes("domain_destroy", "DOMAIN_DESTROY")
async def _destroy(session: Session, arguments: p.OfDomain) -> None:
    await _active(session, arguments.dom)
    await _domain(session, arguments.dom).destroy()


@_changes("domain_suspend", "DOMAIN_SUSPEND")
async def _suspend(session: Session, arguments: p.OfDomain) -> None:
    info = await _active(session, arguments.dom)
    move = _host(session).moves.get(info.uuid)
    if move is not None and move.ended_s is None:
        # A guest that writes faster than it is sent; it runs again where it ends up.
        await move.job.suspend()
        return
    await _domain(session, arguments.dom).suspend()


@_changes("domain_resume", "DOMAIN_RESUME")
async def _resume(session: Session, arguments: p.OfDomain) -> None:
    await _active(session, arguments.dom)
    await _domain(session, arguments.dom).resume()


_MODES = (ShutdownMode.DEFAULT, ShutdownMode.ACPI, ShutdownMode.AGENT, ShutdownMode.DEFAULT)
"""By the flags, of which 1 asks for ACPI and 2 for the agent."""


def _mode(flags: int) -> ShutdownMode:
    _need_flags(flags, len(_MODES) - 1, "a shutdown")
    return _MODES[flags]


@_changes("domain_shutdown", "DOMAIN_SHUTDOWN")
async def _shutdown(session: Session, arguments: p.OfDomain) -> None:
    await _active(session, arguments.dom)
    await _domain(session, arguments.dom).shutdown()


@_changes("domain_shutdown", "DOMAIN_SHUTDOWN_FLAGS")
async def _shutdown_flags(session: Session, arguments: p.OfDomainWithFlags) -> None:
    await _active(session, arguments.dom)
    await _domain(session, arguments.dom).shutdown(_mode(arguments.flags))


@_changes("domain_reboot", "DOMAIN_REBOOT")
async def _reboot(session: Session, arguments: p.OfDomainWithFlags) -> None:
    await _active(session, arguments.dom)
    await _domain(session, arguments.dom).reboot(_mode(arguments.flags))


@_changes("domain_undefine", "DOMAIN_UNDEFINE")
async def _undefine(session: Session, arguments: p.OfDomain) -> None:
    await _domain(session, arguments.dom).undefine()


@_changes("domain_undefine", "DOMAIN_UNDEFINE_FLAGS")
async def _undefine_flags(session: Session, arguments: p.OfDomainWithFlags) -> None:
    _need_flags(arguments.flags, _UNDEFINE_WITH_ALL, "DOMAIN_UNDEFINE_FLAGS")
    await _domain(session, arguments.dom).undefine()


@_changes("domain_save", "DOMAIN_SAVE")
async def _save(session: Session, arguments: p.DomainSave) -> None:
    await _active(session, arguments.dom)
    await _domain(session, arguments.dom).save(arguments.to)


@_changes("domain_restore", "DOMAIN_RESTORE")
async def _restore(session: Session, arguments: p.DomainRestore) -> None:
    await _host(session).connection.restore(arguments.from_)


@_changes("domain_console", "DOMAIN_OPEN_CONSOLE", streams=True)
def _open_console(
    session: Session, arguments: p.DomainOpenConsole
) -> AbstractAsyncContextManager[ByteStream]:
    _need_flags(arguments.flags, _CONSOLE_SAFE, "DOMAIN_OPEN_CONSOLE")
    return _domain(session, arguments.dom).console(arguments.dev_name)


# What can be changed


_SCOPES = (Scope.CURRENT, Scope.LIVE, Scope.CONFIG, Scope.BOTH)
"""By the flags, of which 1 asks for the guest and 2 for the definition."""


@_changes("domain_autostart", "DOMAIN_SET_AUTOSTART")
async def _set_autostart(session: Session, arguments: p.DomainSetAutostart) -> None:
    await _domain(session, arguments.dom).set_autostart(arguments.autostart != 0)


def _scoped(action: str, procedure: str, change: Callable[[Domain, Any, Scope], Awaitable[None]]) -> None:
    """Register a change that libvirt has two procedures for: of the guest, and of what flags say."""

    @_changes(action, procedure)
    async def of_guest(session: Session, arguments: Any) -> None:
        await change(_domain(session, arguments.dom), arguments, Scope.LIVE)

    @_changes(action, f"{procedure}_FLAGS")
    async def by_flags(session: Session, arguments: Any) -> None:
        _need_flags(arguments.flags, len(_SCOPES) - 1, f"{procedure}_FLAGS")
        await change(_domain(session, arguments.dom), arguments, _SCOPES[arguments.flags])


_scoped(
    "domain_set_memory",
    "DOMAIN_SET_MEMORY",
    lambda domain, asked, scope: domain.set_memory(asked.memory * _KIB, scope),
)
_scoped(
    "domain_set_vcpus", "DOMAIN_SET_VCPUS", lambda domain, asked, scope: domain.set_vcpus(asked.nvcpus, scope)
)
_scoped(
    "domain_attach",
    "DOMAIN_ATTACH_DEVICE",
    lambda domain, asked, scope: domain.attach_device(asked.xml, scope),
)
_scoped(
    "domain_detach",
    "DOMAIN_DETACH_DEVICE",
    lambda domain, asked, scope: domain.detach_device(asked.xml, scope),
)


# What a domain is


@answers("DOMAIN_GET_XML_DESC")
async def _xml(session: Session, arguments: p.OfDomainWithFlags) -> p.DomainGetXmlDescReply:
    flags = arguments.flags
    _need_flags(flags, _XML_SECURE | _XML_INACTIVE | _XML_UPDATE_CPU | _XML_MIGRATABLE, "DOMAIN_GET_XML_DESC")
    if session.read_only and flags & (_XML_SECURE | _XML_MIGRATABLE):
        raise WireFault(
            Code.OPERATION_DENIED,
            "operation forbidden: read only access prevents virDomainGetXMLDesc with secure flag",
            Of.DOMAIN,
        )
    definition = await _domain(session, arguments.dom).definition()
    if not flags & (_XML_SECURE | _XML_MIGRATABLE):
        definition = parse_definition(definition).without_secrets().render()
    return p.DomainGetXmlDescReply(definition)


@answers("DOMAIN_GET_INFO")
async def _domain_info(session: Session, arguments: p.OfDomain) -> p.DomainGetInfoReply:
    info = await _info(session, arguments.dom)
    memory = info.memory_bytes if info.current_memory_bytes is None else info.current_memory_bytes
    counted = await _counted(session, info)
    used_ns = int((counted.cpu_time_s or 0) * 1e9) if counted is not None else 0
    state, _ = _STATES[info.state]
    return p.DomainGetInfoReply(state, info.memory_bytes // _KIB, memory // _KIB, info.vcpus, used_ns)


async def _counted(session: Session, info: DomainInfo) -> DomainStatistics | None:
    """Counters of an active domain, where its driver has any."""
    connection = _host(session).connection
    if not info.state.active or not connection.hooks.has("domain_statistics"):
        return None
    try:
        return await Domain(connection, info.name, info.uuid).statistics()
    except HypervisorError:
        return None  # it says nothing at the moment, and is no less there


@answers("DOMAIN_GET_STATE")
async def _state(session: Session, arguments: p.OfDomainWithFlags) -> p.DomainGetStateReply:
    return p.DomainGetStateReply(*_STATES[(await _info(session, arguments.dom)).state])


@answers("DOMAIN_GET_CONTROL_INFO")
async def _control_info(session: Session, arguments: p.OfDomainWithFlags) -> p.DomainGetControlInfoReply:
    await _active(session, arguments.dom)
    return p.DomainGetControlInfoReply(0, 0, 0)


@answers("DOMAIN_GET_OS_TYPE")
async def _os_type(session: Session, arguments: p.OfDomain) -> p.DomainGetOsTypeReply:
    definition = parse_definition(await _domain(session, arguments.dom).definition())
    return p.DomainGetOsTypeReply((definition.root.findtext("os/type") or "hvm").strip())


@answers("DOMAIN_GET_AUTOSTART")
async def _autostart(session: Session, arguments: p.OfDomain) -> p.DomainGetAutostartReply:
    return p.DomainGetAutostartReply(int((await _info(session, arguments.dom)).autostart))


@answers("DOMAIN_GET_MAX_MEMORY")
async def _max_memory(session: Session, arguments: p.OfDomain) -> p.DomainGetMaxMemoryReply:
    return p.DomainGetMaxMemoryReply((await _info(session, arguments.dom)).memory_bytes // _KIB)


@answers("DOMAIN_GET_MAX_VCPUS")
async def _domain_max_vcpus(session: Session, arguments: p.OfDomain) -> p.NumberReply:
    info = await _info(session, arguments.dom)
    return p.NumberReply(info.max_vcpus or info.vcpus)


@answers("DOMAIN_GET_VCPUS_FLAGS")
async def _vcpus(session: Session, arguments: p.OfDomainWithFlags) -> p.NumberReply:
    _need_flags(arguments.flags, _VCPUS_FLAGS, "DOMAIN_GET_VCPUS_FLAGS")
    info = await _info(session, arguments.dom)
    return p.NumberReply(info.max_vcpus or info.vcpus if arguments.flags & _VCPUS_MAXIMUM else info.vcpus)


@answers("DOMAIN_IS_ACTIVE")
async def _is_active(session: Session, arguments: p.OfDomain) -> p.DomainIsActiveReply:
    return p.DomainIsActiveReply(int((await _info(session, arguments.dom)).state.active))


@answers("DOMAIN_IS_PERSISTENT")
async def _is_persistent(session: Session, arguments: p.OfDomain) -> p.DomainIsPersistentReply:
    return p.DomainIsPersistentReply(int((await _info(session, arguments.dom)).persistent))


@answers("DOMAIN_IS_UPDATED")
async def _is_updated(session: Session, arguments: p.OfDomain) -> p.DomainIsUpdatedReply:
    await _info(session, arguments.dom)
    return p.DomainIsUpdatedReply(0)


@answers("DOMAIN_HAS_MANAGED_SAVE_IMAGE")
async def _managed_save(session: Session, arguments: p.OfDomainWithFlags) -> p.DomainHasManagedSaveImageReply:
    await _info(session, arguments.dom)
    return p.DomainHasManagedSaveImageReply(0)


@answers("DOMAIN_SNAPSHOT_NUM")
async def _snapshots(session: Session, arguments: p.OfDomainWithFlags) -> p.NumberReply:
    await _info(session, arguments.dom)
    return p.NumberReply(0)


@answers("DOMAIN_GET_MESSAGES")
async def _messages(session: Session, arguments: p.OfDomainWithFlags) -> p.DomainGetMessagesReply:
    await _info(session, arguments.dom)
    return p.DomainGetMessagesReply(())


@answers("DOMAIN_MEMORY_STATS")
async def _memory_stats(session: Session, arguments: p.DomainMemoryStats) -> p.DomainMemoryStatsReply:
    info = await _active(session, arguments.dom)
    counted = await _counted(session, info)
    found = [p.MemoryStat(6, (info.current_memory_bytes or info.memory_bytes) // _KIB)]
    if counted is not None and counted.resident_bytes is not None:
        found.append(p.MemoryStat(7, counted.resident_bytes // _KIB))
    return p.DomainMemoryStatsReply(tuple(found)[: arguments.max_stats])


def _known(values: tuple[int | None, ...]) -> tuple[int, ...]:
    """Counters as libvirt has them: -1 is one that nobody counts."""
    return tuple(-1 if value is None else value for value in values)


@answers("DOMAIN_BLOCK_STATS")
async def _block_stats(session: Session, arguments: p.DomainBlockStats) -> p.DomainBlockStatsReply:
    counted = await _counted(session, await _active(session, arguments.dom))
    for disk in counted.disks if counted is not None else ():
        if disk.target == arguments.path:
            values = (disk.read_requests, disk.read_bytes, disk.write_requests, disk.write_bytes, None)
            return p.DomainBlockStatsReply._make(_known(values))
    raise WireFault(Code.INVALID_ARG, f"invalid argument: invalid path: {arguments.path}")


@answers("DOMAIN_INTERFACE_STATS")
async def _interface_stats(
    session: Session, arguments: p.DomainInterfaceStats
) -> p.DomainInterfaceStatsReply:
    counted = await _counted(session, await _active(session, arguments.dom))
    for card in counted.interfaces if counted is not None else ():
        if arguments.device in (card.target, card.mac):
            values = (
                card.rx_bytes,
                card.rx_packets,
                card.rx_errors,
                card.rx_drops,
                card.tx_bytes,
                card.tx_packets,
                card.tx_errors,
                card.tx_drops,
            )
            return p.DomainInterfaceStatsReply._make(_known(values))
    raise WireFault(
        Code.INVALID_ARG, f"invalid argument: invalid path, '{arguments.device}' is not a known interface"
    )


# Counters in bulk

_KINDS_OF_STATS = {"state": 1, "cpu": 2, "balloon": 4, "vcpu": 8, "net": 16, "block": 32}


def _ullong(name: str, value: float | None) -> tuple[TypedParameter, ...]:
    return (TypedParameter(name, ParameterKind.ULLONG, int(value)),) if value is not None else ()


def _stats_of(info: DomainInfo, counted: DomainStatistics | None, wanted: int) -> list[TypedParameter]:
    found: list[TypedParameter] = []
    if wanted & _KINDS_OF_STATS["state"]:
        state, reason = _STATES[info.state]
        found += [
            TypedParameter("state.state", ParameterKind.INT, state),
            TypedParameter("state.reason", ParameterKind.INT, reason),
        ]
    if wanted & _KINDS_OF_STATS["cpu"] and counted is not None and counted.cpu_time_s is not None:
        found += _ullong("cpu.time", counted.cpu_time_s * 1e9)
    if wanted & _KINDS_OF_STATS["balloon"]:
        current = counted.current_memory_bytes if counted is not None else None
        found += _ullong("balloon.current", (current or info.memory_bytes) // _KIB)
        found += _ullong("balloon.maximum", info.memory_bytes // _KIB)
        if counted is not None and counted.resident_bytes is not None:
            found += _ullong("balloon.rss", counted.resident_bytes // _KIB)
    if wanted & _KINDS_OF_STATS["vcpu"]:
        found.append(TypedParameter("vcpu.current", ParameterKind.UINT, info.vcpus))
        found.append(TypedParameter("vcpu.maximum", ParameterKind.UINT, info.max_vcpus or info.vcpus))
        for number, used_s in enumerate(counted.vcpu_time_s if counted is not None else ()):
            found.append(TypedParameter(f"vcpu.{number}.state", ParameterKind.INT, 1))
            found += _ullong(f"vcpu.{number}.time", used_s * 1e9)
    if wanted & _KINDS_OF_STATS["net"] and counted is not None:
        found.append(TypedParameter("net.count", ParameterKind.UINT, len(counted.interfaces)))
        for number, card in enumerate(counted.interfaces):
            found.append(TypedParameter(f"net.{number}.name", ParameterKind.STRING, card.target or card.mac))
            for way in ("rx", "tx"):
                for ours, theirs in (
                    ("bytes", "bytes"),
                    ("packets", "pkts"),
                    ("errors", "errs"),
                    ("drops", "drop"),
                ):
                    found += _ullong(f"net.{number}.{way}.{theirs}", getattr(card, f"{way}_{ours}"))
    if wanted & _KINDS_OF_STATS["block"] and counted is not None:
        found.append(TypedParameter("block.count", ParameterKind.UINT, len(counted.disks)))
        for number, disk in enumerate(counted.disks):
            found.append(TypedParameter(f"block.{number}.name", ParameterKind.STRING, disk.target))
            for ours, theirs in _BLOCK_NAMES:
                found += _ullong(f"block.{number}.{theirs}", getattr(disk, ours))
    return found


_BLOCK_NAMES = (
    ("read_requests", "rd.reqs"),
    ("read_bytes", "rd.bytes"),
    ("read_time_ns", "rd.times"),
    ("write_requests", "wr.reqs"),
    ("write_bytes", "wr.bytes"),
    ("write_time_ns", "wr.times"),
    ("flush_requests", "fl.reqs"),
    ("flush_time_ns", "fl.times"),
    ("allocation_bytes", "allocation"),
    ("capacity_bytes", "capacity"),
    ("physical_bytes", "physical"),
)


@answers("CONNECT_GET_ALL_DOMAIN_STATS")
async def _all_stats(
    session: Session, arguments: p.ConnectGetAllDomainStats
) -> p.ConnectGetAllDomainStatsReply:
    host = _host(session)
    wanted = arguments.stats or sum(_KINDS_OF_STATS.values())
    infos = await host.connection.list_domain_infos()
    if arguments.doms:
        named = {_uuid(dom) for dom in arguments.doms}
        infos = [info for info in infos if info.uuid in named]
    infos = _filtered(infos, arguments.flags & 0xFF)
    counted: dict[DomainUUID, DomainStatistics] = {}
    if host.connection.hooks.has("domain_statistics") or host.connection.hooks.has("host_statistics"):
        active = [Domain(host.connection, info.name, info.uuid) for info in infos if info.state.active]
        counted = await host.connection.statistics(active)
    records = (
        p.DomainStatsRecord(_named(host, info), tuple(_stats_of(info, counted.get(info.uuid), wanted)))
        for info in infos
    )
    return p.ConnectGetAllDomainStatsReply(tuple(records))


# Events


@answers("CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY")
def _register(
    session: Session, arguments: p.ConnectDomainEventCallbackRegisterAny
) -> p.ConnectDomainEventCallbackRegisterAnyReply:
    if arguments.event_id not in events.KNOWN:
        raise WireFault(Code.INVALID_ARG, f"unsupported event ID {arguments.event_id}")
    uuid = _uuid(arguments.dom) if arguments.dom is not None else None
    number = session.listen(Listener(arguments.event_id, uuid))
    return p.ConnectDomainEventCallbackRegisterAnyReply(number)


@answers("CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY")
def _deregister(session: Session, arguments: p.ConnectDomainEventCallbackDeregisterAny) -> None:
    if session.listeners.pop(arguments.callback_id, None) is None:
        raise WireFault(Code.INVALID_ARG, f"domain event callback {arguments.callback_id} not registered")


# Jobs


_DOWNTIME_MS = 300
"""What libvirt says where nobody has set a limit."""
_JOB_NONE, _JOB_UNBOUNDED, _JOB_COMPLETED, _JOB_FAILED = 0, 2, 3, 4


@answers("DOMAIN_GET_JOB_INFO")
async def _job_info(session: Session, arguments: p.OfDomain) -> p.DomainGetJobInfoReply:
    move = _host(session).moves.get(_uuid(arguments.dom))
    if move is None or move.ended_s is not None:
        await _active(session, arguments.dom)
        return p.DomainGetJobInfoReply(_JOB_NONE, *(0,) * 11)
    seen = {each.field: int(each.value) for each in moves.counters(move) if each.kind is ParameterKind.ULLONG}
    sizes = [
        seen.get(f"{of}_{what}", 0)
        for of in ("data", "memory")
        for what in ("total", "processed", "remaining")
    ]
    files = (0, 0, 0)
    return p.DomainGetJobInfoReply._make((_JOB_UNBOUNDED, moves.elapsed_ms(move), 0, *sizes, *files))


@answers("DOMAIN_GET_JOB_STATS")
async def _job_stats(session: Session, arguments: p.OfDomainWithFlags) -> p.DomainGetJobStatsReply:
    host, uuid = _host(session), _uuid(arguments.dom)
    _need_flags(arguments.flags, 3, "DOMAIN_GET_JOB_STATS")
    move = host.moves.get(uuid)
    completed = bool(arguments.flags & 1)
    if move is not None and completed == (move.ended_s is not None):
        kind = _JOB_UNBOUNDED if not completed else _JOB_COMPLETED if move.error is None else _JOB_FAILED
        if completed and not arguments.flags & 2:
            del host.moves[uuid]
        return p.DomainGetJobStatsReply(kind, moves.counters(move))
    if not completed:
        await _active(session, arguments.dom)
    return p.DomainGetJobStatsReply(_JOB_NONE, ())


@_changes("migrate_abort", "DOMAIN_ABORT_JOB_FLAGS")
async def _abort_flags(session: Session, arguments: p.OfDomainWithFlags) -> None:
    _need_flags(arguments.flags, 0, "DOMAIN_ABORT_JOB_FLAGS")
    await _abort(session, p.OfDomain(arguments.dom))


@_changes("migrate_abort", "DOMAIN_ABORT_JOB")
async def _abort(session: Session, arguments: p.OfDomain) -> None:
    moves.running(_host(session), _uuid(arguments.dom)).job.abort()


@_changes("migrate_tune", "DOMAIN_MIGRATE_SET_MAX_DOWNTIME")
async def _set_downtime(session: Session, arguments: p.DomainMigrateSetMaxDowntime) -> None:
    _need_flags(arguments.flags, 0, "DOMAIN_MIGRATE_SET_MAX_DOWNTIME")
    move = moves.running(_host(session), _uuid(arguments.dom))
    await move.job.set_max_downtime(arguments.downtime)
    move.max_downtime_ms = arguments.downtime


@answers("DOMAIN_MIGRATE_GET_MAX_DOWNTIME")
async def _get_downtime(
    session: Session, arguments: p.OfDomainWithFlags
) -> p.DomainMigrateGetMaxDowntimeReply:
    await _active(session, arguments.dom)
    move = _host(session).moves.get(_uuid(arguments.dom))
    asked_ms = move.max_downtime_ms if move is not None else None
    return p.DomainMigrateGetMaxDowntimeReply(_DOWNTIME_MS if asked_ms is None else asked_ms)


@_changes("migrate_tune", "DOMAIN_MIGRATE_SET_MAX_SPEED")
async def _set_speed(session: Session, arguments: p.DomainMigrateSetMaxSpeed) -> None:
    host, uuid = _host(session), _uuid(arguments.dom)
    _need_flags(arguments.flags, 1, "DOMAIN_MIGRATE_SET_MAX_SPEED")
    Tuning(bandwidth_bytes_per_s=arguments.bandwidth * moves.MIB)
    if arguments.flags & 1:
        await moves.running(host, uuid).job.set_postcopy_bandwidth(arguments.bandwidth * moves.MIB)
        return
    await _info(session, arguments.dom)
    host.speeds[uuid] = arguments.bandwidth
    move = host.moves.get(uuid)
    if move is not None and move.ended_s is None:
        await move.job.set_bandwidth(arguments.bandwidth * moves.MIB)


@answers("DOMAIN_MIGRATE_GET_MAX_SPEED")
async def _get_speed(session: Session, arguments: p.OfDomainWithFlags) -> p.DomainMigrateGetMaxSpeedReply:
    await _info(session, arguments.dom)
    return p.DomainMigrateGetMaxSpeedReply(_host(session).speeds.get(_uuid(arguments.dom), 0))


@_changes("migrate_tune", "DOMAIN_MIGRATE_START_POST_COPY")
async def _start_postcopy(session: Session, arguments: p.OfDomainWithFlags) -> None:
    _need_flags(arguments.flags, 0, "DOMAIN_MIGRATE_START_POST_COPY")
    await moves.running(_host(session), _uuid(arguments.dom)).job.switch_to_postcopy()


# Migration, by the versions of its protocol


@_changes("migrate_in", "DOMAIN_MIGRATE_PREPARE")
async def _prepare1(session: Session, arguments: p.DomainMigratePrepare) -> p.DomainMigratePrepareReply:
    shown, address = await moves.prepare(session, arguments.dname, None, None)
    return p.DomainMigratePrepareReply(shown, arguments.uri_in or address)


@_changes("migrate_in", "DOMAIN_MIGRATE_PREPARE2")
async def _prepare2(session: Session, arguments: p.DomainMigratePrepare2) -> p.DomainMigratePrepare2Reply:
    shown, address = await moves.prepare(session, arguments.dname, arguments.dom_xml, None)
    return p.DomainMigratePrepare2Reply(shown, arguments.uri_in or address)


@_changes("migrate_out", "DOMAIN_MIGRATE_PERFORM")
async def _perform1(session: Session, arguments: p.DomainMigratePerform) -> None:
    # One field of the message is where the other host is asked, or where the guest is sent.
    by_itself = bool(arguments.flags & moves.Flag.PEER2PEER)
    parameters = moves.parameters_of(
        uri=None if by_itself else arguments.uri, name=arguments.dname, mib_per_s=arguments.resource
    )
    address = arguments.uri if by_itself else None
    await _performed(session, arguments.dom, address, arguments.cookie, arguments.flags, parameters)


@_changes("migrate_end", "DOMAIN_MIGRATE_FINISH")
async def _finish1(session: Session, arguments: p.DomainMigrateFinish) -> p.DomainMigrateFinishReply:
    domain = await moves.finish(session, arguments.dname, arguments.cookie, cancelled=False)
    return p.DomainMigrateFinishReply((await _told(session, domain)).dom)


@_changes("migrate_end", "DOMAIN_MIGRATE_FINISH2")
async def _finish2(session: Session, arguments: p.DomainMigrateFinish2) -> p.DomainMigrateFinish2Reply:
    domain = await moves.finish(session, arguments.dname, arguments.cookie, cancelled=arguments.retcode != 0)
    return p.DomainMigrateFinish2Reply((await _told(session, domain)).dom)


@_changes("migrate_out", "DOMAIN_MIGRATE_BEGIN3")
async def _begin3(session: Session, arguments: p.DomainMigrateBegin3) -> p.MigrateBeginReply:
    return p.MigrateBeginReply(*await moves.begin(_host(session), _uuid(arguments.dom), arguments.xmlin))


@_changes("migrate_in", "DOMAIN_MIGRATE_PREPARE3")
async def _prepare3(session: Session, arguments: p.DomainMigratePrepare3) -> p.MigratePrepareReply:
    shown, address = await moves.prepare(session, arguments.dname, arguments.dom_xml, arguments.cookie_in)
    return p.MigratePrepareReply(shown, arguments.uri_in or address)


@_changes("migrate_out", "DOMAIN_MIGRATE_PERFORM3")
async def _perform3(session: Session, arguments: p.DomainMigratePerform3) -> p.CookieReply:
    parameters = moves.parameters_of(
        uri=arguments.uri, name=arguments.dname, definition=arguments.xmlin, mib_per_s=arguments.resource
    )
    return await _performed(
        session, arguments.dom, arguments.dconnuri, arguments.cookie_in, arguments.flags, parameters
    )


async def _performed(
    session: Session,
    dom: p.Domain,
    address: str | None,
    shown: bytes,
    flags: int,
    parameters: tuple[TypedParameter, ...],
) -> p.CookieReply:
    domain = _domain(session, dom)
    if flags & moves.Flag.PEER2PEER:
        if address is None:
            raise WireFault(Code.INVALID_ARG, "invalid argument: no URI of the destination")
        await moves.perform_by_itself(session, domain, address, flags, parameters)
        return p.CookieReply(b"")  # a client of this kind takes no cookie
    return p.CookieReply(await moves.perform(_host(session), domain, shown, flags, parameters))


@_changes("migrate_end", "DOMAIN_MIGRATE_FINISH3")
async def _finish3(session: Session, arguments: p.DomainMigrateFinish3) -> p.MigrateFinishReply:
    domain = await moves.finish(
        session, arguments.dname, arguments.cookie_in, cancelled=arguments.cancelled != 0
    )
    return p.MigrateFinishReply((await _told(session, domain)).dom, moves.cookie())


@_changes("migrate_end", "DOMAIN_MIGRATE_CONFIRM3", "DOMAIN_MIGRATE_CONFIRM3_PARAMS")
async def _confirm3(session: Session, arguments: p.DomainMigrateConfirm3) -> None:
    """Nothing: both hosts have settled it, or do so by themselves."""


def _text(parameters: tuple[TypedParameter, ...], name: str) -> str | None:
    for each in parameters:
        if each.field == name and isinstance(each.value, str):
            return each.value
    return None


@_changes("migrate_out", "DOMAIN_MIGRATE_BEGIN3_PARAMS")
async def _begin3_params(session: Session, arguments: p.DomainMigrateBegin3Params) -> p.MigrateBeginReply:
    given = _text(arguments.params, "destination_xml")
    return p.MigrateBeginReply(*await moves.begin(_host(session), _uuid(arguments.dom), given))


@_changes("migrate_in", "DOMAIN_MIGRATE_PREPARE3_PARAMS")
async def _prepare3_params(
    session: Session, arguments: p.DomainMigratePrepare3Params
) -> p.MigratePrepareReply:
    name, definition = (_text(arguments.params, each) for each in ("destination_name", "destination_xml"))
    shown, address = await moves.prepare(session, name, definition, arguments.cookie_in)
    return p.MigratePrepareReply(shown, _text(arguments.params, "migrate_uri") or address)


@_changes("migrate_out", "DOMAIN_MIGRATE_PERFORM3_PARAMS")
async def _perform3_params(session: Session, arguments: p.DomainMigratePerform3Params) -> p.CookieReply:
    return await _performed(
        session, arguments.dom, arguments.dconnuri, arguments.cookie_in, arguments.flags, arguments.params
    )


@_changes("migrate_end", "DOMAIN_MIGRATE_FINISH3_PARAMS")
async def _finish3_params(session: Session, arguments: p.DomainMigrateFinish3Params) -> p.MigrateFinishReply:
    name = _text(arguments.params, "destination_name")
    if name is None:
        raise WireFault(Code.INVALID_ARG, "invalid argument: no destination_name")
    domain = await moves.finish(session, name, arguments.cookie_in, cancelled=arguments.cancelled != 0)
    return p.MigrateFinishReply((await _told(session, domain)).dom, moves.cookie())
