"""Read the first bytes of a video file: its kind of container, and the number of bytes it announces.

A cut Matroska file plays to where it ends and looks like a shorter video to every decoder. Its head knows better.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

__all__ = ["announced_bytes", "container"]

_SEGMENT = b"\x18S\x80g"


def container(head: bytes) -> str | None:
    """Name the kind by its first twelve bytes: "mp4" (QuickTime), "matroska" (WebM), "avi" or None for any other."""
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    return "mp4" if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip") else None


def announced_bytes(path: Path) -> int | None:
    """Add up the bytes of the boxes, chunks or segments of a file.

    None where the container does not say: transport streams, live recordings, other kinds of files.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        kind = container(head)
        if kind == "matroska":
            return _matroska(file)
        if kind == "avi":
            (length,) = struct.unpack("<I", head[4:8])
            return int(length) + 8 if length else None
        return _boxes(file, size) if kind == "mp4" else None


def _boxes(file: BinaryIO, size: int) -> int | None:
    """ISO base media: boxes one after the other, each with its length in front."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:  # a length of 64 bits follows
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: to the end of the file; less than a head: not a box
            return None
        at += length
    return at


def _matroska(file: BinaryIO) -> int | None:
    """EBML: a short header, then one segment that holds everything."""
    file.seek(4)
    header = _number(file)
    if header is None:
        return None
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return None
    length = _number(file)
    return None if length is None else file.tell() + length


def _number(file: BinaryIO) -> int | None:
    """A number of one to eight bytes, the leading zeros of the first saying how many; None for "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    rest = file.read(more)
    value = int.from_bytes(bytes([first[0] & (0x7F >> more)]) + rest, "big")
    return None if len(rest) < more or value == (1 << 7 * (more + 1)) - 1 else value
