"""The exceptions of Ferryman: one root, one code for each leaf.

Every leaf has a ``code`` in kebab-case, and ``docs/errors/<code>.md`` says what it means and what to do::

    FerrymanError
     +-- URIError                     uri-invalid
     +-- DefinitionError              definition-invalid
     +-- CapabilitiesError            capabilities-invalid
     +-- OptionError                  option-invalid
     +-- DriverError
     |    +-- UnknownSchemeError      scheme-unknown
     |    +-- DriverLoadError         driver-load-failed
     |    +-- DriverContractError     driver-contract
     |    +-- NotSupportedError       not-supported
     |    +-- HypervisorError         hypervisor-failed
     +-- ConnectError                 connect-failed
     +-- HostBusyError                host-busy
     +-- AccessDeniedError            access-denied
     +-- ConnectionClosedError        connection-closed
     +-- DomainError
     |    +-- DomainNotFoundError     domain-not-found
     |    +-- DomainExistsError       domain-exists
     |    +-- DomainStateError        domain-state
     |    +-- DomainBusyError         domain-busy
     +-- JournalError                 journal-unusable
     |    +-- JournalFullError        journal-full
     |    +-- JournalBehindError      journal-behind
     +-- MigrationNotFoundError       migration-not-found
     +-- PaperError                   paper-invalid
     +-- MigrationError               (phase, side, domain, guest_state, rolled_back)
          +-- PlanBlockedError        plan-blocked
          +-- PlanStaleError          plan-stale
          +-- MigrationURIMissingError  migration-uri-missing
          +-- BeginError              begin-failed
          +-- PrepareError            prepare-failed
          +-- PerformError            perform-failed
          +-- FinishError             finish-failed
          +-- ConfirmError            confirm-failed
          +-- MigrationAbortedError   migration-aborted
          +-- GuestLostError          guest-lost
          +-- InDoubtError            in-doubt

Text is one sentence, says what to do if there is something to do, and never repeats its cause: the cause is
``__cause__``.  Cancellation is not an error of this tree and is never caught by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ferryman.types import Finding, GuestState, Phase, Side


class FerrymanError(Exception):
    """Root of all errors that Ferryman raises on purpose.

    ``code`` is stable across releases; the page ``docs/errors/<code>.md`` explains it.
    """

    code: ClassVar[str] = "error"

    @property
    def message(self) -> str:
        """The error's one sentence, without the context that subclasses append."""
        return str(self.args[0]) if self.args else self.code


class URIError(FerrymanError):
    """A connection or migration URI is malformed or ambiguous.

    :param text: the URI as given.
    :param position: 0-based index of the first character at fault, or None where no character is.
    """

    code = "uri-invalid"

    def __init__(self, message: str, *, text: str, position: int | None = None) -> None:
        super().__init__(message)
        self.text = text
        self.position = position


class DefinitionError(FerrymanError):
    """A domain definition cannot be used.

    :param element: path of the element at fault, such as ``devices/disk``.
    :param line: 1-based line in the document, or None.
    """

    code = "definition-invalid"

    def __init__(self, message: str, *, element: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.element = element
        self.line = line


class CapabilitiesError(FerrymanError):
    """A capability document is malformed or does not follow the schema."""

    code = "capabilities-invalid"

    def __init__(self, message: str, *, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class OptionError(FerrymanError):
    """A migration option has a value outside its range, or contradicts another option."""

    code = "option-invalid"

    def __init__(self, message: str, *, option: str) -> None:
        super().__init__(message)
        self.option = option


class DriverError(FerrymanError):
    """Something between Ferryman and a driver, or between a driver and its hypervisor."""


class UnknownSchemeError(DriverError):
    """No installed driver serves the scheme or transport of a connection URI."""

    code = "scheme-unknown"

    def __init__(self, message: str, *, scheme: str, installed: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.scheme = scheme
        self.installed = tuple(installed)


class DriverLoadError(DriverError):
    """A driver's entry point is installed but cannot be imported or constructed."""

    code = "driver-load-failed"

    def __init__(self, message: str, *, distribution: str) -> None:
        super().__init__(message)
        self.distribution = distribution


class DriverContractError(DriverError):
    """A driver or an observer broke the contract of ``hookspecs``; the distribution at fault is named."""

    code = "driver-contract"

    def __init__(self, message: str, *, distribution: str, hook: str) -> None:
        super().__init__(message)
        self.distribution = distribution
        self.hook = hook


class NotSupportedError(DriverError):
    """The driver does not do this; nothing was changed."""

    code = "not-supported"


class HypervisorError(DriverError):
    """The hypervisor refused or failed; the message holds what it said."""

    code = "hypervisor-failed"


class ConnectError(FerrymanError):
    """A connection could not be opened; nothing was left behind."""

    code = "connect-failed"


class HostBusyError(FerrymanError):
    """Another program holds the host and did not let go within the stated time."""

    code = "host-busy"


class AccessDeniedError(FerrymanError):
    """Whoever asked may not do that; nothing was changed."""

    code = "access-denied"


class ConnectionClosedError(FerrymanError):
    """The connection was closed before or during the call."""

    code = "connection-closed"


class DomainError(FerrymanError):
    """A domain is not as the call needs it; nothing was changed."""

    def __init__(self, message: str, *, domain: str) -> None:
        super().__init__(message)
        self.domain = domain


class DomainNotFoundError(DomainError):
    """No domain of that name or uuid is known to the host."""

    code = "domain-not-found"


class DomainExistsError(DomainError):
    """The name or the uuid is taken."""

    code = "domain-exists"


class DomainStateError(DomainError):
    """The domain's state does not allow the call."""

    code = "domain-state"


class DomainBusyError(DomainError):
    """A migration of the domain is open on this host and has locked it."""

    code = "domain-busy"


class JournalError(FerrymanError):
    """The host's journal cannot be read or written; no new migration starts on this host."""

    code = "journal-unusable"


class JournalFullError(JournalError):
    """Too little room for a migration's records; nothing was started."""

    code = "journal-full"


class JournalBehindError(JournalError):
    """The journal is older than the mark kept beside it: it was restored or replaced, and a person must look."""

    code = "journal-behind"


class MigrationNotFoundError(FerrymanError):
    """No migration of that id is known at this host."""

    code = "migration-not-found"


class PaperError(FerrymanError):
    """A cookie is not Ferryman's, is damaged, or is about another migration; nothing was changed."""

    code = "paper-invalid"


class MigrationError(FerrymanError):
    """A migration did not succeed.

    :param phase: the phase that failed.
    :param side: the side on which it failed.
    :param domain: the domain's name at the source.
    :param guest_state: where the guest is now.
    :param rolled_back: what was undone, in order, in plain words.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: Phase | None = None,
        side: Side | None = None,
        domain: str = "",
        guest_state: GuestState | None = None,
        rolled_back: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.phase = phase
        self.side = side
        self.domain = domain
        self.guest_state = guest_state
        self.rolled_back = tuple(rolled_back)

    def __str__(self) -> str:
        context = [f"domain {self.domain}"] if self.domain else []
        if self.phase is not None:
            context.append(f"phase {self.phase.value}")
        if self.side is not None:
            context.append(f"side {self.side.value}")
        if self.guest_state is not None:
            context.append(f"guest: {self.guest_state.sentence}")
        return f"{self.message} ({'; '.join(context)})" if context else self.message


class PlanBlockedError(MigrationError):
    """The plan has blockers; nothing was started.

    ``findings`` holds the blockers, each with its code, side and remedy.
    """

    code = "plan-blocked"

    def __init__(self, message: str, *, findings: Sequence[Finding], domain: str = "") -> None:
        super().__init__(message, domain=domain)
        self.findings = tuple(findings)


class PlanStaleError(MigrationError):
    """The world changed since the plan was shown; nothing was started.  ``changes`` says what changed."""

    code = "plan-stale"

    def __init__(self, message: str, *, changes: Sequence[str], domain: str = "") -> None:
        super().__init__(message, domain=domain)
        self.changes = tuple(changes)


class MigrationURIMissingError(MigrationError):
    """Neither the caller nor the destination named a migration URI; the guest runs at the source."""

    code = "migration-uri-missing"


class BeginError(MigrationError):
    """The source could not begin; nothing was started."""

    code = "begin-failed"


class PrepareError(MigrationError):
    """The destination could not prepare; it released what it had reserved and the guest runs at the source."""

    code = "prepare-failed"


class PerformError(MigrationError):
    """The state could not be sent."""

    code = "perform-failed"


class FinishError(MigrationError):
    """The destination refused the guest, which never ran there."""

    code = "finish-failed"


class ConfirmError(MigrationError):
    """The guest's owner is decided, but the source could not clean up or resume."""

    code = "confirm-failed"


class MigrationAbortedError(MigrationError):
    """The migration was aborted on request."""

    code = "migration-aborted"


class GuestLostError(MigrationError):
    """A fault destroyed the only valid copy of the guest's memory; the domain is shut off."""

    code = "guest-lost"


class InDoubtError(MigrationError):
    """The guest's owner cannot be told yet; the source's copy stays stopped until the destination answers.

    ``evidence_missing`` names what would settle it.
    """

    code = "in-doubt"

    def __init__(
        self,
        message: str,
        *,
        evidence_missing: str,
        phase: Phase | None = None,
        side: Side | None = None,
        domain: str = "",
        guest_state: GuestState | None = None,
        rolled_back: Sequence[str] = (),
    ) -> None:
        super().__init__(
            message, phase=phase, side=side, domain=domain, guest_state=guest_state, rolled_back=rolled_back
        )
        self.evidence_missing = evidence_missing
