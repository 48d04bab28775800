"""What a client's call does, to which domain, and the line that is written down of it."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from ferryman.definition import parse_definition
from ferryman.errors import DefinitionError
from ferryman.types import DomainUUID

if TYPE_CHECKING:
    from ferryman.hookspecs import Client

_audit = logging.getLogger("ferrymand.audit")

UNASKED = frozenset({"migrate_end"})
"""Actions that nobody is asked about: they settle a migration that has begun."""


class Subject(NamedTuple):
    """The domain that a call is about.

    :param known: the client says that the host has it: its uuid, and its name in the client's words.
    """

    uuid: DomainUUID | None = None
    name: str | None = None
    known: tuple[DomainUUID, str] | None = None


def subject_of(arguments: Any) -> Subject:
    """The domain of a call, by the names that libvirt's messages and the requests of hooks have for it."""
    dom = getattr(arguments, "dom", None)
    if dom is not None:
        return known(DomainUUID(str(UUID(bytes=dom.uuid))), dom.name)
    if hasattr(arguments, "uuid") and hasattr(arguments, "name"):
        return known(arguments.uuid, arguments.name)
    said = {each.field: each.value for each in getattr(arguments, "params", ())}
    named = getattr(arguments, "dname", None) or said.get("destination_name")
    if named:
        return Subject(None, named)
    written = [getattr(arguments, key, None) for key in ("xml", "xml_desc", "dom_xml", "definition")]
    definition = next(filter(None, written), said.get("destination_xml"))
    return defined(definition) if isinstance(definition, str) else Subject()


def known(uuid: DomainUUID, name: str) -> Subject:
    """A domain that a client says the host has."""
    return Subject(uuid, name, (uuid, name))


def defined(definition: str) -> Subject:
    """A domain that the host is to have."""
    try:
        parsed = parse_definition(definition)
    except DefinitionError:
        return Subject()  # the call will fail with the same
    return Subject(parsed.uuid, parsed.name)


def audit(
    client: Client, action: str, host: str, name: str | None, result: str, reason: str | None = None
) -> None:
    """Write down what became of a change.

    :param result: done, failed, cancelled or refused.
    """
    fields = {"who": client.identity, "from": str(client), "action": action, "host": host, "domain": name}
    fields |= {"result": result, "reason": reason}
    line = " ".join(f"{key}={json.dumps(value)}" for key, value in fields.items() if value is not None)
    _audit.info("%s", line)
