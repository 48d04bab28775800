"""Pre-flight: what one migration would do, what stops it, and what to do about that.

The plan that was shown is the plan that runs: :meth:`Plan.execute` looks again, and if the world changed it says what
changed instead of running.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from ferryman.capabilities import Negotiation, negotiate
from ferryman.definition import arriving_definition
from ferryman.errors import DefinitionError, DomainBusyError, DomainNotFoundError, FerrymanError, URIError
from ferryman.hookspecs import CheckReply, CheckRequest, LookupRequest
from ferryman.types import DomainInfo, Finding, FindingSeverity, MigrationOptions, Side, TimeoutAction
from ferryman.uri import MigrationURI

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ferryman.capabilities import Capabilities
    from ferryman.connection import Connection, Domain
    from ferryman.migration import MigrationJob


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One migration, checked against both hosts.

    :param options: as asked; ``effective`` is what runs, with dropped best-effort options at their defaults.
    :param definition_digest: of the definition that would be sent, so that a change is noticed.
    """

    domain: Domain
    destination: Connection
    info: DomainInfo
    options: MigrationOptions
    effective: MigrationOptions
    negotiation: Negotiation
    findings: tuple[Finding, ...]
    definition_digest: str
    source_capabilities: Capabilities
    destination_capabilities: Capabilities

    @property
    def source(self) -> Connection:
        """Connection of the host where the domain is now."""
        return self.domain.connection

    @property
    def blockers(self) -> tuple[Finding, ...]:
        """Findings that stop the migration."""
        return tuple(f for f in self.findings if f.severity is FindingSeverity.BLOCKER)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that do not stop it."""
        return tuple(f for f in self.findings if f.severity is FindingSeverity.WARNING)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Names of the best-effort options that are not supported and will not be used."""
        return tuple(o.option for o in self.negotiation.options if not o.used)

    def execute(self) -> MigrationJob:
        """Make the job that runs this plan; it starts when it is entered or awaited.

        The job raises :exc:`~ferryman.errors.PlanBlockedError` if there are blockers and
        :exc:`~ferryman.errors.PlanStaleError` if the world changed; nothing was started then.
        """
        from ferryman.migration import MigrationJob

        return MigrationJob(self.domain, self.destination, self.options, plan=self)

    def changes(self, newer: Plan) -> list[str]:
        """Say what is different in a newer plan of the same migration, in plain words."""
        said: list[str] = []
        if newer.info != self.info:
            said.append(
                f"the domain was {self.info.state.value} and is {newer.info.state.value}"
                if newer.info.state is not self.info.state
                else "the domain's name, size or persistence changed"
            )
        if newer.definition_digest != self.definition_digest:
            said.append("the domain's definition changed")
        if newer.source_capabilities != self.source_capabilities:
            said.append("the source's capabilities changed")
        if newer.destination_capabilities != self.destination_capabilities:
            said.append("the destination's capabilities changed")
        before, now = set(self.findings), set(newer.findings)
        said.extend(f"new: {f.message}" for f in newer.findings if f not in before)
        said.extend(f"no longer so: {f.message}" for f in self.findings if f not in now)
        return said

    def explain(self) -> str:
        """Write the plan for people, some lines of text."""
        lines = [f"migrate {self.info.name} from {self.source.uri} to {self.destination.uri}"]
        lines += [
            f"  option {o.option}: {'used' if o.used else 'dropped'}{f' ({o.reason})' if o.reason else ''}"
            for o in self.negotiation.options
        ]
        for finding in self.findings:
            side = f" at the {finding.side.value}" if finding.side is not None else ""
            lines.append(
                f"  {finding.severity.value}{side}: {finding.message} [{finding.code}]: {finding.remedy}"
            )
        lines.append("  ready" if not self.blockers else f"  blocked by {len(self.blockers)} finding(s)")
        return "\n".join(lines)


async def make_plan(
    domain: Domain,
    destination: Connection,
    options: MigrationOptions,
    *,
    likely: Callable[[DomainInfo, str, MigrationOptions], None] | None = None,
) -> Plan:
    """Look at both hosts and plan; changes nothing.

    :param likely: told what would move, by its definition and under which options, as soon as that is known and
        nothing that the core sees by itself stands against it; the drivers are asked after that.
    :raises HostBusyError: another program changes one of the hosts, and did not let go in time.
    :raises FerrymanError: a host could not be asked. What stops the migration is a blocker, not an error.
    :cancellation: nothing is left.
    """
    source = domain.connection
    # What stands against a migration is known to whoever may change the hosts.
    await source.acquire()
    await destination.acquire()
    info: DomainInfo
    definition: str
    able: Capabilities
    able_there: Capabilities
    info, definition, able, able_there = await _side_by_side(
        partial(source.hook_lookup, LookupRequest(uuid=domain.uuid, name=None)),
        domain.definition,
        source.capabilities,
        destination.capabilities,
    )
    negotiation = negotiate(able, able_there, options)
    used = negotiation.effective(options)
    arriving, unusable = definition, []
    try:
        arriving = arriving_definition(definition, used)
    except DefinitionError as error:
        unusable = [
            _blocker(
                "definition-unusable", None, error.message, "change the options that change the definition"
            )
        ]
    request = CheckRequest(
        side=Side.SOURCE,
        domain=info,
        definition=arriving,
        source_definition=definition,
        options=used,
        source=able,
        destination=able_there,
    )
    findings = [
        *_check_pair(source, destination, info, negotiation, request),
        *_check_options(options, negotiation),
        *_check_timeout(source, used),
        *unusable,
        *_check_locks(source, destination, info),
    ]
    if likely is not None and not findings:
        likely(info, definition, used)
    sides = _Checks()
    if not any(f.code == "driver-mismatch" for f in findings):
        await _side_by_side(
            partial(sides.check, source, destination, request),
            partial(sides.check_names, destination, info, used),
        )
    findings += sides.findings + sides.names
    plan = Plan(
        domain=domain,
        destination=destination,
        info=info,
        options=options,
        effective=used,
        negotiation=negotiation,
        findings=tuple(findings),
        definition_digest=hashlib.sha256(definition.encode()).hexdigest(),
        source_capabilities=able,
        destination_capabilities=able_there,
    )
    reviewed = [*await source.hooks.review(plan), *await destination.hooks.review(plan)]
    return replace(plan, findings=(*plan.findings, *dict.fromkeys(reviewed))) if reviewed else plan


async def _side_by_side(*asks: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Ask several things at once; the first error of Ferryman's ends the others and is raised as it is."""
    answers: list[Any] = [None] * len(asks)
    errors: list[FerrymanError] = []
    async with anyio.create_task_group() as tasks:

        async def one(number: int) -> None:
            try:
                answers[number] = await asks[number]()
            except FerrymanError as error:
                errors.append(error)
                tasks.cancel_scope.cancel()

        for number in range(len(asks)):
            tasks.start_soon(one, number)
    if errors:
        raise errors[0]
    return answers


class _Checks:
    """The drivers' own findings and those about names, gathered side by side."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.names: list[Finding] = []

    async def check(self, source: Connection, destination: Connection, request: CheckRequest) -> None:
        for connection, asked in ((source, Side.SOURCE), (destination, Side.DESTINATION)):
            if connection.hooks.has("migrate_check"):
                reply = await connection.hooks.call("migrate_check", replace(request, side=asked), CheckReply)
                self.findings.extend(reply.findings)
                request = replace(request, facts=reply.facts)

    async def check_names(self, destination: Connection, info: DomainInfo, options: MigrationOptions) -> None:
        if not destination.hooks.has("domain_lookup"):
            return
        name = options.name or info.name
        same_name = await _find(destination, LookupRequest(name=name))
        if same_name is not None and same_name.uuid != info.uuid:
            self.names.append(
                _blocker(
                    "name-taken",
                    Side.DESTINATION,
                    f"another domain is called {name}",
                    "rename one of the two (option name)",
                )
            )
        same_uuid = await _find(destination, LookupRequest(uuid=info.uuid))
        if same_uuid is not None and same_uuid.state.active:
            self.names.append(
                _blocker(
                    "uuid-taken",
                    Side.DESTINATION,
                    f"domain {same_uuid.name} with uuid {info.uuid} is already active there",
                    "destroy one of the two",
                )
            )
        elif same_uuid is not None and same_uuid.name != name:
            self.names.append(
                _blocker(
                    "uuid-taken",
                    Side.DESTINATION,
                    f"uuid {info.uuid} is defined there as {same_uuid.name}",
                    f"undefine it there, or set the option name to {same_uuid.name}",
                )
            )


async def _find(connection: Connection, request: LookupRequest) -> DomainInfo | None:
    try:
        return await connection.hook_lookup(request)
    except DomainNotFoundError:
        return None


def _blocker(code: str, side: Side | None, message: str, remedy: str) -> Finding:
    return Finding(code=code, severity=FindingSeverity.BLOCKER, side=side, message=message, remedy=remedy)


def _check_pair(
    source: Connection,
    destination: Connection,
    info: DomainInfo,
    negotiation: Negotiation,
    request: CheckRequest,
) -> list[Finding]:
    findings: list[Finding] = []
    a, b = request.source, request.destination
    if source.address == destination.address or a.host_uuid == b.host_uuid:
        findings.append(
            _blocker(
                "same-host",
                None,
                f"{source.uri} and {destination.uri} are the same host",
                "name another host",
            )
        )
    if a.scheme != b.scheme:
        findings.append(
            _blocker(
                "driver-mismatch",
                None,
                f"the source is driven as {a.scheme} and the destination as {b.scheme}",
                "migrate between hosts of one hypervisor",
            )
        )
        return findings
    if not info.state.active:
        findings.append(
            _blocker(
                "domain-not-active",
                Side.SOURCE,
                f"domain {info.name} is {info.state.value}, so there is nothing to move live",
                "start it, or define it at the destination",
            )
        )
    if not negotiation.live:
        findings.append(
            _blocker(
                "live-unsupported", None, "one of the two cannot migrate live", "see both hosts' capabilities"
            )
        )
    if a.arch != b.arch:
        findings.append(
            _blocker(
                "arch-mismatch",
                Side.DESTINATION,
                f"the guest needs {a.arch} and the host is {b.arch}",
                "choose a destination of the same architecture",
            )
        )
    if b.version < a.version:
        findings.append(
            Finding(
                code="version-older",
                severity=FindingSeverity.WARNING,
                side=Side.DESTINATION,
                message=f"{b.hypervisor} {_dotted(b.version)} is older than the source's {_dotted(a.version)}",
                remedy="migrate from older to newer versions",
            )
        )
    if b.memory_bytes is not None and b.memory_bytes < info.memory_bytes:
        findings.append(
            _blocker(
                "memory-short",
                Side.DESTINATION,
                f"the guest needs {info.memory_bytes} bytes of memory and the host has {b.memory_bytes}",
                "choose a larger destination",
            )
        )
    findings += _check_uri(request.options.migration_uri, negotiation.transports)
    return findings


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _check_uri(text: str | None, transports: tuple[str, ...]) -> list[Finding]:
    if not transports:
        return [
            _blocker(
                "transport-unsupported",
                None,
                "the two hosts have no transport in common",
                "see <uri_transports> in both hosts' capabilities",
            )
        ]
    if text is None:
        return []
    try:
        protocol = MigrationURI.parse(text).protocol or transports[0]
    except URIError as error:
        return [
            _blocker("migration-uri-invalid", None, error.message, "write host:port or protocol://host:port")
        ]
    if protocol in transports:
        return []
    return [
        _blocker(
            "transport-unsupported",
            None,
            f"the migration URI asks for {protocol}, and both hosts only have {', '.join(transports)}",
            f"use {transports[0]}",
        )
    ]


def _check_options(options: MigrationOptions, negotiation: Negotiation) -> list[Finding]:
    return [
        _blocker(
            "option-unsupported",
            None,
            f"option {outcome.option} cannot be used: {outcome.reason}",
            f"leave {outcome.option} out, or name it in best_effort",
        )
        for outcome in negotiation.refused(options)
    ]


def _check_timeout(source: Connection, used: MigrationOptions) -> list[Finding]:
    """See whether what is to be done after the time-out can be done."""
    action = used.timeout_action
    reason = ""
    if used.timeout_s is not None and action is TimeoutAction.POSTCOPY and used.postcopy is None:
        reason = "post-copy is not allowed in this migration"
    if (
        used.timeout_s is not None
        and action is TimeoutAction.SUSPEND
        and not source.hooks.has("domain_suspend")
    ):
        reason = "the source's driver does not suspend domains"
    if not reason:
        return []
    return [
        _blocker(
            "option-unsupported",
            None,
            f"option timeout_action cannot be used: {reason}",
            "choose another action",
        )
    ]


def _check_locks(source: Connection, destination: Connection, info: DomainInfo) -> list[Finding]:
    findings: list[Finding] = []
    for side, connection in ((Side.SOURCE, source), (Side.DESTINATION, destination)):
        try:
            connection.host.require_free(info.uuid, info.name)
        except DomainBusyError as error:
            findings.append(
                _blocker(
                    "domain-busy",
                    side,
                    error.message,
                    "wait for the other migration, abort it, or resolve it",
                )
            )
    return findings
