"""The file that a saved guest lies in.

::

    offset  bytes
    0       8       magic, "FERRYSAV"
    8       4       version of the format, 1
    12      4       length of the text
    16      8       where QEMU's stream begins, a multiple of 4096
    24      8       length of QEMU's stream
    32      4       CRC-32 of the 32 bytes above and of the text
    36      ...     the text: JSON of :class:`Saved`
    ...             zeros, then the stream, to the end of the file

Numbers are big-endian.  The file grows under another name beside its own and gets that when it is whole and on disk.
So a file of the right name is whole, unless somebody cut it; its length is checked against what it says.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from ferryman.errors import DefinitionError, OptionError
from ferryman_qemu.root import sync_directory

MAGIC = b"FERRYSAV"
VERSION = 1
TEXT_MAX_BYTES = 4 * 1024 * 1024
"""A longer text is refused before it is read."""

_HEAD = struct.Struct(">8sIIQQ")
_SUM = struct.Struct(">I")
_ALIGNED = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What the file says of its guest.

    :param definition: what it was started from.
    :param qemu: version of the QEMU that wrote the stream.
    :param running: it ran when it was saved.
    """

    uuid: str
    name: str
    definition: str
    qemu: str
    running: bool


def save_path(text: str) -> Path:
    """The file of a request. :raises OptionError: it is no absolute path of a file."""
    path = Path(text)
    if not path.is_absolute() or "\0" in text or path.name in ("", ".", ".."):
        raise OptionError(f"path must be the absolute path of a file, not {text!r:.80}", option="path")
    return path


def unfinished_path(path: Path, uuid: str) -> Path:
    """Where a file grows until it is whole."""
    return path.with_name(f".{path.name[:100]}.{uuid}.new")


class SaveFile:
    """A file that is being written; leaving its block closes it and removes what is not whole."""

    def __init__(self, path: Path, saved: Saved) -> None:
        self._path = path
        self._unfinished = unfinished_path(path, saved.uuid)
        self._text = json.dumps(asdict(saved)).encode()
        size = _HEAD.size + _SUM.size + len(self._text)
        self._begin = -(-size // _ALIGNED) * _ALIGNED
        self.descriptor = -1

    def __enter__(self) -> Self:
        """Make the file. :raises OSError: there is no room, or no right to."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        self.descriptor = os.open(self._unfinished, flags, 0o600)
        os.lseek(self.descriptor, self._begin, os.SEEK_SET)
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.descriptor)
        with suppress(OSError):
            self._unfinished.unlink()

    def complete(self) -> None:
        """Write the header over the beginning, and see to it that all is on disk; blocking.

        :raises OSError: it is not.
        """
        stream_bytes = os.lseek(self.descriptor, 0, os.SEEK_END) - self._begin
        head = _HEAD.pack(MAGIC, VERSION, len(self._text), self._begin, stream_bytes)
        check = _SUM.pack(zlib.crc32(self._text, zlib.crc32(head)))
        os.pwrite(self.descriptor, head + check + self._text, 0)
        os.fsync(self.descriptor)

    def publish(self) -> None:
        """Give the file its name; blocking. :raises OSError: it has it not."""
        publish(self._unfinished, self._path)


def publish(unfinished: Path, path: Path) -> None:
    """Give a whole file its name. :raises OSError: it has it not."""
    unfinished.replace(path)
    try:
        sync_directory(path.parent)
    except OSError as error:
        _log.warning("the name of %s may be lost with the power: %s", path, error)


def open_saved(path: Path) -> tuple[Saved, int]:
    """Open a file; blocking.

    :returns: what it says, and a descriptor that stands where QEMU's stream begins and is the caller's to close.
    :raises DefinitionError: it cannot be read, is none of ours, of a newer format, damaged or cut.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DefinitionError(f"{path} cannot be read: {error.strerror}") from error
    try:
        saved, begin = _read(path, descriptor)
        os.lseek(descriptor, begin, os.SEEK_SET)
    except OSError as error:
        os.close(descriptor)
        raise DefinitionError(f"{path} cannot be read: {error.strerror}") from error
    except BaseException:
        os.close(descriptor)
        raise
    return saved, descriptor


def _read(path: Path, descriptor: int) -> tuple[Saved, int]:
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, _HEAD.size, 0)
    if not head.startswith(MAGIC):
        raise DefinitionError(f"{path} is no saved guest of this driver's")
    cut = DefinitionError(f"{path} is not whole: it was cut, or never finished")
    if len(head) < _HEAD.size:
        raise cut
    _magic, version, text_bytes, begin, stream_bytes = _HEAD.unpack(head)
    if version != VERSION:
        raise DefinitionError(
            f"{path} has version {version} of the format, and this driver reads {VERSION}: use a newer one"
        )
    damaged = DefinitionError(f"{path} is damaged: its header does not fit its sum")
    if text_bytes > TEXT_MAX_BYTES or begin % _ALIGNED or begin < _HEAD.size + _SUM.size + text_bytes:
        raise damaged
    text = os.pread(descriptor, _SUM.size + text_bytes, _HEAD.size)
    if len(text) < _SUM.size + text_bytes:
        raise cut
    check, text = text[: _SUM.size], text[_SUM.size :]
    if _SUM.unpack(check) != (zlib.crc32(text, zlib.crc32(head)),):
        raise damaged
    if size != begin + stream_bytes or not stream_bytes:
        raise cut
    return _parse(text, damaged), begin


def _parse(text: bytes, damaged: DefinitionError) -> Saved:
    try:
        told: dict[str, Any] = json.loads(text)
        saved = Saved(**{field.name: told[field.name] for field in fields(Saved)})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged from error
    texts = (saved.uuid, saved.name, saved.definition, saved.qemu)
    if not all(isinstance(value, str) for value in texts) or not isinstance(saved.running, bool):
        raise damaged
    return saved
