"""Ferryman's own values as JSON, by their annotations: requests, replies, options, papers and errors.

Whatever the core's frozen data classes hold travels: texts, numbers, Booleans, None, bytes (base64), enumerations
(their value), tuples, lists, sets, dictionaries with texts as keys, and data classes (an object of their fields).  A
field that is not known here is an error, since a request half understood is not what was asked for.  Nothing here does
I/O.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import json
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NewType, TypeVar, Union, get_args, get_origin, get_type_hints

import ferryman.errors
import ferryman.types
from ferryman.capabilities import Capabilities
from ferryman.errors import FerrymanError, HypervisorError
from ferryman.handover import MigrationRow
from ferryman.plan import Plan
from ferryman.uri import ConnectionURI

T = TypeVar("T")

_NAMES: dict[str, Any] = {
    **vars(ferryman.types),
    "Any": Any,
    "ByteStream": object,
    "Callable": Callable,
    "Capabilities": Capabilities,
    "ConnectionURI": ConnectionURI,
    "HostEnd": object,
    "MigrationRow": MigrationRow,
    "Path": Path,
    "Plan": Plan,
    "Sequence": Sequence,
    "TaskGroup": object,
}
"""Names of annotations that modules import for the type checker only."""

_PLAIN = (str, int, float, bool, type(None))


class ValueFormError(ValueError):
    """What came is no value of the type that is due; the message says where."""


@cache
def hints_of(thing: Any) -> dict[str, Any]:
    """Annotations of a class or a function, resolved."""
    return get_type_hints(thing, None, _NAMES)


def dump(value: object) -> bytes:
    """A value as JSON. :raises TypeError: it holds what does not travel."""
    return json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":")).encode()


def load(hint: Any, data: bytes, **given: object) -> Any:
    """Read a value of a type.

    :param given: fields of the value that do not travel, such as what only this program can call.
    :raises ValueFormError: the bytes are none.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueFormError(f"no JSON: {error}") from error
    return _made(hint, found, "value", given)


def load_arguments(function: Callable[..., Any], data: bytes, **given: object) -> dict[str, Any]:
    """Read the arguments of a call by their names.

    :param given: those that do not travel.
    :raises ValueFormError: one is missing, unknown, or of another type.
    """
    hints = hints_of(function)
    expected = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
    }
    found = load(dict[str, object], data)
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise ValueFormError(f"{function.__name__} takes no {unknown[0]!r:.60}")
    arguments = {name: _made(hints[name], value, name) for name, value in found.items()} | given
    for name, parameter in expected.items():
        if name not in arguments and parameter.default is inspect.Parameter.empty:
            raise ValueFormError(f"{function.__name__} needs {name}")
    return arguments


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value) if each.init}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(each) for each in value), key=str)
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(each) for key, each in value.items()}
    if callable(value):
        return None
    raise TypeError(f"{type(value).__name__} does not travel")


def _wrong(at: str, hint: Any, found: object) -> ValueFormError:
    name = getattr(hint, "__name__", str(hint))
    return ValueFormError(f"{at}: {found!r:.60} is no {name}")


def _made(hint: Any, found: Any, at: str, given: dict[str, object] | None = None) -> Any:
    if isinstance(hint, NewType):
        hint = hint.__supertype__
    if hint is Any or hint is object:
        return found
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of(hint, found, at)
    if origin is not None:
        return _many(origin, get_args(hint), found, at)
    if not isinstance(hint, type):
        raise _wrong(at, hint, found)
    if hint is bytes:
        try:
            return base64.b64decode(found, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise _wrong(at, hint, found) from error
    if issubclass(hint, Enum):
        try:
            return hint(found)
        except ValueError as error:
            raise _wrong(at, hint, found) from error
    if is_dataclass(hint):
        return _object(hint, found, at, given or {})
    if hint is float and type(found) is int:
        return found
    if type(found) is not hint:
        raise _wrong(at, hint, found)
    return found


def _one_of(hint: Any, found: Any, at: str) -> Any:
    choices = get_args(hint)
    if found is None and type(None) in choices:
        return None
    failure: ValueFormError | None = None
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _made(choice, found, at)
        except ValueFormError as error:
            failure = error
    raise failure or _wrong(at, hint, found)


def _many(origin: Any, of: tuple[Any, ...], found: Any, at: str) -> Any:
    if origin is dict:
        if not isinstance(found, dict):
            raise _wrong(at, origin, found)
        return {
            _made(of[0], key, at): _made(of[1], each, f"{at}[{key!r:.40}]") for key, each in found.items()
        }
    if not isinstance(found, list):
        raise _wrong(at, origin, found)
    if origin is tuple and not (len(of) == 2 and of[1] is Ellipsis):
        if len(found) != len(of):
            raise _wrong(at, origin, found)
        return tuple(
            _made(hint, each, f"{at}[{n}]") for n, (hint, each) in enumerate(zip(of, found, strict=True))
        )
    made = [_made(of[0], each, f"{at}[{n}]") for n, each in enumerate(found)]
    return made if origin in (list, Sequence) else origin(made)


def _object(hint: Any, found: Any, at: str, given: dict[str, object]) -> Any:
    if not isinstance(found, dict):
        raise _wrong(at, hint, found)
    hints = hints_of(hint)
    known = {each.name: each for each in fields(hint) if each.init}
    unknown = sorted(found.keys() - known.keys())
    if unknown:
        raise ValueFormError(f"{at}: {unknown[0]!r:.60} is no field of {hint.__name__} that is known here")
    made: dict[str, Any] = {}
    for name, each in known.items():
        if name in given:
            made[name] = given[name]
        elif name in found:
            made[name] = _made(hints[name], found[name], f"{at}.{name}")
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueFormError(f"{at}: {hint.__name__} lacks {name}")
    try:
        return hint(**made)
    except FerrymanError:
        raise
    except (TypeError, ValueError) as error:
        raise ValueFormError(f"{at}: {error}") from error


# Errors


def _leaves(of: type[FerrymanError]) -> dict[str, type[FerrymanError]]:
    found = {of.code: of} if "code" in vars(of) else {}
    for each in of.__subclasses__():
        found.update(_leaves(each))
    return found


def dump_error(error: FerrymanError) -> tuple[str, bytes]:
    """An error's code, and what its class needs besides the message."""
    made_by = type(error).__init__
    names = inspect.signature(made_by).parameters if inspect.isfunction(made_by) else ()
    return error.code, dump({name: getattr(error, name) for name in names if name not in ("self", "message")})


def load_error(message: str, code: str, data: bytes) -> FerrymanError:
    """Make an error anew that another program raised; one of a newer version becomes a hypervisor's."""
    cls = _leaves(FerrymanError).get(code)
    if cls is None:
        return HypervisorError(message)
    try:
        found = json.loads(data)
        hints = hints_of(cls.__init__)
        return cls(message, **{name: _made(hints.get(name, Any), each, name) for name, each in found.items()})
    except (ValueError, TypeError, AttributeError):
        return HypervisorError(message)
