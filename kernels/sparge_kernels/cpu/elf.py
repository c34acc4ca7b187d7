"""Is a shared library of Linux whole? Its loader maps what the headers name, and where the file ends before, the
process dies of SIGBUS. macOS' loader looks by itself."""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
HEADER = struct.Struct("<32xQ14xHH6x")  # offset of the table of segments, size of an entry, number of entries
SEGMENT = struct.Struct("<8xQ16xQ")  # of an entry: offset and size in the file


def is_cut_off(library: Path) -> bool:
    """It ends before its headers or one of its segments do, or is empty.

    False of other files that are no library: a loader refuses them, in words.
    """
    size = library.stat().st_size
    with library.open("rb") as file:
        header = file.read(HEADER.size)
        if not header.startswith(MAGIC):
            return MAGIC.startswith(header)
        if len(header) < HEADER.size:
            return True
        start, length, count = HEADER.unpack(header)
        if length < SEGMENT.size:
            return False
        file.seek(start)
        table = file.read(length * count)
    if len(table) < length * count:
        return True
    segments = (SEGMENT.unpack_from(table, at) for at in range(0, len(table), length))
    return any(stored and offset + stored > size for offset, stored in segments)
