"""Reads XML so that nothing in it is passed over: what no reader has asked for is an error in the end.

A reader asks a :class:`Node` for attributes, texts and children; each question marks what it is about as understood.
:meth:`Node.finish` refuses the first element, attribute or text that nobody has asked for, by name and line.  So the
readers in :mod:`ferryman_qemu.machine.read` *are* the list of what is understood, and none can forget one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ferryman.definition import definition_error, read_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ferryman.errors import DefinitionError

_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+")
_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}


class _Understood:
    """What has been asked for in one document."""

    def __init__(self) -> None:
        self.attributes: set[tuple[int, str]] = set()
        self.texts: set[int] = set()
        self.nodes: dict[int, Any] = {}
        self.whole: set[int] = set()


class Node:
    """An element that is being read.

    :raises DefinitionError: of every method: the value is none of those that are understood; names element and line.
    """

    def __init__(self, element: Any, understood: _Understood | None = None) -> None:
        self.element = element
        self._understood = understood or _Understood()
        # The element itself is kept too: its number is its own only while it lives.
        self._understood.nodes[id(element)] = element

    @property
    def tag(self) -> str:
        """Name of the element, without its namespace."""
        return str(self.element.tag).rpartition("}")[2]

    def error(self, message: str) -> DefinitionError:
        """Make the error for this element."""
        return definition_error(self.element, message)

    # Attributes

    def get(self, name: str) -> str | None:
        """An attribute, or None."""
        self._understood.attributes.add((id(self.element), name))
        value = self.element.get(name)
        return None if value is None else str(value)

    def need(self, name: str) -> str:
        """An attribute that must be there."""
        value = self.get(name)
        if value is None:
            raise self.error(f"<{self.tag}> has no attribute {name}")
        return value

    def choice(self, name: str, values: tuple[str, ...], default: str | None = None) -> str:
        """One of some values; without a default it must be there."""
        value = self.need(name) if default is None else self.get(name) or default
        if value not in values:
            raise self.error(
                f"{name}={value!r:.60} of <{self.tag}> is not supported: use {' or '.join(values)}"
            )
        return value

    def switch(self, name: str, *, default: bool | None = None) -> bool:
        """``yes``, ``on``, ``no`` or ``off``."""
        if default is not None and self.get(name) is None:
            return default
        return _SWITCHES[self.choice(name, tuple(_SWITCHES))]

    def maybe_switch(self, name: str) -> bool | None:
        """A switch, or None where nothing is said."""
        return None if self.get(name) is None else self.switch(name)

    def number(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number, decimal or hexadecimal with ``0x``; without a default it must be there."""
        text = self.get(name)
        if text is None and default is not None:
            return default
        return _number(self, self.need(name), name, low, high)

    def maybe_number(self, name: str, low: int, high: int) -> int | None:
        """A number, or None where nothing is said."""
        return None if self.get(name) is None else self.number(name, low, high)

    def word(self, name: str, what: str = "", default: str | None = None) -> str:
        """A word of letters, digits and ``-_.+``, at most 64 of them."""
        value = self.need(name) if default is None else self.get(name) or default
        return as_word(self, value, what or name)

    def path(self, name: str) -> str:
        """An absolute path."""
        return as_path(self, self.need(name))

    # Text and children

    def text(self) -> str:
        """The text of an element that holds nothing else."""
        self._understood.texts.add(id(self.element))
        if len(self.element):
            raise definition_error(self.element[0], f"<{self.tag}> holds a text, not <{self.element[0].tag}>")
        return (self.element.text or "").strip()

    def text_number(self, low: int, high: int) -> int:
        """A text that is a whole number."""
        return _number(self, self.text(), self.tag, low, high)

    def text_word(self, what: str) -> str:
        """A text that is one word."""
        return as_word(self, self.text(), what)

    def text_path(self) -> str:
        """A text that is an absolute path."""
        return as_path(self, self.text())

    def amount(self) -> int:
        """A text that is an amount of memory with the attribute ``unit``; bytes."""
        self.get("unit")
        self._understood.texts.add(id(self.element))
        return read_memory(self.element)

    def amount_of(self, name: str) -> int:
        """An attribute that is an amount of memory, with the attribute ``unit``, KiB where it is not there; bytes."""
        element = self.element.makeelement(name, unit=self.get("unit") or "KiB")
        element.text = self.need(name)
        return read_memory(element)

    def children(self, tag: str) -> list[Node]:
        """All children of a name, in their order."""
        return [Node(child, self._understood) for child in self.element.findall(tag)]

    def child(self, tag: str) -> Node | None:
        """The one child of a name, or None; a second one is an error."""
        found = self.children(tag)
        if len(found) > 1:
            raise found[1].error(f"<{self.tag}> has a second <{tag}>, and this driver takes one: remove it")
        return found[0] if found else None

    def need_child(self, tag: str) -> Node:
        """The one child of a name."""
        found = self.child(tag)
        if found is None:
            raise self.error(f"<{self.tag}> has no <{tag}>")
        return found

    def flag(self, tag: str) -> bool:
        """Whether an empty child of a name is there."""
        return self.child(tag) is not None

    # What nobody asks for

    def skip(self) -> None:
        """Take this element with all that is in it as understood, whatever it holds."""
        self._understood.whole.add(id(self.element))

    def finish(self, ignored: Mapping[str, str]) -> None:
        """Refuse what nobody has asked for.

        :param ignored: paths below this element that are accepted without effect; ``*`` stands for any one name, and
            ``@name`` at the end for an attribute.
        """
        self._check(self.element, "", ignored)

    def _check(self, element: Any, path: str, ignored: Mapping[str, str]) -> None:
        understood = self._understood
        if id(element) in understood.whole:
            return
        for name in element.attrib:
            if (id(element), name) not in understood.attributes and not _listed(
                _below(path, f"@{name}"), ignored
            ):
                raise definition_error(
                    element, f"the attribute {name} of <{element.tag}> is not understood: remove it"
                )
        texts = [element.text, *(child.tail for child in element)]
        if id(element) not in understood.texts:
            for text in texts:
                if text and text.strip(" \t\r\n"):
                    raise definition_error(
                        element,
                        f"the text {text.strip()!r:.40} in <{element.tag}> is not understood: remove it",
                    )
        for child in element:
            below = _below(path, str(child.tag))
            if _listed(below, ignored):
                continue
            if id(child) not in understood.nodes:
                raise definition_error(
                    child, f"<{child.tag}> in <{element.tag}> is not understood by this driver: remove it"
                )
            self._check(child, below, ignored)


def _below(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _listed(path: str, ignored: Mapping[str, str]) -> bool:
    if path in ignored:
        return True
    parts = path.split("/")
    return any(
        len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))
        for wanted in (entry.split("/") for entry in ignored if "*" in entry)
    )


def _number(node: Node, text: str, what: str, low: int, high: int) -> int:
    digits = text[2:] if text.startswith("0x") else text
    base = 16 if text.startswith("0x") else 10
    try:
        # int() alone would take signs, spaces, underscores and the digits of other scripts.
        if not (digits.isascii() and digits.isalnum() and len(digits) <= 20):
            raise ValueError
        number = int(digits, base)
    except ValueError:
        raise node.error(f"{text!r:.40} is not a whole number for {what} of <{node.tag}>") from None
    if not low <= number <= high:
        raise node.error(f"{what}={number} of <{node.tag}> is outside {low} to {high}")
    return number


def as_word(node: Node, text: str, what: str) -> str:
    """Check a word."""
    if not text or not set(text) <= _WORD or len(text) > 64:
        raise node.error(f"{text!r:.80} is not a {what}")
    return text


def as_path(node: Node, text: str) -> str:
    """Check an absolute path."""
    if not text.startswith("/") or "\0" in text or len(text) > 4096:
        raise node.error(f"{text!r:.80} is not an absolute path")
    return text
