"""The file of a saved guest: what was written is read, and anything else is a clear error."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman.errors import DefinitionError, OptionError
from ferryman_qemu.savefile import (
    MAGIC,
    TEXT_MAX_BYTES,
    Saved,
    SaveFile,
    open_saved,
    save_path,
    unfinished_path,
)

SAVED = Saved(uuid="u", name="web", definition="<domain/>" * 600, qemu="7.2.22", running=True)
STREAM = b"QEVM" + bytes(range(256)) * 40


def write(path: Path, saved: Saved = SAVED, stream: bytes = STREAM) -> bytes:
    """Write a whole file, as a save does."""
    with SaveFile(path, saved) as file:
        os.write(file.descriptor, stream)
        file.complete()
        file.publish()
    return path.read_bytes()


def read(path: Path) -> tuple[Saved, bytes]:
    saved, descriptor = open_saved(path)
    with os.fdopen(descriptor, "rb") as file:
        return saved, file.read()


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("length", [1, 4000, 5000, 200_000])
def test_what_was_written_is_read(tmp_path: Path, running: bool, length: int) -> None:
    saved = Saved(uuid="u", name="ü/\0", definition="<" * length, qemu="7.2.22", running=running)
    path = tmp_path / "saved"
    path.write_text("an older one")
    whole = write(path, saved)
    assert whole.startswith(MAGIC)
    assert read(path) == (saved, STREAM)
    assert os.listdir(tmp_path) == ["saved"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_not_completed_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    with SaveFile(path, SAVED) as file:
        os.write(file.descriptor, STREAM)
        assert os.listdir(tmp_path) == [unfinished_path(path, SAVED.uuid).name]
        # One whose program died before it was complete is none.
        with pytest.raises(DefinitionError, match="no saved guest"):
            open_saved(unfinished_path(path, SAVED.uuid))
    assert os.listdir(tmp_path) == []


def test_every_cut_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    whole = write(path)
    for length in (*range(200), *range(200, len(whole), 997), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DefinitionError, match="not whole|no saved guest"):
            open_saved(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DefinitionError, match="not whole"):
        open_saved(path)


@given(st.data())
def test_every_changed_byte_of_the_header_is_seen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "saved"
    whole = bytearray(write(path))
    place = data.draw(st.integers(0, 36 + 5000))
    whole[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    with pytest.raises(DefinitionError):
        open_saved(path)


@given(st.binary(max_size=400))
def test_garbage_is_no_guest(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "saved"
    for data in (garbage, MAGIC + garbage):
        path.write_bytes(data)
        with pytest.raises(DefinitionError, match="saved guest|not whole|version|damaged"):
            open_saved(path)


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    whole = bytearray(write(path))
    whole[8:12] = struct.pack(">I", 2)
    path.write_bytes(whole)
    with pytest.raises(DefinitionError, match="version 2 of the format, and this driver reads 1"):
        open_saved(path)


def test_a_huge_text_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    whole = bytearray(write(path))
    whole[12:16] = struct.pack(">I", TEXT_MAX_BYTES + 1)
    path.write_bytes(whole)
    with pytest.raises(DefinitionError, match="damaged"):
        open_saved(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DefinitionError, match="cannot be read"):
            open_saved(path)


@pytest.mark.parametrize("text", ["", "saved", "./saved", "/", "/a/..", "/a\0b"])
def test_a_path_that_is_none(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        save_path(text)
    assert caught.value.option == "path"
