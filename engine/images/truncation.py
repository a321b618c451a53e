"""Pictures that lack their last bytes: a copy that was cut off, a card pulled too early.

Pillow has a switch for them, but for the whole process. Here the missing end is added to a copy of the file's bytes, so
that any reader takes it; nothing else changes, and threads do not meet.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

JPEG_END = b"\xff\xd9"
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
MOST_MISSING = 0.25  # of the rows: with more, what a picture shows may be what it lacks
PROBE = np.random.default_rng(0).integers(0, 255, 4096, np.uint8).tobytes()  # no 255, which would be a marker
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)  # y, x, dy, dx


@dataclass(frozen=True)
class Completed:
    """``data`` with an end, and the share of its rows that were ``missing``."""

    data: bytes = field(repr=False)
    missing: float


def complete(data: bytes) -> Completed | None:
    """The file with its end added; None if it is neither JPEG nor PNG, or lacks more than an end."""
    if data.startswith(b"\xff\xd8"):
        return _complete_jpeg(data)
    return _complete_png(data) if data.startswith(PNG_BEGIN) else None


def _complete_jpeg(data: bytes) -> Completed | None:
    """libjpeg fills what lies behind the marker with grey.

    What is missing begins where the picture depends on what is appended.
    """
    data = data.rstrip(b"\xff")  # half a marker
    try:
        filled, probed = (_decode(data + tail + JPEG_END) for tail in (b"", PROBE))
    except (OSError, ValueError, SyntaxError, struct.error):
        return None
    differ = (filled != probed).reshape(len(filled), -1).any(axis=1)
    missing = 1 - int(differ.argmax()) / len(differ) if differ.any() else 0.0
    return Completed(data + JPEG_END, missing)


def _decode(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return np.asarray(image)


def _complete_png(data: bytes) -> Completed | None:
    """The pixels that are there are packed anew, followed by zeros."""
    head, packed = _png_chunks(data)
    if len(head) < 1 or len(head[0][1]) != 13 or head[0][0] != b"IHDR":
        return None
    expected = _png_bytes(*struct.unpack(">IIBBxxB", head[0][1]))
    try:
        rows = zlib.decompressobj().decompress(packed, expected)
    except zlib.error:
        return None
    whole = zlib.compress(rows + bytes(expected - len(rows)), 1)
    chunks = [*head, (b"IDAT", whole), (b"IEND", b"")]
    return Completed(PNG_BEGIN + b"".join(_png_chunk(*chunk) for chunk in chunks), 1 - len(rows) / max(expected, 1))


def _png_chunks(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Chunks before the pixels, and the packed pixels as far as they go."""
    head, packed, place = [], b"", len(PNG_BEGIN)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + length]
        if kind == b"IDAT":
            packed += content
        elif packed:
            break
        else:
            head.append((kind, content))
        place += 12 + length
    return head, packed


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_bytes(width: int, height: int, depth: int, colours: int, interlaced: int) -> int:
    """How many bytes the unpacked rows have, each with the one that says how it was filtered."""
    bits = depth * CHANNELS.get(colours, 4)
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(max(0, -(-(height - y) // dy)), max(0, -(-(width - x) // dx))) for y, x, dy, dx in passes]
    return sum(h * (1 + -(-w * bits // 8)) for h, w in sizes if w)
