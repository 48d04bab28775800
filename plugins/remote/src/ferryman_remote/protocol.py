"""Messages of libvirt's RPC that Ferryman speaks: numbers, fields and their order, each declared once.

The facts are those of libvirt's ``src/remote/remote_protocol.x`` and ``src/rpc/virnetprotocol.x``, 9.0 to 11.3, whose
numbers are final.  Fields are named as there, in lower case.  ``docs/reference/libvirt-rpc.md`` is written from here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, NamedTuple, TypeAlias

from ferryman_remote.xdr import (
    F64,
    I8,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    UUID,
    Array,
    FixedArray,
    Opaque,
    Optional,
    OptionalStr,
    Str,
    String,
    Type,
    XDRError,
    structure_of,
    type_of,
)

REMOTE_PROGRAM = 0x20008086
KEEPALIVE_PROGRAM = 0x6B656570

MAX_COOKIE_BYTES = 4_194_304
MAX_DOMAINS = 16_384
MAX_PARAMETERS = 64


# Values of more than one message


class ParameterKind(IntEnum):
    """What a typed parameter holds; the tag of the union on the wire."""

    INT = 1
    UINT = 2
    LLONG = 3
    ULLONG = 4
    DOUBLE = 5
    BOOLEAN = 6
    STRING = 7


class TypedParameter(NamedTuple):
    """A parameter by name, with a value of a kind."""

    field: str
    kind: ParameterKind
    value: int | float | str


_KINDS: dict[int, Type[Any]] = {
    ParameterKind.INT: type_of(I32),
    ParameterKind.UINT: type_of(U32),
    ParameterKind.LLONG: type_of(I64),
    ParameterKind.ULLONG: type_of(U64),
    ParameterKind.DOUBLE: type_of(F64),
    ParameterKind.BOOLEAN: type_of(I32),
    ParameterKind.STRING: String(),
}


class TypedParameterType(Type[TypedParameter]):
    """A name, the tag of a kind, and a value of that kind."""

    notation = "tparam"
    minimum_bytes = 12
    kinds = _KINDS
    _name = String()
    _tag = type_of(I32)

    def encode(self, value: TypedParameter, out: bytearray) -> None:
        self._name.encode(value.field, out)
        self._tag.encode(value.kind, out)
        try:
            _kind(value.kind).encode(value.value, out)
        except XDRError as error:
            raise error.within(value.field[:40]) from error.__cause__

    def decode(self, data: bytes, at: int) -> tuple[TypedParameter, int]:
        name, at = self._name.decode(data, at)
        tag, at = self._tag.decode(data, at)
        try:
            value, at = _kind(tag).decode(data, at)
        except XDRError as error:
            raise error.within(name[:40]) from error.__cause__
        return TypedParameter(name, ParameterKind(tag), value), at


def _kind(tag: int) -> Type[Any]:
    """What a parameter of a kind holds. :raises XDRError: there is no such kind."""
    kind = _KINDS.get(tag)
    if kind is None:
        raise XDRError(f"{tag} is no kind of a parameter")
    return kind


Parameters: TypeAlias = Annotated[tuple[TypedParameter, ...], Array(TypedParameterType(), MAX_PARAMETERS)]
Cookie: TypeAlias = Annotated[bytes, Opaque(MAX_COOKIE_BYTES)]
Names: TypeAlias = Annotated[tuple[str, ...], Array(String(), MAX_DOMAINS)]
SaslData: TypeAlias = Annotated[tuple[int, ...], Array(type_of(I8), 65_536)]
"""Bytes of SASL: each travels in four."""


class Void(NamedTuple):
    """Nothing."""


class Domain(NamedTuple):
    """A domain as it is named on the wire; its id is -1 while it does not run."""

    name: Str
    uuid: UUID
    id: I32


OptionalDomain: TypeAlias = Annotated[Domain | None, Optional(structure_of(Domain))]
Domains: TypeAlias = Annotated[tuple[Domain, ...], Array(structure_of(Domain), MAX_DOMAINS)]


class Network(NamedTuple):
    """A network as it is named on the wire."""

    name: Str
    uuid: UUID


class RemoteError(NamedTuple):
    """The payload of every message whose status is an error."""

    code: I32
    domain: I32
    message: OptionalStr
    level: I32
    dom: OptionalDomain
    str1: OptionalStr
    str2: OptionalStr
    str3: OptionalStr
    int1: I32
    int2: I32
    net: Annotated[Network | None, Optional(structure_of(Network))]


class VcpuInfo(NamedTuple):
    """One virtual processor; its time is in nanoseconds."""

    number: U32
    state: I32
    cpu_time: U64
    cpu: I32


class MemoryStat(NamedTuple):
    """One counter of a guest's memory, in KiB or in events."""

    tag: I32
    val: U64


class NodeCpuStat(NamedTuple):
    """One counter of a host's processors, in nanoseconds."""

    field: Str
    value: U64


class DomainStatsRecord(NamedTuple):
    """Counters of one domain."""

    dom: Domain
    params: Annotated[tuple[TypedParameter, ...], Array(TypedParameterType(), 262_144)]


class OfDomain(NamedTuple):
    dom: Domain


class OfDomainWithFlags(NamedTuple):
    dom: Domain
    flags: U32


class DomainEventLifecycle(NamedTuple):
    dom: Domain
    event: I32
    detail: I32


class RtcChange(NamedTuple):
    dom: Domain
    offset: I64


class Watchdog(NamedTuple):
    dom: Domain
    action: I32


class IoError(NamedTuple):
    dom: Domain
    src_path: Str
    dev_alias: Str
    action: I32


class IoErrorReason(NamedTuple):
    dom: Domain
    src_path: Str
    dev_alias: Str
    action: I32
    reason: Str


class BalloonChange(NamedTuple):
    dom: Domain
    actual: U64


# One message each


class NumberReply(NamedTuple):
    num: I32


class CookieReply(NamedTuple):
    cookie_out: Cookie


class MigrateBeginReply(NamedTuple):
    cookie_out: Cookie
    xml: Str


class MigratePrepareReply(NamedTuple):
    cookie_out: Cookie
    uri_out: OptionalStr


class MigrateFinishReply(NamedTuple):
    dom: Domain
    cookie_out: Cookie


class DomainMigratePrepare3Params(NamedTuple):
    params: Parameters
    cookie_in: Cookie
    flags: U32


class DomainEventCallbackDevice(NamedTuple):
    callback_id: I32
    dom: Domain
    dev_alias: Str


class ConnectOpen(NamedTuple):
    name: OptionalStr
    flags: U32


class ConnectGetTypeReply(NamedTuple):
    type: Str


class ConnectGetVersionReply(NamedTuple):
    hv_ver: U64


class ConnectGetMaxVcpus(NamedTuple):
    type: OptionalStr


class ConnectGetMaxVcpusReply(NamedTuple):
    max_vcpus: I32


class NodeGetInfoReply(NamedTuple):
    model: Annotated[tuple[int, ...], FixedArray(type_of(I8), 32)]
    memory: U64
    cpus: I32
    mhz: I32
    nodes: I32
    sockets: I32
    cores: I32
    threads: I32


class ConnectGetCapabilitiesReply(NamedTuple):
    capabilities: Str


class DomainCreateXml(NamedTuple):
    xml_desc: Str
    flags: U32


class DomainDefineXml(NamedTuple):
    xml: Str


class DomainGetXmlDescReply(NamedTuple):
    xml: Str


class DomainGetAutostartReply(NamedTuple):
    autostart: I32


class DomainGetInfoReply(NamedTuple):
    state: U8
    max_mem: U64
    memory: U64
    nr_virt_cpu: U16
    cpu_time: U64


class DomainGetMaxMemoryReply(NamedTuple):
    memory: U64


class DomainGetOsTypeReply(NamedTuple):
    type: Str


class DomainGetVcpus(NamedTuple):
    dom: Domain
    maxinfo: I32
    maplen: I32


class DomainGetVcpusReply(NamedTuple):
    info: Annotated[tuple[VcpuInfo, ...], Array(structure_of(VcpuInfo), 16_384)]
    cpumaps: Annotated[bytes, Opaque(8_388_608)]


class ConnectListDefinedDomains(NamedTuple):
    maxnames: I32


class ConnectListDefinedDomainsReply(NamedTuple):
    names: Names


class DomainLookupById(NamedTuple):
    id: I32


class DomainLookupByName(NamedTuple):
    name: Str


class DomainLookupByUuid(NamedTuple):
    uuid: UUID


class DomainSetVcpus(NamedTuple):
    dom: Domain
    nvcpus: U32


class DomainSetVcpusFlags(NamedTuple):
    dom: Domain
    nvcpus: U32
    flags: U32


class DomainSetMemory(NamedTuple):
    dom: Domain
    memory: U64


class DomainSetMemoryFlags(NamedTuple):
    dom: Domain
    memory: U64
    flags: U32


class DomainSetAutostart(NamedTuple):
    dom: Domain
    autostart: I32


class DomainAttachDevice(NamedTuple):
    dom: Domain
    xml: Str


class DomainAttachDeviceFlags(NamedTuple):
    dom: Domain
    xml: Str
    flags: U32


class DomainOpenConsole(NamedTuple):
    dom: Domain
    dev_name: OptionalStr
    flags: U32


class ConnectListDomains(NamedTuple):
    maxids: I32


class ConnectListDomainsReply(NamedTuple):
    ids: Annotated[tuple[int, ...], Array(type_of(I32), 16_384)]


class DomainRestore(NamedTuple):
    from_: Str


class DomainSave(NamedTuple):
    dom: Domain
    to: Str


class ConnectGetHostnameReply(NamedTuple):
    hostname: Str


class ConnectSupportsFeature(NamedTuple):
    feature: I32


class ConnectSupportsFeatureReply(NamedTuple):
    supported: I32


class DomainMigratePrepare(NamedTuple):
    uri_in: OptionalStr
    flags: U64
    dname: OptionalStr
    resource: U64


class DomainMigratePrepareReply(NamedTuple):
    cookie: Cookie
    uri_out: OptionalStr


class DomainMigratePerform(NamedTuple):
    dom: Domain
    cookie: Cookie
    uri: Str
    flags: U64
    dname: OptionalStr
    resource: U64


class DomainMigrateFinish(NamedTuple):
    dname: Str
    cookie: Cookie
    uri: Str
    flags: U64


class DomainMigrateFinishReply(NamedTuple):
    ddom: Domain


class DomainBlockStats(NamedTuple):
    dom: Domain
    path: Str


class DomainBlockStatsReply(NamedTuple):
    rd_req: I64
    rd_bytes: I64
    wr_req: I64
    wr_bytes: I64
    errs: I64


class DomainInterfaceStats(NamedTuple):
    dom: Domain
    device: Str


class DomainInterfaceStatsReply(NamedTuple):
    rx_bytes: I64
    rx_packets: I64
    rx_errs: I64
    rx_drop: I64
    tx_bytes: I64
    tx_packets: I64
    tx_errs: I64
    tx_drop: I64


class AuthListReply(NamedTuple):
    types: Annotated[tuple[int, ...], Array(type_of(I32), 20)]


class AuthSaslInitReply(NamedTuple):
    mechlist: Str


class AuthSaslStart(NamedTuple):
    mech: Str
    nil: I32
    data: SaslData


class AuthSaslStartReply(NamedTuple):
    complete: I32
    nil: I32
    data: SaslData


class AuthSaslStep(NamedTuple):
    nil: I32
    data: SaslData


class AuthSaslStepReply(NamedTuple):
    complete: I32
    nil: I32
    data: SaslData


class AuthPolkitReply(NamedTuple):
    complete: I32


class NodeGetCellsFreeMemory(NamedTuple):
    start_cell: I32
    maxcells: I32


class NodeGetCellsFreeMemoryReply(NamedTuple):
    cells: Annotated[tuple[int, ...], Array(type_of(U64), 1024)]


class NodeGetFreeMemoryReply(NamedTuple):
    free_mem: U64


class ConnectDomainEventRegisterReply(NamedTuple):
    cb_registered: I32


class ConnectDomainEventDeregisterReply(NamedTuple):
    cb_registered: I32


class DomainMigratePrepare2(NamedTuple):
    uri_in: OptionalStr
    flags: U64
    dname: OptionalStr
    resource: U64
    dom_xml: Str


class DomainMigratePrepare2Reply(NamedTuple):
    cookie: Cookie
    uri_out: OptionalStr


class DomainMigrateFinish2(NamedTuple):
    dname: Str
    cookie: Cookie
    uri: Str
    flags: U64
    retcode: I32


class DomainMigrateFinish2Reply(NamedTuple):
    ddom: Domain


class ConnectGetUriReply(NamedTuple):
    uri: Str


class NodeGetSecurityModelReply(NamedTuple):
    model: Annotated[tuple[int, ...], Array(type_of(I8), 257)]
    doi: Annotated[tuple[int, ...], Array(type_of(I8), 257)]


class DomainMigratePrepareTunnel(NamedTuple):
    flags: U64
    dname: OptionalStr
    resource: U64
    dom_xml: Str


class ConnectIsSecureReply(NamedTuple):
    secure: I32


class DomainIsActiveReply(NamedTuple):
    active: I32


class DomainIsPersistentReply(NamedTuple):
    persistent: I32


class ConnectGetLibVersionReply(NamedTuple):
    lib_ver: U64


class ConnectCompareCpu(NamedTuple):
    xml: Str
    flags: U32


class ConnectCompareCpuReply(NamedTuple):
    result: I32


class DomainMemoryStats(NamedTuple):
    dom: Domain
    max_stats: U32
    flags: U32


class DomainMemoryStatsReply(NamedTuple):
    stats: Annotated[tuple[MemoryStat, ...], Array(structure_of(MemoryStat), 1024)]


class ConnectBaselineCpu(NamedTuple):
    xml_cpus: Annotated[tuple[str, ...], Array(String(), 256)]
    flags: U32


class ConnectBaselineCpuReply(NamedTuple):
    cpu: Str


class DomainGetJobInfoReply(NamedTuple):
    type: I32
    time_elapsed: U64
    time_remaining: U64
    data_total: U64
    data_processed: U64
    data_remaining: U64
    mem_total: U64
    mem_processed: U64
    mem_remaining: U64
    file_total: U64
    file_processed: U64
    file_remaining: U64


class DomainMigrateSetMaxDowntime(NamedTuple):
    dom: Domain
    downtime: U64
    flags: U32


class ConnectDomainEventRegisterAny(NamedTuple):
    event_id: I32


class ConnectDomainEventDeregisterAny(NamedTuple):
    event_id: I32


class DomainHasManagedSaveImageReply(NamedTuple):
    result: I32


class DomainIsUpdatedReply(NamedTuple):
    updated: I32


class ConnectGetSysinfo(NamedTuple):
    flags: U32


class ConnectGetSysinfoReply(NamedTuple):
    sysinfo: Str


class DomainMigrateSetMaxSpeed(NamedTuple):
    dom: Domain
    bandwidth: U64
    flags: U32


class DomainGetStateReply(NamedTuple):
    state: I32
    reason: I32


class DomainMigrateBegin3(NamedTuple):
    dom: Domain
    xmlin: OptionalStr
    flags: U64
    dname: OptionalStr
    resource: U64


class DomainMigratePrepare3(NamedTuple):
    cookie_in: Cookie
    uri_in: OptionalStr
    flags: U64
    dname: OptionalStr
    resource: U64
    dom_xml: Str


class DomainMigratePrepareTunnel3(NamedTuple):
    cookie_in: Cookie
    flags: U64
    dname: OptionalStr
    resource: U64
    dom_xml: Str


class DomainMigratePerform3(NamedTuple):
    dom: Domain
    xmlin: OptionalStr
    cookie_in: Cookie
    dconnuri: OptionalStr
    uri: OptionalStr
    flags: U64
    dname: OptionalStr
    resource: U64


class DomainMigrateFinish3(NamedTuple):
    dname: Str
    cookie_in: Cookie
    dconnuri: OptionalStr
    uri: OptionalStr
    flags: U64
    cancelled: I32


class DomainMigrateConfirm3(NamedTuple):
    dom: Domain
    cookie_in: Cookie
    flags: U64
    cancelled: I32


class NodeGetCpuStats(NamedTuple):
    cpu_num: I32
    nparams: I32
    flags: U32


class NodeGetCpuStatsReply(NamedTuple):
    params: Annotated[tuple[NodeCpuStat, ...], Array(structure_of(NodeCpuStat), 16)]
    nparams: I32


class DomainGetControlInfoReply(NamedTuple):
    state: U32
    details: U32
    state_time: U64


class DomainMigrateGetMaxSpeedReply(NamedTuple):
    bandwidth: U64


class DomainGetMetadata(NamedTuple):
    dom: Domain
    type: I32
    uri: OptionalStr
    flags: U32


class DomainGetMetadataReply(NamedTuple):
    metadata: Str


class ConnectListAllDomains(NamedTuple):
    need_results: I32
    flags: U32


class ConnectListAllDomainsReply(NamedTuple):
    domains: Domains
    ret: U32


class NodeGetCpuMap(NamedTuple):
    need_map: I32
    need_online: I32
    flags: U32


class NodeGetCpuMapReply(NamedTuple):
    cpumap: Annotated[bytes, Opaque(2048)]
    online: U32
    ret: I32


class DomainGetJobStatsReply(NamedTuple):
    type: I32
    params: Parameters


class DomainMigrateGetCompressionCacheReply(NamedTuple):
    cache_size: U64


class DomainMigrateSetCompressionCache(NamedTuple):
    dom: Domain
    cache_size: U64
    flags: U32


class DomainMigrateBegin3Params(NamedTuple):
    dom: Domain
    params: Parameters
    flags: U32


class DomainMigratePerform3Params(NamedTuple):
    dom: Domain
    dconnuri: OptionalStr
    params: Parameters
    cookie_in: Cookie
    flags: U32


class DomainMigrateFinish3Params(NamedTuple):
    params: Parameters
    cookie_in: Cookie
    flags: U32
    cancelled: I32


class DomainMigrateConfirm3Params(NamedTuple):
    dom: Domain
    params: Parameters
    cookie_in: Cookie
    flags: U32
    cancelled: I32


class ConnectGetCpuModelNames(NamedTuple):
    arch: Str
    need_results: I32
    flags: U32


class ConnectGetCpuModelNamesReply(NamedTuple):
    models: Annotated[tuple[str, ...], Array(String(), 8192)]
    ret: I32


class ConnectDomainEventCallbackRegisterAny(NamedTuple):
    event_id: I32
    dom: OptionalDomain


class ConnectDomainEventCallbackRegisterAnyReply(NamedTuple):
    callback_id: I32


class ConnectDomainEventCallbackDeregisterAny(NamedTuple):
    callback_id: I32


class DomainEventCallbackLifecycle(NamedTuple):
    callback_id: I32
    msg: DomainEventLifecycle


class DomainEventCallbackReboot(NamedTuple):
    callback_id: I32
    msg: OfDomain


class DomainEventCallbackRtcChange(NamedTuple):
    callback_id: I32
    msg: RtcChange


class DomainEventCallbackWatchdog(NamedTuple):
    callback_id: I32
    msg: Watchdog


class DomainEventCallbackIoError(NamedTuple):
    callback_id: I32
    msg: IoError


class DomainEventCallbackIoErrorReason(NamedTuple):
    callback_id: I32
    msg: IoErrorReason


class DomainEventCallbackPmwakeup(NamedTuple):
    callback_id: I32
    reason: I32
    msg: OfDomain


class DomainEventCallbackPmsuspend(NamedTuple):
    callback_id: I32
    reason: I32
    msg: OfDomain


class DomainEventCallbackBalloonChange(NamedTuple):
    callback_id: I32
    msg: BalloonChange


class DomainEventCallbackPmsuspendDisk(NamedTuple):
    callback_id: I32
    reason: I32
    msg: OfDomain


class ConnectGetDomainCapabilities(NamedTuple):
    emulatorbin: OptionalStr
    arch: OptionalStr
    machine: OptionalStr
    virttype: OptionalStr
    flags: U32


class ConnectGetDomainCapabilitiesReply(NamedTuple):
    capabilities: Str


class ConnectGetAllDomainStats(NamedTuple):
    doms: Domains
    stats: U32
    flags: U32


class ConnectGetAllDomainStatsReply(NamedTuple):
    ret_stats: Annotated[tuple[DomainStatsRecord, ...], Array(structure_of(DomainStatsRecord), 16_384)]


class DomainEventCallbackTunable(NamedTuple):
    callback_id: I32
    dom: Domain
    params: Annotated[tuple[TypedParameter, ...], Array(TypedParameterType(), 2048)]


class DomainEventCallbackAgentLifecycle(NamedTuple):
    callback_id: I32
    dom: Domain
    state: I32
    reason: I32


class DomainDefineXmlFlags(NamedTuple):
    xml: Str
    flags: U32


class DomainRename(NamedTuple):
    dom: Domain
    new_name: OptionalStr
    flags: U32


class DomainRenameReply(NamedTuple):
    retcode: I32


class DomainEventCallbackMigrationIteration(NamedTuple):
    callback_id: I32
    dom: Domain
    iteration: I32


class ConnectEventConnectionClosed(NamedTuple):
    reason: I32


class DomainEventCallbackJobCompleted(NamedTuple):
    callback_id: I32
    dom: Domain
    params: Parameters


class DomainEventCallbackMetadataChange(NamedTuple):
    callback_id: I32
    dom: Domain
    type: I32
    nsuri: OptionalStr


class DomainMigrateGetMaxDowntimeReply(NamedTuple):
    downtime: U64


class ConnectSetIdentity(NamedTuple):
    params: Annotated[tuple[TypedParameter, ...], Array(TypedParameterType(), 20)]
    flags: U32


class DomainGetMessagesReply(NamedTuple):
    msgs: Annotated[tuple[str, ...], Array(String(), 2048)]


# Procedures


class Procedure(NamedTuple):
    """One procedure of the remote program.

    :param arguments: of a call; of an event its whole payload.
    :param result: of a call that went well; None for an event, which nobody answers.
    """

    number: int
    name: str
    arguments: type[Any]
    result: type[Any] | None


def _call(number: int, name: str, arguments: type[Any], result: type[Any]) -> Procedure:
    return Procedure(number, name, arguments, result)


def _event(number: int, name: str, payload: type[Any]) -> Procedure:
    return Procedure(number, name, payload, None)


_ALL = (
    _call(1, "CONNECT_OPEN", ConnectOpen, Void),
    _call(2, "CONNECT_CLOSE", Void, Void),
    _call(3, "CONNECT_GET_TYPE", Void, ConnectGetTypeReply),
    _call(4, "CONNECT_GET_VERSION", Void, ConnectGetVersionReply),
    _call(5, "CONNECT_GET_MAX_VCPUS", ConnectGetMaxVcpus, ConnectGetMaxVcpusReply),
    _call(6, "NODE_GET_INFO", Void, NodeGetInfoReply),
    _call(7, "CONNECT_GET_CAPABILITIES", Void, ConnectGetCapabilitiesReply),
    _call(8, "DOMAIN_ATTACH_DEVICE", DomainAttachDevice, Void),
    _call(9, "DOMAIN_CREATE", OfDomain, Void),
    _call(10, "DOMAIN_CREATE_XML", DomainCreateXml, OfDomain),
    _call(11, "DOMAIN_DEFINE_XML", DomainDefineXml, OfDomain),
    _call(12, "DOMAIN_DESTROY", OfDomain, Void),
    _call(13, "DOMAIN_DETACH_DEVICE", DomainAttachDevice, Void),
    _call(14, "DOMAIN_GET_XML_DESC", OfDomainWithFlags, DomainGetXmlDescReply),
    _call(15, "DOMAIN_GET_AUTOSTART", OfDomain, DomainGetAutostartReply),
    _call(16, "DOMAIN_GET_INFO", OfDomain, DomainGetInfoReply),
    _call(17, "DOMAIN_GET_MAX_MEMORY", OfDomain, DomainGetMaxMemoryReply),
    _call(18, "DOMAIN_GET_MAX_VCPUS", OfDomain, NumberReply),
    _call(19, "DOMAIN_GET_OS_TYPE", OfDomain, DomainGetOsTypeReply),
    _call(20, "DOMAIN_GET_VCPUS", DomainGetVcpus, DomainGetVcpusReply),
    _call(21, "CONNECT_LIST_DEFINED_DOMAINS", ConnectListDefinedDomains, ConnectListDefinedDomainsReply),
    _call(22, "DOMAIN_LOOKUP_BY_ID", DomainLookupById, OfDomain),
    _call(23, "DOMAIN_LOOKUP_BY_NAME", DomainLookupByName, OfDomain),
    _call(24, "DOMAIN_LOOKUP_BY_UUID", DomainLookupByUuid, OfDomain),
    _call(25, "CONNECT_NUM_OF_DEFINED_DOMAINS", Void, NumberReply),
    _call(27, "DOMAIN_REBOOT", OfDomainWithFlags, Void),
    _call(28, "DOMAIN_RESUME", OfDomain, Void),
    _call(29, "DOMAIN_SET_AUTOSTART", DomainSetAutostart, Void),
    _call(31, "DOMAIN_SET_MEMORY", DomainSetMemory, Void),
    _call(32, "DOMAIN_SET_VCPUS", DomainSetVcpus, Void),
    _call(33, "DOMAIN_SHUTDOWN", OfDomain, Void),
    _call(34, "DOMAIN_SUSPEND", OfDomain, Void),
    _call(35, "DOMAIN_UNDEFINE", OfDomain, Void),
    _call(37, "CONNECT_LIST_DOMAINS", ConnectListDomains, ConnectListDomainsReply),
    _call(51, "CONNECT_NUM_OF_DOMAINS", Void, NumberReply),
    _call(54, "DOMAIN_RESTORE", DomainRestore, Void),
    _call(55, "DOMAIN_SAVE", DomainSave, Void),
    _call(59, "CONNECT_GET_HOSTNAME", Void, ConnectGetHostnameReply),
    _call(60, "CONNECT_SUPPORTS_FEATURE", ConnectSupportsFeature, ConnectSupportsFeatureReply),
    _call(61, "DOMAIN_MIGRATE_PREPARE", DomainMigratePrepare, DomainMigratePrepareReply),
    _call(62, "DOMAIN_MIGRATE_PERFORM", DomainMigratePerform, Void),
    _call(63, "DOMAIN_MIGRATE_FINISH", DomainMigrateFinish, DomainMigrateFinishReply),
    _call(64, "DOMAIN_BLOCK_STATS", DomainBlockStats, DomainBlockStatsReply),
    _call(65, "DOMAIN_INTERFACE_STATS", DomainInterfaceStats, DomainInterfaceStatsReply),
    _call(66, "AUTH_LIST", Void, AuthListReply),
    _call(67, "AUTH_SASL_INIT", Void, AuthSaslInitReply),
    _call(68, "AUTH_SASL_START", AuthSaslStart, AuthSaslStartReply),
    _call(69, "AUTH_SASL_STEP", AuthSaslStep, AuthSaslStepReply),
    _call(70, "AUTH_POLKIT", Void, AuthPolkitReply),
    _call(101, "NODE_GET_CELLS_FREE_MEMORY", NodeGetCellsFreeMemory, NodeGetCellsFreeMemoryReply),
    _call(102, "NODE_GET_FREE_MEMORY", Void, NodeGetFreeMemoryReply),
    _call(105, "CONNECT_DOMAIN_EVENT_REGISTER", Void, ConnectDomainEventRegisterReply),
    _call(106, "CONNECT_DOMAIN_EVENT_DEREGISTER", Void, ConnectDomainEventDeregisterReply),
    _event(107, "DOMAIN_EVENT_LIFECYCLE", DomainEventLifecycle),
    _call(108, "DOMAIN_MIGRATE_PREPARE2", DomainMigratePrepare2, DomainMigratePrepare2Reply),
    _call(109, "DOMAIN_MIGRATE_FINISH2", DomainMigrateFinish2, DomainMigrateFinish2Reply),
    _call(110, "CONNECT_GET_URI", Void, ConnectGetUriReply),
    _call(122, "NODE_GET_SECURITY_MODEL", Void, NodeGetSecurityModelReply),
    _call(148, "DOMAIN_MIGRATE_PREPARE_TUNNEL", DomainMigratePrepareTunnel, Void),
    _call(149, "CONNECT_IS_SECURE", Void, ConnectIsSecureReply),
    _call(150, "DOMAIN_IS_ACTIVE", OfDomain, DomainIsActiveReply),
    _call(151, "DOMAIN_IS_PERSISTENT", OfDomain, DomainIsPersistentReply),
    _call(157, "CONNECT_GET_LIB_VERSION", Void, ConnectGetLibVersionReply),
    _call(158, "CONNECT_COMPARE_CPU", ConnectCompareCpu, ConnectCompareCpuReply),
    _call(159, "DOMAIN_MEMORY_STATS", DomainMemoryStats, DomainMemoryStatsReply),
    _call(160, "DOMAIN_ATTACH_DEVICE_FLAGS", DomainAttachDeviceFlags, Void),
    _call(161, "DOMAIN_DETACH_DEVICE_FLAGS", DomainAttachDeviceFlags, Void),
    _call(162, "CONNECT_BASELINE_CPU", ConnectBaselineCpu, ConnectBaselineCpuReply),
    _call(163, "DOMAIN_GET_JOB_INFO", OfDomain, DomainGetJobInfoReply),
    _call(164, "DOMAIN_ABORT_JOB", OfDomain, Void),
    _call(166, "DOMAIN_MIGRATE_SET_MAX_DOWNTIME", DomainMigrateSetMaxDowntime, Void),
    _call(167, "CONNECT_DOMAIN_EVENT_REGISTER_ANY", ConnectDomainEventRegisterAny, Void),
    _call(168, "CONNECT_DOMAIN_EVENT_DEREGISTER_ANY", ConnectDomainEventDeregisterAny, Void),
    _call(182, "DOMAIN_MANAGED_SAVE", OfDomainWithFlags, Void),
    _call(183, "DOMAIN_HAS_MANAGED_SAVE_IMAGE", OfDomainWithFlags, DomainHasManagedSaveImageReply),
    _call(187, "DOMAIN_SNAPSHOT_NUM", OfDomainWithFlags, NumberReply),
    _call(196, "DOMAIN_CREATE_WITH_FLAGS", OfDomainWithFlags, OfDomain),
    _call(199, "DOMAIN_SET_VCPUS_FLAGS", DomainSetVcpusFlags, Void),
    _call(200, "DOMAIN_GET_VCPUS_FLAGS", OfDomainWithFlags, NumberReply),
    _call(201, "DOMAIN_OPEN_CONSOLE", DomainOpenConsole, Void),
    _call(202, "DOMAIN_IS_UPDATED", OfDomain, DomainIsUpdatedReply),
    _call(203, "CONNECT_GET_SYSINFO", ConnectGetSysinfo, ConnectGetSysinfoReply),
    _call(204, "DOMAIN_SET_MEMORY_FLAGS", DomainSetMemoryFlags, Void),
    _call(207, "DOMAIN_MIGRATE_SET_MAX_SPEED", DomainMigrateSetMaxSpeed, Void),
    _call(212, "DOMAIN_GET_STATE", OfDomainWithFlags, DomainGetStateReply),
    _call(213, "DOMAIN_MIGRATE_BEGIN3", DomainMigrateBegin3, MigrateBeginReply),
    _call(214, "DOMAIN_MIGRATE_PREPARE3", DomainMigratePrepare3, MigratePrepareReply),
    _call(215, "DOMAIN_MIGRATE_PREPARE_TUNNEL3", DomainMigratePrepareTunnel3, CookieReply),
    _call(216, "DOMAIN_MIGRATE_PERFORM3", DomainMigratePerform3, CookieReply),
    _call(217, "DOMAIN_MIGRATE_FINISH3", DomainMigrateFinish3, MigrateFinishReply),
    _call(218, "DOMAIN_MIGRATE_CONFIRM3", DomainMigrateConfirm3, Void),
    _call(227, "NODE_GET_CPU_STATS", NodeGetCpuStats, NodeGetCpuStatsReply),
    _call(229, "DOMAIN_GET_CONTROL_INFO", OfDomainWithFlags, DomainGetControlInfoReply),
    _call(231, "DOMAIN_UNDEFINE_FLAGS", OfDomainWithFlags, Void),
    _call(234, "DOMAIN_DESTROY_FLAGS", OfDomainWithFlags, Void),
    _call(242, "DOMAIN_MIGRATE_GET_MAX_SPEED", OfDomainWithFlags, DomainMigrateGetMaxSpeedReply),
    _call(258, "DOMAIN_SHUTDOWN_FLAGS", OfDomainWithFlags, Void),
    _call(265, "DOMAIN_GET_METADATA", DomainGetMetadata, DomainGetMetadataReply),
    _call(273, "CONNECT_LIST_ALL_DOMAINS", ConnectListAllDomains, ConnectListAllDomainsReply),
    _call(293, "NODE_GET_CPU_MAP", NodeGetCpuMap, NodeGetCpuMapReply),
    _call(298, "DOMAIN_GET_JOB_STATS", OfDomainWithFlags, DomainGetJobStatsReply),
    _call(
        299, "DOMAIN_MIGRATE_GET_COMPRESSION_CACHE", OfDomainWithFlags, DomainMigrateGetCompressionCacheReply
    ),
    _call(300, "DOMAIN_MIGRATE_SET_COMPRESSION_CACHE", DomainMigrateSetCompressionCache, Void),
    _call(302, "DOMAIN_MIGRATE_BEGIN3_PARAMS", DomainMigrateBegin3Params, MigrateBeginReply),
    _call(303, "DOMAIN_MIGRATE_PREPARE3_PARAMS", DomainMigratePrepare3Params, MigratePrepareReply),
    _call(304, "DOMAIN_MIGRATE_PREPARE_TUNNEL3_PARAMS", DomainMigratePrepare3Params, CookieReply),
    _call(305, "DOMAIN_MIGRATE_PERFORM3_PARAMS", DomainMigratePerform3Params, CookieReply),
    _call(306, "DOMAIN_MIGRATE_FINISH3_PARAMS", DomainMigrateFinish3Params, MigrateFinishReply),
    _call(307, "DOMAIN_MIGRATE_CONFIRM3_PARAMS", DomainMigrateConfirm3Params, Void),
    _call(312, "CONNECT_GET_CPU_MODEL_NAMES", ConnectGetCpuModelNames, ConnectGetCpuModelNamesReply),
    _call(
        316,
        "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY",
        ConnectDomainEventCallbackRegisterAny,
        ConnectDomainEventCallbackRegisterAnyReply,
    ),
    _call(317, "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY", ConnectDomainEventCallbackDeregisterAny, Void),
    _event(318, "DOMAIN_EVENT_CALLBACK_LIFECYCLE", DomainEventCallbackLifecycle),
    _event(319, "DOMAIN_EVENT_CALLBACK_REBOOT", DomainEventCallbackReboot),
    _event(320, "DOMAIN_EVENT_CALLBACK_RTC_CHANGE", DomainEventCallbackRtcChange),
    _event(321, "DOMAIN_EVENT_CALLBACK_WATCHDOG", DomainEventCallbackWatchdog),
    _event(322, "DOMAIN_EVENT_CALLBACK_IO_ERROR", DomainEventCallbackIoError),
    _event(324, "DOMAIN_EVENT_CALLBACK_IO_ERROR_REASON", DomainEventCallbackIoErrorReason),
    _event(329, "DOMAIN_EVENT_CALLBACK_PMWAKEUP", DomainEventCallbackPmwakeup),
    _event(330, "DOMAIN_EVENT_CALLBACK_PMSUSPEND", DomainEventCallbackPmsuspend),
    _event(331, "DOMAIN_EVENT_CALLBACK_BALLOON_CHANGE", DomainEventCallbackBalloonChange),
    _event(332, "DOMAIN_EVENT_CALLBACK_PMSUSPEND_DISK", DomainEventCallbackPmsuspendDisk),
    _call(
        342,
        "CONNECT_GET_DOMAIN_CAPABILITIES",
        ConnectGetDomainCapabilities,
        ConnectGetDomainCapabilitiesReply,
    ),
    _call(344, "CONNECT_GET_ALL_DOMAIN_STATS", ConnectGetAllDomainStats, ConnectGetAllDomainStatsReply),
    _event(346, "DOMAIN_EVENT_CALLBACK_TUNABLE", DomainEventCallbackTunable),
    _event(348, "DOMAIN_EVENT_CALLBACK_AGENT_LIFECYCLE", DomainEventCallbackAgentLifecycle),
    _call(350, "DOMAIN_DEFINE_XML_FLAGS", DomainDefineXmlFlags, OfDomain),
    _event(354, "DOMAIN_EVENT_CALLBACK_DEVICE_ADDED", DomainEventCallbackDevice),
    _call(358, "DOMAIN_RENAME", DomainRename, DomainRenameReply),
    _event(359, "DOMAIN_EVENT_CALLBACK_MIGRATION_ITERATION", DomainEventCallbackMigrationIteration),
    _call(360, "CONNECT_REGISTER_CLOSE_CALLBACK", Void, Void),
    _call(361, "CONNECT_UNREGISTER_CLOSE_CALLBACK", Void, Void),
    _event(362, "CONNECT_EVENT_CONNECTION_CLOSED", ConnectEventConnectionClosed),
    _event(363, "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED", DomainEventCallbackJobCompleted),
    _call(364, "DOMAIN_MIGRATE_START_POST_COPY", OfDomainWithFlags, Void),
    _event(367, "DOMAIN_EVENT_CALLBACK_DEVICE_REMOVAL_FAILED", DomainEventCallbackDevice),
    _event(379, "DOMAIN_EVENT_CALLBACK_METADATA_CHANGE", DomainEventCallbackMetadataChange),
    _call(387, "DOMAIN_MIGRATE_GET_MAX_DOWNTIME", OfDomainWithFlags, DomainMigrateGetMaxDowntimeReply),
    _call(419, "CONNECT_SET_IDENTITY", ConnectSetIdentity, Void),
    _call(426, "DOMAIN_GET_MESSAGES", OfDomainWithFlags, DomainGetMessagesReply),
    _call(442, "DOMAIN_ABORT_JOB_FLAGS", OfDomainWithFlags, Void),
)

PROCEDURES = {procedure.number: procedure for procedure in _ALL}
"""Procedures of the remote program, by number."""
