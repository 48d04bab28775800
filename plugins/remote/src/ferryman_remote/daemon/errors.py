"""Ferryman's errors as libvirt's numbers, and both as the wire's error.

Source: libvirt, include/libvirt/virterror.h.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from ferryman import errors
from ferryman_remote.protocol import RemoteError
from ferryman_remote.values import dump_error

if TYPE_CHECKING:
    from ferryman.errors import FerrymanError


class Code(IntEnum):
    """Numbers of errors."""

    INTERNAL = 1
    NO_SUPPORT = 3
    NO_CONNECT = 5
    INVALID_ARG = 8
    OPERATION_FAILED = 9
    XML = 27
    DOM_EXIST = 28
    OPERATION_DENIED = 29
    SYSTEM = 38
    RPC = 39
    NO_DOMAIN = 42
    AUTH_FAILED = 45
    OPERATION_INVALID = 55
    OPERATION_TIMEOUT = 68
    ARGUMENT_UNSUPPORTED = 74
    OPERATION_ABORTED = 78
    RESOURCE_BUSY = 87
    ACCESS_DENIED = 88
    MIGRATE_FINISH_OK = 93


class Of(IntEnum):
    """Which part of libvirt an error is of."""

    NONE = 0
    RPC = 7
    QEMU = 10
    REMOTE = 13
    DOMAIN = 20
    AUTH = 46


_CODES: dict[type[FerrymanError], Code] = {
    errors.URIError: Code.INVALID_ARG,
    errors.DefinitionError: Code.XML,
    errors.OptionError: Code.INVALID_ARG,
    errors.UnknownSchemeError: Code.NO_CONNECT,
    errors.DriverLoadError: Code.NO_CONNECT,
    errors.ConnectError: Code.NO_CONNECT,
    errors.NotSupportedError: Code.NO_SUPPORT,
    errors.HypervisorError: Code.OPERATION_FAILED,
    errors.HostBusyError: Code.RESOURCE_BUSY,
    errors.AccessDeniedError: Code.ACCESS_DENIED,
    errors.DomainNotFoundError: Code.NO_DOMAIN,
    errors.DomainExistsError: Code.DOM_EXIST,
    errors.DomainStateError: Code.OPERATION_INVALID,
    errors.DomainBusyError: Code.OPERATION_INVALID,
    errors.MigrationAbortedError: Code.OPERATION_ABORTED,
    errors.PlanBlockedError: Code.ARGUMENT_UNSUPPORTED,
    errors.MigrationError: Code.OPERATION_FAILED,
    errors.PaperError: Code.INVALID_ARG,
}


class WireFault(Exception):
    """An error that is libvirt's own, by its number.

    :param of: which part of libvirt it is of.
    """

    def __init__(self, code: Code, message: str, of: Of = Of.QEMU) -> None:
        super().__init__(message)
        self.code = code
        self.of = of
        self.message = message


def fault(error: WireFault) -> RemoteError:
    """As a stock daemon words it."""
    return RemoteError(error.code, error.of, error.message, 2, None, "%s", error.message, None, -1, -1, None)


def told(error: FerrymanError) -> RemoteError:
    """An error for a client of libvirt's."""
    code = next((_CODES[cls] for cls in type(error).__mro__ if cls in _CODES), Code.OPERATION_FAILED)
    if isinstance(error, errors.UnknownSchemeError):
        return fault(WireFault(code, str(error), Of.NONE))
    return fault(WireFault(code, str(error)))


def told_to_ferryman(error: FerrymanError) -> RemoteError:
    """An error for a client of Ferryman's, which makes it anew."""
    known = told(error)
    code, needs = dump_error(error)
    return known._replace(message=error.message, str1=code, str2=needs.decode())
