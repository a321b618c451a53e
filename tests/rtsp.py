"""A camera on the network: a server that streams H.264 over RTSP, interleaved with its answers as cameras do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress

import av
import numpy as np
from numpy.typing import NDArray

START = b"\0\0\1"  # of a unit of H.264
TICKS = 90_000 // 25  # of a frame
SESSION = (
    "v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=camera", "t=0 0", "m=video 0 RTP/AVP 96", "a=rtpmap:96 H264/90000",
    "a=fmtp:96 packetization-mode=1", "a=control:track", "",
)  # fmt: skip


@contextmanager
def camera(pictures: list[NDArray[np.uint8]], *, stalls: bool = False, damaged: Container[int] = ()) -> Iterator[str]:
    """Address of a camera that shows ``pictures`` once, and then hangs up or stalls.

    Args:
        damaged: numbers of pictures of which half of the bytes are wrong.
    """
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_serve, args=(server, _encoded(pictures, damaged), stalls, over))
        thread.start()
        try:
            yield f"rtsp://user:secret@127.0.0.1:{server.getsockname()[1]}/stream"
        finally:
            over.set()
            with suppress(OSError):  # wakes a server that nobody called
                server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _encoded(pictures: list[NDArray[np.uint8]], damaged: Container[int]) -> list[list[bytes]]:
    """The units of each picture."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.height, encoder.width = pictures[0].shape[:2]
    encoder.pix_fmt, encoder.framerate = "yuv420p", 25
    encoder.options = {"tune": "zerolatency", "preset": "ultrafast", "g": "4"}
    packets = [encoder.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")) for pixels in pictures]
    frames = [[bytes(unit).rstrip(b"\0") for unit in bytes(packet).split(START)[1:]] for (packet,) in packets]
    return [[_torn(unit) for unit in units] if i in damaged else units for i, units in enumerate(frames)]


def _torn(unit: bytes) -> bytes:
    return unit[: len(unit) // 2] + b"\xff" * (len(unit) - len(unit) // 2)


def _serve(server: socket.socket, frames: list[list[bytes]], stalls: bool, over: threading.Event) -> None:
    with suppress(OSError):  # the client hung up
        client, _ = server.accept()
        with client, client.makefile("rb") as requests:
            while _answer(client, requests.readline(), requests) != b"PLAY":
                pass
            for number, units in enumerate(frames):
                client.sendall(b"".join(_packets(number, units)))
            if stalls:
                over.wait()


def _answer(client: socket.socket, line: bytes, requests: Iterator[bytes]) -> bytes:
    method = line.split()[0]
    headers = dict(header.strip().split(b": ", 1) for header in iter(lambda: next(requests), b"\r\n"))
    body = "\r\n".join(SESSION).encode() if method == b"DESCRIBE" else b""
    answer = [b"RTSP/1.0 200 OK", b"CSeq: " + headers[b"CSeq"], b"Session: 1", b"Public: DESCRIBE, SETUP, PLAY"]
    answer += [b"Transport: RTP/AVP/TCP;unicast;interleaved=0-1", b"Content-Type: application/sdp"]
    client.sendall(b"\r\n".join([*answer, b"Content-Length: %d" % len(body), b"", body]))
    return method


def _packets(number: int, units: list[bytes]) -> Iterator[bytes]:
    for i, unit in enumerate(units):
        last = 0x80 if i == len(units) - 1 else 0
        header = bytes([0x80, 96 | last]) + (number * 16 + i).to_bytes(2, "big") + (number * TICKS).to_bytes(4, "big")
        packet = header + b"\0\0\0\1" + unit
        yield b"$\0" + len(packet).to_bytes(2, "big") + packet
