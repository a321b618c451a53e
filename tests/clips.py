"""Small videos for tests, and ways to damage them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def moving_pictures(count: int, size: tuple[int, int] = (80, 96)) -> list[Pixels]:
    """``count`` pictures of ``(height, width)``: one smooth pattern that moves a pixel to the left each time."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (size[1] + count, size[0]), interpolation=cv2.INTER_LINEAR)
    return [np.ascontiguousarray(wide[:, i : i + size[1]]).astype(np.uint8) for i in range(count)]


def write_clip(path: Path, pictures: list[Pixels], fps: float = 25) -> Path:
    """MPEG-4 in ``.mp4`` or Motion JPEG in ``.avi``, by OpenCV."""
    code = {".mp4": "mp4v", ".avi": "MJPG"}[path.suffix]
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), fps, (width, height))
    for pixels in pictures:
        writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def turned(path: Path, degrees: int) -> Path:
    """The same file, with metadata by which players turn it clockwise; the matrix of its track header is replaced."""
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = np.array([cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30], ">i4")
    data = bytearray(path.read_bytes())
    begin = data.find(b"tkhd") + 4 + 40
    data[begin : begin + 36] = matrix.tobytes()
    made = path.with_stem(f"turned{degrees}")
    made.write_bytes(data)
    return made


def damaged(path: Path, frames: list[int], junk: bytes = b"\xff") -> Path:
    """The same file with the packets of ``frames`` overwritten, found by the bytes that PyAV reads."""
    import av

    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for frame in frames:
        begin = data.find(packets[frame])
        data[begin : begin + len(packets[frame])] = junk * len(packets[frame])
    made = path.with_stem("damaged")
    made.write_bytes(data)
    return made
